"""Draw what bench_nvlink.py measured: bandwidth against SMs, with the collective's and the link's ceiling as lines.

    python tests/bench/plot_nvlink.py FILE.json [--out docs/nvlink.png]

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, Any]

PANELS = {
    "rows by rank": {
        "dispatch_rank": ("#0072b2", "o", "dispatch bf16"),
        "dispatch_rank_fp8": ("#56b4e9", "D", "dispatch FP8"),
        "combine_rank": ("#009e73", "s", "combine"),
        "collective_dispatch_rank": ("#0072b2", "", "dispatch"),
        "collective_combine_rank": ("#009e73", "", "combine"),
    },
    "expert-major rows, two stages": {
        "dispatch_expert_2stage": ("#d55e00", "^", "dispatch bf16"),
        "dispatch_expert_fp8_2stage": ("#e69f00", "D", "dispatch FP8"),
        "combine_expert_2stage": ("#cc79a7", "v", "combine"),
        "collective_dispatch_expert": ("#d55e00", "", "permute + dispatch, a row an expert"),
        "collective_combine_expert": ("#cc79a7", "", "combine + unpermute, a row an expert"),
    },
}


def panel(axes: Axes, rows: list[Row], works: dict[str, tuple[str, str, str]], results: Row) -> None:
    """Ours as lines over SMs, baselines and the link as level ones."""
    for work, (colour, marker, label) in works.items():
        line = sorted((row for row in rows if row["work"] == work and "us" in row), key=lambda row: row["sms"])
        if not line:
            continue
        speeds = [row["link_bytes_per_s"] / 1e9 for row in line]
        if marker:
            axes.plot([row["sms"] for row in line], speeds, color=colour, marker=marker, ms=4, lw=1.4, label=label)
        else:
            axes.axhline(speeds[0], color=colour, ls=":", lw=1.2, label=f"{results['collective']}: {label}")
    link = results["link"].get("bytes_per_s")
    if link:
        axes.axhline(link / 1e9, color="black", ls="--", lw=1, label="copies by copy engine, all GPUs at once")
    axes.set_xlabel("SMs a rank")
    axes.set_ylabel("received from other GPUs (GB/s a GPU)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def plot(results: Row, out: Path) -> None:
    """Two panels into ``out``."""
    shape = results["shape"]
    rows = [row for row in results["rows"] if row["tokens"] == shape["tokens"]]
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.2))
    for axes, (title, works) in zip(panels, PANELS.items(), strict=True):
        panel(axes, rows, works, results)
        axes.set_title(title, fontsize=10)
    figure.suptitle(
        f"{results['ranks_started']} × {results['gpu'].get('name', 'CPU')}: {shape['tokens']} tokens a rank, hidden "
        f"{shape['hidden']}, top-{shape['topk']} of {shape['experts']} experts",
        fontsize=11,
    )
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of bench_nvlink.py")
    parser.add_argument("--out", type=Path, default=Path("docs/nvlink.png"))
    options = parser.parse_args()
    plot(json.loads(options.file.read_text()), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
