"""TransformerEngine's quantised tensor from the FP8 exchange format. Not yet run with TransformerEngine.

Written against the constructors of ``Float8BlockwiseQTensor`` and ``Float8BlockQuantizer``; tests check the shapes and
that no data is copied, with stand-ins for both. Nothing else of the package imports TransformerEngine.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch

from .errors import BackendUnavailable, ConfigError
from .fp8 import Fp8Cols, Fp8Rows, Fp8Tiles

# The inner dimension of a scale tensor is a multiple of this.
_SCALE_MULTIPLE = 4


class _Names(NamedTuple):
    tensor: Any
    quantizer: Any
    e4m3: Any


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
        return _Names(blockwise.Float8BlockwiseQTensor, blockwise.Float8BlockQuantizer, extension.DType.kFloat8E4M3)
    except (ImportError, OSError, AttributeError) as error:
        raise BackendUnavailable(
            f"TransformerEngine with block scaling can't be loaded ({error}); install transformer-engine[pytorch] 2.9 "
            "or later on a machine with a GPU, or use Fp8GroupedExperts, which needs none of it"
        ) from error


def rows_to_te(
    rows: Fp8Rows, columns: Fp8Cols | None = None, *, dtype: torch.dtype, power_of_two_scales: bool = True
) -> Any:
    """Return one expert's rows as a ``Float8BlockwiseQTensor`` in blocks of 1 x 128. Copies no data.

    Scales are copied unless they lie as TransformerEngine reads them, see ``transposed_scale``.

    Args:
        rows: [rows, hidden].
        columns: The same rows quantised by column (:meth:`Fp8Rows.columns`), for a weight gradient.
        dtype: What the tensor presents itself as.
        power_of_two_scales: Whether the scales are powers of two, which some GPUs need.

    Raises:
        BackendUnavailable: TransformerEngine can't be loaded.
        ConfigError: ``columns`` has another shape than ``rows``.
    """
    te = load()
    if columns is not None and columns.data.shape != rows.data.shape[::-1]:
        limit = f"rows.data.shape is {list(rows.data.shape)}"
        raise ConfigError.of("columns.data.shape", list(columns.data.shape), limit, "pass rows.columns()")
    quantizer = te.quantizer(
        te.e4m3,
        rowwise=True,
        columnwise=columns is not None,
        force_pow_2_scales=power_of_two_scales,
        block_scaling_dim=1,
    )
    return te.tensor(
        shape=rows.data.shape,
        dtype=dtype,
        fp8_dtype=te.e4m3,
        rowwise_data=rows.codes,
        rowwise_scale_inv=rows.transposed_scale(_SCALE_MULTIPLE),
        columnwise_data=None if columns is None else columns.codes,
        columnwise_scale_inv=None if columns is None else columns.transposed_scale(_SCALE_MULTIPLE),
        quantizer=quantizer,
        is_2D_scaled=False,
    )


def tiles_to_te(tiles: Fp8Tiles, *, dtype: torch.dtype, power_of_two_scales: bool = True) -> Any:
    """Return a weight as a ``Float8BlockwiseQTensor`` in blocks of 128 x 128. Copies no data, but may copy scales.

    Args:
        tiles: [out_features, in_features].
        dtype: What the tensor presents itself as.
        power_of_two_scales: Whether the scales are powers of two, which some GPUs need.

    Raises:
        BackendUnavailable: TransformerEngine can't be loaded.
    """
    te = load()
    padding = -tiles.scale.shape[1] % _SCALE_MULTIPLE
    quantizer = te.quantizer(
        te.e4m3, rowwise=True, columnwise=False, force_pow_2_scales=power_of_two_scales, block_scaling_dim=2
    )
    return te.tensor(
        shape=tiles.data.shape,
        dtype=dtype,
        fp8_dtype=te.e4m3,
        rowwise_data=tiles.codes,
        # Here the order is that of the data.
        rowwise_scale_inv=torch.nn.functional.pad(tiles.scale, (0, padding)).contiguous(),
        columnwise_data=None,
        columnwise_scale_inv=None,
        quantizer=quantizer,
        is_2D_scaled=True,
    )
