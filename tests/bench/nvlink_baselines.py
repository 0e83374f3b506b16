"""What bench_nvlink.py compares with: an index permute and all_to_all_single, and copies between GPUs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
from nvlink_data import WholeData
from throughput_data import require
from throughput_measure import repeat, timed
from throughput_team import Team, synchronize

from moe_ep_plugin.types import FP8_BLOCK
from moe_ep_plugin.wire import FP8_DTYPE, num_scales, quantize_blocks


@dataclass
class Plan:
    """Where rows go: row i of what this rank sends is token ``token[i]``, grouped by rank.

    Attributes:
        into: Of each row of the output, its place among the received ones; None where they are the same.
    """

    token: torch.Tensor
    order: torch.Tensor
    send: list[int]
    receive: list[int]
    into: torch.Tensor | None


class PermuteAllToAll:
    """Dispatch and combine as frameworks do them without kernels of their own: torch and one collective.

    Layout "expert": a row for every (token, expert), sorted by expert; counts exchanged and brought to the host; rows
    permuted, exchanged, permuted again to expert-major order. Layout "rank": a row for every (token, rank), in the
    order in which they arrive. Gate weights stay on the tokens' side, which saves this baseline their way.

    Args:
        group: A group of the team's ranks whose backend carries tensors of the team's device.
    """

    def __init__(self, data: WholeData, layout: str, group: dist.ProcessGroup) -> None:
        if data.shape.experts % data.ranks:
            raise ValueError(f"{data.shape.experts} experts on {data.ranks} ranks: this baseline needs equal shares")
        self.data, self.layout, self.group = data, layout, group
        self.local = data.shape.experts // data.ranks

    def _exchange(self, rows: torch.Tensor, receive: list[int], send: list[int]) -> torch.Tensor:
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows, receive, send, group=self.group)
        return received

    def plan(self) -> Plan:
        """Sort this rank's routes and exchange counts; waits on the host for the sizes."""
        data, device = self.data, self.data.device
        ones = torch.ones((), dtype=torch.int64, device=device)
        if self.layout == "rank":
            present = torch.zeros(data.shape.tokens, data.ranks, dtype=torch.int64, device=device)
            present.scatter_(1, data.idx // self.local, 1)
            # Each route's place among the rows sent, for nothing but the shape of a Plan: sums go by token here.
            token = present.t().nonzero()[:, 1]
            counts = present.sum(0)[:, None]
            order = token
        else:
            flat = data.idx.flatten()
            order = flat.argsort(stable=True)
            token = order // data.shape.topk
            counts = torch.zeros(data.shape.experts, dtype=torch.int64, device=device)
            counts = counts.scatter_add_(0, flat, ones.expand(len(flat))).view(data.ranks, self.local)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        send, receive = torch.stack((counts.sum(1), theirs.sum(1))).tolist()
        into = None
        if self.layout == "expert":
            expert = torch.arange(self.local, device=device).repeat(data.ranks)
            into = expert.repeat_interleave(theirs.flatten(), output_size=sum(receive)).argsort(stable=True)
        return Plan(token, order, send, receive, into)

    def dispatch(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows that this rank receives, of tokens' ``rows``; the counting is part of it."""
        plan = self.plan()
        received = self._exchange(rows.index_select(0, plan.token), plan.receive, plan.send)
        return received if plan.into is None else received.index_select(0, plan.into)

    def combine(self, rows: torch.Tensor, plan: Plan, way_back: Plan, sums: str) -> torch.Tensor:
        """Sums of tokens, weighted in layout "expert".

        Args:
            way_back: The inverses of a plan's permutations, made beforehand; see :meth:`inverse`.
            sums: ``"gather"`` (by token, in one batched product) or ``"scatter"`` (``index_add_``).
        """
        back = rows if way_back.into is None else rows.index_select(0, way_back.into)
        returned = self._exchange(back, plan.send, plan.receive)
        tokens, hidden = self.data.shape.tokens, self.data.shape.hidden
        if self.layout == "expert" and sums == "gather":
            each = returned.index_select(0, way_back.order).view(tokens, -1, hidden)
            return torch.bmm(self.data.weights.to(rows.dtype)[:, None], each)[:, 0]
        if self.layout == "expert":
            returned = returned * self.data.weights.flatten()[plan.order].to(rows.dtype)[:, None]
        return rows.new_zeros(tokens, hidden).index_add_(0, plan.token, returned)

    def inverse(self, plan: Plan) -> Plan:
        """The way back of a plan's rows."""
        into = None if plan.into is None else _inverse(plan.into)
        order = _inverse(plan.order) if self.layout == "expert" else plan.order
        return Plan(plan.token, order, plan.receive, plan.send, into)

    def faster_sums(self, team: Team, rows: torch.Tensor, plan: Plan, way_back: Plan) -> str:
        """The way of summing that took less time on the slowest rank; all ranks get the same answer."""
        if self.layout == "rank":
            return "scatter"
        spent = []
        for sums in ("gather", "scatter"):
            repeat(lambda sums=sums: self.combine(rows, plan, way_back, sums), 2)  # type: ignore[misc]
            synchronize(team.device)
            spent.append(
                timed(lambda sums=sums: repeat(lambda: self.combine(rows, plan, way_back, sums), 3), team.device)  # type: ignore[misc]
            )
        slowest = team.gather(torch.tensor(spent, dtype=torch.float64)).max(0).values
        return ("gather", "scatter")[int(slowest.argmin())]


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    places = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, places)


def packed_fp8(x: torch.Tensor) -> torch.Tensor:
    """Rows of fp8 elements with their scales behind them, as bytes, so that one exchange takes both."""
    q, scale = quantize_blocks(x)
    return torch.cat((q.view(torch.uint8), scale.contiguous().view(torch.uint8)), 1)


def unpacked_fp8(rows: torch.Tensor, hidden: int) -> SimpleNamespace:
    """``x`` and ``scale`` of packed rows."""
    require(rows.shape[1] == hidden + 4 * num_scales(hidden) and hidden % FP8_BLOCK == 0, f"rows of {rows.shape[1]}")
    scale = rows[:, hidden:].contiguous().view(torch.float32)
    return SimpleNamespace(x=rows[:, :hidden].contiguous().view(FP8_DTYPE), scale=scale)


def measure_link(team: Team, megabytes: int) -> dict[str, object]:
    """Bytes per second that each rank's GPU receives while every rank copies from its neighbour, all at once.

    Copies by the GPUs' copy engines, one large one after the other: the ceiling that shares are of. With a GPU a rank
    they go round in a ring, so every GPU sends and receives. Otherwise nothing crosses a link and that is said.
    """
    device, gpus = team.device, torch.cuda.device_count() if team.device.type == "cuda" else 1
    across = gpus >= team.size > 1
    neighbour = torch.device("cuda", (team.rank + 1) % team.size) if across else device

    def prepare() -> tuple[torch.Tensor, torch.Tensor]:
        source = torch.randint(0, 255, (megabytes << 20,), dtype=torch.uint8, device=neighbour)
        target = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
        repeat(lambda: target.copy_(source, non_blocking=True), 2)
        synchronize(device)
        require(torch.equal(target[:4096].cpu(), source[:4096].cpu()), "a copied byte")
        return source, target

    source, target = team.together(prepare)

    def batch() -> float:
        return timed(lambda: repeat(lambda: target.copy_(source, non_blocking=True), 8), device) / 8

    spent = [team.together(batch) for _ in range(5)]
    by_rank = team.gather(torch.tensor(spent, dtype=torch.float64))
    slowest = statistics.median(by_rank.max(0).values.tolist())
    can = [torch.cuda.can_device_access_peer(device.index, neighbour.index)] if across else []
    return {
        "bytes_per_s": (megabytes << 20) / slowest * 1e6,
        "us_per_rank": [statistics.median(times) for times in by_rank.tolist()],
        "bytes_a_copy": megabytes << 20,
        "across_gpus": across,
        "peer_access": all(can) if across else None,
    }
