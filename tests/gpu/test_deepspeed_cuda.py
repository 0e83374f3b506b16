"""DeepSpeed's AutoEP layers on backend "cuda" with FP8 experts on TransformerEngine, beside the same layers in bf16.

ZeRO 0, as where ranks share a GPU. Every run starts with the same weights and sees the same tokens.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_ep_plugin import Fp8Rows, _te, fp8_te
from moe_ep_plugin.integrations import deepspeed as integration

from .helpers import DEVICE, ON_GPU, PLACE, GpuPool, kernel_tests

NEEDED = ["deepspeed", "transformer_engine"] if ON_GPU else ["deepspeed"]
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [*kernel_tests, pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")]

# FP8 GEMMs take multiples of 128.
RANKS, STEPS, LAYERS, EXPERTS, TOPK, TOKENS, HIDDEN, FFN = 2, 8, 2, 4, 2, 64, 128, 256
# By name: whether experts compute in FP8.
RUNS = {"fp8": True, "fp8 again": True, "bf16": False}
EXPERT_WEIGHTS = {f"model.layers.{layer}.mlp.experts.w{n}" for layer in range(LAYERS) for n in (1, 2, 3)}
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "steps_per_print": 10**9,
    "zero_optimization": {"stage": 0},
    "optimizer": {"type": "Adam", "params": {"lr": 2e-3, "torch_adam": True}},
    "bf16": {"enabled": True},
    # The grouped products of torch, for experts in bf16, would need a C compiler.
    "expert_parallel": {"enabled": True, "autoep_size": RANKS, "preset_model": "mixtral", "use_grouped_mm": False}
    | {"comm_backend": "deepep", "comm_max_tokens_per_rank": TOKENS},
}


class Layer(nn.Module):
    """A dense layer and a MoE layer; of that, the parts that AutoEP looks at.

    At first a token's first elements pass unchanged and are what routers read: in no dtype does a rounding choose other
    experts then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.mlp = nn.Linear(HIDDEN, HIDDEN), nn.Module()
        self.mlp.gate, self.mlp.top_k, self.mlp.experts = nn.Linear(HIDDEN, EXPERTS, bias=False), TOPK, nn.Module()
        gate_up, down = torch.randn(EXPERTS, 2 * FFN, HIDDEN), torch.randn(EXPERTS, HIDDEN, FFN)
        self.mlp.experts.gate_up_proj = nn.Parameter(gate_up * 0.7 * HIDDEN**-0.5)
        self.mlp.experts.down_proj = nn.Parameter(down * FFN**-0.5)
        with torch.no_grad():
            self.mlp.gate.weight.copy_(torch.eye(EXPERTS, HIDDEN))
            self.mlp.experts.down_proj[:, :EXPERTS] = 0
            self.dense.weight[:EXPERTS] = self.dense.bias[:EXPERTS] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dense(x)
        return x + self.mlp(x)


