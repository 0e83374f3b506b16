"""Backend ``cuda`` against a dense oracle and its twin on the CPU, bit for bit, over random routings.

The number of routings is counted and checked.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase

from moe_ep_plugin import EpBuffer
from moe_ep_plugin.wire import quantize_blocks

from ..backends.test_exactness import DENSE, bits_of_two_runs, held_results, narrower_rows, overflow_on_one_rank
from ..cases import Case, Place, independent_cases
from ..checks import run_case, run_random
from .helpers import DEVICE, PLACE, TWIN, kernel_tests, make_config

pytestmark = [*kernel_tests, pytest.mark.usefixtures("host")]

ROUTINGS_PER_CASE = 8
CASES_PER_RANK_COUNT = {1: 7, 2: 9, 3: 9, 4: 9, 5: 8, 8: 8}
assert ROUTINGS_PER_CASE * sum(CASES_PER_RANK_COUNT.values()) >= 400

FITTING = ("none", "none", "exact", "slack")


def compare(ranks, num_ranks: int, num_cases: int, max_recv: tuple[str, ...], places: tuple[Place, ...]) -> None:
    drawn = independent_cases(num_ranks, max_recv)
    # A failure restarts every rank, so none is looked for that is smaller than the first.
    compared = run_random(ranks(num_ranks), drawn, num_cases, places, ROUTINGS_PER_CASE, phases=[Phase.generate])
    assert compared >= ROUTINGS_PER_CASE * num_cases


@pytest.mark.parametrize("num_ranks", CASES_PER_RANK_COUNT)
def test_random_routings(ranks, num_ranks):
    compare(ranks, num_ranks, CASES_PER_RANK_COUNT[num_ranks], FITTING, (PLACE, TWIN))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_random_routings_with_collective_on_the_same_device(ranks, num_ranks):
    compare(ranks, num_ranks, 3, FITTING, (PLACE, Place("collective", DEVICE)))


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_random_routings_that_overflow(ranks, num_ranks):
    """What does not fit is reported by check(), never written, and the same routing without a limit is right."""
    compare(ranks, num_ranks, 3, ("short",), (PLACE, TWIN))


def all_variants_of_a_row(dense: Case) -> int:
    """Every path that a row can take to expert-major order, at widths that are, and are not, whole vectors."""
    checked = 0
    for hidden in (8, 264, 1024):
        for expand in ("direct", "two_stage"):
            for wire in ("plain", "fp8", "fp8_input"):
                case = replace(dense, hidden=hidden, expand=expand, wire=wire)
                checked += run_case(case, (PLACE, TWIN), 1)
    return checked


def test_every_path_at_widths_of_odd_bytes(ranks):
    """With FP8 on the wire rows of 8 and of 264 elements are no whole vectors of 16 bytes."""
    assert ranks(4).run(all_variants_of_a_row, DENSE) == [18] * 4


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_overflow_is_reported_on_all_ranks(ranks, num_ranks):
    ranks(num_ranks).run(overflow_on_one_rank, PLACE)


@pytest.mark.parametrize("expand", ["direct", "two_stage"])
def test_two_runs_give_the_same_bits(ranks, expand):
    ranks(4).run(bits_of_two_runs, replace(DENSE, expand=expand), PLACE)


def of_any_bits(rows: int, hidden: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of random bits (NaN and infinities among them), rows of their finite values only, tiny ones, and zeros."""
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(bits)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(limits.min, limits.max, (rows, hidden), generator=generator, dtype=bits).view(dtype)
    quarter = rows // 4
    x[quarter:] = torch.where(torch.isfinite(x[quarter:]), x[quarter:], 1.0)
    x[2 * quarter : 3 * quarter] = (x[2 * quarter : 3 * quarter].double() * 2.0**-100).to(dtype)
    x[3 * quarter :, :300] = 0.0
    return x


def quantised_on_the_way(power_of_two: bool) -> int:
    """Rows of all values arrive with the bits of the plain statement of the format."""
    compared = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for hidden in (8, 136, 1040, 3216, 7168):
            config = make_config(hidden=hidden, dtype=dtype, wire="fp8", power_of_two_scales=power_of_two)
            with EpBuffer(None, config) as buffer:
                x = of_any_bits(64, hidden, dtype, hidden)
                idx = torch.full((64, 1), buffer.rank * 4, dtype=torch.int64)
                out = buffer.dispatch(x.to(DEVICE), idx.to(DEVICE))
                q, scale = quantize_blocks(x, power_of_two)
                assert out.scale is not None
                assert torch.equal(out.scale.cpu(), scale)
                received, wrong = out.x.cpu().view(torch.uint8), torch.isnan(q.float())
                # Any NaN will do: two codes stand for it.
                assert torch.equal(received & 127 == 127, wrong)
                assert torch.equal(received[~wrong], q.view(torch.uint8)[~wrong])
                compared += 1
    return compared


@pytest.mark.parametrize("power_of_two", [False, True])
def test_rows_of_any_bits_are_quantised_alike(ranks, power_of_two):
    assert ranks(2).run(quantised_on_the_way, power_of_two) == [15] * 2


def test_dtypes_mix_on_one_buffer(ranks):
    ranks(3).run(narrower_rows, PLACE)


def test_results_outlive_later_operations_and_close(ranks):
    ranks(2).run(held_results, PLACE)
