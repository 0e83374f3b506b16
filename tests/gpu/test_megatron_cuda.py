"""Megatron-Core on backend "cuda": the losses of a CPU run and of its own alltoall, and nothing between the wire
and the experts.

The models are those of tests/integrations, with a GPU for each rank or one for all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import zlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin.integrations import megatron as integration
from tests.harness import RankPool
from tests.integrations.conftest import find_megatron

from .helpers import DEVICE, PLACE, GpuPool, finish, kernel_tests, needs_cuda

pytestmark = kernel_tests

RANKS, STEPS = 4, 20
# The one that make pretrain installs.
VERSION = "0.16.1"
# Compiling takes longer than these runs, and fuses differently on a CPU and on a GPU.
ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1"}
TIMEOUT_S = 150.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Long enough for a backward of one layer to be queued meanwhile: a quarter of a second at 2 GHz.
SLEEP_CYCLES = 500_000_000


# On a rank


def _jobs(megatron: str) -> Any:
    """The models of tests/integrations, which are meant for the CPU, on whatever this rank has."""
    if megatron and megatron not in sys.path:
        sys.path.insert(0, megatron)
    on_gpu = torch.cuda.is_available()
    with mock.patch.object(integration, "enable_cpu") if on_gpu else contextlib.nullcontext():
        from tests.integrations import megatron_jobs
    return megatron_jobs


def _start(megatron: str, backend: str) -> tuple[Any, torch.device]:
    jobs = _jobs(megatron)
    torch.backends.cuda.matmul.allow_tf32 = False
    jobs.install().close()
    jobs.install(backend=backend, timeout_s=60.0)
    jobs.parallel(ep=RANKS)
    return jobs, torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _draw_weights(model: torch.nn.Module) -> None:
    """The same on every device; Megatron's own draws come from one generator on a CPU and from two beside a GPU."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            expert_rank = 0 if getattr(parameter, "allreduce", True) else dist.get_rank()
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {expert_rank}".encode()))
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def move(model: torch.nn.Module, device: torch.device | str) -> None:
    """To a device, where its inputs are to follow it."""

    def to_device(_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(t.to(device) for t in args), {name: t.to(device) for name, t in kwargs.items()}

    model.to(device).register_forward_pre_hook(to_device, with_kwargs=True)


def train(megatron: str, backend: str, dispatchers: tuple[str, ...]) -> dict[str, Any]:
    """Losses by dtype and dispatcher, and what our buffers did."""
    jobs, device = _start(megatron, backend)

    losses: dict[str, dict[str, list[float]]] = {dtype: {} for dtype in DTYPES}
    for name, dtype in DTYPES.items():
        for dispatcher in dispatchers:
            # The fused kernel is not part of Megatron-Core.
            model = jobs.make_model(dispatcher, params_dtype=dtype, masked_softmax_fusion=False)
            _draw_weights(model)
            move(model, device)
            losses[name][dispatcher] = jobs.train_model(model, STEPS)
    return {"losses": losses, "statistics": jobs.install().statistics()}


def train_fp8(megatron: str, backend: str) -> dict[str, Any]:
    """Losses in bf16 with plain and with FP8 experts, of sizes that TransformerEngine takes."""
    from moe_ep_plugin import Fp8Recipe, _te

    jobs, device = _start(megatron, backend)
    from moe_ep_plugin.integrations.megatron.fp8_experts import use_fp8_experts

    sizes = {"hidden_size": 128, "ffn_hidden_size": 128, "moe_ffn_hidden_size": 128}
    engine = "te" if device.type == "cuda" and _te.why_not() is None else "torch"
    recipes: dict[str, Fp8Recipe | None] = {
        "plain": None,
        "training": Fp8Recipe(engine=engine),  # type: ignore[arg-type]
        "fp8": Fp8Recipe(engine=engine, gradients="fp8"),  # type: ignore[arg-type]
    }
    losses = {}
    for name, recipe in recipes.items():
        model = jobs.make_model("deepep", params_dtype=torch.bfloat16, masked_softmax_fusion=False, **sizes)
        _draw_weights(model)
        if recipe is not None:
            assert use_fp8_experts(model, recipe) == 2
        move(model, device)
        losses[name] = jobs.train_model(model, STEPS)
    alignments = [buffer.config.expert_alignment for buffer in jobs.install().buffers]
    return {"losses": losses, "engine": engine, "alignments": alignments}


def rows_of_a_layer(megatron: str, backend: str) -> dict[str, Any]:
    """Where one MoE layer's received rows are, and what its experts are given."""
    jobs, device = _start(megatron, backend)
    layer = jobs.make_layer(jobs.make_config("deepep")).to(device)
    manager = layer.token_dispatcher._comm_manager
    dispatch, experts = manager.dispatch, layer.experts.forward
    seen: dict[str, Any] = {}

    def noted_dispatch(tokens: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = dispatch(tokens)
        seen["dispatched"] = (rows.data_ptr(), *rows.shape)
        return rows

    def noted_experts(rows: torch.Tensor, counts: torch.Tensor, probs: torch.Tensor) -> Any:
        (buffer,) = jobs.install().buffers
        leased = buffer._backend._heap.leased_bytes()
        seen.update(given=(rows.data_ptr(), *rows.shape), leased=leased, bytes=rows.nbytes)
        seen.update(counts=counts.tolist(), counts_device=counts.device.type, probs=list(probs.shape))
        return experts(rows, counts, probs)

    manager.dispatch, layer.experts.forward = noted_dispatch, noted_experts
    x = jobs.rank_tokens().to(device).requires_grad_()
    output, _ = layer(x)
    output.sum().backward()
    return seen | {"gradient": x.grad.norm().item()}


def waits(megatron: str, backend: str) -> dict[str, bool]:
    """Whether torch waits for the GPU in our dispatcher's steps, and anything at all in their backward."""
    jobs, device = _start(megatron, backend)
    dispatcher = jobs.make_dispatcher("deepep")
    x = jobs.rank_tokens().to(device).requires_grad_()
    routing_map = jobs.random_map(x.shape[0] * x.shape[1], jobs.EXPERTS, jobs.TOPK).to(device)
    probs = (routing_map / jobs.TOPK).requires_grad_()

    def forward() -> torch.Tensor:
        rows, gates = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(x, routing_map, probs))
        rows, _, gates = dispatcher.dispatch_postprocess(rows, gates)
        rows = dispatcher.combine_preprocess(rows * gates[:, None])
        out: torch.Tensor = dispatcher.combine_postprocess(dispatcher.token_combine(rows))
        return out

    # Memory is allocated, kernels are loaded.
    for _ in range(2):
        out = forward()
        out.backward(torch.ones_like(out))
    x.grad = probs.grad = None
    finish()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, gradient = forward(), torch.ones_like(x)
        torch.cuda._sleep(SLEEP_CYCLES)
        out.backward(gradient)
        queued = torch.cuda.Event()
        queued.record()
        waited = queued.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    finish()
    return {"backward": waited, "restored": torch.equal(out, x), "gradient": torch.equal(x.grad, gradient)}


# In the parent


@pytest.fixture(scope="module")
def megatron(device: None) -> str:
    """The folder of a Megatron-Core, or nothing if one can be imported already; not imported here."""
    if importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core"):
        return ""
    return str(find_megatron(VERSION).path)


@pytest.fixture(scope="module")
def pool(megatron: str, kernels: None) -> Any:
    """Ranks on the device under test, for this module: Megatron-Core stays in them."""
    with GpuPool(RANKS, timeout_s=TIMEOUT_S, env=ENVIRONMENT) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def trained(pool: GpuPool, megatron: str) -> list[dict[str, Any]]:
    return pool.run(train, megatron, PLACE.backend, ("deepep", "alltoall"))


@pytest.fixture(scope="module")
def trained_on_cpu(trained: Any, megatron: str, host: None) -> list[dict[str, Any]]:
    with RankPool(RANKS, timeout_s=TIMEOUT_S, env=ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}) as ranks:
        return ranks.run(train, megatron, "host", ("deepep",))