class Net(nn.Module):
    """What AutoEP takes for a Mixtral model."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_experts_per_tok": TOPK}
        self.config = SimpleNamespace(model_type="mixtral", num_local_experts=EXPERTS, **sizes)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.lm_head = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(x)


def _train(fp8: bool) -> dict[str, Any]:
    """Losses of a run, the gradients of its first step, and what its experts were given."""
    import deepspeed

    integration.uninstall()
    session = integration.install(backend=PLACE.backend, timeout_s=60.0, fp8_experts=fp8)
    torch.manual_seed(3)
    engine = deepspeed.initialize(model=Net(), config=copy.deepcopy(CONFIG))[0]
    grads: dict[str, torch.Tensor] = {}

    def note(name: str, grad: torch.Tensor) -> None:
        grads.setdefault(name, grad.float().clone())

    for name, parameter in engine.module.named_parameters():
        # As autograd hands them over: DeepSpeed keeps them elsewhere, and reduces those of dense layers.
        parameter.register_hook(functools.partial(note, name))
    torch.manual_seed(9 + dist.get_rank())
    x = torch.randn(1, TOKENS, HIDDEN).to(DEVICE, torch.bfloat16)
    counts: list[list[int]] = []
    losses, powers, multiply = [], True, fp8_te.GroupedLinear.apply

    # Of a grouped product: where its input's gradient goes, the input, rows of each expert, the layer and its weights.
    def noted(to: torch.Tensor, rows: Any, split: list[int], *others: Any) -> torch.Tensor:
        nonlocal powers
        counts.append(split)
        if isinstance(rows, Fp8Rows):
            # Zero in rows that only pad.
            powers &= set(torch.frexp(rows.scale).mantissa.unique().tolist()) <= {0.0, 0.5}
        return multiply(to, rows, split, *others)

    with mock.patch.object(fp8_te, "GroupedLinear", SimpleNamespace(apply=noted)):
        for _ in range(STEPS):
            loss = (engine(x).float() - 1).pow(2).mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    found = {"losses": losses, "grads": grads, "counts": counts, "powers": powers, "used": session.statistics()}
    found["wire"] = [[b.config.power_of_two_scales, b.config.expert_alignment] for b in session.buffers]
    engine.destroy()
    return found | {"left_open": session.statistics()["buffers"]}


def train() -> dict[str, Any]:
    """What every run measured, and how far gradients in FP8 are from those in bf16, relative to these."""
    # DeepSpeed's engine computes on the GPU of this number, which ranks may share.
    number = torch.cuda.current_device() if ON_GPU else dist.get_rank()
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(number)}
    if ON_GPU:
        # Loads TransformerEngine, before torch a cuDNN of its own.
        integration.install(backend=PLACE.backend, fp8_experts=True)
    else:
        integration.enable_cpu()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Takes the gloo group that is there.
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    found: dict[str, Any] = {name: _train(fp8) for name, fp8 in RUNS.items()}
    grads = {name: found[name].pop("grads") for name in RUNS}
    errors = {name: float((grads["fp8"][name] - wide).norm() / wide.norm()) for name, wide in grads["bf16"].items()}
    return found | {"why_not_te": _te.why_not(), "errors": errors}


@pytest.fixture(scope="module")
def trained(kernels: None) -> list[dict[str, Any]]:
    """Measured on ranks of this module alone: DeepSpeed stays in them, and its choice of a device."""
    with GpuPool(RANKS, timeout_s=240.0, group_timeout_s=150.0, env={"TORCHDYNAMO_DISABLE": "1"}) as pool:
        found = pool.run(train)
    for rank in found:
        print({name: [round(loss, 4) for loss in rank[name]["losses"]] for name in RUNS})
        print({name: round(error, 4) for name, error in rank["errors"].items()}, rank["fp8"]["counts"][:LAYERS])
    return found


def test_experts_compute_on_transformer_engine(trained: Any) -> None:
    for rank in trained:
        assert not ON_GPU or rank["why_not_te"] is None, "experts were emulated"
        for name, fp8 in RUNS.items():
            found = rank[name]
            assert found["used"]["backend"] == PLACE.backend and found["left_open"] == 0
            assert found["wire"] == [[fp8, 16 if fp8 and ON_GPU else 1]]
            # Two grouped products in a layer, forward.
            assert len(found["counts"]) == (2 * LAYERS * STEPS if fp8 and ON_GPU else 0)
            assert not any(count % 16 for counts in found["counts"] for count in counts) and found["powers"]


def test_losses_with_fp8_experts_fall_as_the_unquantised_ones(trained: Any) -> None:
    for rank in trained:
        wide, fp8 = rank["bf16"]["losses"], rank["fp8"]["losses"]
        assert fp8[-1] < 0.4 < 1.2 < fp8[0]
        # The first one has seen no gradient: an output is off by 0.06 of what experts add to it. Then gradients err by
        # up to 0.08 of themselves (docs/fp8.md), so that a loss may be ahead or behind by that part of what it has
        # fallen, 1.5. Seen on CPUs: 0.005.
        assert abs(fp8[0] - wide[0]) < 0.02
        assert 1e-4 < max(abs(a - b) for a, b in zip(fp8, wide, strict=True)) < 0.11


def test_first_gradients_of_fp8_experts(trained: Any) -> None:
    for rank in trained:
        errors = rank["errors"]
        assert errors.keys() > EXPERT_WEIGHTS
        # docs/fp8.md derives 0.064 for a layer's output; two layers follow each other here, and the emulation gives
        # 0.058 to 0.067. A token that another expert computes would be 0.1 alone, but routes are the same.
        assert all(0.02 < errors[name] < 0.09 for name in EXPERT_WEIGHTS), errors
        assert all(error < 0.09 for error in errors.values()), errors


def test_a_run_is_the_same_again(trained: Any) -> None:
    """Rows arrive in one order, sums are made in one, and torch's backward adds nothing to one place twice here."""
    for rank in trained:
        assert rank["fp8"]["losses"] == rank["fp8 again"]["losses"]
