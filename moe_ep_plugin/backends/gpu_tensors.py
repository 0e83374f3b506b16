"""Leases of a GPU heap as tensors, and completion of what is queued on streams."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..wire import FP8_DTYPE


class GpuEvent:
    """Completion of an operation on the GPU.

    Args:
        stream: The stream that the operation is queued on.
        at_once: Mark the place in the stream now, so that a wait does not wait for later work. Otherwise it is
            marked when it is first asked for, which costs nothing where, as is usual, nobody asks.
    """

    def __init__(self, stream: torch.cuda.Stream, at_once: bool) -> None:
        self._stream = stream
        self._event: torch.cuda.Event | None = None
        if at_once:
            self._recorded()

    def wait(self) -> None:
        """Make the current stream wait for the operation."""
        self._recorded().wait()

    def query(self) -> bool:
        """Whether the operation has completed."""
        return bool(self._recorded().query())

    def synchronize(self) -> None:
        """Block the calling thread until the operation has completed."""
        self._recorded().synchronize()

    def _recorded(self) -> torch.cuda.Event:
        if self._event is None:
            self._event = torch.cuda.Event()
            self._event.record(self._stream)
        return self._event


def aligned(rows: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """``rows``, or a copy where a view starts between two vectors of 16 bytes; and whether it is one."""
    return (rows, False) if rows.data_ptr() % 16 == 0 else (rows.clone(), True)


class CurrentStream:
    """The current stream of one device. ``torch.cuda.current_stream`` makes a new object at every call, slowly."""

    def __init__(self, device: torch.device) -> None:
        self._index = device.index
        self._known: dict[int, torch.cuda.Stream] = {}
        # Not public, but what torch's own compiler calls; without it everything still works.
        self._raw: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    def __call__(self) -> torch.cuda.Stream:
        """The stream; an object is made once for each."""
        if self._raw is None:
            return torch.cuda.current_stream(self._index)
        raw = self._raw(self._index)
        stream = self._known.get(raw)
        if stream is None:
            stream = self._known[raw] = torch.cuda.current_stream(self._index)
        return stream


# DLPack's code and bits of an element.
_DLPACK = {
    torch.float32: (2, 32),
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
}


def _exchanges_fp8() -> bool:
    try:
        torch.utils.dlpack.from_dlpack(torch.empty(1, dtype=FP8_DTYPE, device="cpu"))
    except (RuntimeError, BufferError):
        return False
    return True


if _exchanges_fp8():
    _DLPACK[FP8_DTYPE] = (10, 8)

Shape = tuple[int] | tuple[int, int] | tuple[int, int, int]


def array(block: Any, offset: int, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
    """A tensor over part of a block, be it a lease or bytes of torch's."""
    if isinstance(block, torch.Tensor):
        return _tensor(block, offset, dtype, shape)
    return _leased(block, offset, dtype, shape)


def _leased(block: Any, offset: int, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
    """A tensor over part of a lease, which goes back when the last of them dies."""
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype, device=torch.device("cuda", block.device))
    kind = _DLPACK.get(dtype)
    # Where torch is too old for FP8 in DLPack it crosses as bytes. Then by set_, as a view could not be modified in
    # place under autograd.
    tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(block.dlpack(offset, kind or _DLPACK[torch.uint8], shape))
    return tensor if kind is not None else _tensor(tensor, 0, dtype, shape)


def _tensor(block: torch.Tensor, offset: int, dtype: torch.dtype, shape: Shape) -> torch.Tensor:
    """A tensor over part of a block of bytes, which it keeps alive."""
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype, device=block.device)
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return torch.empty(0, dtype=dtype, device=block.device).set_(
        block.untyped_storage(), (block.storage_offset() + offset) // dtype.itemsize, shape, strides
    )


def from_bytes(rows: bytearray) -> torch.Tensor:
    """int64 counts; the fastest way there is from C++ to a tensor."""
    return torch.frombuffer(rows, dtype=torch.int64) if rows else torch.empty(0, dtype=torch.int64)
