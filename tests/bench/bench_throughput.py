"""Throughput dispatch and combine on GPUs against the memory floor, for several group sizes in one run.

    python -m moe_ep_plugin.share_gpu --ranks 8 -- tests/bench/bench_throughput.py [--json FILE]
    ... bench_throughput.py --small           128 and 512 tokens, eager and in CUDA graphs, with launches counted
    ... bench_throughput.py --scaling         against tokens, ranks and SMs; plot_throughput.py draws its JSON
    ... bench_throughput.py --main --small --scaling   all of it in one start

The first R ranks work while the others wait without touching the GPU, for each R of --ranks.

Workload: T = 4096 tokens a rank of H = 7168 bf16 elements, normally distributed; each token has K = 8 of E = 256
experts, uniformly random and distinct, with a seed per rank. Gate weights travel beside the rows in every
dispatch, expert ids too in layout "rank"; these few bytes are not counted.

Time: warm-up, then batches of calls made back to back, each batch after a barrier and two untimed calls, between
CUDA events. The output of a call lives until the next call has returned, as a user would hold it. The slowest rank
counts in each batch; the figure is the median over batches, beside the smallest and the largest. A new buffer is left
alone for --settle-s first: the memory of the one before it is cleared in the background, which takes bandwidth from
whatever runs (9 % and more of a dispatch's time for its first tenths of a second). Before a work is timed
its result is compared with what torch computes from the same data; a wrong one is reported and not timed.

Floor: the bytes that the work has to read and write on all ranks, over the bandwidth (bytes read + written) of large
device-to-device copies that one rank measures alone at the start, times GPUs where ranks have one each: a floor of
memory, which says nothing about the links between GPUs (bench_nvlink.py does). Counted from this run's routing, with
    S  tokens of all ranks                 row  2 H bytes
    N  received rows, layout "rank"        q    H bytes and 4 for every 128 elements, an fp8 row with its scales
    C  received rows, layout "expert": one for every token and expert (S K)

    dispatch_rank           (S + N) row    layout "rank", exact sizes: waits on the host for the counts
    dispatch_rank_handle    (S + N) row    the same with the routing of an earlier dispatch
    dispatch_rank_fp8       S row + N q    fp8 wire, quantised while sending
    dispatch_rank_fp8_handle  S row + N q
    dispatch_rank_max       S row + M row  only with --small: max_recv_tokens, M rows in all: what the fullest rank
                                           receives, rounded up to 64, times ranks
    dispatch_expert         (S + C) row    layout "expert"
    dispatch_expert_handle  (S + C) row
    dispatch_expert_fp8     S row + C q
    combine_rank            (N + S) row    rows in leased memory (empty_rows)
    combine_rank_any        (3 N + S) row  rows in ordinary memory: staged (read, written), then read; (N + S) row where
                                           staging stays in the L2 cache ("floor in L2")
    combine_expert          (C + S) row    leased rows, weighted sum
    dispatch_expert_2stage  (S + 2 N + C) row   expand="two_stage": received, read again, fanned out
    combine_expert_2stage   (C + 2 N + S) row   summed on the expert's side, read again
Small work may stay in the L2 cache and go below its floor.

--small: "launch share" is 1 - graph / eager, with one call a graph and graphs replayed back to back. Launches are what
torch.profiler sees of one eager call on rank 0.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable

import torch.distributed as dist
from throughput_modes import Bench
from throughput_targets import TARGET_SHAPE
from throughput_works import WORKS


def parse_sms(text: str) -> dict[int, int]:
    """``"16"`` (key 0: any group size) or ``"8:16,4:24"``."""
    pairs = [part.split(":") for part in text.split(",") if part]
    return {int(pair[0]) if len(pair) == 2 else 0: int(pair[-1]) for pair in pairs}


def numbers(text: str) -> list[int]:
    """A comma list of whole numbers."""
    return [int(part) for part in text.split(",") if part]


def names_among(works: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of a command line's comma list of works."""

    def names_of_works(text: str) -> list[str]:
        names = [part.strip() for part in text.split(",") if part.strip()]
        unknown = [name for name in names if name not in works]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown} are not among {', '.join(works)}")
        return names

    return names_of_works


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write results to this file, after every row")
    parser.add_argument("--main", action="store_true", help="the table of works; the default if no mode is given")
    parser.add_argument("--small", action="store_true", help="few tokens, graphs, launches")
    parser.add_argument("--scaling", action="store_true", help="against tokens, ranks and SMs")
    parser.add_argument("--ranks", type=numbers, default=[8, 4, 2], help="group sizes (default 8,4,2)")
    parser.add_argument("--scaling-ranks", type=numbers, default=[8, 4], help="group sizes of the curve over tokens")
    parser.add_argument("--sms", type=parse_sms, default={}, help="SMs a rank: 16, or by group size 8:16,4:24")
    parser.add_argument("--works", type=names_among(WORKS), default=[], help="only these, comma separated")
    parser.add_argument("--calls", type=int, help="calls a batch")
    parser.add_argument("--batches", type=int, help="batches")
    parser.add_argument("--heaps-gb", type=float, default=96.0, help="most of the heaps on a GPU, in 10^9 bytes")
    parser.add_argument("--local-sms", type=int, help="SMs of kernels that stay on a GPU (default: as many as others)")
    parser.add_argument("--settle-s", type=float, default=1.0, help="pause after a buffer is made")
    parser.add_argument("--timeout-s", type=float, default=15.0, help="longest wait for a peer")
    for name in ("tokens", "hidden", "topk", "experts"):
        parser.add_argument(f"--{name}", type=int, default=getattr(TARGET_SHAPE, name))
    # For trying this program without a GPU.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--copy-mb", type=int, default=2048, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.main = options.main or not (options.small or options.scaling)
    return options


def main() -> None:
    """Run the modes asked for."""
    options = parse_options()
    started = time.perf_counter()
    bench = Bench(options)
    gc.freeze()
    bench.measure_copy()
    if options.main:
        bench.main()
    if options.scaling:
        bench.scaling()
    if options.small:
        bench.small()
    bench.report.results["seconds"] = time.perf_counter() - started
    bench.report.save()
    bench.report.say(f"\n{bench.report.results['seconds']:.0f} s")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
