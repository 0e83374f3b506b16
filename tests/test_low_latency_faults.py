"""Ranks that die, stay away or are masked in low-latency mode: typed errors in time, or exact results for the living.

Experts change nothing here, so a token comes back as often, or with the weight, as its routes that were served.
Faults leave a process group in an odd state, so each test has a pool of its own.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Collection

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import EpBuffer, LowLatencyDispatchOutput, Pending
from tests.cases import bits
from tests.conftest import all_pids, shared_segments
from tests.harness import RankDied, RankPool
from tests.test_faults import attempt, make_config, needs_host

E, K, H, T = 8, 2, 64, 16
TIMEOUT_S = 1.5
# Longest that a test allows for noticing a fault: the timeout, and slack for a busy machine.
NOTICED_S = TIMEOUT_S + 8.0


def make_buffer(backend: str = "host", **changes: object) -> EpBuffer:
    return EpBuffer(None, make_config(backend, **({"low_latency_tokens_per_rank": T} | changes)))


def given(rank: int, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole numbers, ids (-1 among them) and weights in eighths of one rank's step."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    x = torch.randint(-8, 8, (T, H), generator=generator).float()
    idx = torch.randint(-1, E, (T, K), generator=generator)
    return x, idx, torch.randint(1, 9, (T, K), generator=generator) / 8


class Step:
    """One step of a buffer and what must come of it while some ranks are missing."""

    def __init__(self, buffer: EpBuffer, number: int, *, weighted: bool = True) -> None:
        self._buffer = buffer
        self._number = number
        self._by_rank = buffer.config.low_latency_layout == "rank"
        self._x, self._idx, self._weights = given(buffer.rank, number)
        self._weighted = weighted and not self._by_rank
        self._rank_of = torch.tensor([*buffer.placement.expert_to_rank, -1])

    def send(self) -> Pending[LowLatencyDispatchOutput]:
        return self._buffer.low_latency_dispatch(self._x, self._idx, async_op=True)

    def dispatch(self, masked: Collection[int] = (), *, given_up: bool = False) -> LowLatencyDispatchOutput:
        """Receive from all but ``masked``; nothing if the step is given up."""
        out = self.send().wait()
        self.check_received(out, masked, given_up=given_up)
        return out

    def check_received(
        self, out: LowLatencyDispatchOutput, masked: Collection[int] = (), *, given_up: bool = False
    ) -> None:
        buffer = self._buffer
        sources = [] if given_up else [r for r in range(buffer.num_ranks) if r not in masked]
        mine = buffer.placement.experts_of_rank[buffer.rank]
        there = {source: given(source, self._number) for source in sources}
        counts = [sum(int((there[s][1] == expert).sum()) for s in sources) for expert in mine]
        assert out.tokens_per_expert.tolist() == counts, (out.tokens_per_expert.tolist(), counts)
        if self._by_rank:
            rows = [x[(self._rank_of[idx] == buffer.rank).any(1)] for x, idx, _ in there.values()]
            groups, received = [torch.cat(rows) if rows else torch.empty(0, H)], [out.x]
        else:
            rows = [[x[(idx == expert).nonzero()[:, 0]] for x, idx, _ in there.values()] for expert in mine]
            groups = [torch.cat(r) if r else torch.empty(0, H) for r in rows]
            received = list(out.x)
        assert int(out.num_received) == sum(map(len, groups))
        for want, got in zip(groups, received, strict=True):
            assert torch.equal(bits(got[: len(want)]), bits(want))

    def combine(self, out: LowLatencyDispatchOutput, masked: Collection[int] = (), *, given_up: bool = False) -> None:
        """Sums without the routes to ``masked``, or without any; the lost weights are exactly theirs."""
        weights = self._weights if self._weighted else None
        back = self._buffer.low_latency_combine(out.x, self._idx, weights, out.handle).wait()
        rank = self._rank_of[self._idx]
        routed = self._idx >= 0
        gone = routed & (
            torch.full_like(routed, given_up) | torch.isin(rank, torch.tensor([*masked], dtype=rank.dtype))
        )
        factors = self._weights if self._weighted else torch.ones(T, K)
        lost = (factors * gone).sum(1)
        assert torch.equal(back.lost_weights, lost), (self._number, back.lost_weights, lost)
        if self._by_rank:  # One row for all of a rank's experts.
            there = torch.where(routed & ~gone, rank, -1).tolist()
            served = torch.tensor([float(len(set(row) - {-1})) for row in there])
        else:
            served = (factors * (routed & ~gone)).sum(1)
        assert torch.equal(back.x, served[:, None] * self._x), (self._number, masked, given_up)

    def run(self, masked: Collection[int] = (), *, given_up: bool = False) -> None:
        self.combine(self.dispatch(masked, given_up=given_up), masked, given_up=given_up)


def run_steps(buffer: EpBuffer, numbers: range, masked: Collection[int] = ()) -> None:
    """Steps in both buffers, with and without weights, that miss nothing but the masked ranks."""
    for number in numbers:
        Step(buffer, number, weighted=number % 3 != 2).run(masked)


# Without masks


def missing_in(half: str, fault: str, **changes: object):  # type: ignore[no-untyped-def]
    """Rank 1 dies, stays away or leaves before the dispatch or the combine of a step that the others do."""
    buffer = make_buffer(**changes)
    run_steps(buffer, range(3))
    step = Step(buffer, 3)
    out = step.dispatch() if half == "combine" else None
    if buffer.rank == 1:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "closed":
            del out
            buffer.close()
        time.sleep(TIMEOUT_S + 1.0 if fault == "away" else 1.0)
        return None
    first = attempt(step.dispatch) if out is None else attempt(step.combine, out)
    second = attempt(Step(buffer, 4).dispatch)
    buffer.close()
    return first, second


@needs_host
@pytest.mark.parametrize("half", ["dispatch", "combine"])
@pytest.mark.parametrize("fault", ["killed", "away", "closed"])
def test_missing_rank(half: str, fault: str) -> None:
    with RankPool(3) as pool:
        timeout_s = TIMEOUT_S if fault == "away" else 30.0
        args = (half, fault)
        results = pool.run_with(missing_in, args, {"timeout_s": timeout_s}, may_die=[1] if fault == "killed" else [])
    assert isinstance(results[1], RankDied) == (fault == "killed")
    told = []
    for first, second in (results[0], results[2]):
        names, text, seconds = first
        assert "PeerTimeout" in names, (names, text)
        assert seconds < NOTICED_S
        assert second[0][0] == "StateError" and "has failed" in second[1], second
        # The survivor that gives up second may find that the first has left.
        if re.search(r"for rank 1 \(pid \d+\)", text):
            told.append((names[0], text, seconds))
            assert f"low-latency {half}" in text, text
    assert told, results
    for name, text, seconds in told:
        if fault == "away":
            assert name == "PeerTimeout" and seconds >= TIMEOUT_S * 0.9, (name, text)
            assert f"waited {TIMEOUT_S:g} s for rank 1" in text, text
        else:
            why = "its process has ended" if fault == "killed" else "has closed its buffer"
            assert name == "PeerLost" and why in text, (name, text)


def run_with_late_ranks(kind: type[Step], buffer: EpBuffer, seconds: float) -> None:
    """Steps in which one rank after the other comes ``seconds`` later than the others before each of its halves."""
    for number in range(3):
        step = kind(buffer, number)
        late = seconds if number % buffer.num_ranks == buffer.rank else 0
        time.sleep(late)
        pending = step.send()
        time.sleep(late)
        out = pending.wait()
        del pending
        step.check_received(out)
        time.sleep(late)
        step.combine(out)
        del out


def comes_late(backend: str) -> bool:
    with make_buffer(backend) as buffer:
        run_with_late_ranks(Step, buffer, 0.15)
    return True


def test_late_rank_is_waited_for(backend: str) -> None:
    with RankPool(3) as pool:
        assert pool.run(comes_late, backend) == [True] * 3


# With masks


def goes_on_without_the_dead(half: str, layout: str) -> bool:
    buffer = make_buffer(low_latency_layout=layout, mask_on_timeout=True)
    run_steps(buffer, range(3))
    step = Step(buffer, 3)
    out = step.dispatch() if half == "combine" else None
    if buffer.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if out is None:
        step.run(masked=[1], given_up=True)
    else:
        step.combine(out, masked=[1])
    del out
    assert buffer.masked_ranks() == (1,)
    run_steps(buffer, range(4, 12), masked=[1])
    assert buffer.masked_ranks() == (1,)
    buffer.close()
    return True


@needs_host
@pytest.mark.parametrize("half", ["dispatch", "combine"])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_others_go_on_without_a_killed_rank(half: str, layout: str) -> None:
    with RankPool(4) as pool:
        results = pool.run_with(goes_on_without_the_dead, (half, layout), may_die=[1])
    assert [results[r] for r in (0, 2, 3)] == [True] * 3
    assert isinstance(results[1], RankDied)


def goes_on_without_the_late(layout: str):  # type: ignore[no-untyped-def]
    """Rank 2 comes when it has been masked, while the others hold what the buffer it would write to has received."""
    buffer = make_buffer(low_latency_layout=layout, mask_on_timeout=True, timeout_s=TIMEOUT_S)
    run_steps(buffer, range(2))
    started = time.monotonic()
    if buffer.rank == 2:
        time.sleep(TIMEOUT_S + 1.5)
        x, idx, _ = given(2, 2)

        def both() -> None:
            out = buffer.low_latency_dispatch(x, idx).wait()
            buffer.low_latency_combine(out.x, idx, None, out.handle).wait()

        result = attempt(both)
        buffer.close()
        return result
    Step(buffer, 2).run(masked=[2], given_up=True)
    given_up_after = time.monotonic() - started
    assert buffer.masked_ranks() == (2,)
    run_steps(buffer, range(3, 4), masked=[2])
    step = Step(buffer, 4)
    out = step.dispatch(masked=[2])
    time.sleep(max(0.0, started + TIMEOUT_S + 2.5 - time.monotonic()))
    step.check_received(out, masked=[2])
    step.combine(out, masked=[2])
    del out
    run_steps(buffer, range(5, 9), masked=[2])
    buffer.close()
    return given_up_after


@needs_host
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_others_go_on_without_a_late_rank(layout: str) -> None:
    with RankPool(3) as pool:
        *survivors, late = pool.run(goes_on_without_the_late, layout)
    for seconds in survivors:
        assert TIMEOUT_S * 0.9 <= seconds < NOTICED_S
    names, text, seconds = late
    assert names[0] == "PeerLost" and "has masked this rank" in text, (names, text)
    assert seconds < NOTICED_S


def masked_by_all(layout: str) -> bool:
    """Ranks 2 and 3 leave, one after the other; no step is lost."""
    buffer = make_buffer(low_latency_layout=layout)
    assert buffer.masked_ranks() == ()
    run_steps(buffer, range(3))
    if buffer.rank == 3:
        time.sleep(1.0)
        return True
    buffer.mask_ranks(3)
    assert buffer.masked_ranks() == (3,)
    run_steps(buffer, range(3, 6), masked=[3])
    step = Step(buffer, 6)
    out = step.dispatch(masked=[3])
    if buffer.rank == 2:
        del out
        time.sleep(1.0)
        return True
    # Between the halves: its rows have arrived, its sums are not awaited.
    buffer.mask_ranks(2, 3)
    step.combine(out, masked=[2, 3])
    del out
    assert buffer.masked_ranks() == (2, 3)
    run_steps(buffer, range(7, 12), masked=[2, 3])
    buffer.close()
    return True


@needs_host
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_ranks_that_all_others_mask(layout: str) -> None:
    with RankPool(4) as pool:
        assert pool.run(masked_by_all, layout) == [True] * 4


def masked_by_one(layout: str):  # type: ignore[no-untyped-def]
    """Only rank 0 masks rank 2, which goes on as if nothing were: one step is given up by all, later ones are exact."""
    buffer = make_buffer(low_latency_layout=layout, timeout_s=TIMEOUT_S + 1.0)
    run_steps(buffer, range(3))
    if buffer.rank == 2:
        x, idx, _ = given(2, 3)
        result = attempt(lambda: buffer.low_latency_dispatch(x, idx).wait())
        # Not yet: rank 1 has to take the mask over first.
        time.sleep(0.5)
        buffer.close()
        return result
    if buffer.rank == 0:
        buffer.mask_ranks(2)
    Step(buffer, 3).run(masked=[2], given_up=True)
    assert buffer.masked_ranks() == (2,)
    run_steps(buffer, range(4, 10), masked=[2])
    buffer.close()
    return True


@needs_host
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_rank_that_one_other_masks(layout: str) -> None:
    with RankPool(3) as pool:
        zero, one, (names, text, _) = pool.run(masked_by_one, layout)
    assert zero is True and one is True
    assert "PeerTimeout" in names, (names, text)
    if names[0] == "PeerLost":
        assert "has masked this rank" in text or "has closed" in text, text


# What a crash leaves behind


def hold() -> int:
    buffer = make_buffer()
    run_steps(buffer, range(3))
    globals()["_kept"] = buffer, Step(buffer, 3).dispatch(), Step(buffer, 4).send()
    return os.getpid()


@needs_host
def test_sigkill_in_the_middle_leaves_nothing() -> None:
    with RankPool(3) as pool:
        pids = pool.run(hold)
        segments = shared_segments(pids)
        assert len(segments) == 3, "each rank has one segment"
        names = [name for held in segments.values() for name in held]
        assert all(name.endswith(" (deleted)") for name in names), "no segment has a name, even while in use"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
    assert not segments.keys() & shared_segments(all_pids()).keys(), "some process still holds the memory"
    assert not segments.keys() & {entry.inode() for entry in os.scandir("/dev/shm")}


def closes() -> list[int]:
    """Results outlive the buffer; with them goes the memory."""
    buffer = make_buffer()
    run_steps(buffer, range(3))
    step = Step(buffer, 3)
    out = step.dispatch()
    dist.barrier()
    buffer.close()
    held = len(shared_segments([os.getpid()]))
    step.check_received(out)
    dist.barrier()  # Each rank maps the others' segments.
    del out, step, buffer
    return [held, len(shared_segments([os.getpid()]))]


@needs_host
def test_results_outlive_the_buffer() -> None:
    with RankPool(2) as pool:
        for held, left in pool.run(closes):
            assert held >= 1 and left == 0
