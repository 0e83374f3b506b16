"""A layer of experts over the low-latency operations: two calls a layer, fixed shapes, nothing that waits for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_ep_plugin import EpBuffer, LowLatencyDispatchOutput
from moe_ep_plugin.types import FP8_BLOCK


def gated(x: Tensor) -> Tensor:
    """The experts' activation: silu of the first half times the second."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


class Exchange:
    """Brings tokens' rows to their experts and the results back.

    Args:
        buffer: In low-latency mode, layout ``"expert"``. Layers use its two sets of slots in turn.
        hidden: Elements of a row.
        dtype: Of the rows that experts see.
        device: Of the rows.
    """

    def __init__(self, buffer: EpBuffer, *, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffer = buffer
        self._dtype = dtype
        self._scale_of_column = torch.arange(hidden, device=device) // FP8_BLOCK

    @property
    def experts(self) -> tuple[int, ...]:
        """Ids of this rank's experts, ascending."""
        return tuple(self._buffer.placement.experts_of_rank[self._buffer.rank])

    def dispatch(self, x: Tensor, topk_idx: Tensor) -> LowLatencyDispatchOutput:
        return self._buffer.low_latency_dispatch(x, topk_idx).wait()

    def rows(self, out: LowLatencyDispatchOutput) -> Tensor:
        """[local experts, slots, hidden]: what was received, past each expert's own rows anything.

        FP8 rows are multiplied out. On the CPU, where reading the counts costs nothing, slots that no expert uses
        are cut off; on a GPU all are worked on, for the host must not ask how many there are.
        """
        x, scale = out.x, out.scale
        if not x.is_cuda:
            used = max(out.tokens_per_expert.tolist(), default=0)
            x, scale = x[:, :used], None if scale is None else scale[:, :used]
        if scale is None:
            return x
        return (x.float() * scale.index_select(-1, self._scale_of_column)).to(self._dtype)

    def empty_results(self, out: LowLatencyDispatchOutput) -> Tensor:
        """[local experts, capacity, hidden] for the experts' results, which peers read where they are."""
        return self._buffer.empty_rows(out.handle, self._dtype)

    def combine(self, results: Tensor, topk_idx: Tensor, weights: Tensor, out: LowLatencyDispatchOutput) -> Tensor:
        """[tokens, hidden]: each token's results, weighted and summed."""
        return self._buffer.low_latency_combine(results, topk_idx, weights, out.handle).wait().x


class Router(nn.Module):
    """Chooses each token's experts: the highest logits, weighted by the softmax over those alone."""

    def __init__(self, hidden: int, num_experts: int, topk: int, **factory: Any) -> None:
        super().__init__()
        self._topk = topk
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, **factory))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 weights and int64 expert ids, both [tokens, topk]."""
        logits = functional.linear(x.float(), self.weight.float())
        highest, experts = logits.topk(self._topk, dim=-1)
        return highest.softmax(dim=-1), experts


class Experts(nn.Module):
    """The matrices of this rank's experts, stacked in the order of their ids."""

    def __init__(self, ids: tuple[int, ...], hidden: int, expert_size: int, **factory: Any) -> None:
        super().__init__()
        self.ids = ids
        self.linear_fc1 = nn.Parameter(torch.empty(len(ids), 2 * expert_size, hidden, **factory))
        self.linear_fc2 = nn.Parameter(torch.empty(len(ids), hidden, expert_size, **factory))


class MoE(nn.Module):
    """Routed experts, spread over the ranks of an exchange."""

    def __init__(
        self, *, hidden: int, expert_size: int, num_experts: int, topk: int, exchange: Exchange, **factory: Any
    ) -> None:
        super().__init__()
        self._exchange = exchange
        self.router = Router(hidden, num_experts, topk, **factory)
        self.experts = Experts(exchange.experts, hidden, expert_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] of [tokens, hidden]. Nothing that lies in the buffer outlives the call."""
        weights, topk_idx = self.router(x)
        out = self._exchange.dispatch(x, topk_idx)
        rows = self._exchange.rows(out)
        inner = gated(rows @ self.experts.linear_fc1.transpose(1, 2))
        results = self._exchange.empty_results(out)
        torch.bmm(inner, self.experts.linear_fc2.transpose(1, 2), out=results[:, : rows.shape[1]])
        return self._exchange.combine(results, topk_idx, weights, out)
