"""Times of one work of bench_low_latency.py: calls in CUDA graphs, eager ones, and both halves apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from low_latency_session import LowSession
from low_latency_works import Made, Work
from throughput_measure import Row, Schedule, repeat, time_call
from throughput_team import synchronize, tidy
from throughput_works import Call

T = TypeVar("T")
LEAD_IN_REPLAYS = 3  # Untimed; they bring the ranks' streams in step after a barrier.


def checked_call(session: LowSession, work: Work, split: bool) -> Made:
    """A work's call, after results in both sets of slots were right, and its check."""
    team = session.team
    tidy(session.device)
    call, verify = team.together(lambda: work.make(session, split))

    def once() -> None:
        out = call()
        session.buffer.check()
        verify(out)

    for _ in range(2):
        team.together(once)
    return call, verify


def capture(work: Callable[[], T], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, T]:
    """What ``work`` launches, as a graph, and what it returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = work()
    return graph, result


def graph_of(session: LowSession, call: Call, verify: Callable[[Any], None], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of calls back to back, after what a replay left was right. No output outlives this."""
    team = session.team
    stream = torch.cuda.Stream()

    def all_calls() -> Any:
        repeat(call, calls - 1)
        return call()

    def capture_calls() -> tuple[torch.cuda.CUDAGraph, Any]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            repeat(call, 2)
        torch.cuda.current_stream().wait_stream(stream)
        session.buffer.check()
        torch.cuda.synchronize()
        graph, held = capture(all_calls, stream)
        # Poison. No rank replays before all ranks have done this.
        (held if isinstance(held, torch.Tensor) else held.x).view(torch.uint8).fill_(0xFF)
        torch.cuda.synchronize()
        return graph, held

    graph, output = team.together(capture_calls)
    held = [output]
    del output

    def replay() -> None:
        graph.replay()
        session.buffer.check()
        torch.cuda.synchronize()
        verify(held.pop())

    team.together(replay)
    return graph


def replay_times(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    """Microseconds of each of many replays, back to back."""
    for _ in range(LEAD_IN_REPLAYS):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    marks[-1].synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in zip(marks, marks[1:], strict=False)]


def call_times(call: Call, times: int) -> list[float]:
    """Microseconds of each of many calls, on a CPU."""
    repeat(call, LEAD_IN_REPLAYS)
    spent = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        spent.append((time.perf_counter() - started) * 1e6)
    return spent


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of all are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def summary(by_rank: torch.Tensor) -> Row:
    """Figures from the times [ranks, replays] of a call; the slowest rank counts in each replay."""
    slowest = by_rank.max(0).values.tolist()
    return {
        "us": statistics.median(slowest),
        "us_p99": percentile(slowest, 0.99),
        "us_min": min(slowest),
        "us_max": max(slowest),
        "us_replays": [round(value, 2) for value in slowest],
        "us_per_rank": [statistics.median(times) for times in by_rank.tolist()],
    }


def measure(session: LowSession, work: Work, split: bool, *, calls: int, replays: int, eager: bool) -> Row:
    """Check a work, then time it: replays of graphs of ``calls`` calls, and eager calls if asked for."""
    stats = session.buffer.stats
    copied_out = stats.copied_out
    call, verify = checked_call(session, work, split)
    if session.device.type == "cuda":
        graph = graph_of(session, call, verify, calls)

        def timed() -> list[float]:
            synchronize(session.device)
            spent = replay_times(graph, replays)
            session.buffer.check()
            return [value / calls for value in spent]

        times = session.team.together(timed)
        del graph
    else:
        times = session.team.together(lambda: call_times(call, replays))
    row = summary(session.team.gather(torch.tensor(times, dtype=torch.float64)))
    if eager:
        row["eager_us"] = time_call(session, call, Schedule(warmup=10, calls=50, batches=5))["us"]
    row["copied_out"] = stats.copied_out - copied_out
    return row


def measure_slow(session: LowSession, work: Work) -> Row:
    """Check a work that waits for the host, then time a few eager calls."""
    call, _ = checked_call(session, work, split=False)
    row = time_call(session, call, Schedule(warmup=1, calls=2, batches=3))
    return {"us": row["us"], "us_min": row["us_min"], "us_max": row["us_max"], "eager_us": row["us"]}
