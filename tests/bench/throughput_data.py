"""The data of a run of bench_throughput.py, and what must come of it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from bench_host import routing
from throughput_team import Team

from moe_ep_plugin.routing import ExpertPlacement
from moe_ep_plugin.wire import num_scales, quantize_blocks

CHECK_ROWS = 2048  # Rows compared at a time, which bounds the memory of a check.


@dataclass(frozen=True)
class Shape:
    """One workload; tokens are a rank's."""

    tokens: int
    hidden: int
    topk: int
    experts: int


@dataclass(frozen=True)
class Counts:
    """Rows of one dispatch on all ranks together, and the bytes of a row; see bench_throughput.py.

    Crossing rows are those that are not for the rank they come from.
    """

    tokens: int
    rank_rows: int
    expert_rows: int
    max_rows: int
    row: int
    fp8_row: int
    crossing_rank_rows: int
    crossing_expert_rows: int


@functools.lru_cache(maxsize=8)
def own_routing(shape: Shape, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids and gate weights of a rank, on the CPU."""
    return routing(shape.tokens, shape.topk, shape.experts, rank)


def require(ok: bool | torch.Tensor, what: str) -> None:
    """Fail a check."""
    if not bool(ok):
        raise ValueError(f"wrong result: {what}")


class Data:
    """Rows and routing of every rank of a team, and the checks of what this rank got.

    Rows for combine are the dispatched ones times a power of two: 2^rank in layout "rank", 2^(expert % 4) in layout
    "expert", so that a row in a wrong place shows and sums are exact until they are rounded (but for gate weights).

    Attributes:
        rank_powers: How many different powers there are in layout "rank".
        expert_powers: The same in layout "expert".
        tolerance: Of sums in which gate weights take part, relative.
    """

    rank_powers = 8
    expert_powers = 4
    tolerance = 2.0**-7  # Two bf16 roundings.

    def __init__(self, team: Team, shape: Shape) -> None:
        self.shape, self.device, self.rank, self.ranks = shape, team.device, team.rank, team.size
        idx, weights = own_routing(shape, team.rank)
        self.all_idx = team.gather(idx).to(self.device)
        self.all_weights = team.gather(weights).to(self.device)
        self.idx, self.weights = self.all_idx[self.rank], self.all_weights[self.rank]
        self.placement = ExpertPlacement.make(shape.experts, self.ranks, None)
        self.owner = torch.tensor(self.placement.expert_to_rank, device=self.device)
        self.local = torch.tensor(self.placement.local_index, device=self.device)
        self.x = self.rows_of(self.rank)
        self.counts = self._count()

    def rows_of(self, rank: int) -> torch.Tensor:
        """The rows that a rank dispatches."""
        generator = torch.Generator(self.device).manual_seed(1000 + rank)
        size = (self.shape.tokens, self.shape.hidden)
        return torch.randn(size, generator=generator, dtype=torch.bfloat16, device=self.device)

    def _count(self) -> Counts:
        present = self._present(self.all_idx.flatten(0, 1))
        tokens, hidden = self.all_idx.shape[0] * self.shape.tokens, self.shape.hidden
        source = torch.arange(self.ranks, device=self.device)
        stays = (self.owner[self.all_idx] == source[:, None, None]).sum(2)
        self.max_recv = -(-int(present.sum(0).max()) // 64) * 64
        return Counts(
            tokens=tokens,
            rank_rows=int(present.sum()),
            expert_rows=tokens * self.shape.topk,
            max_rows=self.max_recv * self.ranks,
            row=2 * hidden,
            fp8_row=hidden + 4 * num_scales(hidden),
            crossing_rank_rows=int(present.sum()) - int((stays > 0).sum()),
            crossing_expert_rows=tokens * self.shape.topk - int(stays.sum()),
        )

    def _present(self, idx: torch.Tensor) -> torch.Tensor:
        """[tokens, ranks]: whether a token has an expert there."""
        return torch.zeros(len(idx), self.ranks, device=idx.device).scatter_(1, self.owner[idx], 1.0)

    def check_dispatch(self, out: Any, layout: str, wire: str, fixed: int | None) -> None:
        """Compare every received row, bit for bit, with what its sender has; ``fixed`` is max_recv_tokens."""
        sources = list(self._rank_positions() if layout == "rank" else self._expert_positions())
        received = sum(len(where) for where, _, _ in sources)
        # Before anything is indexed: an index out of range would end the device's context.
        fits = len(out.x) == received if fixed is None else len(out.x) == fixed
        require(fits and len(out.topk_weights) == len(out.x), f"{len(out.x)} rows, {received} of them with a token")
        for source, (where, token, slot) in enumerate(sources):
            here = self.owner[self.all_idx[source]] == self.rank
            weights = self.all_weights[source]
            if layout == "rank":
                ids = torch.where(here, self.local[self.all_idx[source]], -1)
                require(out.topk_idx.shape[0] == len(out.x), "length of topk_idx")
                require(torch.equal(out.topk_idx[where], ids[token]), f"topk_idx from rank {source}")
                weights = torch.where(here, weights, 0.0)[token]
            else:
                weights = weights[token, slot]
            require(torch.equal(out.topk_weights[where], weights), f"topk_weights from rank {source}")
        self._check_rows(out, sources, wire)
        rest = out.x[received:]
        require(not len(rest) or not rest.view(torch.uint8).any(), "rows past the received ones are not zero")

    def check_rows(self, out: Any, layout: str, wire: str) -> None:
        """Compare ``out.x`` (and ``out.scale``) alone, of whatever made them, with what the senders have."""
        sources = list(self._rank_positions() if layout == "rank" else self._expert_positions())
        received = sum(len(where) for where, _, _ in sources)
        require(len(out.x) == received, f"{len(out.x)} rows, not {received}")
        self._check_rows(out, sources, wire)

    def _check_rows(self, out: Any, sources: list[Any], wire: str) -> None:
        for source, (where, token, _) in enumerate(sources):
            x = self.rows_of(source)
            for at, taken in zip(where.split(CHECK_ROWS), token.split(CHECK_ROWS), strict=True):
                require(self._same_rows(out, at, x[taken], wire), f"rows from rank {source}")

    def _rank_positions(self) -> Iterable[tuple[torch.Tensor, torch.Tensor, None]]:
        """For every source: places of its rows here, in layout "rank", and the tokens they carry."""
        start = 0
        for idx in self.all_idx:
            token = (self.owner[idx] == self.rank).any(1).nonzero().squeeze(1)
            yield torch.arange(start, start + len(token), device=self.device), token, None
            start += len(token)

    def _expert_positions(self) -> Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For every source: places in layout "expert", tokens, and their top-k positions."""
        source, token, slot = (self.owner[self.all_idx] == self.rank).nonzero().unbind(1)
        order = self.local[self.all_idx[source, token, slot]].argsort(stable=True)
        where = torch.empty_like(order)
        where[order] = torch.arange(len(order), device=self.device)
        for rank in range(self.ranks):
            mine = source == rank
            yield where[mine], token[mine], slot[mine]

    @staticmethod
    def _same_rows(out: Any, at: torch.Tensor, want: torch.Tensor, wire: str) -> bool:
        got = out.x.view(torch.uint8)[at]
        if wire == "fp8":
            want, scale = quantize_blocks(want)
            if not torch.equal(out.scale[at], scale):
                return False
        return torch.equal(got, want.view(torch.uint8))

    def fill(self, rows: torch.Tensor, out: Any, layout: str) -> torch.Tensor:
        """Write what combine shall bring back into ``rows``."""
        if layout == "rank":
            return torch.mul(out.x, 2.0 ** (self.rank % self.rank_powers), out=rows)
        experts = torch.tensor(self.placement.experts_of_rank[self.rank], dtype=torch.int64)
        factors = torch.exp2((experts % self.expert_powers).float()).repeat_interleave(out.tokens_per_expert.cpu())
        return torch.mul(out.x, factors.to(self.device, torch.bfloat16)[:, None], out=rows)

    def check_combine(self, y: torch.Tensor, layout: str) -> None:
        """Compare sums: exactly in layout "rank", within ``tolerance`` where gate weights take part."""
        if layout == "rank":
            powers = torch.exp2(torch.arange(self.ranks, device=self.device) % self.rank_powers).float()
            factors, tolerance = self._present(self.idx).mul(powers).sum(1), 0.0
        else:
            factors = (self.weights * torch.exp2((self.idx % self.expert_powers).float())).sum(1)
            tolerance = self.tolerance
        require(y.shape == self.x.shape and y.dtype == self.x.dtype, f"shape {list(y.shape)} of {y.dtype}")
        for got, x, factor in zip(*(t.split(CHECK_ROWS) for t in (y, self.x, factors)), strict=True):
            want = (x.float() * factor[:, None]).to(x.dtype).float()
            require(((got.float() - want).abs() <= tolerance * want.abs()).all(), "sums of tokens")
