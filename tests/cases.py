"""Random routings: the cases that are drawn, what goes in on every rank, and what must come out.

A case (drawn by hypothesis in the parent) fixes the ranks, experts, dtypes and options of one buffer; each case
runs several routings drawn from seeds, so that the inputs of all ranks are known on every rank. All tensors here
are on the CPU; ``checks.py`` puts them through buffers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from moe_ep_plugin import EpBuffer, EpConfig

from . import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Place(NamedTuple):
    """What moves the rows, and where they are."""

    backend: str
    device: str = "cpu"


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
    num_sms: int | None = None
    overlaps_stages: bool = False

    def rounds_partials(self, buffer: EpBuffer) -> bool:
        """Whether a rank's partial sums cross in the dtype of the rows: where it reduces them before they cross.

        With ``expand="auto"`` backend "cuda" does where ranks have GPUs of their own.
        """
        two_stage = self.expand == "two_stage"
        if buffer.backend == "cuda":
            two_stage = bool(buffer._backend._two_stage)  # type: ignore[attr-defined]
        return two_stage and self.layout == "expert" and buffer.backend != "collective"

    def config(self, place: Place) -> EpConfig:
        return EpConfig(
            num_experts=self.num_experts,
            num_topk=self.num_topk,
            hidden=self.hidden,
            max_tokens_per_rank=max(self.max_tokens, 1),
            dtype=self.heap_dtype,
            wire="bf16" if self.wire == "plain" else "fp8",
            power_of_two_scales=self.power_of_two_scales,
            expert_alignment=self.expert_alignment,
            expert_to_rank=self.expert_to_rank,
            expand=self.expand,
            num_sms=self.num_sms,
            # Used up now and then, but never by a single operation, long rows of one rank included.
            pool_bytes=1 << (22 if self.hidden < 2048 else 25),
            timeout_s=30,
            **place._asdict(),
        )


def make_case(
    pick: Callable[[Sequence[Any]], Any],
    num_ranks: int,
    *,
    large: bool = False,
    max_recv: Sequence[str] = ("none", "none", "exact", "slack", "short"),
) -> Case:
    """A case of ``num_ranks`` whose every choice is made by ``pick``.

    With ``large``, what several blocks of a GPU's grid are needed for: long rows, many experts, more tokens, and
    numbers of SMs.
    """
    num_experts = pick([1, 2, 3, 5, 8, 10, 64, 200] if large else range(1, 11))
    dtype = pick(DTYPES)
    unit = 16 // dtype.itemsize
    # One vector, odd multiples of it, and more than one FP8 block with a short last one.
    widths = [1, 2, 3, 5, 16, 128 // unit, 136 // unit, 264 // unit]
    widths += [2048 // unit, 7168 // unit, 16384 // unit] if large else []
    hidden = unit * pick(widths)
    most_tokens = [0, 1, 3, 9, 17, *([40, 70, 70] if large else [])]
    return Case(
        num_ranks=num_ranks,
        num_experts=num_experts,
        expert_to_rank=tuple(pick(range(num_ranks)) for _ in range(num_experts)) if pick([False, True]) else None,
        num_topk=pick(range(1, 7)),
        hidden=hidden,
        dtype=dtype,
        heap_dtype=pick([dtype, torch.float32]),
        layout=pick(["expert", "rank"]),
        wire=pick(["plain", "plain", "fp8", "fp8_input"]),
        power_of_two_scales=pick([False, True]),
        expert_alignment=pick([1, 4, 16]),
        expand=pick(["auto", "direct", "two_stage"]),
        max_tokens=pick(most_tokens if hidden < 2048 else [1, 5]),
        max_recv=pick(max_recv),
        weighted=pick([False, True]),
        weighted_combine=pick([False, True]),
        values=pick([False, True]),
        reuse=pick([False, True]),
        leased=pick([False, True]),
        numbers=pick(["integer", "integer", "real"]),
        seed=pick(range(1 << 31)),
        num_sms=pick([None, 1, 2, 7, 12]) if large else None,
        overlaps_stages=pick([False, True]) if large else False,
    )


@st.composite
def cases(draw: st.DrawFn, num_ranks: int) -> Case:
    """Cases that shrink to simple ones. Many of those drawn differ from another one in a few choices only."""
    return make_case(lambda options: draw(st.sampled_from(options)), num_ranks)


def independent_cases(num_ranks: int, max_recv: Sequence[str]) -> st.SearchStrategy[Case]:
    """Large cases without anything in common: more is seen in few of them, and a failure does not shrink."""

    def case(seed: int) -> Case:
        # Hypothesis draws the same seeds for each number of ranks.
        return make_case(
            random.Random(f"{seed} {num_ranks} {max_recv}").choice, num_ranks, large=True, max_recv=max_recv
        )

    return st.integers(0, (1 << 63) - 1).map(case)


def draw_topk(rng: np.random.Generator, kind: str, shape: tuple[int, int], num_experts: int) -> np.ndarray:
    """Ids [num_tokens, num_topk], -1 among them, of a kind that has no favourite expert."""
    num_tokens, num_topk = shape
    if kind == "repeated":
        return np.repeat(rng.integers(-1, num_experts, (num_tokens, 1)), num_topk, axis=1)
    if kind == "sparse":
        return np.where(rng.random(shape) < 0.7, -1, rng.integers(0, num_experts, shape))
    if kind == "distinct":
        ids = np.concatenate([np.arange(num_experts), np.full(num_topk, -1)])
        picks = [rng.permutation(len(ids))[:num_topk] for _ in range(num_tokens)]
        return ids[np.array(picks, dtype=np.int64).reshape(shape)]
    return rng.integers(-1, num_experts, shape)


def draw_numbers(rng: np.random.Generator, numbers: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Small whole numbers (``"integer"``), of which every sum is exact, or real ones of one of a few sizes."""
    if numbers == "integer":
        return torch.from_numpy(rng.integers(-4, 5, shape).astype(np.float32))
    spread = rng.choice([1e-3, 1.0, 30.0])
    return torch.from_numpy((rng.standard_normal(shape) * spread).astype(np.float32))


