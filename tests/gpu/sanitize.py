"""Every kernel once on small inputs, for compute-sanitizer; one rank, as it does not run under MPS.

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize.py
"""

from __future__ import annotations

import itertools

import torch

from moe_ep_plugin import EpBuffer, EpConfig


def round_trip(dtype: torch.dtype, hidden: int, wire: str, expand: str, layout: str, limit: int | None) -> None:
    """Dispatch, again with the handle, and combine with weights and values."""
    config = EpConfig(
        num_experts=6,
        num_topk=3,
        hidden=hidden,
        max_tokens_per_rank=48,
        dtype=dtype,
        device="cuda",
        backend="cuda",
        wire=wire,  # type: ignore[arg-type]
        expand=expand,  # type: ignore[arg-type]
        expert_alignment=4,
        num_sms=2,
        timeout_s=300.0,
    )
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-4, 5, (37, hidden), generator=generator).to(dtype).cuda()
    idx = torch.randint(-1, 6, (37, 3), generator=generator).cuda()
    weights = torch.ones(37, 3, device="cuda")
    with EpBuffer(None, config) as buffer:
        out = buffer.dispatch(x, idx, weights, layout=layout, max_recv_tokens=limit)  # type: ignore[arg-type]
        again = buffer.dispatch(x, topk_weights=weights, handle=out.handle)
        assert torch.equal(out.x.view(torch.uint8), again.x.view(torch.uint8))
        factors = out.topk_weights if layout == "expert" else None
        rows = buffer.empty_rows(out.handle, dtype)
        rows.zero_()
        y = buffer.combine_with_values(rows, out.handle, topk_weights=factors, row_values=out.topk_weights)
        if wire == "bf16":
            y = buffer.combine_with_values(out.x * 1, out.handle, topk_weights=factors)
            places = (idx >= 0).sum(1) if layout == "expert" else (idx >= 0).any(1)
            assert torch.equal(y.x, x * places[:, None].to(dtype))
        buffer.check()


def main() -> None:
    """All kinds of rows."""
    ran = 0
    for wire, expand, layout in itertools.product(("bf16", "fp8"), ("direct", "two_stage"), ("expert", "rank")):
        for dtype, hidden in ((torch.bfloat16, 272), (torch.float32, 528), (torch.bfloat16, 8)):
            round_trip(dtype, hidden, wire, expand, layout, 200 if ran % 2 else None)
            ran += 1
    print(f"{ran} round trips")


if __name__ == "__main__":
    main()
