"""Runs random routings through buffers in low-latency mode, of any backend and device, against the oracle.

A buffer gets copies of the inputs on its device; results are compared on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from moe_ep_plugin import CapacityError, EpBuffer, LowLatencyDispatchOutput, Pending

from .cases import Place
from .checks import poison, same
from .low_latency_cases import LowLatencyCase, LowLatencyInputs

Results = dict[str, torch.Tensor | None]


class Step:
    """One dispatch and its combine on one buffer, each in two halves, checked against the oracle.

    :meth:`send`, :meth:`receive`, :meth:`send_back` and :meth:`finish`, in this order; calls of two steps may
    alternate. Whatever has been used up is overwritten, so that reading it later shows.
    """

    def __init__(self, inputs: LowLatencyInputs, buffer: EpBuffer) -> None:
        self._inputs, self._buffer = inputs, buffer
        self._device = torch.device(buffer.config.device_type)
        self._given: list[torch.Tensor] = []
        self.results: Results = {}

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the buffer's device that nobody else has, to be overwritten once it has been used."""
        copy = tensor.to(self._device, copy=True)
        self._given.append(copy)
        return copy

    def _use_up(self) -> None:
        poison(*self._given)
        self._given = []

    def _dispatch(self, topk_idx: list[np.ndarray]) -> Pending[LowLatencyDispatchOutput]:
        inputs, case, me = self._inputs, self._inputs.case, self._inputs.me
        sent = tuple(map(self._placed, inputs.sent[me])) if case.wire == "fp8_input" else self._placed(inputs.x[me])
        wire = "bf16" if case.wire == "plain" else "fp8"
        return self._buffer.low_latency_dispatch(
            sent,
            self._placed(torch.from_numpy(topk_idx[me].astype(np.int64))),
            self._placed(inputs.weights[me]) if case.weighted and case.layout == "rank" else None,
            wire=None if wire == case.heap_wire else wire,
            async_op=case.async_op,
        )

    def overflow(self) -> None:
        """The routing before its duplicates were dropped, where those fill an expert's slots: refused on all ranks."""
        crowded = self._inputs.crowded
        if crowded is None:
            return
        if self._buffer.backend != "cuda":
            with pytest.raises(CapacityError, match=f"slots for {self._inputs.case.capacity} "):
                self._dispatch(crowded.topk_idx).wait()
        else:
            out = self._dispatch(crowded.topk_idx).wait()
            assert not out.tokens_per_expert.any() and not out.num_received.any(), "rows that did not fit"
            del out
            with pytest.raises(CapacityError, match="slots for"):
                self._buffer.check()
        self._use_up()

    def send(self) -> None:
        self._pending = self._dispatch(self._inputs.routing.topk_idx)

    def receive(self) -> None:
        self._out = self._pending.wait()
        assert self._pending.wait() is self._out
        del self._pending
        self._use_up()
        self.check_received()
        out, case = self._out, self._inputs.case
        assert out.x.device.type == self._device.type
        for counts in (out.tokens_per_expert, out.num_received):
            assert (counts.device.type, counts.dtype) == (self._device.type, torch.int32)
        handle, me = out.handle, self._inputs.me
        assert (handle.layout, handle.capacity) == (case.layout, case.capacity)
        assert (handle.num_tokens, handle.num_topk) == self._inputs.routing.topk_idx[me].shape

    def check_received(self) -> None:
        """What this step received, as long as it is held."""
        inputs, case, out = self._inputs, self._inputs.case, self._out
        fp8, by_rank = case.wire != "plain", case.layout == "rank"
        x, scale = self._dense(out.x), None
        same("tokens_per_expert", out.tokens_per_expert, inputs.counts)
        same("num_received", out.num_received, torch.tensor([len(inputs.slots)], dtype=torch.int32))
        same("x", x, inputs.received([rows for rows, *_ in inputs.sent]))
        if fp8:
            assert out.scale is not None and out.scale.dtype == torch.float32
            blocks = -(-case.hidden // 128)
            if out.scale.numel():
                assert out.scale.stride() == (*(() if by_rank else (blocks * case.capacity,)), 1, case.capacity)
            scale = self._dense(out.scale)
        same("scale", scale, inputs.received([s for _, s in inputs.sent]) if fp8 else None)
        same("topk_idx", out.topk_idx, inputs.expected_topk_idx() if by_rank else None)
        same("topk_weights", out.topk_weights, inputs.expected_weights() if by_rank and case.weighted else None)
        self.results |= {"x": x, "scale": scale, "counts": out.tokens_per_expert.to("cpu", copy=True)}

    def _dense(self, slots: torch.Tensor) -> torch.Tensor:
        """The received rows among those of the slots, on the CPU; the others may be anything."""
        inputs, case = self._inputs, self._inputs.case
        groups = (inputs.num_groups,) if case.layout == "expert" else ()
        assert slots.shape == (*groups, case.capacity, *slots.shape[len(groups) + 1 :])
        rows = slots.to("cpu", copy=True).reshape(inputs.num_groups * case.capacity, slots.shape[-1])
        if rows.dtype.itemsize == 1:
            return rows.view(torch.uint8)[inputs.slots].view(rows.dtype)
        return rows[inputs.slots]

    def send_back(self) -> None:
        inputs, case, me, out = self._inputs, self._inputs.case, self._inputs.me, self._out
        groups = (inputs.num_groups,) if case.layout == "expert" else ()
        rows = torch.full((*groups, case.capacity, case.hidden), float("nan"), dtype=case.rows_dtype)
        rows.view(-1, case.hidden)[inputs.slots] = inputs.results[me]
        self._rows_given = rows
        if case.in_place:
            self._rows = self._buffer.empty_rows(out.handle, case.rows_dtype)
            assert (self._rows.shape, self._rows.dtype) == (rows.shape, rows.dtype)
            assert self._rows.device.type == self._device.type
            self._rows.copy_(rows)
        else:
            self._rows = self._placed(rows)
        self._sums = None
        if case.gives_out:
            num_tokens = len(inputs.x[me])
            self._sums = torch.full((num_tokens, case.hidden), 77.0, dtype=case.rows_dtype, device=self._device)
        self._back = self._buffer.low_latency_combine(
            self._rows,
            self._placed(torch.from_numpy(inputs.combine_idx[me].astype(np.int64))),
            self._placed(inputs.weights[me]) if case.weighted and case.layout == "expert" else None,
            out.handle,
            out=self._sums,
            # Where there is a heap these rows must not have to be copied.
            zero_copy=case.in_place and self._buffer.backend != "collective",
            wire=case.combine_wire,
            async_op=case.async_op,
        )

    def finish(self) -> Results:
        """The last half; drops all that the step holds, and returns what it brought, on the CPU."""
        out = self._out
        back = self._back.wait()
        same("rows after combine", self._rows, self._rows_given)
        if self._sums is not None:
            assert back.x is self._sums or back.x.data_ptr() == self._sums.data_ptr()
        same("combine", back.x, self._inputs.expected_sums())
        same("lost_weights", back.lost_weights, torch.zeros(len(back.x)))
        self.results["combined"] = back.x.to("cpu", copy=True)
        self._use_up()
        poison(back.x, out.x, None if out.scale is None else out.scale.transpose(-1, -2))
        poison(out.tokens_per_expert, out.num_received, out.topk_idx, out.topk_weights)
        del self._out, self._back, self._rows, self._sums
        return self.results


def ordinary_round_trip(inputs: LowLatencyInputs, buffer: EpBuffer) -> None:
    """A dispatch and a combine of the other kind: every token comes back once for each of its experts."""
    case, me = inputs.case, inputs.me
    device = buffer.config.device_type
    idx = torch.from_numpy(inputs.routing.topk_idx[me].astype(np.int64)).to(device)
    x = torch.arange(len(idx) * case.hidden).remainder(5).view(-1, case.hidden).to(device, case.dtype)
    out = buffer.dispatch(x, idx, wire="bf16")
    y = buffer.combine(out.x, out.handle)
    same("ordinary combine", y, ((idx >= 0).sum(1, keepdim=True) * x).cpu())


def run_steps(steps: Sequence[Step], order: str) -> None:
    """All calls of the steps, in one of ``low_latency_cases.ORDERS``; nothing is in flight before and after."""
    if order == "pipeline":
        # The next step's rows arrive while this one's results go back.
        current, *following = steps
        current.send()
        current.receive()
        for step in following:
            step.send()
            current.check_received()
            current.send_back()
            step.receive()
            current.check_received()
            current.finish()
            step.check_received()
            current = step
        current.send_back()
        current.finish()
    elif order == "one" or len(steps) % 2:
        for step in steps:
            step.send()
            step.receive()
            step.send_back()
            step.finish()
    else:
        for a, b in zip(steps[::2], steps[1::2], strict=True):
            a.send()
            b.send()
            if order == "pair":
                a.receive()
                a.send_back()
                b.receive()
                a.check_received()
                a.finish()
                b.send_back()
                b.finish()
            else:
                b.receive()
                a.receive()
                b.send_back()
                a.send_back()
                a.finish()
                b.check_received()
                b.finish()


def run_inputs(inputs: Sequence[LowLatencyInputs], buffer: EpBuffer) -> list[Results]:
    """Steps with these inputs on one buffer, checked; returns what each brought."""
    case = inputs[0].case
    steps = [Step(i, buffer) for i in inputs]
    for step in steps:
        step.overflow()
    if case.mixed:
        ordinary_round_trip(inputs[0], buffer)
    run_steps(steps, case.order)
    return [step.results for step in steps]


def run_case(case: LowLatencyCase, places: tuple[Place, ...], routings: int, group: int = 4) -> int:
    """All routings of a case in each place, ``group`` of them at a time; returns how many were compared."""
    with ExitStack() as stack:
        buffers = [stack.enter_context(EpBuffer(None, case.config(place))) for place in places]
        assert [b.backend for b in buffers] == [place.backend for place in places]
        for first in range(0, routings, group):
            seeds = range(first, min(first + group, routings))
            inputs = [LowLatencyInputs(case, seed, buffers[0].rank) for seed in seeds]
            results = [run_inputs(inputs, buffer) for buffer in buffers]
            for place, others in zip(places[1:], results[1:], strict=True):
                for one, other in zip(results[0], others, strict=True):
                    for name, got in one.items():
                        same(f"{name} of {places[0]} and {place}", got, other[name])
    return routings * len(places)
