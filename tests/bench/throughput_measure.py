"""Measurements of one work: its time, eager and in a CUDA graph, and its launches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from throughput_session import Session
from throughput_works import Call, Work

Row = dict[str, Any]

LEAD_IN_CALLS = 2  # Untimed calls that bring the ranks' streams in step after a barrier.


@dataclass(frozen=True)
class Schedule:
    """Calls of one measurement."""

    warmup: int
    calls: int
    batches: int


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Microseconds between the start and the end of what ``run`` puts on the current stream."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e6
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def repeat(call: Call, times: int) -> None:
    """Call back to back; an output dies when the next call has returned."""
    held = None
    for _ in range(times):
        held = call()  # noqa: F841


def copy_bytes_per_s(device: torch.device, size: int) -> float:
    """Bytes a second, read and written, of copies of ``size`` bytes."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    repeat(lambda: target.copy_(source), 3)
    times = [timed(lambda: target.copy_(source), device) for _ in range(10)]  # type: ignore[arg-type]
    return 2 * size / statistics.median(times) * 1e6


def checked_call(session: Session, work: Work) -> tuple[Call, Callable[[Any], None]]:
    """A work's call, after one call whose result was right, and its check."""
    team = session.team
    call, verify = team.together(lambda: work.make(session))

    def first() -> None:
        out = call()
        session.buffer.check()
        verify(out)

    team.together(first)
    return call, verify


def time_call(session: Session, call: Call, schedule: Schedule) -> Row:
    """Microseconds of a call, see bench_throughput.py."""

    def batch(calls: int) -> float:
        repeat(call, LEAD_IN_CALLS)
        spent = timed(lambda: repeat(call, calls), session.device)
        session.buffer.check()
        return spent / calls

    def all_batches() -> list[float]:
        session.team.together(lambda: batch(schedule.warmup))
        return [session.team.together(lambda: batch(schedule.calls)) for _ in range(schedule.batches)]

    by_rank = session.team.gather(torch.tensor(all_batches(), dtype=torch.float64))
    slowest = by_rank.max(0).values.tolist()
    return {
        "us": statistics.median(slowest),
        "us_min": min(slowest),
        "us_max": max(slowest),
        "us_batches": slowest,
        "us_per_rank": [statistics.median(times) for times in by_rank.tolist()],
    }


def measure(session: Session, work: Work, schedule: Schedule) -> Row:
    """One row: check, then time."""
    stats = session.buffer.stats
    before = (stats.operations, stats.staged, stats.copied_out)
    call, _ = checked_call(session, work)
    row = time_call(session, call, schedule)
    operations, staged, copied_out = (
        now - then for now, then in zip((stats.operations, stats.staged, stats.copied_out), before, strict=True)
    )
    return row | {"operations": operations, "staged": staged, "copied_out": copied_out}


def time_graph(session: Session, work: Work, schedule: Schedule) -> Row:
    """Capture one call, check what a replay gives, time replays."""
    team = session.team
    call, verify = checked_call(session, work)

    def capture() -> tuple[torch.cuda.CUDAGraph, Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            repeat(call, 3)
        torch.cuda.current_stream().wait_stream(stream)
        session.buffer.check()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            held = call()
        # Poison. No rank replays before all ranks have done this.
        (held if isinstance(held, torch.Tensor) else held.x).fill_(float("nan"))
        torch.cuda.synchronize()
        return graph, held

    graph, held = team.together(capture)

    def first() -> None:
        graph.replay()
        session.buffer.check()
        torch.cuda.synchronize()
        verify(held)

    team.together(first)
    return time_call(session, graph.replay, schedule)


def count_launches(session: Session, work: Work, calls: int = 4) -> Row:
    """Kernels, and copies and fills, of one call, as rank 0's profiler sees them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    team = session.team
    call, _ = checked_call(session, work)

    def start() -> None:  # The first use takes seconds, in which peers should not wait in a kernel.
        if team.rank == 0:
            with profile(activities=[ProfilerActivity.CUDA]):
                torch.ones(1, device=session.device).add_(1)
                torch.cuda.synchronize()

    def count() -> list[str]:
        if team.rank != 0:
            repeat(call, calls)
            session.buffer.check()
            return []
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            repeat(call, calls)
            torch.cuda.synchronize()
        session.buffer.check()
        return [event.name for event in seen.events() if event.device_type == DeviceType.CUDA]

    team.together(start)
    names = team.together(count)
    copies = [n for n in names if n.lower().startswith(("memcpy", "memset"))]
    kernels = [n.replace("(anonymous namespace)::", "").split("(")[0][:80] for n in names if n not in copies]
    return {"kernels": len(kernels) / calls, "copies": len(copies) / calls, "names": sorted(set(kernels))}
