"""The FP8 wire format: e4m3 rows with one fp32 scale per 128 elements along hidden.

This is the plain PyTorch statement of the format. The host and CUDA kernels give the same bits:
``scale = max(amax, MIN_AMAX) / 448``, ``q = e4m3(x * (1 / scale))``, each operation rounded to nearest
even in fp32. A finite row never overflows and an all-zero block has a tiny positive scale, so dividing
by a scale is always safe. NaN and infinities become NaN and leave their block's other elements finite.
"""

from __future__ import annotations

import torch

from .types import FP8_BLOCK

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
# The smallest amax that is told from zero. Keeps both the scale and its reciprocal normal fp32 numbers.
MIN_AMAX = 2.0**-100


def num_scales(hidden: int) -> int:
    """Scales per row: blocks of 128 elements, a shorter last block where hidden is not a multiple."""
    return -(-hidden // FP8_BLOCK)


def quantize_blocks(x: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows to the FP8 wire format.

    Args:
        x: [rows, hidden] fp32, bf16 or fp16.
        power_of_two: Round every scale up to a power of two.

    Returns:
        ``(q, scale)``: [rows, hidden] float8_e4m3fn and fp32 [rows, ceil(hidden / 128)].
    """
    rows, hidden = x.shape
    blocks = num_scales(hidden)
    padded = torch.zeros(rows, blocks * FP8_BLOCK, dtype=torch.float32, device=x.device)
    padded[:, :hidden] = x
    padded = padded.view(rows, blocks, FP8_BLOCK)
    scale = block_scales(padded, (-1,), power_of_two)
    q = to_fp8(padded, scale.unsqueeze(-1)).view(rows, blocks * FP8_BLOCK)[:, :hidden]
    return q.contiguous(), scale


def block_scales(x: torch.Tensor, dims: tuple[int, ...], power_of_two: bool) -> torch.Tensor:
    """Return the scales of fp32 blocks that extend over ``dims``, which the result is without."""
    finite = torch.where(torch.isfinite(x), x, 0.0)
    amax = finite.abs().amax(dim=dims).clamp_min(MIN_AMAX)
    # By a tensor: on GPUs, torch divides by a Python number through its reciprocal, which rounds differently.
    scale = amax / torch.full_like(amax, FP8_MAX)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return scale


def to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return fp32 ``x`` over its blocks' ``scale`` (broadcast to it) as e4m3."""
    scaled = x * (torch.ones_like(scale) / scale)
    # Rounding in the reciprocal may push the largest element one ulp past 448.
    scaled = torch.where(torch.isfinite(x), scaled.clamp(-FP8_MAX, FP8_MAX), torch.nan)
    return scaled.to(FP8_DTYPE)


def dequantized(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return rows as they arrived, those of the FP8 wire, which have scales, dequantised to ``dtype``."""
    return x if scale is None else dequantize_blocks(x, scale, dtype)


def dequantize_blocks(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return [rows, hidden] of ``dtype`` from the FP8 wire format; multiplied in fp32, then rounded."""
    hidden = q.shape[1]
    factors = scale.repeat_interleave(FP8_BLOCK, dim=1)[:, :hidden]
    return (q.float() * factors).to(dtype)
