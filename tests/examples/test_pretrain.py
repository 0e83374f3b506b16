"""The training job as a user meets it: what it leaves, exact resume, Ctrl-C, and what it says to mistakes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import all_pids, need_modules, shared_segments

from .programs import (
    EXAMPLES,
    TIMEOUT_S,
    TINY,
    environment,
    records,
    result,
    run,
    said_of_mistake,
    torchrun_command,
)

PROGRAM = "pretrain_megatron_moe.py"

need_modules("megatron.core", "matplotlib")


@dataclass(frozen=True)
class FinishedRun:
    out: Path
    checkpoints: Path
    stdout: str


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    for i in range(12):
        (directory / f"{i}.txt").write_text(f"the quick brown fox number {i} jumps over the lazy dog\n" * 8)
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> FinishedRun:
    out = tmp_path_factory.mktemp("finished")
    checkpoints = out / "saved"
    saving = ["--save", checkpoints, "--save-interval", 4]
    done = run(torchrun_command(2, PROGRAM, *TINY, "--data", text, "--steps", "8", "--out", out, *map(str, saving)))
    assert done.returncode == 0, done.stderr
    return FinishedRun(out, checkpoints, done.stdout)


def test_leaves_metrics_plot_and_result(finished: FinishedRun) -> None:
    steps = [r for r in records(finished.out) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert all({"lr", "tokens_per_second", "comm_share", "time"} <= r.keys() for r in steps)
    assert all(0 < r["comm_share"] < 1 for r in steps)
    assert [r["step"] for r in records(finished.out) if "validation_loss" in r] == [4, 8]
    assert (finished.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    numbers = result(finished.stdout)
    assert (numbers["ranks"], numbers["expert_parallel"], numbers["steps"]) == (2, 2, 8)
    assert numbers["dispatcher"] == "deepep" and numbers["backend"] in ("host", "collective")
    assert numbers["first_loss"] == pytest.approx(steps[0]["loss"], abs=1e-6)
    assert numbers["last_loss"] == pytest.approx(steps[-1]["loss"], abs=1e-6)
    assert numbers["last_loss"] < numbers["first_loss"]
    assert numbers["validation_loss"] < numbers["first_loss"]
    assert numbers["bigram_loss"] > 0 and numbers["tokens_per_second"] > 0


def test_resumed_run_has_the_same_bits(finished: FinishedRun, text: Path, tmp_path: Path) -> None:
    start = finished.checkpoints / "step-00000004"
    arguments = [
        *TINY,
        "--data",
        text,
        "--steps",
        "8",
        "--out",
        tmp_path,
        "--load",
        start,
        "--save",
        tmp_path / "saved",
    ]
    done = run(torchrun_command(2, PROGRAM, *arguments))
    assert done.returncode == 0, done.stderr
    numbers = ("step", "loss", "lr", "validation_loss")
    resumed = [{k: r[k] for k in numbers if k in r} for r in records(tmp_path)]
    whole = [{k: r[k] for k in numbers if k in r} for r in records(finished.out) if r["step"] > 4]
    assert resumed == whole and len(resumed) == 5
    assert result(done.stdout)["first_loss"] == result(finished.stdout)["first_loss"]

    import torch

    for file in ("rank-00000.pt", "rank-00001.pt"):
        ends = [torch.load(d / "step-00000008" / file) for d in (finished.checkpoints, tmp_path / "saved")]
        for mine, theirs in zip(ends[0]["optimizer"]["masters"], ends[1]["optimizer"]["masters"], strict=True):
            assert torch.equal(mine, theirs)


def test_trains_with_fp8_experts(finished: FinishedRun, text: Path, tmp_path: Path) -> None:
    arguments = [*TINY, "--data", text, "--steps", "8", "--moe-ep-fp8", "experts", "--out", tmp_path]
    done = run(torchrun_command(2, PROGRAM, *arguments))
    assert done.returncode == 0, done.stderr
    numbers = result(done.stdout)
    assert numbers["fp8"] == "experts" and numbers["steps"] == 8
    plain = [r["loss"] for r in records(finished.out) if "loss" in r]
    losses = [r["loss"] for r in records(tmp_path) if "loss" in r]
    # The same weights and data: what differs is rounding in the experts.
    assert 0 < abs(losses[0] - plain[0]) < 0.01 * plain[0]
    assert losses[-1] < losses[0]
    assert all(abs(one / other - 1) < 0.02 for one, other in zip(losses, plain, strict=True))


def descendants(pid: int) -> list[int]:
    """Processes below this one."""
    children: dict[int, list[int]] = {}
    for other in all_pids():
        try:
            # The name, in parentheses, may hold anything; the parent is the second word after it.
            parent = int(Path(f"/proc/{other}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(other)
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks for processes in /proc")
def test_ctrl_c_saves_and_leaves_nothing_behind(text: Path, tmp_path: Path, host: None) -> None:
    options = [*TINY, "--backend", "host", "--data", text, "--steps", "100000", "--out", tmp_path]
    command = torchrun_command(2, PROGRAM, *options)
    job = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + TIMEOUT_S
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert job.poll() is None and time.monotonic() < deadline, job.communicate(timeout=30)
            time.sleep(0.1)
        processes = descendants(job.pid)
        segments = shared_segments(processes)
        job.send_signal(signal.SIGINT)
        stdout, _ = job.communicate(timeout=60)
    finally:
        job.kill()
        job.wait()
    assert job.returncode != 0
    assert "interrupted after step" in stdout and "go on with: torchrun --nproc-per-node 2" in stdout
    step = int(stdout.split("interrupted after step ")[1].split()[0])
    folder = tmp_path / "checkpoints" / f"step-{step:08d}"
    assert sorted(p.name for p in folder.iterdir()) == ["rank-00000.pt", "rank-00001.pt"]

    assert len(processes) >= 2, "both ranks were found"
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    # Segments are never listed in /dev/shm, so what would keep their memory is a process that holds them.
    assert len(segments) >= 2, "each rank held its segment"
    assert all(name.endswith(" (deleted)") for names in segments.values() for name in names), segments
    assert not segments.keys() & shared_segments(all_pids()).keys()


@pytest.mark.parametrize(
    ("ranks", "arguments", "says"),
    [
        (4, ["--experts", "6"], "--experts 6: it must be a multiple of the 4 ranks"),
        (4, ["--expert-parallel", "3"], "--expert-parallel 3: it must divide the number of ranks, 4"),
        (1, ["--experts", "2", "--topk", "3"], "--topk 3: there are only 2 experts"),
        (1, ["--hidden-size", "100"], "--hidden-size 100: it must be a multiple of 32"),
        (1, ["--steps", "0"], "argument --steps: 0 is below 1"),
        (1, ["--moe-token-dispatcher", "none"], "invalid choice: 'none'"),
        (1, ["--moe-ep-fp8", "experts", "--moe-token-dispatcher", "alltoall"], "alltoall sends no FP8 rows"),
        (1, ["--data", "no-such-place"], "--data no-such-place: there is no such file or directory"),
        (1, ["--data", "{empty}"], "no text in {empty}"),
        (1, ["--data", "{short}"], "the training files hold 9 bytes, 129 are needed"),
        (1, ["--load", "no-such-place"], "--load no-such-place: there is no such directory"),
        (1, ["--load", "{empty}"], "--load {empty}: no complete checkpoint is in it"),
        (1, ["--save-interval", "5"], "--save-interval: say where to with --save DIR"),
        (1, ["--out", "{short}/text"], "--out {short}/text: it exists and is not a directory"),
    ],
)
def test_mistakes_are_explained(
    ranks: int,
    arguments: list[str],
    says: str,
    tmp_path: Path,
    examples_on_path: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {name: str(tmp_path / name) for name in ("empty", "short")}
    for place in places.values():
        Path(place).mkdir()
    (tmp_path / "short" / "text").write_text("ten bytes.")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    # The program gives Ctrl-C back its default action while it starts; here it must keep pytest's.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    said = said_of_mistake(PROGRAM, [a.format(**places) for a in arguments], monkeypatch, capsys)
    assert says.format(**places) in said


def test_checkpoint_of_another_run_is_refused(finished: FinishedRun, text: Path, tmp_path: Path) -> None:
    wrong_ranks = run([sys.executable, str(EXAMPLES / PROGRAM), "--load", str(finished.checkpoints)])
    assert wrong_ranks.returncode == 2
    assert "it was saved by 2 ranks, this is a run of 1" in wrong_ranks.stderr
    arguments = [*TINY, "--data", text, "--steps", "8", "--lr", "1e-4", "--out", tmp_path]
    done = run(torchrun_command(2, PROGRAM, *arguments, "--load", finished.checkpoints))
    assert done.returncode != 0
    assert "lr: 0.004 there, 0.0001 here" in done.stderr
