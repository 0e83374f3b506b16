"""Experts that compute on FP8 rows as they were dispatched.

On GPUs with TransformerEngine its FP8 GEMMs do the work (:mod:`moe_ep_plugin.fp8_te`). Elsewhere the arithmetic of an
FP8 grouped GEMM is emulated in plain PyTorch: operands are FP8 blocks, products are summed in fp32, results are rounded
once to the training dtype. That runs on any device that torch has, at the speed of fp32 matrix products; it is there to
try, test and debug FP8 training, and as the reference for kernels.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from . import _te, fp8_te
from .errors import ConfigError, StateError
from .fp8 import Fp8Rows, Fp8Tiles, check_counts, quantize_columns, quantize_rows, quantize_tiles, split_rows

WeightBlock = Literal["128x128", "1x128"]
Gradients = Literal["training", "fp8"]
Keep = Literal["rows", "columns"]
Engine = Literal["auto", "te", "torch"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """How a grouped linear layer quantises. The defaults are those of block scaling in TransformerEngine.

    Attributes:
        power_of_two_scales: Scales of what is quantised here are rounded up to powers of two. Dispatched rows keep
            the scales that they came with, see ``EpConfig.power_of_two_scales``.
        weight_block: ``"128x128"``: a scale per tile. ``"1x128"``: a scale per output feature and 128 inputs.
        gradients: ``"training"``: output gradients enter the backward GEMMs unquantised, and the input as it was in
            forward. ``"fp8"``: output gradients are quantised (e4m3), by row for the input's gradient and by column
            for the weights', where the input is quantised again by column.
        delay_weight_grad: Weight gradients are left to ``backward_dw()``; until then the layers keep the received
            rows, which must not be changed, and the output gradients.
        engine: ``"te"``: TransformerEngine's GEMMs, on GPUs. ``"torch"``: emulated. ``"auto"``: the former for rows on
            a GPU where TransformerEngine is installed, unless weights are fp32; else the latter, which is logged once.
        keep: What is kept of dispatched rows for weight gradients with ``gradients="fp8"`` on TransformerEngine.
            ``"rows"``: the rows as they came, from which a backward makes columns; they stay in leased memory, as
            unquantised ones of other experts do, and must not be changed until then. ``"columns"``: those, made in
            forward, after which the lease goes back: for models with more layers in flight than ``pool_bytes`` has
            room for. The same bits.
    """

    power_of_two_scales: bool = True
    weight_block: WeightBlock = "128x128"
    gradients: Gradients = "training"
    delay_weight_grad: bool = False
    engine: Engine = "auto"
    keep: Keep = "rows"

    def __post_init__(self) -> None:
        for name, kind in (
            ("weight_block", WeightBlock),
            ("gradients", Gradients),
            ("engine", Engine),
            ("keep", Keep),
        ):
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                raise ConfigError.of(name, repr(value), f"it must be one of {known}", "choose one of these")


@dataclass(frozen=True)
class _WeightGrad:
    """What the weight gradients of one backward are computed from."""

    rows: Fp8Rows
    counts: Sequence[int]
    grad: torch.Tensor

    def compute(self, layer: Fp8GroupedLinear) -> Iterator[torch.Tensor]:
        """Gradients of the experts in order, [out_features, in_features] in the weights' dtype; zero without rows."""
        power_of_two = layer.recipe.power_of_two_scales
        grads = split_rows(self.grad, self.counts)
        for index, (part, grad) in enumerate(zip(self.rows.split(self.counts), grads, strict=True)):
            if layer.recipe.gradients == "fp8":
                x = part.columns(power_of_two=power_of_two).dequantize(torch.float32)
                dy = quantize_columns(grad, power_of_two=power_of_two).dequantize(torch.float32)
            else:
                x, dy = part.dequantize(torch.float32), grad.float()
            yield (dy.t() @ x).to(layer.weight(index).dtype)


