"""Low-latency mode of the CUDA backend: fixed slots in the heap, one launch a half or one for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..bootstrap import exchange
from ..errors import ConfigError, StateError
from ..handle import LowLatencyHandle
from ..types import LowLatencyCombineOutput, LowLatencyDispatchOutput
from ..wire import FP8_DTYPE, num_scales
from .base import BackendContext, LowLatencyCombineRequest, LowLatencyDispatchRequest
from .gpu_tensors import CurrentStream, GpuEvent, aligned, array
from .heap import ELEMENT_CODES, HeapBackend, address_of, logger

if TYPE_CHECKING:
    _Base = HeapBackend
else:
    _Base = object

# Where tensors of results lie in a handle's memory; see LowHeader in csrc/cuda/low_state.h.
_RECEIVED_AT, _COUNTS_AT = 12, 16


@dataclass(slots=True)
class _Routing:
    """What a handle keeps: device memory, and the stream that it belongs to; use on another one must be recorded."""

    memory: torch.Tensor
    stream: torch.cuda.Stream


class CudaLowLatency(_Base):
    """What :class:`CudaBackend` is made of in this mode."""

    _c: BackendContext
    _device: torch.device
    _current_stream: CurrentStream

    if TYPE_CHECKING:

        def _sms(self, asked: int | None) -> int: ...

    def low_latency_dispatch(self, request: LowLatencyDispatchRequest) -> Callable[[], LowLatencyDispatchOutput]:
        """See :class:`Backend`."""
        communicator = self._connected()
        x, _ = aligned(request.x)
        self._check_devices(x, request.scale, request.topk_idx, request.topk_weights)
        num_tokens, num_topk = request.topk_idx.shape
        sent_on = self._current_stream()
        memory = torch.empty(
            communicator.low_routing_bytes(num_tokens, num_topk), dtype=torch.uint8, device=self._device
        )
        index = request.sequence % 2
        quantize = request.wire == "fp8" and request.scale is None
        communicator.low_dispatch(
            x=x.data_ptr(),
            element=ELEMENT_CODES[x.dtype],
            scales=address_of(request.scale),
            num_tokens=num_tokens,
            hidden=self._c.config.hidden,
            topk_idx=request.topk_idx.data_ptr(),
            topk=num_topk,
            weights=address_of(request.topk_weights),
            quantize=quantize,
            power_of_two=self._c.config.power_of_two_scales,
            routing_memory=memory.data_ptr(),
            index=index,
            receives=not request.async_op,
            num_sms=self._sms(request.num_sms),
            stream=sent_on.cuda_stream,
        )
        event = None if request.async_op else GpuEvent(sent_on, at_once=False)
        handle = self._c.low_latency_handle(request, _Routing(memory, sent_on))
        dtype = FP8_DTYPE if request.wire == "fp8" else x.dtype
        has_weights = request.topk_weights is not None

        def receive() -> LowLatencyDispatchOutput:
            stream = self._receive_on(sent_on, event, memory)
            if event is None:
                self._connected().low_receive(
                    routing_memory=memory.data_ptr(),
                    num_tokens=num_tokens,
                    topk=num_topk,
                    index=index,
                    stream=stream.cuda_stream,
                )
            return self._received_slots(handle, dtype, has_weights, stream)

        return receive

    def low_latency_combine(self, request: LowLatencyCombineRequest) -> Callable[[], LowLatencyCombineOutput]:
        """See :class:`Backend`."""
        communicator, config, handle = self._connected(), self._c.config, request.handle
        rows, _ = aligned(request.rows)
        self._check_devices(rows, request.topk_idx, request.topk_weights, request.out)
        sent_on = self._current_stream()
        shape = (handle.num_tokens, config.hidden)
        arguments: dict[str, Any] = {
            "rows": rows.data_ptr(),
            "element": ELEMENT_CODES[rows.dtype],
            "num_tokens": handle.num_tokens,
            "hidden": config.hidden,
            "topk_idx": request.topk_idx.data_ptr(),
            "topk": handle.num_topk,
            "weights": address_of(request.topk_weights),
            "quantize": request.wire == "fp8",
            "power_of_two": config.power_of_two_scales,
            "routing_memory": handle.state.memory.data_ptr(),
            "index": handle.index,
            "num_sms": self._sms(request.num_sms),
        }
        memory: torch.Tensor = handle.state.memory
        if sent_on is not handle.state.stream:
            memory.record_stream(sent_on)

        def run(stream: torch.cuda.Stream, *, sends: bool) -> LowLatencyCombineOutput:
            x = request.out
            if x is None:
                x = torch.empty(shape, dtype=rows.dtype, device=self._device)
            lost = torch.empty(shape[0], dtype=torch.float32, device=self._device)
            copied = self._connected().low_combine(
                **arguments,
                out=x.data_ptr(),
                lost=lost.data_ptr(),
                sends=sends,
                receives=True,
                stream=stream.cuda_stream,
            )
            self._c.stats.staged += copied
            return LowLatencyCombineOutput(x=x, lost_weights=lost)

        if not request.async_op:
            output, event = run(sent_on, sends=True), GpuEvent(sent_on, at_once=False)

            def received() -> LowLatencyCombineOutput:
                self._receive_on(sent_on, event, output.x, output.lost_weights)
                return output

            return received

        self._c.stats.staged += communicator.low_combine(
            **arguments, out=0, lost=0, sends=True, receives=False, stream=sent_on.cuda_stream
        )

        def receive() -> LowLatencyCombineOutput:
            stream = self._receive_on(sent_on, None, memory, rows, request.topk_idx, request.topk_weights)
            return run(stream, sends=False)

        return receive

    def low_latency_rows(self, handle: LowLatencyHandle, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`Backend`."""
        block = self._low_block(handle, 0, 0, 0, self._current_stream())
        shape: Any = (*self._c.low_latency_slots, self._c.config.hidden)
        return array(block, block.rows, dtype, shape)

    def reads_in_place(self, rows: torch.Tensor, handle: LowLatencyHandle) -> bool:
        """See :class:`Backend`."""
        return rows.numel() == 0 or bool(rows.data_ptr() == self._connected().low_rows_address(handle.index))

    def reads_registered(self, request: LowLatencyCombineRequest) -> bool:
        """See :class:`Backend`."""
        rows = request.rows
        if request.wire != "bf16" or request.async_op or self._c.config.mask_on_timeout or rows.data_ptr() % 16:
            return False
        return bool(self._connected().note_rows(rows.data_ptr()))

    def register_rows(self, rows: tuple[torch.Tensor, ...]) -> int:
        """See :class:`Backend`."""
        communicator = self._connected()
        if self._c.config.mask_on_timeout:
            return 0
        if masked := self.masked_ranks():
            raise StateError(
                f"register_rows takes all ranks, but {list(masked)} are masked; let the experts write to empty_rows"
            )
        torch.cuda.synchronize(self._device)
        communicator.forget_rows(all=False)
        wrong = None
        try:
            self._check_devices(*rows)
        except ConfigError as error:  # The other ranks must hear of it.
            wrong = error
        else:
            for tensor in rows:
                communicator.note_rows(tensor.data_ptr())
        return self._share_rows(wrong)

    def unregister_rows(self) -> None:
        """See :class:`Backend`."""
        communicator = self._connected()
        torch.cuda.synchronize(self._device)
        communicator.forget_rows(all=True)
        self._share_rows(None)

    def _share_rows(self, wrong: ConfigError | None) -> int:
        """Let all ranks map what each has noted; returns this rank's bytes that are registered then."""
        communicator, me = self._connected(), self._c.rank
        mine, refused = communicator.offer_rows()
        offered = [(index, number, handle.hex()) for index, number, handle in mine]
        everyone = self._tell({"wrong": wrong and str(wrong), "offers": offered})
        if wrong is not None:
            raise wrong
        for rank, message in enumerate(everyone):
            if message["wrong"] is not None:
                raise ConfigError.of("rows", f"those of rank {rank}", message["wrong"], "register again without them")
        mapped: dict[str, list[int]] = {}
        for rank, message in enumerate(everyone):
            if rank == me:
                continue
            segments = [(index, number, bytes.fromhex(handle)) for index, number, handle in message["offers"]]
            mapped[str(rank)], reason = communicator.map_rows(rank, segments)
            refused = refused or reason
        others = [message["mapped"] for rank, message in enumerate(self._tell({"mapped": mapped})) if rank != me]
        by_all = [index for index, _, _ in mine if all(index in other[str(me)] for other in others)]
        if refused:
            logger.warning(
                "moe_ep_plugin: some memory of rows can't be registered (%s), and is copied from as before; memory of "
                "cudaMallocAsync and of expandable segments (PYTORCH_CUDA_ALLOC_CONF) can't",
                refused,
            )
        return int(communicator.commit_rows(by_all))

    def _tell(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """What every rank says, by rank."""
        context = self._c
        return exchange(context.group, context.num_ranks, message, context.config.timeout_s, "register_rows")

    def low_latency_held(self, index: int) -> bool:
        """See :class:`Backend`."""
        return bool(self._connected().low_held(index))

    def mask_ranks(self, ranks: tuple[int, ...]) -> None:
        """See :class:`Backend`."""
        self._check_others(ranks)
        self._connected().low_mask(list(ranks), stream=self._current_stream().cuda_stream)

    def masked_ranks(self) -> tuple[int, ...]:
        """See :class:`Backend`."""
        return tuple(self._connected().low_masked())

    def _check_devices(self, *tensors: torch.Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None and tensor.device != self._device:
                raise ConfigError.of(
                    "a tensor's device", tensor.device, f"the buffer's heap is on {self._device}", "move the tensor"
                )

    def _receive_on(
        self, sent_on: torch.cuda.Stream, event: GpuEvent | None, *used: torch.Tensor | None
    ) -> torch.cuda.Stream:
        """The current stream, made to follow ``event``, where it isn't the one that was sent on; it uses tensors."""
        stream = self._current_stream()
        if stream is not sent_on:
            if event is not None:
                event.wait()
            for tensor in used:
                if tensor is not None:
                    tensor.record_stream(stream)
        return stream

    def _low_block(
        self, handle: LowLatencyHandle, row_bytes: int, scale_bytes: int, weight_bytes: int, stream: torch.cuda.Stream
    ) -> Any:
        return self._connected().low_block(
            handle.index,
            row_bytes=row_bytes,
            scale_bytes=scale_bytes,
            weight_bytes=weight_bytes,
            index_bytes=8 * handle.num_topk if handle.layout == "rank" else 0,
            stream=stream.cuda_stream,
        )

    def _received_slots(
        self, handle: LowLatencyHandle, dtype: torch.dtype, has_weights: bool, stream: torch.cuda.Stream
    ) -> LowLatencyDispatchOutput:
        hidden = self._c.config.hidden
        block = self._low_block(
            handle,
            row_bytes=hidden * dtype.itemsize,
            scale_bytes=4 * num_scales(hidden) if dtype == FP8_DTYPE else 0,
            weight_bytes=4 * handle.num_topk if has_weights else 0,
            stream=stream,
        )
        memory: torch.Tensor = handle.state.memory
        counts = memory[_COUNTS_AT : _COUNTS_AT + 4 * self._c.num_local_experts]
        return self._low_latency_output(
            handle,
            dtype,
            has_weights,
            counts=(counts.view(torch.int32), memory[_RECEIVED_AT:_COUNTS_AT].view(torch.int32)),
            offsets=block.offsets[:4],
            array=lambda offset, dtype, shape: array(block, offset, dtype, shape),
        )
