"""The loader of the compiled parts, and what the package says about its build."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from moe_ep_plugin import BackendUnavailable, EpBuffer, EpConfig, __main__, __version__, _extension

SETUP = Path(__file__).parents[1] / "setup.py"
# Answers a dry run as nvcc of CUDA 12.4 does, which has no Blackwell; STATUS, TOP and SETTINGS are the test's.
NVCC = """#!/bin/sh
case "$*" in *sm_100a*) echo "nvcc fatal : Unsupported gpu architecture" >&2; exit 1;; esac
cat >&2 <<'END'
#$ TOP={top}
{settings}
#$ gcc -D__CUDACC_VER_MAJOR__=12 -D__CUDACC_VER_MINOR__=4 -D__CUDACC_VER_BUILD__=131 -E null.cu
END
exit {status}
"""


@pytest.fixture
def fresh_loader(monkeypatch, tmp_path):
    """The loader with nothing remembered, reading its build record from a folder of the test's."""
    _extension._load.cache_clear()
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "_extension.py"))
    yield tmp_path
    _extension._load.cache_clear()


@pytest.mark.parametrize("part", ["host", "cuda"])
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
def test_failed_load_says_why_every_time(fresh_loader, monkeypatch, part, record, error, reason):
    if record is not None:
        (fresh_loader / "_build_info.json").write_text(json.dumps({"parts": {part: record}}))
    calls = []

    def fail(name):
        calls.append(name)
        raise error or ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(_extension.importlib, "import_module", fail)
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=f"compiled {part} part") as caught:
            getattr(_extension, f"load_{part}")()
        assert reason in str(caught.value)
    assert calls == [f"moe_ep_plugin._{part}"]


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


