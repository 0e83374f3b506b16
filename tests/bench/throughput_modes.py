"""What each mode of bench_throughput.py runs, with which works, group sizes and SMs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict

import torch
import torch.distributed as dist
from common import ranks_sharing, start_rank
from throughput_data import Shape
from throughput_measure import Row, Schedule, copy_bytes_per_s, count_launches, measure, time_graph
from throughput_report import Report
from throughput_session import Session
from throughput_team import DoesNotFit, Failed, Team, tidy
from throughput_works import WORKS, Work

DEFAULT_SMS = {8: 16}  # Of ranks that share one GPU. Others: 24.
MAIN_WORKS = tuple(name for name in WORKS if name != "dispatch_rank_max")
SMALL_WORKS = ("dispatch_rank", "dispatch_rank_max", "dispatch_rank_handle", "combine_rank")
GRAPH_WORKS = ("dispatch_rank_max", "dispatch_rank_handle", "combine_rank")
SMALL_RANKS = (2, 8)
MOST_SCALING_RANKS = 8
SCALING_WORKS = ("dispatch_rank", "combine_rank", "dispatch_expert", "combine_expert")


class Bench:
    """Runs modes over teams; every rank calls the same methods."""

    table: Mapping[str, Work] = WORKS

    def __init__(self, options: argparse.Namespace) -> None:
        self.rank, self.world = start_rank()
        self.options, self.device = options, torch.device(options.device)
        self.sm_count = 132
        if self.device.type == "cuda":
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            self.device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
            self.sm_count = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.shape = Shape(options.tokens, options.hidden, options.topk, options.experts)
        self.report = Report(options, self.device, self.shape)
        self._teams = {size: self._make_team(size) for size in self._sizes_of_modes()}

    def _sizes_of_modes(self) -> list[int]:
        options = self.options
        sizes = set(options.ranks if options.main else ())
        sizes |= set(SMALL_RANKS if options.small else ())
        sizes |= {*options.scaling_ranks, *range(1, MOST_SCALING_RANKS + 1)} if options.scaling else set()
        return sorted(size for size in sizes if size <= self.world)

    def _make_team(self, size: int) -> Team | None:
        groups = [dist.new_group(list(range(size)), backend="gloo") for _ in range(3)]
        return Team(groups, size, self.device) if self.rank < size else None

    def team(self, size: int) -> Team | None:
        """The first ``size`` ranks; None on the others."""
        return self._teams[size]

    def sizes(self, wanted: Iterable[int]) -> list[int]:
        """The group sizes that enough ranks were started for."""
        wanted = list(wanted)
        missing = [size for size in wanted if size > self.world]
        if missing:
            self.report.say(f"left out: groups of {missing} ranks, as {self.world} were started")
        return [size for size in wanted if size <= self.world]

    def sms(self, ranks: int) -> int:
        """SMs a rank uses, so that the kernels of all ranks run at the same time."""
        default = DEFAULT_SMS.get(ranks_sharing(ranks, self.device), 24)
        wanted = self.options.sms.get(ranks) or self.options.sms.get(0) or default
        return min(wanted, self.most_sms(ranks))

    def most_sms(self, ranks: int) -> int:
        """An equal share of a GPU for each of the ranks on it."""
        return max(1, self.sm_count // ranks_sharing(ranks, self.device))

    def works(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that --works leaves."""
        return [name for name in names if not self.options.works or name in self.options.works]

    def measure_copy(self) -> None:
        """Bandwidth of large copies, by rank 0 alone."""
        if self.rank == 0:
            speed = copy_bytes_per_s(self.device, self.options.copy_mb << 20)
            self.report.results["copy_bytes_per_s"] = speed
            tidy(self.device)
        dist.barrier()
        if self.report.active:
            speed, gpu = self.report.results["copy_bytes_per_s"], self.report.results["gpu"]
            self.report.say(
                f"{gpu or 'CPU'}\ndevice-to-device copy {speed / 1e12:.3f} TB/s (read + written), "
                f"{self.shape}, {self.world} ranks started, backend {self.options.backend}"
            )

    def run_works(
        self, team: Team, shape: Shape, points: Iterable[int], names: Iterable[str], schedule: Schedule
    ) -> Iterable[Row]:
        """Rows of works, each with every SM count of ``points``; one buffer for all that share its settings."""
        names, points = list(names), list(points)
        for expand in dict.fromkeys(self.table[name].expand for name in names):
            session: Session | None = None
            unusable: Row = {}  # Why no buffer with these settings can be made.
            for sms in points:
                for name in (n for n in names if self.table[n].expand == expand):
                    if sms != points[0] and not self.table[name].uses_sms:
                        continue
                    row: Row = {"work": name, "ranks": team.size, "sms": sms, "tokens": shape.tokens} | unusable
                    counts = None
                    try:
                        if session is None and not unusable:
                            session = self.open(team, shape, max(points), expand)
                        if session is not None:
                            session.sms, counts = sms, session.data.counts
                            row |= measure(session, self.table[name], schedule)
                    except (DoesNotFit, Failed) as error:
                        why = {"skipped" if isinstance(error, DoesNotFit) else "error": str(error)}
                        row |= why
                        unusable = why if session is None else {}
                    # Not above, where the error still refers to leased tensors.
                    if "error" in row and session is not None:
                        session.close()
                        session = None
                    yield self.report.finish(row, name, counts)
            if session is not None:
                session.close()

    def open(self, team: Team, shape: Shape, sms: int, expand: str = "auto") -> Session:
        """A session; see there for what it raises."""
        tidy(self.device)
        return Session(team, self.options, shape, sms, expand)

    # Modes

    def main(self) -> None:
        """All works with the group sizes of --ranks."""
        schedule = self.schedule(Schedule(warmup=5, calls=20, batches=5))
        kept = self.report.results["main"] = {}
        sizes = self.sizes(self.options.ranks)
        self.report.header("Throughput, median us a call of the slowest rank")
        for size in sizes:
            team, sms = self.team(size), self.sms(size)
            for row in self.run_works(team, self.shape, [sms], self.works(MAIN_WORKS), schedule) if team else ():
                kept.setdefault(f"{size}x{sms}", {})[row["work"]] = row
                self.report.show(row)
            dist.barrier()

    def schedule(self, default: Schedule) -> Schedule:
        """Calls and batches, as --calls and --batches have them."""
        return Schedule(default.warmup, self.options.calls or default.calls, self.options.batches or default.batches)

    def small(self) -> None:
        """Few tokens: eager, in graphs, and launches."""
        schedule = self.schedule(Schedule(warmup=10, calls=50, batches=5))
        kept = self.report.results["small"] = {}
        sizes = self.sizes(SMALL_RANKS)
        self.report.header("Small, eager")
        for size in sizes:
            team, sms = self.team(size), self.sms(size)
            for tokens in (self.shape.tokens // 32, self.shape.tokens // 8) if team else ():
                shape = Shape(**asdict(self.shape) | {"tokens": tokens})
                rows = kept.setdefault(f"{size}x{sms}", {}).setdefault(str(tokens), {})
                for row in self.run_works(team, shape, [sms], self.works(SMALL_WORKS), schedule):
                    rows[row["work"]] = row
                    self.report.show(row)
                if self.device.type == "cuda":
                    self.graphs(team, shape, sms, schedule, rows)
            dist.barrier()
        # Last: the profiler stays in the process and could slow what comes after it.
        for size in sizes if self.device.type == "cuda" else ():
            team, sms = self.team(size), self.sms(size)
            if team:
                self.launches(team, sms, kept[f"{size}x{sms}"])
            dist.barrier()

    def graphs(self, team: Team, shape: Shape, sms: int, schedule: Schedule, rows: Row) -> None:
        """Add replay times to the rows of works that touch no host."""
        session = None
        for name in self.works(GRAPH_WORKS):
            row = rows[name]
            try:
                session = session or self.open(team, shape, sms)
                row["graph"] = time_graph(session, self.table[name], schedule)
                row["launch_share"] = 1 - row["graph"]["us"] / row["us"] if "us" in row else None
                said = f"graph {row['graph']['us']:.1f} us, launch share {row['launch_share'] or 0:.0%}"
            except (Failed, DoesNotFit) as error:
                row["graph"], said = {"error": str(error)}, f"graph FAILED: {error}"
            if "error" in row["graph"] and session is not None:
                session.close()
                session = None
            self.report.say(f"{name:26s} {team.size:>5d} x {sms:<3d} {said}, {shape.tokens} tokens")
            self.report.save()
        if session is not None:
            session.close()

    def launches(self, team: Team, sms: int, kept: Row) -> None:
        """Add the kernels and copies of one eager call on rank 0."""
        session, tokens = None, self.shape.tokens // 32
        for name in self.works(SMALL_WORKS):
            try:
                session = session or self.open(team, Shape(**asdict(self.shape) | {"tokens": tokens}), sms)
                found = count_launches(session, self.table[name])
            except (Failed, DoesNotFit) as error:
                found = {"error": str(error)}
            if "error" in found and session is not None:
                session.close()
                session = None
            kept[str(tokens)][name]["launches"] = found
            self.report.say(f"{name:26s} {team.size:>5d} x {sms:<3d} launches of a call: {found}")
            self.report.save()
        if session is not None:
            session.close()

    def scaling(self) -> None:
        """Times against tokens, ranks and SMs."""
        kept = self.report.results["scaling"] = {"tokens": [], "ranks": [], "sms": []}
        sizes = self.sizes(self.options.scaling_ranks)
        self.report.header("Scaling with tokens")
        for size in sizes:
            for step in (1, 4, 8, 16, 32, 64, 128):
                shape = Shape(**asdict(self.shape) | {"tokens": self.shape.tokens * step // 32})
                self.scale(kept["tokens"], size, shape, [self.sms(size)])
        self.report.header("Scaling with ranks")
        for size in range(1, min(self.world, MOST_SCALING_RANKS) + 1):
            self.scale(kept["ranks"], size, self.shape, [min(16, self.most_sms(size))])
        self.report.header("Scaling with SMs")
        for size in self.sizes([2]):
            points = [sms for sms in (2, 4, 8, 16, 24, 32, 48, 64) if sms <= self.most_sms(size)]
            self.scale(kept["sms"], size, self.shape, points)

    def scale(self, kept: list[Row], size: int, shape: Shape, points: list[int]) -> None:
        """One shape and group size, with one buffer."""
        schedule, names = self.schedule(Schedule(warmup=5, calls=8, batches=3)), self.works(SCALING_WORKS)
        team = self.team(size)
        for row in self.run_works(team, shape, points, names, schedule) if team else ():
            kept.append(row)
            self.report.show(row)
        dist.barrier()
