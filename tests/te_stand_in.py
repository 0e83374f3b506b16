"""A stand-in for what ``moe_ep_plugin/_te.py`` takes from TransformerEngine 2.20: plain PyTorch on the CPU, as strict.

Operands hold codes and scales in TransformerEngine's layouts, and products are made from those. A refusal is an
AssertionError that says what is wrong. What quantisation gives is tested against TransformerEngine on a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moe_ep_plugin import _te
from moe_ep_plugin.fp8 import quantize_rows, quantize_tiles

E4M3 = "e4m3"
Pair = tuple[torch.Tensor | None, torch.Tensor | None]


class Quantized(NamedTuple):
    """What a quantizer was asked for."""

    block_dims: int
    rowwise: bool
    columnwise: bool
    power_of_two: bool


class Gemm(NamedTuple):
    """What a grouped GEMM was given."""

    layout: str
    a: list[Any]
    b: list[Any]


class StandIn:
    """The names that ``_te.load()`` returns, and a record of how they were used.

    Attributes:
        quantized: Every quantisation, an entry an expert.
        gemms: Every grouped GEMM.
    """

    def __init__(self) -> None:
        self.quantized: list[Quantized] = []
        self.gemms: list[Gemm] = []

    def names(self) -> _te._Names:
        return _te._Names(None, Storage, self.quantizer, E4M3, split_quantize, self.grouped_gemm)

    def quantizer(self, fp8_dtype: str, **options: Any) -> Quantizer:
        assert fp8_dtype == E4M3
        return Quantizer(self.quantized, **options)

    def grouped_gemm(
        self,
        a: list[Any],
        b: list[Any],
        out: list[torch.Tensor],
        quantization_params: list[None],
        out_dtype: torch.dtype,
        layout: str,
        m_splits: list[int],
        *,
        grad: bool,
        use_split_accumulator: bool,
        single_output: bool,
    ) -> None:
        """As ``general_grouped_gemm``: TN gives b @ a^T, NN b @ a, NT b^T @ a, from data quantised along the sums."""
        assert layout in ("TN", "NN", "NT")
        assert grad == (layout != "TN")
        assert quantization_params == [None] * len(a)
        assert use_split_accumulator, "block scaling needs the split accumulator"
        assert len(a) == len(b) == len(m_splits)
        assert [operand.size()[0] for operand in b] == m_splits, f"{layout}: rows are not those of m_splits"
        self.gemms.append(Gemm(layout, list(a), list(b)))
        trans_a, trans_b = layout[0] == "T", layout[1] == "T"
        parts: Sequence[torch.Tensor] = out
        if single_output:
            assert len(out) == 1 and len(out[0]) == sum(m_splits), "one output holds the rows of all experts"
            parts = out[0].split(m_splits)
        assert len(parts) == len(a)
        for x, y, result in zip(a, b, parts, strict=True):
            assert not (x.is_2D_scaled and y.is_2D_scaled), "no GEMM takes tiles times tiles"
            right = x.values(rowwise=trans_a)
            left = y.values(rowwise=not trans_b)
            right, left = right.t() if trans_a else right, left.t() if trans_b else left
            (n, k), m = left.shape, right.shape[1]
            # What cuBLAS needs of FP8 operands and of results of 2 bytes.
            assert k % 16 == 0, f"{layout}: the inner dimension is {k}, no multiple of 16"
            assert m % 8 == 0 and (y.is_2D_scaled or n % 8 == 0), f"{layout}: {n} x {m} is no multiple of 8"
            assert result.shape == (n, m), f"{layout}: out is {list(result.shape)}, not {[n, m]}"
            assert result.dtype == out_dtype and out_dtype in (torch.bfloat16, torch.float16)
            assert result.is_contiguous()
            # An empty sum is zero here too.
            result.copy_(left @ right)


class Quantizer:
    """As ``Float8BlockQuantizer``."""

    def __init__(
        self,
        record: list[Quantized],
        *,
        rowwise: bool,
        columnwise: bool,
        force_pow_2_scales: bool,
        block_scaling_dim: int,
    ) -> None:
        assert rowwise or columnwise
        assert block_scaling_dim in (1, 2)
        self.record, self.rowwise, self.columnwise = record, rowwise, columnwise
        self.power_of_two, self.block_dims = force_pow_2_scales, block_scaling_dim
        self.internal = False

    def copy(self) -> Quantizer:
        return copy.copy(self)

    def __call__(self, x: torch.Tensor) -> Storage:
        # Not a refusal of TransformerEngine's: otherwise it makes a tensor subclass, which is slower.
        assert self.internal
        assert x.is_contiguous() and x.data_ptr() % 16 == 0, "kernels read 16 bytes at a time"
        asked = Quantized(self.block_dims, self.rowwise, self.columnwise, self.power_of_two)
        self.record.append(asked)
        tiles = self.block_dims == 2
        by_row: Pair = (None, None)
        by_column: Pair = (None, None)
        if self.rowwise:
            rows = (quantize_tiles if tiles else quantize_rows)(x, power_of_two=self.power_of_two)
            by_row = rows.codes, padded(rows.scale if tiles else rows.scale.t())
        if self.columnwise:
            columns = (quantize_tiles if tiles else quantize_rows)(x.t(), power_of_two=self.power_of_two)
            by_column = columns.codes, padded(columns.scale if tiles else columns.scale.t())
        return Storage(*by_row, *by_column, E4M3, self, tiles)


class Storage:
    """As ``Float8BlockwiseQTensorStorage``: column-wise data is transposed, scales are padded to multiples of 4."""

    def __init__(
        self,
        rowwise_data: torch.Tensor | None,
        rowwise_scale_inv: torch.Tensor | None,
        columnwise_data: torch.Tensor | None,
        columnwise_scale_inv: torch.Tensor | None,
        fp8_dtype: str,
        quantizer: Quantizer,
        is_2D_scaled: bool,
        *,
        fake_dtype: torch.dtype = torch.float32,
    ) -> None:
        assert fp8_dtype == E4M3
        assert is_2D_scaled == (quantizer.block_dims == 2)
        self.rowwise = checked(rowwise_data, rowwise_scale_inv, is_2D_scaled)
        self.columnwise = checked(columnwise_data, columnwise_scale_inv, is_2D_scaled)
        assert self.rowwise or self.columnwise
        # It may have lost one of the two since it was made.
        assert (quantizer.rowwise or not self.rowwise) and (quantizer.columnwise or not self.columnwise)
        if self.rowwise and self.columnwise:
            assert self.rowwise[0].shape == self.columnwise[0].t().shape
        self.is_2D_scaled, self.quantizer, self.dtype = is_2D_scaled, quantizer, fake_dtype

    def get_metadata(self) -> dict[str, Any]:
        """As TransformerEngine's: what ``__init__`` takes."""
        rowwise, columnwise = self.rowwise or (None, None), self.columnwise or (None, None)
        return {
            "rowwise_data": rowwise[0],
            "rowwise_scale_inv": rowwise[1],
            "columnwise_data": columnwise[0],
            "columnwise_scale_inv": columnwise[1],
            "fp8_dtype": E4M3,
            "quantizer": self.quantizer,
            "is_2D_scaled": self.is_2D_scaled,
            "fake_dtype": self.dtype,
        }

    def size(self) -> torch.Size:
        return self.rowwise[0].shape if self.rowwise else self._columns()[0].t().shape

    def update_usage(self, rowwise_usage: bool, columnwise_usage: bool) -> None:
        assert rowwise_usage or columnwise_usage
        assert self.rowwise or not rowwise_usage, "no row-wise data to keep"
        assert self.columnwise or not columnwise_usage, "no column-wise data to keep"
        self.rowwise = self.rowwise if rowwise_usage else None
        self.columnwise = self.columnwise if columnwise_usage else None

    def dequantize(self, *, dtype: torch.dtype) -> torch.Tensor:
        return self.values(rowwise=self.rowwise is not None).to(dtype)

    def values(self, *, rowwise: bool) -> torch.Tensor:
        """fp32, in the order of the matrix."""
        if not rowwise:
            return wide(*self._columns(), self.is_2D_scaled).t()
        assert self.rowwise, "the operand lacks row-wise usage"
        return wide(*self.rowwise, self.is_2D_scaled)

    def _columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.columnwise, "the operand lacks column-wise usage"
        return self.columnwise


