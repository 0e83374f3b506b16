"""Skips what this machine can't run, and gives pools whose ranks are on GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from ..conftest import lacking
from ..harness import RankPool, pools_of
from .helpers import ON_GPU, GpuPool, why_no_kernels

# Counting devices through NVML leaves CUDA alone in this process.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


@pytest.fixture(scope="session", autouse=True)
def device() -> Iterator[None]:
    if ON_GPU and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield
    assert not torch.cuda.is_initialized(), "this process took a context, beside its ranks"


@pytest.fixture(scope="session")
def kernels(device: None) -> None:
    """For tests of backend "cuda"."""
    reason = why_no_kernels()
    if reason is not None:
        lacking(reason)


@pytest.fixture(scope="session")
def ranks(device: None) -> Iterator[Callable[[int], RankPool]]:
    """``ranks(n)``: the session's pool of n ranks. Its processes are kept between tests."""
    yield from pools_of(GpuPool)
