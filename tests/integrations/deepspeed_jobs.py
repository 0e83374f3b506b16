"""Jobs that the tests run in a process of their own, with one DeepSpeed version on PYTHONPATH.

    python deepspeed_jobs.py OUT.json [whole]

DeepSpeed is imported once; each world is forked from there, so a version costs one import. A job runs on every rank
and returns JSON-able measurements; what is right is decided by the tests that read them. ``whole`` runs the whole
matrix, without it a part of it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

torch.set_num_threads(1)
from moe_ep_plugin.integrations import deepspeed as integration  # noqa: E402
from moe_ep_plugin.integrations.deepspeed import convert, enable_cpu, install, statistics, uninstall  # noqa: E402

enable_cpu()
import deepspeed  # noqa: E402
from deepspeed.moe.layer import MoE  # noqa: E402
from deepspeed.moe.sharded_moe import MOELayer, TopKGate  # noqa: E402
from deepspeed.utils import groups  # noqa: E402

from moe_ep_plugin import EpBuffer, EpConfig, Fp8GroupedExperts, Fp8Rows, TokenDispatcher  # noqa: E402
from moe_ep_plugin.errors import ConfigError, EpError  # noqa: E402
from moe_ep_plugin.integrations.deepspeed.upstream import AUTOEP_BACKENDS_SINCE, numbers_of  # noqa: E402
from tests.integrations.worlds import world  # noqa: E402

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
VERSION = numbers_of(deepspeed.__version__)
BACKEND = os.environ.get("MOE_EP_TEST_BACKEND", "auto")
WHOLE = "whole" in sys.argv
EXPERTS, HIDDEN, TOKENS, STEPS, LR = 4, 16, 24, 8, 0.25
# Sharded optimizers of 0.18.9 gather into views, which torch 2.13 refuses; 0.19 doesn't.
STAGES = (0,) if VERSION < (0, 19) else (0, 1, 2)
SIDES = ("stock", "ours")


class Expert(nn.Module):
    """A small MLP; ``with_bias`` returns a pair, as Megatron's do."""

    def __init__(self, with_bias: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.with_bias = nn.Linear(HIDDEN, 32), nn.Linear(32, HIDDEN), with_bias

    def forward(self, x: torch.Tensor) -> Any:
        out = self.down(torch.nn.functional.gelu(self.up(x)))
        return (out, None) if self.with_bias else out


class Net(nn.Module):
    """Two MoE layers behind a dense one."""

    def __init__(self, ep: int, expert: nn.Module | None = None, **settings: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        settings = {"drop_tokens": False, "min_capacity": 0, **settings}
        self.layers = nn.ModuleList(
            MoE(HIDDEN, expert or Expert(), num_experts=EXPERTS, ep_size=ep, **settings) for _ in range(2)
        )

    def forward(self, x: torch.Tensor, used_token: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        x, losses = self.dense(x), []
        for layer in self.layers:
            y, l_aux, _ = layer(x, used_token)
            x = x + y
            losses.append(l_aux)
        return x, torch.stack(losses).sum()


def make_net(side: str, ep: int, **settings: Any) -> Net:
    """The same weights for every dispatcher and ``ep``; experts differ from each other."""
    uninstall()
    torch.manual_seed(1)
    net = Net(ep, **settings)
    # Pairs of ranks share an expert where experts are tensor-parallel.
    pairs = 2 if settings.get("enable_expert_tensor_parallelism") else 1
    first = dist.get_rank() // pairs % ep * (EXPERTS // ep)
    for number, layer in enumerate(net.layers):
        for local, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            generator = torch.Generator().manual_seed(100 * number + first + local)
            for parameter in expert.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    if side == "ours":
        convert(net, backend=BACKEND, timeout_s=60.0)
    return net


def engine_config(stage: int, optimizer: str = "SGD", **more: Any) -> dict[str, Any]:
    parameters = {"lr": LR} if optimizer == "SGD" else {"lr": 1e-2, "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        # Upstream's clipping, on by default, measures experts' norms differently at each ep_size with ZeRO 0.
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": optimizer, "params": parameters},
        **more,
    }


def make_engine(net: nn.Module, stage: int, **more: Any) -> Any:
    return deepspeed.initialize(model=net, config=engine_config(stage, **more))[0]


def rank_input(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5 + dist.get_rank())).to(dtype)


def step(engine: Any, x: torch.Tensor, *more: torch.Tensor) -> float:
    y, l_aux = engine(x, *more)
    loss = (y.float() - 1).pow(2).mean() + 0.01 * l_aux
    engine.backward(loss)
    engine.step()
    return float(loss)


def train(engine: Any, steps: int = STEPS, seed: int = 11) -> list[float]:
    torch.manual_seed(seed + dist.get_rank())
    x = rank_input(next(engine.module.parameters()).dtype)
    return [step(engine, x) for _ in range(steps)]


def global_names(net: Net, ep: int) -> dict[str, torch.Tensor]:
    """Parameters with experts numbered over all ranks."""
    first = dist.get_rank() % ep * (EXPERTS // ep)
    found = {}
    for name, parameter in net.named_parameters():
        before, mark, after = name.partition(".deepspeed_experts.")
        if mark:
            local, rest = after.split(".", 1)
            name = f"{before}{mark}{first + int(local)}.{rest}"
        found[name] = parameter.detach().float()
    return found


def gradients(engine: Any, ep: int) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Losses and gradients of every step: plain SGD moves a parameter by its reduced gradient, at all ZeRO stages."""
    torch.manual_seed(11 + dist.get_rank())
    losses, found = [], []
    before = {name: value.clone() for name, value in global_names(engine.module, ep).items()}
    for _ in range(STEPS):
        losses.append(step(engine, rank_input()))
        after = {name: value.clone() for name, value in global_names(engine.module, ep).items()}
        found.append({name: (before[name] - after[name]) / LR for name in after})
        before = after
    return losses, found


def worst(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], resolution: float = 0.0) -> float:
    """Largest difference, relative to the largest element of each tensor; the names must be the same.

    Args:
        one, other: Tensors by name.
        resolution: Differences up to this can't be told from rounding.
    """
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    beyond = {name: ((one[name] - other[name]).abs() - resolution).clamp_min(0).max() for name in one}
    return largest(float(beyond[name] / one[name].abs().max().clamp_min(1e-6)) for name in one)


def largest(values: Iterable[float]) -> float:
    """The largest, or NaN if there is one, which ``max`` would pass over."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


# A gradient is measured as the difference of two parameters below 1, each rounded to 2^-24, over the learning rate, and
# two such are compared.
RESOLUTION = 4 * 2**-24 / LR


def digest(net: Net, ep: int) -> dict[str, str]:
    return {
        name: hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16]
        for name, value in global_names(net, ep).items()
        if ".deepspeed_experts." in name
    }


def matrix_job(eps: tuple[int, ...], ks: tuple[int, ...] = (1, 2, 3)) -> dict[str, Any]:
    """Ours against stock, without dropping."""
    found: dict[str, Any] = {}
    reference: dict[int, Any] = {}
    for k in ks:
        for ep in eps:
            for stage in STAGES if WHOLE or k == 2 else STAGES[:1]:
                sides = {}
                for side in SIDES:
                    engine = make_engine(make_net(side, ep, k=k), stage)
                    sides[side] = gradients(engine, ep)
                    if side == "ours":
                        operations, replicas = statistics()["operations"], digest(engine.module, ep)
                (stock_losses, stock), (losses, ours) = sides["stock"], sides["ours"]
                reference.setdefault(k, ours)
                same = [{n: v for n, v in one.items() if n in two} for one, two in zip(reference[k], ours, strict=True)]
                found[f"k{k} ep{ep} zero{stage}"] = {
                    "losses": losses,
                    "loss": largest(abs(a - b) for a, b in zip(stock_losses, losses, strict=True)),
                    "gradients": largest(worst(a, b, RESOLUTION) for a, b in zip(stock, ours, strict=True)),
                    "against_first_ep": largest(worst(a, b, RESOLUTION) for a, b in zip(same, ours, strict=True)),
                    "largest": max(float(v.abs().max()) for v in ours[0].values()),
                    "parameters": len(ours[0]),
                    "operations": operations,
                    "replicas": replicas,
                }
    return found


def both(run: Any) -> dict[str, Any]:
    """``run(side)``, a dict of lists, for both sides."""
    return {side: run(side) for side in SIDES}


def variants_job(ep: int) -> dict[str, Any]:
    """Settings of the layer, trained by both; losses of every step."""
    settings: dict[str, dict[str, Any]] = {
        "residual": {"k": 1, "use_residual": True},
        "jitter": {"k": 1, "noisy_gate_policy": "Jitter"},
        "rsample": {"k": 1, "noisy_gate_policy": "RSample"},
        "no_rts": {"k": 1, "use_rts": False, "drop_tokens": True},
        "no_sampling": {"k": 2, "top2_2nd_expert_sampling": False},
        "bias": {"k": 2, "expert": Expert(with_bias=True)},
        **{f"drop_k{k}": {"k": k, "drop_tokens": True, "capacity_factor": 0.7} for k in (1, 2, 3)},
    }
    return {
        name: both(lambda side, chosen=chosen: train(make_engine(make_net(side, ep, **chosen), 0)))
        for name, chosen in settings.items()
    }


def used_token_job(ep: int) -> dict[str, Any]:
    def run(side: str) -> list[float]:
        engine = make_engine(make_net(side, ep, k=1), 0)
        used = (torch.arange(TOKENS) % 3 != 0).long()
        torch.manual_seed(3 + dist.get_rank())
        losses = [step(engine, rank_input(), used) for _ in range(4)]
        return [*losses, *engine.module.layers[0].deepspeed_moe.exp_counts.tolist()]

    return both(run)


def bf16_job(ep: int) -> dict[str, Any]:
    stage = STAGES[-1]
    return both(lambda side: train(make_engine(make_net(side, ep, k=2), stage, bf16={"enabled": True})))


def layer_job(ep: int, mpu: Any = None, **settings: Any) -> dict[str, Any]:
    """Output, losses and gradients of one forward and backward, as differences from stock; and eval mode."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    before, gather = groups.mpu, deepspeed.comm.all_gather_into_tensor
    groups.mpu = mpu

    def flat(out: torch.Tensor, x: torch.Tensor, group: Any) -> Any:
        return gather(out, x.reshape(-1), group=group)

    try:
        for side in SIDES:
            # Upstream gathers shaped tensors into flat ones, which gloo refuses.
            deepspeed.comm.all_gather_into_tensor = flat if side == "stock" else gather
            net = make_net(side, ep, **settings)
            for layer in net.layers:
                layer.set_deepspeed_parallelism()
            # Tensor-parallel ranks hold the same tokens and make the same choices.
            number = dist.get_rank() // 2 if mpu is not None else dist.get_rank()
            # 23 tokens: not a multiple of the ranks that share them.
            x = torch.randn(1, TOKENS - 1, HIDDEN, generator=torch.Generator().manual_seed(number)).requires_grad_()
            torch.manual_seed(number)
            y, l_aux = net(x)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().add(l_aux).backward()
            found[side] = {"y": y.detach(), "l_aux": l_aux.detach(), "x.grad": x.grad} | {
                name: parameter.grad for name, parameter in net.named_parameters()
            }
            found[side]["counts"] = net.layers[0].deepspeed_moe.exp_counts.float()
            net.eval()
            with torch.no_grad():
                found[side]["eval"] = net(x)[0]
            missing = [name for name, value in found[side].items() if value is None]
            assert not missing, missing
    finally:
        groups.mpu, deepspeed.comm.all_gather_into_tensor = before, gather
    return {name: worst({name: found["stock"][name]}, {name: found["ours"][name]}) for name in found["stock"]}


def routes_job() -> dict[str, Any]:
    """The routes that each gate keeps, as a map of tokens and experts, and their weights."""
    found: dict[str, Any] = {}
    for k in (1, 2, 3):
        for factor, least in ((0.3, 0), (1.0, 4), (1.25, 0), (None, 0)):
            uninstall()
            torch.manual_seed(k)
            net = MoE(HIDDEN, Expert(), num_experts=8, k=k, capacity_factor=factor or 1.0, min_capacity=least)
            gate = net.deepspeed_moe.gate
            gate.drop_tokens = factor is not None
            x = torch.randn(97, HIDDEN)
            torch.manual_seed(0)
            l_aux, weights, mask, counts = gate(x)
            drawn = torch.rand(1)
            convert(net)
            torch.manual_seed(0)
            routes = gate(x)
            kept = torch.zeros(97, 8).scatter_add_(1, routes.experts.clamp_min(0), (routes.experts >= 0).float())
            ours = torch.zeros(97, 8).scatter_add_(1, routes.experts.clamp_min(0), routes.weights)
            found[f"k{k} factor={factor} least={least}"] = {
                "same": torch.equal(mask.any(2).float(), kept),
                "dropped": int(97 * k - kept.sum()),
                "weights": float((weights.sum(2) - ours).abs().max()),
                "l_aux": float((l_aux - routes.l_aux).abs()),
                "counts": torch.equal(counts, routes.exp_counts),
                "generator": torch.equal(drawn, torch.rand(1)),
            }
    return found


class TensorParallel:
    """An mpu of pairs of neighbours."""

    def __init__(self) -> None:
        world = dist.get_world_size()
        pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
        self.group = pairs[dist.get_rank() // 2]
        rows = [dist.new_group(list(range(first, world, 2))) for first in range(2)]
        self.rows = rows[dist.get_rank() % 2]

    def get_tensor_model_parallel_world_size(self) -> int:
        return 2

    get_model_parallel_world_size = get_tensor_model_parallel_world_size

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank() % 2

    get_model_parallel_rank = get_tensor_model_parallel_rank

    def get_tensor_model_parallel_group(self) -> Any:
        return self.group

    get_model_parallel_group = get_tensor_model_parallel_group

    def get_data_parallel_group(self) -> Any:
        return self.rows

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size() // 2

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank() // 2


def steer(net: Net, expert: int) -> None:
    """Send all tokens of this rank to one expert: the others' logits are 0 and this one's is a constant above."""
    net.dense.weight.data.zero_()
    net.dense.bias.data.fill_(4.0)
    for layer in net.layers:
        layer.deepspeed_moe.gate.wg.weight.data.zero_()
        layer.deepspeed_moe.gate.wg.weight.data[expert, 0] = 1.0


def empty_experts_job(ep: int, stage: int) -> dict[str, Any]:
    """Replicas of an expert disagree about having tokens, and most experts have none."""

    def run(side: str) -> list[float]:
        engine = make_engine(make_net(side, ep, k=1), stage, gradient_clipping=1.0)
        found: list[float] = []
        for _ in range(3):
            # Each time, because initialize and sharded optimizers give all ranks the same gate.
            steer(engine.module, dist.get_rank() // ep)
            found.append(step(engine, rank_input()))
            found += engine.module.layers[0].deepspeed_moe.exp_counts.tolist()
        return found

    return both(run)


def checkpoint_job(ep: int, stage: int) -> dict[str, Any]:
    """Saved by one side after half of the steps, gone on with by either."""
    half = STEPS // 2
    # 0.18.9 does not find the states of an optimizer that it saved beside experts at stage 0; SGD has none.
    optimizer = "SGD" if VERSION < (0, 19) else "Adam"
    found: dict[str, Any] = {}
    folder = Path(shared_folder()) / f"zero{stage}"
    for saver in SIDES:
        engine = make_engine(make_net(saver, ep, k=2), stage, optimizer=optimizer)
        train(engine, half)
        engine.save_checkpoint(str(folder / saver), tag="half")
        dist.barrier()
        found[saver] = train(engine, half, seed=77)
        for loader in SIDES:
            other = make_engine(make_net(loader, ep, k=2), stage, optimizer=optimizer)
            other.load_checkpoint(str(folder / saver), tag="half", load_optimizer_states=optimizer == "Adam")
            found[f"{saver} to {loader}"] = train(other, half, seed=77)
    names = [sorted(str(p.relative_to(folder / side)) for p in (folder / side).rglob("*")) for side in SIDES]
    found["same_files"] = names[0] == names[1]
    return found


def shared_folder() -> str:
    """A folder that rank 0 makes; it lies under the world's own."""
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(names)
    return names[0]


def timers_job(ep: int) -> dict[str, Any]:
    engine = make_engine(make_net("ours", ep, k=2), 0, wall_clock_breakdown=True)
    train(engine, 2)
    inner = engine.module.layers[0].deepspeed_moe
    return {
        "moe": inner.time_moe,
        "first": inner.time_falltoall,
        "second": inner.time_salltoall,
        "gate": inner.gate.gate_time,
        "known": [inner in engine.moe_layers, inner.gate in engine.gate_modules],
    }


def identity_job(ep: int) -> dict[str, Any]:
    """What converting leaves as it is."""
    net = make_net("stock", ep, k=2)
    parameters = dict(net.named_parameters())
    modules = dict(net.named_modules())
    marks = {n: (getattr(p, "allreduce", None), getattr(p, "group_name", None)) for n, p in parameters.items()}
    seen: list[str] = []
    net.layers[0].deepspeed_moe.gate.register_forward_hook(lambda *_: seen.append("gate"))
    net.layers[0].deepspeed_moe.experts.register_forward_hook(lambda *_: seen.append("experts"))
    found = convert(net, backend=BACKEND)
    again = convert(net)
    after = dict(net.named_parameters())
    engine = make_engine(net, 0)
    train(engine, 1)
    built_later = Net(ep)
    inner = net.layers[0].deepspeed_moe
    return {
        "still_functions": all(callable(getattr(integration, name)) for name in integration.__all__),
        "same_objects": all(parameters[n] is after[n] for n in parameters) and list(parameters) == list(after),
        "same_modules": all(modules[n] is m for n, m in net.named_modules()),
        "same_marks": marks
        == {n: (getattr(p, "allreduce", None), getattr(p, "group_name", None)) for n, p in after.items()},
        "isinstance": isinstance(inner, MOELayer) and isinstance(inner.gate, TopKGate),
        "hooks": seen,
        "built_later": type(built_later.layers[0].deepspeed_moe).__name__,
        "groups": [[g.get("moe", False), g["name"], len(g["params"])] for g in found],
        "idempotent": [len(g["params"]) for g in again] == [len(g["params"]) for g in found],
        "checkpoint_key": ".deepspeed_moe.experts.deepspeed_experts." in "".join(net.state_dict()),
    }


def client_optimizer_job(ep: int) -> dict[str, Any]:
    """A torch optimizer made without groups for experts, which DeepSpeed refuses by itself with ZeRO."""
    net = make_net("ours", ep, k=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    config = engine_config(STAGES[-1])
    del config["optimizer"]
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
    losses = train(engine, 3)
    return {"losses": losses, "expected": train(make_engine(make_net("ours", ep, k=2), STAGES[-1]), 3)}


def scheduler_job(ep: int) -> dict[str, Any]:
    """A torch scheduler made before the engine: its optimizer's groups stay, or it is refused."""

    def losses(side: str, early: bool = False, stage: int = 0) -> Any:
        net = make_net(side, ep, k=2)
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        if early:
            convert(net, optimizer=optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        config = engine_config(stage)
        del config["optimizer"]
        engine = deepspeed.initialize(model=net, optimizer=optimizer, lr_scheduler=scheduler, config=config)[0]
        return train(engine, 3)

    found = both(losses)
    found["early"] = losses("ours", early=True)
    if len(STAGES) > 1:
        found["zero1"] = losses("ours", early=True, stage=1)
        found["too_late"] = error_of(lambda: losses("ours", stage=1))
    return found


def autocast_job(ep: int) -> dict[str, Any]:
    """Losses of one layer under autocast, where gate values are narrower than the tokens.

    Of one, because a second one turns rounding into other choices of experts.
    """

    def run(side: str, k: int, drop: bool) -> list[float]:
        net = make_net(side, ep, k=k, drop_tokens=drop)
        layer = net.layers[0]
        layer.set_deepspeed_parallelism()
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            y, l_aux, _ = layer(rank_input())
        (y.float().pow(2).mean() + l_aux).backward()
        gate = layer.deepspeed_moe.gate.wg.weight
        return [float(y.float().pow(2).mean()), float(l_aux), float(gate.grad.abs().sum())]

    return {
        f"k{k} drop={drop}": both(lambda side, k=k, drop=drop: run(side, k, drop))
        for k in (1, 2, 3)
        for drop in (False, True)
    }


def config_section_job(ep: int) -> dict[str, Any]:
    """The section of the DeepSpeed config: converts, gives back, configures, and is checked."""
    found: dict[str, Any] = {}
    net = make_net("stock", ep, k=2)
    install(backend=BACKEND)
    section = {"backend": "collective", "timeout_s": 50.0}
    engine = make_engine(net, 0, moe_ep_plugin=section)
    train(engine, 1)
    found["converted"] = type(net.layers[0].deepspeed_moe).__name__
    found["options"] = [install().options.timeout_s, statistics()["backend"]]
    net = make_net("ours", ep, k=2)
    make_engine(net, 0, moe_ep_plugin={"enabled": False})
    found["given_back"] = [type(net.layers[0].deepspeed_moe).__name__, type(net.layers[0].deepspeed_moe.gate).__name__]
    install().close()
    net = make_net("ours", ep, k=2)
    found["errors"] = [
        error_of(lambda: make_engine(net, 0, moe_ep_plugin={"bakend": "host"})),
        error_of(lambda: make_engine(net, 0, moe_ep_plugin=True)),
    ]
    return found


def error_of(call: Any) -> list[str]:
    """Type and text of our error."""
    try:
        call()
    except EpError as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


class OwnGate(TopKGate):
    """A gate of somebody else."""


def misuse_job(ep: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    lonely = make_net("ours", ep)
    found["no_group"] = error_of(lambda: lonely(rank_input()))
    found["zero3"] = error_of(lambda: make_engine(make_net("ours", ep), 3))
    uninstall()
    install(backend=BACKEND)
    three = MoE(HIDDEN, Expert(), num_experts=3, ep_size=3)
    found["ranks"] = error_of(lambda: make_engine(three, 0))
    own = make_net("stock", ep)
    own.layers[1].deepspeed_moe.gate.__class__ = OwnGate
    found["gate"] = error_of(lambda: convert(own))
    found["unchanged"] = ["none", type(own.layers[0].deepspeed_moe).__name__]
    net = make_net("ours", ep, k=2)
    engine = make_engine(net, 0)
    train(engine, 1)
    found["too_many"] = error_of(lambda: engine(rank_input().repeat(1, 4, 1)))
    found["open"] = error_of(lambda: install(timeout_s=7.0))
    net.layers[0].deepspeed_moe.gate = TopKGate(HIDDEN, EXPERTS, k=2)
    found["gate_replaced"] = error_of(lambda: engine(rank_input()))
    uninstall()
    found["uninstalled"] = error_of(lambda: engine(rank_input()))
    real = deepspeed.__version__
    for name, deepspeed.__version__ in (("version", "0.17.6"), ("older_patch", "0.18.8")):
        found[name] = error_of(install)
    deepspeed.__version__ = real
    found["half_installed"] = half_installed()
    return found


def half_installed() -> list[str]:
    """What is left of an installation whose last part fails."""
    installing = sys.modules["moe_ep_plugin.integrations.deepspeed.install"]
    prepared, build = installing._prepare_engines, MoE.__init__

    def fails(installation: Any) -> None:
        prepared(installation)
        raise ConfigError("the rest is missing")

    installing._prepare_engines = fails
    error = error_of(install)
    installing._prepare_engines = prepared
    return [error[0], f"left: {[] if MoE.__init__ is build and integration.current_session() is None else build}"]


# AutoEP


class HfConfig:
    model_type, num_local_experts, num_experts_per_tok, hidden_size, intermediate_size = "mixtral", 4, 2, 64, 128


class HfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 256, 64) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(4, 64, 128) * 0.1)


class HfBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.top_k = nn.Linear(64, 4, bias=False), HfExperts(), 2


class HfNet(nn.Module):
    """The parts of a Mixtral model that AutoEP looks at."""

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.config, self.checkpointing = HfConfig(), checkpointing
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for _ in range(2):
            layer = nn.Module()
            layer.dense, layer.mlp = nn.Linear(64, 64), HfBlock()
            self.model.layers.append(layer)
        self.lm_head = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.model.layers:
            x = x + layer.dense(x)
            if self.checkpointing:
                x = x + torch.utils.checkpoint.checkpoint(layer.mlp, x, use_reentrant=False)
            else:
                x = x + layer.mlp(x)
        return self.lm_head(x)


def autoep_engine(
    backend: str, stage: int, dtype: str, ep: int, checkpointing: bool = False, moe_ep_plugin: Any = None, **more: Any
) -> Any:
    torch.manual_seed(3)
    config = engine_config(stage, "Adam")
    config["expert_parallel"] = {
        "enabled": True,
        "autoep_size": ep,
        "preset_model": "mixtral",
        "use_grouped_mm": False,
        "comm_backend": backend,
        "comm_max_tokens_per_rank": 0 if backend == "comm" else 64,
        **more,
    }
    if moe_ep_plugin is not None:
        config["moe_ep_plugin"] = moe_ep_plugin
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    return deepspeed.initialize(model=HfNet(checkpointing), config=config)[0]


def autoep_losses(
    backend: str, stage: int, dtype: str, steps: int, ep: int, checkpointing: bool = False, moe_ep_plugin: Any = None
) -> list[float]:
    engine = autoep_engine(backend, stage, dtype, ep, checkpointing, moe_ep_plugin)
    generator = torch.Generator().manual_seed(9 + dist.get_rank())
    x = torch.randn(1, 32, 64, generator=generator).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    losses = []
    for _ in range(steps):
        loss = (engine(x).float() - 1).pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    engine.destroy()
    return losses


def autoep_reopening(ep: int) -> dict[str, Any]:
    """The output of one engine before and after its memory was given back."""
    # All of upstream's arguments pass the function that stands in for it.
    deepspeed.comm.barrier(prof=False, log_name="before")
    engine = autoep_engine("deepep", 0, "bf16", ep)
    x = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(dist.get_rank())).bfloat16()
    outputs = [engine(x)]
    install().close()
    outputs.append(engine(x))
    uninstall()
    found = {"uninstalled": error_of(lambda: engine(x))}
    install(backend=BACKEND, timeout_s=60.0)
    outputs.append(engine(x))
    same = [torch.equal(outputs[0], output) for output in outputs]
    found |= {"same": same, "buffers": statistics()["buffers"]}
    engine.destroy()
    return found | {"left_open": statistics()["buffers"]}


def autoep_job(ep: int) -> dict[str, Any]:
    uninstall()
    install(backend=BACKEND, timeout_s=60.0)
    cases = [(0, "bf16"), (2, "bf16"), (3, "bf16"), (1, "bf16"), (0, "fp32")]
    found: dict[str, Any] = {}
    for stage, dtype in cases:
        comm = autoep_losses("comm", stage, dtype, 8, ep)
        open_before = statistics()["buffers"]
        found[f"zero{stage} {dtype}"] = {"comm": comm, "ours": autoep_losses("deepep", stage, dtype, 8, ep)}
        found[f"zero{stage} {dtype}"]["left_open"] = statistics()["buffers"] - open_before
    found["checkpointing"] = {
        "comm": found["zero0 fp32"]["ours"],
        "ours": autoep_losses("deepep", 0, "fp32", 8, ep, checkpointing=True),
    }
    found["reopened"] = autoep_reopening(ep)
    found["no_module"] = "deep_ep" not in sys.modules
    uninstall()
    install(autoep=False)
    try:
        autoep_losses("deepep", 0, "bf16", 1, ep)
        found["left_to_deep_ep"] = ""
    except ImportError as error:
        found["left_to_deep_ep"] = str(error)
    return found


# AutoEP with FP8 experts


def fp8_install(fp8_experts: bool = True, **options: Any) -> None:
    uninstall()
    install(backend=BACKEND, timeout_s=60.0, fp8_experts=fp8_experts, **options)


def autoep_layers(engine: Any) -> list[Any]:
    return [layer for layer in engine.module.modules() if type(layer).__name__ == "AutoEPMoELayer"]


def fp8_gradients(fp8_experts: bool, ep: int) -> dict[str, torch.Tensor]:
    """Gradients of all parameters and of the input, from one micro-batch."""
    fp8_install(fp8_experts)
    engine = autoep_engine("deepep", 0, "fp32", ep)
    x = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(9 + dist.get_rank())).requires_grad_()
    engine.backward((engine(x) - 1).pow(2).mean())
    assert x.grad is not None
    found = {"input": x.grad.clone()}
    for name, parameter in engine.module.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    engine.destroy()
    return found


def fp8_by_hand(dtype: str, ep: int) -> dict[str, Any]:
    """The output of a layer, and the same by our own classes alone; then what the layer and its state look like."""
    fp8_install()
    engine = autoep_engine("deepep", 0, dtype, ep)
    layer = autoep_layers(engine)[0]
    rank_dtype = layer.experts.w1.dtype
    # A rank with nothing to send, and uneven experts.
    tokens = 37 * (1 - dist.get_rank())
    x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(6)).to(rank_dtype)
    weights, config = (
        layer.experts,
        EpConfig(
            num_experts=4, num_topk=2, hidden=64, max_tokens_per_rank=64, dtype=rank_dtype, power_of_two_scales=True
        ),
    )
    by_hand = Fp8GroupedExperts(4 // ep, 64, 128, dtype=rank_dtype)
    with torch.no_grad():
        for index in range(4 // ep):
            by_hand.linear_fc1.weight(index).copy_(torch.cat([weights.w1[index], weights.w3[index]]))
            by_hand.linear_fc2.weight(index).copy_(weights.w2[index])
        routed = layer.router(x[0], layer.expert_bias)
        with EpBuffer(layer.ep_group, config) as buffer:
            dispatcher = TokenDispatcher(buffer)
            out = dispatcher.dispatch_fp8(x[0], routed[1].long(), routed[0].float())
            rows = by_hand(Fp8Rows.from_dispatch(out), out.tokens_per_expert)
            rows = (rows.float() * out.topk_weights[:, None]).to(rank_dtype)
            expected = dispatcher.combine(rows, out.handle)
        found: dict[str, Any] = {"same": torch.equal(layer(x)[0], expected), "rows": out.tokens_per_expert.tolist()}
        found["chosen"] = torch.bincount(routed[1].flatten(), minlength=4).tolist()
    found["dtype"] = str(layer(x).dtype)
    found["state"] = sorted(layer.experts.state_dict())
    engine.destroy()
    return found


def padded_losses(ep: int) -> list[float]:
    """Losses in fp32 with rows of experts padded as on GPUs."""
    fp8_install()
    session = install()
    opened, dispatch = session.open_buffer, EpBuffer.dispatch
    counts: list[int] = []

    def recorded(buffer: EpBuffer, *args: Any, **options: Any) -> Any:
        out = dispatch(buffer, *args, **options)
        counts.extend(out.tokens_per_expert.tolist())
        return out

    session.open_buffer = lambda group, **shape: opened(group, **shape | {"expert_alignment": 16})
    EpBuffer.dispatch = recorded  # type: ignore[assignment,method-assign]
    try:
        losses = autoep_losses("deepep", 0, "fp32", 8, ep)
    finally:
        EpBuffer.dispatch = dispatch  # type: ignore[method-assign]
    assert counts and not any(count % 16 for count in counts)
    return losses


def fp8_mistakes(ep: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    fp8_install()
    found["zero3"] = error_of(lambda: autoep_engine("deepep", 3, "bf16", ep))
    found["comm"] = error_of(lambda: autoep_engine("comm", 0, "bf16", ep))
    found["one_rank"] = error_of(lambda: autoep_engine("deepep", 0, "bf16", 1))
    found["pre"] = error_of(lambda: autoep_engine("deepep", 0, "bf16", ep, score_apply="pre"))
    # As a preset of another family would.
    found["activation"] = error_of(lambda: autoep_engine("deepep", 0, "bf16", ep, expert_activation="geglu_tanh"))
    native = make_net("ours", ep)
    fp8_install()
    found["native"] = error_of(lambda: make_engine(native, 0))
    fp8_install(False)
    engine = autoep_engine("deepep", 0, "bf16", ep)
    # Set after the layers were built.
    install(fp8_experts=True)
    layer = autoep_layers(engine)[0]
    layer.experts.bias = nn.Parameter(torch.zeros(1))
    found["bias"] = error_of(lambda: layer(torch.zeros(1, 4, 64).bfloat16()))
    del layer.experts.bias
    layer(torch.zeros(1, 4, 64).bfloat16())
    found["open"] = error_of(lambda: install(fp8_experts=False))
    engine.destroy()
    uninstall()
    found["autoep"] = error_of(lambda: install(autoep=False, fp8_experts=True))
    return found


def fp8_experts_job() -> dict[str, Any]:
    ep = 2
    patched = [importlib.import_module("deepspeed.module_inject.auto_ep_layer"), "deepep_dispatch"]
    before = [getattr(*patched), patched[0].GroupedExperts.forward, patched[0].AutoEPMoELayer.forward]
    found: dict[str, Any] = {"losses": {}}
    for stage, dtype in ((0, "bf16"), (1, "bf16"), (2, "bf16"), (0, "fp32")):
        case = found["losses"][f"zero{stage} {dtype}"] = {}
        for name, fp8_experts in (("bf16", False), ("fp8", True)):
            fp8_install(fp8_experts)
            case[name] = autoep_losses("deepep", stage, dtype, 8, ep)
            case["left_open"] = statistics()["buffers"]
    fp8_install()
    found["checkpointing"] = autoep_losses("deepep", 0, "fp32", 8, ep, checkpointing=True)
    # By the section of the config alone.
    fp8_install(False)
    found["section"] = autoep_losses("deepep", 0, "fp32", 8, ep, moe_ep_plugin={"fp8_experts": True})
    fp8_install(False, grad_wire="fp8")
    found["grad_wire"] = autoep_losses("deepep", 0, "fp32", 8, ep)
    found["padded"] = padded_losses(ep)
    wide, fp8 = fp8_gradients(False, ep), fp8_gradients(True, ep)
    found["gradients"] = {name: float((fp8[name] - wide[name]).norm() / wide[name].norm()) for name in wide}
    found["by_hand"] = {dtype: fp8_by_hand(dtype, ep) for dtype in ("bf16", "fp32")}
    found["mistakes"] = fp8_mistakes(ep)
    uninstall()
    after = [getattr(*patched), patched[0].GroupedExperts.forward, patched[0].AutoEPMoELayer.forward]
    found["undone"] = before == after
    return found


def without_fp8_job() -> dict[str, Any]:
    """Losses where nothing of FP8 experts is installed, which the option must not change where it is off."""
    installing = importlib.import_module("moe_ep_plugin.integrations.deepspeed.fp8_experts")
    serve, installing.serve_fp8_experts = installing.serve_fp8_experts, lambda installation: None
    fp8_install(False)
    losses = {
        name: autoep_losses("deepep", *case, 8, 2)
        for name, case in (("zero0 bf16", (0, "bf16")), ("zero0 fp32", (0, "fp32")))
    }
    uninstall()
    installing.serve_fp8_experts = serve
    return losses


def fp8_experts() -> dict[str, Any]:
    if VERSION < AUTOEP_BACKENDS_SINCE:
        install(backend=BACKEND, fp8_experts=True)
        return {"too_old": error_of(lambda: make_engine(nn.Linear(HIDDEN, HIDDEN), 0))}
    return fp8_experts_job() | {"without": without_fp8_job()}


def registry_job() -> dict[str, Any]:
    """With our patch in DeepSpeed: our own name for a backend."""
    install(backend=BACKEND, timeout_s=60.0, autoep=False)
    found: dict[str, Any] = {
        "comm": autoep_losses("comm", 0, "fp32", 4, 2),
        "moe_ep_plugin": autoep_losses("moe_ep_plugin", 0, "fp32", 4, 2),
    }
    session = install()
    opened, buffers = session.open_buffer, []
    session.open_buffer = lambda *args, **shape: buffers.append(opened(*args, **shape)) or buffers[-1]
    autoep_losses("moe_ep_plugin", 2, "bf16", 1, 2)
    found["dispatches"] = sum(buffer.stats.operations for buffer in buffers)
    table = importlib.import_module("deepspeed.module_inject.auto_ep_comm").COMM_MODULES
    table["of somebody else"] = None
    uninstall()
    found["others_stay"] = table.pop("of somebody else", "lost") is None
    try:
        autoep_losses("moe_ep_plugin", 0, "fp32", 1, 2)
        found["uninstalled"] = ""
    except ValueError as error:
        found["uninstalled"] = str(error)
    return found


def world2() -> dict[str, Any]:
    out: dict[str, Any] = {"matrix": matrix_job((1, 2))}
    out["variants"] = variants_job(2)
    out["used_token"] = used_token_job(2)
    out["bf16"] = bf16_job(2)
    out["layer"] = {
        f"k{k} drop={drop}": layer_job(2, k=k, drop_tokens=drop) for k in (1, 2, 3) for drop in (False, True)
    }
    out["routes"] = routes_job()
    out["timers"] = timers_job(2)
    out["identity"] = identity_job(2)
    out["client_optimizer"] = client_optimizer_job(2)
    out["scheduler"] = scheduler_job(2)
    out["autocast"] = autocast_job(2)
    out["config_section"] = config_section_job(2)
    out["checkpoints"] = {f"zero{stage}": checkpoint_job(2, stage) for stage in STAGES[::2]}
    out["misuse"] = misuse_job(2)
    out["autoep"] = autoep_job(2) if VERSION >= AUTOEP_BACKENDS_SINCE else None
    return out


def world4() -> dict[str, Any]:
    out: dict[str, Any] = {"matrix": matrix_job((1, 2, 4) if WHOLE else (2,))}
    out["empty_experts"] = {f"zero{stage}": empty_experts_job(2, stage) for stage in STAGES}
    out["checkpoints"] = {"expert_dp": checkpoint_job(2, STAGES[-1])}
    out["tensor_parallel"] = {f"k{k}": layer_job(2, TensorParallel(), k=k) for k in (1, 2)}
    return out


def expert_tensor_parallel() -> dict[str, Any]:
    """A world of its own, because DeepSpeed keeps one set of groups for an ep_size.

    Capacities are even: without dropping, upstream fails for odd ones.
    """
    mpu = TensorParallel()
    return {f"k{k}": layer_job(2, mpu, k=k, drop_tokens=True, enable_expert_tensor_parallelism=True) for k in (1, 2)}


def start(rank: int, size: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    deepspeed.init_distributed(
        dist_backend="gloo",
        auto_mpi_discovery=False,
        verbose=False,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
    )


def finish() -> None:
    uninstall()
    dist.barrier()
    dist.destroy_process_group()


def main(path: str) -> None:
    if "registry" in sys.argv:
        results: dict[str, Any] = {"registry": world(2, registry_job, start, finish)}
    else:
        results = {
            "version": deepspeed.__version__,
            "world2": world(2, world2, start, finish),
            "world4": world(4, world4, start, finish),
            "expert_tensor_parallel": world(4, expert_tensor_parallel, start, finish),
            "fp8_experts": world(2, fp8_experts, start, finish),
        }
    with open(path, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
