"""The decode program: the model that it builds is the one that was trained, and what a user sees of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moe_ep_plugin import EpBuffer, EpConfig
from tests.conftest import BACKENDS, need_modules, why_unavailable
from tests.harness import RankPool

from .programs import EXAMPLES, records, result, run, said_of_mistake, torchrun_command

PROGRAM = "decode_low_latency.py"
TRAINING = "pretrain_megatron_moe.py"
WINDOWS = 10
# An odd number of layers: those of successive steps meet the two sets of slots the other way round.
MODEL = [
    *("--layers", "3", "--hidden-size", "32", "--experts", "4", "--seq-length", "16", "--shared-expert"),
    *("--micro-batch-size", "2", "--eval-windows", str(WINDOWS), "--lr", "1e-2"),
]
PROMPTS = ["the ", "quick brown", "j", "lazy"]
GREEDY = ["--tokens", "20", *(word for prompt in PROMPTS for word in ("--prompt", prompt))]

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


def texts(out: Path) -> list[str]:
    """Of all ranks, in their order."""
    return [json.loads(line)["text"] for line in (out / "texts.jsonl").read_text().splitlines()]


def megatron_logits(checkpoints: Path, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 [sequences, tokens, bytes]: of the model that was trained, on all ranks together."""
    import torch.distributed as dist

    from moe_ep_plugin.integrations.megatron import enable_cpu

    enable_cpu()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from pretrain.model import build_model
    from pretrain.options import parse_options
    from pretrain.saved import file_name, find

    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks, expert_tensor_parallel_size=1)
    model_parallel_cuda_manual_seed(1)
    options = parse_options([*MODEL, "--moe-token-dispatcher", "alltoall"], ranks)
    model = build_model(options, parallel_state.get_expert_model_parallel_rank(), torch.device("cpu")).eval()
    model.load_state_dict(torch.load(find(checkpoints) / file_name(dist.get_rank()))["model"], strict=False)
    length = tokens.shape[1]
    unseen = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, torch.arange(length).expand_as(tokens), unseen)
    return logits.float()


def decoder_logits(checkpoints: Path, tokens: torch.Tensor, backend: str) -> torch.Tensor:
    """The same of the decoder, one token at a time."""
    from decode.model import Decoder
    from decode.moe import Exchange
    from decode.weights import Checkpoint
    from pretrain.saved import find

    checkpoint = Checkpoint(find(checkpoints))
    shape, (batch, length) = checkpoint.shape, tokens.shape
    config = EpConfig(
        num_experts=shape.experts,
        num_topk=shape.topk,
        hidden=shape.hidden_size,
        max_tokens_per_rank=batch,
        low_latency_tokens_per_rank=batch,
        dtype=shape.dtype,
        backend=backend,
        device="cpu",
    )
    with EpBuffer(None, config) as buffer, torch.no_grad():
        device = torch.device("cpu")
        exchange = Exchange(buffer, hidden=shape.hidden_size, dtype=shape.dtype, device=device)
        decoder = Decoder(shape, batch=batch, exchange=exchange, device=device)
        checkpoint.load_into(decoder)
        return torch.stack([decoder(tokens[:, t], torch.tensor([t])) for t in range(length)], dim=1)


def difference(checkpoints: Path, backends: list[str]) -> dict[str, float]:
    """On every rank: how far the decoder's logits are from the trained model's, by backend."""
    import torch.distributed as dist

    sys.path.insert(0, str(EXAMPLES))
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    expected = megatron_logits(checkpoints, tokens)
    assert expected.shape == (2, 16, 256) and expected.std() > 0.1
    return {b: float((decoder_logits(checkpoints, tokens, b) - expected).abs().max()) for b in backends}


def test_logits_are_those_of_the_trained_model(trained: Trained) -> None:
    backends = [backend for backend in BACKENDS if why_unavailable(backend) is None]
    with RankPool(2, env={"TORCHDYNAMO_DISABLE": "1"}) as pool:
        for differences in pool.run(difference, trained.checkpoints, backends):
            assert differences.keys() == set(backends)
            assert max(differences.values()) < 1e-4, differences


