"""The harness itself: results by rank, and failures that say what happened."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from .harness import RankDied, RankFailure, RankPool


def rank_sum(addend: int) -> tuple[int, int]:
    total = torch.tensor([dist.get_rank() + addend])
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("the reason")
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def die_on(rank: int) -> int:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return dist.get_rank()


def fresh_memory() -> bool:
    del_me = torch.ones(1 << 16)
    del del_me
    return bool((torch.empty(1 << 16) == 1).any())


def test_results_come_by_rank():
    with RankPool(3) as pool:
        assert pool.run(rank_sum, 10) == [(0, 33), (1, 33), (2, 33)]
        pids = pool.pids
        assert pool.run(rank_sum, 0) == [(0, 3), (1, 3), (2, 3)]
        assert pool.pids == pids


def test_failure_shows_the_traceback_and_the_pool_restarts():
    with RankPool(2) as pool:
        with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2 in fail_on.*KeyError: 'the reason'"):
            pool.run(fail_on, 1)
        assert pool.pids == []
        assert pool.run(rank_sum, 0) == [(0, 1), (1, 1)]


def test_hang_shows_the_stack():
    with (
        RankPool(2, timeout_s=2) as pool,
        pytest.raises(RankFailure, match=r"(?s)rank 0 of 2.*hung for 2 s.*in hang_on"),
    ):
        pool.run(hang_on, 0)


def test_death_is_a_failure_unless_allowed():
    with RankPool(2) as pool:
        with pytest.raises(RankFailure, match="exit code -9"):
            pool.run(die_on, 0)
        first, second = pool.run_with(die_on, (0,), may_die=(0,))
        assert isinstance(first, RankDied)
        assert second == 1


def test_memory_is_poisoned():
    with RankPool(1) as pool:
        assert pool.run(fresh_memory) == [False]
