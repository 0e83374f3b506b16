"""The memory plan against what is really reserved and really needed."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import EpBuffer, EpConfig
from moe_ep_plugin._extension import load_host
from tests.conftest import shared_segments
from tests.harness import RankPool

pytestmark = pytest.mark.usefixtures("host")


def make_config(**changes: object) -> EpConfig:
    settings = {
        "num_experts": 3,
        "num_topk": 4,
        "hidden": 48,
        "max_tokens_per_rank": 40,
        "dtype": torch.float32,
        "backend": "host",
        "device": "cpu",
        "expert_alignment": 16,
    }
    return EpConfig(**(settings | changes))  # type: ignore[arg-type]


def test_plan_is_what_the_heap_reserves() -> None:
    for num_ranks in (1, 3, 8):
        plan = make_config().memory_plan(num_ranks)
        control, total = load_host().heap_bytes(num_ranks, 3, plan.pool, plan.overflow)
        assert total == control + plan.total
        assert plan.overflow == plan.largest_block


def test_pool_bytes_sets_the_pool() -> None:
    assert make_config(pool_bytes=1 << 20).memory_plan(2).pool == 1 << 20


def worst_case(layout: str, wire: str, expand: str) -> list[bool]:
    """Every rank sends every token, to one expert over and over: the largest block there can be.

    The pool has one page, so the rows must fit the overflow region.
    """
    config = make_config(pool_bytes=4096, expand=expand)
    right = []
    with EpBuffer(None, config) as buffer:
        x = torch.full((40, 48), float(buffer.rank + 1))
        for expert in range(3):
            idx = torch.full((40, 4), expert)
            out = buffer.dispatch(x, idx, torch.ones(40, 4), layout=layout, wire=wire)  # type: ignore[arg-type]
            rows = out.x.float() * 1.0
            if out.scale is not None:
                rows = rows * out.scale
            y = buffer.combine(rows, out.handle)
            right.append(torch.equal(y, x * (4 if layout == "expert" else 1)))
        right.append(buffer.stats.copied_out >= 1)
    return right


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
@pytest.mark.parametrize("expand", ["direct", "two_stage"])
def test_overflow_region_holds_the_largest_block(layout: str, wire: str, expand: str) -> None:
    with RankPool(3) as pool:
        # Rank r has expert r, so each receives the largest block once.
        for results in pool.run(worst_case, layout, wire, expand):
            assert all(results), results


# Low-latency mode

LOW = {"num_experts": 5, "low_latency_tokens_per_rank": 24, "pool_bytes": 4096}


def test_plan_is_what_the_heap_reserves_for_low_latency() -> None:
    for num_ranks in (1, 3, 8):
        for layout in ("expert", "rank"):
            for wire in ("bf16", "fp8"):
                plan = make_config(**LOW, low_latency_layout=layout, wire=wire).memory_plan(num_ranks)
                low = plan.low_latency
                assert low is not None and plan.total == plan.pool + plan.overflow + low.total
                _, without = load_host().heap_bytes(num_ranks, 5, plan.pool, plan.overflow)
                control, total = load_host().heap_bytes(
                    num_ranks, 5, plan.pool, plan.overflow, low_receive_bytes=low.receive, low_rows_bytes=low.rows
                )
                assert without == control + plan.pool + plan.overflow
                # Four posts of each rank with a word for every expert and rank, and 192 words of arrivals to each.
                words = 4 * num_ranks * (64 + 5 + num_ranks + 192)
                assert 0 < total - control - plan.total <= 8 * words + 4096


def test_plan_shows_low_latency_in_both_layouts() -> None:
    config = make_config(**LOW, low_latency_layout="rank", dtype=torch.bfloat16, hidden=128)
    plan = config.memory_plan(4)
    # 4 ranks' 24 tokens, once or for each of 2 experts; rows of 256 bytes, and 4 ids and weights a row.
    assert (plan.low_latency_layouts["expert"].capacity, plan.low_latency_layouts["rank"].capacity) == (96, 96)
    assert (plan.low_latency_layouts["expert"].slots, plan.low_latency_layouts["rank"].slots) == (192, 96)
    assert plan.low_latency == plan.low_latency_layouts["rank"]
    by_expert, by_rank = 192 * 256, 96 * (256 + 4 * 12)
    for name, rows in (("expert", by_expert), ("rank", by_rank)):
        assert rows <= plan.low_latency_layouts[name].receive <= rows + 8192
    text = str(plan)
    for name, kept in (("expert", "not reserved"), ("rank", "reserved")):
        assert f"low latency, layout {name!r}: 2 receive buffers ({kept})" in text, text
        assert f"low latency, layout {name!r}: 2 buffers of rows ({kept})" in text, text
    assert "low latency" not in str(make_config().memory_plan(4))


def committed(layout: str, tokens: int) -> tuple[int, int, int]:
    """Bytes that this rank's segment has, those of its low-latency slots, and those of the whole plan."""
    changes = LOW | {"low_latency_tokens_per_rank": tokens, "pool_bytes": 64 << 20}
    config = make_config(**changes, low_latency_layout=layout)
    before = shared_segments([os.getpid()]).keys()
    with EpBuffer(None, config) as buffer:
        dist.barrier()
        plan = config.memory_plan(buffer.num_ranks)
        assert plan.low_latency is not None
        segments = shared_segments([os.getpid()]).keys() - before
        files = [os.stat(f"/proc/self/fd/{fd}") for fd in _descriptors()]
        sizes = {s.st_ino: s.st_blocks * 512 for s in files if s.st_ino in segments}
        dist.barrier()
        return max(sizes.values()), plan.low_latency.total, plan.total


def _descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_slots_are_taken_when_the_buffer_is_made(layout: str) -> None:
    """A decoding step meets no page fault, and the tmpfs that is too small is found at the start."""
    with RankPool(2) as pool:
        for taken, low, total in pool.run(committed, layout, 512):
            assert low <= taken < low + (2 << 20) < total


def full_slots(layout: str, wire: str, back: str) -> list[bool]:
    """Every rank sends as many tokens as it may to every expert of one rank after the other: all slots are used."""
    config = make_config(**LOW, low_latency_layout=layout, wire=wire, power_of_two_scales=True)
    right = []
    with EpBuffer(None, config) as buffer:
        x = torch.full((24, 48), float(buffer.rank + 1))
        for number in range(6):
            experts = buffer.placement.experts_of_rank[number % 3]
            idx = torch.tensor([*experts, -1, -1, -1, -1][:4]).repeat(24, 1)
            weights = torch.ones(24, 4) if layout == "rank" else None
            out = buffer.low_latency_dispatch(x, idx, weights).wait()
            rows = buffer.empty_rows(out.handle) if back == "bf16" else torch.empty(out.x.shape)
            rows.copy_(out.x.float() if out.scale is None else out.x.float() * out.scale)
            y = buffer.low_latency_combine(rows, idx, None, out.handle, wire=back).wait().x  # type: ignore[arg-type]
            right.append(torch.equal(y, x * (len(experts) if layout == "expert" else 1)))
            full = 24 * buffer.num_ranks if number % 3 == buffer.rank else 0
            right.append(out.tokens_per_expert.tolist() == [full] * len(out.tokens_per_expert))
            del out, rows
    return right


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("wire, back", [("bf16", "bf16"), ("fp8", "fp8"), ("bf16", "fp8")])
def test_slots_hold_the_worst_case(layout: str, wire: str, back: str) -> None:
    with RankPool(3) as pool:
        for results in pool.run(full_slots, layout, wire, back):
            assert all(results), results
