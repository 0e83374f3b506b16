"""Megatron's routing map as the top-k lists that a buffer takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TopkRouting:
    """Where every row goes.

    Attributes:
        indices: int64 [num_rows, width] expert ids in the TP x EP group, ascending, -1 where there is none.
        probs: [num_rows, width] gate values, 0 where there is no expert; differentiable.
        owner: int64 [num_rows], the token of every row, where a token needs more than ``width`` experts and is
            sent as several rows. None: row i is token i.
    """

    indices: torch.Tensor
    probs: torch.Tensor
    owner: torch.Tensor | None


def topk_routing(
    routing_map: torch.Tensor,
    probs: torch.Tensor,
    *,
    most_experts: int,
    width: int,
    tp_size: int,
    num_local_experts: int,
) -> TopkRouting:
    """List every token's experts.

    The map decides, not the probabilities: a token that pads an expert has probability 0 and must arrive.

    A tensor-parallel expert lives as shards on the ``tp_size`` ranks of one expert rank, and a token goes to all
    of them, so every shard is an expert of the TP x EP group, whose ranks are ordered by (expert rank, TP rank).

    Args:
        routing_map: bool [num_tokens, num_experts].
        probs: [num_tokens, num_experts] gate values.
        most_experts: Most experts that a token of the map has.
        width: Columns of the result.
        tp_size: Ranks that share one expert.
        num_local_experts: Experts of an expert rank.
    """
    num_experts = routing_map.shape[1]
    # Distinct keys make topk deterministic; descending keys are ascending expert ids.
    keys = torch.arange(num_experts, 0, -1, dtype=torch.int32, device=routing_map.device)
    found, experts = (routing_map.to(torch.int32) * keys).topk(min(most_experts, num_experts), dim=1)
    absent = found == 0
    gates = probs.gather(1, experts).masked_fill(absent, 0)

    first_shard = experts.div(num_local_experts, rounding_mode="floor") * (num_local_experts * tp_size)
    first_shard = (first_shard + experts.remainder(num_local_experts)).masked_fill(absent, -1)
    if tp_size > 1:
        shard_step = torch.arange(tp_size, device=experts.device) * num_local_experts
        shards = first_shard[:, :, None] + shard_step
        indices = shards.masked_fill(absent[:, :, None], -1).flatten(1)
        gates = gates[:, :, None].expand(-1, -1, tp_size).flatten(1)
    else:
        indices = first_shard

    num_tokens, columns = indices.shape
    pieces = max(1, -(-columns // width))
    missing = pieces * width - columns
    if missing:
        indices = torch.nn.functional.pad(indices, (0, missing), value=-1)
        gates = torch.nn.functional.pad(gates, (0, missing))
    if pieces == 1:
        return TopkRouting(indices, gates, None)
    # A token's experts fill its pieces from the front: pieces without a first expert are dropped, except for
    # the first of a token, which keeps token order and zero-expert tokens.
    indices, gates = indices.reshape(-1, width), gates.reshape(-1, width)
    piece = torch.arange(pieces, device=indices.device).repeat(num_tokens)
    kept = ((piece == 0) | (indices[:, 0] >= 0)).nonzero().flatten()
    return TopkRouting(indices[kept], gates[kept], kept.div(pieces, rounding_mode="floor"))
