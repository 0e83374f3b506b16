"""Ranks that do the same things in the same order, and notice together that one could not."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Failed(Exception):
    """Some rank could not do its part; raised on all ranks of the team."""


class DoesNotFit(Exception):
    """The heap would be larger than allowed; raised on all ranks of the team."""


class DeviceLost(Exception):
    """Some rank's device takes no more work; raised on all ranks of the team."""


class Team:
    """The first ``size`` ranks.

    Args:
        groups: The first is the team's own. The others are for buffers, one after the other, as a start-up that one
            rank gives up leaves a group out of step.

    Attributes:
        collective_group: For a baseline's collectives of the device's tensors, if the benchmark has one.
    """

    collective_group: Any = None

    def __init__(self, groups: list[Any], size: int, device: torch.device) -> None:
        self._group, *self._buffer_groups = groups
        self.size, self.device = size, device
        self.rank = dist.get_rank(self._group)

    @property
    def buffer_group(self) -> Any:
        """The group to make buffers with."""
        return self._buffer_groups[0]

    def change_buffer_group(self) -> None:
        """Go on with another group, if one is left."""
        if len(self._buffer_groups) > 1:
            del self._buffer_groups[0]

    def together(self, run: Callable[[], T]) -> T:
        """Run this rank's part, wait for all ranks, and raise on all of them if any part failed."""
        result, error, lost = None, None, False
        try:
            result = run()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
            traceback.print_exc()
            lost = self._device_lost()
        flag = torch.tensor([0 if error is None else 2 if lost else 1])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        if int(flag) == 0:
            return result  # type: ignore[return-value]
        result = None
        told: list[str | None] = [None] * self.size
        dist.all_gather_object(told, error, group=self._group)
        text = "; ".join(f"rank {rank}: {e}" for rank, e in enumerate(told) if e is not None)
        raise (DeviceLost if int(flag) > 1 else Failed)(text)

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        """A CPU tensor of every rank, stacked."""
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine.contiguous(), group=self._group)
        return torch.stack(everyone)

    def _device_lost(self) -> bool:
        try:
            synchronize(self.device)
        except Exception:
            return True
        return False


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tidy(device: torch.device) -> None:
    """Free what nobody refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
