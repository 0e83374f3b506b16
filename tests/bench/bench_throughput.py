"""Throughput dispatch and combine on GPUs against the memory floor, for several group sizes in one run.

    python -m moe_ep_plugin.share_gpu --ranks 8 -- tests/bench/bench_throughput.py [--json FILE]
    ... bench_throughput.py --small           128 and 512 tokens, eager and in CUDA graphs, with launches counted
    ... bench_throughput.py --scaling         against tokens, ranks and SMs; plot_throughput.py draws its JSON
    ... bench_throughput.py --main --small --scaling   all of it in one start

The first R ranks work while the others wait without touching the GPU, for each R of --ranks.

Workload: T = 4096 tokens a rank of H = 7168 bf16 elements, normally distributed; each token has K = 8 of E = 256
experts, uniformly random and distinct, with a seed per rank. Gate weights travel beside the rows in every
dispatch, expert ids too in layout "rank"; these few bytes are not counted.

Time: warm-up, then batches of calls made back to back, each batch after a barrier and two untimed calls, between
CUDA events. The output of a call lives until the next call has returned, as a user would hold it. The slowest rank
counts in each batch; the figure is the median over batches, beside the smallest and the largest. Before a work is timed
its result is compared with what torch computes from the same data; a wrong one is reported and not timed.

Floor: the bytes that the work has to read and write on all ranks, over the bandwidth (bytes read + written) of large
device-to-device copies that one rank measures alone at the start. Counted from this run's routing, with
    S  tokens of all ranks                 row  2 H bytes
    N  received rows, layout "rank"        q    H bytes and 4 for every 128 elements, an fp8 row with its scales
    C  received rows, layout "expert": one for every token and expert (S K)

    dispatch_rank           (S + N) row    layout "rank", exact sizes: waits on the host for the counts
    dispatch_rank_handle    (S + N) row    the same with the routing of an earlier dispatch
    dispatch_rank_fp8       S row + N q    fp8 wire, quantised while sending
    dispatch_rank_fp8_handle  S row + N q
    dispatch_rank_max       S row + M row  only with --small: max_recv_tokens, M rows in all: what the fullest rank
                                           receives, rounded up to 64, times ranks
    dispatch_expert         (S + C) row    layout "expert"
    dispatch_expert_handle  (S + C) row
    dispatch_expert_fp8     S row + C q
    combine_rank            (N + S) row    rows in leased memory (empty_rows)
    combine_rank_any        (3 N + S) row  rows in ordinary memory: staged (read, written), then read; (N + S) row where
                                           staging stays in the L2 cache ("floor in L2")
    combine_expert          (C + S) row    leased rows, weighted sum
    dispatch_expert_2stage  (S + 2 N + C) row   expand="two_stage": received, read again, fanned out
    combine_expert_2stage   (C + 2 N + S) row   summed on the expert's side, read again
Small work may stay in the L2 cache and go below its floor.

--small: "launch share" is 1 - graph / eager, with one call a graph and graphs replayed back to back. Launches are what
torch.profiler sees of one eager call on rank 0.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from bench_host import routing
from common import gpu_facts, machine, start_rank, write_json

from moe_ep_plugin import EpBuffer, EpConfig
from moe_ep_plugin.routing import ExpertPlacement
from moe_ep_plugin.wire import num_scales, quantize_blocks

T = TypeVar("T")
Row = dict[str, Any]
Call = Callable[[], Any]

DEFAULT_SMS = {8: 16}  # Other group sizes: 24.
CHECK_ROWS = 2048  # Rows compared at a time, which bounds the memory of a check.
LEAD_IN_CALLS = 2  # Untimed calls that bring the ranks' streams in step after a barrier.


# What is measured against


@dataclass(frozen=True)
class Target:
    """µs a call: what this project set itself (bar, stretch), and DeepEP V1 on an H200, same rig."""

    bar: int | None
    stretch: int | None
    deepep: int | None
    beside: str = ""  # Work that DeepEP leaves to another kernel, not in its figure.


# targets: bars and stretch goals that were set before the kernels were written, for one H200 with ranks as processes
# under MPS and this file's workload. DeepEP V1 (commit 567632d) was measured on that rig with the same shapes.
# Keys are ranks x SMs a rank.
TARGETS: dict[str, dict[str, Target]] = {
    "8x16": {
        "dispatch_rank": Target(850, 760, 2554),
        "dispatch_rank_handle": Target(None, None, 2430),
        "dispatch_rank_fp8": Target(580, 470, 1453),
        "dispatch_rank_fp8_handle": Target(None, None, 1362),
        "combine_rank": Target(800, 740, 2296),
        "combine_rank_any": Target(1900, 1500, 2296),
        "dispatch_expert": Target(1200, 1080, 2554, "permute"),
        "combine_expert": Target(1100, 1030, 2296, "unpermute"),
    },
    "4x24": {
        "dispatch_rank": Target(350, 310, 1141),
        "dispatch_rank_handle": Target(None, None, 1104),
        "dispatch_rank_fp8": Target(230, 190, 610),
        "dispatch_rank_fp8_handle": Target(None, None, 589),
        "combine_rank": Target(330, 290, 901),
        "combine_rank_any": Target(None, None, 901),
        "dispatch_expert": Target(None, None, 1141, "permute"),
        "combine_expert": Target(None, None, 901, "unpermute"),
    },
    "2x24": {
        "dispatch_rank": Target(210, 175, 440),
        "dispatch_rank_handle": Target(None, None, 386),
        "dispatch_rank_fp8": Target(150, 120, 329),
        "dispatch_rank_fp8_handle": Target(None, None, 260),
        "combine_rank": Target(225, 180, 460),
        "combine_rank_any": Target(None, None, 460),
        "dispatch_expert": Target(None, None, 440, "permute"),
        "combine_expert": Target(None, None, 460, "unpermute"),
    },
}
TARGET_GPU = "H200"


@dataclass(frozen=True)
class Shape:
    """One workload; tokens are a rank's."""

    tokens: int
    hidden: int
    topk: int
    experts: int


