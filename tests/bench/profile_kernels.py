"""One rank's dispatch and combine at the size of the benchmark, for a profiler that stops at every kernel.

    ncu --clock-control none --kernel-name 'regex:dispatch_kernel|combine_kernel' --launch-skip 6 --launch-count 2 \\
        --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats \\
        python tests/bench/profile_kernels.py

One rank, because a profiler runs one kernel at a time and ranks wait for each other inside theirs. 4096 tokens, hidden
7168, top-8 of 256 experts, bf16, layout "expert" (8 copies of every row written and read back), on --sms SMs (all, if
left out). Bytes: 4096 rows read and 32,768 written by a dispatch, the other way round by a combine.
"""

from __future__ import annotations

import argparse

import torch

from moe_ep_plugin import EpBuffer, EpConfig

TOKENS, HIDDEN, TOPK, EXPERTS = 4096, 7168, 8, 256


def main() -> None:
    """Run each pair of calls a few times; the profiler picks the ones it wants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--wire", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--sms", type=int, default=torch.cuda.get_device_properties(0).multi_processor_count)
    options = parser.parse_args()
    config = EpConfig(
        num_experts=EXPERTS,
        num_topk=TOPK,
        hidden=HIDDEN,
        max_tokens_per_rank=TOKENS,
        device="cuda",
        backend="cuda",
        num_sms=options.sms,
        timeout_s=300.0,
    )
    x = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()
    weights, idx = torch.rand(TOKENS, EXPERTS, device="cuda").topk(TOPK, dim=1)
    with EpBuffer(None, config) as buffer:
        for _ in range(options.pairs):
            out = buffer.dispatch(x, idx, weights, wire=options.wire)
            rows = buffer.empty_rows(out.handle)
            rows.normal_()
            buffer.combine(rows, out.handle, topk_weights=out.topk_weights)
        buffer.check()


if __name__ == "__main__":
    main()
