"""Every CPU backend against a dense oracle, and host against collective, bit for bit, over random routings.

A case (drawn by hypothesis in the parent) fixes the ranks, experts, dtypes and options of one buffer; each case
runs several routings drawn from seeds, so that the inputs of all ranks are known on every rank. The number of
routings is counted and checked.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ep_plugin import CapacityError, DispatchOutput, EpBuffer, EpConfig

from .. import oracle
from ..conftest import why_unavailable

ROUTINGS_PER_CASE = 8
CASES_PER_RANK_COUNT = {1: 48, 2: 48, 3: 46, 4: 46, 5: 40, 6: 40}
assert ROUTINGS_PER_CASE * sum(CASES_PER_RANK_COUNT.values()) >= 2000

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One buffer and how it is used."""

    num_ranks: int
    num_experts: int
    expert_to_rank: tuple[int, ...] | None
    num_topk: int
    hidden: int
    dtype: torch.dtype
    heap_dtype: torch.dtype
    layout: str
    wire: str
    power_of_two_scales: bool
    expert_alignment: int
    expand: str
    max_tokens: int
    max_recv: str
    weighted: bool
    weighted_combine: bool
    values: bool
    reuse: bool
    leased: bool
    numbers: str
    seed: int

    def config(self, backend: str) -> EpConfig:
        return EpConfig(
            num_experts=self.num_experts,
            num_topk=self.num_topk,
            hidden=self.hidden,
            max_tokens_per_rank=max(self.max_tokens, 1),
            dtype=self.heap_dtype,
            backend=backend,
            device="cpu",
            wire="bf16" if self.wire == "plain" else "fp8",
            power_of_two_scales=self.power_of_two_scales,
            expert_alignment=self.expert_alignment,
            expert_to_rank=self.expert_to_rank,
            expand=self.expand,
            pool_bytes=1 << 22,
            timeout_s=30,
        )


