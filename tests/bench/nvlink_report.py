"""The table and the JSON of bench_nvlink.py, with what follows from a time."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from low_latency_measure import percentile
from nvlink_works import LINK_WORKS
from throughput_data import Counts, Shape
from throughput_measure import Row
from throughput_report import Report

END_TO_END_SMS = 24  # What a rank takes by default.


class LinkReport(Report):
    """Rank 0's table and JSON, complete after every row; silent on other ranks."""

    def __init__(self, options: argparse.Namespace, device: torch.device, shape: Shape) -> None:
        super().__init__(options, device, shape)
        self.results |= {"benchmark": "nvlink", "link": {}, "collective": None, "rows": [], "end_to_end": []}

    def header(self, title: str) -> None:
        """Start a table."""
        self.say(
            f"\n{title}\n{'work':30s} {'ranks x SMs':>11s} {'tokens':>6s} {'us':>9s} {'p99':>9s} {'GB/s in':>8s} "
            f"{'of link':>7s} {'as DeepEP':>9s} {'collective us':>13s} {'faster':>7s}  notes"
        )

    def finish(self, row: Row, name: str, counts: Counts | None) -> Row:
        """Add what follows from a time: bandwidth, share of the link, and how much faster than the collective."""
        if counts is None or "us" not in row:
            return row
        work, ranks = LINK_WORKS[name], row["ranks"]
        row["us_p99"] = percentile(row["us_batches"], 0.99)
        row["bytes_in_per_rank"] = work.crossing(counts) / ranks
        row["link_bytes_per_s"] = row["bytes_in_per_rank"] / row["us"] * 1e6
        row["deepep_bytes_per_s"] = work.published_as(counts) / ranks / row["us"] * 1e6
        link = self.results["link"].get("bytes_per_s")
        if link:
            row["share_of_link"] = row["link_bytes_per_s"] / link
        beside = self.collective_us(work.baseline, row["tokens"])
        if beside:
            row |= {"collective_us": beside, "times_faster": beside / row["us"]}
        return row

    def collective_us(self, name: str | None, tokens: int) -> float | None:
        """The time of a baseline of this run."""
        found = [r for r in self.results["rows"] if r["work"] == name and r["tokens"] == tokens and "us" in r]
        return float(found[0]["us"]) if found else None

    def show(self, row: Row) -> None:
        """Keep and print a row and write the JSON."""
        self.results["rows"].append(row)
        if not self.active:
            return
        sms = row["sms"] if LINK_WORKS[row["work"]].uses_sms else "-"
        start = f"{row['work']:30s} {row['ranks']:>5d} x {sms:<3} {row['tokens']:>6d}"
        if "us" not in row:
            self.say(f"{start}  {'SKIPPED: ' + row['skipped'] if 'skipped' in row else 'FAILED: ' + row['error']}")
        else:
            share = f"{row['share_of_link']:7.1%}" if "share_of_link" in row else f"{'-':>7s}"
            beside = f"{row['collective_us']:13.1f} {row['times_faster']:6.2f}x" if "times_faster" in row else ""
            self.say(
                f"{start} {row['us']:9.1f} {row['us_p99']:9.1f} {row['link_bytes_per_s'] / 1e9:8.1f} {share} "
                f"{row['deepep_bytes_per_s'] / 1e9:9.1f} {beside or '-':>21s}  {_notes(row)}"
            )
        self.save()

    def end_to_end(self, tokens: int) -> None:
        """Dispatch to expert-major rows and weighted combine, permutes included, with at most 24 SMs."""
        for wire in ("", "_fp8"):
            theirs = _sum(
                self.collective_us(f"collective_dispatch_expert{wire}", tokens),
                self.collective_us("collective_combine_expert", tokens),
            )
            for way in ("direct", "2stage"):
                ours = _sum(
                    self._best(f"dispatch_expert{wire}_{way}", tokens), self._best(f"combine_expert_{way}", tokens)
                )
                if ours and theirs:
                    row = {"tokens": tokens, "wire": wire[1:] or "bf16", "expand": way, "us": ours}
                    row |= {"collective_us": theirs, "times_faster": theirs / ours}
                    self.results["end_to_end"].append(row)
                    self.say(
                        f"end to end, {tokens} tokens, dispatch {row['wire']}, {way}: {ours:.1f} us, "
                        f"{self.results['collective']} {theirs:.1f} us, {row['times_faster']:.2f} times as long"
                    )
        self.save()

    def _best(self, name: str, tokens: int) -> float | None:
        times = [
            float(r["us"])
            for r in self.results["rows"]
            if (r["work"], r["tokens"]) == (name, tokens) and "us" in r and r["sms"] <= END_TO_END_SMS
        ]
        return min(times, default=None)

    def failures(self) -> list[Any]:
        """Rows without a time that should have one."""
        return [row for row in self.results["rows"] if "error" in row]


def _sum(*times: float | None) -> float | None:
    known = [time for time in times if time is not None]
    return sum(known) if len(known) == len(times) else None


def _notes(row: Row) -> str:
    notes = []
    if row["copied_out"]:
        notes.append(f"COPIED OUT of the heap in {row['copied_out']} of {row['operations']}")
    if row["staged"]:
        notes.append(f"STAGED in {row['staged']} of {row['operations']}")
    return ", ".join(notes)
