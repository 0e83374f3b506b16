"""Checks of what a caller passes to a buffer, and the validated requests that backends take."""

from __future__ import annotations

from typing import Any

import torch

from .backends.base import CombineRequest, DispatchRequest
from .config import SUPPORTED_DTYPES, EpConfig
from .errors import ConfigError
from .handle import DispatchHandle, LowLatencyHandle
from .types import Event, Layout, Wire
from .wire import FP8_DTYPE, num_scales


class RequestChecker:
    """Turns arguments into requests, or raises ConfigError with argument, value, limit and remedy.

    Args:
        config: The buffer's settings.
        buffer_id: What handles of this buffer carry.
    """

    def __init__(self, config: EpConfig, buffer_id: int) -> None:
        self.config = config
        self._id = buffer_id
        self._device_type = config.device_type
        self._copied = False
        self._fitting_dtypes: set[torch.dtype] = set()

    def check_handle(self, handle: DispatchHandle) -> None:
        """Raise ConfigError unless ``handle`` is one of this buffer's."""
        if not isinstance(handle, DispatchHandle):
            raise ConfigError.of(
                "handle", type(handle).__name__, "a DispatchHandle is needed", "pass the handle of a dispatch"
            )
        self.check_owner(handle)

    def check_owner(self, handle: DispatchHandle | LowLatencyHandle) -> None:
        """Raise ConfigError if ``handle`` is another buffer's."""
        if handle.buffer_id != self._id:
            raise ConfigError.of("handle", "of another EpBuffer", "routing belongs to its buffer", "use its own buffer")

    def check_dtype(self, name: str, dtype: torch.dtype) -> None:
        """Raise ConfigError unless rows of ``dtype`` are supported and fit the heap."""
        if isinstance(dtype, torch.dtype) and dtype in self._fitting_dtypes:
            return
        if dtype not in SUPPORTED_DTYPES:
            raise ConfigError.of(name, dtype, f"rows must be one of {SUPPORTED_DTYPES}", "cast the tensor")
        if dtype.itemsize > self.config.dtype.itemsize:
            raise ConfigError.of(
                name,
                dtype,
                f"the heap is sized for elements of {self.config.dtype}",
                f"build the EpBuffer with EpConfig(dtype={dtype})",
            )
        self.config.check_row_bytes(dtype)
        self._fitting_dtypes.add(dtype)

    def _check_tensor(
        self, name: str, tensor: Any, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError.of(name, type(tensor).__name__, "a tensor is needed", "pass a torch.Tensor")
        if tensor.device.type != self._device_type:
            raise ConfigError.of(
                f"{name}.device",
                tensor.device,
                f"the buffer works on {self._device_type!r}",
                "move the tensor, or set EpConfig(device=...)",
            )
        if not _fits(tensor.shape, shape):
            wanted = "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
            raise ConfigError.of(f"{name}.shape", list(tensor.shape), f"{wanted} is needed", "reshape it")
        if dtype is not None and tensor.dtype != dtype:
            raise ConfigError.of(f"{name}.dtype", tensor.dtype, f"{dtype} is needed", f"use {name}.to({dtype})")
        rows: torch.Tensor = tensor.detach() if tensor.requires_grad else tensor
        if rows.is_contiguous():
            return rows
        self._copied = True
        return rows.contiguous()

    def _check_rows(
        self, x: torch.Tensor | tuple[torch.Tensor, torch.Tensor], wire: Wire
    ) -> tuple[torch.Tensor, torch.Tensor | None, Wire]:
        """Rows, their scales if they are quantised already, and how they cross."""
        config = self.config
        check_wire(wire)
        if not isinstance(x, tuple):
            rows = self._check_tensor("x", x, (None, config.hidden))
            self.check_dtype("x.dtype", rows.dtype)
            return rows, None, wire
        if len(x) != 2:
            raise ConfigError.of("x", f"a tuple of {len(x)}", "it must be rows or (q, scale)", "pass two tensors")
        rows = self._check_tensor("x[0]", x[0], (None, config.hidden), FP8_DTYPE)
        scale = self._check_tensor("x[1]", x[1], (rows.shape[0], num_scales(config.hidden)), torch.float32)
        return rows, scale, "fp8"

    def _check_idx(self, topk_idx: torch.Tensor, num_tokens: int) -> torch.Tensor:
        topk_idx = self._check_tensor("topk_idx", topk_idx, (num_tokens, None), torch.int64)
        num_topk = topk_idx.shape[1]
        if not 1 <= num_topk <= self.config.num_topk:
            raise ConfigError.of(
                "topk_idx.shape[1]",
                num_topk,
                f"config.num_topk is {self.config.num_topk}",
                "raise EpConfig.num_topk, or drop columns",
            )
        return topk_idx

    def dispatch_request(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        layout: Layout,
        handle: DispatchHandle | None,
        max_recv_tokens: int | None,
        wire: Wire | None,
        *,
        num_sms: int | None = None,
        async_op: bool = False,
        previous_event: Event | None = None,
    ) -> DispatchRequest:
        """Arguments of :meth:`EpBuffer.dispatch`, checked."""
        config = self.config
        self._copied = False
        if layout not in ("expert", "rank"):
            raise ConfigError.of("layout", repr(layout), "it must be 'expert' or 'rank'", "choose one of these")
        rows, scale, wire = self._check_rows(x, config.wire if wire is None else wire)
        num_tokens = rows.shape[0]
        if handle is not None:
            self.check_handle(handle)
            if topk_idx is not None:
                raise ConfigError.of("topk_idx", "given", "handle carries the routing already", "pass one of the two")
            if num_tokens != handle.num_tokens:
                raise ConfigError.of(
                    "x.shape[0]", num_tokens, f"handle routes {handle.num_tokens} tokens", "dispatch the same tokens"
                )
            if max_recv_tokens not in (None, handle.max_recv_tokens):
                raise ConfigError.of(
                    "max_recv_tokens", max_recv_tokens, f"handle has {handle.max_recv_tokens}", "leave it out"
                )
            layout, max_recv_tokens, num_topk = handle.layout, handle.max_recv_tokens, handle.num_topk
        else:
            if topk_idx is None:
                raise ConfigError.of("topk_idx", None, "routing is needed", "pass topk_idx or handle")
            if num_tokens > config.max_tokens_per_rank:
                raise ConfigError.of(
                    "x.shape[0]",
                    num_tokens,
                    f"max_tokens_per_rank is {config.max_tokens_per_rank}",
                    f"build the EpBuffer with max_tokens_per_rank >= {num_tokens}",
                )
            topk_idx = self._check_idx(topk_idx, num_tokens)
            num_topk = topk_idx.shape[1]
        if topk_weights is not None:
            topk_weights = self._check_tensor("topk_weights", topk_weights, (num_tokens, num_topk), torch.float32)
        whole = isinstance(max_recv_tokens, int) and 0 <= max_recv_tokens < 1 << 31
        if max_recv_tokens is not None and not whole:
            raise ConfigError.of(
                "max_recv_tokens", repr(max_recv_tokens), "it must be None or from 0 to 2^31 - 1", "leave it out"
            )
        return DispatchRequest(
            x=rows,
            scale=scale,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            layout=layout,
            handle=handle,
            max_recv_tokens=max_recv_tokens,
            wire=wire,
            copied=self._copied,
            num_sms=checked_sms(num_sms),
            async_op=async_op,
            previous_event=previous_event,
        )

    def combine_request(
        self,
        rows: torch.Tensor,
        handle: DispatchHandle,
        row_weights: torch.Tensor | None,
        row_values: torch.Tensor | None,
        *,
        num_sms: int | None = None,
        async_op: bool = False,
        previous_event: Event | None = None,
    ) -> CombineRequest:
        """Arguments of :meth:`EpBuffer.combine_with_values`, checked."""
        self._copied = False
        self.check_handle(handle)
        rows = self._check_tensor("rows", rows, (handle.num_rows, self.config.hidden))
        self.check_dtype("rows.dtype", rows.dtype)
        if row_weights is not None:
            if handle.layout == "rank":
                raise ConfigError.of(
                    "topk_weights",
                    "given",
                    "rows of layout 'rank' are summed over local experts already",
                    "apply the weights before combine",
                )
            row_weights = self._check_tensor("topk_weights", row_weights, (handle.num_rows,), torch.float32)
        if row_values is not None:
            shape = (handle.num_rows,) if handle.layout == "expert" else (handle.num_rows, handle.num_topk)
            row_values = self._check_tensor("row_values", row_values, shape, torch.float32)
        return CombineRequest(
            rows=rows,
            handle=handle,
            row_weights=row_weights,
            row_values=row_values,
            copied=self._copied,
            num_sms=checked_sms(num_sms),
            async_op=async_op,
            previous_event=previous_event,
        )


def check_wire(wire: Wire, name: str = "wire") -> None:
    """Raise ConfigError unless ``wire``, the argument ``name``, is a way for rows to cross."""
    if wire not in ("bf16", "fp8"):
        raise ConfigError.of(name, repr(wire), "it must be 'bf16' or 'fp8'", "choose one of these")


def _fits(have: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    fits = len(have) == len(wanted)
    for size, limit in zip(have, wanted, strict=False):  # A loop: a generator takes twice as long, at every call.
        fits = fits and (limit is None or size == limit)
    return fits


def checked_sms(num_sms: int | None) -> int | None:
    """``num_sms``, or ConfigError if it is no number of SMs."""
    whole = isinstance(num_sms, int) and not isinstance(num_sms, bool) and num_sms >= 1
    if num_sms is not None and not whole:
        raise ConfigError.of(
            "num_sms", repr(num_sms), "it must be None or a whole number of at least 1", "leave it out"
        )
    return num_sms
