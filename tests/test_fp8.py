"""The FP8 exchange format: the same bits as the wire in every blocking, no copies, typed errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ep_plugin import ConfigError, EpBuffer
from moe_ep_plugin.fp8 import Fp8Cols, Fp8Rows, Fp8Tiles, quantize_columns, quantize_rows, quantize_tiles
from moe_ep_plugin.wire import FP8_DTYPE, dequantize_blocks, quantize_blocks

from . import oracle
from .test_dispatcher import H, config_of

POWER_OF_TWO = pytest.mark.parametrize("power_of_two", [False, True])
FP32_MAX = torch.finfo(torch.float32).max


def bits(x: torch.Tensor) -> torch.Tensor:
    """Integers to compare by: NaN equals NaN, -0 differs from 0."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_blocks(got, data, scale):
    assert torch.equal(bits(got.data), bits(data))
    assert torch.equal(bits(got.scale), bits(scale))


def awkward(rows: int, hidden: int, seed: int = 0) -> torch.Tensor:
    """Ordinary values beside zero blocks, fp32 denormals, the largest values, infinities and NaN."""
    x = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed))
    x[0] = 0.0
    x[1] = -0.0
    x[2] *= 2.0**-130
    x[3] *= 1e-20
    x[4, ::3] = FP32_MAX
    x[5, 1::3] = -FP32_MAX
    x[6, 7], x[7, 8], x[8, 9] = torch.nan, torch.inf, -torch.inf
    return x


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@POWER_OF_TWO
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_columns_have_the_bits_of_the_wire(power_of_two, dtype):
    x = awkward(140, 264).to(dtype)
    rows = quantize_rows(x, power_of_two=power_of_two)
    assert_same_blocks(rows, *quantize_blocks(x, power_of_two))
    assert torch.equal(bits(rows.dequantize(dtype)), bits(dequantize_blocks(rows.data, rows.scale, dtype)))
    assert_same_blocks(
        quantize_columns(x, power_of_two=power_of_two), *quantize_blocks(x.t().contiguous(), power_of_two)
    )


@POWER_OF_TWO
def test_columns_of_fp8_rows_are_those_of_their_values(power_of_two):
    rows = quantize_rows(awkward(140, 264)[[0, 1, 2, 3, *range(6, 140)]], power_of_two=power_of_two)
    values = dequantize_blocks(rows.data, rows.scale, torch.float32)
    columns = rows.columns(power_of_two=power_of_two)
    assert_same_blocks(columns, *quantize_blocks(values.t().contiguous(), power_of_two))
    # A row's NaN stays in its own row and column.
    assert torch.equal(torch.isnan(columns.dequantize(torch.float32)), torch.isnan(values))


@POWER_OF_TWO
def test_columns_of_rows_that_dequantise_past_fp32_stay_finite(power_of_two):
    rows = quantize_rows(torch.full((3, 128), FP32_MAX), power_of_two=power_of_two)
    # The largest fp32 over its power-of-two scale 2^120 rounds to 256, and 256 * 2^120 is past fp32.
    assert torch.isinf(rows.dequantize(torch.float32)).all() == power_of_two
    columns = rows.columns(power_of_two=power_of_two)
    assert torch.isfinite(columns.scale).all()
    assert torch.isfinite(columns.data.float()).all()
    assert (columns.data.float() > 0).all()


@POWER_OF_TWO
@given(
    height=st.sampled_from([1, 127, 128, 129, 260]),
    width=st.sampled_from([8, 128, 136, 256]),
    exponent=st.integers(-45, 38),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30)