class _GroupedLinear(torch.autograd.Function):
    """y[rows of e] = x[rows of e] @ weight[e]^T; quantisation passes gradients unchanged."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_rows: torch.Tensor | None,
        rows: Fp8Rows,
        counts: Sequence[int],
        layer: Fp8GroupedLinear,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        quantized = [layer.quantize(weight) for weight in weights]
        out = torch.zeros(len(rows.data), layer.out_features, dtype=weights[0].dtype, device=rows.data.device)
        for y, part, weight in zip(split_rows(out, counts), rows.split(counts), quantized, strict=True):
            y.copy_(part.dequantize(torch.float32) @ weight.dequantize(torch.float32).t())
        ctx.layer, ctx.counts = layer, counts
        ctx.save_for_backward(rows.data, rows.scale, *(w.data for w in quantized), *(w.scale for w in quantized))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        layer: Fp8GroupedLinear = ctx.layer
        # Read once: under activation checkpointing every read would recompute.
        data, scale, *saved = ctx.saved_tensors
        kind = Fp8Tiles if layer.recipe.weight_block == "128x128" else Fp8Rows
        weights = [kind(*pair) for pair in zip(saved[: layer.num_gemms], saved[layer.num_gemms :], strict=True)]
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.zeros(data.shape, dtype=grad.dtype, device=grad.device)
            for dx, dy, weight in zip(
                split_rows(grad_rows, ctx.counts), split_rows(grad, ctx.counts), weights, strict=True
            ):
                if layer.recipe.gradients == "fp8":
                    wide = quantize_rows(dy, power_of_two=layer.recipe.power_of_two_scales).dequantize(torch.float32)
                else:
                    wide = dy.float()
                dx.copy_(wide @ weight.dequantize(torch.float32))
        needed = ctx.needs_input_grad[4:]
        grads: list[torch.Tensor | None] = [None] * layer.num_gemms
        if any(needed):
            work = _WeightGrad(Fp8Rows(data, scale), ctx.counts, grad)
            if layer.recipe.delay_weight_grad:
                layer.delayed.append(work)
            else:
                grads = [g if need else None for g, need in zip(work.compute(layer), needed, strict=True)]
        return grad_rows, None, None, None, *grads


class Fp8GroupedLinear(nn.Module):
    """One linear layer per local expert, without bias, on rows grouped by expert.

    Parameters are ``weight0`` to ``weight{num_gemms - 1}``, [out_features, in_features], and the state dict has the
    empty ``_extra_state`` of a TransformerEngine ``GroupedLinear`` that keeps no FP8 state. Another one's state is left
    unread: block scales have no history.

    Attributes:
        weights_changed: None: weights are quantised in every forward. True: they are in the next one, and kept
            for those after it, until this is set to True again; set it after every change of a weight. It counts with
            TransformerEngine alone, and saves a pass over the weights in a step's micro-batches but the first.

    Args:
        num_gemms: Local experts, at least 1.
        in_features: Elements of an input row.
        out_features: Elements of an output row.
        recipe: How to quantise.
        init_method: Fills a weight in place. None: normal with standard deviation 0.02.
        dtype: Of the weights, the output and the gradients: fp32, bf16 or fp16.
        device: Of the weights.
    """

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        recipe: Fp8Recipe | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_gemms": num_gemms, "in_features": in_features, "out_features": out_features}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError.of(name, size, "it must be at least 1", f"set {name} >= 1")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError.of("dtype", dtype, "float32, bfloat16 or float16 is needed", "train in one of these")
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.recipe = recipe or Fp8Recipe()
        self.delayed: deque[Any] = deque()
        self.weights_changed: bool | None = None
        self.kept_weights: fp8_te.QuantizedWeights | None = None
        for index in range(num_gemms):
            weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
            with torch.no_grad():
                (init_method or _init_normal)(weight)
            self.register_parameter(f"weight{index}", weight)

    def weight(self, index: int) -> nn.Parameter:
        """Return the weight of local expert ``index``, [out_features, in_features]."""
        weight: nn.Parameter = getattr(self, f"weight{index}")
        return weight

    def quantize(self, weight: torch.Tensor) -> Fp8Tiles | Fp8Rows:
        """Quantise a weight as the recipe says."""
        quantize = quantize_tiles if self.recipe.weight_block == "128x128" else quantize_rows
        return quantize(weight, power_of_two=self.recipe.power_of_two_scales)

    def forward(self, rows: Fp8Rows | torch.Tensor, tokens_per_expert: Sequence[int]) -> torch.Tensor:
        """Multiply each expert's rows by its weight.

        Args:
            rows: [rows, in_features], grouped by local expert. FP8 rows are used as they are; their gradient goes to
                ``rows.grad_rows``, or nowhere if that is None. A tensor in the weights' dtype is quantised here.
            tokens_per_expert: Rows of each local expert, zero allowed.

        Returns:
            [rows, out_features] in the weights' dtype; zero in rows past the counts.

        Raises:
            ConfigError: A shape does not fit, or there are fewer rows than the counts add up to.
            BackendUnavailable: The recipe's engine is not there.
        """
        counts = list(tokens_per_expert)
        values = rows.data if isinstance(rows, Fp8Rows) else rows
        if values.shape[1] != self.in_features:
            limit = f"the layer has in_features {self.in_features}"
            raise ConfigError.of("rows.data.shape", list(values.shape), limit, "pass rows of that length")
        if len(counts) != self.num_gemms:
            limit = f"there are {self.num_gemms} local experts"
            raise ConfigError.of("tokens_per_expert", counts, limit, "pass a count for each")
        check_counts(counts, len(values))
        weights: list[torch.Tensor] = [self.weight(index) for index in range(self.num_gemms)]
        function: Any = _GroupedLinear
        if _uses_te(self.recipe, values.device, weights[0].dtype):
            fp8_te.check(values, counts, self)
            function = fp8_te.GroupedLinear
        elif not isinstance(rows, Fp8Rows):
            rows = quantize_rows(rows, power_of_two=self.recipe.power_of_two_scales)
        grad_rows = rows.grad_rows if isinstance(rows, Fp8Rows) else rows
        if not torch.is_grad_enabled():
            # Inside the function that can't be told, and it would make what a backward needs.
            grad_rows, weights = None, [weight.detach() for weight in weights]
        out: torch.Tensor = function.apply(grad_rows, rows, counts, self, *weights)
        return out

    def backward_dw(self) -> None:
        """Add the weight gradients of the oldest backward that left them out. Nothing to do unless delayed.

        Gradients go to ``weight.grad``; hooks on gradients do not run.

        Raises:
            StateError: Every backward so far has its weight gradients.
        """
        if not self.recipe.delay_weight_grad or not any(weight.requires_grad for weight in self.parameters()):
            return
        if not self.delayed:
            raise StateError("backward_dw() was called more often than backward; call it once for each")
        grads = self.delayed.popleft().compute(self)
        for index, grad in enumerate(grads):
            weight = self.weight(index)
            if not weight.requires_grad:
                continue
            if weight.grad is None:
                weight.grad = grad
            else:
                weight.grad += grad

    def get_extra_state(self) -> torch.Tensor:
        """Return what TransformerEngine saves where there is no FP8 state: no bytes."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Leave the state of another layer unread: block scales come from the values of each step."""


