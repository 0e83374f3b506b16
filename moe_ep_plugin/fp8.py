"""The FP8 exchange format: e4m3 blocks with fp32 scales, as it crosses the wire and as a GEMM reads it.

Three blockings are in use, all with the rounding of :mod:`moe_ep_plugin.wire`:

=================  =======================  ==========================================  ==========================
class              a scale belongs to       data, scale                                 for
=================  =======================  ==========================================  ==========================
:class:`Fp8Rows`   1 row x 128 of hidden    [rows, hidden], [rows, ceil(hidden/128)]    the wire, forward GEMMs
:class:`Fp8Cols`   128 rows x 1 of hidden   [hidden, rows], [hidden, ceil(rows/128)]    weight gradients
:class:`Fp8Tiles`  128 x 128                [out, in], [ceil(out/128), ceil(in/128)]    weights
=================  =======================  ==========================================  ==========================

A scale never overflows: it is at most the largest finite input over 448, rounded up to a power of two where that is
asked for, and at least 2**-100 / 448, so that its reciprocal is finite too. What can overflow is the way back: the
largest elements within half an e4m3 step of a dtype's maximum may dequantise to infinity in that dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ConfigError
from .types import FP8_BLOCK, DispatchOutput
from .wire import FP8_DTYPE, block_scales, dequantize_blocks, num_scales, quantize_blocks, to_fp8

MX_BLOCK = 32
"""Elements of a row that share a scale in MXFP8."""


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Data and scales, with what must hold for every blocking.

    Attributes:
        data: float8_e4m3fn [m, n], rows next to each other in memory.
        scale: fp32 [ceil(m / block[0]), ceil(n / block[1])], any strides, on the device of ``data``.

    Raises:
        ConfigError: A dtype, shape, device or layout is another.
    """

    data: torch.Tensor
    scale: torch.Tensor

    # Rows and columns of data that share a scale.
    _block = (1, FP8_BLOCK)

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check(self.data.dtype == FP8_DTYPE, f"{name}.data.dtype", self.data.dtype, f"{FP8_DTYPE} is needed")
        _check(self.data.dim() == 2, f"{name}.data.shape", list(self.data.shape), "two dimensions are needed")
        strides = self.data.stride()
        _check(self.data.is_contiguous(), f"{name}.data.stride()", strides, "contiguous rows are needed")
        _check(self.scale.dtype == torch.float32, f"{name}.scale.dtype", self.scale.dtype, "float32 is needed")
        wanted = [-(-size // block) for size, block in zip(self.data.shape, self._block, strict=True)]
        _check(list(self.scale.shape) == wanted, f"{name}.scale.shape", list(self.scale.shape), f"{wanted} is needed")
        same = self.scale.device == self.data.device
        _check(same, f"{name}.scale.device", self.scale.device, f"the data is on {self.data.device}")

    @property
    def codes(self) -> torch.Tensor:
        """uint8 view of the data, as TransformerEngine holds FP8. Copies nothing."""
        return self.data.view(torch.uint8)

    def has_power_of_two_scales(self) -> bool:
        """Whether every scale is a power of two, or 0 as in rows that a dispatch padded with. Waits for the device."""
        mantissa, _ = torch.frexp(self.scale)
        return bool(((mantissa == 0.5) | (self.scale == 0)).all())

    def transposed_scale(self, multiple: int = 1) -> torch.Tensor:
        """Scales with the dimensions swapped, contiguous, the last one padded with zeros to ``multiple``.

        For rows that is [ceil(hidden / 128), rows]: with multiple 4, what TransformerEngine reads. A view where the
        scales lie like that already (received in low-latency mode, or made by :meth:`Fp8Rows.from_transposed`) and
        need no padding; else a copy of the scales, 3 % of the bytes of the data.
        """
        _check(multiple >= 1, "multiple", multiple, "at least 1 is needed", "use 1 for no padding")
        swapped = self.scale.t()
        padding = -swapped.shape[1] % multiple
        return torch.nn.functional.pad(swapped, (0, padding)).contiguous() if padding else swapped.contiguous()


@dataclass(frozen=True, eq=False)
class Fp8Rows(_Blocks):
    """Rows with one scale per row and 128 elements of hidden: the wire format.

    Attributes:
        data: float8_e4m3fn [rows, hidden], contiguous.
        scale: fp32 [rows, ceil(hidden / 128)], any strides; the last block may be short.
        grad_rows: [rows, hidden] in the training dtype, or None. It stands for the rows in autograd, where their
            gradient arrives, because autograd would round a gradient of ``data`` to FP8. Its values are never read.

    Raises:
        ConfigError: A dtype, shape, device or layout is another.
    """

    grad_rows: torch.Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grad_rows is not None:
            shape, wanted = list(self.grad_rows.shape), list(self.data.shape)
            _check(shape == wanted, "Fp8Rows.grad_rows.shape", shape, f"{wanted} is needed")

    @classmethod
    def from_dispatch(cls, out: DispatchOutput) -> Fp8Rows:
        """The rows that a dispatch received on the FP8 wire, where they lie. Copies nothing.

        Raises:
            ConfigError: They crossed the wire unquantised, or were dequantised since.
        """
        if out.scale is None:
            raise ConfigError.of(
                "out.scale", None, "FP8 rows carry scales", "set wire='fp8' and use EpBuffer.dispatch or dispatch_fp8"
            )
        return cls(out.x, out.scale, out.grad_rows)

    @classmethod
    def from_transposed(cls, data: torch.Tensor, scale: torch.Tensor) -> Fp8Rows:
        """From scales [ceil(hidden / 128), at least rows] as TransformerEngine keeps them. Copies nothing.

        Args:
            data: [rows, hidden] float8_e4m3fn, or uint8 with the same codes.
            scale: fp32; columns past the rows are padding.

        Raises:
            ConfigError: A dtype or shape is another.
        """
        _check(scale.dim() == 2, "scale.shape", list(scale.shape), "two dimensions are needed")
        data = data.view(FP8_DTYPE) if data.dtype == torch.uint8 else data
        return cls(data, scale[:, : data.shape[0]].t())

    def split(self, tokens_per_expert: Sequence[int]) -> list[Fp8Rows]:
        """The rows of each local expert, as views; rows past the last expert's are in none. Copies nothing.

        Raises:
            ConfigError: A count is negative, or there are fewer rows than the counts add up to.
        """
        check_counts(tokens_per_expert, self.data.shape[0])
        parts = (split_rows(values, tokens_per_expert) for values in (self.data, self.scale))
        return [Fp8Rows(data, scale) for data, scale in zip(*parts, strict=True)]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """[rows, hidden] of ``dtype``: multiplied in fp32, then rounded."""
        return dequantize_blocks(self.data, self.scale, dtype)

    def mx_scale(self) -> torch.Tensor:
        """Return the scales as MXFP8 has them, without a change of the data: e8m0, one for each 32 elements.

        Returns:
            uint8 [rows rounded up to 128, ceil(hidden / 32) rounded up to 4], contiguous: the exponent plus 127; 0, the
            least there is, in padding and for scales of 0, whose data are zeros. TransformerEngine's order before it
            swizzles scales for a GEMM.

        Raises:
            ConfigError: A scale is no power of two: set ``power_of_two_scales`` on the sender. Waits for the device.
        """
        remedy = "set EpConfig(power_of_two_scales=True) on every rank"
        _check(self.has_power_of_two_scales(), "scale", "not all powers of two", "MXFP8 keeps exponents alone", remedy)
        rows, hidden = self.data.shape
        _, exponent = torch.frexp(self.scale)
        codes = torch.where(self.scale > 0, exponent + 126, 0).to(torch.uint8)
        codes = codes.repeat_interleave(FP8_BLOCK // MX_BLOCK, dim=1)[:, : -(-hidden // MX_BLOCK)]
        padding = (0, -codes.shape[1] % 4, 0, -rows % 128)
        return torch.nn.functional.pad(codes, padding).contiguous()

    def columns(self, *, power_of_two: bool = False) -> Fp8Cols:
        """Quantise again, in blocks of 128 rows: the input of a weight gradient.

        Blocks start at the first row, so take one expert's rows at a time (:meth:`split`). Values that dequantise
        to more than fp32 holds count as its largest; NaN stays NaN.
        """
        top = torch.finfo(torch.float32).max
        return quantize_columns(self.dequantize(torch.float32).clamp(-top, top), power_of_two=power_of_two)

    def to_transformer_engine(
        self, columns: Fp8Cols | None = None, *, dtype: torch.dtype = torch.bfloat16, power_of_two_scales: bool = True
    ) -> Any:
        """The rows as TransformerEngine's ``Float8BlockwiseQTensor``, in blocks of 1 x 128. Copies no data.

        Scales are copied unless they lie as :meth:`transposed_scale` says. For a grouped GEMM take one expert's rows at
        a time (:meth:`split`).

        Args:
            columns: The same rows quantised by column (:meth:`columns`), for a weight gradient.
            dtype: What the tensor presents itself as.
            power_of_two_scales: Whether the scales are powers of two, which some GPUs need.

        Raises:
            BackendUnavailable: TransformerEngine can't be loaded.
            ConfigError: ``columns`` has another shape than the rows.
        """
        from . import _te  # It imports this module.

        return _te.rows_to_te(self, columns, dtype=dtype, power_of_two_scales=power_of_two_scales)


@dataclass(frozen=True, eq=False)
class Fp8Cols(_Blocks):
    """Rows quantised down the columns and kept transposed, as a weight-gradient GEMM reads them.

    Attributes:
        data: float8_e4m3fn [hidden, rows], contiguous.
        scale: fp32 [hidden, ceil(rows / 128)], any strides; :meth:`transposed_scale` is TransformerEngine's order.
    """

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """[rows, hidden] of ``dtype`` (a transposed view): multiplied in fp32, then rounded."""
        return dequantize_blocks(self.data, self.scale, dtype).t()


@dataclass(frozen=True, eq=False)
class Fp8Tiles(_Blocks):
    """A weight matrix with one scale per 128 x 128 elements.

    Attributes:
        data: float8_e4m3fn [out_features, in_features], contiguous.
        scale: fp32 [ceil(out_features / 128), ceil(in_features / 128)]; blocks at the edges may be smaller.
    """

    _block = (FP8_BLOCK, FP8_BLOCK)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """[out_features, in_features] of ``dtype``: multiplied in fp32, then rounded."""
        by_row = self.scale.repeat_interleave(FP8_BLOCK, dim=0)[: self.data.shape[0]]
        return dequantize_blocks(self.data, by_row, dtype)

    def to_transformer_engine(self, *, dtype: torch.dtype = torch.bfloat16, power_of_two_scales: bool = True) -> Any:
        """The weight as TransformerEngine's ``Float8BlockwiseQTensor``, in blocks of 128 x 128. Copies scales, no data.

        Args:
            dtype: What the tensor presents itself as.
            power_of_two_scales: Whether the scales are powers of two, which some GPUs need.

        Raises:
            BackendUnavailable: TransformerEngine can't be loaded.
        """
        from . import _te  # It imports this module.

        return _te.tiles_to_te(self, dtype=dtype, power_of_two_scales=power_of_two_scales)


def quantize_rows(x: torch.Tensor, *, power_of_two: bool = False) -> Fp8Rows:
    """Quantise [rows, hidden] fp32, bf16 or fp16 as the wire does; ``x`` is the result's ``grad_rows``.

    Raises:
        ConfigError: ``x`` has another dtype or number of dimensions.
    """
    _check_values(x)
    return Fp8Rows(*quantize_blocks(x.detach(), power_of_two), grad_rows=x)


def quantize_columns(x: torch.Tensor, *, power_of_two: bool = False) -> Fp8Cols:
    """Quantise [rows, hidden] fp32, bf16 or fp16 in blocks of 128 rows.

    Raises:
        ConfigError: ``x`` has another dtype or number of dimensions.
    """
    _check_values(x)
    return Fp8Cols(*quantize_blocks(x.detach().t(), power_of_two))


def quantize_tiles(weight: torch.Tensor, *, power_of_two: bool = False) -> Fp8Tiles:
    """Quantise [out_features, in_features] fp32, bf16 or fp16 in tiles of 128 x 128.

    Raises:
        ConfigError: ``weight`` has another dtype or number of dimensions.
    """
    _check_values(weight, "weight")
    height, width = weight.shape
    tiles = num_scales(height), num_scales(width)
    padded = torch.zeros(tiles[0] * FP8_BLOCK, tiles[1] * FP8_BLOCK, dtype=torch.float32, device=weight.device)
    padded[:height, :width] = weight.detach()
    blocks = padded.view(tiles[0], FP8_BLOCK, tiles[1], FP8_BLOCK)
    scale = block_scales(blocks, (1, 3), power_of_two)
    data = to_fp8(blocks, scale[:, None, :, None]).view(padded.shape)[:height, :width]
    return Fp8Tiles(data.contiguous(), scale)


def stand_in(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what stands for FP8 ``rows`` in autograd, which would round their gradient to FP8.

    NaN of their shape in ``dtype``, one element of memory: whoever computes with it sees that.
    """
    return rows.new_full((1, 1), torch.nan, dtype=dtype).expand(rows.shape)


def split_rows(x: torch.Tensor, tokens_per_expert: Sequence[int]) -> Sequence[torch.Tensor]:
    """Return views of each expert's rows, without those past the counts."""
    parts: Sequence[torch.Tensor] = x[: sum(tokens_per_expert)].split(list(tokens_per_expert))
    return parts


def check_counts(tokens_per_expert: Sequence[int], num_rows: int) -> None:
    """Raise ConfigError unless the counts are of rows that are there."""
    counts = list(tokens_per_expert)
    _check(all(count >= 0 for count in counts), "tokens_per_expert", counts, "no count may be negative")
    remedy = "pass the counts of the dispatch that the rows came from"
    _check(sum(counts) <= num_rows, "tokens_per_expert", counts, f"there are {num_rows} rows", remedy)


def _check_values(x: torch.Tensor, name: str = "x") -> None:
    wide = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    _check(wide, f"{name}.dtype", x.dtype, "float32, bfloat16 or float16 is needed", f"cast {name}")
    _check(x.dim() == 2, f"{name}.shape", list(x.shape), "two dimensions are needed", f"reshape {name}")


def _check(ok: bool, argument: str, value: object, limit: str, remedy: str = "pass what the format says") -> None:
    if not ok:
        raise ConfigError.of(argument, value, limit, remedy)
