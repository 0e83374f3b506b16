"""GPUs that can map each other's memory (NVLink, PCIe), or several ranks on one GPU, with kernels of our own."""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from .._extension import load_cuda
from ..errors import BackendUnavailable, ConfigError
from ..handle import DispatchHandle
from ..share_gpu import pipe_directory
from ..types import CombineOutput, DispatchOutput
from ..wire import FP8_DTYPE, num_scales
from .base import BackendContext, CombineRequest, DispatchRequest
from .cuda_choices import LINK_SHARE, check_sms, default_local_sms, default_num_sms, direct_moves_fewer_bytes
from .cuda_low_latency import CudaLowLatency
from .gpu_tensors import CurrentStream, GpuEvent, aligned, array, from_bytes
from .heap import ELEMENT_CODES, LAYOUT_CODES, HeapBackend, address_of, machine_id, made_by_all, on_one_machine

logger = logging.getLogger("moe_ep_plugin")


@dataclass(slots=True)
class _State:
    """What a handle keeps: the host's view of the routing, and the device memory that it describes.

    Attributes:
        routing: None until the dispatch that makes it has returned.
        stream: The stream that the memory belongs to; use on another one must be recorded.
    """

    routing: Any
    memory: torch.Tensor
    fan: torch.Tensor | None
    stream: torch.cuda.Stream


