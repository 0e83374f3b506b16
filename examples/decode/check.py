"""Compares the decoder with the training job: the loss on held-out text against the one that training reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from pretrain.data import Corpus
from pretrain.errors import UsageError

from .generator import Generator
from .weights import Checkpoint

# Nats per byte by which the losses may differ: sums in another order, or values rounded to fewer bits.
EXACT, ROUNDED = 1e-4, 2e-2


def check_corpus(corpus: Corpus, checkpoint: Checkpoint) -> None:
    """Raise UsageError unless the model was trained on this text."""
    if corpus.fingerprint != checkpoint.corpus:
        raise UsageError(
            f"--check: {checkpoint.folder} was trained on other text; give the --data of that run, with the same files"
        )


def held_out_loss(
    generator: Generator, windows: npt.NDArray[np.int64], *, batch: int, rank: int, num_ranks: int
) -> float:
    """Mean nats per byte over the windows, which the ranks share out; every rank gets the same number.

    Args:
        generator: Reads them, one byte of each a step.
        windows: int64 [n, length]; bytes 1.. of each are predicted from those before.
        batch: Sequences of each rank.
        rank, num_ranks: This process among all.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(windows), batch * num_ranks):
        # Ranks take part with full batches to the end, for their experts serve the others. Repeats are not counted.
        places = start + rank * batch + np.arange(batch)
        text = generator.run(torch.from_numpy(windows[places % len(windows)]))
        counted = text.log_probabilities[torch.from_numpy(places < len(windows))]
        total += torch.tensor([-counted.double().sum().item(), counted.numel()], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total[0] / total[1])


def compare(loss: float, checkpoint: Checkpoint, wire: str) -> tuple[dict[str, Any], str | None]:
    """Numbers for the result, and what is wrong if the losses are further apart than rounding explains."""
    reported = _reported_loss(checkpoint)
    numbers = {"loss": round(loss, 6), "reported_loss": None if reported is None else round(reported, 6)}
    if reported is None:
        return numbers, None
    exact = checkpoint.shape.dtype == torch.float32 and wire == "bf16" and not checkpoint.fp8_experts
    tolerance = EXACT if exact else ROUNDED
    if abs(loss - reported) <= tolerance:
        return numbers, None
    return numbers, (
        f"--check: the loss on held-out text is {loss:.6f}, training reported {reported:.6f}, which is more than "
        f"{tolerance} away; was --eval-windows the same?"
    )


def _reported_loss(checkpoint: Checkpoint) -> float | None:
    """What the training job's metrics.jsonl has for the checkpoint's step, if it is where it is by default."""
    path: Path = checkpoint.folder.parent.parent / "metrics.jsonl"
    if not path.is_file():
        return None
    found = None
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record.get("step") == checkpoint.step and "validation_loss" in record:
            found = float(record["validation_loss"])
    return found
