"""The fine-tuning job as a user meets it: what it leaves, exact resume, families, adapters, and mistakes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need_modules

from .programs import EXAMPLES, records, result, run, said_of_mistake, torchrun_command

PROGRAM = "finetune_deepspeed_moe.py"
TINY = [
    *("--layers", "2", "--hidden-size", "32", "--experts", "4", "--seq-length", "32", "--micro-batch-size", "2"),
    *("--eval-windows", "10", "--base-steps", "6", "--steps", "6"),
]

need_modules("deepspeed", "transformers", "safetensors", "peft", "matplotlib")


@dataclass(frozen=True)
class FinishedRun:
    out: Path
    stdout: str


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name small texts of two kinds."""
    folder = tmp_path_factory.mktemp("texts")
    for kind, line in (
        ("source", "x[{i}] = x[{i}] + 1  # count\n"),
        ("target", "Chapter {i} says what a number is.\n"),
    ):
        (folder / kind).mkdir()
        for i in range(8):
            (folder / kind / f"{i}.txt").write_text(line.format(i=i) * 20)
    return ["--source-data", str(folder / "source"), "--data", str(folder / "target")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> FinishedRun:
    out = tmp_path_factory.mktemp("finished")
    done = run(torchrun_command(2, PROGRAM, *TINY, *texts, "--out", out, "--save-interval", "3"))
    assert done.returncode == 0, done.stderr[-3000:]
    return FinishedRun(out, done.stdout)


def test_leaves_metrics_plot_model_and_result(finished: FinishedRun) -> None:
    out = finished.out
    steps = [r for r in records(out) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 7))
    assert all({"lr", "tokens_per_second", "comm_share", "time"} <= r.keys() for r in steps)
    assert len([r for r in records(out / "base") if "loss" in r]) == 6
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    numbers = result(finished.stdout)
    assert numbers["loss_after"] < numbers["loss_before"]
    assert numbers["last_loss"] == pytest.approx(steps[-1]["loss"], abs=1e-6)
    assert numbers["comm_backend"] == "deepep" and numbers["backend"] in ("host", "collective")
    assert (numbers["ranks"], numbers["expert_parallel"], numbers["zero"]) == (2, 2, 2)
    # Logits of a few units, summed by transformers' experts in another order than by ours.
    assert numbers["export_difference"] < 1e-4
    for folder in ("base", "model"):
        config = json.loads((out / folder / "config.json").read_text())
        assert config["model_type"] == "qwen3_moe" and list((out / folder).glob("*.safetensors"))


def test_resumed_run_has_the_same_bits(finished: FinishedRun, texts: list[str], tmp_path: Path) -> None:
    shutil.copytree(finished.out, tmp_path / "out")
    (tmp_path / "out" / "checkpoints" / "latest").write_text("step-00000003")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000006")
    done = run(torchrun_command(2, PROGRAM, *TINY, *texts, "--out", tmp_path / "out", "--resume"))
    assert done.returncode == 0, done.stderr[-3000:]
    whole, resumed = (
        [(r["step"], r.get("loss"), r.get("validation_loss")) for r in records(out)]
        for out in (finished.out, tmp_path / "out")
    )
    assert whole == resumed and len(whole) == 7
    for name in ("loss_before", "loss_after", "source_loss_before", "source_loss_after"):
        assert result(done.stdout)[name] == result(finished.stdout)[name]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(2, ["--family", "deepseek_v3", "--lora", "4"]), (2, ["--family", "mixtral", "--zero", "0", "--dtype", "bf16"])],
)
def test_other_families(texts: list[str], tmp_path: Path, ranks: int, options: list[str]) -> None:
    done = run(torchrun_command(ranks, PROGRAM, *TINY, *texts, "--out", tmp_path, *options))
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = result(done.stdout)
    assert numbers["loss_after"] < numbers["loss_before"]
    # As above; logits of bf16 are rounded to 2^-8 of themselves.
    assert numbers["export_difference"] < (0.1 if "bf16" in options else 1e-4)
    if "--lora" in options:
        assert numbers["trainable_parameters"] < 10_000
        import torch
        from safetensors.torch import load_file

        before, after = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("base", "model"))
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and all(".self_attn." in name for name in changed), "adapters stand beside attention only"