def test_tiles_equal_the_independent_implementation(power_of_two, height, width, exponent, seed):
    rng = np.random.default_rng(seed)
    spread = 10.0 ** (exponent + rng.uniform(-3, 0, (height, width)))
    with np.errstate(over="ignore"):
        weight = (rng.standard_normal((height, width)) * spread).astype(np.float32)
    tiles = quantize_tiles(torch.from_numpy(weight), power_of_two=power_of_two)
    for i in range(0, height, 128):
        for j in range(0, width, 128):
            tile = weight[i : i + 128, j : j + 128]
            largest = np.max(np.abs(tile), where=np.isfinite(tile), initial=0)
            scale = oracle.quantize(np.array([[largest]]), power_of_two)[1][0, 0]
            assert tiles.scale[i // 128, j // 128] == scale
            scaled = np.clip(tile * (np.float32(1) / scale), -448, 448)
            codes = oracle.to_e4m3(np.where(np.isfinite(tile), scaled, np.float32(np.nan)))
            got = tiles.codes[i : i + 128, j : j + 128].numpy()
            assert (got[np.isfinite(tile)] == codes[np.isfinite(tile)]).all()
            assert (got[~np.isfinite(tile)] & 127 == 127).all()


@POWER_OF_TWO
def test_tiles_keep_bad_values_to_themselves(power_of_two):
    weight = torch.linspace(-3, 3, 260 * 264).view(260, 264)
    clean = quantize_tiles(weight, power_of_two=power_of_two)
    weight[130, 5], weight[4, 200], weight[1, 3] = torch.nan, torch.inf, torch.nan
    tiles = quantize_tiles(weight, power_of_two=power_of_two)
    wrong = torch.isnan(tiles.data.float())
    assert wrong.nonzero().tolist() == [[1, 3], [4, 200], [130, 5]]
    assert torch.equal(tiles.codes[~wrong], clean.codes[~wrong])
    assert torch.equal(tiles.scale, clean.scale)


@POWER_OF_TWO
def test_no_scale_overflows_or_vanishes(power_of_two):
    for value in (0.0, 2.0**-149, 2.0**-126, 1.0, FP32_MAX, torch.inf, torch.nan):
        x = torch.full((130, 130), value)
        for quantize in (quantize_rows, quantize_columns, quantize_tiles):
            scale = quantize(x, power_of_two=power_of_two).scale
            assert torch.isfinite(scale).all()
            assert torch.isfinite(1 / scale).all()
            assert (scale >= torch.finfo(torch.float32).tiny).all()


def test_power_of_two_scales_are_told_apart():
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    for quantize in (quantize_rows, quantize_columns, quantize_tiles):
        assert quantize(x, power_of_two=True).has_power_of_two_scales()
        assert not quantize(x).has_power_of_two_scales()


@pytest.mark.parametrize("scale", [0.75, -0.5, torch.inf, torch.nan])
def test_scales_that_are_no_power_of_two(scale):
    assert not Fp8Rows(data(2, 128), torch.tensor([[0.5], [scale]])).has_power_of_two_scales()


def padded_rows(backend: str) -> None:
    config = config_of(backend, power_of_two_scales=True, expert_alignment=16)
    with EpBuffer(None, config) as buffer:
        x = torch.randn(3, H, generator=torch.Generator().manual_seed(3))
        out = buffer.dispatch(x, torch.tensor([[0], [0], [2]]), wire="fp8")
        first, second, third, *_ = Fp8Rows.from_dispatch(out).split(out.tokens_per_expert.tolist())
        assert [len(part.data) for part in (first, second, third)] == [16, 0, 16]
        assert first.has_power_of_two_scales()
        assert (first.dequantize(torch.float32)[2:] == 0).all()
        # Padding rows stay zero and leave the other rows' columns as they are.
        columns, alone = first.columns(power_of_two=True), Fp8Rows(first.data[:2], first.scale[:2])
        assert torch.equal(columns.scale, alone.columns(power_of_two=True).scale)
        assert torch.equal(
            columns.dequantize(torch.float32)[:2], alone.columns(power_of_two=True).dequantize(torch.float32)
        )
        assert (columns.dequantize(torch.float32)[2:] == 0).all()


def test_rows_that_pad_an_expert(ranks, backend):
    ranks(1).run(padded_rows, backend)


def test_conversions_copy_no_data():
    rows = quantize_rows(torch.randn(12, 264))
    assert shares_memory(rows.codes, rows.data)
    parts = rows.split([5, 0, 4])
    assert [len(part.data) for part in parts] == [5, 0, 4]
    assert all(
        part.data.data_ptr() == rows.data[start:].data_ptr() and part.scale.data_ptr() == rows.scale[start:].data_ptr()
        for part, start in zip(parts[::2], (0, 5), strict=True)
    )
    # From the wire's order the scales are copied ...
    transposed = rows.transposed_scale(4)
    assert torch.equal(transposed, rows.scale.t())
    assert transposed.is_contiguous()
    assert not shares_memory(transposed, rows.scale)
    # ... and where they lie transposed, nothing is.
    back = Fp8Rows.from_transposed(rows.codes, transposed)
    assert shares_memory(back.data, rows.data)
    assert shares_memory(back.transposed_scale(4), transposed)
    assert_same_blocks(back, rows.data, rows.scale)


def low_latency_rows(backend: str) -> None:
    with EpBuffer(None, config_of(backend, wire="fp8", low_latency_tokens_per_rank=8)) as buffer:
        x = torch.randn(8, H, generator=torch.Generator().manual_seed(2))
        out = buffer.low_latency_dispatch(x, torch.full((8, 1), 3)).wait()
        rows = Fp8Rows(out.x[3], out.scale[3])
        assert torch.equal(rows.codes, quantize_rows(x).codes)
        assert torch.equal(rows.scale, quantize_rows(x).scale)
        assert shares_memory(rows.transposed_scale(4), out.scale[3])


def test_rows_of_low_latency_mode_have_their_scales_transposed_already(ranks, backend):
    ranks(1).run(low_latency_rows, backend)


@pytest.mark.parametrize("num_rows", [0, 1, 4, 5, 130])
def test_transposed_scales_are_padded_with_zeros(num_rows):
    rows = quantize_rows(torch.randn(num_rows, 264))
    padded = rows.transposed_scale(4)
    assert padded.shape == (3, -(-num_rows // 4) * 4)
    assert torch.equal(padded[:, :num_rows], rows.scale.t())
    assert (padded[:, num_rows:] == 0).all()
    assert torch.equal(Fp8Rows.from_transposed(rows.data, padded).scale, rows.scale)


def test_columns_scale_in_the_order_of_transformer_engine():
    """Columns of [rows, hidden]: scales [ceil(rows / 128), hidden], and data of the transpose."""
    columns = quantize_columns(torch.randn(300, 136))
    assert columns.data.shape == (136, 300)
    assert columns.transposed_scale(4).shape == (3, 136)


def test_no_rows():
    x = torch.zeros(0, 264)
    assert quantize_rows(x).split([0, 0])[1].dequantize(torch.bfloat16).shape == (0, 264)
    columns = quantize_rows(x).columns()
    assert (columns.data.shape, columns.scale.shape) == ((264, 0), (264, 0))
    assert columns.dequantize(torch.float32).shape == (0, 264)


def data(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=FP8_DTYPE)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Fp8Rows(torch.zeros(2, 128), torch.ones(2, 1)), "Fp8Rows.data.dtype is torch.float32"),
        (lambda: Fp8Rows(data(1, 2, 128), torch.ones(2, 1)), r"Fp8Rows.data.shape is \[1, 2, 128\]"),
        (lambda: Fp8Rows(data(128, 2).t(), torch.ones(2, 1)), r"Fp8Rows.data.stride\(\) is \(1, 2\)"),
        (lambda: Fp8Rows(data(2, 128), torch.ones(2, 1).half()), "Fp8Rows.scale.dtype is torch.float16"),
        (lambda: Fp8Rows(data(2, 129), torch.ones(2, 1)), r"scale.shape is \[2, 1\], but \[2, 2\] is needed"),
        (lambda: Fp8Rows(data(2, 128), torch.ones(2, 1, device="meta")), "scale.device is meta"),
        (lambda: Fp8Rows(data(2, 128), torch.ones(2, 1), torch.ones(3, 128)), r"grad_rows.shape is \[3, 128\]"),
        (lambda: Fp8Cols(data(128, 129), torch.ones(128, 1)), r"Fp8Cols.scale.shape is \[128, 1\]"),
        (lambda: Fp8Tiles(data(129, 128), torch.ones(129, 1)), r"Fp8Tiles.scale.shape .* \[2, 1\] is needed"),
        (lambda: Fp8Rows.from_transposed(data(3, 128), torch.ones(1, 2)), r"scale.shape is \[2, 1\]"),
        (lambda: Fp8Rows.from_transposed(data(3, 128), torch.ones(3)), r"scale.shape is \[3\]"),
        (lambda: quantize_rows(torch.ones(2, 128).double()), "x.dtype is torch.float64"),
        (lambda: quantize_columns(torch.ones(128)), r"x.shape is \[128\]"),
        (lambda: quantize_tiles(torch.ones(2, 2, dtype=torch.int32)), "weight.dtype is torch.int32"),
        (lambda: quantize_rows(torch.ones(2, 8)).split([1, 2]), r"tokens_per_expert is \[1, 2\], but there are 2 rows"),
        (lambda: quantize_rows(torch.ones(2, 8)).split([3, -1]), "no count may be negative"),
        (lambda: quantize_rows(torch.ones(2, 8)).transposed_scale(0), "multiple is 0"),
    ],
)
def test_errors_name_argument_value_and_limit(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize(("num_rows", "hidden"), [(0, 128), (5, 264), (130, 128), (128, 1024)])
def test_mx_scales_say_the_same(num_rows, hidden):
    x = torch.randn(num_rows, hidden, generator=torch.Generator().manual_seed(2)) * torch.logspace(-8, 8, hidden)
    rows = quantize_rows(x, power_of_two=True)
    padded = Fp8Rows(rows.data, torch.where(torch.arange(num_rows)[:, None] == 3, 0.0, rows.scale))
    for case in (rows, padded):
        scale = case.mx_scale()
        blocks = -(-hidden // 32)
        assert scale.dtype == torch.uint8 and scale.is_contiguous()
        assert scale.shape == (-(-num_rows // 128) * 128, -(-blocks // 4) * 4)
        wide = torch.exp2(scale[:num_rows, :blocks].double() - 127).repeat_interleave(32, dim=1)[:, :hidden]
        kept = (case.scale > 0).repeat_interleave(128, dim=1)[:, :hidden]
        got = torch.where(kept, case.data.double() * wide, 0.0)
        assert torch.equal(got.float(), case.dequantize(torch.float32))
        assert not scale[num_rows:].any() and not scale[:, blocks:].any()


def test_mx_scales_need_powers_of_two():
    with pytest.raises(ConfigError, match="power_of_two_scales=True"):
        quantize_rows(torch.randn(3, 128)).mx_scale()
