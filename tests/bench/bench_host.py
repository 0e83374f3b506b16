"""Host backend against index-permute + gloo all-to-all, in one run. CPU only.

    torchrun --nproc-per-node 4 tests/bench/bench_host.py [--json FILE] [--iterations N]
    torchrun --nproc-per-node 8 tests/bench/bench_host.py --wire-only

Workload: T tokens a rank, uniformly random distinct experts, fp32 rows of H elements; dispatch to rows
grouped by local expert, then combine with the gate weights. Experts do nothing (their output is given),
so only dispatch + combine is timed. One thread a rank. Median over iterations of the slowest rank.

Contestants
    ours            EpBuffer.dispatch(layout="expert") + combine of ordinary tensors (staged once)
    ours, leased    the same with expert outputs in memory from empty_rows (read in place)
    permute + gloo  sort by expert, index_select, counts all-gather, all_to_all_single of the rows, index_select to
                    expert-major; then back the same way, weighted sum by index_add
    copy            the physical floor: every rank copies as many bytes as it receives in a dispatch, once, all ranks at
                    the same time; dispatch + combine move at least twice that

Bytes: received rows are N = sum over tokens of their experts here; a copy is N * H * 4 bytes read and written.

--wire-only counts instead of timing: bytes a rank puts on the wire for one dispatch, K 8, E 64, H 2048:
FP8 rows + scales, deduplicated, (layout "rank"), against a bf16 all-to-all without deduplication: T * K * H * 2 bytes
for the rows that leave the rank.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from common import machine, start_rank, time_in_turn, write_json

from moe_ep_plugin import EpBuffer, EpConfig

SHAPES = ({"T": 2048, "H": 1024, "K": 2, "E": 8}, {"T": 1024, "H": 2048, "K": 8, "E": 64})


class PermuteAllToAll:
    """The usual way: one row for every (token, expert), sorted by expert, through torch.distributed."""

    def __init__(self, num_experts: int, num_ranks: int) -> None:
        self.num_experts, self.num_ranks = num_experts, num_ranks
        self.local = num_experts // num_ranks

    def dispatch(self, x: torch.Tensor, topk_idx: torch.Tensor) -> torch.Tensor:
        """Rows by local expert."""
        num_topk = topk_idx.shape[1]
        flat = topk_idx.view(-1)
        self.order = torch.argsort(flat, stable=True)
        self.token = self.order // num_topk
        counts = torch.bincount(flat, minlength=self.num_experts)
        everyone = torch.empty(self.num_ranks, self.num_experts, dtype=counts.dtype)
        dist.all_gather(list(everyone.unbind()), counts)
        rank = dist.get_rank()
        here = everyone[:, rank * self.local : (rank + 1) * self.local]
        self.send = counts.view(self.num_ranks, self.local).sum(1).tolist()
        self.recv = here.sum(1).tolist()
        sent = x.index_select(0, self.token)
        received = torch.empty(sum(self.recv), x.shape[1], dtype=x.dtype)
        dist.all_to_all_single(received, sent, self.recv, self.send)
        expert = torch.arange(self.local).repeat(self.num_ranks).repeat_interleave(here.reshape(-1))
        self.by_expert = torch.argsort(expert, stable=True)
        return received.index_select(0, self.by_expert)

    def combine(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums of the tokens."""
        back = torch.empty_like(rows)
        back[self.by_expert] = rows
        returned = torch.empty(len(self.order), rows.shape[1], dtype=rows.dtype)
        dist.all_to_all_single(returned, back, self.send, self.recv)
        y = torch.zeros(weights.shape[0], rows.shape[1], dtype=rows.dtype)
        return y.index_add_(0, self.token, returned * weights.view(-1)[self.order, None])