def as_sent(x: list[torch.Tensor], wire: str, power_of_two_scales: bool) -> list[tuple[torch.Tensor, ...]]:
    """Rows, and scales on the FP8 wire, as they cross from each rank."""
    if wire == "plain":
        return [(rows,) for rows in x]
    ends = np.cumsum([len(rows) for rows in x])[:-1].tolist()
    codes, scales = oracle.quantize(torch.cat(x).float().numpy(), power_of_two_scales)
    codes = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    return list(zip(codes.tensor_split(ends), torch.from_numpy(scales).tensor_split(ends), strict=True))


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
        if self.kind == "one_expert":
            return np.full(shape, favourite)
        return draw_topk(rng, self.kind, shape, self.case.num_experts)

    def _numbers(self, rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
        return draw_numbers(rng, self.case.numbers, shape)

    # What must come out

    @cached_property
    def sent(self) -> list[tuple[torch.Tensor, ...]]:
        """Rows, and scales on the FP8 wire, as they cross from each rank."""
        return as_sent(self.x, self.case.wire, self.case.power_of_two_scales)

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

    def expected_sums(self, rounds_partials: bool) -> torch.Tensor:
        """Sums; with ``rounds_partials``, what each rank adds to them is rounded to the rows' dtype first."""
        weights = self.row_weights()

        def combined(row_keys: list[list[oracle.Key]]) -> torch.Tensor:
            return oracle.combine(self.routing, self.me, self.case.layout, row_keys, self.results, weights)

        if not rounds_partials:
            return combined(self.row_keys)
        total = torch.zeros(len(self.x[self.me]), self.case.hidden)
        for rank in range(self.case.num_ranks):
            total += combined([keys if r == rank else [] for r, keys in enumerate(self.row_keys)]).float()
        return total.to(self.case.dtype)


def bits(t: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers, so that NaN equals itself and -0 differs from 0."""
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.dtype.itemsize])


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over that of what is wanted; where that is zero, the norm of what came."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm()) if want.any() else float(got.norm())
