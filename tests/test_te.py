"""What is handed to TransformerEngine: shapes, and no copy of the data. Stand-ins take its place; it is not run."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moe_ep_plugin import BackendUnavailable, ConfigError
from moe_ep_plugin._te import load
from moe_ep_plugin.fp8 import Fp8Rows, quantize_rows, quantize_tiles

BLOCKWISE = "transformer_engine.pytorch.tensor.float8_blockwise_tensor"


def quantizer(fp8_dtype, *, rowwise, columnwise, amax_epsilon=0.0, force_pow_2_scales=True, block_scaling_dim=2):
    return SimpleNamespace(**locals())


def tensor(
    *,
    shape,
    dtype,
    fp8_dtype,
    rowwise_data,
    rowwise_scale_inv,
    columnwise_data,
    columnwise_scale_inv,
    quantizer,
    is_2D_scaled,
    requires_grad=False,
):
    return SimpleNamespace(**locals())


@pytest.fixture(autouse=True)
def nothing_loaded():
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.fixture
def te(monkeypatch):
    """The keywords of both constructors, in modules of the names that TransformerEngine has."""
    extension = ModuleType("transformer_engine_torch")
    extension.DType = SimpleNamespace(kFloat8E4M3="e4m3")
    blockwise = ModuleType(BLOCKWISE)
    blockwise.Float8BlockwiseQTensor, blockwise.Float8BlockQuantizer = tensor, quantizer
    blockwise.Float8BlockwiseQTensorStorage = extension.split_quantize = None
    gemm = ModuleType("transformer_engine.pytorch.cpp_extensions")
    gemm.general_grouped_gemm = None
    monkeypatch.setitem(sys.modules, gemm.__name__, gemm)
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.tensor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, BLOCKWISE, blockwise)
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", extension)


def test_without_transformer_engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    rows = quantize_rows(torch.ones(4, 128))
    for call in (
        rows.to_transformer_engine,
        quantize_tiles(torch.ones(4, 128)).to_transformer_engine,
    ):
        with pytest.raises(BackendUnavailable, match=r"install transformer-engine.*engine='torch'"):
            call()


@pytest.mark.parametrize("num_rows", [0, 3, 8, 130])
def test_rows_and_columns(te, num_rows):
    rows = quantize_rows(torch.randn(num_rows, 264), power_of_two=True)
    columns = rows.columns(power_of_two=True)
    got = rows.to_transformer_engine(columns)
    assert got.rowwise_data.dtype == got.columnwise_data.dtype == torch.uint8
    assert got.rowwise_data.data_ptr() == rows.data.data_ptr()
    assert got.columnwise_data.data_ptr() == columns.data.data_ptr()
    assert (got.shape, got.columnwise_data.shape) == ((num_rows, 264), (264, num_rows))
    # Rows: [blocks of hidden, rows rounded up to 4]. Columns: [blocks of rows, hidden rounded up to 4].
    assert got.rowwise_scale_inv.shape == (3, {0: 0, 3: 4, 8: 8, 130: 132}[num_rows])
    assert got.columnwise_scale_inv.shape == ({0: 0, 3: 1, 8: 1, 130: 2}[num_rows], 264)
    assert got.rowwise_scale_inv.is_contiguous() and got.columnwise_scale_inv.is_contiguous()
    assert torch.equal(got.rowwise_scale_inv[:, :num_rows], rows.scale.t())
    assert torch.equal(got.columnwise_scale_inv, columns.scale.t())
    assert (got.is_2D_scaled, got.quantizer.block_scaling_dim, got.quantizer.columnwise) == (False, 1, True)
    assert got.dtype == torch.bfloat16


def test_scales_in_its_order_are_not_copied(te):
    scale = torch.ones(2, 8)
    rows = Fp8Rows.from_transposed(torch.zeros(8, 256, dtype=torch.uint8), scale)
    got = rows.to_transformer_engine(power_of_two_scales=False)
    assert got.rowwise_scale_inv.data_ptr() == scale.data_ptr()
    assert got.columnwise_data is None
    assert got.columnwise_scale_inv is None
    assert not got.quantizer.force_pow_2_scales


def test_tiles(te):
    tiles = quantize_tiles(torch.randn(300, 264), power_of_two=True)
    got = tiles.to_transformer_engine(dtype=torch.float16)
    assert got.rowwise_data.data_ptr() == tiles.data.data_ptr()
    assert got.rowwise_scale_inv.shape == (3, 4)
    assert torch.equal(got.rowwise_scale_inv[:, :3], tiles.scale)
    assert (got.is_2D_scaled, got.quantizer.block_scaling_dim, got.dtype) == (True, 2, torch.float16)


def test_columns_of_other_rows(te):
    rows = quantize_rows(torch.ones(4, 128))
    with pytest.raises(ConfigError, match=r"columns.data.shape is \[128, 5\]"):
        rows.to_transformer_engine(quantize_rows(torch.ones(5, 128)).columns())
