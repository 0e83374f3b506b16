"""Jobs that the tests run in a process of their own, with one Megatron-Core version on PYTHONPATH.

    python megatron_jobs.py OUT.json

Megatron is imported once; each world is forked from there, so a version costs one import. A job runs on every rank
and returns JSON-able measurements; what is right is decided by the tests that read them.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

warnings.filterwarnings("ignore")
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

torch.set_num_threads(1)
from moe_ep_plugin.integrations.megatron import enable_cpu, install  # noqa: E402

enable_cpu()
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core import utils as megatron_utils  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import apply_factories  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.moe import moe_layer  # noqa: E402
from megatron.core.transformer.moe.experts import TEGroupedMLP  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from moe_ep_plugin.config import MAX_TOPK  # noqa: E402
from moe_ep_plugin.errors import ConfigError  # noqa: E402
from moe_ep_plugin.fp8_experts import Fp8Recipe  # noqa: E402
from tests.integrations.worlds import world  # noqa: E402

BACKEND = os.environ.get("MOE_EP_TEST_BACKEND", "auto")
EXPERTS, TOPK, HIDDEN = 8, 2, 32
SEQUENCE, BATCH, VOCABULARY = 16, 2, 64
DISPATCHERS = ("alltoall", "deepep")


def parallel(ep: int, tp: int = 1, expert_tp: int = 1) -> None:
    """Form Megatron's groups afresh and seed its generators."""
    if parallel_state.model_parallel_is_initialized():
        install().close()
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=expert_tp
    )
    seed()


def seed() -> None:
    torch.manual_seed(123)
    model_parallel_cuda_manual_seed(123, force_reset_rng=True)


def make_config(dispatcher: str, **changes: Any) -> TransformerConfig:
    """A tiny MoE config for the groups that are formed."""
    dtype = changes.get("params_dtype", torch.float32)
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "ffn_hidden_size": 64,
        "moe_ffn_hidden_size": 32,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK,
        "moe_token_dispatcher_type": dispatcher,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        "sequence_parallel": parallel_state.get_tensor_model_parallel_world_size() > 1,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "pipeline_dtype": dtype,
    }
    return TransformerConfig(**(settings | changes))


def make_model(dispatcher: str, **changes: Any) -> GPTModel:
    """A two-layer GPT, the same for every dispatcher."""
    seed()
    config = make_config(dispatcher, **changes)
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    return GPTModel(
        config, spec, vocab_size=VOCABULARY, max_sequence_length=SEQUENCE, position_embedding_type="rope"
    ).to(config.params_dtype)


def model_loss(model: GPTModel, batch: int = BATCH) -> torch.Tensor:
    """The loss of ``batch`` fixed, rank-distinct sequences."""
    generator = torch.Generator().manual_seed(1000 + dist.get_rank())
    tokens = torch.randint(0, VOCABULARY, (batch, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(batch, -1)
    mask = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool), 1)
    loss: torch.Tensor = model(tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous())
    return loss.float().mean()


def train(dispatcher: str, steps: int, **changes: Any) -> list[float]:
    """Train a model; returns the mean loss over ranks of every step."""
    return train_model(make_model(dispatcher, **changes), steps)


def train_model(model: GPTModel, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    world = dist.get_world_size()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model_loss(model)
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                continue
            dense = getattr(parameter, "allreduce", True)
            group = (
                parallel_state.get_data_parallel_group() if dense else parallel_state.get_expert_data_parallel_group()
            )
            grad = parameter.grad.float()
            dist.all_reduce(grad, group=group)
            parameter.grad = (grad / world).to(parameter.dtype)
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def make_layer(config: TransformerConfig) -> MoELayer:
    mlp = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False).submodules.mlp
    # A ModuleSpec, and from 0.19 a partial of the class.
    layer = MoELayer(config, mlp.keywords["submodules"] if hasattr(mlp, "keywords") else mlp.submodules)
    layer.set_layer_number(1)
    return layer


