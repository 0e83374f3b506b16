"""Low-latency dispatch and combine on GPUs against the memory floor, for several group sizes in one run.

    python -m moe_ep_plugin.share_gpu --ranks 8 -- tests/bench/bench_low_latency.py [--json FILE]
    ... bench_low_latency.py --latency-plot FILE.png   and draw the distribution of the latencies
    ... bench_low_latency.py --overlap [TRACE.json]    a GEMM between the halves: its time, and a chrome trace
    ... bench_low_latency.py --main --overlap TRACE.json --latency-plot FILE.png   all of it in one start

The first R ranks work while the others wait without touching the GPU: 8 ranks x 16 SMs, then 2 x 64.

Workload: T = 128 and 8 tokens a rank of H = 7168 bf16 elements; each token has K = 8 of E = 256 experts, uniformly
random and distinct, with a seed per rank; layout "expert". Elements and gate weights are small whole numbers, for
which sums are exact and so are FP8 rows; the experts' results are the rows times a power of two. The weights go to the
combine (the baseline's travel with its dispatch).

Checks: before a work is timed its results, those of the halves launched apart and those of a replay of its graph are
compared with what torch computes from the same data, bit for bit: rows, scales, counts and sums. A wrong one is
reported and not timed.

Time: CUDA graphs of --calls (20) calls back to back, --replays (200) of them back to back after a barrier and three
untimed ones, between CUDA events. In each replay the slowest rank counts; a call's time is the replay's over its calls.
"us" is the median over replays, "p99" their 99th percentile: of means over 20 calls, not of single calls. Dispatches
use the two sets of slots in turn; combines answer two dispatches in turn. "halves apart" launches send and receive
halves one after the other (async_op=True, then wait()). "eager" is without a graph: the median of 5 batches of 50
calls. A new buffer is left alone for --settle-s first (see bench_throughput.py).

Floor: the bytes that the work has to read and write on all ranks, over 4.25 TB/s, which is what a large
device-to-device copy reaches on an H200, bytes read + written (docs/performance.md), times GPUs where ranks have one
each: a floor of memory, not of the links between GPUs. Counted from this run's routing:
    S  tokens of all ranks                                   row  2 H bytes
    C  received rows: one for every token and expert (S K)   q    H bytes and 4 for every 128 elements

    dispatch_fp8       S row + C q      every source row read once, every received row written once, with its scales
    dispatch_bf16      (S + C) row
    combine_zero_copy  (C + S) row      every received row read once, every token written once; rows in empty_rows
    combine_any        (C + S) row      rows in any memory, copied first; (3 C + S) row if copies leave the L2 cache
    combine_registered (C + S) row      rows in any memory that is registered; with halves apart they are copied
    combine_fp8        (C + S) row      FP8 wire, quantised first; + 2 C q if the quantised rows leave the L2 cache
    step               dispatch_fp8 + combine_zero_copy, one after the other; the experts do nothing
8 tokens a rank stay in the L2 cache, where the floor means little: launches and flags are what takes time.

Compared with: bars and stretch goals set before the kernels were written, for one H200; figures that DeepEP V1 (8 H800
over RDMA: 77 us dispatch, 114 combine) and pplx-garden (8 H100 over ConnectX-7: 50.5, 65.3) publish for 128 tokens and
8 ranks, which is other hardware: each rank has a GPU with its memory and all SMs, but a network between; "published /
ours" says how many times as long theirs take. And in this run:
    throughput_*   EpBuffer.dispatch(layout="expert", max_recv_tokens=...) and weighted combine of leased rows, bf16, in
                   graphs of the same kind, same SMs, expand="direct": a row for every token and expert, as here
    collective_*   backend "collective" (torch.distributed, gloo), low-latency API, eager, for scale

--overlap: a bf16 GEMM of --gemm M,K,N on every rank, between CUDA events around it only, on the most ranks and tokens:
alone; after operations that are done, both halves before it; and between send half and wait(). The operations keep the
ranks in step in the last two, which compare; alone they drift apart. The GEMM's time may differ by 2 %. Slowest rank of
each step, medians. Then one eager step under torch.profiler on rank 0: kernels of ours that run while a GEMM does are
counted (there should be none), and the chrome trace goes to the file given.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import torch.distributed as dist
from bench_throughput import names_among, numbers, parse_sms
from low_latency_modes import LowBench
from low_latency_targets import TARGET_SHAPE
from low_latency_works import WORKS


def three_numbers(text: str) -> tuple[int, int, int]:
    """M,K,N."""
    found = numbers(text)
    if len(found) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not M,K,N")
    return found[0], found[1], found[2]


def even(text: str) -> int:
    """A whole number that uses both sets of slots alike."""
    number = int(text)
    if number < 2 or number % 2:
        raise argparse.ArgumentTypeError(f"{number} is not an even number of at least 2")
    return number


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write results to this file, after every row")
    parser.add_argument("--main", action="store_true", help="the table of works; the default without --overlap")
    parser.add_argument("--overlap", nargs="?", const="", metavar="TRACE", help="a GEMM between the halves; its trace")
    parser.add_argument("--latency-plot", metavar="FILE", help="draw the latencies' distribution; implies --main")
    parser.add_argument("--ranks", type=numbers, default=[8, 2], help="group sizes (default 8,2)")
    parser.add_argument("--tokens", type=numbers, default=[128, 8], dest="token_counts", help="default 128,8")
    parser.add_argument("--sms", type=parse_sms, default={}, help="SMs a rank: 16, or by group size 8:16,2:64")
    parser.add_argument("--works", type=names_among(WORKS), default=[], help="only these, comma separated")
    parser.add_argument("--no-collective", action="store_true", help="leave backend collective out")
    parser.add_argument("--calls", type=even, default=20, help="calls a graph")
    parser.add_argument("--replays", type=int, default=200, help="replays, and steps of --overlap")
    parser.add_argument("--gemm", type=three_numbers, default=(2048, 2048, 2048), help="M,K,N (default 2048,2048,2048)")
    parser.add_argument("--settle-s", type=float, default=1.0, help="pause after a buffer is made")
    parser.add_argument("--timeout-s", type=float, default=15.0, help="longest wait for a peer")
    for name, value in TARGET_SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    # For trying this program without a GPU.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--copy-mb", type=int, default=2048, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with_overlap = options.overlap is not None
    options.with_table = options.main or bool(options.latency_plot) or not with_overlap
    # What Bench asks for: its teams are those of its mode "main".
    options.main, options.small, options.scaling, options.tokens = True, False, False, max(options.token_counts)
    return options


def draw(results: dict[str, object], path: str) -> str:
    """Draw the latencies; returns what to say of it."""
    try:
        from low_latency_plot import plot
    except ImportError as error:
        return f"no plot: {error}; draw it from the JSON with low_latency_plot.py"
    plot(results, Path(path))
    return f"wrote {path}"


def main() -> None:
    """Run the modes asked for."""
    options = parse_options()
    started = time.perf_counter()
    bench = LowBench(options)
    gc.freeze()
    bench.measure_copy()
    if options.with_table:
        bench.main()
    if options.overlap is not None:
        bench.overlap()
    bench.report.results["seconds"] = time.perf_counter() - started
    bench.report.save()
    if bench.report.active and options.latency_plot:
        bench.report.say(draw(bench.report.results, options.latency_plot))
    bench.report.say(f"\n{bench.report.results['seconds']:.0f} s")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
