"""The data of bench_low_latency.py: whole numbers whose sums and FP8 rows are exact, and what must come of them."""

from __future__ import annotations

from typing import Any

import torch
from throughput_data import Data, Shape, require
from throughput_team import Team

from moe_ep_plugin.types import FP8_BLOCK
from moe_ep_plugin.wire import quantize_blocks

LARGEST = 7  # Of every block of 128, so that its scale is a power of two and the e4m3 rows are exact.


def whole_rows(shape: Shape, rank: int, device: torch.device) -> torch.Tensor:
    """The rows of a rank: whole numbers of at most ``LARGEST``, exact on the FP8 wire too."""
    generator = torch.Generator(device).manual_seed(1000 + rank)
    rows = torch.randint(-LARGEST, LARGEST + 1, (shape.tokens, shape.hidden), generator=generator, device=device)
    rows = rows.bfloat16()
    rows[:, ::FP8_BLOCK] = LARGEST
    return rows


class LowData(Data):
    """Rows and routing of every rank of a team, and checks of what this rank got.

    Rows are whole numbers of at most 7, gate weights 1 to 3, and rows for combine the dispatched ones times
    2^(expert % 4). A row in a wrong place shows, fp32 sums are exact in any order, and so is a combine on the FP8 wire.
    """

    def __init__(self, team: Team, shape: Shape) -> None:
        super().__init__(team, shape)
        self.all_weights = (self.all_weights * 1e4).round() % 3 + 1
        self.weights = self.all_weights[self.rank]
        self.all_x = torch.stack([self.rows_of(rank) for rank in range(self.ranks)])
        self.capacity = self.ranks * shape.tokens
        rank_of_route = self.owner[self.all_idx]
        # Of layout "expert" here; throughput_works.py asks for it.
        self.max_recv = -(-int(rank_of_route.flatten().bincount(minlength=self.ranks).max()) // 64) * 64
        source, token, position = (rank_of_route == self.rank).nonzero().unbind(1)
        expert = self.all_idx[source, token, position]
        order = self.local[expert].argsort(stable=True)
        # Of each received row, in the order of the slots: where it is, and what it is a copy of.
        self.group, self.source, self.token = self.local[expert][order], source[order], token[order]
        self.factor = torch.exp2((expert[order] % 4).float())
        self.per_expert = self.group.bincount(minlength=len(self.placement.experts_of_rank[self.rank]))
        starts = self.per_expert.cumsum(0) - self.per_expert
        self.place = torch.arange(len(self.group), device=self.device) - starts[self.group]

    def rows_of(self, rank: int) -> torch.Tensor:
        """The rows that a rank dispatches."""
        return whole_rows(self.shape, rank, self.device)

    def check_slots(self, out: Any, wire: str) -> None:
        """Compare what a low-latency dispatch received, bit for bit, with what its senders have."""
        require(out.x.shape == (len(self.per_expert), self.capacity, self.shape.hidden), f"shape {list(out.x.shape)}")
        require(torch.equal(out.tokens_per_expert.long(), self.per_expert), "tokens_per_expert")
        require(int(out.num_received) == len(self.group), f"num_received is {int(out.num_received)}")
        want = self.all_x[self.source, self.token]
        if wire == "fp8":
            want, scale = quantize_blocks(want)
            require(torch.equal(out.scale[self.group, self.place], scale), "scales")
        got = out.x.view(torch.uint8)[self.group, self.place]
        require(torch.equal(got, want.view(torch.uint8)), "received rows")

    def fill_slots(self, rows: torch.Tensor) -> torch.Tensor:
        """Write what a low-latency combine shall bring back; not a number where no row was received."""
        rows.fill_(torch.nan)
        rows[self.group, self.place] = self._results()
        return rows

    def fill_dense(self, rows: torch.Tensor) -> torch.Tensor:
        """The same for the rows of ``EpBuffer.dispatch`` with ``max_recv_tokens``, layout "expert"."""
        rows.fill_(torch.nan)
        rows[: len(self.group)] = self._results()
        return rows

    def _results(self) -> torch.Tensor:
        return self.all_x[self.source, self.token] * self.factor.bfloat16()[:, None]

    def check_sums(self, y: torch.Tensor) -> None:
        """Compare the sums of tokens, exactly."""
        require(y.shape == self.x.shape and y.dtype == self.x.dtype, f"shape {list(y.shape)} of {y.dtype}")
        factor = (self.weights * torch.exp2((self.idx % 4).float())).sum(1)
        require(torch.equal(y, (self.x.float() * factor[:, None]).to(y.dtype)), "sums of tokens")

    def check_combined(self, out: Any) -> None:
        """Compare what a low-latency combine brought back."""
        self.check_sums(out.x)
        require(not out.lost_weights.any(), "lost_weights where nothing is missing")
