"""DeepSpeed's native MoE layer on our dispatch against its own, in one run. CPU only.

    torchrun --nproc-per-node 4 tests/bench/bench_deepspeed.py [--json FILE] [--iterations N]

Workload: S tokens a rank, fp32 rows of M elements, top-2 of E experts spread over all ranks, nothing dropped; forward
and backward of the layer (gate, dispatch, combine), whose experts give their input back, so that no GEMM of theirs is
timed. One thread a rank. Median over iterations of the slowest rank. Logits have a spread of one and, where routing is
skewed, a preference of -ZIPF * ln(1 + expert) for each expert: popularity falls about as 1 / (1 + expert)^ZIPF.

Contestants
    ours      the layer after convert()
    stock     the installed DeepSpeed's own dispatch with drop_tokens=False, the same weights, input and noise

Memory: how far the peak of a process's resident memory rises in its first forward and backward, buffers included, the
largest over ranks. Bars: 3 times faster with skewed routing, 1.5 times with balanced routing.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from common import machine, time_in_turn, write_json

from moe_ep_plugin.integrations.deepspeed import convert, enable_cpu, statistics, uninstall

S, M, TOPK = 4096, 512, 2
EXPERTS = (8, 32)
ZIPF = 1.0
BARS = {"balanced": 1.5, "skewed": 3.0}


class PassThrough(torch.nn.Module):
    """An expert that costs nothing."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


def make_layers(experts: int, zipf: float) -> dict[str, torch.nn.Module]:
    """The same layer twice. The first element of every row is 1, so its gate weights are the experts' preferences."""
    from deepspeed.moe.layer import MoE

    uninstall()
    torch.manual_seed(0)
    stock = MoE(
        M, PassThrough(), num_experts=experts, ep_size=dist.get_world_size(), k=TOPK, drop_tokens=False, min_capacity=0
    )
    weight = stock.deepspeed_moe.gate.wg.weight.data
    weight.normal_(std=M**-0.5)
    weight[:, 0] = -zipf * torch.arange(1, experts + 1).log()
    ours = copy.deepcopy(stock)
    for layer in (stock, ours):
        layer.set_deepspeed_parallelism()
    convert(ours, backend="host", host_threads=1)
    return {"stock": stock, "ours": ours}


def peak_growth(run: Callable[[], object]) -> float:
    """Megabytes that the peak of resident memory rises above what is resident now, at most over ranks."""

    def kilobytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    # What earlier work has freed must not hide what is allocated now.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    run()
    growth = torch.tensor([(kilobytes("VmHWM") - before) / 1024])
    dist.all_reduce(growth, op=dist.ReduceOp.MAX)
    return float(growth)


def time_case(experts: int, kind: str, iterations: int) -> dict[str, object]:
    """Times one workload."""
    layers = make_layers(experts, ZIPF if kind == "skewed" else 0.0)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(1, S, M, generator=generator)
    x[..., 0] = 1.0
    grad = torch.randn(1, S, M, generator=generator)

    def run(side: str) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(dist.get_rank())
        rows = x.detach().requires_grad_()
        y, l_aux, _ = layers[side](rows)
        torch.autograd.backward([y, l_aux], [grad, torch.ones_like(l_aux)])
        return y.detach(), rows.grad

    memory = {side: peak_growth(lambda side=side: run(side)) for side in ("stock", "ours")}
    for ours, stock in zip(run("ours"), run("stock"), strict=True):
        torch.testing.assert_close(ours, stock)
    counts = layers["ours"].deepspeed_moe.exp_counts.clone()
    times = time_in_turn({side: lambda side=side: run(side) for side in ("stock", "ours")}, iterations)
    dist.all_reduce(counts)
    return {
        "experts": experts,
        "routing": kind,
        "largest_over_mean": float(counts.max() / counts.float().mean()),
        "ms": times,
        "peak_mb": memory,
        "faster": times["stock"] / times["ours"],
        "bar": BARS[kind],
        "backend": statistics()["backend"],
    }


def main() -> int:
    """Command line; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write results to this file")
    parser.add_argument("--iterations", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    enable_cpu()
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = dist.get_rank()
    results = [time_case(experts, kind, options.iterations) for experts in EXPERTS for kind in BARS]
    missed = [result for result in results if result["faster"] < result["bar"]]
    if rank == 0:
        size = dist.get_world_size()
        print(f"\ndeepspeed {deepspeed.__version__}, {size} ranks, S {S}, M {M}, top-{TOPK}, fp32, nothing dropped")
        for result in results:
            ms, memory = result["ms"], result["peak_mb"]
            sides = [f"{side} {ms[side]:7.1f} ms {memory[side]:4.0f} MB" for side in ("stock", "ours")]
            print(
                f"  E {result['experts']:2d} {result['routing']:8s} (largest / mean {result['largest_over_mean']:4.1f})"
                f"  {'  '.join(sides)}  {result['faster']:5.2f} x (bar {result['bar']})"
            )
        facts = {"machine": machine(), "deepspeed": deepspeed.__version__, "ranks": size}
        write_json(options.json, {**facts, "results": results})
    uninstall()
    dist.destroy_process_group()
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
