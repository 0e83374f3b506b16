"""Random routings with a GPU a rank: backend "cuda" against "collective" on NCCL, its twin on the host, and the oracle.

    python -m moe_ep_plugin.share_gpu --ranks 2 -- tests/gpu/multi_gpu.py [--random 12] [--routings 3]

Any number of ranks; with fewer GPUs than ranks NCCL is left out and gloo carries the tensors. Throughput mode: both
layouts, both expansions, rows as they are, quantised on the way, and given as FP8; dispatch, again by handle, combine.
Low-latency mode: both layouts, wires of dispatch and combine. Then cases whose every choice is drawn. All bits are
compared, on every rank. The last line is RESULT and the number of routings compared.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import cases, checks, low_latency_cases, low_latency_checks  # noqa: E402

Run = Callable[..., int]


def throughput_cases(num_ranks: int, count: int) -> Iterator[cases.Case]:
    """Every path at one shape, then random ones."""
    base = cases.make_case(random.Random(1).choice, num_ranks, large=True, max_recv=("none",))
    base = replace(
        base, num_experts=64, expert_to_rank=None, num_topk=6, max_tokens=70, dtype=torch.bfloat16, weighted=True
    )
    base = replace(base, heap_dtype=torch.bfloat16, weighted_combine=True, reuse=True, leased=True, numbers="integer")
    for hidden, layout, wire in itertools.product((264, 2048), ("rank", "expert"), ("plain", "fp8", "fp8_input")):
        for expand in ("direct", "two_stage") if layout == "expert" else ("auto",):
            yield replace(base, hidden=hidden, layout=layout, wire=wire, expand=expand, num_sms=None)
    for seed in range(count):
        pick = random.Random(f"throughput {seed} {num_ranks}").choice
        yield cases.make_case(pick, num_ranks, large=True, max_recv=("none", "exact", "slack"))


def decoding_cases(num_ranks: int, count: int) -> Iterator[low_latency_cases.LowLatencyCase]:
    """Every path at one shape, then random ones."""
    base = low_latency_cases.make_case(random.Random(2).choice, num_ranks, large=True)
    base = replace(base, num_experts=64, expert_to_rank=None, num_topk=6, hidden=2048, tokens_per_rank=17, num_sms=None)
    base = replace(base, dtype=torch.bfloat16, rows_dtype=torch.bfloat16, heap_dtype=torch.bfloat16, weighted=True)
    for layout, wire, back in itertools.product(("expert", "rank"), ("plain", "fp8"), ("bf16", "fp8")):
        heap_wire = "bf16" if wire == "plain" else "fp8"
        changes = {"heap_wire": heap_wire, "combine_wire": back, "in_place": back == "bf16", "order": "pair"}
        yield replace(base, layout=layout, wire=wire, **changes)
    # So many rows for an expert that scales are gathered before they cross, and some experts get more than fit.
    fp8 = {"layout": "expert", "wire": "fp8", "heap_wire": "fp8", "combine_wire": "bf16", "order": "pair"}
    for tokens in (48, 80):
        yield replace(base, tokens_per_rank=tokens, **fp8)
    for seed in range(count):
        yield low_latency_cases.make_case(random.Random(f"decoding {seed} {num_ranks}").choice, num_ranks, large=True)


def main() -> int:
    """Compare, until the first difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=12, help="random cases of each mode")
    parser.add_argument("--routings", type=int, default=3, help="routings a case")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: for trying this without a GPU.
    options = parser.parse_args()
    on_gpu, ranks = options.device == "cuda", int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    alone = False
    if on_gpu:
        alone = torch.cuda.device_count() >= ranks
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # Start-up messages and the twin's tensors are the CPU's; NCCL refuses two ranks on one GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if alone else "gloo")
    rank, started = dist.get_rank(), time.perf_counter()
    ours, twin = cases.Place("cuda" if on_gpu else "host", options.device), cases.Place("host", "cpu")
    places = (ours, twin, cases.Place("collective", options.device)) if on_gpu else (ours, twin)
    kinds: list[tuple[str, Any, Run]] = [
        ("throughput", throughput_cases(ranks, options.random), checks.run_case),
        ("low latency", decoding_cases(ranks, options.random), low_latency_checks.run_case),
    ]
    for what, drawn, run in kinds:
        compared = count = 0
        for case in drawn:
            try:
                compared += run(case, places, options.routings)
                count += 1
            except BaseException:
                print(f"rank {rank}: {what}: DIFFERS in {case}", flush=True)
                traceback.print_exc()
                os._exit(1)  # The other ranks wait for this one: torchrun ends them.
        if rank == 0:
            beside = f"host twin and collective on {'NCCL' if alone else 'gloo'}" if on_gpu else "the oracle only"
            print(f"{what}: {compared} routings of {count} cases agree on {ranks} ranks: oracle, {beside}", flush=True)
    dist.barrier()
    if rank == 0:
        print(f"RESULT all agree, {time.perf_counter() - started:.0f} s", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
