"""What the tests of CUDA tensors share: where rows live, pools of ranks on GPUs, and exact round trips.

``MOE_EP_TEST_DEVICE=cpu`` rehearses these tests on the host backend, but for those that need CUDA streams.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import BackendUnavailable, DispatchOutput, EpBuffer, EpConfig, TokenDispatcher, _extension
from tests import test_faults
from tests.cases import Place
from tests.harness import RankPool

T = TypeVar("T")

DEVICE = os.environ.get("MOE_EP_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
PLACE = Place("cuda" if ON_GPU else "host", DEVICE)
TWIN = Place("host", "cpu")

kernel_tests = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]
needs_cuda = pytest.mark.skipif(not ON_GPU, reason="is about CUDA alone: can't be rehearsed on a CPU")


def why_no_kernels() -> str | None:
    """The reason why backend "cuda" can't run, or None."""
    try:
        if ON_GPU:
            _extension.load_cuda()
    except BackendUnavailable as error:
        return str(error)
    return None


class GpuPool(RankPool):
    """Ranks that share the GPUs of this machine, dealt out in turn."""

    def run_with(
        self,
        function: Callable[..., T],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        may_die: Collection[int] = (),
    ) -> list[T]:
        return super().run_with(_on_own_gpu, (function, args, kwargs or {}), may_die=may_die)


def _on_own_gpu(function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    if ON_GPU:
        # Fails in a process that was forked from one that had used CUDA.
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    return function(*args, **kwargs)


def ranks_on_this_gpu(num_ranks: int) -> int:
    gpus = torch.cuda.device_count()
    return len(range(torch.cuda.current_device(), num_ranks, gpus))


def finish() -> None:
    """Wait for all of this process's work on its GPU."""
    if ON_GPU:
        torch.cuda.synchronize()


def make_config(**changes: object) -> EpConfig:
    """8 experts, top 2, fp32 rows of 64, unless changed; on the device under test."""
    return test_faults.make_config(PLACE.backend, **({"device": DEVICE} | changes))


def tokens(rank: int, count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """x and topk_idx of a rank for :func:`make_config`; every token has two experts."""
    x, idx = test_faults.tokens(rank, count)
    return x.to(DEVICE), idx.to(DEVICE)


def works(buffer: EpBuffer) -> bool:
    """One exact round trip: every token comes back twice, once from each of its experts."""
    x, idx = tokens(buffer.rank)
    out = buffer.dispatch(x, idx)
    return torch.equal(buffer.combine(out.x, out.handle), 2 * x)


def integers(seed: int, *shape: int, low: int = -4, high: int = 5) -> torch.Tensor:
    """Whole numbers, as fp32 on the CPU, that are the same in every process."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


class Mistakes:
    """Comparisons that wait for nothing: whether any failed is kept on the device until asked for."""

    def __init__(self) -> None:
        self._any = torch.zeros((), dtype=torch.bool, device=DEVICE)

    def compare(self, got: torch.Tensor, want: torch.Tensor) -> None:
        assert got.shape == want.shape
        self._any |= (got != want).any()

    def none(self) -> bool:
        return not self._any.item()


# Autograd: one layer in two places

_HIDDEN, _EXPERTS, _TOPK, _TOKENS = 136, 7, 3, 40


def _layer(buffer: EpBuffer, seed: int, layout: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one round trip."""
    device = buffer.config.device_type
    base = 1000 * seed + 10 * buffer.rank
    num_tokens = int(integers(base, 1, low=0, high=_TOKENS + 1))
    x = integers(base + 1, num_tokens, _HIDDEN).to(device, dtype).requires_grad_()
    idx = integers(base + 2, num_tokens, _TOPK, low=-1, high=_EXPERTS).long().to(device)
    weights = integers(base + 3, num_tokens, _TOPK, low=1).to(device).requires_grad_()
    dispatcher = TokenDispatcher(buffer)
    out: DispatchOutput = dispatcher.dispatch(x, idx, weights, layout=layout)  # type: ignore[arg-type]
    y = dispatcher.combine(out.x, out.handle, topk_weights=out.topk_weights if layout == "expert" else None)
    y.backward(torch.full_like(y, 2.0))
    assert x.grad is not None and out.topk_weights is not None
    results = {"rows": out.x, "counts": out.tokens_per_expert, "weights": out.topk_weights, "y": y, "x.grad": x.grad}
    if layout == "expert":
        assert weights.grad is not None
        results["weights.grad"] = weights.grad
    assert out.x.device.type == y.device.type == device
    return {name: t.detach().cpu() for name, t in results.items()}


def layers_agree(places: Sequence[Place], wire: str, seeds: int) -> int:
    """Compare layers in both places, bit for bit, in every dtype and layout; returns how many."""
    compared = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        sizes = {"hidden": _HIDDEN, "num_experts": _EXPERTS, "num_topk": _TOPK, "max_tokens_per_rank": _TOKENS}
        options = {"dtype": dtype, "wire": wire, "expert_alignment": 4, "timeout_s": 60.0}
        configs = [EpConfig(**sizes, **options, **place._asdict()) for place in places]
        with EpBuffer(None, configs[0]) as first, EpBuffer(None, configs[1]) as second:
            for seed in range(seeds):
                for layout in ("expert", "rank"):
                    expected, got = (_layer(buffer, seed, layout, dtype) for buffer in (first, second))
                    if wire == "fp8" and layout == "expert":
                        # A gate value's gradient is a dot product of rows that are no whole numbers any more, and
                        # the devices add its terms in different orders: 136 products below 100, each sum rounded to
                        # 2^-24 of partial sums that may be far larger than the result.
                        torch.testing.assert_close(
                            got.pop("weights.grad"), expected.pop("weights.grad"), rtol=1e-5, atol=136 * 100 * 2**-24
                        )
                    for name, want in expected.items():
                        assert torch.equal(got[name], want), (name, dtype, seed, layout)
                    compared += 1
    return compared
