"""DeepSpeed's routing decisions without capacity buffers: the same experts, gate values and losses as its own gate.

Random numbers are drawn in the order and number in which DeepSpeed draws them, so that a model makes the same
choices, and all that is drawn later stays the same, whichever dispatcher it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.moe.sharded_moe import TOPK_GATE_TIMER, TopKGate, gumbel_rsample, multiplicative_jitter
from torch.nn import functional as F

from .upstream import check_version


@dataclass(frozen=True)
class Routes:
    """What a gate decided.

    Attributes:
        experts: int64 [num_tokens, k] expert ids, -1 where there is none: dropped, or not a used token.
        weights: fp32 [num_tokens, k] gate values, 0 where there is no expert; differentiable.
        l_aux: The load-balancing loss; differentiable.
        exp_counts: int64 [num_experts] tokens that chose each expert, before any were dropped.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    l_aux: torch.Tensor
    exp_counts: torch.Tensor


class RoutingGate(TopKGate):
    """A TopKGate that returns :class:`Routes`. Gates become one by having their class changed."""

    def forward(self, x: torch.Tensor, used_token: torch.Tensor | None = None) -> Routes:
        """Route [num_tokens, hidden]; ``used_token`` [num_tokens], 0 for tokens to leave out, counts for k = 1."""
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).start()
        routes = self._route(x, used_token)
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).stop()
            self.gate_time = self.timers(TOPK_GATE_TIMER).elapsed(reset=False)
        return routes

    def _route(self, x: torch.Tensor, used_token: torch.Tensor | None) -> Routes:
        policy = self.noisy_gate_policy if self.training else None
        x = x.float()
        if policy == "Jitter":
            x = multiplicative_jitter(x, device=x.device)
        logits = F.linear(x, self.wg.weight.float())
        if self.k == 1:
            return self._top1(logits, used_token, noisy=policy == "RSample")
        return self._top2(logits) if self.k == 2 else self._topk(logits)

    def _top1(self, logits: torch.Tensor, used_token: torch.Tensor | None, noisy: bool) -> Routes:
        ranked = logits + gumbel_rsample(logits.shape, device=logits.device) if noisy else None
        gates = logits.softmax(dim=1)
        chosen = (gates if ranked is None else ranked).argmax(dim=1, keepdim=True)
        kept = torch.ones_like(chosen, dtype=torch.bool)
        if used_token is not None:
            kept = used_token.reshape(-1, 1) != 0
        mask = torch.zeros_like(gates, dtype=torch.int64).scatter_(1, chosen, kept.long())
        counts = mask.sum(dim=0)
        l_aux = (gates.mean(dim=0) * _share(counts, gates)).sum() * gates.shape[1]
        order = torch.rand_like(gates, dtype=torch.float32) if self.use_rts else None
        if self.drop_tokens:
            # The same selection on the same numbers as upstream's, so that ties fall alike.
            winners = (mask if order is None else mask * order).topk(min(self._capacity(gates, 1), len(gates)), dim=0)[
                1
            ]
            kept = kept & torch.zeros_like(gates, dtype=torch.bool).scatter_(0, winners, True).gather(1, chosen)
        # Under autocast the gates may be narrower than the weights that are dispatched.
        weights = gates.gather(1, chosen).float() * kept
        return Routes(chosen.masked_fill(~kept, -1), weights, l_aux, counts)

    def _top2(self, logits: torch.Tensor) -> Routes:
        gates = logits.softmax(dim=1)
        first = gates.argmax(dim=1, keepdim=True)
        others = logits.detach()
        if self.top2_2nd_expert_sampling:
            # As upstream does in place: the sum is rounded to the logits' dtype, narrower under autocast.
            others = (others + gumbel_rsample(logits.shape, device=logits.device)).to(logits.dtype)
        second = others.scatter(1, first, float("-inf")).argmax(dim=1, keepdim=True)
        firsts, seconds = _count(first, gates), _count(second, gates)
        l_aux = _balance_loss(gates, firsts)
        kept = None
        if self.drop_tokens:
            # First choices take an expert's places in token order, then second choices do.
            capacity = self._capacity(gates, 2)
            kept = torch.cat([_places(first, gates), _places(second, gates) + firsts[second]], dim=1) < capacity
        return _normalised(gates, torch.cat([first, second], dim=1), kept, l_aux, firsts + seconds)

    def _topk(self, logits: torch.Tensor) -> Routes:
        gates = logits.softmax(dim=1)
        chosen_gates, chosen = gates.topk(self.k, dim=1)
        counts = _count(chosen, gates)
        l_aux = _balance_loss(gates, counts) / self.k
        kept = None
        if self.drop_tokens:
            # Until 0.19, the tokens that an expert keeps are those of the largest logits, where others count as 0.
            scores = logits.gather(1, chosen) if check_version() < (0, 19) else chosen_gates
            candidates = torch.zeros_like(gates).scatter(1, chosen, scores.detach().to(gates.dtype))
            winners = candidates.topk(min(self._capacity(gates, self.k), len(gates)), dim=0, sorted=False)[1]
            kept = torch.zeros_like(gates, dtype=torch.bool).scatter_(0, winners, True).gather(1, chosen)
        return _normalised(gates, chosen, kept, l_aux, counts)

    def _capacity(self, gates: torch.Tensor, choices: int) -> int:
        """Places of an expert for the tokens of one rank (GShard), counted in fp32 as upstream does."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        places = torch.ceil(torch.tensor(factor * choices, dtype=torch.float32) * (gates.shape[0] / gates.shape[1]))
        return max(int(places), int(self.min_capacity))


def _count(experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    flat = experts.reshape(-1)
    return torch.zeros(gates.shape[1], dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )


def _share(counts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    return counts.float() / gates.shape[0]


def _balance_loss(gates: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return (gates.mean(dim=0) * _share(counts, gates)).mean() * gates.shape[1] ** 2


def _places(chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """How many earlier tokens chose the same expert: int64 [num_tokens, 1]."""
    one_hot = torch.zeros_like(gates, dtype=torch.int64).scatter_(1, chosen, 1)
    return one_hot.cumsum(dim=0).gather(1, chosen) - 1


def _normalised(
    gates: torch.Tensor, chosen: torch.Tensor, kept: torch.Tensor | None, l_aux: torch.Tensor, counts: torch.Tensor
) -> Routes:
    """Routes whose weights sum to one over the experts that a token keeps."""
    weights = gates.gather(1, chosen)
    if kept is not None:
        weights, chosen = weights * kept, chosen.masked_fill(~kept, -1)
    total = weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
    return Routes(chosen, (weights / total).float(), l_aux, counts)


def is_plain_gate(gate: Any) -> bool:
    """Whether ``gate`` decides as TopKGate does, so that its class may be changed."""
    return type(gate) in (TopKGate, RoutingGate)
