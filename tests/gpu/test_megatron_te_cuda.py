"""Megatron-Core with TransformerEngine's layers: its TEGroupedMLP on our dispatcher, and our FP8 experts in its place.

The models that are compared start with the weights of one TEGroupedMLP, loaded by name.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from . import test_megatron_cuda
from .helpers import DEVICE, ON_GPU, PLACE, GpuPool, kernel_tests
from .test_megatron_cuda import ENVIRONMENT, TIMEOUT_S

needs_te = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs transformer-engine")
pytestmark = [*kernel_tests, needs_te]

megatron = test_megatron_cuda.megatron

RANKS, STEPS = 2, 10
# FP8 GEMMs take multiples of 128. With this learning rate a model of twice the width doubles every difference.
TRAINED = {"hidden_size": 128, "num_attention_heads": 2, "ffn_hidden_size": 128, "moe_ffn_hidden_size": 256}
# Two scales in a row that crosses.
COMPARED = {"hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 256, "moe_ffn_hidden_size": 128}


class Run(NamedTuple):
    """A model's dispatcher, our wire, whether Megatron computes in FP8, and whether its SwiGLU is the fused one."""

    dispatcher: str
    wire: str
    fp8: bool
    fused: bool = False


# With an unquantised wire, experts stay Megatron's.
RUNS = {
    "alltoall, fp8": Run("alltoall", "bf16", True),
    "deepep, fp8": Run("deepep", "bf16", True),
    "follow": Run("deepep", "fp8", True),
    "alltoall, bf16": Run("alltoall", "bf16", False),
    "deepep, bf16": Run("deepep", "bf16", False),
}
FUSED = Run("alltoall", "bf16", True, fused=True)


# On a rank


def _start(megatron: str) -> Any:
    jobs = test_megatron_cuda._jobs(megatron)
    torch.backends.cuda.matmul.allow_tf32 = False
    jobs.parallel(ep=RANKS)
    return jobs


def _make_model(jobs: Any, backend: str, run: Run, sizes: Mapping[str, int]) -> Any:
    """A model for a run; closes the buffers of the one before."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.enums import AttnBackend

    jobs.install().close()
    jobs.install(backend=backend, timeout_s=60.0, wire=run.wire)
    jobs.seed()
    config = jobs.make_config(
        run.dispatcher,
        params_dtype=torch.bfloat16,
        # TransformerEngine's layers are made where they run.
        use_cpu_initialization=False,
        moe_grouped_gemm=True,
        # Fewer experts are chosen by a rounding then.
        moe_router_dtype="fp32",
        bias_activation_fusion=run.fused,
        # The same attention whatever else is installed.
        attention_backend=AttnBackend.unfused,
        **({"fp8": "e4m3", "fp8_recipe": "blockwise"} if run.fp8 else {}),
        **sizes,
    )
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=jobs.EXPERTS, moe_grouped_gemm=True)
    model = jobs.GPTModel(
        config, spec, vocab_size=jobs.VOCABULARY, max_sequence_length=jobs.SEQUENCE, position_embedding_type="rope"
    )
    test_megatron_cuda.move(model, DEVICE)
    # As Megatron's schedules do; TransformerEngine would go on with the weights that it quantised at first.
    model.register_forward_pre_hook(lambda model, _inputs: model.set_is_first_microbatch())
    return model


def train(megatron: str, backend: str) -> dict[str, Any]:
    """What every run measured, by name."""
    jobs = _start(megatron)
    import transformer_engine.pytorch as te

    from moe_ep_plugin import _te

    found: dict[str, Any] = {"why_not_te": _te.why_not()}
    weights: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    for name, run in RUNS.items():
        model = _make_model(jobs, backend, run, TRAINED)
        if not weights:
            test_megatron_cuda._draw_weights(model)
            weights = copy.deepcopy(model.state_dict())
        model.load_state_dict(weights)
        found[name] = {
            "losses": jobs.train_model(model, STEPS),
            "experts": {type(m.experts).__name__ for m in model.modules() if isinstance(m, jobs.MoELayer)},
            # TransformerEngine's layers that have quantised their input in blocks.
            "fp8": {
                name
                for name, layer in model.named_modules()
                if isinstance(layer, te.Linear | te.LayerNormLinear | te.GroupedLinear)
                and layer.fp8
                and type(layer.quantizers["scaling_fwd"][0]).__name__ == "Float8BlockQuantizer"
            },
            "wire": [[b.config.power_of_two_scales, b.config.expert_alignment] for b in jobs.install().buffers],
        }
        # Of the first run, the FP8 states that TransformerEngine's layers have by now included.
        trained = trained or copy.deepcopy(model.state_dict())
        model.load_state_dict(trained)
        with torch.no_grad():
            found[name]["loss of the first"] = jobs.model_loss(model).item()
    return found


def first_step(megatron: str, backend: str) -> dict[str, Any]:
    """By run: the loss, and how far gradients are from those of our FP8 experts, relative to these."""
    jobs = _start(megatron)
    from megatron.core.transformer.moe import experts

    def swiglu(x: torch.Tensor, _bias: None, probs: torch.Tensor, *_: Any) -> torch.Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up * probs).to(x.dtype)

    weights: dict[str, Any] = {}
    losses: dict[str, float] = {}
    grads: dict[str, dict[str, torch.Tensor]] = {}
    # As Megatron's fused kernel where it is compiled. It is not here, and would round after every operation.
    with mock.patch.object(experts, "weighted_bias_swiglu_impl", swiglu):
        for name in ("fused", "alltoall, fp8", "alltoall, bf16", "follow"):
            model = _make_model(jobs, backend, RUNS.get(name, FUSED), COMPARED)
            if not weights:
                test_megatron_cuda._draw_weights(model)
                weights = copy.deepcopy(model.state_dict())
            model.load_state_dict(weights)
            loss = jobs.model_loss(model)
            loss.backward()
            losses[name] = loss.item()
            grads[name] = {key: weight.grad.float() for key, weight in model.named_parameters()}

    def distance(name: str, of_experts: bool) -> float:
        assert grads[name].keys() == grads["follow"].keys()
        pairs = [(grads[name][key], g) for key, g in grads["follow"].items() if (".experts." in key) == of_experts]
        difference = sum(float((one - other).norm() ** 2) for one, other in pairs)
        return math.sqrt(difference / sum(float(other.norm() ** 2) for _, other in pairs))

    return {
        name: {"loss": loss, "experts": distance(name, True), "others": distance(name, False)}
        for name, loss in losses.items()
    }


# In the parent


def furthest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def pool(megatron: str, kernels: None) -> Iterator[Any]:
    """Ranks of this module alone: Megatron's choice of an attention stays in their environment."""
    with GpuPool(RANKS, timeout_s=TIMEOUT_S, env=ENVIRONMENT) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def trained(pool: GpuPool, megatron: str) -> list[dict[str, Any]]:
    found = pool.run(train, megatron, PLACE.backend)
    for name in RUNS:
        print(name, [round(loss, 4) for loss in found[0][name]["losses"]], found[0][name]["loss of the first"])
    return found


