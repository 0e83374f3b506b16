"""Halves of low-latency operations on the CUDA backend: on streams of their own, and with compute between them."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from moe_ep_plugin import EpBuffer

from .helpers import DEVICE, Mistakes, finish, integers, kernel_tests, needs_cuda
from .test_low_latency_graphs_cuda import TOKENS, WIDTH, Layer, make_buffer

pytestmark = [*kernel_tests, needs_cuda]


def ready_buffer(wire: str = "bf16") -> EpBuffer:
    """A buffer whose kernels are all loaded: that may wait for everything that is on the GPU."""
    buffer = make_buffer(wire)
    for async_op in (False, True):
        Layer(buffer, wire, async_op=async_op).run()
    matrix = torch.eye(1024, device=DEVICE)
    matrix @ matrix
    finish()
    dist.barrier()
    return buffer


def halves_elsewhere(rounds: int) -> int:
    """Each half on a stream of its own, with matrices multiplied in between; all that is used up is overwritten."""
    main, *others = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()
    mistakes = Mistakes()
    with ready_buffer() as buffer:
        layer = Layer(buffer, "bf16")
        matrix = integers(7 + buffer.rank, 1024, 1024, low=-1, high=2).to(DEVICE)
        product = matrix @ matrix
        finish()
        for step in range(rounds):
            layer.load(step)
            x, idx, weights = layer.x.clone(), layer.idx.clone(), layer.weights.clone()
            receives, sends_back, finishes = (others[(step + i) % 2] if (step + i) % 3 else main for i in range(3))
            pending = buffer.low_latency_dispatch(x, idx, async_op=True)
            for _ in range(3):
                mistakes.compare(matrix @ matrix, product)
            x.fill_(float("nan"))
            receives.wait_stream(main)
            with torch.cuda.stream(receives):
                out = pending.wait()
                rows = out.x * layer.multiples
                rows.record_stream(sends_back)
            sends_back.wait_stream(receives)
            with torch.cuda.stream(sends_back):
                if step % 2:
                    rows = buffer.empty_rows(out.handle).copy_(rows)
                back_pending = buffer.low_latency_combine(rows, idx, weights, out.handle, async_op=True)
            with torch.cuda.stream(others[step % 2]):
                mistakes_there = matrix @ matrix
            finishes.wait_stream(sends_back)
            with torch.cuda.stream(finishes):
                back = back_pending.wait()
            for stream in others:
                main.wait_stream(stream)
            mistakes.compare(back.x, layer.expected(step))
            mistakes.compare(mistakes_there, product)
            idx.fill_(1 << 40)
            weights.fill_(float("nan"))
            finish()  # Memory of one stream is freed on another below.
            del pending, out, rows, back_pending, back, mistakes_there
        buffer.check()
        assert mistakes.none()
    return rounds


def test_halves_on_other_streams_with_compute_between_them(ranks):
    assert ranks(3).run(halves_elsewhere, 30) == [30] * 3


def drops_everything_early(rounds: int) -> int:
    """Inputs go as soon as both halves are queued; what takes their memory must come after their use."""
    mistakes = Mistakes()
    with ready_buffer() as buffer:
        layer = Layer(buffer, "bf16")
        for step in range(rounds):
            layer.load(step)
            x, idx, weights = layer.x.clone(), layer.idx.clone(), layer.weights.clone()
            pending = buffer.low_latency_dispatch(x, idx, async_op=True)
            del x
            junk = [torch.full_like(layer.x, float("nan"))]
            out = pending.wait()
            rows = out.x * layer.multiples
            back = buffer.low_latency_combine(rows, idx, weights, out.handle, async_op=True).wait()
            del pending, rows, idx, weights, out
            junk += [torch.full_like(layer.weights, float("nan")), torch.full_like(layer.idx, 1 << 40)]
            junk += [torch.full((8 * TOKENS, WIDTH), float("nan"), device=DEVICE)]
            mistakes.compare(back.x, layer.expected(step))
            del junk, back
        buffer.check()
        assert mistakes.none()
    return rounds


def test_memory_of_inputs_is_kept_until_it_was_read(ranks):
    assert ranks(4).run(drops_everything_early, 60) == [60] * 4


# Timelines

MARKS = {"low_dispatch_kernel": "D", "low_receive_kernel": "R", "low_combine_kernel": "C"}
STEPS, GEMMS = 5, 6
CLOCK_US = 1.0
"""What time stamps may be off by: they are large numbers with fractions."""


def kernels_of(recorded: profile) -> list[tuple[str, float, float]]:
    """(kind, start, end in us) of every kernel that ran, in order: one of MARKS, or "o" for another one."""
    with tempfile.TemporaryDirectory(prefix="moe-ep-trace-") as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    kinds = [next((mark for part, mark in MARKS.items() if part in event["name"]), "o") for event in kernels]
    assert not [e["name"] for e in kernels if "moe_ep" in e["name"] and not any(part in e["name"] for part in MARKS)]
    spans = [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in kernels]
    return sorted(((kind, *span) for kind, span in zip(kinds, spans, strict=True)), key=lambda kernel: kernel[1])


def timeline(async_op: bool) -> list[tuple[str, float, float]]:
    """Kernels of a few steps, with matrices multiplied between the halves of each operation."""
    with ready_buffer() as buffer:
        layer = Layer(buffer, "bf16")
        matrix, product = torch.eye(1024, device=DEVICE), torch.empty(1024, 1024, device=DEVICE)

        def multiply() -> None:
            for _ in range(GEMMS if async_op else 0):
                torch.mm(matrix, matrix, out=product)

        def step() -> None:
            pending = buffer.low_latency_dispatch(layer.x, layer.idx, async_op=async_op)
            multiply()
            out = pending.wait()
            # A copy would be none that a kernel makes.
            rows = torch.mul(out.x, layer.multiples, out=buffer.empty_rows(out.handle))
            back = buffer.low_latency_combine(rows, layer.idx, layer.weights, out.handle, async_op=async_op)
            multiply()
            back.wait()

        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        for _ in range(2):  # The first one loads the profiler.
            finish()
            dist.barrier()
            with profile(activities=activities) as recorded:
                for _ in range(STEPS):
                    step()
                finish()
        return kernels_of(recorded)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_nothing_runs_between_the_halves(ranks, num_ranks):
    """No kernel of ours, on any stream, from the end of the one that sends to the one that ``wait()`` launches."""
    for kernels in ranks(num_ranks).run(timeline, True):
        order = "".join(kind for kind, *_ in kernels)
        step = rf"Do{{{GEMMS},}}Ro+Co{{{GEMMS},}}C"
        assert re.fullmatch(f"(?:{step}){{{STEPS}}}", order), order
        ours = [kernel for kernel in kernels if kernel[0] != "o"]
        pairs = [pair for pair in itertools.pairwise(ours) if pair[0][0] + pair[1][0] in ("DR", "CC")]
        assert len(pairs) == 2 * STEPS
        for (_, _, sent), (_, received, _) in pairs:
            gemms = [kernel for kernel in kernels if kernel[0] == "o" and sent - CLOCK_US <= kernel[1] < received]
            assert len(gemms) >= GEMMS, "a kernel of ours overlaps the compute between the halves"
            began, ended = gemms[0][1], max(end for _, _, end in gemms)
            assert not [k for k in ours if k[1] < ended - CLOCK_US and k[2] > began + CLOCK_US]
            assert ended - CLOCK_US <= received


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_both_halves_are_one_launch(ranks, num_ranks):
    for kernels in ranks(num_ranks).run(timeline, False):
        order = "".join(kind for kind, *_ in kernels)
        assert re.fullmatch(f"(?:Do+C){{{STEPS}}}", order), order
