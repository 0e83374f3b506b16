"""The flag in all its ways: argv, a parser, the launcher; and what install and enable_cpu refuse."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_ep_plugin import BackendUnavailable, ConfigError
from moe_ep_plugin.integrations.megatron import add_arguments, enable_cpu, flags, install, rewrite_argv
from moe_ep_plugin.integrations.megatron.options import Options
from moe_ep_plugin.integrations.session import Session
from tests.conftest import lacking

from .conftest import WHEELS, Megatron, find_megatron

# What megatron.training imports at its top, in some version, and its wheel does not require.
NEEDED_BY_TRAINING = ("yaml",)
FLEX = ["--moe-token-dispatcher-type", "flex"]


@pytest.mark.parametrize("flag", ["--moe-token-dispatcher", "--moe-token-dispatcher-type"])
@pytest.mark.parametrize("joined", [False, True])
def test_deepep_becomes_flex(flag: str, joined: bool) -> None:
    words = [f"{flag}=deepep"] if joined else [flag, "deepep"]
    rest, options = rewrite_argv(["--lr", "1e-3", *words, "data", "--no-save"])
    assert rest == ["--lr", "1e-3", "data", "--no-save", *FLEX]
    assert options == {"take_flex": True}


@pytest.mark.parametrize("value", ["alltoall", "allgather", "flex"])
def test_other_dispatchers_pass(value: str) -> None:
    rest, options = rewrite_argv(["--moe-token-dispatcher", value])
    assert rest == ["--moe-token-dispatcher-type", value] and options == {}


def test_last_flag_counts() -> None:
    assert rewrite_argv(["--moe-token-dispatcher=deepep", "--moe-token-dispatcher-type=alltoall"])[1] == {}


def test_argv_without_the_flag_is_untouched() -> None:
    argv = ["--a", "--b=1", "--", "-x", "--moe-router-topk", "2"]
    assert rewrite_argv(argv) == (argv, {})


@pytest.mark.parametrize("selected", [[], ["--moe-token-dispatcher-type", "alltoall"]])
def test_options_count_without_deepep(selected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*selected, "--moe-ep-backend", "collective", "--moe-ep-shm-dir=/mnt/shm"]
    expected = {"backend": "collective", "shm_dir": "/mnt/shm"}
    assert rewrite_argv(argv) == (selected, expected)
    installed: dict[str, Any] = {}
    monkeypatch.setattr(flags, "install", lambda **options: installed.update(options))
    add_arguments(argparse.ArgumentParser()).parse_args(argv)
    assert installed == expected


@pytest.mark.parametrize(("words", "take_flex"), [(["deepep"], True), (["deepep", "flex"], False)])
def test_a_parser_takes_flex_only_for_deepep(
    words: list[str], take_flex: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed: dict[str, Any] = {}
    monkeypatch.setattr(flags, "install", lambda **options: installed.update(options))
    argv = [f"--moe-token-dispatcher={word}" for word in words]
    args = add_arguments(argparse.ArgumentParser()).parse_args(["--moe-ep-timeout=5", *argv])
    assert args.moe_token_dispatcher_type == "flex"
    assert installed == {"timeout_s": 5.0, "take_flex": take_flex}


def test_options_are_taken_out_and_typed() -> None:
    rest, options = rewrite_argv(
        ["--moe-ep-backend", "collective", "--moe-token-dispatcher", "deepep", "--moe-ep-timeout=7.5", "--seed", "1"]
        + ["--moe-ep-max-tokens-per-rank", "64", "--moe-ep-power-of-two-scales", "--moe-ep-wire", "fp8"]
        + ["--moe-ep-fp8=experts"]
    )
    assert rest == ["--seed", "1", *FLEX]
    assert options == {
        "backend": "collective",
        "timeout_s": 7.5,
        "max_tokens_per_rank": 64,
        "power_of_two_scales": True,
        "wire": "fp8",
        "fp8": "experts",
        "take_flex": True,
    }
    assert Options(**options).wire == "fp8" and Options(**options).fp8 == "experts"


def test_fp8_is_follow_or_experts() -> None:
    assert Options().fp8 == "follow"
    with pytest.raises(ConfigError, match="fp8 is 'blockwise'"):
        Session(Options()).configure(fp8="blockwise")


@pytest.mark.parametrize(
    "argv",
    [["--moe-token-dispatcher", "x"], ["--moe-ep-nothing", "1"], ["--moe-ep-backend"], ["--moe-ep-fp8", "blockwise"]],
)
def test_wrong_flags_end_the_program(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rewrite_argv(argv)
    assert "--moe-" in capsys.readouterr().err


class _Upstream:
    """Stands for ``megatron.core`` of some version."""

    def __init__(self, version: str) -> None:
        self.__version__ = version


@pytest.mark.parametrize("version", ["0.13.1", "0.20.0", "1.0.0", "0.20.0rc1", "unknown"])
def test_unsupported_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", _Upstream(version))  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailable) as error:
        install()
    assert version in str(error.value) and "0.14 to 0.19" in str(error.value) and "pip install" in str(error.value)


def test_missing_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailable, match="megatron.core can't be imported"):
        install()


def test_enable_cpu_refuses_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.cuda.current_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        enable_cpu()
    assert torch.cuda.current_device is before


def test_options_change_only_while_no_buffer_is_open() -> None:
    session = Session(Options())
    session.configure(timeout_s=5.0)
    assert session.options.timeout_s == 5.0
    with pytest.raises(ConfigError, match="no_such_option"):
        session.configure(no_such_option=1)
    session.dispatcher(None, num_experts=2, num_topk=1, hidden=8, dtype=torch.float32, num_tokens=3)
    session.configure(timeout_s=5.0)
    with pytest.raises(ConfigError, match="buffers are open"):
        session.configure(timeout_s=6.0)
    assert session.buffers[0].config.max_tokens_per_rank == 8
    assert session.buffers[0].config.shm_dir == Options().shm_dir == "/dev/shm"
    with pytest.raises(ConfigError, match="--moe-ep-max-tokens-per-rank 9, or install"):
        session.dispatcher(None, num_experts=2, num_topk=1, hidden=8, dtype=torch.float32, num_tokens=9)
    session.close()
    session.close()
    assert session.buffers == [] and session.statistics()["buffers"] == 0


INSTALLED = """
import copy, dataclasses, pickle, sys
from moe_ep_plugin.integrations.megatron import current_session, enable_cpu, install, statistics, uninstall
from megatron.core.transformer import torch_norm, transformer_block
# As where TransformerEngine is installed.
transformer_block.LayerNormImpl = type("TENorm", (), {})
enable_cpu(); enable_cpu()
assert transformer_block.LayerNormImpl is torch_norm.WrappedTorchNorm
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
before = moe_layer.MoEFlexTokenDispatcher, TransformerConfig.__post_init__, moe_layer.MoELayer.set_layer_number
assert current_session() is None and statistics() == {}
session = install(timeout_s=9.0)
assert install() is session and install(timeout_s=9.0) is session and current_session() is session
once = moe_layer.MoEFlexTokenDispatcher, TransformerConfig.__post_init__, moe_layer.MoELayer.set_layer_number
assert all(a is not b for a, b in zip(before, once))
make = dict(num_layers=1, hidden_size=16, num_attention_heads=2, num_moe_experts=4, moe_ffn_hidden_size=8,
            add_bias_linear=False)
