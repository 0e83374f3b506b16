"""Two stages at the same time: the bits of one after the other, what happens when one does not come, graphs, few SMs.

Where each rank has a GPU of its own they run so by themselves; here ranks share one, and are told to.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import EpBuffer
from tests.cases import bits
from tests.harness import RankDied
from tests.test_faults import attempt

from .helpers import (
    DEVICE,
    GpuPool,
    Mistakes,
    finish,
    integers,
    kernel_tests,
    make_config,
    needs_cuda,
    ranks_on_this_gpu,
    tokens,
    works,
)
from .test_faults_cuda import NOTICED_S, TIMEOUT_S, Raised, check_timeouts, impatient, start_again
from .test_streams_cuda import REPLAYS, capture

pytestmark = [*kernel_tests, needs_cuda]

TOKENS, WIDTH, EXPERTS, TOPK = 150, 136, 11, 4
# So many that ranks that share a GPU have SMs for both stages.
SMS = {"num_sms": 8, "local_sms": 8}


def staged(together: bool, *, reduce_rows: int = 0, **changes: Any) -> EpBuffer:
    """A buffer of two stages, which run at the same time or one after the other.

    ``reduce_rows``: of a token, that are summed at a time; 0: as the product does.
    """
    buffer = EpBuffer(None, make_config(**({"expand": "two_stage"} | SMS | changes)))
    communicator = buffer._backend.communicator  # type: ignore[attr-defined]
    communicator.tune(overlap_stages=1 if together else -1, reduce_rows=reduce_rows)
    return buffer


def inputs(step: int, rank: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, topk_idx and topk_weights; some ranks have few tokens or none, some experts none."""
    seed = 1000 * step + 10 * rank
    count = 0 if (step + rank) % 5 == 4 else int(integers(seed, 1, low=0, high=TOKENS + 1))
    x = torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).bfloat16()
    high = EXPERTS if step % 3 else 3
    idx = integers(seed + 1, count, TOPK, low=-1, high=high).long()
    return x.to(DEVICE), idx.to(DEVICE), integers(seed + 2, count, TOPK, low=1).to(DEVICE)


def results(buffer: EpBuffer, step: int) -> list[torch.Tensor]:
    """Everything that a layer and its backward get."""
    x, idx, weights = inputs(step, buffer.rank, buffer.config.hidden)
    out = buffer.dispatch(x, idx, weights)
    again = buffer.dispatch(x * 2, topk_weights=weights, handle=out.handle)
    rows = torch.sin(again.x.float() + step).bfloat16()
    back = buffer.combine_with_values(rows, out.handle, topk_weights=again.topk_weights, row_values=out.topk_weights)
    plain = buffer.combine(rows, out.handle)
    found = (out.x, out.scale, out.topk_weights, again.x, again.scale, back.x, back.row_values, plain)
    return [t.clone() for t in found if t is not None]


def together_and_apart(steps: int, changes: dict[str, Any]) -> int:
    """Of one of the two buffers all rows of a token are summed at a time."""
    mistakes = Mistakes()
    settings: dict[str, Any] = {"hidden": WIDTH, "dtype": torch.bfloat16, "num_topk": TOPK, "num_experts": EXPERTS}
    settings |= changes
    whole = settings | {"reduce_rows": TOPK}
    with staged(True, **settings) as both, staged(False, **whole) as one_by_one:
        communicator = both._backend.communicator  # type: ignore[attr-defined]
        assert communicator.stage_stream(num_sms=8, local_sms=8, bytes=0) != 0
        # More than the GPU has room for beside each other: one after the other, whatever other ranks do.
        assert communicator.stage_stream(num_sms=10_000, local_sms=8, bytes=0) == 0
        # So few that it takes longer beside than after.
        half = torch.cuda.get_device_properties(0).multi_processor_count // 2 // ranks_on_this_gpu(both.num_ranks)
        assert communicator.stage_stream(num_sms=half - 3, local_sms=8, bytes=0) == 0
        for step in range(steps):
            for got, want in zip(results(both, step), results(one_by_one, step), strict=True):
                mistakes.compare(bits(got), bits(want))
        both.check()
        one_by_one.check()
    assert mistakes.none()
    return steps


@pytest.mark.parametrize(
    ("num_ranks", "changes"),
    [
        (1, {}),
        (3, {}),
        (4, {"expert_alignment": 8}),
        (4, {"wire": "fp8"}),
        (2, {"num_sms": 1, "local_sms": 1}),
        (2, {"hidden": 8}),
        (3, {"pool_bytes": 1}),
        (1, {"reduce_rows": 1}),
        (3, {"reduce_rows": 1, "hidden": 1416}),
        (2, {"reduce_rows": 2, "hidden": 1024}),
    ],
)
def test_both_stages_at_once_give_the_bits_of_one_after_the_other(ranks, num_ranks, changes):
    assert ranks(num_ranks).run(together_and_apart, 12, changes) == [12] * num_ranks


