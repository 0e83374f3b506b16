"""Random routings for low-latency mode: the cases that are drawn, what goes in on every rank, what must come out.

The counterpart of ``cases.py``; ``low_latency_checks.py`` puts these through buffers. All tensors here are on the CPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from moe_ep_plugin import EpConfig

from . import oracle
from .cases import DTYPES, Place, as_sent, bits, draw_numbers, draw_topk

ORDERS = ("one", "pair", "reversed", "pipeline")
"""Of a few steps' calls: one step after the other, or two results in flight; see ``low_latency_checks.run_steps``."""


@dataclass(frozen=True)
class LowLatencyCase:
    """One buffer and how it is used."""

    num_ranks: int
    num_experts: int
    expert_to_rank: tuple[int, ...] | None
    num_topk: int
    hidden: int
    dtype: torch.dtype
    rows_dtype: torch.dtype
    heap_dtype: torch.dtype
    layout: str
    wire: str
    heap_wire: str
    combine_wire: str
    power_of_two_scales: bool
    tokens_per_rank: int
    weighted: bool
    leaves_out: bool
    in_place: bool
    gives_out: bool
    async_op: bool
    order: str
    mixed: bool
    numbers: str
    seed: int
    num_sms: int | None = None

    @property
    def capacity(self) -> int:
        return self.num_ranks * self.tokens_per_rank

    def config(self, place: Place, **changes: object) -> EpConfig:
        settings = {
            "num_experts": self.num_experts,
            "num_topk": self.num_topk,
            "hidden": self.hidden,
            "max_tokens_per_rank": self.tokens_per_rank,
            "low_latency_tokens_per_rank": self.tokens_per_rank,
            "low_latency_layout": self.layout,
            "dtype": self.heap_dtype,
            "wire": self.heap_wire,
            "power_of_two_scales": self.power_of_two_scales,
            "expert_to_rank": self.expert_to_rank,
            "num_sms": self.num_sms,
            "pool_bytes": 1 << 22,
            "timeout_s": 30,
        }
        return EpConfig(**(settings | place._asdict() | changes))


