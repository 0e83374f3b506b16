"""What dispatch and combine must return, computed from every rank's inputs on one process.

Written from the documented semantics with Python loops and NumPy; it shares no code with the package. Rows are
named by keys: (source rank, token, position) in layout "expert", (source rank, token) in layout "rank", None for
a padding row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

Key = tuple[int, ...] | None

E4M3_MAX = np.float32(448)


def placement(num_experts: int, num_ranks: int, expert_to_rank: tuple[int, ...] | None) -> list[int]:
    """Rank of every expert; the default is contiguous, with the larger shares first."""
    if expert_to_rank is not None:
        return list(expert_to_rank)
    return [int(r) for r, part in enumerate(np.array_split(np.arange(num_experts), num_ranks)) for _ in part]


@dataclass(frozen=True)
class Routing:
    """All ranks' routing. ``topk_idx[rank]`` is an int64 array [tokens, topk]."""

    rank_of: list[int]
    num_ranks: int
    topk_idx: list[np.ndarray]

    def experts_of(self, rank: int) -> list[int]:
        """Expert ids on a rank, ascending: their places are the local ids."""
        return [e for e, r in enumerate(self.rank_of) if r == rank]

    def groups(self, rank: int) -> list[list[Key]]:
        """Keys of the rows that each local expert of ``rank`` receives, in order."""
        local = {e: i for i, e in enumerate(self.experts_of(rank))}
        groups: list[list[Key]] = [[] for _ in local]
        for source, idx in enumerate(self.topk_idx):
            for token, row in enumerate(idx.tolist()):
                for position, expert in enumerate(row):
                    if expert in local:
                        groups[local[expert]].append((source, token, position))
        return groups

    def rows(self, rank: int, layout: str, alignment: int) -> list[Key]:
        """Keys of all rows that ``rank`` receives, padding of the groups included."""
        if layout == "expert":
            return [key for g in self.groups(rank) for key in g + [None] * (-len(g) % alignment)]
        here = set(self.experts_of(rank))
        return [
            (source, token)
            for source, idx in enumerate(self.topk_idx)
            for token, row in enumerate(idx.tolist())
            if here & set(row)
        ]


def e4m3_table() -> np.ndarray:
    """Every non-negative finite e4m3 value in order of its code 0 ... 126."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """Codes (uint8) of the e4m3 values nearest to fp32 ``x``, ties to the even code; |x| <= 448 or NaN."""
    table = e4m3_table()
    magnitude = np.abs(x.astype(np.float64))
    safe = np.where(np.isnan(magnitude), 0.0, magnitude)
    upper = np.clip(np.searchsorted(table, safe), 0, 126)
    lower = np.maximum(upper - 1, 0)
    to_upper, to_lower = table[upper] - safe, safe - table[lower]
    code = np.where(to_upper < to_lower, upper, lower)
    code = np.where(to_upper == to_lower, np.where(upper % 2 == 0, upper, lower), code)
    code = np.where(table[upper] == safe, upper, code)
    code = np.where(np.isnan(magnitude), 127, code)
    return (code + 128 * np.signbit(x)).astype(np.uint8)


def quantize(x: np.ndarray, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [rows, hidden] to (e4m3 codes, fp32 scales [rows, blocks of 128])."""
    rows, hidden = x.shape
    blocks = -(-hidden // 128)
    codes = np.zeros((rows, hidden), np.uint8)
    scales = np.zeros((rows, blocks), np.float32)
    for b in range(blocks):
        part = x[:, b * 128 : (b + 1) * 128].astype(np.float32)
        magnitude = np.where(np.isfinite(part), np.abs(part), np.float32(0))
        largest = np.maximum(magnitude.max(axis=1, initial=0), np.float32(2.0**-100)).astype(np.float32)
        scale = (largest / E4M3_MAX).astype(np.float32)
        if power_of_two:
            scale = np.exp2(np.ceil(np.log2(scale.astype(np.float64)))).astype(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            scaled = part * (np.float32(1) / scale)[:, None]
        scaled = np.clip(scaled, -E4M3_MAX, E4M3_MAX)
        codes[:, b * 128 : (b + 1) * 128] = to_e4m3(np.where(np.isfinite(part), scaled, np.float32(np.nan)))
        scales[:, b] = scale
    return codes, scales


def from_e4m3(codes: np.ndarray) -> np.ndarray:
    """fp32 values of e4m3 codes (uint8)."""
    magnitude = np.append(e4m3_table(), np.nan)[codes & 127]
    return np.where(codes & 128, -magnitude, magnitude).astype(np.float32)


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """fp32 [rows, hidden] of what :func:`quantize` gives, each product rounded."""
    return from_e4m3(codes) * np.repeat(scales, 128, axis=1)[:, : codes.shape[1]]


def places(keys: list[Key], source: int) -> dict[Key, int]:
    """Row of each key that came from ``source``."""
    return {key: i for i, key in enumerate(keys) if key is not None and key[0] == source}


def combine(
    routing: Routing,
    me: int,
    layout: str,
    row_keys: list[list[Key]],
    rows: list[torch.Tensor],
    weights: list[torch.Tensor] | None,
) -> torch.Tensor:
    """Sums of rank ``me``: fp32, ranks ascending, each rank's products summed by position first."""
    num_tokens, num_topk = routing.topk_idx[me].shape
    hidden, dtype = rows[me].shape[1], rows[me].dtype
    total = np.zeros((num_tokens, hidden), np.float32)
    for rank in range(routing.num_ranks):
        partial = np.zeros_like(total)
        where = places(row_keys[rank], me)
        values = rows[rank].float().numpy()
        factors = None if weights is None else weights[rank].numpy()
        for token in range(num_tokens):
            for key in [(me, token)] if layout == "rank" else [(me, token, k) for k in range(num_topk)]:
                if key in where:
                    row = values[where[key]]
                    partial[token] += row if factors is None else row * factors[where[key]]
        total += partial
    return torch.from_numpy(total).to(dtype)
