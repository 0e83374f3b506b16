"""What is used of TransformerEngine: its quantised tensors made from the FP8 exchange format, and its grouped GEMM.

Written for and run with TransformerEngine 2.20. Nothing else of the package imports it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .errors import BackendUnavailable, ConfigError
from .fp8 import Fp8Cols, Fp8Rows, Fp8Tiles

# The inner dimension of a scale tensor is a multiple of this.
_SCALE_MULTIPLE = 4
ROW_MULTIPLE = 16
"""FP8 GEMMs take so many rows of an expert, or a multiple: rows are the inner dimension of a weight gradient."""


class _Names(NamedTuple):
    tensor: Any
    storage: Any
    quantizer: Any
    e4m3: Any
    split_quantize: Any
    grouped_gemm: Any


@functools.cache
def load() -> _Names:
    """Import what is used of TransformerEngine.

    Raises:
        BackendUnavailable: It is not there, can't be loaded, or lacks block scaling; says what to do.
    """
    try:
        # In this order: the package loads the libraries that its extension needs.
        importlib.import_module("transformer_engine.pytorch")
        blockwise = importlib.import_module("transformer_engine.pytorch.tensor.float8_blockwise_tensor")
        extension = importlib.import_module("transformer_engine_torch")
        gemm = importlib.import_module("transformer_engine.pytorch.cpp_extensions")
        return _Names(
            tensor=blockwise.Float8BlockwiseQTensor,
            storage=blockwise.Float8BlockwiseQTensorStorage,
            quantizer=blockwise.Float8BlockQuantizer,
            e4m3=extension.DType.kFloat8E4M3,
            split_quantize=extension.split_quantize,
            grouped_gemm=gemm.general_grouped_gemm,
        )
    except (ImportError, OSError, AttributeError) as error:
        raise BackendUnavailable(
            f"TransformerEngine with block scaling can't be loaded ({error}); install transformer-engine[pytorch] 2.20 "
            "or later on a machine with a GPU, or use Fp8Recipe(engine='torch'), which needs none of it"
        ) from error


@functools.cache
def why_not() -> str | None:
    """The reason why TransformerEngine can't be used, or None. Looked for once: layers ask in every forward."""
    try:
        load()
    except BackendUnavailable as error:
        return str(error)
    return None


def rows_to_te(
    rows: Fp8Rows, columns: Fp8Cols | None = None, *, dtype: torch.dtype, power_of_two_scales: bool = True
) -> Any:
    """See :meth:`Fp8Rows.to_transformer_engine`."""
    te = load()
    if columns is not None and columns.data.shape != rows.data.shape[::-1]:
        limit = f"rows.data.shape is {list(rows.data.shape)}"
        raise ConfigError.of("columns.data.shape", list(columns.data.shape), limit, "pass rows.columns()")
    return te.tensor(
        shape=rows.data.shape,
        dtype=dtype,
        fp8_dtype=te.e4m3,
        rowwise_data=rows.codes,
        rowwise_scale_inv=rows.transposed_scale(_SCALE_MULTIPLE),
        columnwise_data=None if columns is None else columns.codes,
        columnwise_scale_inv=None if columns is None else columns.transposed_scale(_SCALE_MULTIPLE),
        quantizer=quantizer(1, rowwise=True, columnwise=columns is not None, power_of_two_scales=power_of_two_scales),
        is_2D_scaled=False,
    )


def tiles_to_te(tiles: Fp8Tiles, *, dtype: torch.dtype, power_of_two_scales: bool = True) -> Any:
    """See :meth:`Fp8Tiles.to_transformer_engine`."""
    te = load()
    padding = -tiles.scale.shape[1] % _SCALE_MULTIPLE
    return te.tensor(
        shape=tiles.data.shape,
        dtype=dtype,
        fp8_dtype=te.e4m3,
        rowwise_data=tiles.codes,
        # Here the order is that of the data.
        rowwise_scale_inv=torch.nn.functional.pad(tiles.scale, (0, padding)).contiguous(),
        columnwise_data=None,
        columnwise_scale_inv=None,
        quantizer=quantizer(2, rowwise=True, columnwise=False, power_of_two_scales=power_of_two_scales),
        is_2D_scaled=True,
    )


