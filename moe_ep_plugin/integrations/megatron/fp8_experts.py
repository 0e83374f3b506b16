"""Megatron-Core's MoE layers with experts that compute on the FP8 rows that they receive."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from ...errors import ConfigError, StateError
from ...fp8 import Fp8Rows
from ...fp8_experts import Fp8GroupedExperts, Fp8Recipe
from .dispatcher import DeepepTokenDispatcher


class MegatronFp8Experts(Fp8GroupedExperts):
    """:class:`Fp8GroupedExperts` under the contract of Megatron's experts, on the parameters of a ``SequentialMLP``.

    The parameters stay the same objects with other names: those of ``TEGroupedMLP``.

    Args:
        experts: Experts of the local layer specification; see :func:`use_fp8_experts` for what they may be.
        recipe: How to quantise.
    """

    def __init__(self, experts: SequentialMLP, recipe: Fp8Recipe) -> None:
        sources = experts.local_experts
        ffn_hidden, hidden = sources[0].linear_fc1.weight.shape
        # Meta: the parameters made here only hold the places of those that are there.
        super().__init__(len(sources), hidden, ffn_hidden // 2, recipe=recipe, device="meta")
        for index, source in enumerate(sources):
            setattr(self.linear_fc1, f"weight{index}", source.linear_fc1.weight)
            setattr(self.linear_fc2, f"weight{index}", source.linear_fc2.weight)

    def forward(self, rows: Fp8Rows, tokens_per_expert: Any, probs: Any = None) -> Any:
        """Returns the experts' output [rows, hidden], and None for a bias; see :meth:`Fp8GroupedExperts.forward`."""
        return super().forward(rows, tokens_per_expert, probs), None

    def sharded_state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """Refuse: without an entry per expert, ranks would save their experts under the same names.

        Raises:
            StateError: Always.
        """
        raise StateError("FP8 experts have no distributed checkpoint yet; save state_dict() of every rank instead")


def use_fp8_experts(model: torch.nn.Module, recipe: Fp8Recipe | None = None) -> int:
    """Let the experts of every MoE layer compute on FP8 rows as they were dispatched.

    Rows cross on the FP8 wire then, whatever the wire option says. Parameters stay the same objects, so the call may
    come before or after an optimizer is made; names in ``state_dict`` become those of ``TEGroupedMLP``. In plain
    PyTorch, at the speed of fp32 matrix products.

    Args:
        model: Anything that holds MoE layers with dispatcher ``"deepep"``, gated SiLU experts of the local layer
            specification (``moe_grouped_gemm=False``), no bias, expert tensor parallelism 1.
        recipe: How to quantise; without delayed weight gradients.

    Returns:
        Layers changed; those that have FP8 experts already are left alone.

    Raises:
        ConfigError: A layer can't have FP8 experts; says why. No layer is changed then.
    """
    recipe = recipe or Fp8Recipe()
    if recipe.delay_weight_grad:
        limit = "Megatron's data parallelism does not see gradients of backward_dw()"
        raise ConfigError.of("recipe.delay_weight_grad", True, limit, "leave it out")
    layers = [m for m in model.modules() if isinstance(m, MoELayer) and not isinstance(m.experts, MegatronFp8Experts)]
    for layer in layers:
        _check(layer)
    for layer in layers:
        layer.experts = MegatronFp8Experts(layer.experts, recipe).train(layer.training)
        layer.token_dispatcher.keep_fp8()
    return len(layers)


def _check(layer: MoELayer) -> None:
    config, dispatcher = layer.config, layer.token_dispatcher
    limit, remedy = "FP8 rows come from ours", "set moe_token_dispatcher_type='deepep' after install()"
    if not isinstance(dispatcher, DeepepTokenDispatcher):
        raise ConfigError.of("token_dispatcher", type(dispatcher).__name__, limit, remedy)
    if not isinstance(layer.experts, SequentialMLP):
        limit, remedy = "only SequentialMLP is converted", "use the local layer specification, moe_grouped_gemm=False"
        raise ConfigError.of("experts", type(layer.experts).__name__, limit, remedy)
    wanted = {
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "activation_func_clamp_value": None,
        "glu_linear_offset": 0.0,
        "add_bias_linear": False,
        "moe_apply_probs_on_input": False,
        "moe_latent_size": None,
        "expert_tensor_parallel_size": 1,
        "delay_wgrad_compute": False,
    }
    for name, value in wanted.items():
        # Versions before a setting came behave as its default.
        found = getattr(config, name, value)
        if found != value:
            found, value = (getattr(setting, "__name__", setting) for setting in (found, value))
            remedy = "change it, or leave the experts as they are"
            raise ConfigError.of(name, found, f"FP8 experts need {value}", remedy)
