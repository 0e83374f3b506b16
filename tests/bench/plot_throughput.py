"""Draw what ``bench_throughput.py --scaling`` measured: time against tokens, ranks and SMs, with the memory floor.

    python tests/bench/plot_throughput.py FILE.json [FILE.json ...] [--out docs/throughput.png]

Several files are merged, a later one's points beside those of an earlier. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

Row = dict[str, Any]

COLOURS = {
    "dispatch_rank": ("#0072b2", "o", "dispatch, layout rank"),
    "combine_rank": ("#009e73", "s", "combine, layout rank"),
    "dispatch_expert": ("#d55e00", "^", "dispatch, layout expert"),
    "combine_expert": ("#cc79a7", "v", "combine, layout expert"),
}
OTHER = ("#555555", "x")


def style(work: str) -> tuple[str, str, str]:
    """Colour, marker and label."""
    return COLOURS.get(work, (*OTHER, work))


def curves(rows: list[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows with a time, grouped into lines."""
    grouped: dict[Any, list[Row]] = {}
    for row in rows:
        if "us" in row:
            grouped.setdefault(key(row), []).append(row)
    return grouped


def draw(axes: Axes, rows: list[Row], axis: str, dim_ranks: int | None = None) -> None:
    """One panel: times with the range over all batches but the slowest, floors dashed."""
    for (work, ranks), line in curves(rows, lambda row: (row["work"], axis != "ranks" and row["ranks"])).items():
        line.sort(key=lambda row: row[axis])
        colour, marker, _ = style(work)
        alpha = 0.45 if dim_ranks is not None and ranks == dim_ranks else 1.0
        x = [row[axis] for row in line]
        below = [row["us"] - row["us_min"] for row in line]
        above = [sorted(row["us_batches"])[-2:][0] - row["us"] for row in line]
        times = [row["us"] for row in line]
        axes.errorbar(x, times, yerr=(below, above), color=colour, marker=marker, ms=4, lw=1.4, capsize=2, alpha=alpha)
        axes.plot(x, [row["floor_us"] for row in line], color=colour, ls="--", lw=1, alpha=alpha)
    axes.grid(True, which="both", alpha=0.25)


def label_points(axes: Axes, rows: list[Row], axis: str, log: bool) -> None:
    """Ticks where something was measured; both scales logarithmic if asked for."""
    points = sorted({row[axis] for row in rows if "us" in row})
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)
    if not points:
        return
    axes.set_xticks(points, [f"{point:,}".replace(",", " ") for point in points])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelrotation=45 if axis == "tokens" else 0)


def setting(rows: list[Row], axis: str) -> str:
    """What is equal along a panel's axis, for its title."""
    parts = []
    for name, unit in (("ranks", "ranks"), ("tokens", "tokens a rank"), ("sms", "SMs a rank")):
        values = sorted({row[name] for row in rows if "us" in row})
        if name != axis and len(values) == 1:
            parts.append(f"{values[0]} {unit}")
    return ", ".join(parts)


def legend(figure: Any, rows: list[Row]) -> None:
    """Works by colour, and what the two kinds of line are."""
    works = dict.fromkeys(row["work"] for row in rows if "us" in row)
    handles = [
        Line2D([], [], color=colour, marker=marker, ms=4, label=label) for colour, marker, label in map(style, works)
    ]
    handles.append(Line2D([], [], color="black", ls="--", lw=1, label="memory floor"))
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)


def plot(results: list[Row], out: Path) -> None:
    """Three panels into ``out``."""
    scaling = {axis: [row for r in results for row in r["scaling"][axis]] for axis in ("tokens", "ranks", "sms")}
    if not any("us" in row for rows in scaling.values() for row in rows):
        raise SystemExit("nothing was measured in these files")
    groups = sorted({(row["ranks"], row["sms"]) for row in scaling["tokens"] if "us" in row}, reverse=True)
    dim_ranks = groups[-1][0] if len(groups) > 1 else None
    figure, panels = plt.subplots(1, 3, figsize=(16, 5.4))
    names = {"tokens": "tokens a rank", "ranks": "ranks", "sms": "SMs a rank"}
    for axes, (axis, rows) in zip(panels, scaling.items(), strict=True):
        draw(axes, rows, axis, dim_ranks if axis == "tokens" else None)
        label_points(axes, rows, axis, log=axis != "ranks")
        axes.set_xlabel(names[axis])
        axes.set_ylabel("time of a call (µs)")
        axes.set_title(setting(rows, axis), fontsize=10)
    if len(groups) > 1:
        kinds = ", ".join(f"{ranks} × {sms}" for ranks, sms in groups)
        panels[0].set_title(f"ranks × SMs a rank: {kinds} (paler)", fontsize=10)
    shape, gpu = results[0]["shape"], results[0]["gpu"].get("name", "CPU")
    copy = results[0]["copy_bytes_per_s"] / 1e12
    figure.suptitle(
        f"{gpu}, all ranks on it: bf16, hidden {shape['hidden']}, top-{shape['topk']} of {shape['experts']} experts; "
        f"floor: bytes read and written at the {copy:.2f} TB/s of a copy",
        fontsize=11,
    )
    legend(figure, [row for rows in scaling.values() for row in rows])
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="JSON of bench_throughput.py --scaling")
    parser.add_argument("--out", type=Path, default=Path("docs/throughput.png"))
    options = parser.parse_args()
    results = [json.loads(path.read_text()) for path in options.files]
    results = [result for result in results if "scaling" in result]
    if not results:
        raise SystemExit("none of these files has a scaling run")
    plot(results, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