def check_close(dtype: str, got: list[float], want: list[float]) -> None:
    """In fp32 only the order of sums differs. In bf16, every activation and each step of a weight is rounded to 8
    bits, and a sum that ends a hair to the other side of a rounding boundary is 2^-8 off: losses near 4 agree to 2e-2,
    the tolerance with which tests/integrations/test_megatron.py compares two dispatchers on one device.
    """
    assert len(got) == len(want) == STEPS
    limit = {"fp32": 1e-4 * min(want), "bf16": 2e-2}[dtype]
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= limit, (got, want)
    assert got[-1] < got[0] - 0.5, "nothing was learnt, so equal losses say little"


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_equal_those_of_a_cpu_run(trained: Any, trained_on_cpu: Any, dtype: str) -> None:
    for on_device, on_cpu in zip(trained, trained_on_cpu, strict=True):
        check_close(dtype, on_device["losses"][dtype]["deepep"], on_cpu["losses"][dtype]["deepep"])


def test_losses_with_fp8_experts_follow_the_unquantised_ones(pool: GpuPool, megatron: str) -> None:
    for rank in pool.run(train_fp8, megatron, PLACE.backend):
        plain = rank["losses"].pop("plain")
        assert rank["alignments"] == ([1, 16] if DEVICE == "cuda" else [1, 1])
        for losses in rank["losses"].values():
            # The first one has seen no gradient. Then those err by up to 0.08 of themselves (docs/fp8.md), so that a
            # loss may be ahead or behind by that part of what it has fallen.
            assert abs(losses[0] - plain[0]) < 0.02
            assert losses[-1] < losses[0] - 0.5
            assert max(abs(a - b) for a, b in zip(losses, plain, strict=True)) < 0.08 * (plain[0] - plain[-1])
    print(f"experts by {rank['engine']}: {rank['losses']}, plain {plain}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_equal_those_of_alltoall(trained: Any, dtype: str) -> None:
    for rank in trained:
        check_close(dtype, rank["losses"][dtype]["deepep"], rank["losses"][dtype]["alltoall"])


def test_training_went_through_leased_rows(trained: Any, trained_on_cpu: Any) -> None:
    for ranks, backend in ((trained, PLACE.backend), (trained_on_cpu, "host")):
        for rank in ranks:
            found = rank["statistics"]
            assert found["backend"] == backend
            # A buffer a dtype; two layers, dispatch and combine, forward and backward.
            assert found["buffers"] == len(DTYPES)
            assert found["operations"] == len(DTYPES) * STEPS * 2 * 2 * 2
            assert found["bytes_to_peers"] > 0 and found["copied_out"] == 0


def test_experts_read_rows_where_dispatch_put_them(pool: GpuPool, megatron: str) -> None:
    for found in pool.run(rows_of_a_layer, megatron, PLACE.backend):
        assert found["given"] == found["dispatched"], "something was permuted or copied in between"
        assert found["leased"] >= found["bytes"] > 0
        # Grouped GEMMs and splits take their sizes on the host.
        assert found["counts_device"] == "cpu"
        assert sum(found["counts"]) == found["given"][1] == found["probs"][0]
        assert found["gradient"] > 0


@needs_cuda
def test_backward_waits_for_nothing(pool: GpuPool, megatron: str) -> None:
    for found in pool.run(waits, megatron, PLACE.backend):
        assert found["restored"] and found["gradient"]
        assert not found["backward"], "all was done when backward() returned, a quarter of a second early"
