"""Bytes between ranks, counted: what the FP8 wire and sending a token once per rank save."""

from __future__ import annotations

import pytest
import torch

from moe_ep_plugin import EpBuffer, EpConfig
from tests.harness import run_ranks

TOKENS, HIDDEN, TOPK, EXPERTS, RANKS = 64, 2048, 8, 64, 8


def count(layout: str, wire: str, expand: str) -> tuple[int, int]:
    """(bytes this rank sent to others, bytes of a bf16 all-to-all of every (token, expert) from this rank)."""
    config = EpConfig(
        num_experts=EXPERTS,
        num_topk=TOPK,
        hidden=HIDDEN,
        max_tokens_per_rank=TOKENS,
        backend="host",
        device="cpu",
        expand=expand,  # type: ignore[arg-type]
    )
    with EpBuffer(None, config) as buffer:
        generator = torch.Generator().manual_seed(buffer.rank)
        idx = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOPK, dim=1).indices
        buffer.dispatch(torch.ones(TOKENS, HIDDEN).bfloat16(), idx, layout=layout, wire=wire)  # type: ignore[arg-type]
        leaving = int((idx // (EXPERTS // RANKS) != buffer.rank).sum())
        return buffer.stats.bytes_to_peers, leaving * HIDDEN * 2


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("layout", "wire", "expand", "saved"),
    [
        # 128 FP8 elements and their scale against 256 bytes, for every (token, expert).
        ("expert", "fp8", "direct", 1 - 132 / 256),
        ("rank", "fp8", "auto", 0.60),
        ("expert", "fp8", "two_stage", 0.60),
        ("rank", "bf16", "auto", 0.25),
    ],
)
def test_bytes_on_the_wire(layout: str, wire: str, expand: str, saved: float) -> None:
    counted = run_ranks(RANKS, count, layout, wire, expand)
    ours, plain = (sum(c[i] for c in counted) for i in (0, 1))
    assert 1 - ours / plain >= saved - 1e-9
    # Not fewer than the rows of distinct (token, rank) pairs: something was sent at all.
    assert ours > plain / 4
