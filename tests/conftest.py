"""Fixtures shared by all tests: pools of ranks, and which backends this build has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

from moe_ep_plugin import BackendUnavailable
from moe_ep_plugin._extension import load_host

from .harness import RankPool

# The default draws the same examples every time, so that a failure is the change's own; ``soak`` looks for new ones.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("soak", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

BACKENDS = ("collective", "host")


def why_unavailable(backend: str) -> str | None:
    """The reason why a CPU backend can't run here, or None."""
    if backend == "host":
        try:
            load_host()
        except BackendUnavailable as error:
            return str(error)
    return None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Ranks share the cores with each other; so does what runs in this process beside them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """``ranks(n)``: the session's pool of n ranks. Its processes are kept between tests."""
    pools: dict[int, RankPool] = {}

    def pool_of(num_ranks: int) -> RankPool:
        return pools.setdefault(num_ranks, RankPool(num_ranks))

    yield pool_of
    for pool in pools.values():
        pool.close()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on a CPU; skipped with the loader's reason where it is not built."""
    name: str = request.param
    reason = why_unavailable(name)
    if reason is not None:
        pytest.skip(reason)
    return name
