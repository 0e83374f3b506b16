"""The kernels that lay FP8 rows out for a grouped GEMM: the bits of the plain functions on the CPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from moe_ep_plugin import BackendUnavailable, ConfigError, _extension, fp8_kernels
from moe_ep_plugin.fp8 import Fp8Rows

from ..test_fp8_kernels import KINDS, compare, rows_of, same_bits
from .helpers import DEVICE, kernel_tests, needs_cuda

pytestmark = kernel_tests

# As dispatches with an alignment of 16 give them, ragged, and all in one.
COUNTS = ([0, 16, 128, 144, 0, 1024], [5, 0, 131, 1], [257])
TENSORS_AN_EXPERT = 3 + 2 * 2 * 3


def kinds_of_rows(hidden: int, counts: list[int]) -> int:
    # Rows past the last expert's are nobody's.
    return sum(compare(rows_of(kind, sum(counts) + 7, hidden, seed), counts, DEVICE) for seed, kind in enumerate(KINDS))


@pytest.mark.parametrize("hidden", [16, 128, 272, 1024, 7168])
@pytest.mark.parametrize("counts", COUNTS)
def test_bits_of_the_plain_functions(ranks, hidden, counts):
    assert ranks(1).run(kinds_of_rows, hidden, counts) == [len(KINDS) * len(counts) * TENSORS_AN_EXPERT]


def as_many_experts_as_fit() -> int:
    """Most of them with few rows or none, in every place of their units."""
    compared = 0
    for seed, most in enumerate((2, 9, 300)):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(0, most, (fp8_kernels.MOST_LOCAL_EXPERTS,), generator=generator).tolist()
        counts[::5] = [0] * len(counts[::5])
        compared += compare(rows_of("ordinary", sum(counts), 144, seed), counts, DEVICE)
    return compared


def test_as_many_experts_as_fit(ranks):
    assert ranks(1).run(as_many_experts_as_fit) == [3 * fp8_kernels.MOST_LOCAL_EXPERTS * TENSORS_AN_EXPERT]


def every_scale_of_a_code() -> int:
    """Every finite code times many scales, so that quotients fall on either side of every rounding."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 127 == 127] = 0
    rows = codes.repeat(1024, 2).view(torch.float8_e4m3fn)
    spread = torch.rand(1024, 4, generator=torch.Generator().manual_seed(5))
    return sum(compare(Fp8Rows(rows, torch.exp2(width * (spread - 0.5))), [1024], DEVICE) for width in (1, 10, 80))


def test_every_code_at_many_scales(ranks):
    assert ranks(1).run(every_scale_of_a_code) == [3 * TENSORS_AN_EXPERT]


def odd_places() -> None:
    """Data that does not begin at a vector, scales that are expanded, and no rows at all."""
    rows, counts = rows_of("ordinary", 160, 272), [16, 144]
    moved = torch.empty(1 + rows.data.numel(), dtype=torch.uint8, device=DEVICE)[1:]
    moved.view(160, 272).copy_(rows.codes)
    assert moved.data_ptr() % 2 == 1
    odd = Fp8Rows(moved.view(torch.float8_e4m3fn).view(160, 272), rows.scale.to(DEVICE))
    same_bits([codes for codes, _ in fp8_kernels.columns(odd, counts, power_of_two=True)], plain_codes(rows, counts))
    one = torch.tensor([[0.75]])
    even = Fp8Rows(odd.data, one.to(DEVICE).expand(160, 3))
    want = Fp8Rows(rows.data, one.expand(160, 3))
    same_bits([codes for codes, _ in fp8_kernels.columns(even, counts, power_of_two=True)], plain_codes(want, counts))
    same_bits(fp8_kernels.transposed_scales(even, counts), [part.transposed_scale(4) for part in want.split(counts)])
    for none in ([], [0], [0, 0]):
        assert [tuple(scale.shape) for scale in fp8_kernels.transposed_scales(even, none)] == [(3, 0)] * len(none)
        for codes, scale in fp8_kernels.columns(even, none, power_of_two=True):
            assert (tuple(codes.shape), tuple(scale.shape)) == ((272, 0), (0, 272))