def mixed() -> bool:
    """One rank has no SMs for both stages; the others do."""
    wide = dist.get_rank() == 0
    sms = torch.cuda.get_device_properties(0).multi_processor_count // dist.get_world_size()
    with staged(True, num_sms=sms if wide else 8) as buffer:
        stream = buffer._backend.communicator.stage_stream(num_sms=sms if wide else 8, local_sms=8, bytes=0)  # type: ignore[attr-defined]
        return (stream == 0) == wide and all(works(buffer) for _ in range(5))


def test_ranks_without_room_for_both_work_with_those_that_have_it(ranks):
    assert ranks(3).run(mixed) == [True] * 3


def without_a_second_stage() -> bool:
    """As where the heap has no room for rows: what that dispatch told is not taken for the next one's."""
    x, idx = tokens(dist.get_rank())
    with staged(True) as buffer:
        handle = buffer.dispatch(x, idx).handle
        backend: Any = buffer._backend
        expand = backend._expand

        def zeros(_request: Any, _result: Any, _state: Any, total: int, *_: Any) -> torch.Tensor:
            return torch.zeros(total, dtype=torch.uint8, device=DEVICE)

        for step in range(6):
            backend._expand = zeros
            assert not buffer.dispatch(x, handle=handle).x.any()
            backend._expand = expand
            out = buffer.dispatch(x + step, handle=handle)
            if not torch.equal(buffer.combine(out.x, handle), 2 * (x + step)):
                return False
        buffer.check()
        return works(buffer)


def test_a_dispatch_without_a_second_stage(ranks):
    assert ranks(3).run(without_a_second_stage) == [True] * 3


def overflows() -> bool:
    """A limit that is too small on one rank gives the dispatch up: the second stage waits for nothing, rows are 0."""
    x, idx = tokens(dist.get_rank())
    with staged(True) as buffer:
        for _ in range(3):
            out = buffer.dispatch(x, idx, max_recv_tokens=4 if buffer.rank == 1 else 512)
            y = buffer.combine(out.x, out.handle)
            # All ranks gave the routing up together: there is none to reuse but one of no rows.
            again = buffer.dispatch(x, handle=out.handle)
            finish()
            if out.x.any() or y.any() or again.x.any():
                return False
            names, _, _ = attempt(buffer.check)
            if "CapacityError" not in names:
                return False
        return works(buffer)


def test_a_dispatch_that_is_given_up_has_a_second_stage_of_zeros(ranks):
    assert ranks(3).run(overflows) == [True] * 3


def late(late_rank: int, operation: str) -> tuple[Raised, bool]:
    buffer = impatient()
    buffer.close()
    buffer = staged(True, timeout_s=TIMEOUT_S)
    x, idx = tokens(buffer.rank)
    out = buffer.dispatch(x, idx)
    finish()
    dist.barrier()
    if buffer.rank == late_rank:
        time.sleep(TIMEOUT_S + 1.5)

    def call() -> None:
        if operation == "combine":
            buffer.combine(out.x, out.handle)
        else:
            buffer.dispatch(x, handle=out.handle)
        buffer.check()

    raised = attempt(call)
    return raised, start_again(buffer)


@pytest.mark.parametrize("operation", ["combine", "dispatch"])
def test_a_late_rank_is_named(ranks, operation):
    """By the stage that knows: the one that stays on the GPU waits for the other, and does not blame its own rank."""
    check_timeouts(ranks(3).run(late, 1, operation), 1, operation, 2)


def hold_stage(buffer: EpBuffer, seconds: float) -> None:
    """Keep what runs beside a dispatch or combine from beginning, for about so long."""
    stream = buffer._backend.communicator.stage_stream(bytes=0, **SMS)  # type: ignore[attr-defined]
    assert stream != 0
    with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
        torch.cuda._sleep(int(seconds * 2e9))  # Cycles; GPUs run at 1.2 to 2 GHz.


def stage_comes_late() -> bool:
    """One rank's stage beside begins when the other stage has long been waiting, or, of a dispatch, is over."""
    x, idx = tokens(dist.get_rank())
    with staged(True) as buffer:
        for step in range(6):
            if step % 3 == buffer.rank:
                hold_stage(buffer, 0.1)
            out = buffer.dispatch(x + step, idx)
            if (step + 1) % 3 == buffer.rank:
                hold_stage(buffer, 0.1)
            if not torch.equal(buffer.combine(out.x, out.handle), 2 * (x + step)):
                return False
        buffer.check()
    return True


def test_a_stage_that_begins_late(ranks):
    assert ranks(3).run(stage_comes_late) == [True] * 3


