"""A GEMM between the halves of low-latency operations: its time, and a timeline of one step."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from low_latency_measure import capture, summary
from low_latency_session import LowSession
from throughput_measure import Row
from throughput_team import tidy

LEAD_IN_STEPS = 4
OURS = re.compile(r"low_(dispatch|receive|combine)_kernel")
MARKS = ("dispatch: send", "dispatch: wait()", "combine: send", "combine: wait()", "GEMM")
Graphs = list[torch.cuda.CUDAGraph]


class Gemm:
    """A product of bf16 matrices [m, k] and [k, n], in memory of its own."""

    def __init__(self, sizes: tuple[int, int, int], device: torch.device) -> None:
        m, k, n = sizes
        self.a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        self.b = torch.randn(k, n, device=device, dtype=torch.bfloat16)
        self.c = torch.empty(m, n, device=device, dtype=torch.bfloat16)
        self()
        torch.cuda.synchronize()

    def __call__(self) -> None:
        """Launch it."""
        torch.mm(self.a, self.b, out=self.c)


class Halves:
    """Graphs of the halves of one operation, and of the whole, for each of the two sets of slots."""

    def __init__(self, session: LowSession, begin: Callable[[int, bool], Any], stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            for split in (True, False):
                for turn in range(2):
                    begin(turn, split).wait()
        session.buffer.check()
        self.send: Graphs = []
        self.receive: Graphs = []
        self.whole: Graphs = []
        for turn in range(2):
            graph, pending = capture(lambda turn=turn: begin(turn, True), stream)  # type: ignore[misc]
            self.send.append(graph)
            self.receive.append(capture(lambda pending=pending: _received(pending), stream)[0])  # type: ignore[misc]
        for turn in range(2):
            self.whole.append(capture(lambda turn=turn: _received(begin(turn, False)), stream)[0])  # type: ignore[misc]


def _received(pending: Any) -> None:
    """Receive, and drop what came."""
    pending.wait()


def measure_overlap(session: LowSession, gemm: Gemm, steps: int) -> Row:
    """Times of the GEMM alone, after whole operations, and between their halves."""
    team, stream = session.team, torch.cuda.Stream()
    graph = team.together(lambda: capture(gemm, stream)[0])
    row: Row = {"steps": steps}

    def figures(before: Graphs, after: Graphs) -> Row:
        times = team.together(lambda: _gemm_times(session, before, graph, after, steps))
        return summary(team.gather(torch.tensor(times, dtype=torch.float64)))

    row["alone"] = figures([], [])
    for what, make in (("dispatch", _dispatches), ("combine", _combines)):
        halves = team.together(lambda make=make: Halves(session, make(session), stream))  # type: ignore[misc]
        done: list[Row] = []
        between: list[Row] = []
        for _ in range(2):  # In turn, so that a drift meets both alike.
            done.append(figures(halves.whole, []))
            between.append(figures(halves.send, halves.receive))
        row[f"{what}_done"], row[f"{what}_between"] = _merged(done), _merged(between)
        us = row[f"{what}_between"]["us"]
        row[f"{what}_percent"] = (us / row[f"{what}_done"]["us"] - 1) * 100
        row[f"{what}_percent_of_alone"] = (us / row["alone"]["us"] - 1) * 100
    return row


def _merged(parts: list[Row]) -> Row:
    """Figures over all steps of several measurements."""
    merged = summary(torch.tensor([[us for part in parts for us in part["us_replays"]]], dtype=torch.float64))
    merged["us_per_rank"] = [statistics.mean(us) for us in zip(*(part["us_per_rank"] for part in parts), strict=True)]
    return merged


def _dispatches(session: LowSession) -> Callable[[int, bool], Any]:
    return lambda turn, split: session.send("fp8", split)


def _combines(session: LowSession) -> Callable[[int, bool], Any]:
    turns = session.dispatched(leased=True)
    outs = [torch.empty_like(session.data.x) for _ in turns]

    def begin(turn: int, split: bool) -> Any:
        rows, handle = turns[turn]
        return session.send_back(rows, handle, split=split, out=outs[turn], zero_copy=True)

    return begin


def _gemm_times(
    session: LowSession, before: Graphs, gemm: torch.cuda.CUDAGraph, after: Graphs, steps: int
) -> list[float]:
    """Microseconds of the GEMM alone in each of many steps; all launches of a run are queued ahead."""
    marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(LEAD_IN_STEPS + steps)]
    torch.cuda.synchronize()
    for step, (start, end) in enumerate(marks):
        if before:
            before[step % 2].replay()
        start.record()
        gemm.replay()
        end.record()
        if after:
            after[step % 2].replay()
    session.buffer.check()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in marks[LEAD_IN_STEPS:]]


def trace_step(session: LowSession, gemm: Gemm, path: str | None) -> Row:
    """One eager step under rank 0's profiler: a GEMM between the halves of the dispatch, and of the combine."""
    from torch.profiler import ProfilerActivity, profile, record_function

    team = session.team
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]

    def step() -> None:
        with record_function("dispatch: send"):
            sent = session.send("fp8")
        with record_function("GEMM"):
            gemm()
        with record_function("dispatch: wait()"):
            received = sent.wait()
        rows = session.buffer.empty_rows(received.handle)
        with record_function("combine: send"):
            sent_back = session.send_back(rows, received.handle, zero_copy=True)
        with record_function("GEMM"):
            gemm()
        with record_function("combine: wait()"):
            sent_back.wait()

    def finish() -> None:
        torch.cuda.synchronize()
        session.buffer.check()

    def warm_up() -> None:
        for _ in range(2):
            step()
        finish()

    def start() -> None:  # The first use takes seconds, in which peers should not wait in a kernel.
        if team.rank == 0:
            with profile(activities=activities):
                torch.ones(1, device=session.device).add_(1)
                torch.cuda.synchronize()

    def traced() -> Row:
        if team.rank != 0:
            step()
            finish()
            return {}
        with profile(activities=activities) as seen:
            step()
            torch.cuda.synchronize()
        session.buffer.check()
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # Older versions of torch refuse to write over a file.
                Path(path).unlink()
            seen.export_chrome_trace(path)
        return timeline(seen.events())

    tidy(session.device)
    team.together(warm_up)
    team.together(start)
    return team.together(traced)


def timeline(events: Any) -> Row:
    """From a profiler's events: the kernels in order, how many are ours, and how many of those run during a GEMM."""
    from torch.autograd import DeviceType

    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == DeviceType.CUDA
        and event.name not in MARKS
        and not event.name.lower().startswith(("memcpy", "memset"))
    )
    ours = [kernel for kernel in kernels if OURS.search(kernel[2])]
    gemms = [kernel for kernel in kernels if not OURS.search(kernel[2])]
    if not gemms or not ours:
        raise ValueError(f"the profiler saw {len(ours)} kernels of ours and {len(gemms)} others, not both")
    during = [ours_ for ours_ in ours if any(ours_[0] < gemm[1] and gemm[0] < ours_[1] for gemm in gemms)]
    first = kernels[0][0]
    return {
        "kernels": len(ours),
        "during_gemm": len(during),
        "timeline": [{"name": name[:100], "start_us": s - first, "end_us": e - first} for s, e, name in kernels],
    }