def split_quantize(x: torch.Tensor, split_sections: list[int], quantizers: list[Quantizer]) -> list[Storage]:
    assert len(quantizers) == len(split_sections)
    return [by(part) for by, part in zip(quantizers, x.split(split_sections), strict=True)]


def padded(scale: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(scale, (0, -scale.shape[1] % 4)).contiguous()


def checked(
    data: torch.Tensor | None, scale: torch.Tensor | None, tiles: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Refuse data and scales that no GEMM reads."""
    assert (data is None) == (scale is None)
    if data is None or scale is None:
        return None
    assert data.dtype == torch.uint8 and data.dim() == 2 and data.is_contiguous()
    rows, inner = data.shape
    blocks = -(-inner // 128)
    wanted = (-(-rows // 128), blocks + -blocks % 4) if tiles else (blocks, rows + -rows % 4)
    assert scale.shape == wanted, f"scales are {list(scale.shape)}, not {list(wanted)}"
    assert scale.dtype == torch.float32 and scale.is_contiguous()
    return data, scale


def wide(data: torch.Tensor, scale: torch.Tensor, tiles: bool) -> torch.Tensor:
    rows, inner = data.shape
    blocks = -(-inner // 128)
    by_row = scale[:, :blocks].repeat_interleave(128, dim=0)[:rows] if tiles else scale[:, :rows].t()
    return data.view(torch.float8_e4m3fn).float() * by_row.repeat_interleave(128, dim=1)[:, :inner]
