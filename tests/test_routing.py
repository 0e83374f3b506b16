"""Placement of experts on ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_ep_plugin import ConfigError
from moe_ep_plugin.routing import ExpertPlacement, contiguous_expert_to_rank

from . import oracle


@given(num_experts=st.integers(1, 300), num_ranks=st.integers(1, 70))
def test_default_is_contiguous_and_even(num_experts, num_ranks):
    ranks = contiguous_expert_to_rank(num_experts, num_ranks)
    sizes = [ranks.count(r) for r in range(num_ranks)]
    assert list(ranks) == sorted(ranks)
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert list(ranks) == oracle.placement(num_experts, num_ranks, None)


@given(data=st.data(), num_ranks=st.integers(1, 6))
def test_local_ids_follow_expert_ids(data, num_ranks):
    ranks = tuple(data.draw(st.lists(st.integers(0, num_ranks - 1), min_size=1, max_size=20)))
    placement = ExpertPlacement.make(len(ranks), num_ranks, ranks)
    assert len(placement.experts_of_rank) == num_ranks
    assert sorted(e for held in placement.experts_of_rank for e in held) == list(range(len(ranks)))
    for expert, rank in enumerate(ranks):
        assert placement.experts_of_rank[rank][placement.local_index[expert]] == expert
        assert list(placement.experts_of_rank[rank]) == sorted(placement.experts_of_rank[rank])


@pytest.mark.parametrize("bad", [-1, 2])
def test_rank_outside_the_group_is_named(bad):
    with pytest.raises(ConfigError, match=rf"expert_to_rank\[1\] is {bad}, but the group has ranks 0 to 1"):
        ExpertPlacement.make(3, 2, (0, bad, 1))