class CudaBackend(CudaLowLatency, HeapBackend):
    """See the module's text; made by :meth:`connect`."""

    name = "cuda"
    orders_streams = True

    def __init__(
        self,
        context: BackendContext,
        module: Any,
        heap: Any,
        communicator: Any,
        *,
        device: torch.device,
        two_stage: bool,
        ranks_on_device: int,
        gpus: int,
    ) -> None:
        super().__init__(context, heap, communicator)
        self._module = module
        self._device = device
        self._current_stream = CurrentStream(device)
        self._comm_stream = torch.cuda.Stream(device=device, priority=-1)
        self._two_stage = two_stage
        self._ranks_on_device = ranks_on_device
        self._device_sms = module.num_sms_of(device.index)
        self.most_sms = self._device_sms // ranks_on_device
        self._default_sms = context.config.num_sms or default_num_sms(
            self._device_sms, ranks_on_device, staged_gpus=gpus if two_stage else 0
        )
        self._default_local_sms = default_local_sms(context.config.num_sms, self._device_sms, ranks_on_device)
        self._in_flight: deque[tuple[GpuEvent, tuple[Any, ...]]] = deque()

    @classmethod
    def connect(cls, context: BackendContext) -> CudaBackend:
        """Make this rank's heap and map everyone's; succeeds on all ranks or on none.

        Raises:
            BackendUnavailable: No compiled part, no GPU, no room, or GPUs that can't map each other's memory.
            ConfigError: More SMs are asked for than there are for the ranks that share a GPU.
        """
        config = context.config
        module: Any = None
        heap: Any = None
        device = torch.device("cpu")
        mine: dict[str, Any] = {"reason": None}
        try:
            if config.device_type != "cuda":
                raise BackendUnavailable(f"it moves CUDA tensors, and the buffer is for {config.device_type!r}")
            module = load_cuda()
            device = torch.device(config.device or "cuda")
            if device.index is None:
                device = torch.device("cuda", torch.cuda.current_device())
            torch.cuda.init()
            plan = config.memory_plan(context.num_ranks)
            with torch.cuda.device(device):
                heap = module.Heap(
                    device=device.index,
                    num_ranks=context.num_ranks,
                    num_experts=config.num_experts,
                    pool_bytes=plan.pool,
                    overflow_bytes=plan.overflow,
                    low_receive_bytes=plan.low_latency.receive if plan.low_latency else 0,
                    low_rows_bytes=plan.low_latency.rows if plan.low_latency else 0,
                )
                mine |= {
                    "machine": machine_id(),
                    "pid": os.getpid(),
                    "device": module.device_uuid(device.index),
                    "device_sms": module.num_sms_of(device.index),
                    "num_sms": config.num_sms,
                    "local_sms": config.local_sms,
                    "heap": heap.ipc_handle().hex() if context.num_ranks > 1 else "",
                }
        except Exception as error:  # Whatever it is, the other ranks must hear of it.
            mine["reason"] = str(error)
        everyone = on_one_machine(context, cls.name, mine)
        devices = [m["device"] for m in everyone]
        for m in everyone:
            for name in ("num_sms", "local_sms"):
                check_sms(m[name], m["device_sms"], devices.count(m["device"]), name)
        sharing = devices.count(mine["device"])
        link_share = LINK_SHARE if len(set(devices)) > 1 else 1.0
        two_stage = config.expand == "two_stage" or (
            config.expand == "auto" and not direct_moves_fewer_bytes(context.num_ranks, config.num_topk, link_share)
        )

        def connected() -> Any:
            with torch.cuda.device(device):
                return module.Communicator(
                    heap,
                    rank=context.rank,
                    peers=[(m["pid"], bytes.fromhex(m["heap"])) for m in everyone],
                    expert_to_rank=list(context.placement.expert_to_rank),
                    alignment=config.expert_alignment,
                    two_stage=two_stage,
                    max_tokens=config.max_tokens_per_rank,
                    timeout_s=float(config.timeout_s),
                    default_sms=config.num_sms or default_num_sms(mine["device_sms"], sharing),
                    ranks_on_device=sharing,
                    gpu_each=len(set(devices)) == context.num_ranks,
                    low_tokens=config.low_latency_tokens_per_rank or 0,
                    low_layout=LAYOUT_CODES[config.low_latency_layout],
                    mask_on_timeout=config.mask_on_timeout,
                )

        communicator = made_by_all(context, cls.name, connected)
        if context.rank == 0 and sharing > 1 and not os.path.exists(f"{pipe_directory(os.environ)}/control"):
            logger.warning(
                "moe_ep_plugin: %d ranks share a GPU without MPS, so they take turns and wait for each other; start "
                "them with `python -m moe_ep_plugin.share_gpu --ranks N -- SCRIPT`",
                sharing,
            )
        return cls(
            context,
            module,
            heap,
            communicator,
            device=device,
            two_stage=two_stage,
            ranks_on_device=sharing,
            gpus=len(set(devices)),
        )

    def dispatch(self, request: DispatchRequest) -> DispatchOutput:
        """See :class:`Backend`."""
        config, handle = self._c.config, request.handle
        communicator = self._connected()
        x, copied = aligned(request.x)
        quantize = request.wire == "fp8" and request.scale is None
        num_topk = handle.num_topk if handle is not None else request.topk_idx.shape[1]  # type: ignore[union-attr]
        layout = request.layout
        limit = request.max_recv_tokens
        if handle is None and limit is None and torch.cuda.is_current_stream_capturing():
            raise ConfigError.of(
                "max_recv_tokens",
                None,
                "sizes can't come to the host while a CUDA graph is captured",
                "pass max_recv_tokens, or a handle",
            )
        inputs = (x, request.scale, request.topk_idx, request.topk_weights)
        run, home = self._streams(request, copied, inputs)
        state = handle.state if handle is not None else self._new_state(x.shape[0], num_topk, layout, run, home)
        self._use_state(state, run)
        result = communicator.dispatch(
            x=x.data_ptr(),
            element=ELEMENT_CODES[x.dtype],
            scales=address_of(request.scale),
            num_tokens=x.shape[0],
            hidden=config.hidden,
            topk_idx=address_of(request.topk_idx) or 0,
            topk=num_topk,
            weights=address_of(request.topk_weights),
            layout=LAYOUT_CODES[layout],
            max_recv_rows=-1 if limit is None else limit,
            quantize=quantize,
            power_of_two=config.power_of_two_scales,
            routing=state.routing,
            routing_memory=state.memory.data_ptr(),
            num_sms=self._crossing_sms(request.num_sms),
            stream=run.cuda_stream,
            home=home.cuda_stream,
        )
        if handle is None:
            state.routing = result.routing
            if state.fan is not None:
                result.routing.set_fan(state.fan.data_ptr())
            handle = self._make_handle(request, state, num_topk)
        if result.routing.sent_rows > 0:
            self._c.stats.bytes_to_peers += result.routing.sent_rows * result.bytes_per_row
        has_scale = quantize or request.scale is not None
        if state.fan is None:
            block, offsets = self._received(result, run, home), result.offsets
        else:
            offsets = communicator.expanded_offsets(result)
            block = self._expand(request, result, state, offsets[-1], has_scale, run, home)
        event = self._finish(request, run, *inputs, block)
        rows, has_weights = handle.num_rows, request.topk_weights is not None
        _, scales_at, weights_at, indices_at, _ = offsets
        weights_shape = (rows,) if layout == "expert" else (rows, num_topk)
        scales_shape = (rows, num_scales(config.hidden))
        indices = array(block, indices_at, torch.int64, (rows, num_topk)) if layout == "rank" else None
        if result.data == 0 and indices is not None:
            indices.fill_(-1)
        return DispatchOutput(
            x=array(block, 0, FP8_DTYPE if has_scale else x.dtype, (rows, config.hidden)),
            scale=array(block, scales_at, torch.float32, scales_shape) if has_scale else None,
            topk_idx=indices,
            topk_weights=array(block, weights_at, torch.float32, weights_shape) if has_weights else None,
            tokens_per_expert=self._tokens_per_expert(handle),
            handle=handle,
            event=event,
        )

    def combine(self, request: CombineRequest) -> CombineOutput:
        """See :class:`Backend`."""
        handle, state = request.handle, request.handle.state
        communicator = self._connected()
        rows, copied = aligned(request.rows)
        inputs = (rows, request.row_weights, request.row_values)
        run, home = self._streams(request, copied, inputs)
        out = self._empty((handle.num_tokens, self._c.config.hidden), rows.dtype, run, home)
        values = None
        if request.row_values is not None:
            values = self._empty((handle.num_tokens, handle.num_topk), torch.float32, run, home)
        self._use_state(state, run)
        result = communicator.combine(
            rows=rows.data_ptr(),
            element=ELEMENT_CODES[rows.dtype],
            hidden=self._c.config.hidden,
            routing=state.routing,
            weights=address_of(request.row_weights),
            values=address_of(request.row_values),
            out=out.data_ptr(),
            values_out=address_of(values) or 0,
            num_sms=self._crossing_sms(request.num_sms),
            local_sms=self._local_sms(request.num_sms),
            stream=run.cuda_stream,
            home=home.cuda_stream,
        )
        event = self._finish(request, run, *inputs)
        self._c.stats.bytes_to_peers += result.bytes_to_peers
        self._c.stats.staged += result.staged
        return CombineOutput(x=out, row_values=values, event=event)

    def empty_rows(self, handle: DispatchHandle, dtype: torch.dtype) -> torch.Tensor:
        """A lease of the heap, or ordinary memory where the pool is used up."""
        shape = (handle.num_rows, self._c.config.hidden)
        stream = self._current_stream()
        block = self._connected().lease(
            max(1, math.prod(shape) * dtype.itemsize), stream=stream.cuda_stream, home=stream.cuda_stream
        )
        if block is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        return array(block, 0, dtype, shape)

    def check(self) -> None:
        """See :class:`Backend`."""
        self._connected().check()

    def close(self) -> None:
        """See :class:`Backend`."""
        super().close()
        self._in_flight.clear()

    @property
    def communicator(self) -> Any:
        """The compiled communicator, for benchmarks that try other pipelines."""
        return self._connected()

    def _sms(self, asked: int | None) -> int:
        if asked is None:
            return 0
        check_sms(asked, self._device_sms, self._ranks_on_device)
        return asked

    def _crossing_sms(self, asked: int | None) -> int:
        """SMs of a dispatch or combine that asks for ``asked``."""
        return self._sms(asked) or self._default_sms

    def _local_sms(self, asked: int | None) -> int:
        """SMs of what stays on the GPU, in a call that asks for ``asked`` SMs."""
        return self._c.config.local_sms or self._sms(asked) or self._default_local_sms

    def _streams(
        self, request: DispatchRequest | CombineRequest, copied: bool, inputs: tuple[torch.Tensor | None, ...]
    ) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """The stream that the operation runs on, ordered after what it needs, and the one that its results are for."""
        self._check_devices(*inputs)
        home = self._current_stream()
        run = self._comm_stream if request.async_op else home
        if request.previous_event is not None:
            with torch.cuda.stream(run):
                request.previous_event.wait()
        # A copy that was made of an input is queued on the current stream, after any event.
        if request.async_op and (request.previous_event is None or copied or request.copied):
            run.wait_stream(home)
        if request.async_op:
            for tensor in inputs:
                if tensor is not None:
                    tensor.record_stream(run)
        return run, home

    def _finish(self, request: DispatchRequest | CombineRequest, run: torch.cuda.Stream, *used: Any) -> GpuEvent:
        """The operation's event; keeps what an asynchronous one uses until it has completed.

        Leases go back to the pool in the order of their home stream, which says nothing about this one.
        """
        event = GpuEvent(run, request.async_op)
        if request.async_op and not torch.cuda.is_current_stream_capturing():
            while self._in_flight and self._in_flight[0][0].query():
                self._in_flight.popleft()
            self._in_flight.append((event, used))
        return event

    def _use_state(self, state: _State, run: torch.cuda.Stream) -> None:
        if run == state.stream:
            return
        for tensor in (state.memory, state.fan):
            if tensor is not None:
                tensor.record_stream(run)

    def _new_state(
        self,
        num_tokens: int,
        num_topk: int,
        layout: str,
        run: torch.cuda.Stream,
        home: torch.cuda.Stream,
    ) -> _State:
        """Device memory for a new routing, not yet filled."""
        memory = self._bytes(self._connected().routing_bytes(num_tokens, num_topk), run, home)
        fan = None
        if layout == "expert" and self._two_stage:
            most = self._c.num_ranks * self._c.config.max_tokens_per_rank * num_topk
            fan = self._bytes(most * self._module.fan_bytes, run, home)
        return _State(None, memory, fan, run)

    def _empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, run: torch.cuda.Stream, home: torch.cuda.Stream
    ) -> torch.Tensor:
        """Memory that ``run`` writes and ``home`` uses; what ``home`` still does with it otherwise is no concern."""
        if run is home:
            return torch.empty(shape, dtype=dtype, device=self._device)
        with torch.cuda.stream(run):
            out = torch.empty(shape, dtype=dtype, device=self._device)
        out.record_stream(home)
        return out

    def _bytes(self, count: int, run: torch.cuda.Stream, home: torch.cuda.Stream) -> torch.Tensor:
        return self._empty((max(1, count),), torch.uint8, run, home)

    def _received(self, result: Any, run: torch.cuda.Stream, home: torch.cuda.Stream) -> Any:
        """The received block: the lease itself, or a copy as bytes where the pool is used up."""
        total = result.offsets[-1]
        if result.block is not None:
            return result.block
        if total > 0:
            self._note_copy_out()
        copy = self._bytes(total, run, home)
        if result.data == 0:
            with torch.cuda.stream(run):
                copy.zero_()
        elif total > 0:
            self._connected().copy(copy.data_ptr(), result.data, total, run.cuda_stream)
        return copy

    def _expand(
        self,
        request: DispatchRequest,
        result: Any,
        state: _State,
        total: int,
        has_scale: bool,
        run: torch.cuda.Stream,
        home: torch.cuda.Stream,
    ) -> Any:
        """Stage two: the block of the rows returned, a lease or bytes."""
        communicator = self._connected()
        # While the dispatch goes on, if that is possible; a lease of another stream is none of a capture's.
        num_sms, local_sms, stage = self._crossing_sms(request.num_sms), self._local_sms(request.num_sms), 0
        if result.data != 0 and not torch.cuda.is_current_stream_capturing():
            stage = communicator.stage_stream(num_sms=num_sms, local_sms=local_sms, bytes=result.offsets[-1])
        lease = communicator.lease(max(1, total), stream=stage or run.cuda_stream, home=home.cuda_stream)
        if lease is None:
            self._note_copy_out()
            block: Any = self._bytes(total, run, home)
        else:
            block = lease
        if result.data == 0:
            with torch.cuda.stream(run):
                array(block, 0, torch.uint8, (total,)).zero_()
            return block
        communicator.expand(
            staged=result,
            element=ELEMENT_CODES[FP8_DTYPE if has_scale else request.x.dtype],
            hidden=self._c.config.hidden,
            fresh=request.handle is None,
            beside=stage != 0 and lease is not None,
            block=block.data_ptr() if isinstance(block, torch.Tensor) else block.data,
            num_sms=num_sms,
            local_sms=local_sms,
            stream=run.cuda_stream,
        )
        return block

    def _make_handle(self, request: DispatchRequest, state: _State, num_topk: int) -> DispatchHandle:
        routing, limit = state.routing, request.max_recv_tokens
        known = limit is None
        tokens = from_bytes(routing.tokens_per_local_expert) if known else self._device_tokens(state, 0)
        return DispatchHandle(
            layout=request.layout,
            num_tokens=request.x.shape[0],
            num_topk=num_topk,
            num_rows=routing.num_rows,
            num_received=routing.num_received if known else None,
            tokens_per_expert=tokens,
            max_recv_tokens=limit,
            buffer_id=self._c.buffer_id,
            state=state,
        )

    def _tokens_per_expert(self, handle: DispatchHandle) -> torch.Tensor:
        if handle.max_recv_tokens is not None:
            return self._device_tokens(handle.state, 1)
        if handle.layout == "rank" or self._c.config.expert_alignment == 1:
            return from_bytes(handle.state.routing.tokens_per_local_expert)
        return self._c.aligned(handle.tokens_per_expert)

    def _device_tokens(self, state: _State, which: int) -> torch.Tensor:
        """The first arrays of a routing's memory: rows received of each local expert (0), and rows returned (1)."""
        size = 8 * self._c.num_local_experts
        first = self._module.routing_header_bytes + which * size
        return state.memory[first : first + size].view(torch.int64)
