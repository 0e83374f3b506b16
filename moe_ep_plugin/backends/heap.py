"""What the backends over symmetric heaps share: the compiled communicator, its end, and how arguments cross to it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..bootstrap import exchange
from ..errors import BackendUnavailable, ConfigError, StateError
from ..handle import LowLatencyHandle
from ..types import LowLatencyDispatchOutput
from ..wire import FP8_DTYPE, num_scales
from .base import Backend, BackendContext
from .select import agree, reasons_of, refuse

logger = logging.getLogger("moe_ep_plugin")

ELEMENT_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, FP8_DTYPE: 3}
LAYOUT_CODES = {"expert": 0, "rank": 1}
_CLOSED, _FAILED = 1, 2


def address_of(tensor: torch.Tensor | None) -> int | None:
    """Address of the first element, for the compiled parts."""
    return None if tensor is None else tensor.data_ptr()


def machine_id() -> str:
    """Equal for processes that can map each other's memory: one boot of one kernel."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as error:
        raise BackendUnavailable(f"this machine can't be told from others: {error}") from error


def on_one_machine(context: BackendContext, name: str, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank says of itself before heaps are mapped, by rank.

    Args:
        context: The buffer's.
        name: The backend's.
        mine: This rank's answer: ``reason`` not to go on, or None and, among others, ``machine``.

    Raises:
        BackendUnavailable: On all ranks, if one has a reason or if they are on several machines.
    """
    backend = f"backend {name!r}"
    everyone = exchange(context.group, context.num_ranks, mine, context.config.timeout_s, f"the start of {backend}")
    told = reasons_of(everyone)
    if not told and len({m["machine"] for m in everyone}) > 1:
        told.append("the ranks are on several machines")
    refuse(backend, told)
    return everyone


def made_by_all(context: BackendContext, name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` returns, if it returns on every rank.

    Raises:
        BackendUnavailable: On all ranks, if it raised on one.
    """
    reason, made = None, None
    try:
        made = make()
    except Exception as error:  # Whatever it is, the other ranks must hear of it.
        reason = str(error)
    agree(context, reason, f"backend {name!r}")
    return made


class HeapBackend(Backend):
    """A rank's heap, a compiled communicator over the heaps of all ranks, and the process that they belong to."""

    def __init__(self, context: BackendContext, heap: Any, communicator: Any) -> None:
        self._c = context
        self._heap = heap
        self._communicator = communicator
        self._warned_of_copies = False
        self._pid = os.getpid()

    def abandon(self, reason: str) -> None:
        """See :class:`Backend`."""
        self._depart(_FAILED, reason)

    def close(self) -> None:
        """See :class:`Backend`. What is queued is finished; the heap itself lives on while leased tensors do."""
        self._depart(_CLOSED, "")
        self._communicator = self._heap = None

    def _connected(self) -> Any:
        communicator = self._communicator
        if communicator is None:
            raise StateError("the EpBuffer was closed while an operation was in flight")
        if os.getpid() != self._pid:
            raise StateError(
                f"the EpBuffer belongs to process {self._pid}, and this is process {os.getpid()}, forked from it; "
                "make a buffer in this process"
            )
        return communicator

    def _depart(self, state: int, reason: str) -> None:
        # A forked child has the object, but is not the rank.
        communicator = self._communicator
        if communicator is not None and os.getpid() == self._pid:
            communicator.depart(state, reason)

    def _check_others(self, ranks: tuple[int, ...]) -> None:
        """Refuse to mask this rank itself."""
        if self._c.rank in ranks:
            raise ConfigError.of("a rank", self._c.rank, "it is this one", "mask others; to leave, close the buffer")

    def _low_latency_output(
        self,
        handle: LowLatencyHandle,
        dtype: torch.dtype,
        has_weights: bool,
        counts: tuple[torch.Tensor, torch.Tensor],
        offsets: tuple[int, int, int, int],
        array: Callable[[int, torch.dtype, Any], torch.Tensor],
    ) -> LowLatencyDispatchOutput:
        """Tensors over the slots of a dispatch.

        Args:
            handle: The dispatch's.
            dtype: Of the rows as they crossed.
            has_weights: Whether weights came with them.
            counts: int32 rows received of each local expert, and in all.
            offsets: Of rows, scales, weights and ids in the block of slots.
            array: ``array(offset, dtype, shape)`` is a tensor over part of that block.
        """
        slots, hidden = self._c.low_latency_slots, self._c.config.hidden
        rows_at, scales_at, weights_at, indices_at = offsets
        scale = None
        if dtype == FP8_DTYPE:
            # Stored [..., blocks, capacity].
            scale = array(scales_at, torch.float32, (*slots[:-1], num_scales(hidden), slots[-1])).transpose(-1, -2)
        routes = (handle.capacity, handle.num_topk)
        return LowLatencyDispatchOutput(
            x=array(rows_at, dtype, (*slots, hidden)),
            scale=scale,
            tokens_per_expert=counts[0],
            num_received=counts[1],
            topk_idx=array(indices_at, torch.int64, routes) if handle.layout == "rank" else None,
            topk_weights=array(weights_at, torch.float32, routes) if has_weights else None,
            handle=handle,
        )

    def _note_copy_out(self) -> None:
        self._c.stats.copied_out += 1
        if not self._warned_of_copies:
            self._warned_of_copies = True
            logger.warning(
                "moe_ep_plugin: rank %d: the pool of %d bytes is used up by leased rows; received rows are copied out "
                "of the heap from now on, which is slower. Raise EpConfig.pool_bytes (Megatron: --moe-ep-pool-bytes).",
                self._c.rank,
                self._c.config.memory_plan(self._c.num_ranks).pool,
            )
