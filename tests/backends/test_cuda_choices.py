"""What backend "cuda" decides without a GPU: SMs, direct writes or two stages, its memory, why it can't run."""

from __future__ import annotations

import math

import pytest
import torch

from moe_ep_plugin import BackendUnavailable, ConfigError, EpBuffer, EpConfig
from moe_ep_plugin.backends.cuda_choices import (
    check_sms,
    default_local_sms,
    default_num_sms,
    direct_moves_fewer_bytes,
)


@pytest.mark.parametrize(
    ("device_sms", "ranks", "expected"), [(132, 1, 24), (132, 4, 24), (132, 8, 16), (132, 200, 1), (16, 1, 16)]
)
def test_ranks_share_the_sms_of_their_gpu(device_sms: int, ranks: int, expected: int) -> None:
    assert default_num_sms(device_sms, ranks) == expected


@pytest.mark.parametrize(("gpus", "expected"), [(0, 24), (2, 24), (3, 16), (8, 16)])
def test_two_stages_among_many_gpus_take_fewer_sms(gpus: int, expected: int) -> None:
    assert default_num_sms(132, 1, staged_gpus=gpus) == expected
    assert default_num_sms(12, 1, staged_gpus=gpus) == 12


def test_more_sms_than_the_sharers_have_are_refused() -> None:
    check_sms(16, 132, 8)
    check_sms(None, 132, 8)
    with pytest.raises(ConfigError, match=r"num_sms is 17, but 8 ranks share a GPU of 132 SMs; use at most 16"):
        check_sms(17, 132, 8)
    with pytest.raises(ConfigError, match="local_sms is 133, but 1 ranks share"):
        check_sms(133, 132, 1, "local_sms")


@pytest.mark.parametrize(
    ("num_sms", "device_sms", "ranks", "expected"),
    [(None, 132, 1, 64), (None, 132, 4, 33), (None, 40, 1, 40), (None, 4, 8, 1), (12, 132, 1, 12)],
)
def test_what_stays_on_a_gpu_has_more_sms(num_sms: int | None, device_sms: int, ranks: int, expected: int) -> None:
    assert default_local_sms(num_sms, device_sms, ranks) == expected


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("num_topk", [1, 2, 8, 32])
def test_direct_writes_win_where_the_link_is_memory(num_ranks: int, num_topk: int) -> None:
    assert direct_moves_fewer_bytes(num_ranks, num_topk, 1.0)


def test_two_stages_win_where_many_copies_would_cross_a_slow_link() -> None:
    assert not direct_moves_fewer_bytes(8, 8, 0.107)
    assert not direct_moves_fewer_bytes(2, 8, 0.01)
    # A token with one expert has nothing to share.
    assert direct_moves_fewer_bytes(8, 1, 0.107)


def test_ranks_reached_is_the_expectation_of_uniform_routing() -> None:
    """The formula in the docstring, against drawing experts."""
    generator = torch.Generator().manual_seed(1)
    ranks = torch.randint(0, 8, (20000, 8), generator=generator)
    drawn = torch.nn.functional.one_hot(ranks, 8).amax(1).sum(1).double().mean().item()
    # The standard error of the mean of 20,000 draws is below 0.01.
    assert math.isclose(8 * (1 - (1 - 1 / 8) ** 8), drawn, abs_tol=0.03)


def test_a_gpu_heap_has_room_for_the_worst_block_once() -> None:
    settings = {"num_experts": 256, "num_topk": 8, "hidden": 7168, "max_tokens_per_rank": 4096}
    on_gpu = EpConfig(**settings, device="cuda").memory_plan(8)
    on_cpu = EpConfig(**settings, device="cpu").memory_plan(8)
    assert on_gpu.largest_block == on_cpu.largest_block
    # Every rank sends all its tokens to all of its experts here: rows, weights and scales.
    assert on_gpu.largest_block >= 8 * 4096 * 8 * (7168 * 2 + 4)
    assert on_gpu.largest_block <= on_gpu.pool <= 2 * on_gpu.largest_block
    assert on_gpu.total < on_cpu.total / 2
    assert EpConfig(**settings, device="cuda", pool_bytes=1 << 30).memory_plan(8).pool == 1 << 30


def test_the_backend_says_why_it_can_not_run() -> None:
    config = EpConfig(
        num_experts=2, num_topk=1, hidden=64, max_tokens_per_rank=8, device="cpu", backend="cuda", timeout_s=20.0
    )
    with pytest.raises(BackendUnavailable, match=r"rank 0: it moves CUDA tensors, and the buffer is for 'cpu'"):
        EpBuffer(None, config)
