"""The loader of the compiled parts, and what the package says about its build."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moe_ep_plugin import BackendUnavailable, EpBuffer, EpConfig, __version__, _extension


@pytest.fixture
def fresh_loader(monkeypatch, tmp_path):
    """The loader with nothing remembered, reading its build record from a folder of the test's."""
    _extension._load.cache_clear()
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "_extension.py"))
    yield tmp_path
    _extension._load.cache_clear()


@pytest.mark.parametrize(
    ("record", "error", "reason"),
    [
        (None, None, "was not built; run `pip install .`"),
        ({"built": False, "note": "it needs Linux"}, None, "left out of this build: it needs Linux"),
        ({"built": True, "note": ""}, None, "not for this Python"),
        ({"built": True, "note": ""}, ImportError("GLIBCXX_9 not found"), "GLIBCXX_9 not found"),
        ({"built": True, "note": ""}, ModuleNotFoundError("no pybind11", name="pybind11"), "no pybind11"),
    ],
)
def test_failed_load_says_why_every_time(fresh_loader, monkeypatch, record, error, reason):
    if record is not None:
        (fresh_loader / "_build_info.json").write_text(json.dumps({"parts": {"host": record}}))
    calls = []

    def fail(name):
        calls.append(name)
        raise error or ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(_extension.importlib, "import_module", fail)
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="compiled host part") as caught:
            _extension.load_host()
        assert reason in str(caught.value)
    assert calls == ["moe_ep_plugin._host"]


def test_host_backend_that_can_not_load_is_named_with_the_reason(fresh_loader, monkeypatch):
    def fail(name):
        raise ImportError("wrong ELF class")

    monkeypatch.setattr(_extension.importlib, "import_module", fail)
    settings = {"num_experts": 2, "num_topk": 1, "hidden": 8, "max_tokens_per_rank": 1, "device": "cpu"}
    with pytest.raises(BackendUnavailable, match="wrong ELF class"):
        EpBuffer(None, EpConfig(**settings, backend="host"))
    with EpBuffer(None, EpConfig(**settings, backend="auto")) as buffer:
        assert buffer.backend == "collective"


def test_cuda_backend_that_is_not_there_says_so():
    settings = {"num_experts": 2, "num_topk": 1, "hidden": 8, "max_tokens_per_rank": 1, "device": "cpu"}
    with pytest.raises(BackendUnavailable, match="cuda"):
        EpBuffer(None, EpConfig(**settings, backend="cuda"))


def test_report_of_the_module():
    report = subprocess.run(
        [sys.executable, "-m", "moe_ep_plugin"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert report.startswith(f"moe_ep_plugin {__version__}; torch ")
    for backend in ("host", "collective", "cuda"):
        assert f"backend {backend}: " in report


def test_import_loads_no_binary_and_joins_no_group():
    code = (
        "import sys, moe_ep_plugin, torch.distributed as d;"
        "print('moe_ep_plugin._host' in sys.modules, d.is_initialized(), 'megatron' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert out.split() == ["False"] * 3