ours = lambda c: c.moe_token_dispatcher_type == "flex" and type(c.moe_token_dispatcher_type) is not str
config = TransformerConfig(moe_token_dispatcher_type="deepep", **make)
for c in (config, copy.copy(config), copy.deepcopy(config), dataclasses.replace(config, hidden_size=32),
          MLATransformerConfig(moe_token_dispatcher_type="deepep", **make)):
    assert ours(c), c.moe_token_dispatcher_type
assert type(pickle.loads(pickle.dumps(config.moe_token_dispatcher_type))) is type(config.moe_token_dispatcher_type)
# What upstream's flex refuses and we have.
assert ours(TransformerConfig(moe_token_dispatcher_type="deepep", moe_expert_capacity_factor=1.0,
    moe_pad_expert_input_to_capacity=True, moe_shared_expert_intermediate_size=8, moe_shared_expert_overlap=True,
    **make))
for other in ("alltoall", "allgather", "flex"):
    assert not ours(TransformerConfig(moe_token_dispatcher_type=other, **make)), other
assert TransformerConfig(moe_token_dispatcher_type="alltoall", **make).moe_token_dispatcher_type == "alltoall"
try:
    TransformerConfig(moe_token_dispatcher_type="alltoall", moe_pad_expert_input_to_capacity=True, **make)
