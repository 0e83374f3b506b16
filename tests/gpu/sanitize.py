"""Every kernel once on small inputs, for compute-sanitizer; one rank, as it does not run under MPS.

compute-sanitizer --tool memcheck --show-backtrace no --error-exitcode 1 python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck --show-backtrace no --error-exitcode 1 python tests/gpu/sanitize.py

With backtraces it keeps Python's frames, and so the results in them, which the third dispatch then finds held.
"""

from __future__ import annotations

import itertools

import torch

from moe_ep_plugin import EpBuffer, EpConfig, Fp8Rows, fp8_kernels
from moe_ep_plugin.fp8 import quantize_rows


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


def low_latency_steps(layout: str, wire: str, back: str, async_op: bool, in_place: bool) -> None:
    """A few steps in fixed slots, in halves or in one launch each."""
    config = EpConfig(
        num_experts=6,
        num_topk=3,
        hidden=272,
        max_tokens_per_rank=48,
        low_latency_tokens_per_rank=40,
        low_latency_layout=layout,  # type: ignore[arg-type]
        device="cuda",
        backend="cuda",
        wire=wire,  # type: ignore[arg-type]
        power_of_two_scales=True,
        num_sms=2,
        timeout_s=300.0,
    )
    generator = torch.Generator().manual_seed(2)
    with EpBuffer(None, config) as buffer:
        for _ in range(3):
            x = torch.randint(-4, 5, (37, 272), generator=generator).bfloat16().cuda()
            idx = torch.randint(-1, 6, (37, 3), generator=generator).cuda()
            low_latency_step(buffer, x, idx, back, async_op, in_place)
        buffer.check()


def low_latency_step(
    buffer: EpBuffer, x: torch.Tensor, idx: torch.Tensor, back: str, async_op: bool, in_place: bool
) -> None:
    """One step whose experts return what they get; nothing of it is held afterwards."""
    by_rank = buffer.config.low_latency_layout == "rank"
    weights = torch.full(idx.shape, 0.5, device="cuda")
    out = buffer.low_latency_dispatch(x, idx, weights if by_rank else None, async_op=async_op).wait()
    rows = out.x.float()
    if out.scale is not None:
        rows = rows * out.scale.repeat_interleave(128, dim=-1)[..., : x.shape[1]]
    rows = buffer.empty_rows(out.handle).copy_(rows) if in_place else rows.bfloat16()
    y = buffer.low_latency_combine(
        rows,
        idx,
        None if by_rank else weights,
        out.handle,
        wire=back,  # type: ignore[arg-type]
        async_op=async_op,
    ).wait()
    factor = (idx >= 0).any(1) if by_rank else 0.5 * (idx >= 0).sum(1)
    assert torch.equal(y.x, (x * factor[:, None]).bfloat16())
    assert not y.lost_weights.any()


def fp8_layouts(counts: list[int], hidden: int) -> None:
    """FP8 rows as a grouped GEMM reads them."""
    generator = torch.Generator().manual_seed(2)
    rows = quantize_rows(torch.randn(sum(counts) + 3, hidden, generator=generator))
    on_gpu = Fp8Rows(rows.data.cuda(), rows.scale.cuda())
    for got, want in zip(
        fp8_kernels.transposed_scales(on_gpu, counts), fp8_kernels.transposed_scales(rows, counts), strict=True
    ):
        assert torch.equal(got.cpu(), want)
    for got, want in zip(
        fp8_kernels.columns(on_gpu, counts, power_of_two=True),
        fp8_kernels.columns(rows, counts, power_of_two=True),
        strict=True,
    ):
        assert torch.equal(got[0].cpu(), want[0]) and torch.equal(got[1].cpu(), want[1])


def main() -> None:
    """All kinds of rows."""
    for counts, hidden in (([5, 0, 131, 1], 272), ([16, 0, 144], 144), ([3], 16)):
        fp8_layouts(counts, hidden)
    ran = 0
    for wire, expand, layout in itertools.product(("bf16", "fp8"), ("direct", "two_stage"), ("expert", "rank")):
        for dtype, hidden in ((torch.bfloat16, 272), (torch.float32, 528), (torch.bfloat16, 8)):
            round_trip(dtype, hidden, wire, expand, layout, 200 if ran % 2 else None)
            ran += 1
    steps = 0
    for layout, wire, back, async_op in itertools.product(
        ("expert", "rank"), ("bf16", "fp8"), ("bf16", "fp8"), (False, True)
    ):
        low_latency_steps(layout, wire, back, async_op, in_place=back == "bf16" and steps % 3 != 0)
        steps += 1
    print(f"{ran} round trips, {steps} times low-latency steps")


if __name__ == "__main__":
    main()
