"""Low-latency mode of every CPU backend against a dense oracle, bit for bit, over random routings.

The number of routings is counted and checked.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import EpBuffer

from ..cases import Place
from ..checks import run_random, same
from ..conftest import why_unavailable
from ..low_latency_cases import ORDERS, LowLatencyCase, LowLatencyInputs, low_latency_cases
from ..low_latency_checks import Step, ordinary_round_trip, run_case, run_inputs, run_steps

ROUTINGS_PER_CASE = 8
CASES_PER_RANK_COUNT = {1: 30, 2: 30, 3: 28, 4: 28, 5: 22, 6: 22}
# Backend collective is slow, and where host is built a part of its cases shows that it stands alone.
COLLECTIVE_SHARE = 3
assert ROUTINGS_PER_CASE * sum(n + n // COLLECTIVE_SHARE for n in CASES_PER_RANK_COUNT.values()) >= 1500


@pytest.mark.parametrize("num_ranks", CASES_PER_RANK_COUNT)
def test_random_routings(ranks, backend, num_ranks):
    num_cases = CASES_PER_RANK_COUNT[num_ranks]
    if backend == "collective" and not why_unavailable("host"):
        num_cases //= COLLECTIVE_SHARE
    drawn = low_latency_cases(num_ranks)
    compared = run_random(ranks(num_ranks), drawn, num_cases, (Place(backend),), ROUTINGS_PER_CASE, run=run_case)
    assert compared >= ROUTINGS_PER_CASE * num_cases


DENSE = LowLatencyCase(
    num_ranks=4,
    num_experts=8,
    expert_to_rank=None,
    num_topk=4,
    hidden=264,
    dtype=torch.bfloat16,
    rows_dtype=torch.bfloat16,
    heap_dtype=torch.bfloat16,
    layout="expert",
    wire="plain",
    heap_wire="bf16",
    combine_wire="bf16",
    power_of_two_scales=False,
    tokens_per_rank=17,
    weighted=True,
    leaves_out=False,
    in_place=True,
    gives_out=True,
    async_op=True,
    order="one",
    mixed=False,
    numbers="real",
    seed=1,
)


def every_order(dense: LowLatencyCase, place: Place) -> int:
    """Both layouts, each wire there and back, and each order of the calls."""
    compared = 0
    for layout in ("expert", "rank"):
        for wire, back in (("plain", "bf16"), ("fp8", "fp8"), ("fp8_input", "bf16")):
            for order in ORDERS:
                case = replace(dense, layout=layout, wire=wire, combine_wire=back, order=order, mixed=order == "pair")
                case = replace(case, in_place=back == "bf16")
                compared += run_case(case, (place,), 4)
    return compared


def test_every_order_of_calls(ranks, backend):
    assert ranks(3).run(every_order, replace(DENSE, num_ranks=3), Place(backend)) == [96] * 3


def bits_of_two_runs(case: LowLatencyCase, place: Place) -> None:
    inputs = [LowLatencyInputs(case, seed, dist.get_rank()) for seed in range(4)]
    with EpBuffer(None, case.config(place)) as first:
        one = run_inputs(inputs, first)
    with EpBuffer(None, case.config(place)) as second:
        # Other routings before, so that memory and counters are not where they were.
        run_inputs(inputs[3:], second)
        two = run_inputs(inputs, second)
    for a, b in zip(one, two, strict=True):
        for name in a:
            same(name, a[name], b[name])


@pytest.mark.parametrize("combine_wire", ["bf16", "fp8"])
def test_two_runs_give_the_same_bits(ranks, backend, combine_wire):
    ranks(4).run(
        bits_of_two_runs, replace(DENSE, combine_wire=combine_wire, in_place=combine_wire == "bf16"), Place(backend)
    )


def sums_of_integers(case: LowLatencyCase, place: Place) -> int:
    """Whole numbers small enough for every dtype: sums are exact, so any order of addition gives these."""
    me = dist.get_rank()
    steps = 0
    with EpBuffer(None, case.config(place)) as buffer:
        for seed in range(6):
            inputs = LowLatencyInputs(case, seed, me)
            x, idx = inputs.x[me].to(place.device), torch.from_numpy(inputs.routing.topk_idx[me]).to(place.device)
            weights = inputs.weights[me].to(place.device) if case.layout == "expert" else None
            out = buffer.low_latency_dispatch(x, idx).wait()
            # Every expert doubles; rows past the counts are doubled whatever they are.
            back = buffer.low_latency_combine(out.x * 2, idx, weights, out.handle).wait()
            if weights is not None:
                factor = torch.where(idx >= 0, weights, 0.0).sum(1)
            else:
                rank_of = np.array([*inputs.routing.rank_of, -1])
                there = [len(set(rank_of[row]) - {-1}) for row in inputs.routing.topk_idx[me]]
                factor = torch.tensor(there, dtype=torch.float32, device=place.device)
            assert torch.equal(back.x.float(), 2 * x.float() * factor[:, None])
            steps += 1
            del out, back
    return steps


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integers_are_exact(ranks, backend, layout, dtype):
    case = replace(DENSE, layout=layout, dtype=dtype, heap_dtype=dtype, numbers="integer", num_ranks=3, num_topk=2)
    assert ranks(3).run(sums_of_integers, case, Place(backend)) == [6] * 3


def reads_dropped_inputs(case: LowLatencyCase, place: Place) -> int:
    """Between two halves a caller drops its tensors, and their memory is used for something else."""
    me, device, steps = dist.get_rank(), torch.device(place.device), 0

    def litter(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [torch.full_like(t, -1) for t in tensors for _ in range(8)]

    with EpBuffer(None, case.config(place)) as buffer:
        for seed in range(6):
            inputs = LowLatencyInputs(case, seed, me)
            given = [inputs.x[me], torch.from_numpy(inputs.routing.topk_idx[me]), inputs.weights[me]]
            x, idx, weights = (t.to(device, copy=True) for t in given)
            sent = buffer.low_latency_dispatch(x, idx, async_op=True)
            del x, idx
            littered = litter(*given)
            out = sent.wait()
            rows, idx = out.x * 2, given[1].to(device, copy=True)
            in_place = seed % 2 == 0
            if in_place:
                rows = buffer.empty_rows(out.handle).copy_(rows)
            back = buffer.low_latency_combine(rows, idx, weights, out.handle, async_op=True)
            del rows, idx, weights
            littered += litter(*given, out.x)
            factor = torch.where(given[1] >= 0, given[2], 0.0).sum(1)
            assert torch.equal(back.wait().x.cpu().float(), 2 * given[0].float() * factor[:, None]), seed
            steps += 1
            del sent, out, back, littered
    return steps


def test_inputs_may_be_dropped_between_the_halves(ranks, backend):
    case = replace(DENSE, dtype=torch.float32, heap_dtype=torch.float32, rows_dtype=torch.float32)
    case = replace(case, numbers="integer", num_ranks=3, num_topk=2)
    assert ranks(3).run(reads_dropped_inputs, case, Place(backend)) == [6] * 3


def nothing_registered(place: Place) -> int:
    with EpBuffer(None, DENSE.config(place)) as buffer:
        registered = buffer.register_rows(torch.empty(4, device=place.device))
        buffer.unregister_rows()
        return registered


def test_there_is_nothing_to_register_on_a_cpu(ranks, backend):
    assert ranks(2).run(nothing_registered, Place(backend)) == [0] * 2


def tokens_come_back(place: Place) -> int:
    """Experts that change nothing, and weights that sum to 1, are the identity; on plain rows and whole FP8 values."""
    me = dist.get_rank()
    steps = 0
    for layout in ("expert", "rank"):
        for wire in ("plain", "fp8"):
            case = replace(DENSE, layout=layout, wire=wire, power_of_two_scales=True, num_topk=4, num_ranks=3)
            with EpBuffer(None, case.config(place)) as buffer:
                for seed in range(3):
                    rng = np.random.default_rng([seed, me])
                    num_tokens = int(rng.integers(0, case.tokens_per_rank + 1))
                    # Four experts each, all on different ranks or not: in layout rank one of the ranks' rows counts.
                    picks = [rng.permutation(case.num_experts)[:4] for _ in range(num_tokens)]
                    idx = torch.from_numpy(np.array(picks, dtype=np.int64).reshape(num_tokens, 4)).to(place.device)
                    weights = torch.tensor([0.5, 0.25, 0.125, 0.125]).repeat(num_tokens, 1).to(place.device)
                    x = torch.from_numpy(rng.integers(-8, 9, (num_tokens, case.hidden))).to(place.device, case.dtype)
                    by_rank = layout == "rank"
                    call = "fp8" if wire == "fp8" else None
                    out = buffer.low_latency_dispatch(x, idx, weights if by_rank else None, wire=call).wait()
                    rows = out.x.float()
                    if out.scale is not None:
                        rows = rows * out.scale.repeat_interleave(128, dim=-1)[..., : case.hidden]
                    if by_rank:
                        assert out.topk_weights is not None
                        rows = rows * out.topk_weights.sum(1, keepdim=True)
                    rows = buffer.empty_rows(out.handle).copy_(rows)
                    back = buffer.low_latency_combine(rows, idx, None if by_rank else weights, out.handle).wait()
                    assert torch.equal(back.x, x), (layout, wire, seed)
                    steps += 1
                    del out, rows, back
    return steps


def test_identity_experts_give_the_tokens_back(ranks, backend):
    assert ranks(3).run(tokens_come_back, Place(backend)) == [12] * 3


def odd_tokens(case: LowLatencyCase, place: Place) -> None:
    """Some tokens' rows are NaN and infinite, there and back: theirs alone are the sums that show it."""
    me = dist.get_rank()
    inputs, clean = LowLatencyInputs(case, 0, me), LowLatencyInputs(case, 0, me)
    odd = [torch.arange(len(x)) % 3 == 1 for x in inputs.x]
    for mask, x in zip(odd, inputs.x, strict=True):
        x[mask] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).repeat(case.hidden // 4).to(x.dtype)
    for keys, results in zip(inputs.row_keys, inputs.results, strict=True):
        for row, key in zip(results, keys, strict=True):
            assert key is not None
            if odd[key[0]][key[1]]:
                row[::2], row[1::2] = float("nan"), float("inf")
    with EpBuffer(None, case.config(place)) as buffer:
        device = torch.device(place.device)
        sums = []
        for given in (inputs, clean):
            idx = torch.from_numpy(given.routing.topk_idx[me]).to(device)
            out = buffer.low_latency_dispatch(given.x[me].to(device), idx).wait()
            shape = (given.num_groups * case.capacity, case.hidden)
            rows = torch.full(shape, float("nan"), dtype=case.rows_dtype)
            rows[given.slots] = given.results[me]
            weights = given.weights[me].to(device) if case.layout == "expert" else None
            shape_of_x = out.x.shape
            sums.append(
                buffer.low_latency_combine(
                    rows.view(shape_of_x).to(device), idx, weights, out.handle, wire=case.combine_wire
                )
                .wait()
                .x.cpu()
            )
            del out
    assert torch.equal(sums[0][~odd[me]], sums[1][~odd[me]])
    assert bool(torch.isfinite(sums[1]).all())
    routed = torch.from_numpy((inputs.routing.topk_idx[me] >= 0).any(1))
    assert bool(sums[0][odd[me] & routed].isnan().any(1).all()) or not bool((odd[me] & routed).any())


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("combine_wire", ["bf16", "fp8"])
def test_nan_and_infinity_stay_with_their_token(ranks, backend, layout, combine_wire):
    case = replace(DENSE, layout=layout, combine_wire=combine_wire, numbers="integer", num_ranks=3)
    case = replace(case, in_place=combine_wire == "bf16")
    ranks(3).run(odd_tokens, case, Place(backend))


def between_other_operations(case: LowLatencyCase, place: Place) -> int:
    """Ordinary operations between all halves of low-latency ones, and their results held across them."""
    me = dist.get_rank()
    with EpBuffer(None, case.config(place)) as buffer:
        for seed in range(6):
            inputs = LowLatencyInputs(case, seed, me)
            step = Step(inputs, buffer)
            for call in (step.send, step.receive, step.send_back, step.finish):
                call()
                if call is not step.finish:
                    ordinary_round_trip(inputs, buffer)
            run_steps([Step(inputs, buffer)], "one")
    return 6


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_mixes_with_ordinary_operations(ranks, backend, layout):
    case = replace(DENSE, layout=layout, num_ranks=3)
    assert ranks(3).run(between_other_operations, case, Place(backend)) == [6] * 3