except ValueError: pass
else: raise AssertionError("upstream's validation is gone")
install(take_flex=True)
assert ours(TransformerConfig(moe_token_dispatcher_type="flex", **make))
assert once == (
    moe_layer.MoEFlexTokenDispatcher, TransformerConfig.__post_init__, moe_layer.MoELayer.set_layer_number)
uninstall(); uninstall()
assert before == (
    moe_layer.MoEFlexTokenDispatcher, TransformerConfig.__post_init__, moe_layer.MoELayer.set_layer_number)
print("DONE")
"""

SCRIPT = """
import argparse, sys
from megatron.core.transformer.transformer_config import TransformerConfig
parser = argparse.ArgumentParser()
parser.add_argument("--moe-token-dispatcher-type", choices=["allgather", "alltoall", "flex"], default="allgather")
parser.add_argument("--hidden-size", type=int)
parser.add_argument("--by-hand", action="store_true")
args = parser.parse_args()
kind = "deepep" if args.by_hand else args.moe_token_dispatcher_type
config = TransformerConfig(num_layers=1, hidden_size=args.hidden_size, num_attention_heads=2, num_moe_experts=4,
                           add_bias_linear=False, moe_token_dispatcher_type=kind)
import helper_beside_the_script
from moe_ep_plugin.integrations.megatron import current_session
print("RAN", __name__, sys.argv, current_session().options.timeout_s, type(config.moe_token_dispatcher_type).__name__)
"""

TRAINING = """
import sys, typing
if sys.version_info < (3, 12):
    typing.override = lambda method: method  # megatron.training declares Python 3.12; this is all that it uses of it.
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
{extra}
args = parse_args({provider})
validate_args(args, {{}})
config = core_transformer_config_from_args(args)
from moe_ep_plugin.integrations.megatron import current_session
print("RAN", type(config.moe_token_dispatcher_type).__name__, current_session().options)
"""


def test_install_and_configs(megatron: Megatron) -> None:
    done = megatron.python("-c", INSTALLED)
    assert done.returncode == 0 and "DONE" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("selected", "kind"),
    [
        (["--moe-token-dispatcher", "deepep"], "DispatcherType"),
        (["--moe-token-dispatcher", "alltoall"], "str"),
        (["--by-hand"], "DispatcherType"),
    ],
    ids=["deepep", "alltoall", "by_hand"],
)
def test_launcher_runs_an_unmodified_script(megatron: Megatron, tmp_path: Path, selected: list[str], kind: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    (tmp_path / "helper_beside_the_script.py").write_text("")
    done = megatron.python(
        "-m", "moe_ep_plugin.integrations.megatron", str(script), *selected, "--moe-ep-timeout=5",
        "--hidden-size", "16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "RAN __main__" in done.stdout and "--moe-ep-timeout" not in done.stdout
    assert done.stdout.split()[-2:] == ["5.0", kind]


@pytest.mark.parametrize("way", ["launcher", "provider"])
def test_megatrons_own_parser(tmp_path: Path, way: str) -> None:
    newest = [path.name for path in sorted(WHEELS.glob("0.1[7-9].*"), key=lambda p: p.name)]
    if not newest:
        lacking(f"no wheel in {WHEELS} holds megatron.training (0.17 and later do)")
    megatron = find_megatron(newest[-1])
    extra = "from moe_ep_plugin.integrations.megatron import add_arguments, enable_cpu; enable_cpu()"
    by_provider = {"extra": extra, "provider": "extra_args_provider=add_arguments"}
    fill: dict[str, Any] = by_provider if way == "provider" else {"extra": "", "provider": ""}
    script = tmp_path / "train.py"
    script.write_text(TRAINING.format(**fill))
    launcher = [] if way == "provider" else ["-m", "moe_ep_plugin.integrations.megatron"]
    done = megatron.python(
        *launcher, str(script), "--moe-token-dispatcher", "deepep", "--moe-ep-backend", "collective",
        "--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--num-experts", "4",
        "--disable-bias-linear", "--micro-batch-size", "1", "--seq-length", "16", "--max-position-embeddings", "16",
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0",
    )  # fmt: skip
    missing = re.search(r"No module named '(\w+)", done.stderr)
    if done.returncode != 0 and missing and missing[1] in NEEDED_BY_TRAINING:
        pytest.skip(f"megatron.training needs {missing[1]}, which its wheel does not require")
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("RAN DispatcherType") and "backend='collective'" in last and "take_flex=True" in last
