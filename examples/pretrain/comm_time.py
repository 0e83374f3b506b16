"""How much of a step goes into dispatch and combine, measured in the same way for every dispatcher."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from moe_ep_plugin import Fp8Rows
from moe_ep_plugin.integrations.megatron import statistics

_Stamp = Callable[[], Any]


class _Mark(torch.autograd.Function):
    """Passes tensors through and calls one function on the way forward, another on the way back."""

    @staticmethod
    def forward(ctx: Any, forward: _Stamp, backward: _Stamp, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.backward_call = backward
        forward()
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.backward_call()
        return (None, None, *grads)


class CommTimer:
    """Times the dispatchers of a model from where tokens enter a dispatch or combine to where they leave it.

    Waiting for ranks that are late counts, as do permutations: what is left of a step is attention, experts,
    gradients and the optimizer. With CUDA the times are those of the stream.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: list[Any] = []
        self._spans: list[tuple[Any, Any]] = []
        for module in model.modules():
            dispatcher = getattr(module, "token_dispatcher", None)
            if dispatcher is not None:
                self._bracket(dispatcher, "dispatch_preprocess", "dispatch_postprocess")
                self._bracket(dispatcher, "combine_preprocess", "combine_postprocess")

    def backend(self) -> str:
        """What moves the rows: the backend of our buffer, or that of the process group for other dispatchers."""
        return str(statistics().get("backend") or dist.get_backend())

    def take_seconds(self) -> float:
        """Seconds since the last call."""
        if self._cuda:
            torch.cuda.synchronize()
            total = sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3
        else:
            total = sum(end - begin for begin, end in self._spans)
        self._spans.clear()
        self._open.clear()
        return total

    def _stamp(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self) -> None:
        self._open.append(self._stamp())

    def _end(self) -> None:
        if self._open:
            self._spans.append((self._open.pop(), self._stamp()))

    def _mark(self, values: tuple[Any, ...], forward: _Stamp, backward: _Stamp) -> tuple[Any, ...]:
        """``values`` with its floating-point tensors passed through one mark."""
        # FP8 rows have a stand-in that autograd knows.
        known = [value.grad_rows if isinstance(value, Fp8Rows) else value for value in values]
        places = [i for i, v in enumerate(known) if torch.is_tensor(v) and v.is_floating_point()]
        marked = _Mark.apply(forward, backward, *(known[i] for i in places))
        out = list(values)
        for place, tensor in zip(places, marked, strict=True):
            value = values[place]
            out[place] = replace(value, grad_rows=tensor) if isinstance(value, Fp8Rows) else tensor
        return tuple(out)

    def _bracket(self, dispatcher: Any, first: str, last: str) -> None:
        enter, leave = getattr(dispatcher, first), getattr(dispatcher, last)

        def timed_enter(*args: Any, **kwargs: Any) -> Any:
            return enter(*self._mark(args, self._begin, self._end), **kwargs)

        def timed_leave(*args: Any, **kwargs: Any) -> Any:
            out = leave(*args, **kwargs)
            several = isinstance(out, tuple)
            marked = self._mark(out if several else (out,), self._end, self._begin)
            return marked if several else marked[0]

        setattr(dispatcher, first, timed_enter)
        setattr(dispatcher, last, timed_leave)