def test_fp8_experts_follow_unquantised_ones(finished: FinishedRun, texts: list[str], tmp_path: Path) -> None:
    done = run(torchrun_command(2, PROGRAM, *TINY, *texts, "--out", tmp_path, "--fp8-experts"))
    assert done.returncode == 0, done.stderr[-3000:]
    wide, fp8 = result(finished.stdout), result(done.stdout)
    assert fp8["fp8_experts"] and not wide["fp8_experts"]
    # Experts of a model that has barely learnt add little to its logits. Seen: 1e-4.
    assert 0 < abs(fp8["loss_after"] - wide["loss_after"]) < 0.002
    # Logits of transformers, which quantises nothing. Seen: 0.03.
    assert 1e-4 < fp8["export_difference"] < 0.1


def test_own_model_with_one_rank(finished: FinishedRun, texts: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / PROGRAM), *TINY, *texts, "--out", str(tmp_path)]
    done = run([*command, "--model", str(finished.out / "model")])
    assert done.returncode == 0, done.stderr[-3000:]
    # The same weights and the same windows, whatever the number of ranks.
    assert result(done.stdout)["loss_before"] == pytest.approx(result(finished.stdout)["loss_after"], abs=1e-5)


def test_a_rank_reads_its_experts_alone(finished: FinishedRun, examples_on_path: None) -> None:
    import torch
    from finetune.weights import CheckpointFiles, fill
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = finished.out / "model"
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    asked: list[str] = []
    files = CheckpointFiles(folder)
    read = files.read

    def recording(name: str, rows: Any = None) -> torch.Tensor:
        asked.append(name)
        return read(name, rows)

    files.read = recording  # type: ignore[method-assign]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fill(model, files, range(2, 4))
    for name, value in model.state_dict().items():
        if ".experts." in name:
            assert torch.equal(value[2:], whole[name][2:]) and torch.equal(value[:2], before[name][:2])
        else:
            assert torch.equal(value, whole[name])
    assert {name.split(".experts.")[1].split(".")[0] for name in asked if ".experts." in name} == {"2", "3"}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_filled_models_equal_what_transformers_loads(family: str, examples_on_path: None, tmp_path: Path) -> None:
    import torch
    from finetune.model import new_model, small_config
    from finetune.options import parse_options
    from finetune.weights import CheckpointFiles, fill
    from transformers import AutoModelForCausalLM

    options = parse_options([*TINY, "--family", family], 1)
    new_model(small_config(options), options).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    options.seed += 1
    model = new_model(small_config(options), options)
    fill(model, CheckpointFiles(tmp_path), range(options.experts))
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def test_quantised_checkpoints_are_refused(examples_on_path: None, tmp_path: Path) -> None:
    import torch
    from finetune.model import load_model
    from finetune.weights import CheckpointFiles
    from pretrain.errors import UsageError
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    save_file(
        {"good": torch.ones(2, dtype=torch.bfloat16), "w": torch.ones(2, dtype=torch.int8)}, tmp_path / "a.safetensors"
    )
    files = CheckpointFiles(tmp_path)
    assert files.read("good").tolist() == [1, 1]
    with pytest.raises(UsageError, match=r"w is stored as I8, but weights must be one of F64.*not quantised"):
        files.read("w", slice(0, 1))
    Qwen3MoeConfig(quantization_config={"quant_method": "fp8"}).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"config\.json has a quantization_config.*not quantised"):
        load_model(tmp_path, argparse.Namespace(expert_parallel=1, dtype="fp32"))


@pytest.mark.parametrize(("gpus", "number", "zero"), [(1, "0", 0), (2, "1", 0), (4, "3", 2)])
def test_ranks_share_gpus(
    gpus: int, number: str, zero: int, examples_on_path: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A GPU is not there: what DeepSpeed and the process group are told is.
    import torch
    from finetune import setup
    from pretrain import setup as joining
    from pretrain.options import Launch

    told: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append(str(device)))
    monkeypatch.setattr(joining.dist, "init_process_group", told.append)
    launch = Launch(rank=3, num_ranks=4, local_rank=3, num_local_ranks=4)
    assert str(setup.join_ranks_for_deepspeed(launch)) == f"cuda:{number}" == told[0]
    assert os.environ["LOCAL_RANK"] == number, "the GPU that DeepSpeed's engine takes"
    assert told[1] == ("cpu:gloo,cuda:nccl" if gpus == 4 else "gloo")
    assert setup.zero_stage(launch, 2) == zero


