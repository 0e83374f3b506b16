"""What a buffer reserves: the sizes of the symmetric heap's regions."""

from __future__ import annotations

from dataclasses import dataclass

from .config import EpConfig
from .routing import ExpertPlacement
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
class MemoryPlan:
    """Bytes of one rank's heap.

    Attributes:
        largest_block: The most that one dispatch can receive: every rank sends all its tokens here.
        pool: Limit of the leased rows: ``pool_bytes``, or on the host a few times ``largest_block``, on GPUs 3 to 6
            times what a dispatch is expected to receive.
        overflow: Kept aside for a dispatch that finds the pool used up; its rows are then copied out. On the
            host for the largest block; on GPUs, where it is taken at once, for twice a balanced one.
    """

    largest_block: int
    pool: int
    overflow: int

    @property
    def total(self) -> int:
        """Bytes reserved for rows: address space on the host, where memory is taken as it is used; memory on GPUs."""
        return self.pool + self.overflow


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
    return MemoryPlan(largest_block=largest, pool=_align(pool, _PAGE), overflow=overflow)
