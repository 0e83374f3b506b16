"""Making built layers ours, and the parameter groups that DeepSpeed wants for experts."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.pipe.module import PipelineModule

from ...config import MAX_TOPK
from ...errors import ConfigError
from .gate import RoutingGate, is_plain_gate
from .layer import EpExperts, EpMOELayer

_REMEDY = "leave this layer with DeepSpeed's own dispatch: give convert() a part of the model without it"


def convert_layers(layers: list[MoE]) -> None:
    """Make layers ours; one that is already stays as it is.

    Raises:
        ConfigError: A layer's parts are not DeepSpeed's own, so that their work can't be told; none was changed.
    """
    for layer in layers:
        _check(layer.deepspeed_moe)
    for layer in layers:
        inner = layer.deepspeed_moe
        inner.__class__, inner.gate.__class__, inner.experts.__class__ = EpMOELayer, RoutingGate, EpExperts


def _check(inner: MOELayer) -> None:
    for argument, part, known in (
        ("deepspeed_moe", inner, type(inner) in (MOELayer, EpMOELayer)),
        ("gate", inner.gate, is_plain_gate(inner.gate)),
        ("experts", inner.experts, type(inner.experts) in (Experts, EpExperts)),
    ):
        if not known:
            limit = "only DeepSpeed's own class is known to work without capacity"
            raise ConfigError.of(f"{argument} of a MoE layer", f"a {type(part).__name__}", limit, _REMEDY)
    if inner.gate.k > MAX_TOPK:
        raise ConfigError.of(
            "k of a MoE layer", inner.gate.k, f"at most {MAX_TOPK} experts a token are served", _REMEDY
        )


def moe_layers(model: torch.nn.Module) -> list[MoE]:
    """The native MoE layers of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def add_moe_groups(parameter_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Move experts' parameters into groups of their own, marked as DeepSpeed wants them; in place.

    Groups keep their settings (learning rate, weight decay); nothing changes where groups are marked already, or
    where there are no experts.
    """
    if _lacks_moe_groups(parameter_groups):
        for number, group in enumerate(parameter_groups):
            # Upstream sorts the new groups by the names of the old ones.
            group.setdefault("name", f"group-{number}")
        split_params_into_different_moe_groups_for_optimizer(parameter_groups)
    return parameter_groups


def _lacks_moe_groups(parameter_groups: list[dict[str, Any]]) -> bool:
    marked = any(group.get("moe", False) for group in parameter_groups)
    return not marked and any(is_moe_param(p) for group in parameter_groups for p in group["params"])


def mark_experts(model: torch.nn.Module, optimizer: Any, scheduler: Any, config: Any) -> None:
    """Give the user's own optimizer marked groups for experts, where DeepSpeed refuses to go on without.

    Elsewhere its groups stay: a learning-rate scheduler and a saved state count them.

    Raises:
        ConfigError: A scheduler was made for fewer groups.
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or not moe_layers(model):
        return
    to_mark = _needs_moe_groups(model, config) and _lacks_moe_groups(optimizer.param_groups)
    known = len(getattr(scheduler, "base_lrs", optimizer.param_groups))
    # A function that makes a scheduler is called later.
    made_before = scheduler is not None and not callable(scheduler) and to_mark
    if made_before or known < len(optimizer.param_groups):
        raise ConfigError.of(
            "lr_scheduler of deepspeed.initialize",
            f"a {type(scheduler).__name__} made for {known} parameter groups",
            "the optimizer has other groups once experts have groups of their own",
            "call convert(model, optimizer=optimizer) before making the scheduler",
        )
    if to_mark:
        add_moe_groups(optimizer.param_groups)


def _needs_moe_groups(model: torch.nn.Module, config: Any) -> bool:
    """Whether DeepSpeed's optimizer will be a sharded one, or that for bf16 in pipelines: these ask for the groups."""
    bf16 = config._param_dict.get("bf16") or config._param_dict.get("bfloat16") or {}
    in_pipeline = isinstance(model, PipelineModule) and bf16.get("enabled", False)
    return bool(config.zero_optimization_stage > 0 or in_pipeline)


def restore_layers(layers: list[MoE]) -> None:
    """Give layers back to DeepSpeed's own dispatch; one that is not ours stays as it is."""
    for layer in layers:
        inner = layer.deepspeed_moe
        for part, ours, theirs in (
            (inner, EpMOELayer, MOELayer),
            (inner.gate, RoutingGate, TopKGate),
            (inner.experts, EpExperts, Experts),
        ):
            if type(part) is ours:
                part.__class__ = theirs
