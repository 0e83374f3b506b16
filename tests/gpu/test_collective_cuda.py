"""Backend ``collective`` on CUDA tensors against the same on CPU tensors, bit for bit; ranks share one GPU.

On a GPU machine: ``python -m pytest tests/gpu``.
"""

from __future__ import annotations

import pytest
import torch

from moe_ep_plugin import EpBuffer, EpConfig
from tests.cases import Place
from tests.gpu.helpers import DEVICE, PLACE, layers_agree, why_no_kernels

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_cuda_tensors_give_the_bits_of_cpu_tensors(ranks, num_ranks, wire):
    places = Place("collective", "cpu"), Place("collective", DEVICE)
    assert ranks(num_ranks).run(layers_agree, places, wire, 10) == [60] * num_ranks


def ladder() -> tuple[str, bool]:
    with EpBuffer(None, EpConfig(num_experts=2, num_topk=1, hidden=64, max_tokens_per_rank=8)) as buffer:
        out = buffer.dispatch(torch.ones(8, 64, device=DEVICE).bfloat16(), torch.zeros(8, 1, device=DEVICE).long())
        y = buffer.combine(out.x, out.handle)
        return buffer.backend, bool((y == 1).all())


def test_auto_serves_cuda_tensors(ranks):
    """With a GPU the buffer is for CUDA tensors by default, served by our kernels wherever they can run."""
    expected = PLACE.backend if why_no_kernels() is None else "collective"
    assert ranks(2).run(ladder) == [(expected, True)] * 2
