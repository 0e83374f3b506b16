"""The baseline: how well the previous byte alone predicts the next one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .data import VOCAB_SIZE, Bytes

PRIOR_STRENGTH = 1.0
"""Weight of the byte frequencies, as a number of observations, in each row of the bigram table."""


def bigram_loss(train: Bytes, windows: npt.NDArray[np.int64]) -> float:
    """Mean nats per byte of a smoothed bigram model fitted on ``train``, over the windows' predicted bytes.

    A byte's probability after another is its count there, smoothed with its overall frequency (itself
    smoothed with one observation of every byte), so that no pair has probability zero.

    Args:
        train: uint8 [train bytes].
        windows: int64 [n, length]; bytes 1.. of each are predicted from the byte before.
    """
    pairs = np.bincount(train[:-1].astype(np.int64) * VOCAB_SIZE + train[1:], minlength=VOCAB_SIZE**2)
    counts = pairs.reshape(VOCAB_SIZE, VOCAB_SIZE).astype(np.float64)
    frequency = (counts.sum(axis=0) + 1) / (counts.sum() + VOCAB_SIZE)
    table = (counts + PRIOR_STRENGTH * frequency) / (counts.sum(axis=1, keepdims=True) + PRIOR_STRENGTH)
    return float(-np.log(table[windows[:, :-1], windows[:, 1:]]).mean())
