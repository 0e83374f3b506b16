"""Every CPU backend against a dense oracle, and host against collective, bit for bit, over random routings.

The number of routings is counted and checked.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import CapacityError, EpBuffer, EpConfig

from ..cases import Case, Inputs, Place, cases
from ..checks import run_random, run_routing, same
from ..conftest import why_unavailable

ROUTINGS_PER_CASE = 8
CASES_PER_RANK_COUNT = {1: 48, 2: 48, 3: 46, 4: 46, 5: 40, 6: 40}
assert ROUTINGS_PER_CASE * sum(CASES_PER_RANK_COUNT.values()) >= 2000


@pytest.mark.parametrize("num_ranks", range(1, 7))
def test_random_routings(ranks, backend, num_ranks):
    """Against the oracle; and for host, against collective in the same process."""
    places = tuple(map(Place, ("collective",) if backend == "collective" else ("collective", backend)))
    # Where host is built, its turn puts collective through all of these cases; a few show that it stands alone.
    num_cases = 4 if backend == "collective" and not why_unavailable("host") else CASES_PER_RANK_COUNT[num_ranks]
    compared = run_random(ranks(num_ranks), cases(num_ranks), num_cases, places, ROUTINGS_PER_CASE)
    assert compared >= ROUTINGS_PER_CASE * num_cases


def bits_of_two_runs(case: Case, place: Place) -> None:
    inputs = [Inputs(case, seed, dist.get_rank()) for seed in range(4)]
    with EpBuffer(None, case.config(place)) as first:
        one = [run_routing(inputs[seed], first) for seed in range(4)]
    with EpBuffer(None, case.config(place)) as second:
        # Other routings in between, so that memory and counters are not where they were.
        two = [run_routing(inputs[seed], second) for seed in (0, 3, 1, 2, 3)]
    for a, b in zip(one, [two[0], two[2], two[3], two[4]], strict=True):
        for name in a:
            same(name, a[name], b[name])


DENSE = Case(
    num_ranks=4,
    num_experts=8,
    expert_to_rank=None,
    num_topk=4,
    hidden=264,
    dtype=torch.bfloat16,
    heap_dtype=torch.bfloat16,
    layout="expert",
    wire="plain",
    power_of_two_scales=False,
    expert_alignment=4,
    expand="auto",
    max_tokens=40,
    max_recv="none",
    weighted=True,
    weighted_combine=True,
    values=True,
    reuse=True,
    leased=True,
    numbers="real",
    seed=1,
)


def test_two_runs_give_the_same_bits(ranks, backend):
    ranks(4).run(bits_of_two_runs, DENSE, Place(backend))


def overflow_on_one_rank(place: Place) -> None:
    """Only the last rank's limit is too small; every rank must say so, and go on."""
    me, num_ranks = dist.get_rank(), dist.get_world_size()
    need = 4 * num_ranks
    for layout in ("expert", "rank"):
        config = EpConfig(
            num_experts=num_ranks,
            num_topk=1,
            hidden=8,
            max_tokens_per_rank=4,
            timeout_s=20,
            **place._asdict(),
        )
        x = torch.full((4, 8), me, dtype=torch.bfloat16, device=place.device)
        to_last = torch.full((4, 1), num_ranks - 1, device=place.device)
        with EpBuffer(None, config) as buffer:
            for _ in range(3):
                with pytest.raises(CapacityError, match=rf"rank {num_ranks - 1}\b.*\b{need}\b.*\b{need - 1}\b"):
                    buffer.dispatch(x, to_last, layout=layout, max_recv_tokens=need - 1 if me == num_ranks - 1 else 64)
                    buffer.check()
                out = buffer.dispatch(x, to_last, layout=layout, max_recv_tokens=need + 1)
                received = need if me == num_ranks - 1 else 0
                assert out.x.shape == (need + 1, 8)
                assert out.handle.num_received == (None if place.backend == "cuda" else received)
                assert not out.x[received:].any()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_overflow_is_raised_on_all_ranks(ranks, backend, num_ranks):
    ranks(num_ranks).run(overflow_on_one_rank, Place(backend))


def narrower_rows(place: Place) -> None:
    """A buffer for fp32 carries bf16 and fp16 rows too, in any order of calls."""
    rng = np.random.default_rng(7)
    config = EpConfig(
        num_experts=4, num_topk=2, hidden=16, max_tokens_per_rank=8, dtype=torch.float32, **place._asdict()
    )
    with EpBuffer(None, config) as buffer:
        for dtype in (torch.float16, torch.float32, torch.bfloat16) * 3:
            x = torch.from_numpy(rng.integers(-9, 9, (5, 16))).to(place.device, dtype)
            idx = torch.from_numpy(rng.integers(0, 4, (5, 2))).to(place.device)
            out = buffer.dispatch(x, idx)
            assert torch.equal(buffer.combine(out.x, out.handle), x * 2)


def test_dtypes_mix_on_one_buffer(ranks, backend):
    ranks(3).run(narrower_rows, Place(backend))


def held_results(place: Place) -> None:
    """Results kept alive stay what they were while many more operations run and the buffer closes."""
    me = dist.get_rank()
    config = EpConfig(num_experts=4, num_topk=2, hidden=32, max_tokens_per_rank=16, **place._asdict())
    kept = []
    with EpBuffer(None, config) as buffer:
        for step in range(60):
            generator = torch.Generator().manual_seed(step * 100 + me)
            x = torch.randint(-9, 9, (16, 32), generator=generator).to(place.device, torch.bfloat16)
            out = buffer.dispatch(x, torch.randint(0, 4, (16, 2), generator=generator).to(place.device))
            if step % 7 == 0:
                kept.append((out.x, out.x.clone()))
            assert torch.equal(buffer.combine(out.x, out.handle), x * 2)
    for tensor, copy in kept:
        assert torch.equal(tensor, copy)


def test_results_outlive_later_operations_and_close(ranks, backend):
    ranks(2).run(held_results, Place(backend))
