"""AutoEP layers whose experts compute on the FP8 rows that they receive.

DeepSpeed's layer stays in charge: it routes, dispatches, calls its experts, weights their rows and combines. Two things
differ: what its dispatch returns are FP8 rows with a stand-in for autograd, and its experts know such rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...errors import ConfigError
from ...fp8 import Fp8Rows
from ...fp8_experts import Fp8GroupedExperts, Fp8GroupedLinear, Fp8Recipe, load_engine
from ..patching import Installation
from .autoep import ElasticBuffer
from .options import Options
from .upstream import import_deepspeed

_PARAMETERS = ["w1", "w2", "w3"]
_LEAVE_OUT = "or leave fp8_experts out"


@dataclass(frozen=True, eq=False)
class ReceivedRows(Fp8Rows):
    """Rows between DeepSpeed's dispatch and its experts, which looks at their shape in between.

    Attributes:
        counts: Rows of each local expert, padding included.
    """

    counts: Sequence[int] = ()

    @property
    def shape(self) -> torch.Size:
        """[rows, hidden]."""
        return self.data.shape


class _StackedLinear(Fp8GroupedLinear):
    """The grouped linear layer on weights that each forward is given."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, *, recipe: Fp8Recipe) -> None:
        # Meta: the parameters made here are not used.
        super().__init__(num_gemms, in_features, out_features, recipe=recipe, device="meta")
        for index in range(num_gemms):
            delattr(self, f"weight{index}")
        self._weights: Sequence[torch.Tensor] = ()

    def weight(self, index: int) -> Any:
        """The weight [out_features, in_features] of a local expert; after a forward its dtype, shape and device."""
        return self._weights[index]

    @contextmanager
    def using(self, weights: torch.Tensor) -> Iterator[None]:
        """Compute with ``weights`` [num_gemms, out_features, in_features] in the body; gradients arrive in them."""
        self._weights = weights.unbind()
        try:
            yield
        finally:
            # Backward has the quantised weights and asks for what they looked like. These, one of which is a
            # concatenation, must not live that long.
            self._weights = weights.new_empty(()).expand(weights.shape).unbind()


class StackedExperts(Fp8GroupedExperts):
    """:class:`Fp8GroupedExperts` on AutoEP's stacked parameters, of which it holds none itself.

    Args:
        num_local_experts: Experts of this rank.
        hidden: Elements of a row.
        ffn_hidden: Elements between the two layers.
        recipe: How to quantise.
    """

    def __init__(self, num_local_experts: int, hidden: int, ffn_hidden: int, *, recipe: Fp8Recipe) -> None:
        # One small layer instead of two whole ones, which are replaced at once.
        super().__init__(1, 1, 1, recipe=recipe, device="meta")
        self.linear_fc1: _StackedLinear = _StackedLinear(num_local_experts, hidden, 2 * ffn_hidden, recipe=recipe)
        self.linear_fc2: _StackedLinear = _StackedLinear(num_local_experts, ffn_hidden, hidden, recipe=recipe)

    def compute(self, rows: ReceivedRows, w1: torch.Tensor, w2: torch.Tensor, w3: torch.Tensor) -> torch.Tensor:
        """Run the experts on rows without their gate values.

        Gate and up are concatenated in every forward, a copy of two thirds of the weights that lives until they are
        quantised.

        Args:
            rows: As received, with a stand-in.
            w1: Gate weights [num_local_experts, ffn_hidden, hidden].
            w2: Down weights [num_local_experts, hidden, ffn_hidden].
            w3: Up weights, as w1.

        Returns:
            [rows, hidden] in the dtype of the stand-in, which is that of the tokens; weights are cast to it first, as
            DeepSpeed's experts do.
        """
        assert rows.grad_rows is not None
        dtype = rows.grad_rows.dtype
        with ExitStack() as stack:
            # The arithmetic chooses its dtypes itself.
            stack.enter_context(torch.autocast(rows.data.device.type, enabled=False))
            stack.enter_context(self.linear_fc1.using(torch.cat([w1.to(dtype), w3.to(dtype)], dim=1)))
            stack.enter_context(self.linear_fc2.using(w2.to(dtype)))
            out: torch.Tensor = self(rows, rows.counts)
        return out


