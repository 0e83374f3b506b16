"""Low-latency mode of backend ``cuda`` against a dense oracle and its twin on the CPU, its user errors and its memory.

The number of routings is counted and checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase

from moe_ep_plugin import ConfigError, EpBuffer, LowLatencyDispatchOutput, StateError, _extension

from .. import test_low_latency_misuse as misuse
from ..backends import test_low_latency as exactness
from ..cases import Place, bits
from ..checks import run_random
from ..low_latency_cases import independent_cases
from ..low_latency_checks import run_case
from .helpers import DEVICE, ON_GPU, PLACE, TWIN, Mistakes, finish, kernel_tests, needs_cuda, ranks_on_this_gpu
from .test_memory_cuda import MIB, free_bytes

pytestmark = [*kernel_tests, pytest.mark.usefixtures("host")]

ROUTINGS_PER_CASE = 8
CASES_PER_RANK_COUNT = {1: 5, 2: 7, 3: 7, 4: 7, 5: 7, 8: 6}
assert ROUTINGS_PER_CASE * sum(CASES_PER_RANK_COUNT.values()) >= 300

DENSE = replace(exactness.DENSE, num_ranks=3)
T = misuse.T


def compare(ranks, num_ranks: int, num_cases: int, places: tuple[Place, ...]) -> None:
    # A failure restarts every rank, so none is looked for that is smaller than the first.
    compared = run_random(
        ranks(num_ranks),
        independent_cases(num_ranks),
        num_cases,
        places,
        ROUTINGS_PER_CASE,
        run=run_case,
        phases=[Phase.generate],
    )
    assert compared >= ROUTINGS_PER_CASE * num_cases * len(places)


@pytest.mark.parametrize("num_ranks", CASES_PER_RANK_COUNT)
def test_random_routings(ranks, num_ranks):
    compare(ranks, num_ranks, CASES_PER_RANK_COUNT[num_ranks], (PLACE, TWIN))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_random_routings_with_collective_on_the_same_device(ranks, num_ranks):
    compare(ranks, num_ranks, 3, (PLACE, Place("collective", DEVICE)))


def test_every_order_of_calls(ranks):
    assert ranks(3).run(exactness.every_order, DENSE, PLACE) == [96] * 3


@pytest.mark.parametrize(("combine_wire", "in_place"), [("bf16", True), ("bf16", False), ("fp8", False)])
def test_two_runs_give_the_same_bits(ranks, combine_wire, in_place):
    case = replace(DENSE, num_ranks=4, combine_wire=combine_wire, in_place=in_place)
    ranks(4).run(exactness.bits_of_two_runs, case, PLACE)


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integers_are_exact(ranks, layout, dtype):
    case = replace(DENSE, layout=layout, dtype=dtype, heap_dtype=dtype, numbers="integer", num_topk=2)
    assert ranks(3).run(exactness.sums_of_integers, case, PLACE) == [6] * 3


def test_identity_experts_give_the_tokens_back(ranks):
    assert ranks(3).run(exactness.tokens_come_back, PLACE) == [12] * 3


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("combine_wire", ["bf16", "fp8"])
def test_nan_and_infinity_stay_with_their_token(ranks, layout, combine_wire):
    case = replace(DENSE, layout=layout, combine_wire=combine_wire, numbers="integer", in_place=combine_wire == "bf16")
    ranks(3).run(exactness.odd_tokens, case, PLACE)


def test_inputs_may_be_dropped_between_the_halves(ranks):
    case = replace(DENSE, dtype=torch.float32, heap_dtype=torch.float32, rows_dtype=torch.float32)
    case = replace(case, numbers="integer", num_topk=2)
    assert ranks(3).run(exactness.reads_dropped_inputs, case, PLACE) == [6] * 3


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_mixes_with_ordinary_operations(ranks, layout):
    assert ranks(3).run(exactness.between_other_operations, replace(DENSE, layout=layout), PLACE) == [6] * 3


def test_more_experts_than_there_is_room_for_marks(ranks):
    # A bit for each expert and token is more than a GPU's shared memory; rows are then found without.
    case = replace(DENSE, num_ranks=2, num_experts=6000, num_topk=2, hidden=8, tokens_per_rank=400, numbers="integer")
    assert ranks(2).run(run_case, case, (PLACE, TWIN), 2) == [4] * 2


@pytest.mark.parametrize("in_place", [True, False])
def test_more_rows_than_the_l2_cache_holds(ranks, in_place):
    # Own rows that are in place are then asked for while others are awaited.
    case = replace(DENSE, num_experts=12, num_topk=8, hidden=16384, tokens_per_rank=256, numbers="integer")
    assert ranks(3).run(run_case, replace(case, in_place=in_place, async_op=False), (PLACE,), 2) == [2] * 3


def gathered_and_not(seed: int) -> int:
    """The same dispatches with scales gathered by expert and with scales sent with their rows; returns how many."""
    pick = torch.Generator().manual_seed(seed)
    experts, topk = 16, 4
    config = misuse.config_of(
        PLACE, num_experts=experts, num_topk=topk, hidden=1408, wire="fp8", low_latency_tokens_per_rank=96, num_sms=4
    )
    mistakes, compared = Mistakes(), 0
    with EpBuffer(None, config) as buffer:
        own = torch.Generator().manual_seed(seed * 100 + buffer.rank)
        for tokens, spread in ((16, 16), (40, 16), (96, 16), (96, 3), (1, 16), (24, 5), (24, 16), (0, 16)):
            tokens = tokens if buffer.rank != 1 else int(torch.randint(0, tokens + 1, (), generator=pick))
            x = torch.randn(tokens, 1408, generator=own).to(DEVICE, torch.bfloat16)
            scores = torch.rand(tokens, experts, generator=own)
            scores[:, spread:] -= 1.0  # The others get few rows or none.
            idx = scores.topk(topk, dim=1).indices
            idx[torch.rand(idx.shape, generator=own) < 0.1] = -1
            if spread == experts and tokens == 24:  # Twice the same expert.
                idx[:3, 1] = idx[:3, 0]
            outs = []
            for gather in (1, -1):
                buffer._backend.communicator.tune(gather_scales=gather)  # type: ignore[attr-defined]
                outs.append(buffer.low_latency_dispatch(x, idx.to(DEVICE), async_op=False).wait())
            one, other = outs
            mistakes.compare(one.tokens_per_expert, other.tokens_per_expert)
            for local, count in enumerate(one.tokens_per_expert.tolist()):
                mistakes.compare(bits(one.x[local, :count]), bits(other.x[local, :count]))
                mistakes.compare(bits(one.scale[local, :count]), bits(other.scale[local, :count]))
            compared += 1
            del outs, one, other
    assert mistakes.none()
    return compared


@needs_cuda
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_gathered_scales_are_the_same(ranks, num_ranks):
    assert [ranks(num_ranks).run(gathered_and_not, seed) for seed in range(3)] == [[8] * num_ranks] * 3


# Called wrongly

WRONG_CALLS: list[tuple[Callable[[Place], None], int]] = [
    (misuse.without_the_mode, 2),
    (misuse.bad_dispatches, 2),
    (misuse.wrong_id_on_one_rank, 1),
    (misuse.wrong_id_on_one_rank, 3),
    (misuse.too_many_duplicates, 1),
    (misuse.too_many_duplicates, 3),
    (misuse.bad_combines, 2),
    (misuse.weights_in_the_wrong_layout, 2),
    (misuse.copies_refused, 2),
    (misuse.stale_handles, 2),
    (misuse.not_waited_for, 2),
    (misuse.closed_between_the_halves, 2),
    (misuse.bad_masks, 2),
]


@pytest.mark.parametrize(("wrong", "num_ranks"), WRONG_CALLS, ids=[f"{f.__name__}-{n}" for f, n in WRONG_CALLS])
def test_wrong_calls(ranks, wrong, num_ranks):
    ranks(num_ranks).run(wrong, PLACE)


def other_ids_at_the_combine() -> int:
    """Told by check() on the rank that passed them, and by no other; the sums are without these routes."""
    told = 0
    x, idx, weights = misuse.inputs(PLACE)
    idx[5, 0] = -1
    changed, revived = idx.clone(), idx.clone()
    changed[2, 1] = (idx[2, 1] + 1) % misuse.E
    revived[5, 0] = 2
    with EpBuffer(None, misuse.config_of(PLACE)) as buffer:
        for token, position, other in ((2, 1, changed), (5, 0, revived)):
            out = buffer.low_latency_dispatch(x, idx).wait()
            odd = buffer.rank == 0
            back = buffer.low_latency_combine(out.x, other if odd else idx, weights, out.handle).wait()
            factor = torch.ones(T, 1, device=DEVICE)
            factor[5] = 0.5
            if odd:
                factor[token] = 0.5
                with pytest.raises(ConfigError, match=rf"topk_idx\[{token}, {position}\] is \d, but .*another expert"):
                    buffer.check()
                told += 1
            assert torch.equal(back.x, (x * factor).bfloat16())
            buffer.check()
            del out, back
            misuse.assert_usable(buffer)
    return told


@needs_cuda
def test_other_ids_at_the_combine_are_told_by_check(ranks):
    assert ranks(2).run(other_ids_at_the_combine) == [2, 0]


def held_results() -> int:
    """Two results are the most, whatever part of one is kept in the heap; counts lie elsewhere, and a copy is none."""
    x, idx, weights = misuse.inputs(PLACE)
    refused = 0

    def parts(out: LowLatencyDispatchOutput, buffer: EpBuffer) -> list[torch.Tensor | None]:
        return [out.x, out.x[0, :1], buffer.empty_rows(out.handle), out.scale, out.topk_idx, out.topk_weights]

    for layout in ("expert", "rank"):
        some_weights = weights if layout == "rank" else None
        with EpBuffer(None, misuse.config_of(PLACE, low_latency_layout=layout)) as buffer:
            for part in range(4 if layout == "expert" else 6):
                out = buffer.low_latency_dispatch(x, idx, some_weights, wire="fp8").wait()
                number, kept, counts = out.handle.sequence, parts(out, buffer)[part], out.tokens_per_expert.clone()
                kept_counts = out.tokens_per_expert if ON_GPU else counts
                assert kept is not None
                copy = kept.clone()
                del out
                buffer.low_latency_dispatch(x, idx, some_weights).wait()
                with misuse.refused(f"low-latency dispatch {number + 2}", "still held", "drop", kind=StateError):
                    buffer.low_latency_dispatch(x, idx, some_weights)
                assert torch.equal(bits(kept), bits(copy))
                del kept
                fewer = None if some_weights is None else some_weights[:1]
                buffer.low_latency_dispatch(x[:1], idx[:1] * 0, fewer).wait()
                assert torch.equal(kept_counts, counts)
                refused += 1
            misuse.assert_usable(buffer)
    return refused


def test_third_result_while_two_are_held(ranks):
    assert ranks(2).run(held_results) == [10] * 2


# When rows may be written again

A_WHILE = 200_000_000
"""Clock cycles: about a tenth of a second."""


def lags(late: bool) -> None:
    """Keeps the current stream of a rank that is to be late busy."""
    if late and ON_GPU:
        torch.cuda._sleep(A_WHILE)
    elif late:
        time.sleep(0.2)


def rows_written_after_wait(wire: str) -> int:
    """Rows that were copied: once this rank's wait() has run, in the order of the stream, whatever its peers do."""
    x, idx, weights = misuse.inputs(PLACE)
    mistakes, steps = Mistakes(), 0
    with EpBuffer(None, misuse.config_of(PLACE, power_of_two_scales=True)) as buffer:
        for async_op in (True, False):
            for late in range(buffer.num_ranks):
                out = buffer.low_latency_dispatch(x, idx).wait()
                rows = out.x * 1
                lags(buffer.rank == late)
                pending = buffer.low_latency_combine(rows, idx, weights, out.handle, wire=wire, async_op=async_op)  # type: ignore[arg-type]
                lags(buffer.rank == late)
                back = pending.wait()
                rows.fill_(float("nan"))
                mistakes.compare(back.x, x)
                steps += 1
                del out, pending, back
        buffer.check()
        assert mistakes.none()
    return steps


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_copied_rows_may_be_written_again_after_wait(ranks, wire):
    assert ranks(2).run(rows_written_after_wait, wire) == [4] * 2


