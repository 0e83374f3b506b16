"""The benchmark for several GPUs, tried on the CPU: its first run on GPUs must not be the first of its code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .examples.programs import environment

BENCH = Path(__file__).parent / "bench" / "bench_nvlink.py"
TINY = "--device cpu --backend host --copy-mb 1 --main-tokens 16 --tokens 8 --hidden 256 --experts 16 --topk 4"


@pytest.mark.usefixtures("host")
def test_every_work_gives_the_right_rows(tmp_path: Path) -> None:
    out = tmp_path / "nvlink.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(BENCH)]
    command = [*torchrun, *TINY.split(), "--sms", "24,4", "--calls", "2", "--batches", "2", "--json", str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert results["collective"] == "gloo" and not results["link"]["across_gpus"]
    rows = results["rows"]
    # Six baselines and ten works of ours; ours with both numbers of SMs, then all once more with fewer tokens.
    assert len(rows) == 6 + 2 * 10 + 16
    assert all(row["us"] > 0 and row["bytes_in_per_rank"] > 0 for row in rows)
    assert len(results["end_to_end"]) == 8
