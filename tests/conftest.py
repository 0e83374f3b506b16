"""Shared by all tests: pools of ranks, which backends this build has, and what a missing requirement means."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import hypothesis
import pytest
import torch

from moe_ep_plugin import BackendUnavailable
from moe_ep_plugin._extension import load_host

from .harness import RankPool, pools_of

# The default draws the same examples every time, so that a failure is the change's own; ``soak`` looks for new ones.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("soak", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

BACKENDS = ("collective", "host")


def lacking(reason: str, *, whole_module: bool = False) -> NoReturn:
    """Skip for the lack of something that can be installed; fail under MOE_EP_TEST_ALL=1, which CI sets.

    What no installation brings (a GPU, a privilege) is skipped with ``pytest.skip``.
    """
    if os.environ.get("MOE_EP_TEST_ALL", "0") not in ("", "0"):
        pytest.fail(f"MOE_EP_TEST_ALL is set, but {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=whole_module)


def need_modules(*names: str) -> None:
    """For the top of a test module that is of no use without these; see :func:`lacking`."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            lacking(f"{name} can't be imported: {error}", whole_module=True)


def shared_segments(pids: Iterable[int]) -> dict[int, list[str]]:
    """Files of /dev/shm that these processes have open or mapped: names by inode. Unlinked ones have names here too."""
    found: dict[int, list[str]] = {}
    for pid in pids:
        process = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):  # It has ended, or is another user's.
            for line in (process / "maps").read_text().splitlines():
                *_, inode, name = line.split(maxsplit=5) if "/" in line else ("", "0", "")
                if name.startswith("/dev/shm/"):
                    found.setdefault(int(inode), []).append(name)
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    name = os.readlink(link)
                    if name.startswith("/dev/shm/"):
                        found.setdefault(link.stat().st_ino, []).append(name)
    return found


def all_pids() -> list[int]:
    """Every process of this machine."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


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
    yield from pools_of(RankPool)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on a CPU; lacking, with the loader's reason, where it is not built."""
    name: str = request.param
    reason = why_unavailable(name)
    if reason is not None:
        lacking(reason)
    return name


@pytest.fixture(scope="session")
def host() -> None:
    """For tests of the host backend alone."""
    reason = why_unavailable("host")
    if reason is not None:
        lacking(reason)