def rows_in_place_written_after_the_next_dispatch() -> int:
    """Rows in place: once the next dispatch has been received, as every rank has then come past the combine."""
    x, idx, weights = misuse.inputs(PLACE)
    mistakes, steps = Mistakes(), 0
    with EpBuffer(None, misuse.config_of(PLACE)) as buffer:
        out = buffer.low_latency_dispatch(x, idx).wait()
        for step in range(8):
            rows = buffer.empty_rows(out.handle).copy_(out.x)
            pending = buffer.low_latency_combine(rows, idx, weights, out.handle, zero_copy=True, async_op=True)
            lags(buffer.rank == step % buffer.num_ranks)
            back = pending.wait()
            following = buffer.low_latency_dispatch(x, idx).wait()
            rows.fill_(float("nan"))
            mistakes.compare(back.x, x)
            out = following
            del rows, pending, back, following
            steps += 1
        del out
        buffer.check()
        assert mistakes.none()
    return steps


def test_rows_in_place_may_be_written_again_after_the_next_dispatch(ranks):
    assert ranks(3).run(rows_in_place_written_after_the_next_dispatch) == [8] * 3


def combined_twice() -> int:
    """A rank receives the first combine, in place, when others have posted the second, whose rows are copied."""
    x, idx, weights = misuse.inputs(PLACE)
    mistakes, steps = Mistakes(), 0
    with EpBuffer(None, misuse.config_of(PLACE)) as buffer:
        for async_op in (True, False):
            for late in range(buffer.num_ranks):
                out = buffer.low_latency_dispatch(x, idx).wait()
                rows = buffer.empty_rows(out.handle).copy_(out.x)
                first = buffer.low_latency_combine(rows, idx, weights, out.handle, zero_copy=True, async_op=True)
                lags(buffer.rank == late)
                mistakes.compare(first.wait().x, x)
                second = buffer.low_latency_combine(out.x * 2, idx, weights, out.handle, async_op=async_op)
                mistakes.compare(second.wait().x, x * 2)
                steps += 1
                del out, rows, first, second
        buffer.check()
        assert mistakes.none()
    return steps