def sums_do_not_come(late_rank: int) -> tuple[Raised, bool]:
    buffer = impatient()
    buffer.close()
    buffer = staged(True, timeout_s=TIMEOUT_S)
    out = buffer.dispatch(*tokens(buffer.rank))
    finish()
    dist.barrier()
    if buffer.rank == late_rank:
        hold_stage(buffer, TIMEOUT_S + 1.5)

    def call() -> None:
        buffer.combine(out.x, out.handle)
        buffer.check()

    raised = attempt(call)
    return raised, start_again(buffer)


def test_sums_that_do_not_come_are_waited_for_in_vain(ranks):
    """A rank has said that it combines, and then tells no part of its sums."""
    timeouts = 0
    for rank, ((names, text, seconds), usable) in enumerate(ranks(3).run(sums_do_not_come, 1)):
        assert "PeerTimeout" in names, (rank, names, text)
        assert seconds < NOTICED_S
        assert usable, rank
        # Who gives up second may find that the first has left.
        if names[0] == "PeerTimeout":
            timeouts += 1
            assert seconds >= TIMEOUT_S * 0.9
            assert re.search(r"waited 2 s for rank 1 .+ of combine 2\b", text), text
    assert timeouts >= 1


def dies_at_work(victim: int, after_s: float) -> tuple[Raised | None, bool]:
    """Layers large enough to be told in parts, one after the other, until a rank ends in the middle of one."""
    count, hidden, experts, topk = 4096, 4096, 32, 8
    config = make_config(
        hidden=hidden,
        dtype=torch.bfloat16,
        num_experts=experts,
        num_topk=topk,
        max_tokens_per_rank=count,
        timeout_s=20.0,
    )
    x = integers(dist.get_rank(), count, hidden).bfloat16().to(DEVICE)
    idx = torch.rand(count, experts, device=DEVICE).topk(topk, dim=1).indices
    buffer = EpBuffer(None, config)
    # Ranks with a GPU each do it so by themselves: half of the tokens' rows are more than enough.
    communicator = buffer._backend.communicator  # type: ignore[attr-defined]
    assert communicator.stage_stream(num_sms=16, local_sms=64, bytes=x.nbytes) != 0

    def layer() -> None:
        out = buffer.dispatch(x, idx)
        buffer.combine(out.x, out.handle)

    for _ in range(3):
        layer()
    buffer.check()
    finish()
    dist.barrier()
    if buffer.rank == victim:
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def work() -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            layer()

    raised = attempt(work)
    buffer.close()
    matrix = torch.eye(64, device=DEVICE)
    return raised, bool((matrix @ matrix).sum() == 64)


@pytest.mark.parametrize("after_s", [0.2, 0.2003, 0.2006, 0.2009])
def test_a_rank_that_is_killed_in_the_middle_is_noticed(after_s):
    """On GPUs of their own: MPS does not survive the end of a process whose kernels run."""
    gpus = torch.cuda.device_count()
    if gpus < 2 or "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        pytest.skip("needs a GPU for each rank, without MPS")
    with GpuPool(min(gpus, 4)) as pool:
        results = pool.run_with(dies_at_work, (1, after_s), may_die=[1])
    assert isinstance(results.pop(1), RankDied)
    for (names, text, seconds), usable in results:
        assert "PeerTimeout" in names, (names, text)
        assert seconds < 15 and usable
        # Who finds out second may find that the first has left.
        assert names[0] == "PeerLost", (names, text)
    assert any("for rank 1 " in text and "process has ended" in text for (_, text, _), _ in results)


def captured() -> int:
    mistakes = Mistakes()
    with staged(True, hidden=WIDTH, dtype=torch.bfloat16) as buffer:
        idx = integers(buffer.rank, 64, 2, low=-1, high=8).long().to(DEVICE)
        x = integers(buffer.rank, 64, WIDTH).bfloat16().to(DEVICE)
        handle = buffer.dispatch(x, idx).handle

        def layer() -> tuple[torch.Tensor, Any]:
            out = buffer.dispatch(x, handle=handle)
            return buffer.combine(out.x, handle), out

        graph, (y, _) = capture(layer)
        for step in range(1, REPLAYS + 1):
            x.copy_(integers(step + buffer.rank, 64, WIDTH).bfloat16())
            graph.replay()
            want = x * (idx >= 0).sum(1, keepdim=True)
            mistakes.compare(y, want)
            # Not captured, between replays.
            out = buffer.dispatch(x, idx)
            mistakes.compare(buffer.combine(out.x, out.handle), want)
        buffer.check()
    assert mistakes.none()
    return REPLAYS


def test_a_handle_is_reused_in_a_graph(ranks):
    assert ranks(3).run(captured) == [REPLAYS] * 3
