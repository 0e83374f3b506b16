"""What bench_nvlink.py runs, with which shapes and SMs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict

import torch.distributed as dist
from common import ranks_sharing
from nvlink_baselines import measure_link
from nvlink_data import NvlinkSession
from nvlink_report import LinkReport
from nvlink_works import LINK_WORKS
from throughput_data import Shape
from throughput_measure import Schedule
from throughput_modes import Bench
from throughput_team import Failed, Team, tidy
from throughput_works import Work


class LinkBench(Bench):
    """All ranks as one team; every rank calls the same methods."""

    table: Mapping[str, Work] = LINK_WORKS
    report: LinkReport

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.report = LinkReport(options, self.device, self.shape)
        team = self.team(self.world)
        assert team is not None
        # NCCL refuses two ranks on one GPU; gloo carries tensors of both kinds of device.
        alone = self.device.type == "cuda" and ranks_sharing(self.world, self.device) == 1
        self.report.results["collective"] = "nccl" if alone else "gloo"
        team.collective_group = dist.new_group(backend=self.report.results["collective"])

    def _sizes_of_modes(self) -> list[int]:
        return [self.world]

    def open(self, team: Team, shape: Shape, sms: int, expand: str = "auto") -> NvlinkSession:
        """A session; see there for what it raises."""
        tidy(self.device)
        return NvlinkSession(team, self.options, shape, sms, expand)

    def measure_link(self) -> None:
        """The link's ceiling, before any buffer exists."""
        team, report = self.team(self.world), self.report
        assert team is not None
        report.say(
            f"{report.results['gpu'] or 'CPU'}\n{self.world} ranks, backend {self.options.backend}, {self.shape}"
        )
        try:
            report.results["link"] = measure_link(team, self.options.copy_mb)
        except Failed as error:
            report.results["link"] = {"error": str(error)}
            report.say(f"copies between GPUs FAILED: {error}")
            return
        link = report.results["link"]
        where = (
            "from a neighbour's GPU, all ranks at once" if link["across_gpus"] else "in the rank's own memory: NO LINK"
        )
        report.say(f"copies {where}: {link['bytes_per_s'] / 1e9:.1f} GB/s into each; peer access {link['peer_access']}")
        report.save()

    def link(self) -> None:
        """All works: with the main number of tokens and each number of SMs, then the others with the first."""
        team, most = self.team(self.world), self.most_sms(self.world)
        assert team is not None
        points = [sms for sms in self.options.points if sms <= most] or [most]
        many = self.schedule(Schedule(warmup=5, calls=10, batches=60))
        for tokens in (self.shape.tokens, *self.options.others):
            self.report.header(f"{tokens} tokens a rank")
            shape = Shape(**asdict(self.shape) | {"tokens": tokens})
            at = points if tokens == self.shape.tokens else points[:1]
            for row in self.run_works(team, shape, at, self.works(LINK_WORKS), many):
                self.report.show(row)
            self.report.end_to_end(tokens)
            dist.barrier()
