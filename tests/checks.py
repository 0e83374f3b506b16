"""Runs random routings through buffers, of any backend and device, and compares what they return with the oracle.

A buffer gets copies of the inputs on its device; results are compared on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moe_ep_plugin import CapacityError, DispatchOutput, EpBuffer

from .cases import Case, Inputs, Place, bits
from .harness import RankPool


def same(what: str, got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    """``got``, from any device, has exactly the bits of ``want``."""
    if want is None:
        assert got is None, f"{what} is {got}, not None"
        return
    assert got is not None, f"{what} is None"
    assert (got.shape, got.dtype) == (want.shape, want.dtype), (
        f"{what}: {got.shape} {got.dtype}, not {want.shape} {want.dtype}"
    )
    got = got.cpu()
    if not torch.equal(bits(got), bits(want)):
        at = (bits(got) != bits(want)).nonzero()
        first = tuple(at[0].tolist())
        raise AssertionError(
            f"{what} differs in {len(at)} of {got.numel()} places, first {first}: {got[first]}, not {want[first]}"
        )


def poison(*tensors: torch.Tensor | None) -> None:
    """Fill with ones before memory returns to where it came from: zeros must be written, not found."""
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            tensor.view(torch.uint8).fill_(0xFF)


def poison_output(out: DispatchOutput) -> None:
    poison(out.x, out.scale, out.topk_weights)


def check_dispatch(inputs: Inputs, out: DispatchOutput, weighted: bool, place: Place) -> None:
    case, me, handle = inputs.case, inputs.me, out.handle
    out.event.synchronize()
    assert out.event.query()
    same("x", out.x, inputs.received([rows for rows, *_ in inputs.sent]))
    same("scale", out.scale, None if case.wire == "plain" else inputs.received([scale for _, scale in inputs.sent]))
    same("topk_weights", out.topk_weights, inputs.expected_weights() if weighted else None)
    same("topk_idx", out.topk_idx, inputs.expected_topk_idx if case.layout == "rank" else None)
    counts = [len(g) for g in inputs.routing.groups(me)]
    padded = (
        [-(-n // case.expert_alignment) * case.expert_alignment for n in counts] if case.layout == "expert" else counts
    )
    same("tokens_per_expert", out.tokens_per_expert, torch.tensor(padded, dtype=torch.int64))
    same("handle.tokens_per_expert", handle.tokens_per_expert, torch.tensor(counts, dtype=torch.int64))
    assert handle.layout == case.layout
    assert (handle.num_tokens, handle.num_topk) == inputs.routing.topk_idx[me].shape
    assert handle.num_rows == inputs.num_rows[me]
    only_device_knows = place.backend == "cuda" and handle.max_recv_tokens is not None
    received = sum(key is not None for key in inputs.row_keys[me])
    assert handle.num_received == (None if only_device_knows else received)
    assert out.x.device.type == place.device
    sizes = {out.tokens_per_expert.device.type, handle.tokens_per_expert.device.type}
    assert sizes == {"cuda" if only_device_knows else "cpu"}


def check_overflow(call: Callable[[], DispatchOutput], buffer: EpBuffer) -> None:
    """``call`` dispatches more than fits: told at once, or by check() where the host did not wait for sizes."""
    if buffer.backend != "cuda":
        with pytest.raises(CapacityError, match="max_recv_tokens"):
            call()
        return
    out = call()
    assert not bits(out.x).any(), "rows of a dispatch that did not fit"
    assert out.topk_idx is None or bool((out.topk_idx == -1).all())
    with pytest.raises(CapacityError, match="max_recv_tokens"):
        buffer.check()


def run_routing(inputs: Inputs, buffer: EpBuffer) -> dict[str, torch.Tensor | None]:
    """One routing on one buffer, checked against the oracle; returns all results for comparison, on the CPU."""
    case, me = inputs.case, inputs.me
    place = Place(buffer.backend, buffer.config.device_type)

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(place.device, copy=True)

    sent = tuple(map(placed, inputs.sent[me])) if case.wire == "fp8_input" else placed(inputs.x[me])
    idx = placed(torch.from_numpy(inputs.routing.topk_idx[me].astype(np.int64)))
    weights = placed(inputs.weights[me])
    some_weights = weights if case.weighted else None
    limit = None if inputs.max_recv is None else inputs.max_recv[me]
    if inputs.overflows:
        check_overflow(
            lambda: buffer.dispatch(sent, idx, some_weights, layout=case.layout, max_recv_tokens=limit), buffer
        )
        limit = None
    out = buffer.dispatch(sent, idx, some_weights, layout=case.layout, max_recv_tokens=limit)
    check_dispatch(inputs, out, case.weighted, place)
    handle = out.handle
    results = {"x": out.x, "scale": out.scale, "topk_weights": out.topk_weights, "topk_idx": out.topk_idx}
    results = {name: None if t is None else t.to("cpu", copy=True) for name, t in results.items()}
    if case.reuse:
        # The first result is still alive here, so a second one must not land on it.
        again = buffer.dispatch(sent, topk_weights=weights, handle=handle)
        check_dispatch(inputs, again, True, place)
        check_dispatch(inputs, out, case.weighted, place)
        poison_output(again)
        del again
    poison_output(out)
    del out

    rows = placed(inputs.results[me])
    if case.leased:
        leased = buffer.empty_rows(handle, case.dtype)
        assert (leased.shape, leased.dtype, leased.device.type) == (rows.shape, rows.dtype, place.device)
        rows = leased.copy_(rows)
    row_weights = inputs.row_weights()
    back = buffer.combine_with_values(
        rows,
        handle,
        topk_weights=None if row_weights is None else placed(row_weights[me]),
        row_values=placed(inputs.row_values[me]) if case.values else None,
    )
    after = rows.clone()
    poison(rows)  # The caller may write there again as soon as combine has returned.
    same("rows after combine", after, inputs.results[me])
    same("combine", back.x, inputs.expected_sums(case.rounds_partials(buffer)))
    same("row_values", back.row_values, inputs.expected_values() if case.values else None)
    values = None if back.row_values is None else back.row_values.to("cpu", copy=True)
    results |= {"combined": back.x.to("cpu", copy=True), "values": values}
    poison(back.x, back.row_values)
    return results


def run_case(case: Case, places: tuple[Place, ...], routings: int) -> int:
    """All routings of a case in each place; returns how many were compared."""
    with ExitStack() as stack:
        buffers = [stack.enter_context(EpBuffer(None, case.config(place))) for place in places]
        for buffer in buffers:
            if case.overlaps_stages and buffer.backend == "cuda":
                buffer._backend.communicator.tune(overlap_stages=1)  # type: ignore[attr-defined]
        assert [b.backend for b in buffers] == [place.backend for place in places]
        for seed in range(routings):
            inputs = Inputs(case, seed, buffers[0].rank)
            results = [run_routing(inputs, buffer) for buffer in buffers]
            for place, buffer, other in zip(places[1:], buffers[1:], results[1:], strict=True):
                alike = case.rounds_partials(buffer) == case.rounds_partials(buffers[0])
                for name, first in results[0].items():
                    if alike or name != "combined":
                        same(f"{name} of {places[0]} and {place}", first, other[name])
    return routings


def run_random(
    pool: RankPool,
    drawn: st.SearchStrategy[Any],
    num_cases: int,
    places: tuple[Place, ...],
    routings: int,
    *,
    run: Callable[..., int] = run_case,
    phases: Sequence[Phase] = tuple(Phase),
) -> int:
    """Draw cases and ``run`` each on the pool's ranks; returns how many routings were compared."""
    compared = 0

    @settings(max_examples=num_cases, phases=phases)
    @given(case=drawn)
    def check(case: Any) -> None:
        nonlocal compared
        compared += pool.run(run, case, places, routings)[0]

    check()
    return compared
