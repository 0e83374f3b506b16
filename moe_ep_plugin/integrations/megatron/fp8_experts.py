"""Megatron-Core's MoE layers with experts that compute on the FP8 rows that they receive."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.moe import experts as upstream
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

from ...errors import ConfigError
from ...fp8 import Fp8Rows
from ...fp8_experts import Fp8GroupedExperts, Fp8GroupedLinear, Fp8Recipe
from .dispatcher import DeepepTokenDispatcher
from .options import Options

# TransformerEngine reads it for its own block scaling.
_FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"

# Settings of a layer that can have FP8 experts. Versions before a setting came behave as its value here.
_NEEDED: Mapping[str, Any] = {
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "moe_mlp_glu_interleave_size": None,
    "add_bias_linear": False,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "expert_tensor_parallel_size": 1,
    "expert_gtp_weight_remat_size": 1,
    "delay_wgrad_compute": False,
    "overlap_dispatch_backward_with_experts_wgrad": False,
    "fp8_param": False,
    "fp4": None,
}

# Why rows as they are dispatched don't fit Megatron's other recipes.
_OTHER_RECIPES: Mapping[str, str] = {
    "delayed": "its scales are per tensor and come from earlier steps",
    "tensorwise": "its scales are per tensor",
    "mxfp8": "its scales belong to 32 elements",
}


class MegatronFp8Experts(Fp8GroupedExperts):
    """:class:`Fp8GroupedExperts` under the contract of Megatron's experts, on the parameters of those that are there.

    The parameters stay the same objects, attributes and all, with the names that they have in ``TEGroupedMLP``.

    Args:
        experts: A ``SequentialMLP`` or ``TEGroupedMLP``; see :func:`use_fp8_experts` for what they may be.
        recipe: How to quantise.
    """

    def __init__(self, experts: SequentialMLP | TEGroupedMLP, recipe: Fp8Recipe) -> None:
        weights = {name: _weights(experts, name) for name in ("linear_fc1", "linear_fc2")}
        ffn_hidden, hidden = weights["linear_fc1"][0].shape
        # Meta: the parameters made here only hold the places of those that are there.
        super().__init__(len(weights["linear_fc1"]), hidden, ffn_hidden // 2, recipe=recipe, device="meta")
        for name, layer in self._layers():
            for index, weight in enumerate(weights[name]):
                setattr(layer, f"weight{index}", weight)
        self.ep_group = experts.ep_group
        self.dp_group = _expert_data_parallel_group(experts)

    def forward(self, rows: Fp8Rows, tokens_per_expert: Any, probs: Any = None) -> Any:
        """Returns the experts' output [rows, hidden], and None for a bias; see :meth:`Fp8GroupedExperts.forward`."""
        return super().forward(rows, tokens_per_expert, probs), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What a distributed checkpoint holds of these experts: keys and shapes of ``TEGroupedMLP``.

        Those are ``SequentialMLP``'s too, so a checkpoint of any of the three loads into the others, with any number
        of ranks that share the experts.

        Args:
            prefix: Of the keys.
            sharded_offsets: How the modules above are spread.
            metadata: ``singleton_local_shards``: an entry of its own for each expert, and for gate and up, instead of
                one for all experts of the model.
        """
        singleton = bool((metadata or {}).get("singleton_local_shards", False))
        replica = (0, 0, self.dp_group.rank())
        out: dict[str, Any] = {}
        for name, layer in self._layers():
            first = self.ep_group.rank() * layer.num_gemms
            for index in range(layer.num_gemms):
                expert = first + index
                key, offsets = f"{prefix}experts.{expert}.{name}", sharded_offsets
                if not singleton:
                    key = f"{prefix}experts.{name}"
                    offsets = (
                        *sharded_offsets,
                        (len(sharded_offsets), expert, self.ep_group.size() * layer.num_gemms),
                    )
                weight = ShardedTensor.from_rank_offsets(
                    f"{key}.weight", layer.weight(index), *offsets, replica_id=replica, prepend_axis_num=len(offsets)
                )
                if name == "linear_fc1":
                    # Gate and up, each on its own.
                    weight = apply_swiglu_sharded_factory(weight, offsets, singleton)
                out[f"{prefix}{name}.weight{index}"] = weight
                # A place for each expert's FP8 state: the layers that read them expect one, empty or not.
                out[f"{prefix}{name}._extra_state{index or ''}"] = make_sharded_object_for_checkpoint(
                    layer.get_extra_state(), f"{key}._extra_state", offsets, replica
                )
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # States of experts past the first, which only distributed checkpoints have; the first stands for the layer.
        for name, layer in self._layers():
            for index in range(1, layer.num_gemms):
                state_dict.pop(f"{prefix}{name}._extra_state{index}", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _layers(self) -> tuple[tuple[str, Fp8GroupedLinear], ...]:
        return ("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)


def use_fp8_experts(
    model: torch.nn.Module, recipe: Fp8Recipe | None = None, *, expert_alignment: int | None = None
) -> int:
    """Let the experts of every MoE layer compute on FP8 rows as they were dispatched.

    Rows cross on the FP8 wire then, whatever the wire option says, with power-of-two scales if the recipe or the
    option says so. Parameters stay the same objects, so the call may come before or after an optimizer is made; names
    in ``state_dict`` are those of ``TEGroupedMLP``. ``install(fp8=...)`` and Megatron's own FP8 flags do this to layers
    as they are built, see :class:`Options`.

    Args:
        model: Anything that holds MoE layers with dispatcher ``"deepep"`` and gated SiLU experts, ``SequentialMLP`` or
            ``TEGroupedMLP``, no bias, expert tensor parallelism 1, parameters not in FP8.
        recipe: How to quantise; without delayed weight gradients.
        expert_alignment: Rows of each expert are padded to a multiple of this. None: 16 on GPUs, 1 on CPUs.

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
        # Its False leaves the wire to the session's option.
        power_of_two_scales = recipe.power_of_two_scales or None
        layer.token_dispatcher.keep_fp8(power_of_two_scales=power_of_two_scales, expert_alignment=expert_alignment)
    return len(layers)


