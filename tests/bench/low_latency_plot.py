"""Draw the latencies that ``bench_low_latency.py`` measured: the share of replays below each time.

    python tests/bench/low_latency_plot.py FILE.json [--out docs/low_latency.png]

One panel for each shape: ranks x SMs a rank, and tokens a rank. Needs matplotlib.
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
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

Row = dict[str, Any]

COLOURS = {
    "dispatch_fp8": ("#0072b2", "dispatch, FP8 wire"),
    "dispatch_bf16": ("#56b4e9", "dispatch, bf16"),
    "combine_zero_copy": ("#009e73", "combine, zero copy"),
    "combine_any": ("#d55e00", "combine, any tensor"),
    "combine_registered": ("#999999", "combine, registered"),
    "combine_fp8": ("#e69f00", "combine, FP8 wire"),
    "step": ("#cc79a7", "dispatch + combine"),
}
LAST_SHARE = 0.999  # Where the axis of time ends: what is slower is rare and would squeeze the rest.


def panels_of(results: Row) -> dict[str, dict[str, Row]]:
    """The rows to draw, by title of their panel; those that were not measured left out."""
    panels = {}
    for shape, by_tokens in results.get("low_latency", {}).items():
        for tokens, rows in by_tokens.items():
            timed = {name: row for name, row in rows.items() if name in COLOURS and "us_replays" in row}
            if timed:
                ranks, sms = shape.split("x")
                panels[f"{ranks} ranks × {sms} SMs, {tokens} tokens a rank"] = timed
    return panels


def draw(axes: Axes, rows: dict[str, Row]) -> None:
    """One panel: both halves in one launch, apart (dashed), and the memory floors as marks below."""
    edge = 0.0
    for name, row in rows.items():
        colour, _ = COLOURS[name]
        for part, line in ((row, "-"), (row.get("split", {}), "--")):
            times = sorted(part.get("us_replays", ()))
            if not times:
                continue
            shares = [(index + 1) / len(times) for index in range(len(times))]
            axes.step(times, shares, where="post", color=colour, ls=line, lw=1.4 if line == "-" else 1.0)
            edge = max(edge, times[int(LAST_SHARE * (len(times) - 1))])
        axes.plot([row["floor_us"]], [0], color=colour, marker="^", ms=6, clip_on=False, zorder=3)
    axes.set_xlim(0, edge * 1.05 or 1)
    axes.set_ylim(0, 1.01)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.grid(True, which="both", alpha=0.25)


def legend(figure: Any, panels: dict[str, dict[str, Row]]) -> None:
    """Works by colour, and what the kinds of line are."""
    works = dict.fromkeys(name for rows in panels.values() for name in rows)
    handles = [Line2D([], [], color=COLOURS[work][0], lw=1.4, label=COLOURS[work][1]) for work in works]
    handles.append(Line2D([], [], color="black", lw=1, ls="--", label="halves launched apart"))
    handles.append(Line2D([], [], color="black", marker="^", ls="", label="memory floor"))
    figure.legend(handles=handles, loc="lower center", ncols=min(4, len(handles)), frameon=False)


def plot(results: Row, out: Path) -> None:
    """All panels into ``out``."""
    panels = panels_of(results)
    if not panels:
        raise SystemExit("nothing was measured")
    columns = 2 if len(panels) > 1 else 1
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(7 * columns, 3.6 * lines + 1.4), squeeze=False)
    for axes, (title, rows) in zip(grid.flat, panels.items(), strict=False):
        draw(axes, rows)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("time of a call (µs)")
        axes.set_ylabel("replays that are no slower")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    shape, gpu = results["shape"], results["gpu"].get("name", "CPU")
    figure.suptitle(
        f"{gpu}, all ranks on it: hidden {shape['hidden']}, top-{shape['topk']} of {shape['experts']} experts; CUDA "
        f"graphs of {results['calls_per_graph']} calls, the slowest rank of each replay",
        fontsize=11,
    )
    legend(figure, panels)
    figure.tight_layout(rect=(0, 0.7 / figure.get_figheight(), 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of bench_low_latency.py")
    parser.add_argument("--out", type=Path, default=Path("docs/low_latency.png"))
    options = parser.parse_args()
    plot(json.loads(options.file.read_text()), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
