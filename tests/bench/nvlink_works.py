"""The works that bench_nvlink.py times, and the bytes of each that cross between ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from nvlink_baselines import PermuteAllToAll, packed_fp8, unpacked_fp8
from throughput_data import Counts
from throughput_session import Session
from throughput_works import WORKS, Call, Work, dispatch_of

Made = tuple[Call, Callable[[Any], None]]


@dataclass(frozen=True)
class LinkWork(Work):
    """A work of which the bytes between ranks matter.

    Attributes:
        crossing: Bytes of rows that leave their rank, of all ranks.
        published_as: Bytes that DeepEP's convention counts: one row for every (token, rank), the rank's own as well.
        baseline: The work that does the same by a collective; None for these themselves.
    """

    crossing: Callable[[Counts], int] = lambda _: 0
    published_as: Callable[[Counts], int] = lambda _: 0
    baseline: str | None = None


def collective_dispatch(layout: str, wire: str = "bf16") -> Callable[[Any], Made]:
    """Maker of the baseline's dispatch; fp8 rows are quantised beforehand, so this costs it nothing."""

    def make(session: Any) -> Made:
        data = session.data
        baseline = PermuteAllToAll(data, layout, session.team.collective_group)
        rows = packed_fp8(data.x) if wire == "fp8" else data.x

        def check(received: Any) -> None:
            out = unpacked_fp8(received, data.shape.hidden) if wire == "fp8" else SimpleNamespace(x=received)
            data.check_rows(out, layout, wire)

        return lambda: baseline.dispatch(rows), check

    return make


def collective_combine(layout: str) -> Callable[[Any], Made]:
    """Maker of the baseline's combine, with what a dispatch left; of two ways of summing, the faster one."""

    def make(session: Any) -> Made:
        data = session.data
        baseline = PermuteAllToAll(data, layout, session.team.collective_group)
        plan = baseline.plan()
        way_back = baseline.inverse(plan)
        # Our own dispatch says how many rows each expert has; its rows are compared elsewhere.
        out = session.dispatch(layout)
        rows = data.fill(out.x.new_empty(out.x.shape), out, layout)
        del out
        session.buffer.check()
        sums = baseline.faster_sums(session.team, rows, plan, way_back)
        return lambda: baseline.combine(rows, plan, way_back, sums), lambda y: data.check_combine(y, layout)

    return make


def _rank_rows(c: Counts) -> int:
    return c.crossing_rank_rows * c.row


def _rank_fp8_rows(c: Counts) -> int:
    return c.crossing_rank_rows * c.fp8_row


def _expert_rows(c: Counts) -> int:
    return c.crossing_expert_rows * c.row


def _expert_fp8_rows(c: Counts) -> int:
    return c.crossing_expert_rows * c.fp8_row


def _published(c: Counts) -> int:
    return c.rank_rows * c.row


def _published_fp8(c: Counts) -> int:
    return c.rank_rows * c.fp8_row


def _ours(name: str, expand: str, crossing: Callable[[Counts], int], baseline: str) -> LinkWork:
    """One of bench_throughput.py's works."""
    work = WORKS[name]
    published = _published_fp8 if "fp8" in name else _published
    return LinkWork(
        work.bytes, work.make, expand, crossing=crossing, published_as=published, baseline=f"collective_{baseline}"
    )


def _collective(make: Callable[[Session], Made], crossing: Callable[[Counts], int], fp8: bool = False) -> LinkWork:
    # Its memory traffic depends on what the collective does; bytes that cross don't. Our SMs mean nothing to it.
    published = _published_fp8 if fp8 else _published
    return LinkWork(crossing, make, "direct", uses_sms=False, crossing=crossing, published_as=published)


# The expansion of layout "rank" makes no difference; "direct" lets these share a buffer with the baselines.
LINK_WORKS: dict[str, LinkWork] = {
    "collective_dispatch_rank": _collective(collective_dispatch("rank"), _rank_rows),
    "collective_dispatch_rank_fp8": _collective(collective_dispatch("rank", "fp8"), _rank_fp8_rows, True),
    "collective_combine_rank": _collective(collective_combine("rank"), _rank_rows),
    "collective_dispatch_expert": _collective(collective_dispatch("expert"), _expert_rows),
    "collective_dispatch_expert_fp8": _collective(collective_dispatch("expert", "fp8"), _expert_fp8_rows, True),
    "collective_combine_expert": _collective(collective_combine("expert"), _expert_rows),
    "dispatch_rank": _ours("dispatch_rank", "direct", _rank_rows, "dispatch_rank"),
    "dispatch_rank_handle": _ours("dispatch_rank_handle", "direct", _rank_rows, "dispatch_rank"),
    "dispatch_rank_fp8": _ours("dispatch_rank_fp8", "direct", _rank_fp8_rows, "dispatch_rank_fp8"),
    "combine_rank": _ours("combine_rank", "direct", _rank_rows, "combine_rank"),
    "dispatch_expert_direct": _ours("dispatch_expert", "direct", _expert_rows, "dispatch_expert"),
    "dispatch_expert_fp8_direct": _ours("dispatch_expert_fp8", "direct", _expert_fp8_rows, "dispatch_expert_fp8"),
    "combine_expert_direct": _ours("combine_expert", "direct", _expert_rows, "combine_expert"),
    "dispatch_expert_2stage": _ours("dispatch_expert_2stage", "two_stage", _rank_rows, "dispatch_expert"),
    "dispatch_expert_fp8_2stage": LinkWork(
        lambda c: c.tokens * c.row + 2 * c.rank_rows * c.fp8_row + c.expert_rows * c.fp8_row,
        dispatch_of("expert", "fp8"),
        "two_stage",
        crossing=_rank_fp8_rows,
        published_as=_published_fp8,
        baseline="collective_dispatch_expert_fp8",
    ),
    "combine_expert_2stage": _ours("combine_expert_2stage", "two_stage", _rank_rows, "combine_expert"),
}
