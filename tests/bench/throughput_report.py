"""The table and the JSON of bench_throughput.py, with what follows from a time: floor, ratio, targets."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch
import torch.distributed as dist
from common import gpu_facts, gpus_used, machine, write_json
from throughput_data import Counts, Shape
from throughput_measure import Row
from throughput_targets import TARGET_GPU, TARGET_SHAPE, TARGETS
from throughput_works import WORKS


class Report:
    """Rank 0's table and JSON, complete after every row; silent on other ranks."""

    def __init__(self, options: argparse.Namespace, device: torch.device, shape: Shape) -> None:
        self.active, self._path, self._device = dist.get_rank() == 0, options.json, device
        self.results: Row = {
            "benchmark": "throughput",
            "machine": machine(),
            "gpu": gpu_facts(device) if self.active else {},
            "backend": options.backend,
            "ranks_started": dist.get_world_size(),
            "shape": asdict(shape),
            "copy_bytes_per_s": None,
        }
        name = str(self.results["gpu"].get("name", ""))
        self._has_targets = TARGET_GPU in name and shape == TARGET_SHAPE

    def gpus(self, ranks: int) -> int:
        """GPUs that a group is dealt over. What is known of ranks on one GPU holds for 1 only."""
        return gpus_used(ranks, self._device)

    def say(self, text: str) -> None:
        """Print now: what follows may not end."""
        if self.active:
            print(text, flush=True)

    def header(self, title: str) -> None:
        """Start a table."""
        self.say(
            f"\n{title}\n{'work':26s} {'ranks x SMs':>11s} {'us':>8s} {'(min - max)':>17s} {'floor':>7s} {'ratio':>6s} "
            f"{'TB/s':>5s} {'bar':>11s} {'stretch':>12s} {'DeepEP V1':>10s} {'faster':>7s}  notes"
        )

    def finish(self, row: Row, name: str, counts: Counts | None) -> Row:
        """Add what follows from a time: floor, ratio, targets."""
        if counts is None or "us" not in row:
            return row
        work, gpus = WORKS[name], self.gpus(row["ranks"])
        bandwidth = gpus * (self.results["copy_bytes_per_s"] or float("nan"))
        row["bytes"] = work.bytes(counts)
        row["floor_us"] = row["bytes"] / bandwidth * 1e6
        row["ratio"] = row["us"] / row["floor_us"]
        row["bytes_per_s"] = row["bytes"] / row["us"] * 1e6
        if work.in_l2:
            row["floor_in_l2_us"] = work.in_l2(counts) / bandwidth * 1e6
        target = TARGETS.get(f"{row['ranks']}x{row['sms']}", {}).get(name)
        if target and self._has_targets and gpus == 1 and row["tokens"] == TARGET_SHAPE.tokens:
            row |= {"bar_us": target.bar, "stretch_us": target.stretch, "deepep_v1_us": target.deepep}
            row["deepep_v1_beside"] = target.beside
            row["times_faster"] = target.deepep / row["us"] if target.deepep else None
        return row

    def show(self, row: Row) -> None:
        """Print a row and write the JSON."""
        if not self.active:
            return
        start = f"{row['work']:26s} {row['ranks']:>5d} x {row['sms']:<3d}"
        if "us" not in row:
            self.say(f"{start}  {'SKIPPED: ' + row['skipped'] if 'skipped' in row else 'FAILED: ' + row['error']}")
        else:
            spread = f"({row['us_min']:.1f} - {row['us_max']:.1f})"
            self.say(
                f"{start} {row['us']:8.1f} {spread:>17s} {row['floor_us']:7.1f} {row['ratio']:6.2f} "
                f"{row['bytes_per_s'] / 1e12:5.2f} {_verdict(row, 'bar_us'):>11s} {_verdict(row, 'stretch_us'):>12s} "
                f"{_deepep(row)}  {_notes(row)}"
            )
        self.save()

    def save(self) -> None:
        """Write the JSON as far as it goes."""
        if self.active:
            write_json(self._path, self.results)


def _verdict(row: Row, key: str) -> str:
    limit = row.get(key)
    return "-" if limit is None else f"{limit} {'met' if row['us'] <= limit else 'MISSED'}"


def _deepep(row: Row) -> str:
    if not row.get("deepep_v1_us"):
        return f"{'-':>10s} {'-':>7s}"
    figure = f"{row['deepep_v1_us']}{'+' if row['deepep_v1_beside'] else ''}"
    return f"{figure:>10s} {row['times_faster']:6.2f}x"


def _notes(row: Row) -> str:
    notes = [f"{row['tokens']} tokens"]
    if row.get("deepep_v1_beside"):
        notes.append(f"DeepEP has to {row['deepep_v1_beside']} beside this")
    if "floor_in_l2_us" in row:
        notes.append(f"floor in L2 {row['floor_in_l2_us']:.1f}")
    if row["copied_out"]:
        notes.append(f"COPIED OUT of the heap in {row['copied_out']} of {row['operations']}")
    if row["staged"] and not row["work"].endswith("_any"):
        notes.append(f"STAGED in {row['staged']} of {row['operations']}")
    return ", ".join(notes)
