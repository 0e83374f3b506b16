"""The decode program: the model that it builds is the one that was trained, and what a user sees of it."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import need_modules
from tests.harness import RankPool

from .programs import EXAMPLES, records, result, run, torchrun_command

PROGRAM = "decode_low_latency.py"
TRAINING = "pretrain_megatron_moe.py"
WINDOWS = 10
# An odd number of layers: those of successive steps meet the two sets of slots the other way round.
MODEL = [
    *("--layers", "3", "--hidden-size", "32", "--experts", "4", "--seq-length", "16", "--shared-expert"),
    *("--micro-batch-size", "2", "--eval-windows", str(WINDOWS), "--lr", "1e-2"),
]
PROMPTS = ["the ", "quick brown", "j", "lazy"]

need_modules("megatron.core", "matplotlib")


@dataclass(frozen=True)
class Trained:
    checkpoints: Path
    text: Path
    validation_loss: float


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two ranks' checkpoint."""
    out, text = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("text")
    for i in range(12):
        (text / f"{i}.txt").write_text(f"the quick brown fox number {i} jumps over the lazy dog\n" * 8)
    places = ["--data", text, "--out", out, "--save", out / "checkpoints"]
    # Their own dispatcher, so that nothing of ours had a part in the numbers compared with.
    arguments = [*MODEL, "--moe-token-dispatcher", "alltoall", "--steps", "20", *map(str, places)]
    done = run(torchrun_command(2, TRAINING, *arguments))
    assert done.returncode == 0, done.stderr
    return Trained(out / "checkpoints", text, result(done.stdout)["validation_loss"])


@pytest.fixture
def decode_on_path(examples_on_path: None) -> Iterator[None]:
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == "decode"]:
        del sys.modules[name]


def start(ranks: int, out: Path, *arguments: str | Path, load: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The program, in processes that can't import Megatron-Core."""
    blocked = out / "blocked"
    (blocked / "megatron").mkdir(parents=True)
    (blocked / "megatron" / "__init__.py").write_text("raise ImportError('megatron is not needed here')\n")
    more = ["--out", str(out), *([] if load is None else ["--load", str(load)]), *map(str, arguments)]
    if ranks == 1:
        command = [sys.executable, str(EXAMPLES / PROGRAM), *more]
    else:
        command = torchrun_command(ranks, PROGRAM, *more)
    return run(command, PYTHONPATH=f"{blocked}:{EXAMPLES.parent}")


def texts(stdout: str) -> list[str]:
    return stdout.split("--- text ")[1:]


def logits_of_both(rank: int, checkpoints: Path, backend: str, wire: str) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [tokens, sequences, bytes] of the decoder, and of Megatron-Core's model with the same checkpoint."""
    sys.path.insert(0, str(EXAMPLES))
    from argparse import Namespace

    import torch.distributed as dist
    from decode.job import Job
    from decode.model import Decoder
    from pretrain.options import Launch
    from pretrain.saved import file_name, find

    options = Namespace(
        load=find(checkpoints), batch=2, wire=wire, backend=backend, no_graph=False, prompt=None, tokens=1
    )
