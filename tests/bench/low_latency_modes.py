"""What each mode of bench_low_latency.py runs, with which shapes."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch.distributed as dist
from common import ranks_sharing
from low_latency_measure import measure, measure_slow
from low_latency_overlap import Gemm, measure_overlap, trace_step
from low_latency_report import LowReport
from low_latency_session import LowSession
from low_latency_works import ALL, COLLECTIVE, THROUGHPUT, WORKS
from throughput_data import Shape
from throughput_measure import Row
from throughput_modes import Bench
from throughput_team import Failed, Team, tidy

DEFAULT_SMS = {8: 16, 2: 64}  # Other group sizes: an equal share, at most 64.
MOST_SMS = 64


class LowBench(Bench):
    """Runs modes over teams; every rank calls the same methods."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.report = LowReport(options, self.device, self.shape)

    def sms(self, ranks: int) -> int:
        """SMs a rank uses, so that the kernels of all ranks run at the same time."""
        default = DEFAULT_SMS.get(ranks_sharing(ranks, self.device), MOST_SMS)
        return min(self.options.sms.get(ranks) or self.options.sms.get(0) or default, self.most_sms(ranks))

    def main(self) -> None:
        """All works with the group sizes of --ranks and the tokens of --tokens."""
        kept = self.report.results["low_latency"] = {}
        self.report.header(
            f"Low latency, us a call of the slowest rank; graphs of {self.options.calls} calls, {self.options.replays} "
            "replays. DeepEP (H800) and pplx (H100): published figures of other hardware, 8 GPUs over a network"
        )
        for size in self.sizes(self.options.ranks):
            team, sms = self.team(size), self.sms(size)
            for tokens in self.options.token_counts if team else ():
                shape = Shape(**asdict(self.shape) | {"tokens": tokens})
                rows = kept.setdefault(f"{size}x{sms}", {}).setdefault(str(tokens), {})
                self.run_works_of(team, shape, sms, rows)
            dist.barrier()

    def run_works_of(self, team: Team, shape: Shape, sms: int, rows: Row) -> None:
        """All works of one shape, the baselines first; a new buffer after a failure."""
        groups = [(self.options.backend, [*THROUGHPUT, *self.works(WORKS)])]
        if not self.options.no_collective:
            groups.insert(0, ("collective", list(COLLECTIVE)))
        for backend, names in groups:
            session: LowSession | None = None
            for name in names:
                row: Row = {"work": name, "ranks": team.size, "sms": sms, "tokens": shape.tokens}
                counts = None
                try:
                    if session is None:
                        tidy(self.device)
                        session = LowSession(team, self.options, shape, sms, backend)
                    counts = session.data.counts
                    self.time_work(session, name, row)
                except Failed as error:
                    row["error"] = str(error)
                # Not above, where the error still refers to leased tensors.
                if "error" in row and session is not None:
                    session.close()
                    session = None
                rows[name] = self.report.finish(row, name, counts)
                self.report.compare(rows, row)
                self.report.show(row)
            if session is not None:
                session.close()

    def time_work(self, session: LowSession, name: str, row: Row) -> None:
        """Add the times of one work."""
        if name in COLLECTIVE:
            row |= measure_slow(session, COLLECTIVE[name])
            return
        settings = {"calls": self.options.calls, "replays": self.options.replays}
        row |= measure(session, ALL[name], split=False, eager=True, **settings)
        if name in WORKS:
            row["split"] = measure(session, ALL[name], split=True, eager=False, **settings)

    def overlap(self) -> None:
        """A GEMM between the halves of each operation, with the most ranks and tokens."""
        sizes = self.sizes(self.options.ranks)
        if self.device.type != "cuda" or not sizes:
            self.report.say("overlap: needs a GPU and a group of --ranks")
            return
        size = max(sizes)
        team, sms = self.team(size), self.sms(size)
        if team:
            shape = Shape(**asdict(self.shape) | {"tokens": max(self.options.token_counts)})
            row = self.report.results["overlap"] = {"ranks": size, "sms": sms, "tokens": shape.tokens}
            session = None
            try:
                session = LowSession(team, self.options, shape, sms, self.options.backend)
                gemm = team.together(lambda: Gemm(self.options.gemm, self.device))
                row |= measure_overlap(session, gemm, max(self.options.replays, 2))
                self.show_overlap(row)
                # Last: the profiler stays in the process and could slow what comes after it.
                row["trace"] = trace_step(session, gemm, self.options.overlap or None)
                if row["trace"]:  # Rank 0's.
                    self.report.say(
                        f"rank 0, one eager step: {row['trace']['kernels']} kernels of ours, "
                        f"{row['trace']['during_gemm']} of them while a GEMM ran (0 is right)"
                        + (f"; trace in {self.options.overlap}" if self.options.overlap else "")
                    )
            except Failed as error:
                row["error"] = str(error)
                self.report.say(f"overlap FAILED: {error}")
            if session is not None:
                session.close()
            self.report.save()
        dist.barrier()

    def show_overlap(self, row: Row) -> None:
        """Print the GEMM's times."""
        m, k, n = self.options.gemm
        self.report.say(
            f"\nOverlap: bf16 GEMM {m} x {k} x {n} on each of {row['ranks']} ranks (slowest rank, median of "
            f"{row['steps']} steps), {row['tokens']} tokens a rank, {row['sms']} SMs a rank for communication\n"
            f"  alone, nothing else launched            {row['alone']['us']:8.1f} us  p99 {row['alone']['us_p99']:8.1f}"
        )
        for what in ("dispatch", "combine"):
            done, between = row[f"{what}_done"], row[f"{what}_between"]
            percent = row[f"{what}_percent"]
            self.report.say(
                f"  after a {what + ' with both halves':29s}   {done['us']:8.1f} us  p99 {done['us_p99']:8.1f}\n"
                f"  between send and wait() of a {what:9s}  {between['us']:8.1f} us  p99 {between['us_p99']:8.1f}"
                f"  {percent:+.2f} % ({'met' if percent <= 2 else 'MISSED'}: at most 2 %), "
                f"{row[f'{what}_percent_of_alone']:+.2f} % of alone"
            )