@st.composite
def cases(draw: st.DrawFn, num_ranks: int) -> Case:
    num_experts = draw(st.integers(1, 10), label="num_experts")
    maps = st.tuples(*[st.integers(0, num_ranks - 1)] * num_experts)
    dtype = draw(st.sampled_from(DTYPES))
    unit = 16 // dtype.itemsize
    return Case(
        num_ranks=num_ranks,
        num_experts=num_experts,
        expert_to_rank=draw(st.none() | maps),
        num_topk=draw(st.integers(1, 6)),
        # One vector, odd multiples of it, and more than one FP8 block with a short last one.
        hidden=unit * draw(st.sampled_from([1, 2, 3, 5, 16, 128 // unit, 136 // unit, 264 // unit])),
        dtype=dtype,
        heap_dtype=draw(st.sampled_from([dtype, torch.float32])),
        layout=draw(st.sampled_from(["expert", "rank"])),
        wire=draw(st.sampled_from(["plain", "plain", "fp8", "fp8_input"])),
        power_of_two_scales=draw(st.booleans()),
        expert_alignment=draw(st.sampled_from([1, 4, 16])),
        expand=draw(st.sampled_from(["auto", "direct", "two_stage"])),
        max_tokens=draw(st.sampled_from([0, 1, 3, 9, 17])),
        max_recv=draw(st.sampled_from(["none", "none", "exact", "slack", "short"])),
        weighted=draw(st.booleans()),
        weighted_combine=draw(st.booleans()),
        values=draw(st.booleans()),
        reuse=draw(st.booleans()),
        leased=draw(st.booleans()),
        numbers=draw(st.sampled_from(["integer", "integer", "real"])),
        seed=draw(st.integers(0, 2**31)),
    )


class Inputs:
    """Everything that every rank puts into one routing of a case, and what must come out on rank ``me``."""

    def __init__(self, case: Case, seed: int, me: int) -> None:
        self.case, self.me = case, me
        rng = np.random.default_rng([case.seed, seed])
        kinds = ["uniform", "one_expert", "sparse", "distinct", "repeated", "one_rank_sends"]
        self.kind = str(rng.choice(kinds))
        rank_of = oracle.placement(case.num_experts, case.num_ranks, case.expert_to_rank)
        num_tokens = rng.integers(0, case.max_tokens + 1, case.num_ranks)
        if self.kind == "one_rank_sends":
            num_tokens[np.arange(case.num_ranks) != rng.integers(case.num_ranks)] = 0
        elif rng.random() < 0.3:
            num_tokens[:] = case.max_tokens
        favourite = int(rng.integers(case.num_experts))
        self.routing = oracle.Routing(rank_of, case.num_ranks, [self._topk(rng, int(n), favourite) for n in num_tokens])
        self.x = [self._numbers(rng, (int(n), case.hidden)).to(case.dtype) for n in num_tokens]
        self.weights = [self._numbers(rng, (int(n), case.num_topk)) for n in num_tokens]
        self.row_keys = [self.routing.rows(rank, case.layout, case.expert_alignment) for rank in range(case.num_ranks)]
        need = [len(keys) for keys in self.row_keys]
        slack = [int(s) for s in rng.integers(0, 9, case.num_ranks)]
        limits = {"exact": need, "slack": [n + s for n, s in zip(need, slack, strict=True)]}
        # Where nothing is received there is no limit too small; that routing runs without one.
        limits["short"] = [max(n - 1, 0) for n in need]
        self.max_recv = limits.get(case.max_recv)
        self.overflows = case.max_recv == "short" and any(need)
        if case.max_recv == "short" and not self.overflows:
            self.max_recv = None
        self.num_rows = need if self.max_recv is None or self.overflows else self.max_recv
        # What the experts return, garbage in padding rows included: nothing may read those.
        self.results, self.row_values = [], []
        for rank, keys in enumerate(self.row_keys):
            padding = torch.tensor(
                [k is None for k in keys] + [True] * (self.num_rows[rank] - len(keys)), dtype=torch.bool
            )
            rows = self._numbers(rng, (self.num_rows[rank], case.hidden)).to(case.dtype)
            shape = (self.num_rows[rank],) if case.layout == "expert" else (self.num_rows[rank], case.num_topk)
            values = self._numbers(rng, shape)
            rows[padding], values[padding] = float("nan"), float("nan")
            self.results.append(rows)
            self.row_values.append(values)

    def _topk(self, rng: np.random.Generator, num_tokens: int, favourite: int) -> np.ndarray:
        shape = (num_tokens, self.case.num_topk)
        num_experts = self.case.num_experts
        if self.kind == "one_expert":
            return np.full(shape, favourite)
        if self.kind == "repeated":
            return np.repeat(rng.integers(-1, num_experts, (num_tokens, 1)), self.case.num_topk, axis=1)
        if self.kind == "sparse":
            return np.where(rng.random(shape) < 0.7, -1, rng.integers(0, num_experts, shape))
        if self.kind == "distinct":
            ids = np.concatenate([np.arange(num_experts), np.full(self.case.num_topk, -1)])
            picks = [rng.permutation(num_experts + self.case.num_topk)[: self.case.num_topk] for _ in range(num_tokens)]
            return ids[np.array(picks, dtype=np.int64).reshape(shape)]
        return rng.integers(-1, num_experts, shape)

    def _numbers(self, rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
        if self.case.numbers == "integer":
            return torch.from_numpy(rng.integers(-4, 5, shape).astype(np.float32))
        spread = rng.choice([1e-3, 1.0, 30.0])
        return torch.from_numpy((rng.standard_normal(shape) * spread).astype(np.float32))

    # What must come out

    @cached_property
    def sent(self) -> list[tuple[torch.Tensor, ...]]:
        """Rows, and scales on the FP8 wire, as they cross from each rank."""
        if self.case.wire == "plain":
            return [(x,) for x in self.x]
        ends = np.cumsum([len(x) for x in self.x])[:-1].tolist()
        codes, scales = oracle.quantize(torch.cat(self.x).float().numpy(), self.case.power_of_two_scales)
        codes = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        return list(zip(codes.tensor_split(ends), torch.from_numpy(scales).tensor_split(ends), strict=True))

    def received(self, sources: list[torch.Tensor]) -> torch.Tensor:
        """The rows of each rank's ``sources`` that belong to the rows of rank ``me``; padding is zero."""
        out = torch.zeros(self.num_rows[self.me], *sources[0].shape[1:], dtype=sources[0].dtype)
        where = [i for i, key in enumerate(self.row_keys[self.me]) if key is not None]
        if where:
            first = np.cumsum([0, *[len(s) for s in sources]])
            at = [int(first[key[0]]) + key[1] for key in self.row_keys[self.me] if key is not None]
            bits(out)[where] = torch.cat([bits(s) for s in sources])[at]
        return out

    def expected_weights(self) -> torch.Tensor:
        weights = self.received(self.weights)
        if self.case.layout == "rank":
            return torch.where(self.expected_topk_idx >= 0, weights, 0.0)
        keys = self.row_keys[self.me]
        position = torch.zeros(len(weights), dtype=torch.int64)
        position[: len(keys)] = torch.tensor([0 if key is None else key[2] for key in keys], dtype=torch.int64)
        return weights.gather(1, position[:, None])[:, 0]

    @cached_property
    def expected_topk_idx(self) -> torch.Tensor:
        local = np.full(self.case.num_experts + 1, -1)
        experts = self.routing.experts_of(self.me)
        local[experts] = np.arange(len(experts))
        ids = self.received([torch.from_numpy(local[idx]) for idx in self.routing.topk_idx])
        ids[len(self.row_keys[self.me]) :] = -1
        return ids

    def expected_values(self) -> torch.Tensor:
        idx = self.routing.topk_idx[self.me]
        out = torch.zeros(idx.shape)
        where = [oracle.places(keys, self.me) for keys in self.row_keys]
        for (token, position), expert in np.ndenumerate(idx):
            if expert >= 0:
                rank = self.routing.rank_of[expert]
                if self.case.layout == "expert":
                    out[token, position] = self.row_values[rank][where[rank][self.me, token, position]]
                else:
                    out[token, position] = self.row_values[rank][where[rank][self.me, token], position]
        return out

    def row_weights(self) -> list[torch.Tensor] | None:
        """Weights beside each rank's rows, as a dispatch with weights delivers them (layout "expert")."""
        if self.case.layout == "rank" or not self.case.weighted_combine:
            return None
        out = []
        for rank, keys in enumerate(self.row_keys):
            weights = torch.full((self.num_rows[rank],), float("nan"))
            where = [i for i, key in enumerate(keys) if key is not None]
            sent = [float(self.weights[key[0]][key[1], key[2]]) for key in keys if key is not None]
            weights[where] = torch.tensor(sent)
            out.append(weights)
        return out


def bits(t: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers, so that NaN equals itself and -0 differs from 0."""
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.dtype.itemsize])


def same(what: str, got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    if want is None:
        assert got is None, f"{what} is {got}, not None"
        return
    assert got is not None, f"{what} is None"
    assert (got.shape, got.dtype) == (want.shape, want.dtype), (
        f"{what}: {got.shape} {got.dtype}, not {want.shape} {want.dtype}"
    )
    if not torch.equal(bits(got), bits(want)):
        at = (bits(got) != bits(want)).nonzero()
        first = tuple(at[0].tolist())
        raise AssertionError(
            f"{what} differs in {len(at)} of {got.numel()} places, first {first}: {got[first]}, not {want[first]}"
        )


def poison(out: DispatchOutput) -> None:
    """Fill what was received with ones before it returns to its pool: zeros must be written, not found."""
    out.x.view(torch.uint8).fill_(0xFF)
    if out.scale is not None:
        out.scale.fill_(float("nan"))
    if out.topk_weights is not None:
        out.topk_weights.fill_(float("nan"))


def check_dispatch(inputs: Inputs, out: DispatchOutput, weighted: bool) -> None:
    case, me = inputs.case, inputs.me
    same("x", out.x, inputs.received([rows for rows, *_ in inputs.sent]))
    same("scale", out.scale, None if case.wire == "plain" else inputs.received([scale for _, scale in inputs.sent]))
    same("topk_weights", out.topk_weights, inputs.expected_weights() if weighted else None)
    same("topk_idx", out.topk_idx, inputs.expected_topk_idx if case.layout == "rank" else None)
    counts = [len(g) for g in inputs.routing.groups(me)]
    padded = (
        [-(-n // case.expert_alignment) * case.expert_alignment for n in counts] if case.layout == "expert" else counts
    )
    same("tokens_per_expert", out.tokens_per_expert, torch.tensor(padded, dtype=torch.int64))
    handle = out.handle
    same("handle.tokens_per_expert", handle.tokens_per_expert, torch.tensor(counts, dtype=torch.int64))
    assert handle.layout == case.layout
    assert (handle.num_tokens, handle.num_topk) == inputs.routing.topk_idx[me].shape
    assert handle.num_rows == inputs.num_rows[me]
    assert handle.num_received == sum(key is not None for key in inputs.row_keys[me])
    assert out.event.query()


def run_routing(case: Case, seed: int, buffer: EpBuffer) -> dict[str, torch.Tensor | None]:
    """One routing on one buffer, checked against the oracle; returns all results for comparison."""
    inputs = Inputs(case, seed, buffer.rank)
    me = buffer.rank
    x = inputs.x[me]
    sent = inputs.sent[me] if case.wire == "fp8_input" else x
    idx = torch.from_numpy(inputs.routing.topk_idx[me].astype(np.int64))
    weights = inputs.weights[me] if case.weighted else None
    limit = None if inputs.max_recv is None else inputs.max_recv[me]
    if inputs.overflows:
        with pytest.raises(CapacityError, match="max_recv_tokens"):
            buffer.dispatch(sent, idx, weights, layout=case.layout, max_recv_tokens=limit)
        limit = None
    out = buffer.dispatch(sent, idx, weights, layout=case.layout, max_recv_tokens=limit)
    check_dispatch(inputs, out, case.weighted)
    handle = out.handle
    results = {"x": out.x, "scale": out.scale, "topk_weights": out.topk_weights, "topk_idx": out.topk_idx}
    results = {name: None if t is None else t.clone() for name, t in results.items()}
    if case.reuse:
        # The first result is still alive here, so a second one must not land on it.
        again = buffer.dispatch(sent, topk_weights=inputs.weights[me], handle=handle)
        check_dispatch(inputs, again, weighted=True)
        check_dispatch(inputs, out, case.weighted)
        poison(again)
        del again
    poison(out)
    del out

    rows = inputs.results[me]
    if case.leased:
        leased = buffer.empty_rows(handle, case.dtype)
        assert (leased.shape, leased.dtype) == (rows.shape, rows.dtype)
        rows = leased.copy_(rows)
    before = rows.clone()
    all_weights = inputs.row_weights()
    values = inputs.row_values[me] if case.values else None
    back = buffer.combine_with_values(
        rows, handle, topk_weights=None if all_weights is None else all_weights[me], row_values=values
    )
    same("rows after combine", rows, before)
    want = oracle.combine(inputs.routing, me, case.layout, inputs.row_keys, inputs.results, all_weights)
    same("combine", back.x, want)
    same("row_values", back.row_values, inputs.expected_values() if case.values else None)
    return results | {"combined": back.x, "values": back.row_values}


def run_case(case: Case, backends: tuple[str, ...], routings: int) -> int:
    """All routings of a case on each backend; returns how many were compared."""
    with ExitStack() as stack:
        buffers = [stack.enter_context(EpBuffer(None, case.config(name))) for name in backends]
        assert [b.backend for b in buffers] == list(backends)
        for seed in range(routings):
            results = [run_routing(case, seed, buffer) for buffer in buffers]
            for name, first in results[0].items():
                for other in results[1:]:
                    same(f"{name} of {backends}", first, other[name])
    return routings


@pytest.mark.parametrize("num_ranks", range(1, 7))
def test_random_routings(ranks, backend, num_ranks):
    """Against the oracle; and for host, against collective in the same process."""
    pool = ranks(num_ranks)
    backends = ("collective",) if backend == "collective" else ("collective", backend)
    # Where host is built, its turn puts collective through all of these cases; a few show that it stands alone.
    num_cases = 4 if backend == "collective" and not why_unavailable("host") else CASES_PER_RANK_COUNT[num_ranks]
    compared = 0

    @settings(max_examples=num_cases)
    @given(case=cases(num_ranks))
    def check(case: Case) -> None:
        nonlocal compared
        counts = pool.run(run_case, case, backends, ROUTINGS_PER_CASE)
        compared += counts[0]

    check()
    assert compared >= ROUTINGS_PER_CASE * num_cases


def bits_of_two_runs(case: Case, backend: str) -> None:
    with EpBuffer(None, case.config(backend)) as first:
        one = [run_routing(case, seed, first) for seed in range(4)]
    with EpBuffer(None, case.config(backend)) as second:
        # Other routings in between, so that memory and counters are not where they were.
        two = [run_routing(case, seed, second) for seed in (0, 3, 1, 2, 3)]
    for a, b in zip(one, [two[0], two[2], two[3], two[4]], strict=True):
        for name in a:
            same(name, a[name], b[name])


DENSE = Case(
    num_ranks=4,
    num_experts=8,
    expert_to_rank=None,
    num_topk=4,
    hidden=264,
    dtype=torch.bfloat16,
    heap_dtype=torch.bfloat16,
    layout="expert",
    wire="plain",
    power_of_two_scales=False,
    expert_alignment=4,
    expand="auto",
    max_tokens=40,
    max_recv="none",
    weighted=True,
    weighted_combine=True,
    values=True,
    reuse=True,
    leased=True,
    numbers="real",
    seed=1,
)


def test_two_runs_give_the_same_bits(ranks, backend):
    ranks(4).run(bits_of_two_runs, DENSE, backend)


def overflow_on_one_rank(backend: str) -> None:
    """Only the last rank's limit is too small; every rank must say so, and go on."""
    me, num_ranks = dist.get_rank(), dist.get_world_size()
    need = 4 * num_ranks
    for layout in ("expert", "rank"):
        config = EpConfig(
            num_experts=num_ranks,
            num_topk=1,
            hidden=8,
            max_tokens_per_rank=4,
            backend=backend,
            device="cpu",
            timeout_s=20,
        )
        x = torch.full((4, 8), me, dtype=torch.bfloat16)
        to_last = torch.full((4, 1), num_ranks - 1)
        with EpBuffer(None, config) as buffer:
            for _ in range(3):
                with pytest.raises(CapacityError, match=rf"rank {num_ranks - 1}\b.*\b{need}\b.*\b{need - 1}\b"):
                    buffer.dispatch(x, to_last, layout=layout, max_recv_tokens=need - 1 if me == num_ranks - 1 else 64)
                out = buffer.dispatch(x, to_last, layout=layout, max_recv_tokens=need + 1)
                received = need if me == num_ranks - 1 else 0
                assert out.x.shape == (need + 1, 8)
                assert out.handle.num_received == received
                assert not out.x[received:].any()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_overflow_is_raised_on_all_ranks(ranks, backend, num_ranks):
    ranks(num_ranks).run(overflow_on_one_rank, backend)


def narrower_rows(backend: str) -> None:
    """A buffer for fp32 carries bf16 and fp16 rows too, in any order of calls."""
    rng = np.random.default_rng(7)
    config = EpConfig(
        num_experts=4, num_topk=2, hidden=16, max_tokens_per_rank=8, dtype=torch.float32, backend=backend, device="cpu"
    )
    with EpBuffer(None, config) as buffer:
        for dtype in (torch.float16, torch.float32, torch.bfloat16) * 3:
            x = torch.from_numpy(rng.integers(-9, 9, (5, 16))).to(dtype)
            idx = torch.from_numpy(rng.integers(0, 4, (5, 2)))
            out = buffer.dispatch(x, idx)
            assert torch.equal(buffer.combine(out.x, out.handle), x * 2)


def test_dtypes_mix_on_one_buffer(ranks, backend):
    ranks(3).run(narrower_rows, backend)


def held_results(backend: str) -> None:
    """Results kept alive stay what they were while many more operations run and the buffer closes."""
    me = dist.get_rank()
    config = EpConfig(num_experts=4, num_topk=2, hidden=32, max_tokens_per_rank=16, backend=backend, device="cpu")
    kept = []
    with EpBuffer(None, config) as buffer:
        for step in range(60):
            generator = torch.Generator().manual_seed(step * 100 + me)
            x = torch.randint(-9, 9, (16, 32), generator=generator).to(torch.bfloat16)
            out = buffer.dispatch(x, torch.randint(0, 4, (16, 2), generator=generator))
            if step % 7 == 0:
                kept.append((out.x, out.x.clone()))
            assert torch.equal(buffer.combine(out.x, out.handle), x * 2)
    for tensor, copy in kept:
        assert torch.equal(tensor, copy)


def test_results_outlive_later_operations_and_close(ranks, backend):
    ranks(2).run(held_results, backend)
