"""Throughput dispatch and combine with a GPU a rank: bandwidth over NVLink, beside NCCL and the link's own ceiling.

    python -m moe_ep_plugin.share_gpu --ranks 8 -- tests/bench/bench_nvlink.py [--json FILE] [--plot FILE.png]

All ranks that are started work, each on a GPU of its own; with fewer GPUs than ranks it runs, but measures memory.

Workload: T tokens a rank (4096 with each number of SMs of --sms; --tokens with the first of them) of H = 7168 bf16
elements; each token has K = 8 of E = 256 experts, uniformly random and distinct, with a seed per rank. Elements and
gate weights are small whole numbers, of which all sums are exact in bf16, so that every result, of ours and of the
baselines, is compared bit for bit with what torch computes from the same data before it is timed; a wrong one is
reported and not timed.

Time: as in bench_throughput.py: batches of calls back to back between CUDA events, each batch after a barrier and two
untimed calls, the slowest rank in each batch. "us" is the median over batches, "p99" their 99th percentile: of means
over a batch, not of single calls.

Bytes, counted from this run's routing; weights, ids and counts are left out:
    D  rows of (token, rank) pairs whose rank is not the token's own      row  2 H bytes
    X  rows of (token, expert) pairs whose expert is on another rank      q    H bytes and 4 for every 128 elements
    A  rows of all (token, rank) pairs, a token's own rank included

    dispatch_rank, _handle, combine_rank         D row   one row a (token, rank): layout "rank"
    dispatch_rank_fp8                            D q
    dispatch_expert_2stage, combine_..._2stage   D row   one row a (token, rank) crosses, and is fanned out (or summed)
    dispatch_expert_fp8_2stage                   D q     on the expert's GPU
    dispatch_expert_direct, combine_..._direct   X row   every (token, expert) row crosses
    dispatch_expert_fp8_direct                   X q
    collective_*                                 as the work of that name; "expert": X row or X q

"GB/s in" is such bytes over ranks and time: what a rank's GPU receives from other GPUs (10^9 bytes a second). "as
DeepEP" is A row (or A q) over ranks and time: the figure that DeepEP prints, which counts rows that never leave a GPU.
"of link" is "GB/s in" over the ceiling: what each GPU receives by copy engine while every rank copies large memory
from its neighbour in a ring at the same time, so that all GPUs send and receive.

Compared with, in this run, same data: torch's index permute, counts exchanged and brought to the host, and
all_to_all_single of NCCL (of gloo where ranks share a GPU or there is none); for layout "expert" permuted again to
expert-major order, and summed with weights on the way back by the faster of two ways. Its fp8 rows are quantised
before the clock starts, its weights never cross, and its combine has its permutations ready.

The exit status is 1 if anything was wrong or failed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

import torch.distributed as dist
from bench_throughput import names_among, numbers
from nvlink_modes import LinkBench
from nvlink_works import LINK_WORKS
from throughput_targets import TARGET_SHAPE


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write results to this file, after every row")
    parser.add_argument("--plot", metavar="FILE", help="draw bandwidth against SMs, if matplotlib is there")
    parser.add_argument("--sms", type=numbers, default=[24, 4, 8, 16, 20, 32, 64], dest="points", help="SMs a rank")
    parser.add_argument(
        "--tokens", type=numbers, default=[128, 1024, 16384], dest="others", help="besides the main one"
    )
    parser.add_argument("--main-tokens", type=int, default=TARGET_SHAPE.tokens, dest="tokens", help="default 4096")
    parser.add_argument("--works", type=names_among(LINK_WORKS), default=[], help="only these, comma separated")
    parser.add_argument("--calls", type=int, help="calls a batch")
    parser.add_argument("--batches", type=int, help="batches")
    parser.add_argument("--heaps-gb", type=float, default=60.0, help="most of the heaps on a GPU, in 10^9 bytes")
    parser.add_argument("--local-sms", type=int, help="SMs of kernels that stay on a GPU (default: as many as others)")
    parser.add_argument("--settle-s", type=float, default=1.0, help="pause after a buffer is made")
    parser.add_argument("--timeout-s", type=float, default=15.0, help="longest wait for a peer")
    for name in ("hidden", "topk", "experts"):
        parser.add_argument(f"--{name}", type=int, default=getattr(TARGET_SHAPE, name))
    # For trying this program without a GPU.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--copy-mb", type=int, default=1024, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # What Bench asks for: one team, of all ranks.
    options.main, options.small, options.scaling, options.sms = True, False, False, {}
    options.ranks = None
    return options


def draw(path: str, results: dict[str, object]) -> str:
    """Draw the results; returns what to say of it."""
    try:
        from plot_nvlink import plot
    except ImportError as error:
        return f"no plot: {error}; draw it from the JSON with plot_nvlink.py"
    plot(results, Path(path))
    return f"wrote {path}"


def main() -> int:
    """Measure the link, then everything at each size."""
    options = parse_options()
    started = time.perf_counter()
    bench = LinkBench(options)
    gc.freeze()
    bench.measure_link()
    bench.link()
    report = bench.report
    report.results["seconds"] = time.perf_counter() - started
    report.save()
    if report.active and options.plot:
        report.say(draw(options.plot, report.results))
    failed = len(report.failures())
    report.say(f"\n{report.results['seconds']:.0f} s, {len(report.results['rows'])} rows, {failed} of them failed")
    dist.barrier()
    dist.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