def layer_run(dispatcher: str, tokens: torch.Tensor, **changes: Any) -> dict[str, torch.Tensor]:
    """Forward and backward of one MoE layer; returns output, gradients and what the experts were given."""
    seed()
    config = make_config(dispatcher, **changes)
    layer = make_layer(config)
    seen: dict[str, torch.Tensor] = {}
    experts_forward = layer.experts.forward

    def forward(rows: torch.Tensor, counts: torch.Tensor, probs: torch.Tensor) -> Any:
        seen.update(rows=rows.detach().clone(), counts=counts.clone(), probs=probs.detach().clone())
        return experts_forward(rows, counts, probs)

    layer.experts.forward = forward
    x = tokens.clone().requires_grad_()
    # The second pass shows that nothing of the first is left over.
    for _ in range(2):
        x.grad = None
        layer.zero_grad()
        output, _ = layer(x)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    result = {"output": output.detach(), "x.grad": x.grad, **{f"seen.{k}": v for k, v in seen.items()}}
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            result[f"grad.{name}"] = parameter.grad.clone()
    return result


def rank_tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    return torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator)


def compare(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Largest difference of every tensor, relative to its largest element, and what experts of ``other`` were given."""
    shapes = {
        k: [list(one[k].shape), list(other[k].shape)] for k in one if k in other and one[k].shape != other[k].shape
    }
    differences = {
        k: ((one[k].double() - other[k].double()).abs().max() / one[k].double().abs().max().clamp_min(1e-30)).item()
        for k in one
        if k in other and k not in shapes and one[k].numel()
    }
    return {
        "missing": sorted(set(one) ^ set(other)),
        "shapes": shapes,
        "differences": differences,
        "counts": other["seen.counts"].tolist(),
        "output_norm": other["output"].norm().item(),
    }


LAYERS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "capacity": {"moe_expert_capacity_factor": 0.5},
    "pad_to_capacity": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    "shared": {"moe_shared_expert_intermediate_size": 16},
    "shared_overlap": {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_overlap": True},
    "recompute": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "fp64_router": {"moe_router_dtype": "fp64"},
}


def layers_job() -> dict[str, Any]:
    return {
        name: compare(*(layer_run(dispatcher, rank_tokens(), **changes) for dispatcher in DISPATCHERS))
        for name, changes in LAYERS.items()
    }


def make_dispatcher(name: str, num_experts: int = EXPERTS, after: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A dispatcher as MoELayer makes it; ``after`` is set on the config past Megatron's validation."""
    config = make_config(name, num_moe_experts=num_experts, **changes)
    for key, value in (after or {}).items():
        setattr(config, key, value)
    local = num_experts // parallel_state.get_expert_model_parallel_world_size()
    first = local * parallel_state.get_expert_model_parallel_rank()
    old = hasattr(moe_layer, "get_default_model_comm_pgs")
    groups = (
        {"model_comm_pgs": moe_layer.get_default_model_comm_pgs()}
        if old
        else {"pg_collection": moe_layer.get_default_pg_collection()}
    )
    made = moe_layer.MoEAlltoAllTokenDispatcher if name == "alltoall" else moe_layer.MoEFlexTokenDispatcher
    return made(local, list(range(first, first + local)), config=config, **groups)


def through(dispatcher: Any, x: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor) -> dict[str, Any]:
    """Dispatch, let each TP shard of expert e return (e + 1) / shards of its input times the gate, combine."""
    tokens, gates = dispatcher.dispatch_preprocess(x, routing_map, probs)
    rows, gates = dispatcher.token_dispatch(tokens, gates)
    rows, counts, gates = dispatcher.dispatch_postprocess(rows, gates)
    experts = torch.tensor(dispatcher.local_expert_indices, dtype=rows.dtype).repeat_interleave(counts)
    shards = dispatcher.tp_size
    results = rows * gates[:, None] * (experts[:, None] + 1) / shards
    out = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(results)))
    return {"output": out, "counts": counts, "rows": rows, "gates": gates}


