"""A buffer in low-latency mode at work, with the data it moves."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from low_latency_data import LowData
from throughput_data import Shape
from throughput_session import Session
from throughput_team import Failed, Team

from moe_ep_plugin import EpBuffer, EpConfig

POOL_BYTES = 1 << 29  # For the baseline: what a graph has captured stays taken.


class LowSession(Session):
    """One buffer of a team, with data.

    Raises:
        Failed: The buffer could not be made.
    """

    def __init__(self, team: Team, options: argparse.Namespace, shape: Shape, sms: int, backend: str) -> None:
        self.team, self.sms, self.device = team, sms, team.device
        self.data: LowData = team.together(lambda: LowData(team, shape))
        config = EpConfig(
            num_experts=shape.experts,
            num_topk=shape.topk,
            hidden=shape.hidden,
            max_tokens_per_rank=shape.tokens,
            low_latency_tokens_per_rank=shape.tokens,
            backend=backend,  # type: ignore[arg-type]
            device=team.device.type,
            num_sms=sms,
            pool_bytes=POOL_BYTES,
            expand="direct",  # As low-latency rows cross; sums that cross in bf16 would be rounded.
            timeout_s=options.timeout_s,
        )
        try:
            self.buffer = team.together(lambda: EpBuffer(team.buffer_group, config))
        except Failed:
            team.change_buffer_group()
            raise
        if team.device.type == "cuda":
            time.sleep(options.settle_s)

    def send(self, wire: str, split: bool = True) -> Any:
        """Begin a low-latency dispatch of this rank's rows."""
        return self.buffer.low_latency_dispatch(self.data.x, self.data.idx, wire=wire, async_op=split)  # type: ignore[arg-type]

    def send_back(self, rows: torch.Tensor, handle: Any, *, split: bool = True, **options: Any) -> Any:
        """Begin a low-latency combine."""
        data = self.data
        return self.buffer.low_latency_combine(rows, data.idx, data.weights, handle, async_op=split, **options)

    def dispatched(self, leased: bool) -> list[tuple[torch.Tensor, Any]]:
        """Rows to combine and the dispatch that they answer, for both of the buffer's sets of slots."""
        turns = []
        for _ in range(2):
            out = self.send("bf16", split=False).wait()
            rows = self.buffer.empty_rows(out.handle) if leased else torch.empty_like(out.x)
            turns.append((self.data.fill_slots(rows), out.handle))
        self.buffer.check()
        return turns
