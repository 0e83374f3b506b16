"""Starts the example programs as a user would, and reads what they leave."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moe_ep_plugin

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TIMEOUT_S = 120

TINY = [
    *("--layers", "1", "--hidden-size", "32", "--experts", "4", "--seq-length", "32", "--micro-batch-size", "2"),
    *("--eval-windows", "10", "--eval-interval", "4"),
]


def torchrun_command(num_ranks: int, program: str, *arguments: str | Path) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"),
        *(str(EXAMPLES / program), *map(str, arguments)),
    ]


def environment(**extra: str) -> dict[str, str]:
    """This process's, without what a surrounding torchrun would have left."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # The package that this process tests, wherever it was found.
    paths = [str(Path(moe_ep_plugin.__file__).parents[1]), *filter(None, [inherited.get("PYTHONPATH")])]
    return inherited | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | extra


def run(command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=TIMEOUT_S)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def result(stdout: str) -> dict[str, Any]:
    last = stdout.strip().splitlines()[-1]
    assert last.startswith("RESULT "), stdout
    parsed: dict[str, Any] = json.loads(last.removeprefix("RESULT "))
    return parsed


def said_of_mistake(
    program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What a program prints as its error, run in this process, which it leaves with status 2."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / program), run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    return said
