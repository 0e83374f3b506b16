"""Draw training losses with and without FP8 experts, and how far they are apart.

    python tests/bench/plot_fp8_training.py --plain RUN/metrics.jsonl... --fp8 RUN/metrics.jsonl... [--out FILE.png]

The files are what examples/pretrain_megatron_moe.py leaves; several are runs with other seeds, in the same order for
both. Losses are means over the last 20 steps, and over the runs. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

WINDOW = 20
PLAIN, FP8 = "#0072b2", "#d55e00"


def column(path: Path, name: str) -> Numbers:
    """A number of every record that has it, [records, 2] with its step."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return np.array([(record["step"], record[name]) for record in records if name in record])


def smooth(losses: Numbers) -> Numbers:
    """Means over the last WINDOW steps, [..., steps - WINDOW + 1]."""
    return np.lib.stride_tricks.sliding_window_view(losses, WINDOW, axis=-1).mean(axis=-1)


def losses_of(paths: Sequence[Path]) -> Numbers:
    """[runs, steps]."""
    return np.stack([column(path, "loss")[:, 1] for path in paths])


def report(plain: Sequence[Path], fp8: Sequence[Path]) -> None:
    """Print the last losses of every pair of runs, and of their means."""
    last = np.stack([smooth(losses_of(paths))[:, -1] for paths in (plain, fp8)])
    held_out = np.array([[column(path, "validation_loss")[-1, 1] for path in paths] for paths in (plain, fp8)])
    for name, values in ((f"last {WINDOW} steps", last), ("held out", held_out)):
        for one, other in [*values.T, values.mean(axis=1)]:
            print(f"{name:14}  plain {one:.4f}  FP8 experts {other:.4f}  {100 * (other / one - 1):+.2f} %")
        print(f"{name:14}  the last line is of the means; plain runs differ by up to {np.ptp(values[0]):.4f}")


def plot(plain: Sequence[Path], fp8: Sequence[Path], out: Path) -> None:
    """Losses above, their relative difference below."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    curves = {}
    for paths, colour, label in ((plain, PLAIN, "unquantised"), (fp8, FP8, "FP8 experts, FP8 wire")):
        smoothed = smooth(losses_of(paths))
        curves[label] = smoothed
        steps = np.arange(WINDOW, WINDOW + smoothed.shape[1])
        validation = np.mean([column(path, "validation_loss") for path in paths], axis=0)
        if len(paths) > 1:
            for run in smoothed:
                above.plot(steps, run, color=colour, lw=0.7, alpha=0.35)
        above.plot(steps, smoothed.mean(axis=0), color=colour, lw=1.6, label=f"{label}, training")
        above.plot(*validation.T, "o", color=colour, ms=5, mec="white", label=f"{label}, held out", zorder=3)
    one, other = curves.values()
    difference = 100 * (other / one - 1)
    if len(difference) > 1:
        below.plot(steps, difference.T, color=FP8, lw=0.7, alpha=0.35)
    below.plot(steps, 100 * (other.mean(axis=0) / one.mean(axis=0) - 1), color=FP8, lw=1.6)
    below.axhline(0, color="black", lw=0.8)
    runs = f"mean of {len(plain)} seeds, thin: each; " if len(plain) > 1 else ""
    above.set(ylabel="loss (nats per byte)", title=f"Megatron-Core GPT with MoE layers ({runs}{WINDOW}-step means)")
    below.set(xlabel="step", ylabel="FP8 against\nunquantised (%)")
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=Path, nargs="+", required=True, help="metrics.jsonl of unquantised runs")
    parser.add_argument("--fp8", type=Path, nargs="+", required=True, help="metrics.jsonl with --moe-ep-fp8 experts")
    parser.add_argument("--out", type=Path, default=Path("docs/fp8_training.png"))
    options = parser.parse_args()
    if len(options.plain) != len(options.fp8):
        parser.error(f"{len(options.plain)} runs without FP8 and {len(options.fp8)} with it are no pairs")
    report(options.plain, options.fp8)
    plot(options.plain, options.fp8, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