TARGET_SHAPE = Shape(tokens=4096, hidden=7168, topk=8, experts=256)


@dataclass(frozen=True)
class Counts:
    """Rows of one dispatch on all ranks together, and the bytes of a row; see the module's text."""

    tokens: int
    rank_rows: int
    expert_rows: int
    max_rows: int
    row: int
    fp8_row: int


@dataclass(frozen=True)
class Schedule:
    """Calls of one measurement."""

    warmup: int
    calls: int
    batches: int


# Ranks that do the same things in the same order, and notice together that one could not


class Failed(Exception):
    """Some rank could not do its part; raised on all ranks of the team."""


class DoesNotFit(Exception):
    """The heap would be larger than allowed; raised on all ranks of the team."""


class DeviceLost(Exception):
    """Some rank's device takes no more work; raised on all ranks of the team."""


class Team:
    """The first ``size`` ranks.

    Args:
        groups: The first is the team's own. The others are for buffers, one after the other, as a start-up that one
            rank gives up leaves a group out of step.
    """

    def __init__(self, groups: list[Any], size: int, device: torch.device) -> None:
        self._group, *self._buffer_groups = groups
        self.size, self.device = size, device
        self.rank = dist.get_rank(self._group)

    @property
    def buffer_group(self) -> Any:
        """The group to make buffers with."""
        return self._buffer_groups[0]

    def change_buffer_group(self) -> None:
        """Go on with another group, if one is left."""
        if len(self._buffer_groups) > 1:
            del self._buffer_groups[0]

    def together(self, run: Callable[[], T]) -> T:
        """Run this rank's part, wait for all ranks, and raise on all of them if any part failed."""
        result, error, lost = None, None, False
        try:
            result = run()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
            traceback.print_exc()
            lost = self._device_lost()
        flag = torch.tensor([0 if error is None else 2 if lost else 1])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        if int(flag) == 0:
            return result  # type: ignore[return-value]
        result = None
        told: list[str | None] = [None] * self.size
        dist.all_gather_object(told, error, group=self._group)
        text = "; ".join(f"rank {rank}: {e}" for rank, e in enumerate(told) if e is not None)
        raise (DeviceLost if int(flag) > 1 else Failed)(text)

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        """A CPU tensor of every rank, stacked."""
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine.contiguous(), group=self._group)
        return torch.stack(everyone)

    def _device_lost(self) -> bool:
        try:
            synchronize(self.device)
        except Exception:
            return True
        return False


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Microseconds between the start and the end of what ``run`` puts on the current stream."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e6
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def repeat(call: Call, times: int) -> None:
    """Call back to back; an output dies when the next call has returned."""
    held = None
    for _ in range(times):
        held = call()  # noqa: F841