def check_layer(layer: Any) -> None:
    """Raise ConfigError unless an ``AutoEPMoELayer`` can have FP8 experts; says why not."""
    if layer.comm_backend == "comm":
        limit, remedy = "fp8_experts needs rows that our dispatch sends", f"set comm_backend to 'deepep', {_LEAVE_OUT}"
        raise ConfigError.of('comm_backend in "expert_parallel"', repr(layer.comm_backend), limit, remedy)
    if layer.ep_size == 1:
        limit, remedy = "nothing is dispatched then, and fp8_experts computes on dispatched rows", "set it to 2 or more"
        raise ConfigError.of('autoep_size in "expert_parallel"', 1, limit, f"{remedy}, {_LEAVE_OUT}")
    if layer.score_apply != "post":
        limit, remedy = "weighting a row before its experts would quantise it again", "set score_apply to 'post'"
        raise ConfigError.of("score_apply of the MoE layer", repr(layer.score_apply), limit, f"{remedy}, {_LEAVE_OUT}")
    experts = layer.experts
    if experts.activation != "swiglu":
        limit, remedy = "FP8 experts compute 'swiglu'", "train such a model without fp8_experts"
        raise ConfigError.of("activation of the experts", repr(experts.activation), limit, remedy)
    names = sorted(name for name, _ in experts.named_parameters())
    if names != _PARAMETERS:
        limit, remedy = f"FP8 experts have {_PARAMETERS}, no biases or adapters", "leave fp8_experts out"
        raise ConfigError.of("parameters of the experts", names, limit, remedy)
    if any(hasattr(parameter, "ds_id") for parameter in experts.parameters()):
        refuse_zero3()


def refuse_zero3() -> None:
    """Raise the ConfigError of partitioned expert weights."""
    raise ConfigError.of(
        "zero_optimization.stage",
        3,
        "FP8 experts quantise whole weights, which are partitioned there",
        f"set the stage to 2, {_LEAVE_OUT}",
    )


def serve_fp8_experts(installation: Installation[Options]) -> None:
    """Let AutoEP layers have FP8 experts while the option ``fp8_experts`` is set."""
    layer_module = import_deepspeed("deepspeed.module_inject.auto_ep_layer")
    layer_class, experts_class = layer_module.AutoEPMoELayer, layer_module.GroupedExperts
    session, recipe = installation.session, Fp8Recipe()
    build, run, dispatch = layer_class.__init__, layer_class.forward, layer_module.deepep_dispatch
    compute: Callable[..., torch.Tensor] = experts_class.forward
    # Beside the modules instead of in them: their state dicts and parameters stay DeepSpeed's.
    stacked: WeakKeyDictionary[Any, StackedExperts] = WeakKeyDictionary()

    @functools.wraps(build)
    def init(layer: Any, *args: Any, **kwargs: Any) -> None:
        build(layer, *args, **kwargs)
        if session.options.fp8_experts:
            check_layer(layer)
            load_engine()

    @functools.wraps(run)
    def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
        # The option may be set after the layer was built.
        if session.options.fp8_experts:
            check_layer(layer)
        return run(layer, *args, **kwargs)

    @functools.wraps(dispatch)
    def dispatch_fp8(exchange: Any, *args: Any, **kwargs: Any) -> Any:
        received, weights, exchange = dispatch(exchange, *args, **kwargs)
        if not session.options.fp8_experts:
            return received, weights, exchange
        if not isinstance(exchange.buffer, ElasticBuffer):
            limit, remedy = "fp8_experts needs rows that our dispatch sends", "build the model after install()"
            raise ConfigError.of("buffer of an AutoEP layer", type(exchange.buffer).__name__, limit, remedy)
        out = exchange.buffer.take_fp8()
        assert out.scale is not None
        return ReceivedRows(out.x, out.scale, received, out.tokens_per_expert.tolist()), weights, exchange

    @functools.wraps(compute)
    def compute_fp8(experts: Any, x: Any, num_tokens_per_expert: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, ReceivedRows):
            return compute(experts, x, num_tokens_per_expert)
        if experts not in stacked:
            num_local_experts, ffn_hidden, hidden = experts.w1.shape
            stacked[experts] = StackedExperts(num_local_experts, hidden, ffn_hidden, recipe=recipe)
        return stacked[experts].compute(x, experts.w1, experts.w2, experts.w3)

    installation.put(layer_class, "__init__", init)
    installation.put(layer_class, "forward", forward)
    installation.put(layer_module, "deepep_dispatch", dispatch_fp8)
    installation.put(experts_class, "forward", compute_fp8)