def test_one_dispatch_is_combined_in_place_and_then_from_elsewhere(ranks):
    assert ranks(3).run(combined_twice) == [6] * 3


# Memory

SMALLEST = 4096


def sizes_of(buffer: EpBuffer) -> tuple[int, int]:
    """Bytes of this rank's heap, and those of them that are no rows."""
    regions = {"pool_bytes": SMALLEST, "overflow_bytes": SMALLEST}
    low = SMALLEST if buffer.config.low_latency_tokens_per_rank else 0
    regions |= {"low_receive_bytes": low, "low_rows_bytes": low}
    smallest = _extension.load_cuda().Heap(
        device=torch.cuda.current_device(),
        num_ranks=buffer.num_ranks,
        num_experts=buffer.config.num_experts,
        **regions,
    )
    heap = buffer._backend._heap  # type: ignore[attr-defined]
    return heap.bytes(), smallest.bytes() - 2 * SMALLEST - 4 * low


def reserved(**changes: object) -> tuple[int, int, int, int, int]:
    """Bytes of this rank's heap, of what in it is no rows, and planned; taken by all ranks of this GPU, and kept."""
    config = misuse.config_of(PLACE, **({"hidden": 1024, "pool_bytes": 32 * MIB} | changes))
    with EpBuffer(None, config) as buffer:
        x = torch.ones(T, 1024, device=DEVICE).bfloat16()
        idx = torch.zeros(T, 2, dtype=torch.int64, device=DEVICE)
        out = buffer.dispatch(x, idx)
        buffer.combine(out.x, out.handle)
        del out
    before = free_bytes()
    buffer = EpBuffer(None, config)
    taken = before - free_bytes()
    heap, control = sizes_of(buffer)
    finish()
    dist.barrier()
    buffer.close()
    return heap, control, config.memory_plan(buffer.num_ranks).total, taken, before - free_bytes()