# The data of a run, and what must come of it


@functools.lru_cache(maxsize=8)
def own_routing(shape: Shape, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids and gate weights of a rank, on the CPU."""
    return routing(shape.tokens, shape.topk, shape.experts, rank)


def require(ok: bool | torch.Tensor, what: str) -> None:
    """Fail a check."""
    if not bool(ok):
        raise ValueError(f"wrong result: {what}")


class Data:
    """Rows and routing of every rank of a team, and the checks of what this rank got.

    Rows for combine are the dispatched ones times a power of two: 2^rank in layout "rank", 2^(expert % 4) in layout
    "expert", so that a row in a wrong place shows and sums are exact until they are rounded (but for gate weights).
    """

    def __init__(self, team: Team, shape: Shape) -> None:
        self.shape, self.device, self.rank, self.ranks = shape, team.device, team.rank, team.size
        idx, weights = own_routing(shape, team.rank)
        self.all_idx = team.gather(idx).to(self.device)
        self.all_weights = team.gather(weights).to(self.device)
        self.idx, self.weights = self.all_idx[self.rank], self.all_weights[self.rank]
        self.placement = ExpertPlacement.make(shape.experts, self.ranks, None)
        self.owner = torch.tensor(self.placement.expert_to_rank, device=self.device)
        self.local = torch.tensor(self.placement.local_index, device=self.device)
        self.x = self.rows_of(self.rank)
        self.counts = self._count()

    def rows_of(self, rank: int) -> torch.Tensor:
        """The rows that a rank dispatches."""
        generator = torch.Generator(self.device).manual_seed(1000 + rank)
        size = (self.shape.tokens, self.shape.hidden)
        return torch.randn(size, generator=generator, dtype=torch.bfloat16, device=self.device)

    def _count(self) -> Counts:
        present = self._present(self.all_idx.flatten(0, 1))
        tokens, hidden = self.all_idx.shape[0] * self.shape.tokens, self.shape.hidden
        self.max_recv = -(-int(present.sum(0).max()) // 64) * 64
        return Counts(
            tokens=tokens,
            rank_rows=int(present.sum()),
            expert_rows=tokens * self.shape.topk,
            max_rows=self.max_recv * self.ranks,
            row=2 * hidden,
            fp8_row=hidden + 4 * num_scales(hidden),
        )

    def _present(self, idx: torch.Tensor) -> torch.Tensor:
        """[tokens, ranks]: whether a token has an expert there."""
        return torch.zeros(len(idx), self.ranks, device=idx.device).scatter_(1, self.owner[idx], 1.0)

    def check_dispatch(self, out: Any, layout: str, wire: str, fixed: int | None) -> None:
        """Compare every received row, bit for bit, with what its sender has; ``fixed`` is max_recv_tokens."""
        sources = list(self._rank_positions() if layout == "rank" else self._expert_positions())
        received = sum(len(where) for where, _, _ in sources)
        # Before anything is indexed: an index out of range would end the device's context.
        fits = len(out.x) == received if fixed is None else len(out.x) == fixed
        require(fits and len(out.topk_weights) == len(out.x), f"{len(out.x)} rows, {received} of them with a token")
        for source, (where, token, slot) in enumerate(sources):
            here = self.owner[self.all_idx[source]] == self.rank
            weights = self.all_weights[source]
            if layout == "rank":
                ids = torch.where(here, self.local[self.all_idx[source]], -1)
                require(out.topk_idx.shape[0] == len(out.x), "length of topk_idx")
                require(torch.equal(out.topk_idx[where], ids[token]), f"topk_idx from rank {source}")
                weights = torch.where(here, weights, 0.0)[token]
            else:
                weights = weights[token, slot]
            require(torch.equal(out.topk_weights[where], weights), f"topk_weights from rank {source}")
            x = self.rows_of(source)
            for at, taken in zip(where.split(CHECK_ROWS), token.split(CHECK_ROWS), strict=True):
                require(self._same_rows(out, at, x[taken], wire), f"rows from rank {source}")
        rest = out.x[received:]
        require(not len(rest) or not rest.view(torch.uint8).any(), "rows past the received ones are not zero")

    def _rank_positions(self) -> Iterable[tuple[torch.Tensor, torch.Tensor, None]]:
        """For every source: places of its rows here, in layout "rank", and the tokens they carry."""
        start = 0
        for idx in self.all_idx:
            token = (self.owner[idx] == self.rank).any(1).nonzero().squeeze(1)
            yield torch.arange(start, start + len(token), device=self.device), token, None
            start += len(token)

    def _expert_positions(self) -> Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For every source: places in layout "expert", tokens, and their top-k positions."""
        source, token, slot = (self.owner[self.all_idx] == self.rank).nonzero().unbind(1)
        order = self.local[self.all_idx[source, token, slot]].argsort(stable=True)
        where = torch.empty_like(order)
        where[order] = torch.arange(len(order), device=self.device)
        for rank in range(self.ranks):
            mine = source == rank
            yield where[mine], token[mine], slot[mine]

    @staticmethod
    def _same_rows(out: Any, at: torch.Tensor, want: torch.Tensor, wire: str) -> bool:
        got = out.x.view(torch.uint8)[at]
        if wire == "fp8":
            want, scale = quantize_blocks(want)
            if not torch.equal(out.scale[at], scale):
                return False
        return torch.equal(got, want.view(torch.uint8))

    def fill(self, rows: torch.Tensor, out: Any, layout: str) -> torch.Tensor:
        """Write what combine shall bring back into ``rows``."""
        if layout == "rank":
            return torch.mul(out.x, 2.0 ** (self.rank % 8), out=rows)
        experts = torch.tensor(self.placement.experts_of_rank[self.rank], dtype=torch.int64)
        factors = torch.exp2((experts % 4).float()).repeat_interleave(out.tokens_per_expert.cpu())
        return torch.mul(out.x, factors.to(self.device, torch.bfloat16)[:, None], out=rows)

    def check_combine(self, y: torch.Tensor, layout: str) -> None:
        """Compare sums: exactly in layout "rank", within two bf16 roundings where gate weights take part."""
        if layout == "rank":
            powers = torch.exp2(torch.arange(self.ranks, device=self.device) % 8).float()
            factors, tolerance = self._present(self.idx).mul(powers).sum(1), 0.0
        else:
            factors, tolerance = (self.weights * torch.exp2((self.idx % 4).float())).sum(1), 2.0**-7
        require(y.shape == self.x.shape and y.dtype == self.x.dtype, f"shape {list(y.shape)} of {y.dtype}")
        for got, x, factor in zip(*(t.split(CHECK_ROWS) for t in (y, self.x, factors)), strict=True):
            want = (x.float() * factor[:, None]).to(x.dtype).float()
            require(((got.float() - want).abs() <= tolerance * want.abs()).all(), "sums of tokens")


# A buffer at work


class Session:
    """One buffer of a team, with data.

    Raises:
        DoesNotFit: The heap would be larger than allowed.
        Failed: The buffer could not be made.
    """

    def __init__(self, team: Team, options: argparse.Namespace, shape: Shape, sms: int, expand: str = "auto") -> None:
        self.team, self.sms, self.expand, self.device = team, sms, expand, team.device
        self.data = team.together(lambda: Data(team, shape))
        settings: dict[str, Any] = {
            "num_experts": shape.experts,
            "num_topk": shape.topk,
            "hidden": shape.hidden,
            "max_tokens_per_rank": shape.tokens,
            "backend": options.backend,
            "device": team.device.type,
            "expand": expand,
            "num_sms": sms,
            "timeout_s": options.timeout_s,
        }
        settings["pool_bytes"] = self._pool_bytes(EpConfig(**settings), heap_limit(options, team))
        try:
            self.buffer = team.together(lambda: EpBuffer(team.buffer_group, EpConfig(**settings)))
        except Failed:
            team.change_buffer_group()
            raise

    def _pool_bytes(self, config: EpConfig, limit: int) -> int | None:
        """The default pool where the heap then stays below ``limit``, else what is left for it."""
        plan, counts = config.memory_plan(self.team.size), self.data.counts
        if plan.total <= limit:
            return None
        # Two outputs that overlap, rows for combine, their staging; 5 % for ranks that receive more than others.
        block = int(1.05 * counts.expert_rows / self.team.size) * (counts.row + 4 * num_scales(config.hidden) + 4)
        room = limit - plan.overflow
        if room < 4 * block:
            needed = plan.overflow + 4 * block
            raise DoesNotFit(f"a heap of {needed / 1e9:.1f} GB a rank is over the limit of {limit / 1e9:.1f} GB")
        return room

    def close(self) -> None:
        """Give the heap back, and wait until all ranks have: memory that a peer maps is not free yet."""

        def close_mine() -> None:
            self.buffer.close()
            del self.data
            tidy(self.device)

        with suppress(Failed):
            self.team.together(close_mine)

    def dispatch(self, layout: str, **options: Any) -> Any:
        """Dispatch this rank's rows, by their ids unless ``handle`` is given."""
        idx = None if options.get("handle") is not None else self.data.idx
        data = self.data
        return self.buffer.dispatch(data.x, idx, data.weights, layout=layout, num_sms=self.sms, **options)

    def combine_rows(self, layout: str, leased: bool) -> tuple[torch.Tensor, Any]:
        """Rows to combine, and the dispatch that they answer (without its rows)."""
        out = self.dispatch(layout)
        rows = self.buffer.empty_rows(out.handle) if leased else torch.empty_like(out.x)
        self.data.fill(rows, out, layout)
        self.buffer.check()
        return rows, (out.handle, out.topk_weights.clone() if layout == "expert" else None)


def tidy(device: torch.device) -> None:
    """Free what nobody refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def heap_limit(options: argparse.Namespace, team: Team) -> int:
    """Bytes that one rank's heap may take."""
    limit = options.heaps_gb * 1e9
    if team.device.type == "cuda":
        limit = min(limit, 0.8 * torch.cuda.get_device_properties(team.device).total_memory)
    return int(limit) // team.size


@dataclass(frozen=True)
class Work:
    """One thing to time.

    Attributes:
        bytes: What it has to read and write.
        make: From a session: the call, and the check of what the call returns.
        expand: The setting of the buffer.
        in_l2: The bytes if staging stays in the L2 cache.
    """

    bytes: Callable[[Counts], int]
    make: Callable[[Session], tuple[Call, Callable[[Any], None]]]
    expand: str = "auto"
    in_l2: Callable[[Counts], int] | None = None


def dispatch_of(layout: str, wire: str = "bf16", reuse: bool = False, fixed: bool = False) -> Callable[..., Any]:
    """Maker of a dispatch."""

    def make(session: Session) -> tuple[Call, Callable[[Any], None]]:
        handle = session.dispatch(layout).handle if reuse else None
        limit = session.data.max_recv if fixed else None
        return (
            lambda: session.dispatch(layout, wire=wire, handle=handle, max_recv_tokens=limit),
            lambda out: session.data.check_dispatch(out, layout, wire, limit),
        )

    return make


def combine_of(layout: str, leased: bool = True) -> Callable[..., Any]:
    """Maker of a combine."""

    def make(session: Session) -> tuple[Call, Callable[[Any], None]]:
        rows, (handle, weights) = session.combine_rows(layout, leased)
        return (
            lambda: session.buffer.combine(rows, handle, topk_weights=weights, num_sms=session.sms),
            lambda y: session.data.check_combine(y, layout),
        )

    return make


def _rank_bytes(c: Counts) -> int:
    return (c.tokens + c.rank_rows) * c.row


def _rank_fp8_bytes(c: Counts) -> int:
    return c.tokens * c.row + c.rank_rows * c.fp8_row


def _expert_bytes(c: Counts) -> int:
    return (c.tokens + c.expert_rows) * c.row


def _two_stage_bytes(c: Counts) -> int:
    return (c.tokens + 2 * c.rank_rows + c.expert_rows) * c.row


WORKS = {
    "dispatch_rank": Work(_rank_bytes, dispatch_of("rank")),
    "dispatch_rank_handle": Work(_rank_bytes, dispatch_of("rank", reuse=True)),
    "dispatch_rank_fp8": Work(_rank_fp8_bytes, dispatch_of("rank", "fp8")),
    "dispatch_rank_fp8_handle": Work(_rank_fp8_bytes, dispatch_of("rank", "fp8", reuse=True)),
    "combine_rank": Work(_rank_bytes, combine_of("rank")),
    "combine_rank_any": Work(
        lambda c: (3 * c.rank_rows + c.tokens) * c.row, combine_of("rank", leased=False), in_l2=_rank_bytes
    ),
    "dispatch_expert": Work(_expert_bytes, dispatch_of("expert")),
    "dispatch_expert_handle": Work(_expert_bytes, dispatch_of("expert", reuse=True)),
    "dispatch_expert_fp8": Work(lambda c: c.tokens * c.row + c.expert_rows * c.fp8_row, dispatch_of("expert", "fp8")),
    "combine_expert": Work(_expert_bytes, combine_of("expert")),
    "dispatch_expert_2stage": Work(_two_stage_bytes, dispatch_of("expert"), "two_stage"),
    "combine_expert_2stage": Work(_two_stage_bytes, combine_of("expert"), "two_stage"),
    "dispatch_rank_max": Work(lambda c: (c.tokens + c.max_rows) * c.row, dispatch_of("rank", fixed=True)),
}
MAIN_WORKS = tuple(name for name in WORKS if name != "dispatch_rank_max")
SMALL_WORKS = ("dispatch_rank", "dispatch_rank_max", "dispatch_rank_handle", "combine_rank")
GRAPH_WORKS = ("dispatch_rank_max", "dispatch_rank_handle", "combine_rank")
SMALL_RANKS = (2, 8)
MOST_SCALING_RANKS = 8
SCALING_WORKS = ("dispatch_rank", "combine_rank", "dispatch_expert", "combine_expert")


# Measuring


def checked_call(session: Session, name: str) -> tuple[Call, Callable[[Any], None]]:
    """A work's call, after one call whose result was right, and its check."""
    team = session.team
    call, verify = team.together(lambda: WORKS[name].make(session))

    def first() -> None:
        out = call()
        session.buffer.check()
        verify(out)

    team.together(first)
    return call, verify


def time_call(session: Session, call: Call, schedule: Schedule) -> Row:
    """Microseconds of a call, see the module's text."""

    def batch(calls: int) -> float:
        repeat(call, LEAD_IN_CALLS)
        spent = timed(lambda: repeat(call, calls), session.device)
        session.buffer.check()
        return spent / calls

    def all_batches() -> list[float]:
        session.team.together(lambda: batch(schedule.warmup))
        return [session.team.together(lambda: batch(schedule.calls)) for _ in range(schedule.batches)]

    by_rank = session.team.gather(torch.tensor(all_batches(), dtype=torch.float64))
    slowest = by_rank.max(0).values.tolist()
    return {
        "us": statistics.median(slowest),
        "us_min": min(slowest),
        "us_max": max(slowest),
        "us_batches": slowest,
        "us_per_rank": [statistics.median(times) for times in by_rank.tolist()],
    }


def measure(session: Session, name: str, schedule: Schedule) -> Row:
    """One row: check, then time."""
    stats = session.buffer.stats
    before = (stats.operations, stats.staged, stats.copied_out)
    call, _ = checked_call(session, name)
    row = time_call(session, call, schedule)
    operations, staged, copied_out = (
        now - then for now, then in zip((stats.operations, stats.staged, stats.copied_out), before, strict=True)
    )
    return row | {"operations": operations, "staged": staged, "copied_out": copied_out}


class Report:
    """Rank 0's table and JSON, complete after every row; silent on other ranks."""

    def __init__(self, options: argparse.Namespace, device: torch.device, shape: Shape) -> None:
        self.active, self._path = dist.get_rank() == 0, options.json
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
        work, bandwidth = WORKS[name], self.results["copy_bytes_per_s"] or float("nan")
        row["bytes"] = work.bytes(counts)
        row["floor_us"] = row["bytes"] / bandwidth * 1e6
        row["ratio"] = row["us"] / row["floor_us"]
        row["bytes_per_s"] = row["bytes"] / row["us"] * 1e6
        if work.in_l2:
            row["floor_in_l2_us"] = work.in_l2(counts) / bandwidth * 1e6
        target = TARGETS.get(f"{row['ranks']}x{row['sms']}", {}).get(name)
        if target and self._has_targets and row["tokens"] == TARGET_SHAPE.tokens:
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


class Bench:
    """Runs modes over teams; every rank calls the same methods."""

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
        wanted = self.options.sms.get(ranks) or self.options.sms.get(0) or DEFAULT_SMS.get(ranks, 24)
        return max(1, min(wanted, self.sm_count // ranks))

    def works(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that --works leaves."""
        return [name for name in names if not self.options.works or name in self.options.works]

    def measure_copy(self) -> None:
        """Bandwidth of large copies, by rank 0 alone."""
        if self.rank == 0:
            half = self.options.copy_mb << 20
            source = torch.randint(0, 255, (half,), dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            repeat(lambda: target.copy_(source), 3)
            times = [timed(lambda: target.copy_(source), self.device) for _ in range(10)]  # type: ignore[arg-type]
            self.report.results["copy_bytes_per_s"] = 2 * half / statistics.median(times) * 1e6
            del source, target
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
        for expand in dict.fromkeys(WORKS[name].expand for name in names):
            session: Session | None = None
            unusable: Row = {}  # Why no buffer with these settings can be made.
            for sms in points:
                for name in (n for n in names if WORKS[n].expand == expand):
                    row: Row = {"work": name, "ranks": team.size, "sms": sms, "tokens": shape.tokens} | unusable
                    counts = None
                    try:
                        if session is None and not unusable:
                            session = self.open(team, shape, max(points), expand)
                        if session is not None:
                            session.sms, counts = sms, session.data.counts
                            row |= measure(session, name, schedule)
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
                row["graph"] = time_graph(session, name, schedule)
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
                found = count_launches(session, name)
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
            self.scale(kept["ranks"], size, self.shape, [min(16, self.sm_count // size)])
        self.report.header("Scaling with SMs")
        for size in self.sizes([2]):
            points = [sms for sms in (2, 4, 8, 16, 24, 32, 48, 64) if sms * size <= self.sm_count]
            self.scale(kept["sms"], size, self.shape, points)

    def scale(self, kept: list[Row], size: int, shape: Shape, points: list[int]) -> None:
        """One shape and group size, with one buffer."""
        schedule, names = self.schedule(Schedule(warmup=5, calls=8, batches=3)), self.works(SCALING_WORKS)
        team = self.team(size)
        for row in self.run_works(team, shape, points, names, schedule) if team else ():
            kept.append(row)
            self.report.show(row)
        dist.barrier()


def time_graph(session: Session, name: str, schedule: Schedule) -> Row:
    """Capture one call, check what a replay gives, time replays."""
    team = session.team
    call, verify = checked_call(session, name)

    def capture() -> tuple[torch.cuda.CUDAGraph, Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            repeat(call, 3)
        torch.cuda.current_stream().wait_stream(stream)
        session.buffer.check()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            held = call()
        # Poison. No rank replays before all ranks have done this.
        (held if isinstance(held, torch.Tensor) else held.x).fill_(float("nan"))
        torch.cuda.synchronize()
        return graph, held

    graph, held = team.together(capture)

    def first() -> None:
        graph.replay()
        session.buffer.check()
        torch.cuda.synchronize()
        verify(held)

    team.together(first)
    return time_call(session, graph.replay, schedule)


def count_launches(session: Session, name: str, calls: int = 4) -> Row:
    """Kernels, and copies and fills, of one call, as rank 0's profiler sees them."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    team = session.team
    call, _ = checked_call(session, name)

    def start() -> None:  # The first use takes seconds, in which peers should not wait in a kernel.
        if team.rank == 0:
            with profile(activities=[ProfilerActivity.CUDA]):
                torch.ones(1, device=session.device).add_(1)
                torch.cuda.synchronize()

    def count() -> list[str]:
        if team.rank != 0:
            repeat(call, calls)
            session.buffer.check()
            return []
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            repeat(call, calls)
            torch.cuda.synchronize()
        session.buffer.check()
        return [event.name for event in seen.events() if event.device_type == DeviceType.CUDA]

    team.together(start)
    names = team.together(count)
    copies = [n for n in names if n.lower().startswith(("memcpy", "memset"))]
    kernels = [n.replace("(anonymous namespace)::", "").split("(")[0][:80] for n in names if n not in copies]
    return {"kernels": len(kernels) / calls, "copies": len(copies) / calls, "names": sorted(set(kernels))}


def parse_sms(text: str) -> dict[int, int]:
    """``"16"`` (key 0: any group size) or ``"8:16,4:24"``."""
    pairs = [part.split(":") for part in text.split(",") if part]
    return {int(pair[0]) if len(pair) == 2 else 0: int(pair[-1]) for pair in pairs}


def numbers(text: str) -> list[int]:
    """A comma list of whole numbers."""
    return [int(part) for part in text.split(",") if part]


def names_of_works(text: str) -> list[str]:
    """A comma list of works."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in WORKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown} are not among {', '.join(WORKS)}")
    return names


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write results to this file, after every row")
    parser.add_argument("--main", action="store_true", help="the table of works; the default if no mode is given")
    parser.add_argument("--small", action="store_true", help="few tokens, graphs, launches")
    parser.add_argument("--scaling", action="store_true", help="against tokens, ranks and SMs")
    parser.add_argument("--ranks", type=numbers, default=[8, 4, 2], help="group sizes (default 8,4,2)")
    parser.add_argument("--scaling-ranks", type=numbers, default=[8, 4], help="group sizes of the curve over tokens")
    parser.add_argument("--sms", type=parse_sms, default={}, help="SMs a rank: 16, or by group size 8:16,4:24")
    parser.add_argument("--works", type=names_of_works, default=[], help="only these, comma separated")
    parser.add_argument("--calls", type=int, help="calls a batch")
    parser.add_argument("--batches", type=int, help="batches")
    parser.add_argument("--heaps-gb", type=float, default=96.0, help="most of the heaps of all ranks, in 10^9 bytes")
    parser.add_argument("--timeout-s", type=float, default=15.0, help="longest wait for a peer")
    for name in ("tokens", "hidden", "topk", "experts"):
        parser.add_argument(f"--{name}", type=int, default=getattr(TARGET_SHAPE, name))
    # For trying this program without a GPU.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--copy-mb", type=int, default=2048, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.main = options.main or not (options.small or options.scaling)
    return options


def main() -> None:
    """Run the modes asked for."""
    options = parse_options()
    started = time.perf_counter()
    bench = Bench(options)
    gc.freeze()
    bench.measure_copy()
    if options.main:
        bench.main()
    if options.scaling:
        bench.scaling()
    if options.small:
        bench.small()
    bench.report.results["seconds"] = time.perf_counter() - started
    bench.report.save()
    bench.report.say(f"\n{bench.report.results['seconds']:.0f} s")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