@pytest.fixture
def build(monkeypatch):
    """Runs setup.py's definitions, which look at the machine, without building anything."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    for name in ("NVCC", "CUDA_HOME", "MOE_EP_BUILD_CUDA", "MOE_EP_CUDA_ARCHITECTURES"):
        monkeypatch.delenv(name, raising=False)
    return lambda: runpy.run_path(str(SETUP))


@pytest.fixture
def make_toolkit(tmp_path, monkeypatch):
    """Puts a CUDA toolkit in front of any other: a compiler that only plans, and empty headers and libraries."""

    def make(include="include", library="lib64", settings="", status=0):
        files = {"bin/nvcc": NVCC.format(top=tmp_path, settings=settings.format(top=tmp_path), status=status)}
        for name in (f"{include}/cuda_runtime_api.h", f"{library}/libcudart_static.a"):
            files[name] = ""
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        (tmp_path / "bin/nvcc").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        return tmp_path

    return make


def test_cuda_part_is_left_out_where_asked_to(build, make_toolkit, monkeypatch):
    make_toolkit()
    monkeypatch.setenv("MOE_EP_BUILD_CUDA", "0")
    assert build()["PARTS"]["cuda"] == (None, "MOE_EP_BUILD_CUDA=0")


def test_cuda_part_without_a_compiler_says_where_it_looked(build, monkeypatch, tmp_path):
    monkeypatch.setenv("NVCC", f"{tmp_path}/nvcc")
    extension, reason = build()["PARTS"]["cuda"]
    assert extension is None
    assert reason.startswith(f"NVCC={tmp_path}/nvcc is no program; install the CUDA toolkit")

    monkeypatch.delenv("NVCC")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda *args, **options: None)
    extension, reason = build()["PARTS"]["cuda"]
    assert extension is None
    assert reason.startswith(f"no nvcc on PATH or in {tmp_path}/bin or /usr/local/cuda/bin; install")


def test_compiler_in_cuda_home_is_found(build, make_toolkit, monkeypatch):
    top = make_toolkit()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(top))
    # The script of the test needs a PATH that the search doesn't see.
    text = (top / "bin/nvcc").read_text()
    (top / "bin/nvcc").write_text(text.replace("\n", "\nPATH=/usr/bin:/bin\n", 1))
    assert build()["find_toolkit"]().nvcc == f"{top}/bin/nvcc"


@pytest.mark.parametrize(
    ("include", "library", "settings"),
    [
        ("include", "lib64", ""),
        (
            "targets/a b/include",
            "targets/a b/lib",
            '#$ INCLUDES="-I{top}/bin/../targets/a b/include"  \n'
            '#$ SYSTEM_INCLUDES="-isystem" "{top}/bin/../targets/a b/include/cccl"  \n'
            '#$ LIBRARIES=  "-L{top}/targets/a b/lib/stubs" "-L{top}/targets/a b/lib"',
        ),
    ],
)
def test_toolkit_is_where_its_compiler_says(build, make_toolkit, include, library, settings):
    top = make_toolkit(include, library, settings)
    toolkit = build()["find_toolkit"]()
    assert toolkit == (f"{top}/bin/nvcc", "12.4.131", [f"{top}/{include}"], [f"{top}/{library}"])


def test_toolkit_that_can_not_build_is_named_with_the_reason(build, make_toolkit):
    top = make_toolkit(library="elsewhere")
    assert f"{top}/bin/nvcc comes without libcudart_static.a" in build()["find_toolkit"]()
    make_toolkit(status=1)
    assert f"{top}/bin/nvcc does not work: " in build()["find_toolkit"]()


@pytest.mark.skipif(not (SETUP.parent / "csrc/bindings_cuda.cpp").exists(), reason="sources without a CUDA part")
def test_architectures_are_those_asked_for_that_the_compiler_knows(build, make_toolkit, monkeypatch):
    make_toolkit()
    extension, note = build()["PARTS"]["cuda"]
    assert note == "nvcc 12.4.131, sm_80, sm_90a; without sm_100a, which this nvcc does not know"
    assert [option for option in extension.nvcc if "gencode" in option] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    assert "-fmad=false" in extension.nvcc
    folders = {extension.kernels}
    for value in ("90a", " 90a, 80;"):
        monkeypatch.setenv("MOE_EP_CUDA_ARCHITECTURES", value)
        extension, note = build()["PARTS"]["cuda"]
        assert note == "nvcc 12.4.131, " + ", ".join(f"sm_{a}" for a in value.strip(" ;").split(", "))
        folders.add(extension.kernels)
    assert len(folders) == 3

    monkeypatch.setenv("MOE_EP_CUDA_ARCHITECTURES", "100a")
    extension, reason = build()["PARTS"]["cuda"]
    assert extension is None
    assert "knows none of 100a; install a newer CUDA toolkit" in reason
    monkeypatch.setenv("MOE_EP_CUDA_ARCHITECTURES", "80 sm_90")
    with pytest.raises(SystemExit, match="MOE_EP_CUDA_ARCHITECTURES: 'sm_90' is no architecture; write such as"):
        build()


def test_part_that_is_left_out_leaves_no_binary_of_an_earlier_build(build, monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_EP_BUILD_CUDA", "0")
    for name in ("_cuda.cpython-311.so", "_host.cpython-311.so"):
        (tmp_path / name).write_text("")
    build()["report"](tmp_path)
    assert not (tmp_path / "_cuda.cpython-311.so").exists()
    assert (tmp_path / "_host.cpython-311.so").exists()
    record = json.loads((tmp_path / "_build_info.json").read_text())["parts"]["cuda"]
    assert record == {"built": False, "note": "MOE_EP_BUILD_CUDA=0"}


def test_parts_that_were_built_load_without_a_device():
    code = "from moe_ep_plugin._extension import build_info, load_cuda, load_host as host\n"
    code += "parts = build_info()['parts']\n"
    code += "print([f() is not None for n, f in (('host', host), ('cuda', load_cuda)) if parts[n]['built']])"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


@pytest.mark.parametrize(
    ("version", "error", "names", "state"),
    [
        (None, None, [], "this torch was built without CUDA"),
        (
            "13.0",
            RuntimeError("Found no NVIDIA driver\nInstall one"),
            [],
            "torch can't use CUDA: Found no NVIDIA driver",
        ),
        ("13.0", None, ["NVIDIA H200"], "available (1 device, NVIDIA H200)"),
        ("13.0", None, ["A", "B", "A"], "available (3 devices, A, B)"),
    ],
)
def test_report_of_cuda(monkeypatch, version, error, names, state):
    def start():
        if error is not None:
            raise error

    monkeypatch.setattr(__main__, "load_cuda", lambda: None)
    monkeypatch.setattr("torch.version.cuda", version)
    monkeypatch.setattr("torch.cuda.init", start)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(names))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: names[index])
    assert __main__.cuda_state().startswith(state)


def test_import_loads_no_binary_and_joins_no_group():
    code = (
        "import sys, moe_ep_plugin, torch.distributed as d;"
        "binaries = {'moe_ep_plugin._host', 'moe_ep_plugin._cuda'} & set(sys.modules);"
        "print(bool(binaries), d.is_initialized(), 'megatron' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert out.split() == ["False"] * 3
