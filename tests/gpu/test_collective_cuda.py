"""Backend ``collective`` on CUDA tensors against the same on CPU tensors, bit for bit; ranks share one GPU.

On a GPU machine: ``python -m pytest tests/gpu``.
"""

from __future__ import annotations

import pytest
import torch

from moe_ep_plugin import EpBuffer, EpConfig, TokenDispatcher
from tests.harness import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_config(device: str, dtype: torch.dtype, wire: str) -> EpConfig:
    return EpConfig(
        num_experts=7,
        num_topk=3,
        hidden=136,
        max_tokens_per_rank=40,
        dtype=dtype,
        device=device,
        backend="collective",
        wire=wire,  # type: ignore[arg-type]
        expert_alignment=4,
        timeout_s=60.0,
    )


def run_one(buffer: EpBuffer, device: str, seed: int, layout: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs and gradients of one round trip, on the CPU."""
    generator = torch.Generator().manual_seed(1000 * seed + buffer.rank)
    tokens = int(torch.randint(0, 41, (1,), generator=generator))
    x = torch.randint(-4, 5, (tokens, 136), generator=generator).to(dtype).to(device).requires_grad_()
    idx = torch.randint(-1, 7, (tokens, 3), generator=generator).to(device)
    weights = torch.randint(1, 4, (tokens, 3), generator=generator).float().to(device).requires_grad_()
    dispatcher = TokenDispatcher(buffer)
    out = dispatcher.dispatch(x, idx, weights, layout=layout)  # type: ignore[arg-type]
    y = dispatcher.combine(out.x, out.handle, topk_weights=out.topk_weights if layout == "expert" else None)
    y.backward(torch.full_like(y, 2.0))
    assert x.grad is not None
    results = [out.x, out.tokens_per_expert, out.topk_weights, y, x.grad]
    if layout == "expert":
        results.append(weights.grad)
    out.event.synchronize()
    assert out.x.device.type == device and y.device.type == device
    return [t.detach().cpu() for t in results if t is not None]


def cuda_equals_cpu(wire: str) -> int:
    checked = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with (
            EpBuffer(None, make_config("cpu", dtype, wire)) as on_cpu,
            EpBuffer(None, make_config("cuda", dtype, wire)) as on_gpu,
        ):
            for seed in range(10):
                for layout in ("expert", "rank"):
                    expected = run_one(on_cpu, "cpu", seed, layout, dtype)
                    got = run_one(on_gpu, "cuda", seed, layout, dtype)
                    if wire == "fp8" and layout == "expert":
                        # A gate value's gradient is a dot product of rows that are no whole numbers any more, and
                        # the devices add its terms in different orders.
                        torch.testing.assert_close(got.pop(), expected.pop())
                    assert all(torch.equal(e, g) for e, g in zip(expected, got, strict=True)), (dtype, seed, layout)
                    checked += 1
    return checked


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_cuda_tensors_give_the_bits_of_cpu_tensors(num_ranks: int, wire: str) -> None:
    assert run_ranks(num_ranks, cuda_equals_cpu, wire) == [60] * num_ranks


def ladder() -> tuple[str, bool]:
    with EpBuffer(None, EpConfig(num_experts=2, num_topk=1, hidden=64, max_tokens_per_rank=8)) as buffer:
        out = buffer.dispatch(torch.ones(8, 64, device="cuda").bfloat16(), torch.zeros(8, 1, device="cuda").long())
        y = buffer.combine(out.x, out.handle)
        return buffer.backend, bool((y == 1).all())


def test_auto_serves_cuda_tensors() -> None:
    """With a GPU the buffer is for CUDA tensors by default, and some backend serves them."""
    assert run_ranks(2, ladder) == [("collective", True)] * 2
