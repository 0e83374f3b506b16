"""A buffer at work, with the data it moves."""

from __future__ import annotations

import argparse
import time
from contextlib import suppress
from typing import Any

import torch
from common import ranks_sharing
from throughput_data import Data, Shape
from throughput_team import DoesNotFit, Failed, Team, tidy

from moe_ep_plugin import EpBuffer, EpConfig
from moe_ep_plugin.wire import num_scales


class Session:
    """One buffer of a team, with data (a ``data_type``).

    Raises:
        DoesNotFit: The heap would be larger than allowed.
        Failed: The buffer could not be made.
    """

    data_type = Data

    def __init__(self, team: Team, options: argparse.Namespace, shape: Shape, sms: int, expand: str = "auto") -> None:
        self.team, self.sms, self.expand, self.device = team, sms, expand, team.device
        self.data = team.together(lambda: self.data_type(team, shape))
        settings: dict[str, Any] = {
            "num_experts": shape.experts,
            "num_topk": shape.topk,
            "hidden": shape.hidden,
            "max_tokens_per_rank": shape.tokens,
            "backend": options.backend,
            "device": team.device.type,
            "expand": expand,
            "num_sms": sms,
            "local_sms": options.local_sms,
            "timeout_s": options.timeout_s,
        }
        settings["pool_bytes"] = self._pool_bytes(EpConfig(**settings), heap_limit(options, team))
        try:
            self.buffer = team.together(lambda: EpBuffer(team.buffer_group, EpConfig(**settings)))
        except Failed:
            team.change_buffer_group()
            raise
        if team.device.type == "cuda":
            time.sleep(options.settle_s)

    def _pool_bytes(self, config: EpConfig, limit: int) -> int | None:
        """The default pool where the heap then stays below ``limit``, else what is left for it."""
        plan, counts = config.memory_plan(self.team.size), self.data.counts
        if plan.total <= limit:
            return None
        # Two outputs that overlap, rows for combine, their staging; 5 % for ranks that receive more than others.
        block = int(1.05 * counts.expert_rows / self.team.size) * (counts.row + 4 * num_scales(config.hidden) + 4)
        room = limit - plan.overflow
        if room < 4 * block:
            needed = plan.overflow + 4 * block
            raise DoesNotFit(f"a heap of {needed / 1e9:.1f} GB a rank is over the limit of {limit / 1e9:.1f} GB")
        return room

    def close(self) -> None:
        """Give the heap back, and wait until all ranks have: memory that a peer maps is not free yet."""

        def close_mine() -> None:
            self.buffer.close()
            del self.data
            tidy(self.device)

        with suppress(Failed):
            self.team.together(close_mine)

    def dispatch(self, layout: str, **options: Any) -> Any:
        """Dispatch this rank's rows, by their ids unless ``handle`` is given."""
        idx = None if options.get("handle") is not None else self.data.idx
        data = self.data
        return self.buffer.dispatch(data.x, idx, data.weights, layout=layout, num_sms=self.sms, **options)

    def combine_rows(self, layout: str, leased: bool) -> tuple[torch.Tensor, Any]:
        """Rows to combine, and the dispatch that they answer (without its rows)."""
        out = self.dispatch(layout)
        rows = self.buffer.empty_rows(out.handle) if leased else torch.empty_like(out.x)
        self.data.fill(rows, out, layout)
        self.buffer.check()
        return rows, (out.handle, out.topk_weights.clone() if layout == "expert" else None)


def heap_limit(options: argparse.Namespace, team: Team) -> int:
    """Bytes that one rank's heap may take."""
    limit = options.heaps_gb * 1e9
    if team.device.type == "cuda":
        limit = min(limit, 0.8 * torch.cuda.get_device_properties(team.device).total_memory)
    return int(limit) // ranks_sharing(team.size, team.device)