def routing(tokens: int, topk: int, experts: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform distinct experts and normalised weights."""
    generator = torch.Generator().manual_seed(rank)
    weights, idx = torch.rand(tokens, experts, generator=generator).topk(topk, dim=1)
    return idx, weights / weights.sum(1, keepdim=True)


def time_shape(shape: dict[str, int], iterations: int) -> dict[str, object]:
    """Times one workload."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    tokens, hidden, topk, experts = shape["T"], shape["H"], shape["K"], shape["E"]
    idx, weights = routing(tokens, topk, experts, rank)
    x = torch.randn(tokens, hidden)
    config = EpConfig(
        num_experts=experts,
        num_topk=topk,
        hidden=hidden,
        max_tokens_per_rank=tokens,
        dtype=torch.float32,
        backend="host",
        host_threads=1,
    )
    baseline = PermuteAllToAll(experts, num_ranks)
    with EpBuffer(None, config) as buffer:
        first = buffer.dispatch(x, idx, weights)
        ordinary = first.x.clone()
        leased = buffer.empty_rows(first.handle, torch.float32)
        leased.copy_(first.x)
        source = torch.randn(first.x.shape)
        target = torch.empty_like(source)

        def ours(rows: torch.Tensor) -> torch.Tensor:
            out = buffer.dispatch(x, idx, weights)
            return buffer.combine(rows, out.handle, topk_weights=out.topk_weights)

        def permute() -> torch.Tensor:
            baseline.dispatch(x, idx)
            return baseline.combine(ordinary, weights)

        torch.testing.assert_close(ours(ordinary), permute())
        torch.testing.assert_close(ours(leased), permute())
        times = time_in_turn(
            {
                "ours": lambda: ours(ordinary),
                "ours, leased": lambda: ours(leased),
                "ours, dispatch": lambda: buffer.dispatch(x, idx, weights),
                "permute + gloo": permute,
                "copy": lambda: target.copy_(source),
            },
            iterations,
        )
    received = torch.tensor([first.handle.num_received * hidden * 4])
    dist.all_reduce(received)
    return {"shape": shape, "ranks": num_ranks, "received_bytes_all_ranks": int(received), "ms": times}


def count_wire() -> dict[str, object]:
    """Counts the bytes of an FP8 dispatch and of the plain all-to-all."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    tokens, hidden, topk, experts = 512, 2048, 8, 64
    idx, _ = routing(tokens, topk, experts, rank)
    config = EpConfig(
        num_experts=experts, num_topk=topk, hidden=hidden, max_tokens_per_rank=tokens, backend="host", wire="fp8"
    )
    with EpBuffer(None, config) as buffer:
        buffer.dispatch(torch.randn(tokens, hidden).bfloat16(), idx, layout="rank")
        ours = torch.tensor([float(buffer.stats.bytes_to_peers)])
    leaving = (idx // (experts // num_ranks) != rank).sum() * hidden * 2
    plain = torch.tensor([float(leaving)])
    dist.all_reduce(ours)
    dist.all_reduce(plain)
    saved = float(1 - ours / plain)
    return {"ranks": num_ranks, "fp8_bytes": int(ours), "bf16_all_to_all_bytes": int(plain), "saved": saved}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write results to this file")
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--wire-only", action="store_true")
    options = parser.parse_args()
    rank, _ = start_rank()
    results: dict[str, object] = {"machine": machine()}
    if options.wire_only:
        wire = results["wire"] = count_wire()
        if rank == 0:
            print(
                f"{wire['ranks']} ranks: fp8 deduplicated {wire['fp8_bytes']} bytes, bf16 all-to-all "
                f"{wire['bf16_all_to_all_bytes']} bytes: {wire['saved']:.1%} fewer"
            )
    else:
        timed = results["timed"] = [time_shape(shape, options.iterations) for shape in SHAPES]
        for result in timed if rank == 0 else ():
            ms = result["ms"]
            received = result["received_bytes_all_ranks"] / 1e6
            print(f"\n{result['shape']} fp32, {result['ranks']} ranks, {received:.0f} MB received by all")
            for name, value in ms.items():
                times_faster, copies = ms["permute + gloo"] / value, value / ms["copy"]
                print(f"  {name:16s} {value:8.2f} ms   {times_faster:5.2f} x   {copies:5.2f} copies")
    if rank == 0:
        write_json(options.json, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
