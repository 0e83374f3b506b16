"""Making built layers ours, and the parameter groups that DeepSpeed wants for experts."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer

from ...config import MAX_TOPK
from ...errors import ConfigError
from .gate import RoutingGate, is_plain_gate
from .layer import EpExperts, EpMOELayer

_REMEDY = "leave this layer with DeepSpeed's own dispatch: give convert() a part of the model without it"


def convert_layer(layer: MoE) -> None:
    """Make one layer ours; one that is already stays as it is.

    Raises:
        ConfigError: Its parts are not DeepSpeed's own, so that their work can't be told.
    """
    inner = layer.deepspeed_moe
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
    inner.__class__, inner.gate.__class__, inner.experts.__class__ = EpMOELayer, RoutingGate, EpExperts


def moe_layers(model: torch.nn.Module) -> list[MoE]:
    """The native MoE layers of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def add_moe_groups(parameter_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Move experts' parameters into groups of their own, marked as DeepSpeed wants them; in place.

    Groups keep their settings (learning rate, weight decay); nothing changes where groups are marked already, or
    where there are no experts.
    """
    marked = any(group.get("moe", False) for group in parameter_groups)
    if not marked and any(is_moe_param(p) for group in parameter_groups for p in group["params"]):
        for number, group in enumerate(parameter_groups):
            # Upstream sorts the new groups by the names of the old ones.
            group.setdefault("name", f"group-{number}")
        split_params_into_different_moe_groups_for_optimizer(parameter_groups)
    return parameter_groups


def restore_layer(layer: MoE) -> None:
    """Give a layer back to DeepSpeed's own dispatch; one that is not ours stays as it is."""
    inner = layer.deepspeed_moe
    for part, ours, theirs in (
        (inner, EpMOELayer, MOELayer),
        (inner.gate, RoutingGate, TopKGate),
        (inner.experts, EpExperts, Experts),
    ):
        if type(part) is ours:
            part.__class__ = theirs
