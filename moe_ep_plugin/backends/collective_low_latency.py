"""Low-latency mode of backend "collective": its ordinary dispatch, whose rows are then laid out in fixed slots.

Nothing is faster for it: it shows, with tensors of ordinary memory, what the mode of the other backends must return.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

import torch

from ..config import SUPPORTED_DTYPES
from ..errors import CapacityError, ConfigError
from ..handle import DispatchHandle, LowLatencyHandle
from ..types import Event, LowLatencyCombineOutput, LowLatencyDispatchOutput
from ..wire import FP8_DTYPE, dequantize_blocks, quantize_blocks
from .base import Backend, BackendContext, DispatchRequest, LowLatencyCombineRequest, LowLatencyDispatchRequest

if TYPE_CHECKING:
    from .collective import RoutingTables

Output = TypeVar("Output")
ELEMENTS = (*SUPPORTED_DTYPES, FP8_DTYPE)


class Header(NamedTuple):
    """What every rank tells all others at the start of an operation, for them to compare."""

    operation: int
    """0 dispatch, 1 combine, 2 low-latency dispatch, 3 low-latency combine."""
    layout: int
    row_bytes: int
    element: int
    """Place of the rows' dtype in :data:`ELEMENTS`: some have the same size."""
    topk: int
    has_scale: bool
    has_weights: bool
    handle: int
    """Number of the dispatch that made it, 0 for none."""


@dataclass(frozen=True)
class _Slots:
    """Where the rows of one dispatch are: those of a group after each other, from the group's first slot on."""

    dense: DispatchHandle
    slot_of_recv: torch.Tensor
    """Slot of each received entry, in arrival order."""


