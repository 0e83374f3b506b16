"""The works that bench_low_latency.py times, and the bytes that each has to read and write."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from low_latency_session import LowSession
from throughput_data import Counts
from throughput_works import Call, dispatch_of

Made = tuple[Call, Callable[[Any], None]]
"""A call, and the check of what it returns."""


@dataclass(frozen=True)
class Work:
    """One thing to time.

    Attributes:
        bytes: What it has to read and write.
        make: From a session, and whether the halves are launched apart: the call and its check.
        beside: The works of the baselines that do the same, without their prefix.
        with_copies: The bytes with those of the copies that it makes on the way, if all of them go through memory.
    """

    bytes: Callable[[Counts], int]
    make: Callable[[LowSession, bool], Made]
    beside: tuple[str, ...]
    with_copies: Callable[[Counts], int] | None = None


def low_dispatch(wire: str) -> Callable[[LowSession, bool], Made]:
    """Maker of a low-latency dispatch."""

    def make(session: LowSession, split: bool) -> Made:
        return lambda: session.send(wire, split).wait(), lambda out: session.data.check_slots(out, wire)

    return make


def low_combine(leased: bool, wire: str = "bf16", registered: bool = False) -> Callable[[LowSession, bool], Made]:
    """Maker of a low-latency combine; calls use the two sets of slots in turn."""

    def make(session: LowSession, split: bool) -> Made:
        turns = [(*turn, torch.empty_like(session.data.x)) for turn in session.dispatched(leased)]
        if registered:
            session.buffer.register_rows(*[rows for rows, _, _ in turns])
        turn = itertools.cycle(turns)
        options = {"zero_copy": leased, "wire": wire}

        def call() -> Any:
            rows, handle, out = next(turn)
            return session.send_back(rows, handle, split=split, out=out, **options).wait()

        return call, session.data.check_combined

    return make


def step(session: LowSession, split: bool) -> Made:
    """Dispatch, FP8 wire, then combine of rows that lie in place: what the experts would have written is there."""
    session.dispatched(leased=True)  # Fills the rows of both sets of slots; they keep what they hold.
    outs = itertools.cycle([torch.empty_like(session.data.x) for _ in range(2)])

    def call() -> Any:
        received = session.send("fp8", split).wait()
        rows = session.buffer.empty_rows(received.handle)
        return session.send_back(rows, received.handle, split=split, out=next(outs), zero_copy=True).wait()

    return call, session.data.check_combined


def throughput_dispatch(session: LowSession, split: bool) -> Made:
    """``EpBuffer.dispatch``, bf16, layout "expert", a fixed number of rows."""
    return dispatch_of("expert", fixed=True)(session)


def throughput_combine(session: LowSession, split: bool) -> Made:
    """``EpBuffer.combine`` of leased rows, weighted, of a dispatch with a fixed number of rows."""
    out = session.dispatch("expert", max_recv_tokens=session.data.max_recv)
    rows = session.data.fill_dense(session.buffer.empty_rows(out.handle))
    handle, weights = out.handle, out.topk_weights.clone()
    session.buffer.check()
    return (
        lambda: session.buffer.combine(rows, handle, topk_weights=weights, num_sms=session.sms),
        session.data.check_sums,
    )


def _fp8_dispatch(c: Counts) -> int:
    return c.tokens * c.row + c.expert_rows * c.fp8_row


def _bf16(c: Counts) -> int:
    return (c.tokens + c.expert_rows) * c.row


WORKS = {
    "dispatch_fp8": Work(_fp8_dispatch, low_dispatch("fp8"), ("dispatch",)),
    "dispatch_bf16": Work(_bf16, low_dispatch("bf16"), ("dispatch",)),
    "combine_zero_copy": Work(_bf16, low_combine(leased=True), ("combine",)),
    "combine_any": Work(
        _bf16, low_combine(leased=False), ("combine",), lambda c: (3 * c.expert_rows + c.tokens) * c.row
    ),
    "combine_registered": Work(_bf16, low_combine(leased=False, registered=True), ("combine",)),
    "combine_fp8": Work(
        _bf16, low_combine(leased=False, wire="fp8"), ("combine",), lambda c: _bf16(c) + 2 * c.expert_rows * c.fp8_row
    ),
    "step": Work(lambda c: _fp8_dispatch(c) + _bf16(c), step, ("dispatch", "combine")),
}
THROUGHPUT = {
    "throughput_dispatch": Work(_bf16, throughput_dispatch, ()),
    "throughput_combine": Work(_bf16, throughput_combine, ()),
}
COLLECTIVE = {
    "collective_dispatch": Work(_bf16, low_dispatch("bf16"), ()),
    "collective_combine": Work(_bf16, low_combine(leased=False), ()),
}
ALL = WORKS | THROUGHPUT | COLLECTIVE