def quantizer(block_dims: int, *, rowwise: bool, columnwise: bool, power_of_two_scales: bool) -> Any:
    """Return a ``Float8BlockQuantizer`` to e4m3 in blocks of 1 x 128 (``block_dims`` 1) or 128 x 128 (2).

    It is called with the matrix.
    """
    te = load()
    return te.quantizer(
        te.e4m3,
        rowwise=rowwise,
        columnwise=columnwise,
        force_pow_2_scales=power_of_two_scales,
        block_scaling_dim=block_dims,
    )


def operand(
    *,
    rows: tuple[torch.Tensor, torch.Tensor] | None,
    columns: tuple[torch.Tensor, torch.Tensor] | None,
    dtype: torch.dtype,
    made_by: Any,
) -> Any:
    """Return what a GEMM takes for one expert's rows. Copies nothing.

    Args:
        rows: For products with the rows, uint8 codes [rows, hidden], and fp32 scales [ceil(hidden / 128), rows rounded
            up to 4].
        columns: For a weight gradient, uint8 codes [hidden, rows], and fp32 scales [ceil(rows / 128), hidden rounded up
            to 4].
        dtype: What the tensor presents itself as.
        made_by: The quantizer that stands for both.
    """
    te = load()
    return te.storage(*(rows or (None, None)), *(columns or (None, None)), te.e4m3, made_by, False, fake_dtype=dtype)


_TENSORS = ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")


def take_apart(operands: Sequence[Any]) -> tuple[list[dict[str, Any]], list[torch.Tensor | None]]:
    """Return what operands are made of but tensors, and their tensors, which autograd can save.

    See :func:`put_together`. The operands stay as they are: others may use them.
    """
    frames = [dict(operand.get_metadata()) for operand in operands]
    return frames, [frame.pop(name) for frame in frames for name in _TENSORS]


def put_together(frames: Sequence[dict[str, Any]], tensors: Iterator[torch.Tensor | None]) -> list[Any]:
    """Return the operands that :func:`take_apart` took apart, of the next of the tensors."""
    te = load()
    return [te.storage(**{name: next(tensors) for name in _TENSORS}, **frame) for frame in frames]


def split_quantize(x: torch.Tensor, counts: Sequence[int], by: Any) -> list[Any]:
    """Quantise each expert's rows of [sum(counts), n] by a :func:`quantizer`, with one kernel or a few."""
    quantizers = [by.copy() for _ in counts]
    for each in quantizers:
        # Plain storage, not a tensor subclass: it goes straight into a GEMM.
        each.internal = True
    return list(load().split_quantize(x, list(counts), quantizers))


def grouped_gemm(
    a: Sequence[Any], b: Sequence[Any], out: list[torch.Tensor], layout: str, counts: Sequence[int], *, grad: bool
) -> None:
    """One GEMM for each expert, products summed in fp32; see TransformerEngine's ``general_grouped_gemm``.

    Args:
        a: Weights; for a weight gradient the input rows.
        b: Input rows; in backward the output gradients.
        out: One tensor for the rows of all experts, or, for weight gradients, one of each expert.
        layout: ``"TN"`` forward, ``"NN"`` input gradient, ``"NT"`` weight gradient.
        counts: Rows of each expert.
        grad: Whether this belongs to backward.
    """
    load().grouped_gemm(
        list(a),
        list(b),
        out,
        [None] * len(a),
        out[0].dtype,
        layout=layout,
        m_splits=list(counts),
        grad=grad,
        use_split_accumulator=True,
        single_output=layout != "NT",
    )