@pytest.fixture(scope="module")
def alone(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What one rank writes, with the experts of two files."""
    out = tmp_path_factory.mktemp("alone")
    done = start(1, out, *GREEDY, "--batch", "4", "--backend", "collective", load=trained.checkpoints)
    assert done.returncode == 0, done.stderr
    return texts(out)


def test_ranks_share_the_experts(trained: Trained, alone: list[str], backend: str, tmp_path: Path) -> None:
    check = ["--check", "--data", trained.text, "--eval-windows", str(WINDOWS)]
    load = trained.checkpoints
    done = start(2, tmp_path, *GREEDY, *check, "--batch", "2", "--backend", backend, load=load)
    assert done.returncode == 0, done.stderr
    # Longer than the context, so that the caches wrap.
    assert texts(tmp_path) == alone
    assert [text[: len(prompt)] for text, prompt in zip(alone, PROMPTS, strict=True)] == PROMPTS
    assert [len(text) - len(prompt) for text, prompt in zip(alone, PROMPTS, strict=True)] == [20] * 4
    assert f"--- text 1 of 2 of rank 0\n{alone[0]}\n" in done.stdout

    numbers = result(done.stdout)
    assert numbers["reported_loss"] == trained.validation_loss
    assert numbers["loss"] == pytest.approx(trained.validation_loss, abs=1e-5)
    assert (numbers["ranks"], numbers["backend"], numbers["graph"], numbers["wire"]) == (2, backend, False, "bf16")
    assert 0 < numbers["step_ms_p50"] <= numbers["step_ms_p99"]
    assert numbers["dispatch_combine_ms_p50"] > 0 and numbers["tokens_per_second"] > 0
    *steps, last = records(tmp_path)
    assert [record["step"] for record in steps] == list(range(1, numbers["steps"] + 1))
    assert all(record["ms"] > 0 for record in steps) and last["result"] == numbers
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_trained_with_fp8_experts(trained: Trained, tmp_path: Path) -> None:
    training = tmp_path / "training"
    places = ["--data", trained.text, "--out", training, "--save", training / "checkpoints"]
    arguments = [*MODEL, "--moe-ep-fp8", "experts", "--steps", "5", *map(str, places)]
    done = run(torchrun_command(2, TRAINING, *arguments))
    assert done.returncode == 0, done.stderr
    check = ["--check", "--data", trained.text, "--eval-windows", str(WINDOWS), "--tokens", "4", "--prompt", "the "]
    decoded = start(1, tmp_path, *check, "--backend", "collective", load=training / "checkpoints")
    assert decoded.returncode == 0, decoded.stderr
    numbers, trained_loss = result(decoded.stdout), result(done.stdout)["validation_loss"]
    assert numbers["reported_loss"] == trained_loss
    # The weights as they are, where the training quantised them: other numbers, hardly another loss.
    assert 1e-6 < abs(numbers["loss"] - trained_loss) < 0.02


def test_random_model_with_drawn_bytes(tmp_path: Path) -> None:
    sizes = ["--random", "--layers", "2", "--hidden-size", "64", "--experts", "3", "--dtype", "bf16", "--context", "8"]
    drawing = ["--temperature", "1", "--top-k", "9", "--wire", "fp8", "--tokens", "20", "--batch", "2"]
    done = start(1, tmp_path, *sizes, *drawing, "--prompt", "a", "--backend", "collective")
    assert done.returncode == 0, done.stderr
    assert (result(done.stdout)["wire"], result(done.stdout)["dtype"]) == ("fp8", "bfloat16")
    first, second = texts(tmp_path)
    assert first != second


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--load", "{trained}", "--check", "--data", "{text}"], "{trained}/step-00000020 was trained on other text"),
        ([], "no checkpoint: runs/pretrain/checkpoints isn't there; train one with: make pretrain"),
        (
            ["--load", "no-such-place"],
            "--load no-such-place: there is no such directory; train one with: make pretrain",
        ),
        (["--load", "{empty}"], "--load {empty}: no complete checkpoint is in it"),
        (["--load", "{broken}"], "{broken}/rank-00000.pt can't be read"),
        (["--random", "--load", "{empty}"], "--load: a --random model has no checkpoint"),
        (["--random", "--check"], "--check: a --random model has no checkpoint"),
        (["--layers", "2"], "--layers: a checkpoint has its own; give it with --random only"),
        (["--random", "--topk", "17"], "--topk 17: there are only 16 experts"),
        (["--random", "--hidden-size", "100"], "--hidden-size 100: it must be a multiple of 32"),
        (["--random", "--top-k", "5"], "--top-k 5: at --temperature 0 nothing is drawn"),
        (["--random", "--temperature", "-1"], "argument --temperature: -1.0 is not 0 or above"),
        (["--random", "--prompt", ""], "--prompt '': it is empty"),
        (["--random", "--tokens", "0"], "argument --tokens: 0 is below 1"),
        (
            ["--random", "--batch", "5000"],
            "--batch 5000: with 2 experts a token, low-latency operations take at most 4096 sequences",
        ),
        (["--random", "--backend", "none"], "invalid choice: 'none'"),
        (["--random", "--out", "{broken}/rank-00000.pt"], "it exists and is not a directory"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str],
    says: str,
    trained: Trained,
    tmp_path: Path,
    decode_on_path: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {name: str(tmp_path / name) for name in ("empty", "broken", "text")}
    for place in places.values():
        Path(place).mkdir()
    places["trained"] = str(trained.checkpoints)
    (tmp_path / "text" / "other.txt").write_text("some other text")
    (tmp_path / "broken" / "rank-00000.pt").write_bytes(b"not a checkpoint")
    monkeypatch.chdir(tmp_path)
    said = said_of_mistake(PROGRAM, [a.format(**places) for a in arguments], monkeypatch, capsys)
    assert says.format(**places) in said
