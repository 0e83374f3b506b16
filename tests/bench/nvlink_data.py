"""The data of bench_nvlink.py: whole numbers, of which every sum is exact however it is made."""

from __future__ import annotations

import torch
from low_latency_data import whole_rows
from throughput_data import Data, Shape
from throughput_session import Session
from throughput_team import Team


class WholeData(Data):
    """Rows and routing of every rank of a team, and checks of what this rank got, bit for bit.

    Rows are whole numbers of at most 7, gate weights 1 or 2, powers of two at most 8 (layout "rank") or 2 ("expert").
    With 8 experts or ranks a token no partial sum is above 7 * 8 * 4, a whole number that bf16 holds. So a sum that
    crosses in bf16 (two stages), one of bf16 atomics and one in fp32 have the same bits.
    """

    rank_powers = 4
    expert_powers = 2
    tolerance = 0.0

    def __init__(self, team: Team, shape: Shape) -> None:
        if shape.topk > 8 or team.size > 8:
            raise ValueError(f"sums of {shape.topk} experts and {team.size} ranks may not be exact: at most 8 of each")
        super().__init__(team, shape)
        self.all_weights = (self.all_weights * 1e4).round() % 2 + 1
        self.weights = self.all_weights[self.rank]

    def rows_of(self, rank: int) -> torch.Tensor:
        """The rows that a rank dispatches."""
        return whole_rows(self.shape, rank, self.device)


class NvlinkSession(Session):
    """One buffer of a team, with whole numbers."""

    data_type = WholeData
