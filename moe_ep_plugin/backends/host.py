"""Ranks of one machine over shared memory, in C++: the CPU backend, and the twin of the CUDA one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .._extension import load_host
from ..errors import BackendUnavailable
from ..handle import DispatchHandle, LowLatencyHandle
from ..types import CombineOutput, DispatchOutput, DoneEvent, LowLatencyCombineOutput, LowLatencyDispatchOutput
from ..wire import FP8_DTYPE, num_scales
from .base import (
    BackendContext,
    CombineRequest,
    DispatchRequest,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
)
from .heap import ELEMENT_CODES, LAYOUT_CODES, HeapBackend, address_of, machine_id, made_by_all, on_one_machine


def _check_room(directory: str, *, wanted: int) -> None:
    """Refuse a tmpfs that the first balanced dispatches would fill: those need about two largest blocks in all."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < wanted:
        raise BackendUnavailable(
            f"{directory} has {free >> 20} MiB free, and dispatches of this size want about {wanted >> 20} MiB; "
            "enlarge that tmpfs (docker run --shm-size), set shm_dir to a larger one, or lower max_tokens_per_rank"
        )


def _threads(context: BackendContext) -> int:
    """This process's cores, divided by the ranks of the job that run on this machine."""
    ranks_here = max(int(os.environ.get("LOCAL_WORLD_SIZE", 0)), context.num_ranks)
    return context.config.host_threads or max(1, len(os.sched_getaffinity(0)) // ranks_here)


class HostBackend(HeapBackend):
    """See the module's text; made by :meth:`connect`."""

    name = "host"

    @classmethod
    def connect(cls, context: BackendContext) -> HostBackend:
        """Make this rank's heap and map everyone's; succeeds on all ranks or on none.

        Raises:
            BackendUnavailable: No compiled part, no shared memory, or ranks on several machines.
        """
        config = context.config
        heap = None
        mine: dict[str, Any] = {"reason": None}
        try:
            if config.device_type != "cpu":
                raise BackendUnavailable(f"it moves CPU tensors, and the buffer is for {config.device_type!r}")
            host = load_host()
            plan = config.memory_plan(context.num_ranks)
            heap = host.Heap(
                directory=config.shm_dir,
                num_ranks=context.num_ranks,
                num_experts=config.num_experts,
                pool_bytes=plan.pool,
                overflow_bytes=plan.overflow,
                low_receive_bytes=plan.low_latency.receive if plan.low_latency else 0,
                low_rows_bytes=plan.low_latency.rows if plan.low_latency else 0,
            )
            _check_room(config.shm_dir, wanted=2 * plan.largest_block)
            mine |= {"machine": machine_id(), "address": heap.address()}
        except Exception as error:  # Whatever it is, the other ranks must hear of it.
            mine["reason"] = str(error)
        everyone = on_one_machine(context, cls.name, mine)

        def connected() -> Any:
            return host.Communicator(
                heap,
                rank=context.rank,
                addresses=[tuple(m["address"]) for m in everyone],
                expert_to_rank=list(context.placement.expert_to_rank),
                alignment=config.expert_alignment,
                # Between processes of one machine the "link" is memory itself: writing every copy from the
                # sender costs less than writing once, reading back and writing the copies.
                two_stage=config.expand == "two_stage",
                num_threads=_threads(context),
                timeout_s=float(config.timeout_s),
                low_tokens=config.low_latency_tokens_per_rank or 0,
                low_layout=LAYOUT_CODES[config.low_latency_layout],
                mask_on_timeout=config.mask_on_timeout,
            )

        communicator = made_by_all(context, cls.name, connected)
        return cls(context, heap, communicator)

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """See :class:`Backend`."""
        config, handle, x = self._c.config, request.handle, request.x
        quantize = request.wire == "fp8" and request.scale is None
        num_topk = handle.num_topk if handle is not None else request.topk_idx.shape[1]  # type: ignore[union-attr]
        result = self._connected().dispatch(
            x=x.data_ptr(),
            element=ELEMENT_CODES[x.dtype],
            scales=address_of(request.scale),
            num_tokens=x.shape[0],
            hidden=config.hidden,
            topk_idx=address_of(request.topk_idx) or 0,
            topk=num_topk,
            weights=address_of(request.topk_weights),
            layout=LAYOUT_CODES[request.layout],
            max_recv_rows=-1 if request.max_recv_tokens is None else request.max_recv_tokens,
            quantize=quantize,
            power_of_two=config.power_of_two_scales,
            routing=None if handle is None else handle.state,
        )
        self._c.stats.bytes_to_peers += result.bytes_to_peers
        if result.copied_out:
            self._note_copy_out()
        if handle is None:
            handle = self._make_handle(request, result.routing, num_topk)
        rows, layout, has_weights = handle.num_rows, handle.layout, request.topk_weights is not None
        block = result.block

        def array(offset: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return _tensor(block, offset, dtype, shape)

        has_scale = quantize or request.scale is not None
        weights_shape = (rows,) if layout == "expert" else (rows, num_topk)
        return DispatchOutput(
            x=array(0, FP8_DTYPE if has_scale else x.dtype, rows, config.hidden),
            scale=array(result.scales_offset, torch.float32, rows, num_scales(config.hidden)) if has_scale else None,
            topk_idx=array(result.indices_offset, torch.int64, rows, num_topk) if layout == "rank" else None,
            topk_weights=array(result.weights_offset, torch.float32, *weights_shape) if has_weights else None,
            tokens_per_expert=self._tokens_per_expert(handle),
            handle=handle,
            event=DoneEvent(),
        )

    def combine(self, request: CombineRequest) -> CombineOutput:
        """See :class:`Backend`."""
        handle, rows = request.handle, request.rows
        # Fresh memory of this size costs more in page faults than the whole combine; the pool's pages are there.
        out = self._leased((handle.num_tokens, self._c.config.hidden), rows.dtype)
        values = None if request.row_values is None else torch.empty(handle.num_tokens, handle.num_topk)
        result = self._connected().combine(
            rows=rows.data_ptr(),
            element=ELEMENT_CODES[rows.dtype],
            hidden=self._c.config.hidden,
            routing=handle.state,
            weights=address_of(request.row_weights),
            values=address_of(request.row_values),
            out=out.data_ptr(),
            values_out=address_of(values) or 0,
        )
        self._c.stats.bytes_to_peers += result.bytes_to_peers
        self._c.stats.staged += result.staged
        return CombineOutput(x=out, row_values=values, event=DoneEvent())

    def empty_rows(self, handle: DispatchHandle, dtype: torch.dtype) -> torch.Tensor:
        """A lease of the heap, or ordinary memory where the pool is used up."""
        return self._leased((handle.num_rows, self._c.config.hidden), dtype)

    def low_latency_dispatch(self, request: LowLatencyDispatchRequest) -> Callable[[], LowLatencyDispatchOutput]:
        """See :class:`Backend`. Sent when this returns; what is returned waits for the rows of peers."""
        config, x = self._c.config, request.x
        quantize = request.wire == "fp8" and request.scale is None
        routing = self._connected().send_low_latency_dispatch(
            x=x.data_ptr(),
            element=ELEMENT_CODES[x.dtype],
            scales=address_of(request.scale),
            num_tokens=x.shape[0],
            hidden=config.hidden,
            topk_idx=request.topk_idx.data_ptr(),
            topk=request.topk_idx.shape[1],
            weights=address_of(request.topk_weights),
            quantize=quantize,
            power_of_two=config.power_of_two_scales,
            index=request.sequence % 2,
        )
        self._c.stats.bytes_to_peers += routing.bytes_to_peers
        dtype = FP8_DTYPE if request.wire == "fp8" else x.dtype
        handle, has_weights = self._c.low_latency_handle(request, routing), request.topk_weights is not None

        def receive() -> LowLatencyDispatchOutput:
            block, counts = self._connected().receive_low_latency_dispatch(routing)
            num_local_experts = self._c.num_local_experts
            return self._low_latency_output(
                handle,
                dtype,
                has_weights,
                counts=(
                    _tensor(counts, 0, torch.int32, (num_local_experts,)),
                    _tensor(counts, 4 * num_local_experts, torch.int32, (1,)),
                ),
                offsets=(0, routing.scales_offset, routing.weights_offset, routing.indices_offset),
                array=lambda offset, dtype, shape: _tensor(block, offset, dtype, shape),
            )

        return receive

    def low_latency_combine(self, request: LowLatencyCombineRequest) -> Callable[[], LowLatencyCombineOutput]:
        """See :class:`Backend`."""
        config, handle, rows = self._c.config, request.handle, request.rows
        out = self._leased((handle.num_tokens, config.hidden), rows.dtype) if request.out is None else request.out
        lost_weights = torch.empty(handle.num_tokens)
        combine = self._connected().send_low_latency_combine(
            rows=rows.data_ptr(),
            element=ELEMENT_CODES[rows.dtype],
            hidden=config.hidden,
            routing=handle.state,
            topk_idx=request.topk_idx.data_ptr(),
            weights=address_of(request.topk_weights),
            quantize=request.wire == "fp8",
            power_of_two=config.power_of_two_scales,
            out=out.data_ptr(),
            lost_weights=lost_weights.data_ptr(),
        )
        self._c.stats.staged += combine.staged

        return partial(self._low_latency_gather, request, combine, LowLatencyCombineOutput(out, lost_weights))

    def low_latency_rows(self, handle: LowLatencyHandle, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`Backend`."""
        shape = (*self._c.low_latency_slots, self._c.config.hidden)
        return _tensor(self._connected().low_latency_rows(handle.index), 0, dtype, shape)

    def reads_in_place(self, rows: torch.Tensor, handle: LowLatencyHandle) -> bool:
        """See :class:`Backend`."""
        return rows.numel() == 0 or bool(rows.data_ptr() == self._connected().low_latency_rows_address(handle.index))

    def low_latency_held(self, index: int) -> bool:
        """See :class:`Backend`."""
        held: bool = self._connected().low_latency_held(index)
        return held

    def mask_ranks(self, ranks: tuple[int, ...]) -> None:
        """See :class:`Backend`."""
        self._check_others(ranks)
        self._connected().mask_ranks(ranks)

    def masked_ranks(self) -> tuple[int, ...]:
        """See :class:`Backend`."""
        return tuple(self._connected().masked_ranks())

    def check(self) -> None:
        """Nothing is under way between calls."""

    def _leased(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        block = self._connected().lease(max(1, math.prod(shape) * dtype.itemsize))
        return torch.empty(shape, dtype=dtype) if block is None else _tensor(block, 0, dtype, shape)

    def _low_latency_gather(
        self, request: LowLatencyCombineRequest, combine: Any, output: LowLatencyCombineOutput
    ) -> LowLatencyCombineOutput:
        # The request keeps what is read here: rows in place, and weights.
        self._connected().receive_low_latency_combine(combine)
        self._c.stats.bytes_to_peers += combine.bytes_to_peers
        return output

    def _make_handle(self, request: DispatchRequest, routing: Any, num_topk: int) -> DispatchHandle:
        return DispatchHandle(
            layout=request.layout,
            num_tokens=request.x.shape[0],
            num_topk=num_topk,
            num_rows=routing.num_rows,
            num_received=routing.num_received,
            tokens_per_expert=torch.tensor(routing.tokens_per_local_expert, dtype=torch.int64),
            max_recv_tokens=request.max_recv_tokens,
            buffer_id=self._c.buffer_id,
            state=routing,
        )

    def _tokens_per_expert(self, handle: DispatchHandle) -> torch.Tensor:
        if handle.layout == "rank":
            return handle.tokens_per_expert.clone()
        return self._c.aligned(handle.tokens_per_expert)


def _tensor(block: Any, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over part of a block, which it keeps alive. Not a view, so autograd may modify it in place."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(block, dtype=dtype, count=count, offset=offset)
    strides = torch.empty(shape, device="meta").stride()
    out: torch.Tensor = torch.empty(0, dtype=dtype).set_(flat.untyped_storage(), flat.storage_offset(), shape, strides)
    return out