def test_layers_follow_megatrons_fp8_and_learn(trained: Any) -> None:
    dense = {f"decoder.layers.{i}.self_attention.linear_{name}" for i in range(2) for name in ("proj", "qkv")}
    grouped = {f"decoder.layers.{i}.mlp.experts.linear_fc{n}" for i in range(2) for n in (1, 2)}
    for rank in trained:
        assert not ON_GPU or rank["why_not_te"] is None, "experts were emulated"
        for name, run in RUNS.items():
            found, ours = rank[name], name == "follow"
            assert found["experts"] == {"MegatronFp8Experts" if ours else "TEGroupedMLP"}
            assert found["fp8"] == ((dense if ours else dense | grouped) if run.fp8 else set())
            assert found["wire"] == [[ours, 16 if ours and ON_GPU else 1]] * (run.dispatcher == "deepep")
            assert all(math.isfinite(loss) for loss in found["losses"])
            assert found["losses"][-1] < found["losses"][0] - 1


def test_the_grouped_mlp_trains_the_same_on_our_dispatcher(trained: Any) -> None:
    for rank in trained:
        # Rows come in the same order, so that GEMMs are the same, and a sum over two experts is rounded once.
        # Otherwise the tolerance between dispatchers of test_megatron_cuda.py.
        assert furthest(rank["deepep, bf16"]["losses"], rank["alltoall, bf16"]["losses"]) <= 2e-2
        one, other = rank["deepep, fp8"]["losses"], rank["alltoall, fp8"]["losses"]
        assert abs(one[0] - other[0]) <= 1e-4
        # Once something is rounded otherwise, runs drift as below.
        assert furthest(one, other) <= 0.05 * (other[0] - other[-1])


def test_our_experts_train_as_the_grouped_mlp(trained: Any) -> None:
    for rank in trained:
        one, other = rank["follow"]["losses"], rank["alltoall, fp8"]["losses"]
        assert abs(one[0] - other[0]) <= 5e-3
        # Gradients differ by about 0.05 of themselves, as the test of the first step measures, so that a loss may be
        # ahead or behind by that part of what it has fallen.
        assert furthest(one, other) <= 0.05 * (other[0] - other[-1])
        # Either goes on from what a TEGroupedMLP has learnt.
        losses = [rank[name]["loss of the first"] for name, run in RUNS.items() if run.fp8]
        assert max(losses) - min(losses) <= 1e-2 and max(losses) < other[0] - 1


def test_the_first_step_is_that_of_the_grouped_mlp(pool: GpuPool, megatron: str) -> None:
    """A row has the same codes and scales whether it is quantised before a dispatch or after it, padded or not.

    What differs is SwiGLU, which Megatron rounds to bf16 three times unless it is fused, and we once; and FC1's input
    by column, which we make from FP8 rows: with power-of-two scales that rounds only what is subnormal there.
    """
    for rank in pool.run(first_step, megatron, PLACE.backend):
        print({name: {key: round(value, 6) for key, value in found.items()} for name, found in rank.items()})
        ours, fused, unfused, plain = (rank[name] for name in ("follow", "fused", "alltoall, fp8", "alltoall, bf16"))
        # Of everything else, no more than an order of sums.
        assert abs(ours["loss"] - fused["loss"]) <= 1e-4
        assert fused["experts"] <= 0.01 and fused["others"] <= 0.01
        # An element that bf16 rounds to the other side of a boundary has the next e4m3 code, 16 times as far.
        assert abs(ours["loss"] - unfused["loss"]) <= 5e-3
        assert unfused["experts"] < plain["experts"] and unfused["others"] < plain["others"]
