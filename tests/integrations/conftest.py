"""Which framework versions are here, and the measurements of one, made once."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import lacking

from .fetch_frameworks import SOURCES, default_folder

REPOSITORY = Path(__file__).parents[2]
WHEELS = default_folder("megatron")
JOB_SECONDS = 280

Ranks = Callable[[str], list[dict[str, Any]]]


def versions_of(framework: str) -> tuple[str, ...]:
    """What to test with: $MEGATRON_VERSIONS or $DEEPSPEED_VERSIONS, else what CI fetches."""
    chosen = os.environ.get(f"{framework.upper()}_VERSIONS")
    return tuple(chosen.split()) if chosen else SOURCES[framework].versions


@dataclass(frozen=True)
class Framework:
    """An unpacked wheel."""

    version: str
    path: Path

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(int(number) for number in self.version.split("."))

    def environment(self) -> dict[str, str]:
        paths = [str(REPOSITORY), str(self.path), os.environ.get("PYTHONPATH", "")]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONWARNINGS": "ignore",
            # A compiler is not needed then, and the start is several times faster.
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def python(self, *arguments: str, timeout: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
        """Run Python with this version on its path; a process that overstays is killed."""
        return subprocess.run(
            [sys.executable, *arguments],
            env=self.environment() | more,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def measure(self, program: str, *arguments: str) -> dict[str, Any]:
        """What a program of this folder writes to the JSON file that it is given first."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.json"
            done = self.python(str(Path(__file__).parent / program), str(path), *arguments, timeout=JOB_SECONDS)
            assert done.returncode == 0 and path.exists(), done.stderr[-3000:]
            results: dict[str, Any] = json.loads(path.read_text())
        return results


class Megatron(Framework):
    """A Megatron-Core version."""


class DeepSpeed(Framework):
    """A DeepSpeed version."""


def find_megatron(version: str) -> Megatron:
    path = WHEELS / version
    if not (path / "megatron").is_dir():
        lacking(f"no megatron-core {version} in {WHEELS}: run make megatron")
    megatron = Megatron(version, path)
    if megatron.numbers >= (0, 18) and importlib.util.find_spec("triton") is None:
        lacking(f"megatron-core {version} imports triton, also without a GPU: pip install triton")
    return megatron


def find_deepspeed(version: str) -> DeepSpeed:
    path = default_folder("deepspeed") / version
    if not (path / "deepspeed").is_dir():
        lacking(f"no deepspeed {version} in {path.parent}: run make deepspeed")
    if importlib.util.find_spec("hjson") is None:
        lacking("the packages that deepspeed imports are not installed: pip install '.[deepspeed]'")
    return DeepSpeed(version, path)


def ranks_getter(measured: dict[str, Any]) -> Ranks:
    """``get("world2")``: the measurements of each rank; fails with the traceback of a rank that failed."""

    def get(world: str) -> list[dict[str, Any]]:
        errors = [f"rank {i}: {rank['error']}" for i, rank in enumerate(measured[world]) if "error" in rank]
        if errors:
            pytest.fail("\n".join(errors))
        return list(measured[world])

    return get


@pytest.fixture(scope="session", params=versions_of("megatron"))
def megatron(request: pytest.FixtureRequest) -> Megatron:
    """Every version that CI has."""
    return find_megatron(request.param)


@pytest.fixture(scope="session")
def measured(megatron: Megatron) -> dict[str, Any]:
    """What ``megatron_jobs.py`` measured with this version."""
    return megatron.measure("megatron_jobs.py")


@pytest.fixture(scope="session")
def ranks_of(measured: dict[str, Any]) -> Ranks:
    return ranks_getter(measured)


@pytest.fixture(scope="session", params=versions_of("deepspeed"))
def deepspeed(request: pytest.FixtureRequest) -> DeepSpeed:
    """Every version that CI has."""
    return find_deepspeed(request.param)


@pytest.fixture(scope="session")
def deepspeed_ranks(deepspeed: DeepSpeed) -> Ranks:
    """What ``deepspeed_jobs.py`` measured with this version; with the newest, in all combinations."""
    newest = deepspeed.version == versions_of("deepspeed")[-1]
    return ranks_getter(deepspeed.measure("deepspeed_jobs.py", *(["whole"] if newest else [])))
