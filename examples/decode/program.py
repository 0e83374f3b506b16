"""Runs the same work again and again: op by op, or on GPUs as a replay of CUDA graphs; and times it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

WARMUP_RUNS = 3


class Program:
    """Work that takes its input from tensors that stay where they are, and leaves its output in such.

    Args:
        work: Launches it. It must not wait for the device, and its shapes must not depend on values.
        dispatches: Low-latency dispatches in it.
        device: Where it runs.
        graph: Capture it; it is run a few times before, as libraries set themselves up in their first calls.

    Attributes:
        cycle: Call it this many times, or a multiple. Dispatches use two sets of slots in turn, and a captured one
            keeps its set: if there is an odd number of them, a second graph begins with the other set.
    """

    def __init__(self, work: Callable[[], None], *, dispatches: int, device: torch.device, graph: bool) -> None:
        self._work = work
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._next = 0
        self.cycle = 1
        if not graph:
            for _ in range(WARMUP_RUNS):
                work()
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_RUNS):
                work()
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.synchronize(device)
        self.cycle = 1 + dispatches % 2
        for _ in range(self.cycle):
            captured = torch.cuda.CUDAGraph()
            # Other threads of this process, such as gloo's, may use CUDA meanwhile.
            with torch.cuda.graph(captured, capture_error_mode="thread_local"):
                work()
            self._graphs.append(captured)

    def __call__(self) -> None:
        if not self._graphs:
            self._work()
            return
        self._graphs[self._next].replay()
        self._next = (self._next + 1) % self.cycle


class Stopwatch:
    """Times calls one by one. On a GPU it is the device's time, and the host doesn't wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[float, float] | tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, call: Callable[[], None]) -> None:
        begin = self._stamp()
        call()
        self._spans.append((begin, self._stamp()))  # type: ignore[arg-type]

    def finish(self) -> None:
        """Wait for what has been called."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def take_milliseconds(self) -> list[float]:
        """Of every call since the last time this was asked."""
        self.finish()
        spans, self._spans = self._spans, []
        return [
            begin.elapsed_time(end) if isinstance(begin, torch.cuda.Event) else 1e3 * (end - begin)  # type: ignore[arg-type, operator]
            for begin, end in spans
        ]

    def _stamp(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
