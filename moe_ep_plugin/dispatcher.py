"""What a model sees: dispatch and combine that autograd can go through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .buffer import EpBuffer
from .fp8 import stand_in
from .handle import DispatchHandle
from .requests import check_wire
from .types import DispatchOutput, Layout, Wire
from .wire import dequantized


@dataclass
class _Routing:
    """Arguments of a dispatch that are not differentiated, and the place for its full result."""

    buffer: EpBuffer
    topk_idx: torch.Tensor | None
    layout: Layout
    handle: DispatchHandle | None
    max_recv_tokens: int | None
    keep_fp8: bool = False
    out: DispatchOutput | None = None


class _Dispatch(torch.autograd.Function):
    """Forward: dispatch. Backward: the combine of the rows' gradients with the same handle."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, topk_weights: torch.Tensor | None, routing: _Routing
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = routing.buffer.dispatch(
            x,
            routing.topk_idx,
            topk_weights,
            layout=routing.layout,
            handle=routing.handle,
            max_recv_tokens=routing.max_recv_tokens,
            wire="fp8" if routing.keep_fp8 else None,
        )
        rows = stand_in(out.x, x.dtype) if routing.keep_fp8 else dequantized(out.x, out.scale, x.dtype)
        routing.out = out
        ctx.buffer, ctx.handle = routing.buffer, out.handle
        return rows, out.topk_weights

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_rows: torch.Tensor, grad_weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        values = grad_weights.float() if grad_weights is not None and ctx.needs_input_grad[1] else None
        out = ctx.buffer.combine_with_values(grad_rows, ctx.handle, row_values=values)
        return out.x, out.row_values, None


class _Combine(torch.autograd.Function):
    """Forward: combine. Backward: a dispatch of the tokens' gradients with the same handle."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        topk_weights: torch.Tensor | None,
        buffer: EpBuffer,
        handle: DispatchHandle,
        grad_wire: Wire,
    ) -> torch.Tensor:
        ctx.buffer, ctx.handle, ctx.grad_wire = buffer, handle, grad_wire
        ctx.save_for_backward(*(() if topk_weights is None else (rows, topk_weights)))
        return buffer.combine(rows, handle, topk_weights=topk_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None]:
        out = ctx.buffer.dispatch(grad, handle=ctx.handle, wire=ctx.grad_wire)
        grad_rows = dequantized(out.x, out.scale, grad.dtype)
        # Read once: under activation checkpointing every read would recompute.
        saved = ctx.saved_tensors
        if not saved:
            return grad_rows, None, None, None, None
        rows, weights = saved
        grad_weights = None
        if ctx.needs_input_grad[1]:
            grad_weights = torch.linalg.vecdot(rows.float(), grad_rows.float())
        return (grad_rows.float() * weights[:, None]).to(rows.dtype), grad_weights, None, None, None


class TokenDispatcher:
    """An autograd pair over a buffer.

    Gradients reach ``x`` and ``topk_weights``. The backward of a dispatch is a combine, the backward of
    a combine is a dispatch with the same handle, so every rank must run the same backwards: use the
    received rows on every rank, also where there are none.

    Args:
        buffer: The buffer to use; not owned, close it yourself.
        grad_wire: How gradients of a combine's output cross to the experts, whatever the wire of the forward is:
            ``"bf16"``, unquantised, or ``"fp8"``, e4m3 with a scale per 128 elements, dequantised where they arrive.
            Gradients that come back are sums, and cross unquantised.

    Raises:
        ConfigError: ``grad_wire`` is another word.
    """

    def __init__(self, buffer: EpBuffer, *, grad_wire: Wire = "bf16") -> None:
        check_wire(grad_wire, "grad_wire")
        self.buffer = buffer
        self.grad_wire = grad_wire

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        layout: Layout = "expert",
        handle: DispatchHandle | None = None,
        max_recv_tokens: int | None = None,
    ) -> DispatchOutput:
        """Differentiable :meth:`EpBuffer.dispatch`.

        On the FP8 wire the rows are dequantised to the dtype of ``x`` (``scale`` is None then) and the
        gradient passes the quantisation unchanged.
        """
        routing = _Routing(self.buffer, topk_idx, layout, handle, max_recv_tokens)
        rows, weights = _Dispatch.apply(x, topk_weights, routing)  # type: ignore[no-untyped-call]
        assert routing.out is not None
        return replace(routing.out, x=rows, scale=None, topk_weights=weights)

    def dispatch_fp8(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        handle: DispatchHandle | None = None,
        max_recv_tokens: int | None = None,
    ) -> DispatchOutput:
        """Differentiable dispatch in layout ``"expert"`` whose rows stay FP8: input of :class:`Fp8GroupedExperts`.

        The rows cross on the FP8 wire whatever ``EpConfig.wire`` is, and ``x`` and ``scale`` of the result are what
        arrived. Their gradient, in the dtype of the input ``x``, is taken from ``grad_rows`` of the result, whose own
        values are NaN; it crosses back unquantised. :meth:`Fp8Rows.from_dispatch` keeps the three together.

        Raises:
            ConfigError: As :meth:`EpBuffer.dispatch`.
        """
        routing = _Routing(self.buffer, topk_idx, "expert", handle, max_recv_tokens, keep_fp8=True)
        stand_in, weights = _Dispatch.apply(x, topk_weights, routing)  # type: ignore[no-untyped-call]
        assert routing.out is not None
        return replace(routing.out, grad_rows=stand_in, topk_weights=weights)

    def combine(
        self, rows: torch.Tensor, handle: DispatchHandle, *, topk_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Differentiable :meth:`EpBuffer.combine`; gradients reach ``rows`` and ``topk_weights``."""
        out: torch.Tensor = _Combine.apply(rows, topk_weights, self.buffer, handle, self.grad_wire)  # type: ignore[no-untyped-call]
        return out

    def empty_rows(self, handle: DispatchHandle, dtype: torch.dtype | None = None) -> torch.Tensor:
        """See :meth:`EpBuffer.empty_rows`."""
        return self.buffer.empty_rows(handle, dtype)
