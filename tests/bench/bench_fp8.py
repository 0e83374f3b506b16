"""FP8 from the wire to the first expert layer, against a bf16 dispatch that is quantised after it.

Workload: 4096 tokens a rank, hidden 7168, top-8 of (8 experts x ranks) drawn uniformly, FC1 of gate and up (2 x 2048)
and, as where experts have no gate, of 2048 outputs; rows of each expert padded to a multiple of 16. All that is timed
comes once per MoE layer and forward:

* ours: dispatch on the FP8 wire to expert-major rows; the scales into the GEMM's order; in training the rows quantised
  by column, one kernel; the FP8 grouped GEMM.
* bf16, permuted: dispatch in bf16 once a rank (layout "rank"), rows copied to expert-major order by an index that is
  ready, TransformerEngine's GroupedLinear under Float8BlockScaling, which quantises rows (by column too in training).
* bf16, Megatron: the same dispatch, then what Megatron-Core's flex dispatcher does to get expert-major rows: a routing
  map of the received ids, padded to multiples of 16, and TransformerEngine's fused permutation; then the same
  GroupedLinear. Where Megatron-Core is installed.
* bf16, direct: dispatch in bf16 to expert-major rows, then the same GroupedLinear. Nothing to permute: ours, but FP8.

Weights are quantised once and kept by all of them, as in every micro-batch of a step but the first. *Training* runs
under autograd: TransformerEngine's layer quantises rows by column too, as it does not keep them; ours keeps the FP8
rows, and makes columns of them when the weight gradient is computed. So there is *step* as well: the forward in
training and then the backward, weight gradients and the gradients' way back to the tokens included, where both have
done the same (not *permuted*, whose ready index has no way back here). *Inference* has no autograd.
GEMM: our layer alone, on rows that are there.

Floor: the bytes that have to be read and written once (source rows, received rows and scales, weights, outputs) at the
speed of a large copy, plus the GEMM alone. Wire bytes are what left a rank for other ranks, as counted by the buffer,
beside those of a bf16 all-to-all of every (token, expert).

    python -m moe_ep_plugin.share_gpu --ranks 4 -- tests/bench/bench_fp8.py --json FILE
    torchrun --standalone --nproc-per-node 2 tests/bench/bench_fp8.py --device cpu --tokens 32 --hidden 256 --fc1 256 \\
        --copy-mb 2
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from bench_throughput import numbers
from common import gpu_facts, ranks_sharing, start_rank
from throughput_measure import copy_bytes_per_s, timed
from throughput_team import tidy

from moe_ep_plugin import EpBuffer, EpConfig, Fp8Recipe, Fp8Rows, TokenDispatcher, _te
from moe_ep_plugin.fp8_experts import Fp8GroupedLinear

BAR = 1.6


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--fc1", type=numbers, default=[4096, 2048], help="outputs of FC1 (default 4096,2048)")
    parser.add_argument("--local-experts", type=int, default=8)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--sms", type=int, default=24, help="SMs of a rank's dispatch")
    parser.add_argument("--batches", type=int, default=7)
    parser.add_argument("--calls", type=int, default=5, help="calls of a batch")
    parser.add_argument("--json", help="write results to this file")
    # For trying this program without a GPU.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--copy-mb", type=int, default=1024, help=argparse.SUPPRESS)
    return parser.parse_args()


class Case:
    """Buffer, data and layers of one rank."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rank, self.size = start_rank()
        self.options, self.device = options, torch.device(options.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        experts = options.local_experts * self.size
        generator = torch.Generator().manual_seed(self.rank)
        tokens = options.tokens
        self.x = torch.randn(tokens, options.hidden, generator=generator).to(self.device, torch.bfloat16)
        scores = torch.rand(tokens, experts, generator=generator)
        self.idx = scores.topk(options.topk, dim=1).indices.to(self.device)
        self.weights = torch.rand(tokens, options.topk, generator=generator).to(self.device)
        self.x.requires_grad_()

    def buffer(self, expand: str) -> EpBuffer:
        """A buffer; collective."""
        options = self.options
        config = EpConfig(
            num_experts=options.local_experts * self.size,
            num_topk=options.topk,
            hidden=options.hidden,
            max_tokens_per_rank=options.tokens,
            expert_alignment=_te.ROW_MULTIPLE,
            power_of_two_scales=True,
            device=self.device.type,
            backend="cuda" if self.device.type == "cuda" else "host",
            num_sms=options.sms,
            expand=expand,  # type: ignore[arg-type]
            timeout_s=30.0,
        )
        return EpBuffer(None, config)

    def our_layer(self, outputs: int) -> Fp8GroupedLinear:
        """FC1 on FP8 rows; its weights are kept from the first call on."""
        options = self.options
        torch.manual_seed(7 + self.rank)
        recipe = Fp8Recipe(gradients="fp8")
        layer = Fp8GroupedLinear(options.local_experts, options.hidden, outputs, recipe=recipe, device=self.device)
        layer.weights_changed = True
        return layer

    def te_layer(
        self, ours: Fp8GroupedLinear
    ) -> tuple[Callable[[torch.Tensor, list[int]], torch.Tensor], list[torch.Tensor]]:
        """FC1 that quantises unquantised rows, with the same weights; and its weights."""
        if self.device.type == "cpu":
            return lambda rows, counts: ours(rows, counts), list(ours.parameters())
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import Float8BlockScaling

        layer = te.GroupedLinear(
            ours.num_gemms,
            ours.in_features,
            ours.out_features,
            bias=False,
            params_dtype=torch.bfloat16,
            device=self.device,
        )
        with torch.no_grad():
            for index in range(ours.num_gemms):
                getattr(layer, f"weight{index}").copy_(ours.weight(index))
        first = [True]

        def call(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
            with te.autocast(enabled=True, recipe=Float8BlockScaling()):
                out: torch.Tensor = layer(rows, counts, is_first_microbatch=first[0])
            first[0] = False
            return out

        return call, list(layer.parameters())

    def permutation(self, buffer: EpBuffer, counts: list[int]) -> torch.Tensor:
        """For every expert-major row the row of layout "rank" that it comes from; padding comes from the first."""
        out = buffer.dispatch(self.x.detach(), self.idx, self.weights, layout="rank")
        assert out.topk_idx is not None
        order = torch.zeros(sum(counts), dtype=torch.int64)
        local, start = out.topk_idx.cpu(), 0
        for expert, count in enumerate(counts):
            rows = (local == expert).any(1).nonzero()[:, 0]
            order[start : start + len(rows)] = rows
            start += count
        return order.to(self.device)

    def megatrons_permute(self, counts: list[int]) -> Callable[[Any], torch.Tensor] | None:
        """Rows of layout "rank" to padded expert-major order, by Megatron-Core; None where it can't."""
        if self.device.type == "cpu" or importlib.util.find_spec("megatron") is None:
            return None
        from megatron.core.transformer.moe.moe_utils import pad_routing_map, permute
        from megatron.core.transformer.moe.token_dispatcher import _DeepepManager

        manager = SimpleNamespace(num_local_experts=self.options.local_experts)

        def call(out: Any) -> torch.Tensor:
            routed, probs = _DeepepManager._indices_to_multihot(manager, out.topk_idx, out.topk_weights)
            routed = pad_routing_map(routed, _te.ROW_MULTIPLE)
            rows: torch.Tensor = permute(out.x, routed, probs=probs, num_out_tokens=sum(counts), fused=True)[0]
            return rows

        return call

    def timed(self, call: Callable[[], object], calls: int) -> float:
        """Microseconds of a call back to back with others; the slowest rank."""
        dist.barrier()

        def all_calls() -> None:
            for _ in range(calls):
                call()

        spent = timed(all_calls, self.device) / calls
        slowest = torch.tensor([spent], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """The rise of memory that torch has handed out, during one call."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((got.float() - want.float()).norm() / want.float().norm())


def filled(routed: torch.Tensor, count: int) -> torch.Tensor:
    """An expert's column of a routing map with as many of its first other rows as make up the count."""
    return routed | (~routed & ((~routed).cumsum(0) <= count - int(routed.sum())))


def run(case: Case, buffer: EpBuffer, outputs: int) -> dict[str, Any]:
    """Check and time everything with one buffer and one size of FC1."""
    options, x, idx, weights = case.options, case.x, case.idx, case.weights
    dispatcher = TokenDispatcher(buffer)
    ours, ready = case.our_layer(outputs), dispatcher.dispatch_fp8(x, idx, weights)
    theirs, their_weights = case.te_layer(ours)
    counts = ready.tokens_per_expert.tolist()
    order = case.permutation(buffer, counts)

    def fp8() -> torch.Tensor:
        out = dispatcher.dispatch_fp8(x, idx, weights)
        return ours(Fp8Rows.from_dispatch(out), out.tokens_per_expert.tolist())

    def permuted() -> torch.Tensor:
        rows = dispatcher.dispatch(x, idx, weights, layout="rank").x
        return theirs(rows.index_select(0, order), counts)

    def direct() -> torch.Tensor:
        out = dispatcher.dispatch(x, idx, weights)
        return theirs(out.x, out.tokens_per_expert.tolist())

    by_megatron = case.megatrons_permute(counts)

    def megatron() -> torch.Tensor:
        assert by_megatron is not None
        return theirs(by_megatron(dispatcher.dispatch(x, idx, weights, layout="rank")), counts)

    output_grads: dict[torch.Size, torch.Tensor] = {}

    def step(forward: Callable[[], torch.Tensor], weights: list[torch.Tensor]) -> Callable[[], object]:
        """Forward and backward."""

        def call() -> object:
            y = forward()
            if y.shape not in output_grads:
                output_grads[y.shape] = torch.randn(y.shape, device=y.device).to(y.dtype)
            return torch.autograd.grad(y, [x, *weights], output_grads[y.shape])

        return call

    rows = Fp8Rows.from_dispatch(ready)
    flat = dispatcher.dispatch(x.detach(), idx, weights).x.clone()
    contestants: dict[str, Callable[[], object]] = {
        "ours": fp8,
        "bf16_permuted": permuted,
        "bf16_direct": direct,
        **({} if by_megatron is None else {"bf16_megatron": megatron}),
        "gemm": lambda: ours(rows, counts),
        "dispatch_fp8": lambda: buffer.dispatch(x.detach(), idx, weights, wire="fp8"),
        "dispatch_bf16_rank": lambda: buffer.dispatch(x.detach(), idx, weights, layout="rank"),
        "dispatch_bf16": lambda: buffer.dispatch(x.detach(), idx, weights),
        "te_layer": lambda: theirs(flat, counts),
    }
    wholes = ("ours", "bf16_permuted", "bf16_direct", "bf16_megatron")
    # Equal but for where padding rows, whose values nobody reads, come from.
    real = (rows.scale.abs().sum(1) > 0).nonzero()[:, 0]
    with torch.no_grad():
        y, y_permuted, y_direct = fp8()[real], permuted()[real], direct()[real]
    errors = {"ours against direct": relative(y, y_direct), "permuted against direct": relative(y_permuted, y_direct)}
    # One quantisation each, of the same values with the same scales: only the order of sums can differ.
    assert errors["permuted against direct"] < 0.02 and errors["ours against direct"] < 0.02, errors
    if by_megatron is not None:
        # Padding is between the rows here.
        with torch.no_grad():
            out = buffer.dispatch(x.detach(), idx, weights, layout="rank")
            routed = (out.topk_idx[:, :, None] == torch.arange(options.local_experts, device=case.device)).any(1)  # type: ignore[index]
            padded = torch.stack([filled(column, count) for column, count in zip(routed.t(), counts, strict=True)])
            kept = routed.t()[padded]
            errors["megatron against direct"] = relative(megatron()[kept], y_direct)
            assert errors["megatron against direct"] < 0.02, errors
            del out, routed, padded, kept
    del y, y_permuted, y_direct

    found: dict[str, Any] = {"errors": errors, "rows": int(len(real)), "rows_padded": sum(counts), "outputs": outputs}
    steps = {"ours": step(fp8, list(ours.parameters())), "bf16_direct": step(direct, their_weights)}
    if by_megatron is not None:
        steps["bf16_megatron"] = step(megatron, their_weights)
    for mode, runners in (("training", contestants), ("inference", contestants), ("step", steps)):
        with torch.set_grad_enabled(mode != "inference"):
            times: dict[str, list[float]] = {name: [] for name in runners}
            for batch in range(options.batches + 1):
                for name, call in runners.items():
                    spent = case.timed(call, options.calls if batch else 2)
                    if batch:
                        times[name].append(spent)
            buffer.check()
            found[mode] = {name: statistics.median(each) for name, each in times.items()}
            found[mode]["peak_bytes"] = {
                name: case.peak_bytes(call) for name, call in runners.items() if name in wholes
            }
    for name in ("ours", "bf16_permuted", "bf16_direct"):
        before = buffer.stats.bytes_to_peers
        with torch.no_grad():
            contestants[name]()
        found.setdefault("bytes_to_peers", {})[name] = buffer.stats.bytes_to_peers - before
    # What a bf16 all-to-all would send: a row for every (token, expert) of another rank.
    owner = idx // options.local_experts
    found["bytes_to_peers"]["bf16 all-to-all"] = int((owner != case.rank).sum()) * options.hidden * 2
    return found


def main() -> None:
    """Measure and print."""
    options = parse_options()
    case = Case(options)
    results: dict[str, Any] = {
        "options": vars(options),
        "ranks": case.size,
        "gpu": gpu_facts(case.device),
    }
    if case.rank == 0:
        results["copy_bytes_per_s"] = copy_bytes_per_s(case.device, options.copy_mb << 20)
        tidy(case.device)
    dist.barrier()
    with case.buffer("direct") as buffer:
        results["fc1"] = [run(case, buffer, outputs) for outputs in options.fc1]
        results["bytes_to_peers"] = results["fc1"][0].pop("bytes_to_peers")
    with case.buffer("two_stage") as buffer:
        # Only to count: a token crosses once a rank, and is copied to its experts there.
        before = buffer.stats.bytes_to_peers
        buffer.dispatch(case.x.detach(), case.idx, case.weights, wire="fp8")
        results["bytes_to_peers"]["ours, two stages"] = buffer.stats.bytes_to_peers - before
    wire = torch.tensor([float(value) for value in results["bytes_to_peers"].values()], dtype=torch.float64)
    dist.all_reduce(wire)
    results["bytes_to_peers"] = dict(zip(results["bytes_to_peers"], map(int, wire.tolist()), strict=True))
    if case.rank == 0:
        show(results, case)
        if options.json:
            Path(options.json).write_text(json.dumps(results, indent=2, default=str))
    dist.barrier()
    dist.destroy_process_group()


def show(results: dict[str, Any], case: Case) -> None:
    """The tables."""
    options, speed = case.options, results["copy_bytes_per_s"]
    on_gpu = ranks_sharing(case.size, case.device) if case.device.type == "cuda" else 1
    print(f"{results['gpu'].get('name', 'CPU')}, {case.size} ranks, {options.tokens} tokens, hidden {options.hidden}")
    for found in results["fc1"]:
        rows, outputs = found["rows_padded"], found["outputs"]
        print(f"FC1 of {outputs} outputs; rows of rank 0: {found['rows']}, with padding {rows}; {found['errors']}")
        flops = 2 * rows * options.hidden * outputs
        for mode in ("training", "inference", "step"):
            times = found[mode]
            bar = "" if mode == "step" else f" (bar: bf16_permuted at least {BAR} times ours)"
            print(f"  {mode}, us a call of the slowest rank{bar}:")
            for name, spent in times.items():
                if name == "peak_bytes":
                    continue
                ratio = f"  {spent / times['ours']:.2f} times ours" if name.startswith("bf16") else ""
                peak = f"  peak {times['peak_bytes'][name] / 1e6:.0f} MB" if name in times["peak_bytes"] else ""
                print(f"    {name:20s} {spent:10.1f}{peak}{ratio}")
            if speed and mode != "step":
                row = options.hidden + options.hidden // 32
                moved = on_gpu * (options.tokens * options.hidden * 2 + rows * row)
                print(
                    f"    floor: dispatch {moved / speed * 1e6:.1f} us and the GEMM, which alone takes "
                    f"{times['gemm']:.1f}: {on_gpu * flops / times['gemm'] / 1e6:.0f} TFLOP/s over all ranks"
                )
    wide = results["bytes_to_peers"]["bf16 all-to-all"]
    for name, sent in results["bytes_to_peers"].items():
        print(
            f"  bytes to other ranks, {name:18s} {sent / 1e6:10.1f} MB  {100 - 100 * sent / max(wide, 1):.1f} % fewer"
        )


if __name__ == "__main__":
    main()