def convert_new_layer(layer: MoELayer, options: Options) -> None:
    """Give a layer that was just built FP8 experts if the options and its config say so, see :class:`Options`.

    Raises:
        ConfigError: They say so and it can't have them, or Megatron's FP8 recipe is not block scaling.
    """
    if not isinstance(layer.token_dispatcher, DeepepTokenDispatcher):
        return
    if options.fp8 == "experts":
        use_fp8_experts(layer)
    elif layer.config.fp8 and options.wire == "fp8" and not _stays_in_bf16(layer):
        use_fp8_experts(layer, recipe_of(layer.config))


def recipe_of(config: Any) -> Fp8Recipe:
    """What Megatron's FP8 settings mean for experts: block scaling as TransformerEngine does it, gradients included.

    One thing differs: ``fp8="hybrid"`` makes TransformerEngine's gradients e5m2, and these are e4m3, with two more bits
    of mantissa and a scale for each 128 elements.

    Args:
        config: A TransformerConfig with ``fp8`` set.

    Raises:
        ConfigError: The recipe is another, or modules may have recipes of their own.
    """
    name = str(getattr(config.fp8_recipe, "value", config.fp8_recipe))
    if name != "blockwise":
        raise ConfigError.of(
            "fp8_recipe",
            repr(name),
            f"{_OTHER_RECIPES.get(name, 'how it scales is not known here')}, and rows cross with a scale per row and "
            "128 elements",
            "train with --fp8-recipe blockwise, or send rows unquantised to Megatron's own experts: --moe-ep-wire bf16",
        )
    if getattr(config, "quant_recipe", None) is not None:
        raise ConfigError.of(
            "quant_recipe",
            type(config.quant_recipe).__name__,
            "FP8 experts follow fp8 and fp8_recipe, not settings of single modules",
            "leave it out, or send rows unquantised to Megatron's own experts: --moe-ep-wire bf16",
        )
    return Fp8Recipe(power_of_two_scales=os.environ.get(_FP32_SCALES, "0") != "1", gradients="fp8")


def _stays_in_bf16(layer: MoELayer) -> bool:
    """Whether Megatron leaves the layer out of FP8; layers count from 1 over all pipeline stages."""
    config = layer.config
    if not config.first_last_layers_bf16:
        return False
    last = config.num_layers - config.num_layers_at_end_in_bf16
    return not config.num_layers_at_start_in_bf16 < layer.layer_number <= last


def _check(layer: MoELayer) -> None:
    config, dispatcher, experts = layer.config, layer.token_dispatcher, layer.experts
    limit, remedy = "FP8 rows come from ours", "set moe_token_dispatcher_type='deepep' after install()"
    if not isinstance(dispatcher, DeepepTokenDispatcher):
        raise ConfigError.of("token_dispatcher", type(dispatcher).__name__, limit, remedy)
    # Its subclass for inference keeps copies of the weights.
    for_inference = isinstance(experts, getattr(upstream, "InferenceGroupedMLP", ()))
    if not isinstance(experts, SequentialMLP | TEGroupedMLP) or for_inference:
        limit, remedy = "SequentialMLP and TEGroupedMLP are converted", "use a layer specification with one of these"
        raise ConfigError.of("experts", type(experts).__name__, limit, remedy)
    for name, value in _NEEDED.items():
        found = getattr(config, name, value)
        if found != value:
            found, value = (getattr(setting, "__name__", setting) for setting in (found, value))
            remedy = "change it, or leave the experts as they are"
            raise ConfigError.of(name, found, f"FP8 experts need {value}", remedy)
    if isinstance(experts, TEGroupedMLP):
        for name in ("linear_fc1", "linear_fc2"):
            parameters = sorted(key for key, _ in getattr(experts, name).named_parameters())
            if parameters != sorted(f"weight{index}" for index in range(experts.num_local_experts)):
                limit = "a parameter weight0, weight1, ... for each local expert is needed"
                remedy = "leave moe_single_grouped_weight off, and biases out"
                raise ConfigError.of(f"parameters of experts.{name}", parameters, limit, remedy)


def _weights(experts: SequentialMLP | TEGroupedMLP, name: str) -> list[torch.nn.Parameter]:
    """Weights [out, in] of the local experts' layer ``name``."""
    if isinstance(experts, SequentialMLP):
        return [getattr(expert, name).weight for expert in experts.local_experts]
    layer = getattr(experts, name)
    return [getattr(layer, f"weight{index}") for index in range(experts.num_local_experts)]


def _expert_data_parallel_group(experts: SequentialMLP | TEGroupedMLP) -> Any:
    """The ranks that hold copies of the same experts."""
    if isinstance(experts, SequentialMLP):
        return experts.dp_group
    groups = getattr(experts.linear_fc1, "_pg_collection", None)
    return parallel_state.get_expert_data_parallel_group() if groups is None else groups.expt_dp
