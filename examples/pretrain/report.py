"""What rank 0 shows of a run: progress, metrics.jsonl, the loss plot and the result line."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

WARMUP_STEPS = 5
"""Steps of a process left out of its median step time: memory is allocated and caches fill."""
LOG_LINES = 20


class Report:
    """Collects the numbers of a run. On ranks other than 0 everything is a no-op, but the times are kept.

    Args:
        out: Directory for metrics.jsonl and loss.png.
        active: Whether this is rank 0.
        first_step: Steps done before, by the runs that this one goes on from.
        num_steps: Steps of the whole run.
        tokens_per_step: Of all ranks together.
    """

    def __init__(self, out: Path, *, active: bool, first_step: int, num_steps: int, tokens_per_step: int) -> None:
        self._path = out / "metrics.jsonl"
        self._active = active
        self._num_steps = num_steps
        self._tokens_per_step = tokens_per_step
        self._step_seconds: list[float] = []
        self._comm_seconds: list[float] = []
        self._started = time.perf_counter()
        self.records: list[dict[str, Any]] = []
        if not active:
            return
        out.mkdir(parents=True, exist_ok=True)
        if first_step:
            self.records = [r for r in _read_records(self._path) if r["step"] <= first_step]
        # Rewritten, so that what follows the checkpoint appears once after an interruption.
        with self._path.open("w") as file:
            file.writelines(json.dumps(r) + "\n" for r in self.records)
        self._file = self._path.open("a", buffering=1)
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, step: int, *, loss: float, lr: float, seconds: float, comm_seconds: float) -> None:
        """Record training step ``step``, counted from 1."""
        self._step_seconds.append(seconds)
        self._comm_seconds.append(comm_seconds)
        if not self._active:
            return
        speed, share = self._tokens_per_step / seconds, comm_seconds / seconds
        self._write(
            step=step,
            loss=loss,
            lr=lr,
            tokens_per_second=round(speed, 1),
            comm_share=round(share, 4),
            step_seconds=round(seconds, 6),
            time=round(time.perf_counter() - self._started, 3),
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s, dispatch + combine {share:.0%}")
            self._bar.update()
        elif step == 1 or step % max(1, self._num_steps // LOG_LINES) == 0:
            self.say(
                f"step {step}/{self._num_steps}  loss {loss:.4f}  {speed:,.0f} tokens/s  dispatch + combine {share:.0%}"
            )

    def validation(self, step: int, loss: float) -> None:
        """Record the loss on the held-out windows after ``step`` steps."""
        if self._active:
            self._write(step=step, validation_loss=loss)
            self.say(f"step {step}/{self._num_steps}  validation loss {loss:.4f} nats per byte")

    def say(self, text: str) -> None:
        """Print a line, above the progress bar where there is one."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Finish the progress bar and the metrics file."""
        if self._active:
            self._file.close()
            if self._bar is not None:
                self._bar.close()

    def speed(self) -> dict[str, float | None]:
        """Median tokens per second and share of dispatch + combine, over steps without the first few."""
        skipped = WARMUP_STEPS if len(self._step_seconds) > WARMUP_STEPS else 0
        seconds, comm = self._step_seconds[skipped:], self._comm_seconds[skipped:]
        if not seconds:
            return {"tokens_per_second": None, "step_seconds": None, "comm_share": None}
        median = statistics.median(seconds)
        return {
            "tokens_per_second": round(self._tokens_per_step / median, 1),
            "step_seconds": round(median, 5),
            "comm_share": round(sum(comm) / sum(seconds), 4),
        }

    def _write(self, **record: Any) -> None:
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Records of an earlier run; the last line may have been cut off when it ended."""
    records: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def plot_losses(path: Path, records: list[dict[str, Any]], *, baseline: float, title: str) -> None:
    """Draw training and validation losses over steps, and the bigram model's loss as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    held_out = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=0.9, alpha=0.8, label="training batch")
    if held_out:
        last = held_out[-1][1]
        axes.plot(
            *zip(*held_out, strict=True), "o-", color="tab:orange", label=f"held-out files (last: {last:.3f})", zorder=3
        )
    axes.axhline(baseline, color="tab:gray", linestyle="--", label=f"bigram model, held-out files ({baseline:.3f})")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