class Fp8GroupedExperts(nn.Module):
    """The experts of one rank on dispatched FP8 rows: gate and up, SwiGLU, gate values, down.

    Parameters are ``linear_fc1.weight{e}`` [2 * ffn_hidden, hidden], gate above up, and ``linear_fc2.weight{e}``
    [hidden, ffn_hidden]: names and shapes of Megatron-Core's ``TEGroupedMLP`` with gated linear units and no bias.
    Results are the same bit for bit on every run with the same number of threads.

    Args:
        num_local_experts: Experts of this rank, at least 1.
        hidden: Elements of a row.
        ffn_hidden: Elements between the two layers (Megatron: ``moe_ffn_hidden_size``).
        recipe: How both layers quantise.
        init_method: Fills a weight of the first layer in place. None: normal with standard deviation 0.02.
        output_init_method: The same for the second layer. None: as the first.
        dtype: Of weights, output and gradients: fp32, bf16 or fp16.
        device: Of the weights.
    """

    def __init__(
        self,
        num_local_experts: int,
        hidden: int,
        ffn_hidden: int,
        *,
        recipe: Fp8Recipe | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        output_init_method: Callable[[torch.Tensor], Any] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe or Fp8Recipe()
        self.linear_fc1 = Fp8GroupedLinear(
            num_local_experts,
            hidden,
            2 * ffn_hidden,
            recipe=self.recipe,
            init_method=init_method,
            dtype=dtype,
            device=device,
        )
        self.linear_fc2 = Fp8GroupedLinear(
            num_local_experts,
            ffn_hidden,
            hidden,
            recipe=self.recipe,
            init_method=output_init_method or init_method,
            dtype=dtype,
            device=device,
        )

    def forward(
        self, rows: Fp8Rows, tokens_per_expert: torch.Tensor | Sequence[int], probs: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the experts; only the input of the second layer is quantised here.

        Args:
            rows: [rows, hidden] as dispatched in layout ``"expert"`` (:meth:`Fp8Rows.from_dispatch`).
            tokens_per_expert: Whole numbers [num_local_experts]: rows of each, padding included.
            probs: [rows] gate values of the rows, applied before the second layer. None: not applied here.

        Returns:
            [rows, hidden] in the weights' dtype; zero in rows past the counts.

        Raises:
            ConfigError: A shape does not fit, or there are fewer rows than the counts add up to.
        """
        counts = tokens_per_expert.tolist() if isinstance(tokens_per_expert, torch.Tensor) else list(tokens_per_expert)
        if probs is not None and list(probs.shape) != [len(rows.data)]:
            limit = f"one gate value for each of {len(rows.data)} rows is needed"
            raise ConfigError.of("probs.shape", list(probs.shape), limit, "pass the dispatch's topk_weights")
        hidden: torch.Tensor = _SwiGlu.apply(self.linear_fc1(rows, counts), probs)  # type: ignore[no-untyped-call]
        out: torch.Tensor = self.linear_fc2(hidden, counts)
        return out

    def backward_dw(self) -> None:
        """Add the weight gradients that the oldest such backward left out, second layer first; see the layers."""
        self.linear_fc2.backward_dw()
        self.linear_fc1.backward_dw()


def row_multiple(device: torch.device) -> int:
    """Return what an expert's rows on ``device`` are to be a multiple of: ``expert_alignment`` for FP8 experts."""
    return _te.ROW_MULTIPLE if device.type == "cuda" else 1


def load_engine() -> None:
    """Load TransformerEngine now, if there are GPUs and it is there; otherwise layers do it when they first compute.

    It brings a build of cuDNN, which may fail to load once torch has loaded the libraries of another one.
    """
    if torch.cuda.is_available():
        _te.why_not()


def _uses_te(recipe: Fp8Recipe, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether TransformerEngine computes; raises where it must and can't."""
    if recipe.engine == "torch" or (recipe.engine == "auto" and device.type != "cuda"):
        return False
    if recipe.engine == "te":
        if device.type != "cuda":
            limit = f"TransformerEngine needs rows on a GPU, these are on {device}"
            raise ConfigError.of("recipe.engine", "te", limit, "use engine='auto'")
        _te.load()
        return True
    reason = _te.why_not()
    if reason is None and dtype == torch.float32:
        reason = "TransformerEngine's grouped GEMM gives bfloat16 or float16, and the weights are float32"
    if reason is not None:
        _warn_once(f"FP8 experts are emulated in fp32, which is slow: {reason}")
    return reason is None


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("moe_ep_plugin: %s", text)


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up * probs in fp32, rounded once. Backward computes it again: only the inputs are kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, probs: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, *(() if probs is None else (probs,)))
        gate, up = x.float().chunk(2, dim=-1)
        out = nn.functional.silu(gate).mul_(up)
        if probs is not None:
            out *= probs.float()[:, None]
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, *rest = ctx.saved_tensors
        gate, up = x.float().chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        wide, grad_probs = grad.float(), None
        if rest:
            if ctx.needs_input_grad[1]:
                grad_probs = torch.linalg.vecdot(wide, silu * up).to(rest[0].dtype)
            wide = wide * rest[0].float()[:, None]
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        grad_up.copy_(wide * silu)
        # d silu(g) / dg = s + silu(g) (1 - s)
        grad_gate.copy_(wide * up * (sigmoid + silu * (1 - sigmoid)))
        return grad_x, grad_probs


def _init_normal(weight: torch.Tensor) -> None:
    nn.init.normal_(weight, std=0.02)