def plain_codes(rows: Fp8Rows, counts: list[int]) -> list[torch.Tensor]:
    return [part.columns(power_of_two=True).codes for part in rows.split(counts)]


def test_odd_places(ranks):
    ranks(1).run(odd_places)


def one_allocation() -> None:
    rows, counts = rows_of("ordinary", 300, 272), [5, 0, 131, 144]
    moved = Fp8Rows(rows.data.to(DEVICE), rows.scale.to(DEVICE))
    columns = fp8_kernels.columns(moved, counts, power_of_two=True)
    parts = (fp8_kernels.transposed_scales(moved, counts), [c for c, _ in columns], [s for _, s in columns])
    for tensors in parts:
        assert len({part.untyped_storage().data_ptr() for part in tensors}) == 1
        ends = [0]
        for part in tensors:
            assert part.storage_offset() == ends[-1]
            ends.append(ends[-1] + part.numel())
        assert tensors[0].untyped_storage().nbytes() == ends[-1] * tensors[0].element_size()


@needs_cuda
def test_experts_follow_each_other_in_one_allocation(ranks):
    ranks(1).run(one_allocation)


def on_another_stream() -> None:
    """What the stream has queued before is over when a kernel reads."""
    rows, counts = rows_of("ordinary", 1024, 1024), [512, 512]
    want = plain_codes(rows, counts)
    data, scale = rows.codes.to(DEVICE), rows.scale.to(DEVICE)
    late = Fp8Rows(torch.zeros_like(data).view(torch.float8_e4m3fn), torch.zeros_like(scale))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.codes.copy_(data)
        late.scale.copy_(scale)
        columns = fp8_kernels.columns(late, counts, power_of_two=True)
        scales = fp8_kernels.transposed_scales(late, counts)
        torch.cuda.current_stream().synchronize()
        same_bits([codes for codes, _ in columns], want)
        same_bits(scales, [part.transposed_scale(4) for part in rows.split(counts)])


@needs_cuda
def test_launches_go_to_the_current_stream(ranks):
    ranks(1).run(on_another_stream)


def without_kernels() -> None:
    """No silent way round by torch."""
    rows = Fp8Rows(torch.zeros(4, 128, device=DEVICE).to(torch.float8_e4m3fn), torch.ones(4, 1, device=DEVICE))
    with mock.patch.object(_extension, "_load", return_value="it is of another kind"):
        for function, options in ((fp8_kernels.transposed_scales, {}), (fp8_kernels.columns, {"power_of_two": True})):
            with pytest.raises(BackendUnavailable, match="compiled cuda part .* it is of another kind"):
                function(rows, [4], **options)


@needs_cuda
def test_unusable_extension_is_an_error(ranks):
    ranks(1).run(without_kernels)


def limits_of_the_kernels() -> None:
    kernels = _extension.load_cuda()
    assert kernels.most_fp8_experts == fp8_kernels.MOST_LOCAL_EXPERTS
    nowhere = {"scales": 0, "row_stride": 1, "block_stride": 1, "device": 0, "stream": 0}
    for counts in ([0] * 513, [-1], [2**31 - 1], [2**30, 2**30]):
        with pytest.raises(ConfigError):
            kernels.transpose_fp8_scales(num_blocks=1, out=0, rows_per_expert=counts, **nowhere)
        with pytest.raises(ConfigError):
            kernels.quantize_fp8_columns(
                data=0, hidden=128, power_of_two=True, codes=0, column_scales=0, rows_per_expert=counts, **nowhere
            )


@needs_cuda
def test_limits_of_the_kernels(ranks):
    ranks(1).run(limits_of_the_kernels)
