"""The grouped linear layer of :mod:`moe_ep_plugin.fp8_experts` on TransformerEngine's FP8 GEMMs.

Dispatched rows enter the forward GEMM as they arrived: their codes are not copied, only their scales are put in the
order that the GEMM reads. What the weight gradient needs, the rows quantised by column, one kernel makes from what
arrived: when that gradient is computed, so that a forward does not wait for it, or in forward (``Fp8Recipe.keep``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from . import _te, fp8_kernels
from .errors import ConfigError
from .fp8 import Fp8Rows, split_rows

if TYPE_CHECKING:
    from .fp8_experts import Fp8GroupedLinear


def check(rows: torch.Tensor, counts: Sequence[int], layer: Fp8GroupedLinear) -> None:
    """Raise ConfigError unless TransformerEngine's FP8 GEMMs take these shapes."""
    for name, size in (("in_features", layer.in_features), ("out_features", layer.out_features)):
        if size % 128:
            limit = "TransformerEngine's block-scaled GEMM needs multiples of 128"
            raise ConfigError.of(name, size, limit, "use such a size, or Fp8Recipe(engine='torch')")
    uneven = [count for count in counts if count % _te.ROW_MULTIPLE]
    if uneven:
        limit = f"TransformerEngine's FP8 GEMM needs multiples of {_te.ROW_MULTIPLE} rows"
        remedy = f"set EpConfig(expert_alignment={_te.ROW_MULTIPLE})"
        raise ConfigError.of("tokens_per_expert", list(counts), limit, remedy)
    if layer.weight(0).dtype not in (torch.bfloat16, torch.float16):
        limit = "TransformerEngine's grouped GEMM gives bfloat16 or float16"
        raise ConfigError.of("dtype", layer.weight(0).dtype, limit, "use one, or Fp8Recipe(engine='torch')")
    if rows.device != layer.weight(0).device:
        raise ConfigError.of("rows.device", rows.device, f"weights are on {layer.weight(0).device}", "move one of them")


@dataclass
class QuantizedWeights:
    """Weights as the GEMMs take them, made at a step's first use and kept where the layer is told to.

    Attributes:
        operands: One of each expert.
        columnwise: Whether the input's gradient can be computed from them.
    """

    operands: list[Any]
    columnwise: bool


def quantize_weights(layer: Fp8GroupedLinear, weights: Sequence[torch.Tensor], columnwise: bool) -> QuantizedWeights:
    """Quantise all weights, or return those that the layer has kept; see ``weights_changed``."""
    kept: QuantizedWeights | None = layer.kept_weights
    if layer.weights_changed is False and kept is not None and (kept.columnwise or not columnwise):
        return kept
    recipe = layer.recipe
    by = _te.quantizer(
        2 if recipe.weight_block == "128x128" else 1,
        rowwise=True,
        columnwise=columnwise,
        power_of_two_scales=recipe.power_of_two_scales,
    )
    by.internal = True
    made = QuantizedWeights([by(_aligned(weight.detach())) for weight in weights], columnwise)
    if layer.weights_changed is None:
        layer.kept_weights = None
    else:
        layer.kept_weights, layer.weights_changed = made, False
    return made


def _aligned(weight: torch.Tensor) -> torch.Tensor:
    """Where TransformerEngine's kernels can read it; a view of a flat buffer of parameters may begin anywhere."""
    if weight.is_contiguous() and weight.data_ptr() % 16 == 0:
        return weight
    return weight.clone(memory_format=torch.contiguous_format)


@dataclass
class _Fp8WeightGrad:
    """Weight gradients from operands in FP8; received rows are quantised by column here."""

    inputs: Fp8Rows | list[Any]
    grads: list[Any]
    counts: Sequence[int]

    def compute(self, layer: Fp8GroupedLinear) -> Iterator[torch.Tensor]:
        """Gradients of the experts in order; zero without rows."""
        weight = layer.weight(0)
        out = torch.empty(layer.num_gemms, *weight.shape, dtype=weight.dtype, device=weight.device)
        parts = list(out.unbind())
        for part, count in zip(parts, self.counts, strict=True):
            if count == 0:
                part.zero_()
        if sum(self.counts):
            inputs = self.inputs
            if isinstance(inputs, Fp8Rows):
                inputs = _by_columns(inputs, self.counts, layer)
            _te.grouped_gemm(inputs, self.grads, parts, "NT", self.counts, grad=True)
        yield from parts


@dataclass
class _WideWeightGrad:
    """Weight gradients from unquantised output gradients and dequantised rows, in the training dtype."""

    rows: Fp8Rows | torch.Tensor
    grad: torch.Tensor
    counts: Sequence[int]

    def compute(self, layer: Fp8GroupedLinear) -> Iterator[torch.Tensor]:
        """Gradients of the experts in order; zero without rows."""
        dtype = self.grad.dtype
        if isinstance(self.rows, Fp8Rows):
            # One expert's at a time: they are twice as large then.
            inputs: Iterable[torch.Tensor] = (part.dequantize(dtype) for part in self.rows.split(self.counts))
        else:
            inputs = split_rows(self.rows, self.counts)
        for dy, x in zip(split_rows(self.grad, self.counts), inputs, strict=True):
            yield dy.t() @ x