def against_dense(
    dispatcher: Any, num_experts: int, routing_map: torch.Tensor, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Differences of output and gradients from what the routing map says, computed without any communication."""
    generator = torch.Generator().manual_seed(50 + dist.get_rank())
    num_tokens = routing_map.shape[0]
    x = torch.randn(num_tokens, 1, HIDDEN, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(num_tokens, num_experts, generator=generator).mul(routing_map).requires_grad_()
    weight = torch.randn(num_tokens, 1, HIDDEN, generator=generator).to(dtype)
    seen = through(dispatcher, x, routing_map, probs)
    (seen["output"] * weight).sum().backward()
    x2, probs2 = x.detach().clone().requires_grad_(), probs.detach().clone().requires_grad_()
    factor = (probs2 * routing_map * torch.arange(1, num_experts + 1)).sum(1)
    dense = x2 * factor[:, None, None].to(dtype)
    (dense * weight).sum().backward()
    return {
        "output": (seen["output"] - dense).abs().max().item(),
        "x.grad": (x.grad - x2.grad).abs().max().item(),
        "probs.grad": (probs.grad - probs2.grad).abs().max().item(),
        "counts": seen["counts"].tolist(),
        "counts_dtype": str(seen["counts"].dtype),
        "norm": dense.norm().item(),
    }


def random_map(num_tokens: int, num_experts: int, topk: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(90 + dist.get_rank())
    chosen = torch.rand(num_tokens, num_experts, generator=generator).topk(topk, dim=1).indices
    return torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter(1, chosen, True)


def dense_job() -> dict[str, Any]:
    """Dispatcher-level cases against a dense reference, on the groups that are formed."""
    deepep = make_dispatcher("deepep")
    to_one = torch.zeros(6, EXPERTS, dtype=torch.bool)
    to_one[:, 0] = True
    ragged = random_map(5 + 3 * dist.get_rank(), EXPERTS, TOPK)
    ragged[0] = False
    everywhere = torch.ones(4, 40, dtype=torch.bool)
    everywhere[1] = False
    everywhere[2, 3:] = False
    return {
        "random": against_dense(deepep, EXPERTS, random_map(12, EXPERTS, TOPK)),
        "all_to_one": against_dense(deepep, EXPERTS, to_one),
        "ragged": against_dense(deepep, EXPERTS, ragged),
        "none": against_dense(deepep, EXPERTS, torch.zeros(3, EXPERTS, dtype=torch.bool)),
        "more_than_max_topk": against_dense(
            make_dispatcher("deepep", 40, moe_expert_capacity_factor=4.0, moe_pad_expert_input_to_capacity=True),
            40,
            everywhere,
        ),
        "max_topk": MAX_TOPK,
    }


def identity_job() -> dict[str, Any]:
    """Experts that return their input, gates 1/topk: what comes back is what went out."""
    dispatcher = make_dispatcher("deepep")
    x = rank_tokens().requires_grad_()
    routing_map = random_map(SEQUENCE * BATCH, EXPERTS, TOPK)
    probs = (routing_map / TOPK).requires_grad_()
    tokens, gates = dispatcher.dispatch_preprocess(x, routing_map, probs)
    rows, gates = dispatcher.token_dispatch(tokens, gates)
    rows, counts, gates = dispatcher.dispatch_postprocess(rows, gates)
    restored = dispatcher.combine_postprocess(
        dispatcher.token_combine(dispatcher.combine_preprocess(rows * gates[:, None]))
    )
    restored.backward(x.detach())
    return {
        "restored": bool(torch.equal(restored, x)),
        "gradient": bool(torch.equal(x.grad, x)),
        "rank_distinct": x.detach().sum().item(),
        "rows": int(counts.sum()),
    }


def router_padding_job() -> dict[str, Any]:
    """Padding through the routing map, against alltoall. The switch is set past validation, which wants TE's FP8."""
    names = ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8")
    name = next(name for name in names if hasattr(TransformerConfig, name))
    after = {name: True, "fp8": "e4m3", "fp8_recipe": "delayed"}
    found = {}
    for name in DISPATCHERS:
        torch.manual_seed(5)
        dispatcher = make_dispatcher(name, after=after)
        x = rank_tokens()
        routing_map = random_map(SEQUENCE * BATCH, EXPERTS, TOPK)
        probs = (routing_map / TOPK).float()
        before = routing_map.clone()
        seen = through(dispatcher, x, routing_map, probs)
        found[name] = seen | {"map_kept": bool(torch.equal(before, routing_map))}
    one, other = found["alltoall"], found["deepep"]
    return {
        "counts": [one["counts"].tolist(), other["counts"].tolist()],
        "rows_equal": bool(torch.equal(one["rows"], other["rows"])),
        "gates_equal": bool(torch.equal(one["gates"], other["gates"])),
        "output": (one["output"] - other["output"]).abs().max().item(),
        "map_kept": other["map_kept"],
    }


def overlap_job() -> dict[str, Any]:
    """The steps of Megatron's 1F1B schedule around our dispatcher: detached stages, gradients passed by hand."""
    dispatcher = make_dispatcher("deepep")
    manager = dispatcher._comm_manager
    x = rank_tokens().requires_grad_()
    routing_map = random_map(SEQUENCE * BATCH, EXPERTS, TOPK)
    probs = (routing_map * torch.rand(routing_map.shape)).requires_grad_()
    tokens, gates = dispatcher.dispatch_preprocess(x, routing_map, probs)
    tokens_, gates_ = tokens.detach().requires_grad_(), gates.detach().requires_grad_()
    manager.token_probs = gates_
    rows, row_gates = dispatcher.token_dispatch(tokens_, gates_)
    rows_, row_gates_ = rows.detach().requires_grad_(), row_gates.detach().requires_grad_()
    manager.dispatched_probs = row_gates_
    expert_rows, counts, used_gates = dispatcher.dispatch_postprocess(rows_, row_gates_)
    expert_out = dispatcher.combine_preprocess(expert_rows * used_gates[:, None])
    expert_out_ = expert_out.detach().requires_grad_()
    counts_found = manager.get_number_of_tokens_per_expert() is counts
    attributes = [getattr(manager, name.split(".")[1]) for name in dispatcher.cudagraph_attrs]
    out = dispatcher.combine_postprocess(dispatcher.token_combine(expert_out_))
    out.backward(torch.ones_like(out))
    expert_out.backward(expert_out_.grad)
    torch.autograd.backward([rows, row_gates], [rows_.grad, row_gates_.grad])
    torch.autograd.backward([tokens, gates], [tokens_.grad, gates_.grad])
    factor = probs.detach().sum(1).view(SEQUENCE, BATCH, 1)
    expected_probs = x.detach().sum(-1).view(-1, 1) * routing_map
    freed: dict[str, bool] = {}
    for name in ("megatron.core.models.common.utils", "megatron.core.models.gpt.fine_grained_callables"):
        module = sys.modules.get(name)
        decide = getattr(module, "should_free_input", None) if module else None
        if decide is not None:
            by_flag = "is_deepep" in decide.__wrapped__.__code__.co_varnames
            more = decide.__wrapped__.__code__.co_argcount - 3
            upstream = make_config("alltoall")
            freed["ours"] = decide("mlp", True, True if by_flag else dispatcher.config, *[4] * more)
            freed["other"] = decide("mlp", True, False if by_flag else upstream, *[4] * more)
            freed["combine"] = decide("moe_combine", True, True if by_flag else dispatcher.config, *[4] * more)
    config = dispatcher.config
    return {
        "output": (out - x.detach() * factor).abs().max().item(),
        "x.grad": (x.grad - factor.expand_as(x)).abs().max().item(),
        "probs.grad": (probs.grad - expected_probs).abs().max().item(),
        "counts": counts_found,
        "type_is_flex": config.moe_token_dispatcher_type == "flex",
        "contract": getattr(config, "moe_flex_dispatcher_backend", None) == "deepep" or config.moe_enable_deepep,
        "cudagraph_attrs": [torch.is_tensor(attribute) for attribute in attributes],
        "zero_copy": list(dispatcher.get_expert_zero_copy_buffers()),
        "freed": freed,
    }


def recompute_job() -> list[float]:
    """Every transformer layer is run again in the backward, its dispatch and combine with it."""
    return train("deepep", 5, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def evaluation_job(dispatcher: str) -> dict[str, Any]:
    """Train, evaluate batches of other sizes than the first one, train on."""
    install().close()
    model = make_model(dispatcher)
    before = train_model(model, 3)
    model.eval()
    with torch.no_grad():
        losses = [model_loss(model, batch).item() for batch in (BATCH // 2, 2 * BATCH)]
        error = ""
        if dispatcher == "deepep":
            try:
                model_loss(model, 2 * BATCH + 1)
            except ConfigError as raised:
                error = str(raised)
    model.train()
    return {"before": before, "evaluation": losses, "after": train_model(model, 3), "error": error}


def fp8_job() -> dict[str, Any]:
    """A layer and training with the FP8 wire; leaves the session as it was."""
    plain = layer_run("deepep", rank_tokens())
    install().close()
    install(wire="fp8")
    found = {"layer": compare(plain, layer_run("deepep", rank_tokens())), "losses": train("deepep", 10)}
    install().close()
    install(wire="bf16")
    return found


def fp8_experts_job() -> dict[str, Any]:
    """Training with experts on FP8 rows, with and without recompute, and what can't be converted."""
    from moe_ep_plugin.integrations.megatron.fp8_experts import use_fp8_experts

    def converted(**changes: Any) -> GPTModel:
        model = make_model("deepep", **changes)
        before = list(model.parameters())
        assert use_fp8_experts(model) == 2 and use_fp8_experts(model) == 0
        assert {id(parameter) for parameter in before} == {id(parameter) for parameter in model.parameters()}
        return model

    def refusal(dispatcher: str, recipe: Fp8Recipe | None = None, **changes: Any) -> str:
        try:
            use_fp8_experts(make_model(dispatcher, **changes), recipe)
        except ConfigError as error:
            return str(error)
        return ""

    model = converted()
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {
        "losses": train_model(model, 50),
        "again": train_model(converted(**recompute), 5),
        "names": sorted(name for name in model.state_dict() if ".layers.0.mlp.experts." in name),
        "refused": {
            "token_dispatcher": refusal("alltoall"),
            "gated_linear_unit": refusal("deepep", gated_linear_unit=False),
            "activation_func": refusal("deepep", activation_func=torch.nn.functional.gelu),
            "recipe.delay_weight_grad": refusal("deepep", Fp8Recipe(delay_weight_grad=True)),
        },
    }


def groups_of_layer() -> Any:
    """The process groups that MoELayer takes where it is given none."""
    old = hasattr(moe_layer, "get_default_model_comm_pgs")
    return moe_layer.get_default_model_comm_pgs() if old else moe_layer.get_default_pg_collection()


class GroupedLinear(torch.nn.Module):
    """What is used of TransformerEngine's layer as Megatron extends it: parameters, their attributes, no FP8 state."""

    def __init__(self, num_gemms: int, input_size: int, output_size: int, **_: Any) -> None:
        super().__init__()
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.randn(output_size, input_size) * 0.1)
            weight.allreduce = False
            self.register_parameter(f"weight{index}", weight)

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None: ...


def te_experts_job() -> dict[str, Any]:
    """Megatron's own TEGroupedMLP, on stand-ins for TransformerEngine's layers, before and after its conversion."""
    from moe_ep_plugin.integrations.megatron.fp8_experts import use_fp8_experts

    seed()
    layer = make_layer(make_config("deepep"))
    submodules = types.SimpleNamespace(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear, activation_func=None)
    layer.experts = TEGroupedMLP(layer.num_local_experts, layer.config, submodules, groups_of_layer())
    before = dict(layer.experts.named_parameters())
    states = {name: state.clone() for name, state in layer.state_dict().items()}
    changed = use_fp8_experts(layer)
    after = dict(layer.experts.named_parameters())
    x = rank_tokens().requires_grad_()
    output, _ = layer(x)
    output.sum().backward()
    # The plain computation, with the gate values of the same router.
    probs, _ = layer.router(x.detach())
    every = [torch.empty_like(w) for w in before.values() for _ in range(dist.get_world_size())]
    gathered = dict(zip(before, [every[i : i + 2] for i in range(0, len(every), 2)], strict=True))
    for name, weight in before.items():
        dist.all_gather(gathered[name], weight.detach())
    local = layer.num_local_experts
    dense = torch.zeros(SEQUENCE * BATCH, HIDDEN)
    for expert in range(EXPERTS):
        rank, index = divmod(expert, local)
        gate, up = (x.detach().view(-1, HIDDEN) @ gathered[f"linear_fc1.weight{index}"][rank].t()).chunk(2, dim=1)
        hidden = torch.nn.functional.silu(gate) * up * probs.view(-1, EXPERTS)[:, expert, None]
        dense += hidden @ gathered[f"linear_fc2.weight{index}"][rank].t()
    bad = TEGroupedMLP(layer.num_local_experts, layer.config, submodules, groups_of_layer())
    bad.linear_fc2.register_parameter("bias0", torch.nn.Parameter(torch.zeros(HIDDEN)))
    other = make_layer(make_config("deepep"))
    other.experts = bad
    try:
        use_fp8_experts(other)
        refused = ""
    except ConfigError as error:
        refused = str(error)
    missing = layer.load_state_dict(states)
    return {
        "changed": changed,
        "same": list(before) == list(after) and all(before[name] is after[name] for name in before),
        "allreduce": [weight.allreduce for weight in after.values()],
        "gradients": all(weight.grad is not None for weight in after.values()),
        "output": ((output.detach().view(-1, HIDDEN) - dense).norm() / dense.norm()).item(),
        "refused": refused,
        "loaded": [list(missing.missing_keys), list(missing.unexpected_keys)],
    }


def fp8_alignment_job() -> dict[str, Any]:
    """One layer with rows of each expert padded to 16, against unpadded ones."""
    from moe_ep_plugin.integrations.megatron.fp8_experts import use_fp8_experts

    def run(alignment: int | None) -> dict[str, torch.Tensor]:
        seed()
        layer = make_layer(make_config("deepep"))
        use_fp8_experts(layer, Fp8Recipe(gradients="fp8"), expert_alignment=alignment)
        x = rank_tokens().requires_grad_()
        output, _ = layer(x)
        counts = layer.token_dispatcher._comm_manager.get_number_of_tokens_per_expert()
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        grads = {f"grad.{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
        return {"output": output.detach(), "x.grad": x.grad, "seen.counts": counts, **grads}

    plain, padded = run(None), run(16)
    return compare(plain, padded) | {"plain_counts": plain["seen.counts"].tolist()}


@contextmanager
def te_installed() -> Iterator[None]:
    """What Megatron's validation looks at: a TransformerEngine of some version. Its layers are not there."""
    before = megatron_utils._te_version
    stand_in = types.ModuleType("transformer_engine")
    stand_in.__version__ = "2.9.0"
    sys.modules["transformer_engine"], megatron_utils._te_version = stand_in, None
    try:
        yield
    finally:
        del sys.modules["transformer_engine"]
        megatron_utils._te_version = before


def fp8_flags_job() -> dict[str, Any]:
    """Which experts layers are built with, by Megatron's FP8 settings and our options; leaves the session as it was."""
    block = {"fp8": "hybrid", "fp8_recipe": "blockwise"}

    def build(dispatcher: str = "deepep", **changes: Any) -> Any:
        try:
            with te_installed():
                return make_model(dispatcher, **changes)
        except ConfigError as error:
            return str(error)

    def kinds(*args: Any, **changes: Any) -> list[str]:
        return [type(m.experts).__name__ for m in build(*args, **changes).modules() if isinstance(m, MoELayer)]

    install().close()
    found: dict[str, Any] = {"wire_bf16": kinds(**block)}
    install(wire="fp8")
    found["no_fp8"] = kinds()
    found["alltoall"] = kinds("alltoall", **block)
    ends = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2}
    found["first_last"] = kinds(num_layers=5, **block, **ends)
    found["refused"] = {name: build(**block | {"fp8_recipe": name}) for name in ("delayed", "tensorwise", "mxfp8")}
    model = build(**block)
    found["follow"] = [type(m.experts).__name__ for m in model.modules() if isinstance(m, MoELayer)]
    (recipe,) = {m.experts.recipe for m in model.modules() if isinstance(m, MoELayer)}
    found["recipe"] = [recipe.gradients, recipe.power_of_two_scales, recipe.weight_block]
    found["losses"] = train_model(model, 10)
    found["wire"] = [[b.config.power_of_two_scales, b.config.expert_alignment] for b in install().buffers]
    try:
        make_config("deepep", **block)
    except ConfigError as error:
        found["without_te"] = str(error)
    install().close()
    install(wire="bf16", fp8="experts")
    found["experts"] = kinds()
    found["experts_alltoall"] = kinds("alltoall")
    found["experts_losses"] = train_model(make_model("deepep"), 10)
    found["experts_refused"] = build(gated_linear_unit=False)
    install().close()
    install(fp8="follow")
    return found


def checkpoint_entries(model: GPTModel, metadata: dict[str, Any] | None) -> list[str]:
    """All that a distributed checkpoint would know of the experts, apart from the values."""
    states = model.sharded_state_dict(metadata=dict(metadata) if metadata else None)
    apply_factories(states)
    names = ("key", "global_shape", "global_offset", "local_shape", "axis_fragmentations", "replica_id")
    return sorted(
        str([type(entry).__name__, *(getattr(entry, name, None) for name in names)])
        for entry in nested_values(states)
        if ".experts." in entry.key
    )


def experts_by_name(model: GPTModel) -> dict[str, torch.Tensor]:
    """Local experts' weights under the names that they have in a SequentialMLP."""
    found = {}
    for number, layer in enumerate(m for m in model.modules() if isinstance(m, MoELayer)):
        for name, weight in layer.experts.named_parameters():
            part, _, index = name.partition(".weight")
            found[f"{number}.{name}" if not index else f"{number}.local_experts.{index}.{part}.weight"] = (
                weight.detach()
            )
    return found


def checkpoint_job() -> dict[str, Any]:
    """Distributed checkpoints between Megatron's experts and ours, in both directions and to another EP size."""
    from moe_ep_plugin.integrations.megatron.fp8_experts import use_fp8_experts

    def model(fp8: bool, add: float = 0.0) -> GPTModel:
        made = make_model("deepep")
        if fp8:
            assert use_fp8_experts(made) == 2
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(add)
        return made

    def shared_folder() -> tempfile.TemporaryDirectory[str] | None:
        return tempfile.TemporaryDirectory() if dist.get_rank() == 0 else None

    def path_of(folder: Any) -> str:
        path = [folder.name if folder else ""]
        dist.broadcast_object_list(path)
        return str(path[0])

    def load(into: GPTModel, path: str, metadata: dict[str, Any] | None) -> bool:
        before = experts_by_name(into)
        before = {name: weight.clone() for name, weight in before.items()}
        states = dist_checkpointing.load(into.sharded_state_dict(metadata=dict(metadata) if metadata else None), path)
        into.load_state_dict(states)
        changed = experts_by_name(into)
        return all(not torch.equal(before[name], changed[name]) for name in before)

    found: dict[str, Any] = {}
    for name, metadata in (("whole", None), ("singleton", {"singleton_local_shards": True})):
        parallel(ep=2)
        found[name] = {"entries": [checkpoint_entries(model(fp8), metadata) for fp8 in (False, True)]}
        for direction, fp8 in (("to_fp8", False), ("from_fp8", True)):
            parallel(ep=2)
            source, folder = model(fp8), shared_folder()
            path = path_of(folder)
            states = source.sharded_state_dict(metadata=dict(metadata) if metadata else None)
            dist_checkpointing.save(states, path)
            dist.barrier()
            target = model(not fp8, add=1.0)
            changed = load(target, path, metadata)
            one, other = experts_by_name(source), experts_by_name(target)
            equal = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
            found[name][direction] = [changed, equal]
            if name == "whole":
                every = {key: [torch.empty_like(w) for _ in range(2)] for key, w in one.items()}
                for key, weight in one.items():
                    dist.all_gather(every[key], weight.contiguous())
                parallel(ep=1)
                target = model(not fp8, add=1.0)
                found["entries_ep1"] = [checkpoint_entries(model(kind), None) for kind in (False, True)]
                changed = load(target, path, metadata)
                local = EXPERTS // 2
                equal = all(
                    torch.equal(weight, every[f"{layer}.local_experts.{index % local}.{rest}"][index // local])
                    for key, weight in experts_by_name(target).items()
                    for layer, _, number, rest in [key.split(".", 3)]
                    for index in [int(number)]
                )
                found[name][f"{direction}_ep1"] = [changed, equal]
            dist.barrier()
    parallel(ep=2)
    return found


def lease_job() -> dict[str, Any]:
    """What one layer holds during its forward, and when its outputs are gone."""
    config = make_config("deepep")
    layer = make_layer(config)
    x = rank_tokens().requires_grad_()

    def held() -> dict[str, Any]:
        manager = vars(layer.token_dispatcher._comm_manager)
        heaps = [getattr(buffer._backend, "_heap", None) for buffer in install().buffers]
        return {
            "bytes": sum(heap.leased_bytes() for heap in heaps if heap is not None),
            "tensors": sorted(name for name, value in manager.items() if torch.is_tensor(value)),
        }

    # Jobs before this one left cycles of modules, and tensors in them.
    gc.collect()
    output, _ = layer(x)
    forward = held()
    output.sum().backward()
    del output
    x.grad = None
    return {"forward": forward, "after": held(), "host": "host" in install().statistics()["backend"]}


def world2() -> dict[str, Any]:
    parallel(ep=2)
    out: dict[str, Any] = {}
    bf16 = {"params_dtype": torch.bfloat16}
    out["train"] = {name: train(name, 50) for name in DISPATCHERS}
    out["buffers"] = install().statistics()
    out["train"]["again"] = train("deepep", 50)
    out["train_bf16"] = {name: train(name, 50, **bf16) for name in DISPATCHERS}
    out["recompute_full"] = recompute_job()
    out["evaluation"] = {name: evaluation_job(name) for name in DISPATCHERS}
    out["fp8"] = fp8_job()
    out["fp8_experts"] = fp8_experts_job()
    out["te_experts"] = te_experts_job()
    out["fp8_alignment"] = fp8_alignment_job()
    out["fp8_flags"] = fp8_flags_job()
    out["checkpoint"] = checkpoint_job()
    out["lease"] = lease_job()
    out["layers"] = layers_job()
    out["dense"] = dense_job()
    out["identity"] = identity_job()
    out["router_padding"] = router_padding_job()
    out["overlap"] = overlap_job()
    parallel(ep=1)
    out["dense_ep1"] = dense_job()
    parallel(ep=1, tp=2, expert_tp=2)
    out["dense_tp2"] = dense_job()
    return out


def world4() -> dict[str, Any]:
    parallel(ep=4)
    out: dict[str, Any] = {"train": {name: train(name, 50) for name in DISPATCHERS}}
    out["train"]["again"] = train("deepep", 10)
    out["train_bf16"] = {name: train(name, 50, params_dtype=torch.bfloat16) for name in DISPATCHERS}
    parallel(ep=2)
    out["expert_dp"] = {name: train(name, 10) for name in DISPATCHERS}
    parallel(ep=2, tp=2, expert_tp=2)
    out["dense_tp2_ep2"] = dense_job()
    return out


def start(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)


def finish() -> None:
    install().close()
    dist.barrier()
    dist.destroy_process_group()


def main(path: str) -> None:
    from megatron.core import __version__

    session = install(backend=BACKEND, timeout_s=60.0)
    results = {
        "version": __version__,
        "idempotent": install() is session and install(backend=BACKEND) is session,
        "world2": world(2, world2, start, finish),
        "world4": world(4, world4, start, finish),
    }
    with open(path, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