class CollectiveLowLatency(Backend):
    """The low-latency operations, over those of a subclass. The send half does it all, the other one only returns it.

    Args:
        context: The buffer's.
    """

    name: str

    def __init__(self, context: BackendContext) -> None:
        self._c = context
        if context.config.mask_on_timeout:
            self._refuse_masks("mask_on_timeout", True)

    @abstractmethod
    def _agree(
        self, header: Header, own: tuple[int, int], per_expert: torch.Tensor | None
    ) -> tuple[list[list[int]], torch.Tensor]:
        """Compare what all ranks are about to do; returns every rank's ``own`` words and its counts."""

    @abstractmethod
    def _local_counts(self, counts: torch.Tensor, rank: int) -> torch.Tensor:
        """Rows per local expert of ``rank``, from the [num_ranks, num_experts] counts of all sources."""

    @abstractmethod
    def _send_back(self, entries: torch.Tensor, state: RoutingTables) -> torch.Tensor:
        """Received entries, in arrival order, at the ranks that they came from, in the order they were sent in."""

    @abstractmethod
    def _ordered_sum(
        self, back: torch.Tensor, weights: torch.Tensor | None, state: RoutingTables, num_tokens: int
    ) -> torch.Tensor:
        """fp32 [num_tokens, hidden]: sums in the order of :meth:`Backend.combine`."""

    @abstractmethod
    def _event(self) -> Event:
        """Completion of what has been done so far."""

    def low_latency_dispatch(self, request: LowLatencyDispatchRequest) -> Callable[[], LowLatencyDispatchOutput]:
        """See :class:`Backend`."""
        layout, capacity = self._c.config.low_latency_layout, self._c.low_latency_slots[-1]
        self._check_routes(request)
        out = self.dispatch(
            DispatchRequest(
                x=request.x,
                scale=request.scale,
                topk_idx=request.topk_idx,
                topk_weights=request.topk_weights,
                layout=layout,
                handle=None,
                max_recv_tokens=None,
                wire=request.wire,
            )
        )
        slots = self._slots(out.handle)

        def spread(dense: torch.Tensor, empty: float = 0, *, by_column: bool = False) -> torch.Tensor:
            """The rows of ``dense`` in their slots, [groups, capacity, ...] or [capacity, ...]."""
            groups = self._c.num_local_experts if layout == "expert" else 1
            shape = (groups, dense.shape[1], capacity) if by_column else (groups, capacity, dense.shape[1])
            spread = torch.full(shape, empty, dtype=torch.float32, device=dense.device).to(dense.dtype)
            spread = spread.transpose(1, 2) if by_column else spread
            at = slots.slot_of_recv // capacity, slots.slot_of_recv % capacity
            target, source = spread, dense
            if dense.dtype.itemsize == 1:  # torch can't put FP8.
                target, source = spread.view(torch.uint8), dense.view(torch.uint8)
            target[at] = source[out.handle.state.row_of_recv]
            return spread if layout == "expert" else spread[0]

        device, num_received = request.x.device, len(slots.slot_of_recv)
        result = LowLatencyDispatchOutput(
            x=spread(out.x),
            scale=None if out.scale is None else spread(out.scale, by_column=True),
            tokens_per_expert=out.handle.tokens_per_expert.to(device, torch.int32),
            num_received=torch.tensor([num_received], dtype=torch.int32, device=device),
            topk_idx=None if out.topk_idx is None else spread(out.topk_idx, -1),
            topk_weights=None if out.topk_weights is None else spread(out.topk_weights),
            handle=self._c.low_latency_handle(request, slots),
        )
        return self._done(result)

    def low_latency_combine(self, request: LowLatencyCombineRequest) -> Callable[[], LowLatencyCombineOutput]:
        """See :class:`Backend`."""
        rows, handle, config = request.rows, request.handle, self._c.config
        slots: _Slots = handle.state
        state: RoutingTables = slots.dense.state
        if handle.layout == "expert":
            _check_same_routes(request.topk_idx, state.topk_idx)
        has_weights, on_fp8 = request.topk_weights is not None, request.wire == "fp8"
        self._agree(self._header(3, rows, handle.num_topk, on_fp8, has_weights, handle.sequence), (0, 0), None)

        entries = rows.view(-1, config.hidden)[slots.slot_of_recv]
        if on_fp8:
            q, scale = (self._send_back(t, state) for t in quantize_blocks(entries, config.power_of_two_scales))
            back = dequantize_blocks(q, scale, torch.float32)
        else:
            back = self._send_back(entries, state)
        weights = None
        if state.entry_position is not None:
            kept = request.topk_idx[state.entry_token, state.entry_position] >= 0
            if request.topk_weights is not None:
                weights = request.topk_weights[state.entry_token, state.entry_position][kept]
            state = replace(state, entry_rank=state.entry_rank[kept], entry_token=state.entry_token[kept])
            back = back[kept]
        x = self._ordered_sum(back, weights, state, handle.num_tokens).to(rows.dtype)
        x = x if request.out is None else request.out.copy_(x)
        return self._done(LowLatencyCombineOutput(x=x, lost_weights=torch.zeros(handle.num_tokens, device=x.device)))

    def low_latency_rows(self, handle: LowLatencyHandle, dtype: torch.dtype) -> torch.Tensor:
        """Ordinary memory: this backend always copies."""
        shape = (*self._c.low_latency_slots, self._c.config.hidden)
        return torch.empty(shape, dtype=dtype, device=self._c.config.device_type)

    def reads_in_place(self, rows: torch.Tensor, handle: LowLatencyHandle) -> bool:
        """Never."""
        return False

    def low_latency_held(self, index: int) -> bool:
        """Never: every result has memory of its own."""
        return False

    def mask_ranks(self, ranks: tuple[int, ...]) -> None:
        """Refuse: a collective of the process group is of all its ranks."""
        self._refuse_masks("ranks", ranks)

    def masked_ranks(self) -> tuple[int, ...]:
        """None are."""
        return ()

    def _refuse_masks(self, argument: str, value: object) -> NoReturn:
        raise ConfigError.of(
            argument,
            value,
            f"backend {self.name!r} has no masks: every collective is of the whole process group",
            "use backend 'host' or 'cuda', or leave it out",
        )

    def _check_routes(self, request: LowLatencyDispatchRequest) -> None:
        """Raise, on all ranks alike, what is wrong with the routing of one."""
        idx, num_experts = request.topk_idx, self._c.config.num_experts
        num_topk = idx.shape[1]
        per_expert = torch.bincount(idx[(idx >= 0) & (idx < num_experts)], minlength=num_experts).cpu()
        has_weights = request.topk_weights is not None
        header = self._header(2, request.x, num_topk, request.wire == "fp8", has_weights, 0)
        told, counts = self._agree(header, first_bad_route(idx, num_experts), per_expert)
        for rank, (route, expert) in enumerate(told):
            if route:
                raise bad_route_error(route, expert, num_topk, num_experts, f"rank {rank}: ")
        capacity = self._c.low_latency_slots[-1]
        for rank in range(self._c.num_ranks) if self._c.config.low_latency_layout == "expert" else ():
            need = max(self._local_counts(counts, rank).tolist(), default=0)
            if need > capacity:
                raise CapacityError(
                    f"an expert of rank {rank} would receive {need} rows, but it has slots for {capacity} "
                    "(one a token of every rank); send a token to an expert once only"
                )

    def _header(
        self, operation: int, rows: torch.Tensor, num_topk: int, has_scale: bool, has_weights: bool, handle: int
    ) -> Header:
        return Header(
            operation=operation,
            layout=("expert", "rank").index(self._c.config.low_latency_layout),
            row_bytes=rows.shape[-1] * rows.dtype.itemsize,
            element=ELEMENTS.index(rows.dtype),
            topk=num_topk,
            has_scale=has_scale,
            has_weights=has_weights,
            handle=handle,
        )

    def _slots(self, dense: DispatchHandle) -> _Slots:
        row_of_recv = dense.state.row_of_recv
        if dense.layout == "rank":
            return _Slots(dense, row_of_recv)
        counts = dense.tokens_per_expert
        aligned = self._c.aligned(counts)
        expert = torch.arange(len(counts)).repeat_interleave(aligned)
        place = torch.arange(len(expert)) - (aligned.cumsum(0) - aligned)[expert]
        slot = expert * self._c.low_latency_slots[-1] + place  # Of a padding row it may be anywhere: none is received.
        return _Slots(dense, slot.to(row_of_recv.device)[row_of_recv])

    def _done(self, result: Output) -> Callable[[], Output]:
        event = self._event()

        def wait() -> Output:
            event.wait()
            return result

        return wait