class GroupedLinear(torch.autograd.Function):
    """y[rows of e] = x[rows of e] @ weight[e]^T; quantisation passes gradients unchanged.

    ``x`` are dispatched rows, whose gradient goes to their stand-in, or unquantised rows, which are quantised here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        grad_rows: torch.Tensor | None,
        rows: Fp8Rows | torch.Tensor,
        counts: Sequence[int],
        layer: Fp8GroupedLinear,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        """Returns [rows, out_features] in the weights' dtype; zero in rows past the counts."""
        recipe, total, dtype = layer.recipe, sum(counts), weights[0].dtype
        needs_input, needs_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:])
        # Unquantised rows: by row and by column in one kernel, after which they are not kept.
        makes_columns = recipe.keep == "columns" or not isinstance(rows, Fp8Rows)
        by_columns = needs_weights and recipe.gradients == "fp8" and makes_columns
        num_rows = len(rows.data if isinstance(rows, Fp8Rows) else rows)
        out = torch.empty(num_rows, layer.out_features, dtype=dtype, device=weights[0].device)
        out[total:].zero_()
        quantized = quantize_weights(layer, weights, needs_input and recipe.gradients == "fp8")
        inputs = _by_rows(rows, counts, layer, by_columns) if total else []
        if total:
            _te.grouped_gemm(quantized.operands, inputs, [out[:total]], "TN", counts, grad=False)
        ctx.layer, ctx.counts, ctx.num_rows = layer, counts, num_rows
        if by_columns:
            for operand in inputs:
                operand.update_usage(rowwise_usage=False, columnwise_usage=True)
        # Saved as tensors, so that autograd lets go of them after a backward, and activation checkpointing at once.
        ctx.weights, of_weights = _te.take_apart(quantized.operands if needs_input else [])
        ctx.inputs, of_inputs = _te.take_apart(inputs if by_columns else [])
        received: list[torch.Tensor] = []
        if needs_weights and not by_columns:
            received = [rows.data, rows.scale] if isinstance(rows, Fp8Rows) else [rows]
        ctx.save_for_backward(*of_weights, *of_inputs, *received)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Returns the rows' gradient, and those of the weights unless they are delayed."""
        layer: Fp8GroupedLinear = ctx.layer
        recipe, counts, total = layer.recipe, ctx.counts, sum(ctx.counts)
        # Read once: under activation checkpointing every read would recompute.
        saved = iter(ctx.saved_tensors)
        weights = _te.put_together(ctx.weights, saved)
        inputs = _te.put_together(ctx.inputs, saved)
        received = list(saved)
        needs_input, needed = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        dy = grad[:total].contiguous()
        in_fp8 = recipe.gradients == "fp8"
        parts: list[Any] = []
        if in_fp8 and total:
            by = _te.quantizer(
                1, rowwise=needs_input, columnwise=any(needed), power_of_two_scales=recipe.power_of_two_scales
            )
            parts = _te.split_quantize(dy, counts, by)
        grad_rows = None
        if needs_input:
            grad_rows = torch.empty(ctx.num_rows, layer.in_features, dtype=grad.dtype, device=grad.device)
            grad_rows[total:].zero_()
            if in_fp8 and total:
                _te.grouped_gemm(weights, parts, [grad_rows[:total]], "NN", counts, grad=True)
            elif total:
                for dx, part, weight in zip(
                    split_rows(grad_rows, counts), split_rows(dy, counts), weights, strict=True
                ):
                    torch.mm(part, weight.dequantize(dtype=grad.dtype), out=dx)
        grads: list[torch.Tensor | None] = [None] * layer.num_gemms
        if any(needed):
            work: _Fp8WeightGrad | _WideWeightGrad
            rows = Fp8Rows(*received) if len(received) > 1 else None
            if in_fp8:
                work = _Fp8WeightGrad(inputs if rows is None else rows, parts, counts)
            else:
                work = _WideWeightGrad(received[0] if rows is None else rows, dy, counts)
            if recipe.delay_weight_grad:
                layer.delayed.append(work)
            else:
                grads = [g if need else None for g, need in zip(work.compute(layer), needed, strict=True)]
        return grad_rows, None, None, None, *grads


def _by_rows(
    rows: Fp8Rows | torch.Tensor, counts: Sequence[int], layer: Fp8GroupedLinear, columnwise: bool
) -> list[Any]:
    """What a forward GEMM takes for the rows of each expert; quantised by column too, if asked."""
    dtype, by = layer.weight(0).dtype, _input_quantizer(layer, columnwise=columnwise)
    if not isinstance(rows, Fp8Rows):
        return _te.split_quantize(rows[: sum(counts)].detach().contiguous(), counts, by)
    columns: Sequence[Any] = [None] * len(counts)
    if columnwise:
        columns = fp8_kernels.columns(rows, counts, power_of_two=layer.recipe.power_of_two_scales)
    codes = split_rows(rows.codes, counts)
    scales = fp8_kernels.transposed_scales(rows, counts)
    return [
        _te.operand(rows=(code, scale), columns=column, dtype=dtype, made_by=by)
        for code, scale, column in zip(codes, scales, columns, strict=True)
    ]


def _by_columns(rows: Fp8Rows, counts: Sequence[int], layer: Fp8GroupedLinear) -> list[Any]:
    """What the GEMM of a weight gradient takes for the received rows of each expert."""
    dtype, by = layer.weight(0).dtype, _input_quantizer(layer, columnwise=True)
    columns = fp8_kernels.columns(rows, counts, power_of_two=layer.recipe.power_of_two_scales)
    return [_te.operand(rows=None, columns=each, dtype=dtype, made_by=by) for each in columns]


def _input_quantizer(layer: Fp8GroupedLinear, *, columnwise: bool) -> Any:
    power_of_two = layer.recipe.power_of_two_scales
    return _te.quantizer(1, rowwise=True, columnwise=columnwise, power_of_two_scales=power_of_two)
