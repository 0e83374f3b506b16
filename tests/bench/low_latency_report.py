"""The table and the JSON of bench_low_latency.py, with what follows from a time: floor, ratios, targets."""

from __future__ import annotations

import argparse

import torch
from low_latency_targets import (
    FLOOR_BYTES_PER_S,
    PUBLISHED,
    PUBLISHED_AT,
    TARGET_GPU,
    TARGET_SHAPE,
    TARGETS,
)
from low_latency_works import ALL
from throughput_data import Counts, Shape
from throughput_measure import Row
from throughput_report import Report


class LowReport(Report):
    """Rank 0's table and JSON, complete after every row; silent on other ranks."""

    def __init__(self, options: argparse.Namespace, device: torch.device, shape: Shape) -> None:
        super().__init__(options, device, shape)
        self.results["benchmark"] = "low_latency"
        self.results["floor_bytes_per_s"] = FLOOR_BYTES_PER_S
        self.results["shape"] = {name: getattr(shape, name) for name in TARGET_SHAPE}
        self.results["calls_per_graph"], self.results["replays"] = options.calls, options.replays
        self._has_published = self.results["shape"] == TARGET_SHAPE
        self._has_targets = self._has_published and TARGET_GPU in str(self.results["gpu"].get("name", ""))

    def header(self, title: str) -> None:
        """Start a table."""
        self.say(
            f"\n{title}\n{'':38s} {'--- graph ---':>15s} {'halves apart':>15s} {'':>7s} {'':>7s} {'':>6s} {'':>11s} "
            f"{'':>11s} {'published / ours':>19s} {'ours, throughput':>16s} {'gloo':>6s}\n"
            f"{'work':20s} {'ranks x SMs':>11s} {'T':>4s} {'us':>8s} {'p99':>7s} {'us':>7s} {'p99':>7s} {'eager':>7s} "
            f"{'floor':>7s} {'ratio':>6s} {'bar':>11s} {'stretch':>11s} {'DeepEP':>9s} {'pplx':>9s} "
            f"{'/ this':>16s} {'/ this':>6s}  notes"
        )

    def finish(self, row: Row, name: str, counts: Counts | None) -> Row:
        """Add what follows from a time: floor, ratio, targets, published figures."""
        if counts is None or "us" not in row:
            return row
        work, gpus = ALL[name], self.gpus(row["ranks"])
        bandwidth = gpus * FLOOR_BYTES_PER_S
        row["bytes"] = work.bytes(counts)
        row["floor_us"] = row["bytes"] / bandwidth * 1e6
        row["ratio"] = row["us"] / row["floor_us"]
        row["bytes_per_s"] = row["bytes"] / row["us"] * 1e6
        if work.with_copies:
            row["floor_with_copies_us"] = work.with_copies(counts) / bandwidth * 1e6
        target = TARGETS.get((f"{row['ranks']}x{row['sms']}", row["tokens"]), {}).get(name)
        if target and self._has_targets and gpus == 1:
            row |= {"bar_us": target.bar, "stretch_us": target.stretch}
        published = PUBLISHED.get(name) if (row["ranks"], row["tokens"]) == PUBLISHED_AT else None
        if published and self._has_published:
            for who, theirs in (("deepep", published.deepep), ("pplx", published.pplx)):
                row |= {f"{who}_other_hardware_us": theirs, f"{who}_ratio": theirs / row["us"]}
        return row

    def compare(self, rows: Row, row: Row) -> None:
        """Add how many times as long the baselines of this run took, where all of them were measured."""
        for kind in ("throughput", "collective"):
            beside = [rows.get(f"{kind}_{what}", {}).get("us") for what in ALL[row["work"]].beside]
            if "us" in row and beside and None not in beside:
                row |= {f"{kind}_us": sum(beside), f"{kind}_ratio": sum(beside) / row["us"]}

    def show(self, row: Row) -> None:
        """Print a row and write the JSON."""
        if not self.active:
            return
        start = f"{row['work']:20s} {row['ranks']:>6d} x {row['sms']:<2d} {row['tokens']:>4d}"
        if "us" not in row:
            self.say(f"{start}  FAILED: {row['error']}")
        else:
            split = row.get("split", {})
            self.say(
                f"{start} {row['us']:8.1f} {_number(row, 'us_p99')} {_number(split, 'us')} {_number(split, 'us_p99')} "
                f"{_number(row, 'eager_us')} {row['floor_us']:7.1f} {row['ratio']:6.2f} {_verdict(row, 'bar_us'):>11s} "
                f"{_verdict(row, 'stretch_us'):>11s} {_published(row, 'deepep')} {_published(row, 'pplx')} "
                f"{_times(row, 'throughput_ratio', 16)} {_times(row, 'collective_ratio', 6)}  {_notes(row)}"
            )
        self.save()


def _number(row: Row, key: str) -> str:
    return f"{row[key]:7.1f}" if key in row else f"{'-':>7s}"


def _times(row: Row, key: str, width: int) -> str:
    if key not in row:
        return f"{'-':>{width}s}"
    return f"{row[key]:>{width - 1}.{0 if row[key] >= 100 else 2}f}x"


def _published(row: Row, who: str) -> str:
    if f"{who}_ratio" not in row:
        return f"{'-':>9s}"
    return f"{row[f'{who}_other_hardware_us']:g} {row[f'{who}_ratio']:.1f}x".rjust(9)


def _verdict(row: Row, key: str) -> str:
    limit = row.get(key)
    return "-" if limit is None else f"{limit} {'met' if row['us'] <= limit else 'MISSED'}"


def _notes(row: Row) -> str:
    notes = []
    if "us_p99" not in row:
        notes.append("eager")
    if "floor_with_copies_us" in row:
        notes.append(f"floor with its copies in memory {row['floor_with_copies_us']:.1f}")
    if row.get("copied_out"):
        notes.append(f"COPIED OUT of the heap {row['copied_out']} times")
    if "error" in row:
        notes.append(f"then FAILED: {row['error']}")
    return ", ".join(notes)
