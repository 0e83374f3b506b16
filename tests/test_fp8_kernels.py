"""FP8 rows laid out for a grouped GEMM: shapes, padding and errors, and the bits of the plain functions.

:func:`rows_of` and :func:`compare` are also what tests/gpu/test_fp8_kernels_cuda.py holds the kernels to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from moe_ep_plugin import ConfigError, EpBuffer, fp8_kernels
from moe_ep_plugin.fp8 import Fp8Rows
from moe_ep_plugin.wire import FP8_DTYPE

from .cases import bits
from .test_dispatcher import config_of

KINDS = ("ordinary", "nan", "padding", "huge", "tiny", "any")
FP32_MAX = torch.finfo(torch.float32).max
# Ragged experts, with none in between, and with more rows than one block of scales.
COUNTS = [5, 0, 131, 1, 128, 16]


def rows_of(kind: str, num_rows: int, hidden: int, seed: int = 0) -> Fp8Rows:
    """Rows on the CPU with codes of every value and such scales.

    "ordinary" has no NaN. "nan": one code in a hundred, and all of a column. "padding": rows of zeros with scales of
    zero, and zeros elsewhere. "huge": products past fp32 in some rows. "tiny": the smallest scales of the wire, and
    fp32's denormals. "any": every code and every fp32 as a scale.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (num_rows, hidden), generator=generator, dtype=torch.uint8)
    blocks = -(-hidden // 128)
    scale = torch.exp2(8 * torch.rand(num_rows, blocks, generator=generator) - 12)
    chance = torch.rand(num_rows, hidden, generator=generator)
    if kind != "any":
        codes[codes & 127 == 127] = 0x3A
    if kind == "nan":
        codes[chance < 0.01] = 0x7F
        codes[chance > 0.99] = 0xFF
        codes[:, 3::50] = 0x7F
    elif kind == "padding":
        codes[:, 3::50] = 0
        codes[:, 4::50] = 0x80
        codes[::3], scale[::3] = 0, 0.0
        # Padding has codes of zero, but whatever they are, the scale counts.
        scale[1::6] = 0.0
    elif kind == "huge":
        scale[::2] = FP32_MAX / 448 * (0.5 + torch.rand(scale[::2].shape, generator=generator))
        scale[::7] = 2.0**120
        codes[chance < 0.001] = 0x7F
        # Columns that overflow beside some that do not.
        codes[:, ::3] = codes[:, ::3] & 0x87
    elif kind == "tiny":
        scale[:] = 2.0**-100 / 448
        scale[::5] = 2.0**-149
        scale[1::5] *= 0.25
    elif kind == "any":
        scale = torch.randint(-(2**31), 2**31, scale.shape, generator=generator).to(torch.int32).view(torch.float32)
        # Else there is an infinite product in almost every column of almost every block.
        scale[:, : blocks // 2] *= 2.0**-120
    return Fp8Rows(codes.view(FP8_DTYPE), scale.contiguous())


def layouts_of(rows: Fp8Rows) -> Iterator[Fp8Rows]:
    """The same rows with scales as the wire has them, transposed, and in part of a wider tensor."""
    yield rows
    yield Fp8Rows.from_transposed(rows.data, rows.transposed_scale(4))
    wide = torch.full((len(rows.scale), 2 * rows.scale.shape[1] + 3), 7.0, device=rows.scale.device)
    part = wide[:, 1 : 1 + 2 * rows.scale.shape[1] : 2]
    yield Fp8Rows(rows.data, part.copy_(rows.scale))


def compare(rows: Fp8Rows, counts: Sequence[int], device: str) -> int:
    """Compare results on a device with the plain functions' on the CPU; returns how many tensors were compared."""
    compared = 0
    parts = rows.split(counts)
    scales = [part.transposed_scale(4) for part in parts]
    moved = Fp8Rows(rows.data.to(device), rows.scale.to(device))
    for there in layouts_of(moved):
        got = fp8_kernels.transposed_scales(there, counts)
        compared += same_bits(got, scales)
    for power_of_two in (False, True):
        columns = [part.columns(power_of_two=power_of_two) for part in parts]
        want = [tensor for c in columns for tensor in (c.codes, c.transposed_scale(4))]
        for there in layouts_of(moved):
            pairs = fp8_kernels.columns(there, counts, power_of_two=power_of_two)
            compared += same_bits([tensor for pair in pairs for tensor in pair], want)
    return compared


def same_bits(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> int:
    assert len(got) == len(want)
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert ours.is_contiguous() and ours.dtype == theirs.dtype and ours.shape == theirs.shape
        wrong = bits(ours.cpu()) != bits(theirs)
        assert not wrong.any(), (index, wrong.nonzero()[:4].tolist(), ours[wrong][:4], theirs[wrong][:4])
    return len(got)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [16, 272])
def test_parts_have_the_bits_of_each_experts_rows(kind, hidden):
    rows = rows_of(kind, sum(COUNTS) + 3, hidden)
    assert compare(rows, COUNTS, "cpu") == len(COUNTS) * (3 + 2 * 2 * 3)


def test_shapes_and_padding():
    rows = rows_of("ordinary", sum(COUNTS), 272)
    scales = fp8_kernels.transposed_scales(rows, COUNTS)
    assert [tuple(scale.shape) for scale in scales] == [(3, 8), (3, 0), (3, 132), (3, 4), (3, 128), (3, 16)]
    for part, scale, count in zip(rows.split(COUNTS), scales, COUNTS, strict=True):
        assert torch.equal(scale[:, :count], part.scale.t())
        assert (scale[:, count:] == 0).all()
    columns = fp8_kernels.columns(rows, COUNTS, power_of_two=True)
    assert [tuple(codes.shape) for codes, _ in columns] == [(272, count) for count in COUNTS]
    assert [tuple(scale.shape) for _, scale in columns] == [(blocks, 272) for blocks in (1, 0, 2, 1, 1, 1)]
    assert {codes.dtype for codes, _ in columns} == {torch.uint8}


@pytest.mark.parametrize("counts", [[], [0], [0, 0, 0]])
def test_no_rows(counts):
    rows = rows_of("ordinary", 0, 272)
    assert [tuple(scale.shape) for scale in fp8_kernels.transposed_scales(rows, counts)] == [(3, 0)] * len(counts)
    for codes, scale in fp8_kernels.columns(rows, counts, power_of_two=False):
        assert (tuple(codes.shape), tuple(scale.shape)) == ((272, 0), (0, 272))


def dispatched_rows(backend: str) -> None:
    """Rows that pad an expert come with scales of zero, and leave its columns as they are without them."""
    config = config_of(backend, power_of_two_scales=True, expert_alignment=16, hidden=144, max_tokens_per_rank=20)
    with EpBuffer(None, config) as buffer:
        x = torch.randn(20, 144, generator=torch.Generator().manual_seed(3))
        out = buffer.dispatch(x, torch.tensor([0] * 17 + [2] * 3)[:, None], wire="fp8")
        rows, counts = Fp8Rows.from_dispatch(out), out.tokens_per_expert.tolist()
        assert counts[:3] == [32, 0, 16]
        assert (rows.scale[17:32] == 0).all()
        padded = fp8_kernels.columns(rows, counts, power_of_two=True)[0]
        alone = fp8_kernels.columns(rows, [17], power_of_two=True)[0]
        assert torch.equal(padded[0][:, :17], alone[0])
        assert torch.equal(padded[1], alone[1])
        assert (padded[0][:, 17:] & 127 == 0).all()


def test_rows_that_pad_an_expert(ranks, backend):
    ranks(1).run(dispatched_rows, backend)


@pytest.mark.parametrize(
    ("hidden", "counts", "words"),
    [
        (128, [3, -1], "no count may be negative"),
        (128, [3, 2], r"tokens_per_expert is \[3, 2\], but there are 4 rows"),
        (128, [0] * 513, r"len\(counts\) is 513, but one launch serves 512 .*; spread the experts over more ranks"),
        (136, [4], r"rows.data.shape is \[4, 136\], but hidden must be a multiple of 16"),
    ],
)
def test_errors_name_argument_value_and_limit(hidden, counts, words):
    rows = rows_of("ordinary", 4, hidden)
    with pytest.raises(ConfigError, match=words):
        fp8_kernels.columns(rows, counts, power_of_two=True)
    if hidden % 16 == 0:
        with pytest.raises(ConfigError, match=words):
            fp8_kernels.transposed_scales(rows, counts)
