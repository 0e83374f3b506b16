"""The memory plan against what is really reserved and really needed."""

from __future__ import annotations

import pytest
import torch

from moe_ep_plugin import EpBuffer, EpConfig
from moe_ep_plugin._extension import load_host
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
