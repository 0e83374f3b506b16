"""The works that bench_throughput.py times, and the bytes that each has to read and write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from throughput_data import Counts
from throughput_session import Session

Call = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """One thing to time.

    Attributes:
        bytes: What it has to read and write.
        make: From a session: the call, and the check of what the call returns.
        expand: The setting of the buffer.
        in_l2: The bytes if staging stays in the L2 cache.
        uses_sms: Whether the number of SMs that it is given makes a difference.
    """

    bytes: Callable[[Counts], int]
    make: Callable[[Session], tuple[Call, Callable[[Any], None]]]
    expand: str = "auto"
    in_l2: Callable[[Counts], int] | None = None
    uses_sms: bool = True


def dispatch_of(layout: str, wire: str = "bf16", reuse: bool = False, fixed: bool = False) -> Callable[..., Any]:
    """Maker of a dispatch."""

    def make(session: Session) -> tuple[Call, Callable[[Any], None]]:
        handle = session.dispatch(layout).handle if reuse else None
        limit = session.data.max_recv if fixed else None
        return (
            lambda: session.dispatch(layout, wire=wire, handle=handle, max_recv_tokens=limit),
            lambda out: session.data.check_dispatch(out, layout, wire, limit),
        )

    return make


def combine_of(layout: str, leased: bool = True) -> Callable[..., Any]:
    """Maker of a combine."""

    def make(session: Session) -> tuple[Call, Callable[[Any], None]]:
        rows, (handle, weights) = session.combine_rows(layout, leased)
        return (
            lambda: session.buffer.combine(rows, handle, topk_weights=weights, num_sms=session.sms),
            lambda y: session.data.check_combine(y, layout),
        )

    return make


def _rank_bytes(c: Counts) -> int:
    return (c.tokens + c.rank_rows) * c.row


def _rank_fp8_bytes(c: Counts) -> int:
    return c.tokens * c.row + c.rank_rows * c.fp8_row


def _expert_bytes(c: Counts) -> int:
    return (c.tokens + c.expert_rows) * c.row


def _two_stage_bytes(c: Counts) -> int:
    return (c.tokens + 2 * c.rank_rows + c.expert_rows) * c.row


WORKS = {
    "dispatch_rank": Work(_rank_bytes, dispatch_of("rank")),
    "dispatch_rank_handle": Work(_rank_bytes, dispatch_of("rank", reuse=True)),
    "dispatch_rank_fp8": Work(_rank_fp8_bytes, dispatch_of("rank", "fp8")),
    "dispatch_rank_fp8_handle": Work(_rank_fp8_bytes, dispatch_of("rank", "fp8", reuse=True)),
    "combine_rank": Work(_rank_bytes, combine_of("rank")),
    "combine_rank_any": Work(
        lambda c: (3 * c.rank_rows + c.tokens) * c.row, combine_of("rank", leased=False), in_l2=_rank_bytes
    ),
    "dispatch_expert": Work(_expert_bytes, dispatch_of("expert")),
    "dispatch_expert_handle": Work(_expert_bytes, dispatch_of("expert", reuse=True)),
    "dispatch_expert_fp8": Work(lambda c: c.tokens * c.row + c.expert_rows * c.fp8_row, dispatch_of("expert", "fp8")),
    "combine_expert": Work(_expert_bytes, combine_of("expert")),
    "dispatch_expert_2stage": Work(_two_stage_bytes, dispatch_of("expert"), "two_stage"),
    "combine_expert_2stage": Work(_two_stage_bytes, combine_of("expert"), "two_stage"),
    "dispatch_rank_max": Work(lambda c: (c.tokens + c.max_rows) * c.row, dispatch_of("rank", fixed=True)),
}