def make_case(pick: Callable[[Sequence[Any]], Any], num_ranks: int, *, large: bool = False) -> LowLatencyCase:
    """A case of ``num_ranks`` whose every choice is made by ``pick``.

    With ``large``, what several blocks of a GPU's grid are needed for: long rows, many experts, more tokens, and
    numbers of SMs.
    """
    num_experts = pick([1, 2, 3, 5, 8, 10, 64, 200] if large else range(1, 11))
    dtype = pick(DTYPES)
    unit = 16 // dtype.itemsize
    # One vector, odd multiples of it, and more than one FP8 block with a short last one.
    widths = [1, 2, 3, 5, 16, 128 // unit, 136 // unit, 264 // unit]
    widths += [2048 // unit, 7168 // unit] if large else []
    hidden = unit * pick(widths)
    heap_dtype = pick([dtype, torch.float32])
    fitting = [d for d in DTYPES if d.itemsize <= heap_dtype.itemsize and hidden * d.itemsize % 16 == 0]
    wire = pick(["plain", "plain", "fp8", "fp8_input"])
    combine_wire = pick(["bf16", "bf16", "fp8"])
    return LowLatencyCase(
        num_ranks=num_ranks,
        num_experts=num_experts,
        expert_to_rank=tuple(pick(range(num_ranks)) for _ in range(num_experts)) if pick([False, True]) else None,
        num_topk=pick(range(1, 7)),
        hidden=hidden,
        dtype=dtype,
        rows_dtype=pick([dtype, dtype, *fitting]),
        heap_dtype=heap_dtype,
        layout=pick(["expert", "rank"]),
        wire=wire,
        heap_wire="bf16" if wire == "plain" else pick(["bf16", "fp8"]),
        combine_wire=combine_wire,
        power_of_two_scales=pick([False, True]),
        tokens_per_rank=pick([1, 3, 9, 17, *([40, 70] if large and hidden < 2048 else [])]),
        weighted=pick([True, False]),
        leaves_out=pick([False, True]),
        in_place=combine_wire == "bf16" and pick([False, True]),
        gives_out=pick([False, True]),
        async_op=pick([False, True]),
        order=pick(ORDERS),
        mixed=pick([False, False, True]),
        numbers=pick(["integer", "real"]),
        seed=pick(range(1 << 31)),
        num_sms=pick([None, 1, 2, 7, 12]) if large else None,
    )


@st.composite
def low_latency_cases(draw: st.DrawFn, num_ranks: int) -> LowLatencyCase:
    """Cases that shrink to simple ones. Many of those drawn differ from another one in a few choices only."""
    return make_case(lambda options: draw(st.sampled_from(options)), num_ranks)


def independent_cases(num_ranks: int, *, large: bool = True) -> st.SearchStrategy[LowLatencyCase]:
    """Cases without anything in common: more is seen in few of them, and a failure does not shrink."""

    def case(seed: int) -> LowLatencyCase:
        # Hypothesis draws the same seeds for each number of ranks.
        return make_case(random.Random(f"{seed} {num_ranks} {large}").choice, num_ranks, large=large)

    return st.integers(0, (1 << 63) - 1).map(case)


class LowLatencyInputs:
    """Everything that every rank puts into one step of a case, and what must come out on rank ``me``."""

    def __init__(self, case: LowLatencyCase, seed: int, me: int) -> None:
        self.case, self.me = case, me
        rng = np.random.default_rng([case.seed, seed])
        kinds = ["uniform", "all_to_one", "one_rank", "sparse", "distinct", "repeated", "one_rank_sends"]
        self.kind = str(rng.choice(kinds))
        self.num_topk = int(rng.integers(1, case.num_topk + 1)) if rng.random() < 0.2 else case.num_topk
        num_tokens = rng.integers(0, case.tokens_per_rank + 1, case.num_ranks)
        if self.kind == "one_rank_sends":
            num_tokens[np.arange(case.num_ranks) != rng.integers(case.num_ranks)] = 0
        elif rng.random() < 0.3:
            num_tokens[:] = case.tokens_per_rank
        self._rank_of = oracle.placement(case.num_experts, case.num_ranks, case.expert_to_rank)
        favourite = int(rng.integers(case.num_experts))
        drawn = self._routing([self._topk(rng, int(n), favourite) for n in num_tokens])
        most = max(len(group) for rank in range(case.num_ranks) for group in drawn.groups(rank) or [[]])
        # Where duplicates fill an expert's slots this routing is to be refused, and goes on without them.
        self.crowded = drawn if case.layout == "expert" and most > case.capacity else None
        self.routing = drawn if self.crowded is None else self._routing([_without_repeats(i) for i in drawn.topk_idx])
        self.x = [self._numbers(rng, (int(n), case.hidden)).to(case.dtype) for n in num_tokens]
        self.weights = [self._numbers(rng, (int(n), self.num_topk)) for n in num_tokens]
        self.combine_idx = [
            np.where(rng.random(idx.shape) < 0.25, -1, idx) if case.leaves_out else idx for idx in self.routing.topk_idx
        ]
        self.row_keys = [self.routing.rows(rank, case.layout, 1) for rank in range(case.num_ranks)]
        self.results = [self._numbers(rng, (len(k), case.hidden)).to(case.rows_dtype) for k in self.row_keys]
        if case.layout == "expert":  # Rows that are left out are not read.
            for keys, rows in zip(self.row_keys, self.results, strict=True):
                rows[[i for i, (s, t, k) in enumerate(keys) if self.combine_idx[s][t, k] < 0]] = float("nan")

    def _routing(self, topk_idx: list[np.ndarray]) -> oracle.Routing:
        return oracle.Routing(self._rank_of, self.case.num_ranks, topk_idx)

    def _topk(self, rng: np.random.Generator, num_tokens: int, favourite: int) -> np.ndarray:
        shape = (num_tokens, self.num_topk)
        if self.kind == "all_to_one":
            return np.where(np.arange(self.num_topk) == rng.integers(self.num_topk), favourite, np.full(shape, -1))
        if self.kind == "one_rank":
            there = [e for e, rank in enumerate(self._rank_of) if rank == self._rank_of[favourite]]
            return rng.choice([-1, *there], shape)
        return draw_topk(rng, self.kind, shape, self.case.num_experts)

    def _numbers(self, rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
        return draw_numbers(rng, self.case.numbers, shape)

    # What must come out

    @property
    def num_groups(self) -> int:
        """Groups of slots on this rank."""
        return len(self.routing.experts_of(self.me)) if self.case.layout == "expert" else 1

    @cached_property
    def sent(self) -> list[tuple[torch.Tensor, ...]]:
        """Rows, and scales on the FP8 wire, as they cross from each rank."""
        return as_sent(self.x, self.case.wire, self.case.power_of_two_scales)

    @cached_property
    def counts(self) -> torch.Tensor:
        """Routes of each local expert, int32."""
        return torch.tensor([len(group) for group in self.routing.groups(self.me)], dtype=torch.int32)

    @cached_property
    def slots(self) -> torch.Tensor:
        """Slot of each received row, in the order of ``row_keys[me]``."""
        if self.case.layout == "rank":
            return torch.arange(len(self.row_keys[self.me]))
        first = [e * self.case.capacity for e in range(self.num_groups)]
        return torch.tensor([f + i for f, n in zip(first, self.counts.tolist(), strict=True) for i in range(n)]).long()

    def received(self, sources: list[torch.Tensor]) -> torch.Tensor:
        """The rows of each rank's ``sources`` that rank ``me`` receives, without gaps."""
        first = np.cumsum([0, *[len(s) for s in sources]])
        at = [int(first[key[0]]) + key[1] for key in self.row_keys[self.me] if key is not None]
        out = torch.empty(len(at), *sources[0].shape[1:], dtype=sources[0].dtype)
        bits(out)[:] = torch.cat([bits(s) for s in sources])[at]
        return out

    def expected_topk_idx(self) -> torch.Tensor:
        """Layout "rank": every row of the result, those past the received ones included."""
        local = np.full(self.case.num_experts + 1, -1)
        experts = self.routing.experts_of(self.me)
        local[experts] = np.arange(len(experts))
        out = torch.full((self.case.capacity, self.num_topk), -1)
        received = self.received([torch.from_numpy(local[idx]) for idx in self.routing.topk_idx])
        out[: len(received)] = received
        return out

    def expected_weights(self) -> torch.Tensor:
        """As :meth:`expected_topk_idx`, the weights beside them."""
        out = torch.zeros(self.case.capacity, self.num_topk)
        received = self.received(self.weights)
        out[: len(received)] = received
        return torch.where(self.expected_topk_idx() >= 0, out, 0.0)

    def expected_sums(self) -> torch.Tensor:
        case, me = self.case, self.me
        row_keys: list[list[oracle.Key]] = []
        rows, factors = [], []
        for keys, results in zip(self.row_keys, self.results, strict=True):
            mine = [(i, key) for i, key in enumerate(keys) if key is not None and key[0] == me]
            if case.layout == "expert":
                mine = [(i, (s, t, k)) for i, (s, t, k) in mine if self.combine_idx[me][t, k] >= 0]
                weights = [float(self.weights[me][t, k]) for _, (_, t, k) in mine]
                factors.append(torch.tensor(weights, dtype=torch.float32))
            row_keys.append([key for _, key in mine])
            rows.append(results[[i for i, _ in mine]])
        if case.combine_wire == "fp8":
            rows = [self._over_fp8(r) for r in rows]
        weighted = case.weighted and case.layout == "expert"
        sums = oracle.combine(self.routing, me, case.layout, row_keys, rows, factors if weighted else None)
        return sums.to(case.rows_dtype)

    def _over_fp8(self, rows: torch.Tensor) -> torch.Tensor:
        codes, scales = oracle.quantize(rows.float().numpy(), self.case.power_of_two_scales)
        return torch.from_numpy(oracle.dequantize(codes, scales))


def _without_repeats(idx: np.ndarray) -> np.ndarray:
    """Ids with all but the first of each row's equal ones replaced by -1."""
    out = idx.copy()
    for row in out:
        for position in range(len(row)):
            if row[position] in row[:position]:
                row[position] = -1
    return out
