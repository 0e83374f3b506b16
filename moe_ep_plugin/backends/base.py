"""The contract between :class:`~moe_ep_plugin.EpBuffer` and whatever moves the bytes.

The buffer validates arguments and serialises calls; a backend may rely on both. Every operation is
collective: all ranks of the group call the same ones in the same order. A backend raises the package's
own errors, and raises :class:`~moe_ep_plugin.CapacityError` for an operation on all ranks or on none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..handle import LowLatencyHandle

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ..config import EpConfig
    from ..handle import DispatchHandle
    from ..routing import ExpertPlacement
    from ..types import (
        CombineOutput,
        DispatchOutput,
        Event,
        Layout,
        LowLatencyCombineOutput,
        LowLatencyDispatchOutput,
        Wire,
    )


# Made at every call, and frozen dataclasses take long to make.
@dataclass(slots=True, kw_only=True)
class DispatchRequest:
    """Validated arguments of a dispatch; tensors are contiguous and on the buffer's device.

    Attributes:
        x: [num_tokens, hidden] rows, or float8_e4m3fn rows where ``scale`` is given.
        scale: fp32 [num_tokens, ceil(hidden / 128)] for rows that are quantised already, else None.
        topk_idx: int64 [num_tokens, num_topk], None where ``handle`` is given. Ids are not yet checked.
        topk_weights: fp32 [num_tokens, num_topk] or None.
        layout: Layout of the rows to receive.
        handle: Routing to reuse, or None.
        max_recv_tokens: Fixed row count, or None for exact sizes.
        wire: How rows cross: unquantised or FP8.
        copied: Whether some tensor here is a copy, queued on the current stream, of one that was not contiguous.
        num_sms: SMs for this call, or None for the buffer's own number.
        async_op, previous_event: As the caller gave them; see ``Backend.orders_streams``.
    """

    x: torch.Tensor
    scale: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    layout: Layout
    handle: DispatchHandle | None
    max_recv_tokens: int | None
    wire: Wire
    copied: bool = False
    num_sms: int | None = None
    async_op: bool = False
    previous_event: Event | None = None


@dataclass(slots=True, kw_only=True)
class CombineRequest:
    """Validated arguments of a combine; tensors are contiguous and on the buffer's device.

    Attributes:
        rows: [handle.num_rows, hidden].
        handle: The dispatch to reverse.
        row_weights: fp32 [handle.num_rows] factors (layout ``"expert"`` only), or None for a plain sum.
        row_values: fp32 values that travel back to the tokens: [num_rows] in layout ``"expert"``,
            [num_rows, num_topk] in layout ``"rank"``. None if none do.
        copied, num_sms, async_op, previous_event: As in :class:`DispatchRequest`.
    """

    rows: torch.Tensor
    handle: DispatchHandle
    row_weights: torch.Tensor | None
    row_values: torch.Tensor | None
    copied: bool = False
    num_sms: int | None = None
    async_op: bool = False
    previous_event: Event | None = None


@dataclass(slots=True, kw_only=True)
class LowLatencyDispatchRequest:
    """Validated arguments of a low-latency dispatch; tensors are contiguous and on the buffer's device.

    Attributes:
        x, scale, topk_idx, wire, num_sms: As in :class:`DispatchRequest`.
        topk_weights: fp32 [num_tokens, num_topk] or None; layout ``"rank"`` only.
        sequence: Number of this dispatch, from 1; it uses buffer ``sequence % 2``.
        async_op: Send now and receive later; otherwise both in one launch, where there are launches.
    """

    x: torch.Tensor
    scale: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    wire: Wire
    sequence: int
    num_sms: int | None = None
    async_op: bool = False


@dataclass(slots=True, kw_only=True)
class LowLatencyCombineRequest:
    """Validated arguments of a low-latency combine; tensors are contiguous and on the buffer's device.

    Attributes:
        rows: [num_local_experts, capacity, hidden] or, in layout ``"rank"``, [capacity, hidden].
        topk_idx: int64 [num_tokens, num_topk], as dispatched but for -1 in place of routes to leave out.
        topk_weights: fp32 [num_tokens, num_topk], or None for a plain sum; layout ``"expert"`` only.
        handle: The dispatch to reverse.
        out: [num_tokens, hidden] of the dtype of ``rows`` to write the sums to, or None.
        wire: How rows cross: as they are, or quantised to FP8.
        num_sms, async_op: As in :class:`LowLatencyDispatchRequest`.
    """

    rows: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    handle: LowLatencyHandle
    out: torch.Tensor | None
    wire: Wire
    num_sms: int | None = None
    async_op: bool = False


@dataclass
class BufferStats:
    """Running totals of one buffer, for reports and tests.

    Attributes:
        operations: Dispatches and combines done.
        bytes_to_peers: Payload bytes (rows, scales, weights, ids) that crossed between this rank and
            others on its initiative: sent in a dispatch, fetched or sent in a combine.
        dispatch_seconds, combine_seconds: Time the calling thread spent in each.
        copied_out: Dispatches whose rows were copied out of the heap because the pool was used up.
        staged: Combines whose rows had to be copied into the heap first.
    """

    operations: int = 0
    bytes_to_peers: int = 0
    dispatch_seconds: float = 0.0
    combine_seconds: float = 0.0
    copied_out: int = 0
    staged: int = 0


@dataclass(frozen=True)
class BackendContext:
    """What a backend is made from.

    Attributes:
        group: Bootstrap process group; None for a group of one process without torch.distributed.
        rank, num_ranks: This process within the group.
        config: The buffer's settings, known to be equal on all ranks.
        placement: Expert to rank map.
        buffer_id: Goes into every handle.
        stats: The totals that the backend keeps up.
    """

    group: torch.distributed.ProcessGroup | None
    rank: int
    num_ranks: int
    config: EpConfig
    placement: ExpertPlacement
    buffer_id: int
    stats: BufferStats = field(default_factory=BufferStats)

    @cached_property
    def num_local_experts(self) -> int:
        """Experts on this rank."""
        return len(self.placement.experts_of_rank[self.rank])

    @cached_property
    def low_latency_slots(self) -> tuple[int, ...]:
        """Leading dimensions of low-latency rows: (num_local_experts, capacity) or, in layout ``"rank"``, (capacity,).

        The capacity is 0 where the buffer has no low-latency mode.
        """
        capacity = self.num_ranks * (self.config.low_latency_tokens_per_rank or 0)
        return (self.num_local_experts, capacity) if self.config.low_latency_layout == "expert" else (capacity,)

    def aligned(self, counts: torch.Tensor) -> torch.Tensor:
        """Rows of each local expert in layout ``"expert"``, padding included."""
        alignment = self.config.expert_alignment
        return (counts + alignment - 1) // alignment * alignment

    def low_latency_handle(self, request: LowLatencyDispatchRequest, state: Any) -> LowLatencyHandle:
        """The handle of a dispatch, with the backend's own ``state``."""
        num_tokens, num_topk = request.topk_idx.shape
        return LowLatencyHandle(
            layout=self.config.low_latency_layout,
            num_tokens=num_tokens,
            num_topk=num_topk,
            capacity=self.low_latency_slots[-1],
            sequence=request.sequence,
            buffer_id=self.buffer_id,
            state=state,
        )