@needs_cuda
@pytest.mark.parametrize("layout", ["expert", "rank", None])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_buffer_takes_what_its_plan_says(ranks, num_ranks, layout):
    """Without low-latency mode (None) nothing is reserved for it."""
    changes = {"low_latency_tokens_per_rank": None}
    if layout is not None:
        changes = {"low_latency_tokens_per_rank": 1024, "low_latency_layout": layout}
    plan = misuse.config_of(PLACE, **({"hidden": 1024, "pool_bytes": 32 * MIB} | changes)).memory_plan(num_ranks)
    assert (plan.low_latency is None) == (layout is None)
    assert plan.total == plan.pool + plan.overflow + (plan.low_latency.total if plan.low_latency else 0)
    sharing = ranks(num_ranks).run(ranks_on_this_gpu, num_ranks)
    for on_gpu, (heap, control, planned, taken, kept) in zip(
        sharing, ranks(num_ranks).run(reserved, **changes), strict=True
    ):
        print(f"{layout}: {num_ranks} ranks: planned {planned / MIB:.1f}, taken {taken / MIB / on_gpu:.1f} MiB a rank")
        assert heap == planned + control == plan.total + control
        assert 0 < control < MIB
        # Whole pages of 2 MiB: the heap's last one, and one for the rank's tables.
        assert 0 <= taken - on_gpu * heap <= on_gpu * 8 * MIB
        assert abs(kept) <= on_gpu * 4 * MIB
