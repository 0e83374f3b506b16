"""Checkpoints: one file a rank, complete or absent, from which a run goes on bit for bit."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from .errors import UsageError
from .optimizer import Optimizer
from .saved import LATEST, file_name, find

KEPT = 2
# Options that decide the numbers; the number of steps is one of them through the learning rate.
_FIXED = (
    "seq_length",
    "micro_batch_size",
    "seed",
    "layers",
    "hidden_size",
    "experts",
    "topk",
    "shared_expert",
    "dtype",
    "steps",
    "lr",
    "expert_parallel",
    "moe_ep_fp8",
)


def settings(options: argparse.Namespace, num_ranks: int, corpus: str) -> dict[str, Any]:
    """What must be the same in the run that saves and in the run that loads."""
    return {name: getattr(options, name) for name in _FIXED} | {"ranks": num_ranks, "text (--data)": corpus}


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def save(
    directory: Path,
    *,
    step: int,
    model: torch.nn.Module,
    optimizer: Optimizer,
    fixed: dict[str, Any],
    first_loss: float | None,
) -> Path:
    """Write a checkpoint after ``step`` steps; every rank calls it. Returns its folder.

    The folder gets its name once all files are complete, and only then becomes the latest one.
    """
    rank = dist.get_rank()
    folder = directory / f"step-{step:08d}"
    unfinished = directory / f".{folder.name}.unfinished"
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    state = {
        "settings": fixed,
        "step": step,
        "model": {k: v for k, v in model.state_dict().items() if torch.is_tensor(v)},
        "optimizer": optimizer.state_dict(),
        "rng": _rng_state(),
        "first_loss": first_loss,
    }
    torch.save(state, unfinished / file_name(rank))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        pointer = directory / f".{LATEST}.unfinished"
        pointer.write_text(folder.name + "\n")
        os.replace(pointer, directory / LATEST)
        older = sorted(p for p in directory.glob("step-*") if p != folder)
        for stale in older[: len(older) - (KEPT - 1)]:
            shutil.rmtree(stale, ignore_errors=True)
    dist.barrier()
    return folder


def load(
    directory: Path, *, model: torch.nn.Module, optimizer: Optimizer, fixed: dict[str, Any]
) -> tuple[int, float | None]:
    """Restore the latest checkpoint in ``directory``; returns the steps done and the loss of the first.

    Raises:
        UsageError: There is none, or it belongs to a run with other settings.
    """
    state = torch.load(find(directory) / file_name(dist.get_rank()), map_location="cpu", weights_only=True)
    differences = [
        f"{name}: {state['settings'].get(name)} there, {value} here"
        for name, value in fixed.items()
        if state["settings"].get(name) != value
    ]
    if differences:
        raise UsageError(f"--load {directory} is of a run with other settings: " + "; ".join(differences))
    missing, unexpected = model.load_state_dict(state["model"], strict=False)
    wrong = [k for k in missing if not k.endswith("_extra_state")] + list(unexpected)
    if wrong:
        raise UsageError(f"--load {directory} does not fit this model: {', '.join(wrong)}")
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"]["cpu"])
    get_cuda_rng_tracker().set_states(state["rng"]["tracker"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["rng"]["cuda"])
    return state["step"], state["first_loss"]
