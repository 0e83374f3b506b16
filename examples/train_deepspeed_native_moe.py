"""Train a model with DeepSpeed's own MoE layers (deepspeed.moe.layer.MoE), dispatched by moe_ep_plugin.

    torchrun --nproc-per-node 4 examples/train_deepspeed_native_moe.py [--dispatch stock] [--help]

What an existing DeepSpeed program changes is the call of install() and, if it wants, the section "moe_ep_plugin" of its
config. The model predicts the next byte of the Python standard library's sources from the bytes before it; nothing is
dropped. The last line printed is ``RESULT`` and a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
import torch.distributed as dist
from finetune.setup import join_ranks_for_deepspeed, zero_stage
from pretrain.data import VOCAB_SIZE, load_corpus, training_windows
from pretrain.options import Launch
from torch import nn
from torch.nn import functional as F

from moe_ep_plugin.integrations import deepspeed as integration


class Block(nn.Module):
    """Causal convolution and a MoE layer, each added to what goes in."""

    def __init__(self, hidden: int, options: argparse.Namespace) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.mix = nn.Conv1d(hidden, hidden, kernel_size=8)
        expert = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
        self.moe = MoE(
            hidden,
            expert,
            num_experts=options.experts,
            ep_size=options.expert_parallel,
            k=options.topk,
            drop_tokens=False,
            min_capacity=0,
            use_residual=options.residual,
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        past = F.pad(self.norms[0](x).transpose(1, 2), (self.mix.kernel_size[0] - 1, 0))
        x = x + F.gelu(self.mix(past)).transpose(1, 2)
        y, balance_loss, _ = self.moe(self.norms[1](x))
        return x + y, balance_loss


class Model(nn.Module):
    """Predicts the next byte; returns the loss to minimise and the mean nats per byte."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        hidden = options.hidden_size
        self.embedding = nn.Embedding(VOCAB_SIZE, hidden)
        self.blocks = nn.ModuleList(Block(hidden, options) for _ in range(options.layers))
        self.head = nn.Linear(hidden, VOCAB_SIZE)

    def forward(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, balance = self.embedding(windows[:, :-1]), []
        for block in self.blocks:
            x, balance_loss = block(x)
            balance.append(balance_loss)
        loss = F.cross_entropy(self.head(x).float().flatten(0, 1), windows[:, 1:].flatten())
        return loss + 0.01 * torch.stack(balance).sum(), loss.detach()


def parse(argv: list[str], num_ranks: int) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dispatch", choices=("ours", "stock"), default="ours", help="stock: DeepSpeed's own dispatch")
    parser.add_argument("--backend", choices=("auto", "cuda", "host", "collective"), default="auto")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="text; default: Python's own sources")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--residual", action="store_true", help="PR-MoE: an MLP beside the experts")
    parser.add_argument(
        "--zero", type=int, choices=(0, 1, 2), help="ZeRO stage; default: 1, or 0 where ranks share a GPU"
    )
    parser.add_argument("--expert-parallel", type=int, default=num_ranks, help="ranks that share one set of experts")
    options = parser.parse_args(argv)
    if num_ranks % options.expert_parallel or options.experts % options.expert_parallel:
        parser.error(f"--expert-parallel {options.expert_parallel} must divide ranks ({num_ranks}) and --experts")
    return options


def main(argv: list[str]) -> None:
    """Run one rank."""
    launch = Launch.from_environment()
    options = parse(argv, launch.num_ranks)
    join_ranks_for_deepspeed(launch)
    if options.dispatch == "ours":
        integration.install()
    import deepspeed

    # Takes the process group that is there.
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    corpus = load_corpus(options.data)
    torch.manual_seed(1)
    model = Model(options)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": zero_stage(launch, 1) if options.zero is None else options.zero},
        "optimizer": {"type": "Adam", "params": {"lr": 2e-3, "torch_adam": True}},
        "moe_ep_plugin": {"backend": options.backend},
    }
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
    started, losses = time.perf_counter(), []
    for step in range(options.steps):
        windows = training_windows(corpus, seed=1, step=step, count=8 * launch.num_ranks, seq_length=128)
        mine = torch.from_numpy(windows[8 * launch.rank :][:8]).to(engine.device)
        loss, nats = engine(mine)
        engine.backward(loss)
        engine.step()
        mean = nats.double().cpu()
        dist.all_reduce(mean)
        losses.append(float(mean) / launch.num_ranks)
        if launch.rank == 0 and (step + 1) % max(1, options.steps // 10) == 0:
            print(f"step {step + 1}/{options.steps}  loss {losses[-1]:.4f}", flush=True)
    seconds = time.perf_counter() - started
    used = integration.statistics()
    dist.barrier()
    integration.uninstall()
    if launch.rank == 0:
        result = {
            "first_loss": round(losses[0], 6),
            "last_loss": round(losses[-1], 6),
            "tokens_per_second": round(options.steps * 8 * 128 * launch.num_ranks / seconds, 1),
            "dispatch": options.dispatch,
            "backend": used.get("backend"),
            "ranks": launch.num_ranks,
        }
        print("RESULT " + json.dumps(result), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
