"""Which Megatron-Core versions are here, and the measurements of one, made once."""

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

REPOSITORY = Path(__file__).parents[2]
WHEELS = Path(os.environ.get("MEGATRON_WHEELS", REPOSITORY / ".cache" / "megatron"))
VERSIONS = tuple(os.environ.get("MEGATRON_VERSIONS", "0.14.0 0.16.1 0.19.2").split())
JOB_SECONDS = 280


@dataclass(frozen=True)
class Megatron:
    """An unpacked Megatron-Core wheel."""

    version: str
    path: Path

    @property
    def numbers(self) -> tuple[int, int]:
        major, minor, *_ = self.version.split(".")
        return int(major), int(minor)

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


def find_megatron(version: str) -> Megatron:
    path = WHEELS / version
    if not (path / "megatron").is_dir():
        lacking(f"no megatron-core {version} in {WHEELS}: run make megatron")
    megatron = Megatron(version, path)
    if megatron.numbers >= (0, 18) and importlib.util.find_spec("triton") is None:
        lacking(f"megatron-core {version} imports triton, also without a GPU: pip install triton")
    return megatron


@pytest.fixture(scope="session", params=VERSIONS)
def megatron(request: pytest.FixtureRequest) -> Megatron:
    """Every version that CI has."""
    return find_megatron(request.param)


@pytest.fixture(scope="session")
def measured(megatron: Megatron) -> dict[str, Any]:
    """What ``megatron_jobs.py`` measured with this version."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        done = megatron.python(str(Path(__file__).parent / "megatron_jobs.py"), str(path), timeout=JOB_SECONDS)
        assert done.returncode == 0 and path.exists(), done.stderr[-3000:]
        results: dict[str, Any] = json.loads(path.read_text())
    return results


@pytest.fixture(scope="session")
def ranks_of(measured: dict[str, Any]) -> Callable[[str], list[dict[str, Any]]]:
    """``ranks_of("world2")``: the measurements of each rank; fails with the traceback of a rank that failed."""

    def get(world: str) -> list[dict[str, Any]]:
        errors = [f"rank {i}: {rank['error']}" for i, rank in enumerate(measured[world]) if "error" in rank]
        if errors:
            pytest.fail("\n".join(errors))
        return list(measured[world])

    return get
