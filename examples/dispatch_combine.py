"""Send tokens to the experts of four processes and bring the results back, on any machine.

torchrun --nproc-per-node 4 examples/dispatch_combine.py [backend]      (or plain ``python``: one rank)
"""

import os
import sys

import torch
import torch.distributed as dist

from moe_ep_plugin import EpBuffer, EpConfig

NUM_TOKENS, HIDDEN, NUM_EXPERTS, TOPK = 6, 64, 8, 2

torch.set_num_threads(1)
if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
config = EpConfig(
    num_experts=NUM_EXPERTS,
    num_topk=TOPK,
    hidden=HIDDEN,
    max_tokens_per_rank=NUM_TOKENS,
    dtype=torch.float32,
    device="cpu",
    backend=sys.argv[1] if len(sys.argv) > 1 else "auto",
)

torch.manual_seed(rank)
x = torch.randn(NUM_TOKENS, HIDDEN)
topk_weights, topk_idx = torch.rand(NUM_TOKENS, NUM_EXPERTS).softmax(dim=1).topk(TOPK)

with EpBuffer(None, config) as buffer:
    out = buffer.dispatch(x, topk_idx, topk_weights)
    rows = buffer.empty_rows(out.handle)  # combine reads these in place
    experts = buffer.placement.experts_of_rank[rank]
    groups = out.x.split(out.tokens_per_expert.tolist())
    # Expert e multiplies by e + 1: stands in for its MLP, and makes the answer easy to check.
    torch.cat([group * (e + 1) for e, group in zip(experts, groups, strict=True)], out=rows)
    y = buffer.combine(rows, out.handle, topk_weights=out.topk_weights)
    backend = buffer.backend

expected = x * (topk_weights * (topk_idx + 1)).sum(dim=1, keepdim=True)
torch.testing.assert_close(y, expected)
received = ", ".join(f"expert {e}: {n} rows" for e, n in zip(experts, out.tokens_per_expert.tolist(), strict=True))
print(f"rank {rank} of {ranks} ({backend}) sent {NUM_TOKENS} tokens, ran {received}; results agree", flush=True)
if dist.is_initialized():
    dist.destroy_process_group()
