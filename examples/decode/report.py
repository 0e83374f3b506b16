"""What rank 0 leaves of a run: progress, metrics.jsonl, the histogram of step times and the numbers."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

SHOWN = 3
"""Sequences that are printed."""


def counted(number: int, what: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def show(texts: list[list[bytes]]) -> None:
    """Print the first few texts of rank 0."""
    for number, text in enumerate(texts[0][:SHOWN], start=1):
        print(f"--- text {number} of {len(texts[0])} of rank 0\n{text.decode(errors='replace')}")
    print("---", flush=True)


class Progress:
    """Says now and then how far the run is."""

    def __init__(self, steps: int, tokens_per_step: int) -> None:
        self._steps, self._tokens_per_step = steps, tokens_per_step
        self._started = time.perf_counter()

    def __call__(self, step: int) -> None:
        speed = step * self._tokens_per_step / (time.perf_counter() - self._started)
        print(f"step {step}/{self._steps}  {speed:,.0f} tokens/s", flush=True)


def speed(step_ms: list[float], exchange_ms: list[float], tokens_per_step: int) -> dict[str, float]:
    """Tokens of all ranks per second, and milliseconds of a step and of its dispatches and combines alone.

    Every step counts: a byte of a prompt takes the same way as one that is generated.
    """
    p50, p99 = np.percentile(step_ms, [50, 99])
    return {
        "tokens_per_second": round(1e3 * tokens_per_step / statistics.mean(step_ms), 1),
        "step_ms_p50": round(float(p50), 4),
        "step_ms_p99": round(float(p99), 4),
        "dispatch_combine_ms_p50": round(statistics.median(exchange_ms), 4),
    }


def write(out: Path, texts: list[list[bytes]], step_ms: list[float], result: dict[str, Any]) -> None:
    """Write all ranks' texts and metrics.jsonl, a line a step and then the result, and draw latency.png."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "texts.jsonl").open("w") as file:
        for rank, of_rank in enumerate(texts):
            for text in of_rank:
                file.write(json.dumps({"rank": rank, "text": text.decode(errors="replace")}) + "\n")
    with (out / "metrics.jsonl").open("w") as file:
        for step, ms in enumerate(step_ms, start=1):
            file.write(json.dumps({"step": step, "ms": round(ms, 4)}) + "\n")
        file.write(json.dumps({"result": result}) + "\n")
    _plot(
        out / "latency.png",
        step_ms,
        p50=result["step_ms_p50"],
        p99=result["step_ms_p99"],
        title=f"A token of each of {result['batch'] * result['ranks']} sequences, {counted(result['ranks'], 'rank')}, "
        f"{result['backend']}" + (", CUDA graph" if result["graph"] else ""),
    )


def _plot(path: Path, step_ms: list[float], *, p50: float, p99: float, title: str) -> None:
    """Draw how often a step took how long. What is above four times the 99th percentile is left out, and counted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [ms for ms in step_ms if ms <= 4 * p99]
    left_out = len(step_ms) - len(shown)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.hist(shown, bins=60, color="tab:blue", alpha=0.8)
    axes.axvline(p50, color="tab:orange", label=f"median: {p50:.3g} ms")
    axes.axvline(p99, color="tab:gray", linestyle="--", label=f"99th percentile: {p99:.3g} ms")
    axes.set(
        xlabel="milliseconds a step" + (f" ({left_out} slower ones not shown)" if left_out else ""),
        ylabel="steps",
        title=title,
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