def test_only_the_first_rank_holds_the_whole_model(examples_on_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    import torch
    from finetune import weights

    alive: list[Any] = []
    most = 0

    def tensors(*_: Any) -> Any:
        nonlocal most
        for _ in range(5):
            value = torch.ones(2)
            alive.append(weakref.ref(value))
            most = max(most, sum(one() is not None for one in alive))
            yield "name", value
            del value

    monkeypatch.setattr(weights, "whole_state", tensors)
    monkeypatch.setattr(weights.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(weights.dist, "barrier", lambda: None)
    weights.export(None, None, Path(), None)
    assert len(alive) == 5 and most <= 2


@pytest.mark.parametrize(("rank", "start"), [(0, "error"), (3, "error on rank 3")])
def test_an_error_of_one_rank_is_printed_by_it(
    rank: int, start: str, examples_on_path: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from pretrain.options import fail

    with pytest.raises(SystemExit) as ended:
        fail("no room", rank, everywhere=False)
    assert ended.value.code == 2 and capsys.readouterr().err == f"{start}: no room\n"


@pytest.mark.parametrize(
    ("ranks", "arguments", "says"),
    [
        (4, ["--experts", "6"], "--experts 6: it must be a multiple of --expert-parallel, 4"),
        (4, ["--expert-parallel", "3"], "--expert-parallel 3: it must divide the number of ranks, 4"),
        (1, ["--experts", "2", "--topk", "3"], "--topk 3: there are only 2 experts"),
        (1, ["--hidden-size", "100"], "--hidden-size 100: it must be a multiple of 32"),
        (1, ["--steps", "0"], "argument --steps: 0 is below 1"),
        (1, ["--lr", "0"], "--lr 0.0: it must be above 0"),
        (
            1,
            ["--lora", "4", "--zero", "2"],
            "--lora with --zero 2: DeepSpeed shards the optimizer of a MoE model only if",
        ),
        (2, ["--fp8-experts", "--comm-backend", "comm"], "--fp8-experts with --comm-backend comm: FP8 rows come from"),
        (2, ["--fp8-experts", "--expert-parallel", "1"], "--fp8-experts: with one rank to an expert-parallel group"),
        (2, ["--fp8-experts", "--zero", "3"], "--fp8-experts with --zero 3: experts are quantised whole"),
        (1, ["--model", "{empty}"], "--model {empty}: there is no config.json in it"),
        (1, ["--data", "no-such-place"], "--data no-such-place: there is no such file or directory"),
        (1, ["--out", "{empty}", "--resume"], "--resume: no checkpoint in {empty}/checkpoints"),
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
    (tmp_path / "empty").mkdir()
    places = {"empty": str(tmp_path / "empty")}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    said = said_of_mistake(PROGRAM, [a.format(**places) for a in arguments], monkeypatch, capsys)
    assert says.format(**places) in said


def test_native_layers_learn_as_with_their_own_dispatch(texts: list[str]) -> None:
    data = ["--steps", "12", "--hidden-size", "32", "--experts", "4", *texts[-2:]]
    losses = {}
    for dispatch in ("ours", "stock"):
        done = run(torchrun_command(2, "train_deepspeed_native_moe.py", *data, "--dispatch", dispatch))
        assert done.returncode == 0, done.stderr[-3000:]
        losses[dispatch] = result(done.stdout)
    assert losses["ours"]["last_loss"] == pytest.approx(losses["stock"]["last_loss"], abs=1e-4)
    assert losses["ours"]["last_loss"] < losses["ours"]["first_loss"] - 0.5
    assert losses["ours"]["backend"] in ("host", "collective") and losses["stock"]["backend"] is None
