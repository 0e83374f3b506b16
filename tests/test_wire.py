"""The FP8 wire format against closed forms and an independent implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ep_plugin.wire import FP8_DTYPE, MIN_AMAX, dequantize_blocks, num_scales, quantize_blocks

from . import oracle

POWER_OF_TWO = pytest.mark.parametrize("power_of_two", [False, True])


def reference(x: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = oracle.quantize(x.float().numpy(), power_of_two)
    return torch.from_numpy(codes), torch.from_numpy(scales)


def assert_same(x: torch.Tensor, power_of_two: bool) -> None:
    q, scale = quantize_blocks(x, power_of_two)
    codes, scales = reference(x, power_of_two)
    assert (q.dtype, scale.dtype) == (FP8_DTYPE, torch.float32)
    nan = torch.isnan(q.float())
    assert torch.equal(nan, codes & 127 == 127)
    assert torch.equal(q.view(torch.uint8)[~nan], codes[~nan])
    assert torch.equal(scale, scales)


def test_oracle_rounds_as_ieee_says():
    table = oracle.e4m3_table()
    assert (table[1], table[7], table[8], table[126]) == (2.0**-9, 7 * 2.0**-9, 2.0**-6, 448)
    exact = np.concatenate([table, -table[1:]]).astype(np.float32)
    assert oracle.to_e4m3(exact).tolist() == [*range(127), *range(129, 255)]
    # Half-way values go to the even code: 1.0625 to 1, 1.1875 to 1.25, 2^-10 to 0.
    ties = oracle.to_e4m3(np.array([1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10], np.float32))
    assert table[ties].tolist() == [1.0, 1.25, 0.0, 2.0**-8]


@POWER_OF_TWO
@given(
    hidden=st.sampled_from([4, 8, 127, 128, 129, 136, 256, 264, 400]),
    rows=st.integers(0, 5),
    exponent=st.integers(-45, 38),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150)
def test_equals_the_independent_implementation(power_of_two, hidden, rows, exponent, dtype, seed):
    rng = np.random.default_rng(seed)
    spread = 10.0 ** (exponent + rng.uniform(-3, 0, (rows, hidden)))
    x = torch.from_numpy(rng.standard_normal((rows, hidden)) * spread).to(torch.float32).to(dtype)
    assert_same(x, power_of_two)


@POWER_OF_TWO
def test_all_zero_block(power_of_two):
    x = torch.zeros(2, 256)
    x[1, 200] = 1.0
    q, scale = quantize_blocks(x, power_of_two)
    assert not q[0].float().any()
    assert torch.isfinite(1 / scale).all()
    assert (scale > 0).all()
    assert torch.equal(scale[0], scale[1, :1].expand(2))
    assert torch.equal(dequantize_blocks(q, scale, torch.float32)[0], x[0])
    assert_same(x, power_of_two)


@POWER_OF_TWO
def test_denormal_and_tiny_values_become_zero(power_of_two):
    x = torch.full((1, 128), 1e-44)
    x[0, 1] = -MIN_AMAX / 4096
    q, scale = quantize_blocks(x, power_of_two)
    assert scale.item() >= MIN_AMAX / 448
    assert not dequantize_blocks(q, scale, torch.float32)[0, 0]
    assert_same(x, power_of_two)


@POWER_OF_TWO
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_value_spoils_only_itself(power_of_two, bad):
    x = torch.linspace(-3, 3, 264)[None].repeat(2, 1)
    clean_q, clean_scale = quantize_blocks(x, power_of_two)
    x[1, 130] = bad
    q, scale = quantize_blocks(x, power_of_two)
    wrong = torch.isnan(q.float())
    assert wrong[1, 130]
    assert wrong.sum() == 1
    assert torch.equal(q.view(torch.uint8)[~wrong], clean_q.view(torch.uint8)[~wrong])
    assert torch.equal(scale, clean_scale)


def test_largest_finite_values_do_not_overflow():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        top = torch.finfo(dtype).max
        x = torch.tensor([[top, -top, top / 3, 1.0]], dtype=dtype)
        for power_of_two in (False, True):
            q, scale = quantize_blocks(x, power_of_two)
            assert torch.isfinite(q.float()).all()
            assert q.float()[0, 0] == -q.float()[0, 1]
            assert torch.isfinite(scale).all()
            assert_same(x, power_of_two)


def test_power_of_two_scales_are_the_next_power_up():
    for amax, expected in [(448.0, 1.0), (448.0 * 2, 2.0), (449.0, 2.0), (1.0, 2.0**-8), (3.5, 2.0**-7)]:
        x = torch.zeros(1, 128)
        x[0, 77] = amax
        _, scale = quantize_blocks(x, power_of_two=True)
        assert scale.item() == expected, amax


def test_exact_for_values_on_the_grid():
    """With amax 448 the scale is 1, so every e4m3 value survives the round trip."""
    values = torch.from_numpy(oracle.e4m3_table()).float()
    x = torch.cat([values, values[-1:]])[None]
    q, scale = quantize_blocks(x)
    assert scale.item() == 1.0
    assert torch.equal(dequantize_blocks(q, scale, torch.float32), x)


@pytest.mark.parametrize(("hidden", "blocks"), [(1, 1), (128, 1), (129, 2), (136, 2), (256, 2), (257, 3)])
def test_a_short_last_block_has_its_own_scale(hidden, blocks):
    assert num_scales(hidden) == blocks
    x = torch.full((1, hidden), 1000.0)
    x[0, -1] = 1.0
    q, scale = quantize_blocks(x)
    assert scale.shape == (1, blocks)
    last = torch.tensor([1.0 if hidden % 128 == 1 else 1000.0])
    assert scale[0, -1] == last / 448


@given(seed=st.integers(0, 2**31))
def test_error_is_within_half_a_step(seed):
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(seed))
    q, scale = quantize_blocks(x)
    back = dequantize_blocks(q, scale, torch.float32)
    step = scale.repeat_interleave(128, 1)[:, :200] * 2.0**-9
    assert ((back - x).abs() <= torch.maximum(x.abs() * 2.0**-4, step / 2) * 1.0001).all()
