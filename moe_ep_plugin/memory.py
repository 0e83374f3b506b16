"""What a buffer reserves: the sizes of the symmetric heap's regions."""

from __future__ import annotations

from dataclasses import dataclass, field

from .config import EpConfig
from .routing import ExpertPlacement
from .types import Layout
from .wire import num_scales

_CACHE_LINE = 64
_PAGE = 4096
# Leased blocks of the largest kind that the default pool has room for: a few layers' activations.
_DEFAULT_POOL_BLOCKS = 4
_SMALLEST_POOL = 64 << 20
# On GPUs: how much more than its even share of the routes a rank is expected to receive, and blocks of that size.
_SPREAD = 2
_POOL_BLOCKS_ON_GPU = 3
_MOST_POOL_BLOCKS = 6


def _align(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


@dataclass(frozen=True)
class LowLatencyPlan:
    """Bytes of one rank's fixed slots for low-latency mode, in one layout.

    Attributes:
        capacity: Rows that one group has room for: every token of every rank.
        slots: Rows of a receive buffer: ``capacity`` for each of the most local experts that a rank has (layout
            ``"expert"``), or once (``"rank"``).
        receive: One of the two buffers that dispatches fill.
        rows: One of the two buffers that combines read, where experts may write their results.
    """

    capacity: int
    slots: int
    receive: int
    rows: int

    @property
    def total(self) -> int:
        """Bytes of all four buffers."""
        return 2 * (self.receive + self.rows)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank's heap; ``print`` it for a table.

    Attributes:
        largest_block: The most that one dispatch can receive: every rank sends all its tokens here.
        pool: Limit of the leased rows: ``pool_bytes``, or on the host a few times ``largest_block``, on GPUs 3 to 6
            times what a dispatch is expected to receive.
        overflow: Kept aside for a dispatch that finds the pool used up; its rows are then copied out. On the
            host for the largest block; on GPUs, where it is taken at once, for twice a balanced one.
        low_latency: The fixed slots that are reserved, or None without low-latency mode.
        low_latency_layouts: What the slots take in each layout, whichever is configured.
    """

    largest_block: int
    pool: int
    overflow: int
    low_latency: LowLatencyPlan | None = None
    low_latency_layouts: dict[str, LowLatencyPlan] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes reserved for rows.

        Memory on GPUs. On the host, address space, of which the low-latency slots are taken at once and the rest as
        it is used.
        """
        return self.pool + self.overflow + (self.low_latency.total if self.low_latency else 0)

    def __str__(self) -> str:
        """A line for each purpose."""
        lines = [("largest block", self.largest_block), ("pool", self.pool), ("overflow", self.overflow)]
        for layout, low in self.low_latency_layouts.items():
            kept = "reserved" if low == self.low_latency else "not reserved"
            lines.append((f"low latency, layout {layout!r}: 2 receive buffers ({kept})", 2 * low.receive))
            lines.append((f"low latency, layout {layout!r}: 2 buffers of rows ({kept})", 2 * low.rows))
        lines.append(("total", self.total))
        return "\n".join(f"{bytes_ / 2**20:12.1f} MiB  {purpose}" for purpose, bytes_ in lines)


def plan(config: EpConfig, num_ranks: int) -> MemoryPlan:
    """See :meth:`EpConfig.memory_plan`."""
    placement = ExpertPlacement.make(config.num_experts, num_ranks, config.expert_to_rank)
    most_local_experts = max(len(held) for held in placement.experts_of_rank)
    tokens = num_ranks * config.max_tokens_per_rank
    row = config.hidden * config.dtype.itemsize
    scales = 4 * num_scales(config.hidden)
    per_expert_row = row + scales + 4
    per_rank_row = row + scales + (4 + 8) * config.num_topk

    def block(tokens: int) -> int:
        """Bytes that the routes of ``tokens`` tokens take on one rank, in whichever layout takes more."""
        expert_rows = tokens * config.num_topk + most_local_experts * (config.expert_alignment - 1)
        return _align(max(expert_rows * per_expert_row, tokens * per_rank_row) + 4 * _CACHE_LINE, _PAGE)

    largest = block(tokens)
    if config.device_type == "cuda":
        # Memory is taken at once: blocks of the usual size for a few layers, and the worst case where it isn't far off.
        usual = min(largest, _SPREAD * block(config.max_tokens_per_rank))
        most = min(largest, _MOST_POOL_BLOCKS * usual)
        default_pool, overflow = max(_POOL_BLOCKS_ON_GPU * usual, most), usual
    else:
        default_pool, overflow = _DEFAULT_POOL_BLOCKS * largest, largest
    pool = config.pool_bytes if config.pool_bytes is not None else max(default_pool, _SMALLEST_POOL)
    layouts = low_latency_plans(config, num_ranks, most_local_experts)
    return MemoryPlan(
        largest_block=largest,
        pool=_align(pool, _PAGE),
        overflow=overflow,
        low_latency=layouts.get(config.low_latency_layout),
        low_latency_layouts=layouts,
    )


def low_latency_plans(config: EpConfig, num_ranks: int, most_local_experts: int) -> dict[str, LowLatencyPlan]:
    """The low-latency slots in both layouts; empty without that mode."""
    if config.low_latency_tokens_per_rank is None:
        return {}
    capacity = num_ranks * config.low_latency_tokens_per_rank
    row = config.hidden * config.dtype.itemsize
    scales = 4 * num_scales(config.hidden)
    received = config.hidden + scales if config.wire == "fp8" else row

    def of(layout: Layout) -> LowLatencyPlan:
        slots = capacity * most_local_experts if layout == "expert" else capacity
        side = 0 if layout == "expert" else (4 + 8) * config.num_topk
        # A combine on the FP8 wire has rows and scales in place of rows.
        return LowLatencyPlan(
            capacity=capacity,
            slots=slots,
            receive=_align(slots * (received + side) + 4 * _CACHE_LINE, _PAGE),
            rows=_align(slots * max(row, _align(config.hidden, 16) + scales) + 2 * _CACHE_LINE, _PAGE),
        )

    return {"expert": of("expert"), "rank": of("rank")}