class Backend(ABC):
    """Moves rows for one buffer.

    Attributes:
        name: What ``EpConfig(backend=...)`` calls it.
        orders_streams: Whether the backend itself waits for ``previous_event`` and honours ``async_op``. Otherwise
            the buffer makes the caller wait for the event first, and the call completes before it returns.
        most_sms: The largest ``num_sms`` that a call may ask for, None where it has no meaning.
    """

    name: str
    orders_streams = False
    most_sms: int | None = None

    @abstractmethod
    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """Send rows to the ranks of their experts and return what this rank received."""

    @abstractmethod
    def combine(self, request: CombineRequest) -> CombineOutput:
        """Bring rows back to their tokens and sum them.

        The sum of a token is taken in fp32 in one order: ranks ascending; within a rank, top-k
        positions ascending, into a partial sum of its own; every product rounded before it is added. In two stages
        (``EpConfig.expand``) each rank's partial sum is rounded to the rows' dtype before it crosses.
        """

    @abstractmethod
    def empty_rows(self, handle: DispatchHandle, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised [handle.num_rows, hidden] that a combine can read without a copy, if any can."""

    @abstractmethod
    def low_latency_dispatch(self, request: LowLatencyDispatchRequest) -> Callable[[], LowLatencyDispatchOutput]:
        """Send rows to fixed slots. What is returned receives; it is called once, maybe on another stream."""

    @abstractmethod
    def low_latency_combine(self, request: LowLatencyCombineRequest) -> Callable[[], LowLatencyCombineOutput]:
        """Make rows readable by peers. What is returned gathers and sums them, in the order of :meth:`combine`.

        In layout ``"expert"`` the products are of rows and ``request.topk_weights``. On the FP8 wire a row's element
        is first dequantised and rounded to fp32.
        """

    @abstractmethod
    def low_latency_rows(self, handle: LowLatencyHandle, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised rows for a combine of ``handle``, which it reads in place if the backend can."""

    @abstractmethod
    def reads_in_place(self, rows: torch.Tensor, handle: LowLatencyHandle) -> bool:
        """Whether ``rows`` are those of :meth:`low_latency_rows` and a combine of ``handle`` copies nothing."""

    @abstractmethod
    def low_latency_held(self, index: int) -> bool:
        """Whether some tensor that lies in buffer ``index`` is alive."""

    def reads_registered(self, request: LowLatencyCombineRequest) -> bool:
        """Whether rows that are not :meth:`reads_in_place`'s are read where they lie, as their memory is registered."""
        return False

    def register_rows(self, rows: tuple[torch.Tensor, ...]) -> int:
        """Collective: register memory of rows with all ranks; see :meth:`EpBuffer.register_rows`."""
        return 0

    def unregister_rows(self) -> None:  # noqa: B027 - nothing to do where nothing is registered
        """Collective: undo :meth:`register_rows`."""

    @abstractmethod
    def mask_ranks(self, ranks: tuple[int, ...]) -> None:
        """Leave these ranks out of the low-latency operations that follow."""

    @abstractmethod
    def masked_ranks(self) -> tuple[int, ...]:
        """Ranks that are left out, ascending; waits for the operations under way."""

    @abstractmethod
    def check(self) -> None:
        """Wait for the operations under way and raise what they ran into."""

    @abstractmethod
    def abandon(self, reason: str) -> None:
        """Tell peers, where that is possible, that this rank has failed and does nothing more."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the backend holds. Called once. Tensors handed out stay valid."""
