"""Plain torch.distributed: any device, any process-group backend. The oracle and the fallback.

Every (token, top-k position) travels as a row of its own and all sorting is done with torch operations,
so nothing here shares an idea, or a mistake, with the kernels that are compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import CapacityError, PeerMismatch, PeerTimeout
from ..handle import DispatchHandle
from ..types import CombineOutput, DispatchOutput, DoneEvent, Event, Layout
from ..wire import quantize_blocks
from .base import BackendContext, CombineRequest, DispatchRequest
from .collective_low_latency import ELEMENTS, CollectiveLowLatency, Header, bad_route_error, first_bad_route


@dataclass(frozen=True)
class RoutingTables:
    """Routing tables of one handle.

    Entries are what this rank sends, sorted by (rank, token, top-k position): one per (token, position)
    in layout ``"expert"``, one per (token, rank) in layout ``"rank"``.
    """

    entry_rank: torch.Tensor
    entry_token: torch.Tensor
    entry_position: torch.Tensor | None
    topk_idx: torch.Tensor
    send_splits: list[int]
    recv_splits: list[int]
    row_of_recv: torch.Tensor
    """Output row of each received entry, in arrival order (source rank, then the source's order)."""
    recv_topk_idx: torch.Tensor | None
    origin: int
    """Number of the dispatch that made the routing: equal on all ranks."""


class CollectiveBackend(CollectiveLowLatency):
    """See the module's text. Up to three small all-gathers and four all-to-alls an operation."""

    name = "collective"

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context)
        self._sequence = 0
        self._timeout = timedelta(seconds=context.config.timeout_s)
        self._rank_of = torch.tensor(context.placement.expert_to_rank)
        self._local_of = torch.tensor(context.placement.local_index)

    def check(self) -> None:
        """Nothing is under way between calls."""

    def abandon(self, reason: str) -> None:
        """Nothing can be told: the process group may be what failed."""

    def close(self) -> None:
        """Nothing to give back."""

    def empty_rows(self, handle: DispatchHandle, dtype: torch.dtype) -> torch.Tensor:
        """Ordinary memory: this backend always copies."""
        return torch.empty(handle.num_rows, self._c.config.hidden, dtype=dtype, device=self._c.config.device_type)

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """See :class:`Backend`."""
        config, x, handle = self._c.config, request.x, request.handle
        rows, scale = x, request.scale
        if request.wire == "fp8" and scale is None:
            rows, scale = quantize_blocks(x, config.power_of_two_scales)
        if handle is None:
            state, counts = self._route(request, rows)
        else:
            state = handle.state
            counts = self._exchange_headers(request, rows, torch.zeros(config.num_experts, dtype=torch.long))
        if handle is None:
            handle = self._make_handle(request, state, counts)
        out_rows = self._place(self._send(rows[state.entry_token], state), state, handle.num_rows)
        out_scale = None
        if scale is not None:
            out_scale = self._place(self._send(scale[state.entry_token], state), state, handle.num_rows)
        weights = None
        if request.topk_weights is not None:
            sent = request.topk_weights[state.entry_token]
            if state.entry_position is not None:
                sent = sent.gather(1, state.entry_position[:, None])[:, 0]
            else:
                sent = sent.masked_fill(~self._held_there(state), 0.0)
            weights = self._place(self._send(sent, state), state, handle.num_rows)
        return DispatchOutput(
            x=out_rows,
            scale=out_scale,
            topk_idx=self._output_idx(state, handle) if handle.layout == "rank" else None,
            topk_weights=weights,
            tokens_per_expert=self._aligned(handle.tokens_per_expert, handle.layout),
            handle=handle,
            event=self._event(),
        )

    def combine(self, request: CombineRequest) -> CombineOutput:
        """See :class:`Backend`."""
        state, handle = request.handle.state, request.handle
        self._exchange_headers(request, request.rows, None)
        back = self._send_back(request.rows[state.row_of_recv], state)
        weights = None
        if request.row_weights is not None:
            weights = self._send_back(request.row_weights[state.row_of_recv], state)
        x = self._ordered_sum(back, weights, state, handle.num_tokens).to(request.rows.dtype)
        values = None
        if request.row_values is not None:
            sent_back = self._send_back(request.row_values[state.row_of_recv], state)
            values = torch.zeros(handle.num_tokens, handle.num_topk, device=x.device)
            if state.entry_position is not None:
                values[state.entry_token, state.entry_position] = sent_back
            else:
                entry, position = self._held_there(state).nonzero(as_tuple=True)
                values[state.entry_token[entry], position] = sent_back[entry, position]
        return CombineOutput(x=x, row_values=values, event=self._event())

    # Routing

    def _rank_on(self, device: torch.device) -> torch.Tensor:
        return self._rank_of.to(device)

    def _held_there(self, state: RoutingTables) -> torch.Tensor:
        """Bool [num_entries, num_topk]: whether an expert of the entry's token lives on the entry's rank."""
        idx = state.topk_idx[state.entry_token]
        return (self._rank_on(idx.device)[idx] == state.entry_rank[:, None]) & (idx >= 0)

    def _route(self, request: DispatchRequest, rows: torch.Tensor) -> tuple[RoutingTables, torch.Tensor]:
        idx = request.topk_idx
        assert idx is not None
        num_experts = self._c.config.num_experts
        route, bad_expert = first_bad_route(idx, num_experts)
        if route:
            raise bad_route_error(route, bad_expert, idx.shape[1], num_experts)
        token, position = (idx >= 0).nonzero(as_tuple=True)
        expert = idx[token, position]
        rank = self._rank_on(idx.device)[expert]
        per_expert = torch.bincount(expert, minlength=num_experts)
        num_tokens = idx.shape[0]
        entry_position: torch.Tensor | None
        if request.layout == "expert":
            order = torch.argsort(rank, stable=True)
            entry_rank, entry_token, entry_position = rank[order], token[order], position[order]
        else:
            pairs = torch.unique(rank * max(num_tokens, 1) + token)
            entry_rank, entry_token = pairs // max(num_tokens, 1), pairs % max(num_tokens, 1)
            entry_position = None
        counts = self._exchange_headers(request, rows, per_expert.cpu())

        send_splits = torch.bincount(entry_rank, minlength=self._c.num_ranks).tolist()
        recv_splits = self._all_to_all_counts(send_splits)
        local_ids = torch.where(idx >= 0, self._local_of.to(idx.device)[idx], -1)
        # Enough of a state to send with; the rows that arrive complete it.
        unplaced = idx.new_empty(0)
        partial = RoutingTables(
            entry_rank,
            entry_token,
            entry_position,
            idx.clone(),
            send_splits,
            recv_splits,
            unplaced,
            None,
            self._sequence,
        )
        if entry_position is not None:
            recv_local = self._send(local_ids[entry_token, entry_position], partial)
            row_of_recv, recv_idx = self._expert_major_rows(recv_local, counts), None
        else:
            elsewhere = self._rank_on(idx.device)[idx[entry_token]] != entry_rank[:, None]
            recv_idx = self._send(local_ids[entry_token].masked_fill(elsewhere, -1), partial)
            row_of_recv = torch.arange(sum(recv_splits), device=idx.device)
        return replace(partial, row_of_recv=row_of_recv, recv_topk_idx=recv_idx), counts

    def _aligned(self, counts: torch.Tensor, layout: Layout) -> torch.Tensor:
        return counts.clone() if layout == "rank" else self._c.aligned(counts)

    def _local_counts(self, counts: torch.Tensor, rank: int) -> torch.Tensor:
        """Rows per local expert of ``rank``, from the [num_ranks, num_experts] counts of all sources."""
        return counts[:, list(self._c.placement.experts_of_rank[rank])].sum(0)

    def _expert_major_rows(self, recv_local: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        local = self._local_counts(counts, self._c.rank)
        aligned = self._aligned(local, "expert")
        first_row = (aligned.cumsum(0) - aligned).to(recv_local.device)
        first_recv = (local.cumsum(0) - local).to(recv_local.device)
        order = torch.argsort(recv_local, stable=True)
        row = torch.empty_like(order)
        expert = recv_local[order]
        row[order] = torch.arange(len(order), device=order.device) - first_recv[expert] + first_row[expert]
        return row

    def _make_handle(self, request: DispatchRequest, state: RoutingTables, counts: torch.Tensor) -> DispatchHandle:
        assert request.topk_idx is not None
        local = self._local_counts(counts, self._c.rank)
        exact = int(self._aligned(local, "expert").sum()) if request.layout == "expert" else sum(state.recv_splits)
        fixed = request.max_recv_tokens
        return DispatchHandle(
            layout=request.layout,
            num_tokens=request.topk_idx.shape[0],
            num_topk=request.topk_idx.shape[1],
            num_rows=exact if fixed is None else fixed,
            num_received=sum(state.recv_splits),
            tokens_per_expert=local,
            max_recv_tokens=fixed,
            buffer_id=self._c.buffer_id,
            state=state,
        )

    def _output_idx(self, state: RoutingTables, handle: DispatchHandle) -> torch.Tensor:
        assert state.recv_topk_idx is not None
        out = torch.full((handle.num_rows, handle.num_topk), -1, device=state.recv_topk_idx.device)
        out[: len(state.recv_topk_idx)] = state.recv_topk_idx
        return out

    def _ordered_sum(
        self, back: torch.Tensor, weights: torch.Tensor | None, state: RoutingTables, num_tokens: int
    ) -> torch.Tensor:
        """fp32 [num_tokens, hidden]: per-rank partial sums in top-k order, then added rank by rank."""
        products = back.float() if weights is None else back.float() * weights[:, None]
        total = torch.zeros(num_tokens, back.shape[1], device=back.device)
        for rank in range(self._c.num_ranks):
            mine = (state.entry_rank == rank).nonzero()[:, 0]
            token = state.entry_token[mine]
            # Entries are sorted by token here, so an entry's place within its token is its distance to the first.
            place = torch.arange(len(mine), device=back.device) - torch.searchsorted(token, token)
            partial = torch.zeros_like(total)
            for step in range(int(place.max()) + 1 if len(mine) else 0):
                at = place == step
                partial[token[at]] += products[mine[at]]
            total += partial
        return total

    # Communication

    def _exchange_headers(
        self, request: DispatchRequest | CombineRequest, rows: torch.Tensor, per_expert: torch.Tensor | None
    ) -> torch.Tensor:
        """Compare what all ranks are about to do and return their per-expert counts."""
        handle, limit = request.handle, None
        if isinstance(request, DispatchRequest):
            layout, limit, idx = request.layout, request.max_recv_tokens, request.topk_idx
            kind, has_scale, weights = 0, rows.dtype.itemsize == 1, request.topk_weights is not None
        else:
            layout, idx = request.handle.layout, None
            kind, has_scale, weights = 1, request.row_values is not None, request.row_weights is not None
        header = Header(
            operation=kind,
            layout=("expert", "rank").index(layout),
            row_bytes=rows.shape[1] * rows.dtype.itemsize,
            element=ELEMENTS.index(rows.dtype),
            topk=idx.shape[1] if idx is not None else handle.num_topk if handle is not None else 0,
            has_scale=has_scale,
            has_weights=weights,
            handle=0 if handle is None else handle.state.origin,
        )
        own, counts = self._agree(header, (-1 if limit is None else limit, 0), per_expert)
        if isinstance(request, DispatchRequest) and request.handle is None:
            self._check_capacity([limit for limit, _ in own], counts, layout, request)
        return counts

    def _agree(
        self, header: Header, own: tuple[int, int], per_expert: torch.Tensor | None
    ) -> tuple[list[list[int]], torch.Tensor]:
        self._sequence += 1
        compared = {**header._asdict(), "sequence": self._sequence}
        words = [*map(int, compared.values()), *own]
        mine = torch.zeros(len(words) + self._c.config.num_experts, dtype=torch.long)
        mine[: len(words)] = torch.tensor(words)
        if per_expert is not None:
            mine[len(words) :] = per_expert
        everyone = self._all_gather(mine)
        for rank, other in enumerate(everyone):
            for name, theirs, ours in zip(compared, other.tolist(), words, strict=False):
                if theirs != ours:
                    raise PeerMismatch(
                        f"rank {rank} differs from rank {self._c.rank} at operation {self._sequence}: {name} is "
                        f"{theirs} there and {ours} here; call the same operations in the same order on every rank"
                    )
        return everyone[:, len(compared) : len(words)].tolist(), everyone[:, len(words) :]

    def _check_capacity(
        self, limits: list[int], counts: torch.Tensor, layout: Layout, request: DispatchRequest
    ) -> None:
        if layout == "expert":
            needs = [int(self._aligned(self._local_counts(counts, r), "expert").sum()) for r in range(len(limits))]
        elif max(limits) >= 0:
            assert request.topk_idx is not None
            to_rank = torch.zeros(self._c.num_ranks, dtype=torch.long)
            for rank in range(self._c.num_ranks):
                here = (self._rank_on(request.topk_idx.device)[request.topk_idx] == rank) & (request.topk_idx >= 0)
                to_rank[rank] = here.any(1).sum()
            needs = self._all_gather(to_rank).sum(0).tolist()
        else:
            return
        for rank, (limit, need) in enumerate(zip(limits, needs, strict=True)):
            if 0 <= limit < need:
                raise CapacityError(
                    f"rank {rank} would receive {need} rows, but its max_recv_tokens is {limit}; "
                    "raise max_recv_tokens or leave it out for exact sizes"
                )

    def _wait(self, work: dist.Work | None, what: str) -> None:
        try:
            if work is not None:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise PeerTimeout(
                f"rank {self._c.rank} waited up to {self._c.config.timeout_s:g} s for its peers in {what} of operation "
                f"{self._sequence}: {error}"
            ) from error

    def _device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Headers are made on the CPU; a group without a CPU backend (NCCL) needs them on its device."""
        return tensor.to(self._c.config.device_type)

    def _all_gather(self, mine: torch.Tensor) -> torch.Tensor:
        if self._c.num_ranks == 1:
            return mine[None]
        mine = self._device(mine)
        out = [torch.empty_like(mine) for _ in range(self._c.num_ranks)]
        self._wait(self._start(lambda: dist.all_gather(out, mine, group=self._c.group, async_op=True)), "the exchange")
        return torch.stack(out).cpu()

    def _all_to_all_counts(self, send: list[int]) -> list[int]:
        return self._all_gather(torch.tensor(send))[:, self._c.rank].tolist()

    def _start(self, call: Callable[[], dist.Work | None]) -> dist.Work | None:
        try:
            return call()
        except RuntimeError as error:
            raise PeerTimeout(f"rank {self._c.rank} lost its peers at operation {self._sequence}: {error}") from error

    def _all_to_all(self, rows: torch.Tensor, send: list[int], recv: list[int]) -> torch.Tensor:
        # As bytes: process-group backends differ in the element types that they know.
        out = torch.empty((sum(recv), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
        if self._c.num_ranks == 1:
            return out.copy_(rows)
        width = math.prod(rows.shape[1:]) * rows.element_size()
        mine, theirs = (t.contiguous().view(-1).view(torch.uint8) for t in (rows, out))
        self._wait(
            self._start(
                lambda: dist.all_to_all_single(
                    theirs,
                    mine,
                    [n * width for n in recv],
                    [n * width for n in send],
                    group=self._c.group,
                    async_op=True,
                )
            ),
            "the all-to-all",
        )
        sent_away = sum(send) - send[self._c.rank]
        self._c.stats.bytes_to_peers += sent_away * width
        return out

    def _send(self, entries: torch.Tensor, state: RoutingTables) -> torch.Tensor:
        return self._all_to_all(entries, state.send_splits, state.recv_splits)

    def _send_back(self, entries: torch.Tensor, state: RoutingTables) -> torch.Tensor:
        return self._all_to_all(entries, state.recv_splits, state.send_splits)

    def _place(self, received: torch.Tensor, state: RoutingTables, num_rows: int) -> torch.Tensor:
        out = torch.zeros((num_rows, *received.shape[1:]), dtype=received.dtype, device=received.device)
        if received.dtype.itemsize == 1:
            out.view(torch.uint8)[state.row_of_recv] = received.view(torch.uint8)
        else:
            out[state.row_of_recv] = received
        return out

    def _event(self) -> Event:
        if self._c.config.device_type == "cuda":
            event = torch.cuda.Event()
            event.record()
            return event
        return DoneEvent()
