"""Ranks that die, stay away, differ or are masked in low-latency mode on GPUs: typed errors, or the living go on.

Steps and what must come of them are those of ``tests/test_low_latency_faults.py``. Where nobody dies the session's
ranks go on afterwards: kernels wait for their peers on the GPU alone.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import EpBuffer, LowLatencyDispatchOutput
from tests import test_low_latency_faults as host_faults
from tests import test_low_latency_misuse as misuse
from tests.harness import RankDied
from tests.test_faults import attempt
from tests.test_low_latency_faults import given

from .helpers import DEVICE, ON_GPU, PLACE, GpuPool, finish, kernel_tests, make_config, needs_cuda
from .test_faults_cuda import Raised, start_again

pytestmark = kernel_tests

TIMEOUT_S = 2.0
# Longest that a test allows for noticing a fault: the timeout, and slack for a busy machine.
NOTICED_S = TIMEOUT_S + 6.0


def fetched(result: Any) -> Any:
    """A copy of a named result with its tensors on the CPU."""
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    return replace(result, **{name: v.cpu() for name, v in values.items() if isinstance(v, torch.Tensor)})


class _Placing:
    """A buffer on the device under test, for callers that have and want tensors on the CPU."""

    def __init__(self, buffer: EpBuffer) -> None:
        self._buffer = buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)

    def low_latency_dispatch(self, x: torch.Tensor, topk_idx: torch.Tensor, **options: Any) -> Any:
        return self._buffer.low_latency_dispatch(x.to(DEVICE), topk_idx.to(DEVICE), **options)

    def low_latency_combine(
        self, rows: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor | None, handle: Any
    ) -> Any:
        weights = None if weights is None else weights.to(DEVICE)
        pending = self._buffer.low_latency_combine(rows, topk_idx.to(DEVICE), weights, handle)
        return SimpleNamespace(wait=lambda: fetched(pending.wait()))


class Step(host_faults.Step):
    """One step of a buffer on the device under test; looking at results waits for them."""

    def __init__(self, buffer: EpBuffer, number: int, *, weighted: bool = True) -> None:
        super().__init__(_Placing(buffer), number, weighted=weighted)  # type: ignore[arg-type]

    def check_received(
        self, out: LowLatencyDispatchOutput, masked: Collection[int] = (), *, given_up: bool = False
    ) -> None:
        super().check_received(fetched(out), masked, given_up=given_up)


def run_steps(buffer: EpBuffer, numbers: range, masked: Collection[int] = ()) -> None:
    """Steps in both buffers, with and without weights, that miss nothing but the masked ranks."""
    for number in numbers:
        Step(buffer, number, weighted=number % 3 != 2).run(masked)


def make_buffer(**changes: object) -> EpBuffer:
    """A buffer with a short timeout, made when all ranks have loaded all kernels and are here; with two steps done."""
    settings = {"low_latency_tokens_per_rank": host_faults.T} | changes
    with EpBuffer(None, make_config(**(settings | {"timeout_s": 30.0}))) as patient:
        run_steps(patient, range(2))
        out = patient.low_latency_dispatch(*placed(patient.rank, 0), async_op=True).wait()
        patient.low_latency_combine(out.x, placed(patient.rank, 0)[1], None, out.handle, async_op=True).wait()
        patient.mask_ranks(*[r for r in range(patient.num_ranks) if r != patient.rank])
        del out
        finish()
        dist.barrier()
    buffer = EpBuffer(None, make_config(**({"timeout_s": TIMEOUT_S} | settings)))
    run_steps(buffer, range(2))
    finish()
    dist.barrier()
    return buffer


def placed(rank: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, idx, _ = given(rank, number)
    return x.to(DEVICE), idx.to(DEVICE)


def usable() -> bool:
    """Whether this process can still use its GPU."""
    matrix = torch.eye(64, device=DEVICE)
    return bool((matrix @ matrix).sum() == 64)


# Without masks


def missing_in(half: str, fault: str, told_by: str) -> tuple[Raised, Raised, bool] | None:
    """Rank 1 dies, stays away or leaves before the dispatch or the combine of a step that the others do."""
    buffer = make_buffer(timeout_s=TIMEOUT_S if fault == "away" else 30.0)
    x, idx = placed(buffer.rank, 2)
    out = buffer.low_latency_dispatch(x, idx).wait() if half == "combine" else None
    buffer.check()
    dist.barrier()
    if buffer.rank == 1:
        if fault == "killed":
            # Nothing of it is on the GPU: MPS does not survive the end of a process whose kernels run.
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "closed":
            buffer.close()
        else:
            time.sleep(TIMEOUT_S + 1.5)
        start_again(buffer)
        return None

    def call() -> None:
        if out is None:
            buffer.low_latency_dispatch(x, idx).wait()
        else:
            buffer.low_latency_combine(out.x, idx, None, out.handle).wait()
        if told_by == "check":
            buffer.check()
        else:
            # The next call fails, however often it is made before the timeout has passed.
            for _ in range(2):
                time.sleep(TIMEOUT_S / 2 + 0.5)
                if out is None:
                    buffer.low_latency_dispatch(x, idx).wait()
                else:
                    buffer.low_latency_combine(out.x, idx, None, out.handle).wait()

    first = attempt(call)
    second = attempt(buffer.low_latency_dispatch, x, idx)
    if fault == "killed":
        buffer.close()
        return first, second, usable()
    return first, second, start_again(buffer)


def check_missing(results: list[Any], half: str, fault: str) -> None:
    """Both survivors failed in time; one at least with the full story."""
    told = []
    for rank in (0, 2):
        (names, text, seconds), (later, later_text, _), goes_on = results[rank]
        assert "PeerTimeout" in names, (rank, names, text)
        assert seconds < (NOTICED_S if fault == "away" else 15)
        assert later[0] == "StateError" and "has failed" in later_text, (later, later_text)
        assert goes_on, rank
        # The survivor that gives up second may find that the first has left.
        if re.search(r"for rank 1 \(pid \d+\)", text):
            told.append((names[0], text, seconds))
    assert told, results
    sequence = 5 if half == "dispatch" else 6
    for name, text, seconds in told:
        assert re.search(rf"\blow-latency {half} {sequence}\b.*expected operation {sequence}, seen \d", text), text
        if fault == "away":
            assert name == "PeerTimeout" and seconds >= TIMEOUT_S * 0.9, (name, text)
            assert f"waited {TIMEOUT_S:g} s for rank 1" in text, text
        else:
            why = "its process has ended" if fault == "killed" else "has closed its buffer"
            assert name == "PeerLost" and why in text, (name, text)


@pytest.mark.parametrize("half", ["dispatch", "combine"])
@pytest.mark.parametrize(
    ("fault", "told_by"),
    [("away", "check"), pytest.param("away", "the next call", marks=needs_cuda), ("closed", "check")],
)
def test_missing_rank(ranks, half, fault, told_by):
    check_missing(ranks(3).run(missing_in, half, fault, told_by), half, fault)


@pytest.mark.parametrize("half", ["dispatch", "combine"])
def test_killed_rank(half):
    with GpuPool(3) as pool:
        results = pool.run_with(missing_in, (half, "killed", "check"), may_die=[1])
    assert isinstance(results[1], RankDied)
    check_missing(results, half, "killed")


def comes_late() -> bool:
    with EpBuffer(None, make_config(low_latency_tokens_per_rank=host_faults.T)) as buffer:
        host_faults.run_with_late_ranks(Step, buffer, 0.3)
        buffer.check()
    return True


def test_late_rank_is_waited_for(ranks):
    assert ranks(3).run(comes_late) == [True] * 3


# With masks: a rank that is killed


def goes_on_without_the_dead(half: str, layout: str) -> bool:
    buffer = make_buffer(low_latency_layout=layout, mask_on_timeout=True)
    step = Step(buffer, 2)
    out = step.dispatch() if half == "combine" else None
    finish()
    dist.barrier()
    if buffer.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if out is None:
        step.run(masked=[1], given_up=True)
    else:
        step.combine(out, masked=[1])
    del out
    assert buffer.masked_ranks() == (1,)
    run_steps(buffer, range(3, 11), masked=[1])
    assert buffer.masked_ranks() == (1,)
    buffer.check()
    buffer.close()
    return usable()


@pytest.mark.parametrize(("half", "layout"), [("dispatch", "expert"), ("combine", "expert"), ("dispatch", "rank")])
def test_others_go_on_without_a_killed_rank(half, layout):
    with GpuPool(3) as pool:
        results = pool.run_with(goes_on_without_the_dead, (half, layout), may_die=[1])
    assert isinstance(results[1], RankDied)
    assert [results[0], results[2]] == [True] * 2


def checks_while_waiting(when: str) -> bool:
    """The host asks for errors while a kernel waits: for the rank that has died, or for another one later on."""
    buffer = make_buffer(mask_on_timeout=True)
    finish()
    dist.barrier()
    if buffer.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    x, idx = placed(buffer.rank, 2)
    out = buffer.low_latency_dispatch(x, idx).wait()
    if when == "at once":
        buffer.check()
    assert not out.tokens_per_expert.any()
    assert buffer.masked_ranks() == (1,)
    del out
    run_steps(buffer, range(3, 5), masked=[1])
    if buffer.rank == 2:
        time.sleep(TIMEOUT_S / 2)
    step = Step(buffer, 5)
    pending = step.send()
    buffer.check()
    received = pending.wait()
    del pending
    step.check_received(received, masked=[1])
    step.combine(received, masked=[1])
    buffer.close()
    return True


@pytest.mark.parametrize("when", ["at once", "later"])
def test_check_does_not_end_a_wait_that_masks(when):
    with GpuPool(3) as pool:
        results = pool.run_with(checks_while_waiting, (when,), may_die=[1])
    assert [results[0], results[2]] == [True] * 2


# With masks: a rank that is late


def goes_on_without_the_late(layout: str) -> tuple[float, bool] | tuple[Raised, tuple[int, ...], bool]:
    """Rank 2 comes when it has been masked, while the others hold what the buffer it would write to has received."""
    buffer = make_buffer(low_latency_layout=layout, mask_on_timeout=True)
    started = time.monotonic()
    if buffer.rank == 2:
        x, idx = placed(2, 2)
        dist.barrier()  # The others hold the second result after the one that they gave up.
        masked: list[int] = []

        def both() -> None:
            try:
                out = buffer.low_latency_dispatch(x, idx).wait()
                finish()
                late = buffer.low_latency_combine(out.x, idx, None, out.handle).wait()
                masked.extend(buffer.masked_ranks())
                assert bool(late.lost_weights.any())
            finally:
                finish()
                dist.barrier()

        raised = attempt(both)
        dist.barrier()
        return raised, tuple(masked), start_again(buffer)
    Step(buffer, 2).run(masked=[2], given_up=True)
    given_up_after = time.monotonic() - started
    assert buffer.masked_ranks() == (2,)
    run_steps(buffer, range(3, 4), masked=[2])
    step = Step(buffer, 4)
    out = step.dispatch(masked=[2])
    dist.barrier()
    dist.barrier()
    step.check_received(out, masked=[2])
    step.combine(out, masked=[2])
    del out
    run_steps(buffer, range(5, 9), masked=[2])
    buffer.check()
    dist.barrier()
    return given_up_after, start_again(buffer)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_others_go_on_without_a_late_rank(ranks, layout):
    """On GPUs nothing is posted to a masked rank: it is told by its own timeout, or masks the others in turn."""
    *survivors, ((names, text, seconds), masked, goes_on) = ranks(3).run(goes_on_without_the_late, layout)
    for given_up_after, survivor_goes_on in survivors:
        assert TIMEOUT_S * 0.9 <= given_up_after < NOTICED_S
        assert survivor_goes_on
    assert goes_on and seconds < 2 * NOTICED_S
    if names[0] == "nothing was raised":
        assert ON_GPU and masked == (0, 1)
    else:
        assert "PeerTimeout" in names, (names, text)


# Masks of the caller


def masked_by_all(layout: str) -> bool:
    """Ranks 2 and 3 leave, one after the other; no step is lost."""
    buffer = make_buffer(low_latency_layout=layout)
    assert buffer.masked_ranks() == ()
    if buffer.rank != 3:
        buffer.mask_ranks(3)
        assert buffer.masked_ranks() == (3,)
        run_steps(buffer, range(2, 5), masked=[3])
        step = Step(buffer, 5)
        out = step.dispatch(masked=[3])
        if buffer.rank != 2:
            # Between the halves: its rows have arrived, its sums are not awaited.
            buffer.mask_ranks(2, 3)
            step.combine(out, masked=[2, 3])
            assert buffer.masked_ranks() == (2, 3)
        del out
        if buffer.rank != 2:
            run_steps(buffer, range(6, 11), masked=[2, 3])
        buffer.check()
    dist.barrier()  # Nobody closes before the others are done.
    return start_again(buffer)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_ranks_that_all_others_mask(ranks, layout):
    assert ranks(4).run(masked_by_all, layout) == [True] * 4


def masked_by_one(layout: str) -> tuple[Raised | None, bool]:
    """Only rank 0 masks rank 2, which goes on as if nothing were: one step is given up by all, later ones are exact."""
    buffer = make_buffer(low_latency_layout=layout)
    if buffer.rank == 2:
        x, idx = placed(2, 2)

        def call() -> None:
            buffer.low_latency_dispatch(x, idx).wait()
            buffer.check()

        raised = attempt(call)
        dist.barrier()
        return raised, start_again(buffer)
    if buffer.rank == 0:
        buffer.mask_ranks(2)
    Step(buffer, 2).run(masked=[2], given_up=True)
    assert buffer.masked_ranks() == (2,)
    run_steps(buffer, range(3, 9), masked=[2])
    buffer.check()
    dist.barrier()
    return None, start_again(buffer)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_rank_that_one_other_masks(ranks, layout):
    """The masked rank lives, and nothing is posted to it on GPUs: it waits out its timeout."""
    zero, one, (raised, goes_on) = ranks(3).run(masked_by_one, layout)
    assert zero == one == (None, True) and goes_on
    assert raised is not None
    names, text, seconds = raised
    assert "PeerTimeout" in names, (names, text)
    assert seconds < NOTICED_S
    if names[0] == "PeerLost":
        assert re.search(r"has masked (this rank|rank 2)", text), text
    else:
        assert f"waited {TIMEOUT_S:g} s for rank " in text, text


# Ranks that disagree


def disagree(difference: str) -> tuple[Raised, bool]:
    """As ``differing_calls`` of the host's tests; what a kernel finds is told by check()."""
    layout = "rank" if difference == "weights of a dispatch" else "expert"
    settings = {"low_latency_layout": layout}
    with EpBuffer(None, misuse.config_of(PLACE, **settings)) as patient:
        misuse.assert_usable(patient)
    x, idx, weights = misuse.inputs(PLACE)
    odd = dist.get_rank() == 1
    buffer = EpBuffer(None, misuse.config_of(PLACE, timeout_s=TIMEOUT_S, **settings))
    outs = [buffer.low_latency_dispatch(x, idx).wait() for _ in range(2)]
    buffer.check()
    dist.barrier()

    def dispatch(*args: Any) -> None:
        outs.clear()
        buffer.low_latency_dispatch(*args).wait()

    def combine(which: int, factors: torch.Tensor | None = weights) -> None:
        buffer.low_latency_combine(outs[which].x, idx, factors, outs[which].handle).wait()

    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "topk": (lambda: dispatch(x, idx), lambda: dispatch(x, idx[:, :1])),
        "element type": (lambda: dispatch(x, idx), lambda: dispatch(x.half(), idx)),
        "weights of a dispatch": (lambda: dispatch(x, idx), lambda: dispatch(x, idx, weights)),
        "weights of a combine": (lambda: combine(1), lambda: combine(1, None)),
        "operation": (lambda: combine(1), lambda: dispatch(x, idx)),
        "handle": (lambda: combine(1), lambda: combine(0)),
        "kind": (lambda: combine(1), lambda: buffer.dispatch(x, idx)),
    }

    def call() -> None:
        calls[difference][odd]()
        buffer.check()

    raised = attempt(call)
    outs.clear()
    dist.barrier()  # Who leaves first would otherwise be lost to the other before the comparison.
    return raised, start_again(buffer)


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        ("topk", "topk"),
        ("element type", "element type"),
        ("weights of a dispatch", "has topk_weights"),
        ("weights of a combine", "has topk_weights"),
    ],
)
def test_ranks_that_call_the_same_operation_differently(ranks, difference, named):
    for rank, ((names, text, seconds), goes_on) in enumerate(ranks(2).run(disagree, difference)):
        assert names[0] == "PeerMismatch", (names, text)
        assert re.search(rf"rank {1 - rank} differs from rank {rank} at operation 3: {named} is \d", text), text
        assert "same order on every rank" in text
        assert seconds < NOTICED_S
        assert goes_on


@pytest.mark.parametrize("difference", ["operation", "handle", "kind"])
def test_ranks_that_call_different_operations(ranks, difference):
    """Words of other operations lie elsewhere, so a rank that waits for them may have to wait out its timeout."""
    for (names, text, seconds), goes_on in ranks(2).run(disagree, difference):
        assert names[0] == "PeerMismatch" or "PeerTimeout" in names, (names, text)
        assert seconds < NOTICED_S
        assert goes_on