def first_bad_route(idx: torch.Tensor, num_experts: int) -> tuple[int, int]:
    """The first id out of range: 1 + its flat index in ``idx`` (0: there is none), and the id."""
    flat = idx.flatten()
    bad = ((flat < -1) | (flat >= num_experts)).nonzero()[:1].flatten().tolist()
    return (1 + bad[0], int(flat[bad[0]])) if bad else (0, 0)


def bad_route_error(route: int, expert: int, num_topk: int, num_experts: int, whose: str = "") -> ConfigError:
    """What to raise for a result of :func:`first_bad_route`."""
    token, position = divmod(route - 1, num_topk)
    return ConfigError.of(
        f"{whose}topk_idx[{token}, {position}]",
        expert,
        f"expert ids run from 0 to {num_experts - 1} (-1: none)",
        "fix the router or num_experts",
    )


def _check_same_routes(idx: torch.Tensor, dispatched: torch.Tensor) -> None:
    other = ((idx != dispatched) & (idx != -1)).nonzero()
    if len(other):
        token, position = other[0].tolist()
        raise ConfigError.of(
            f"topk_idx[{token}, {position}]",
            int(idx[token, position]),
            "the handle's dispatch sent it to another expert",
            "pass the ids that were dispatched, or -1 to leave a route out",
        )
