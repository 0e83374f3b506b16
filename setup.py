"""Builds the compiled parts; everything declarative is in pyproject.toml.

Nothing here needs torch: csrc binds through pybind11 and takes addresses, so one binary serves every torch
version. Each part that can't be built on this machine is left out with a reason, which is printed (``pip
install -v``) and kept in ``moe_ep_plugin/_build_info.json`` for ``python -m moe_ep_plugin``. A part that should
build but fails to compile stops the installation: a silent fallback would be found out much later.

Environment: NVCC, the CUDA compiler (else the one on PATH, in $CUDA_HOME/bin or /usr/local/cuda/bin);
MOE_EP_CUDA_ARCHITECTURES, such as "90a 100a"; MOE_EP_BUILD_CUDA=0 leaves the CUDA part out. ``python setup.py
kernels`` compiles the CUDA kernels and links nothing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
CSRC = Path("csrc")
PACKAGE = "moe_ep_plugin"

# Results are bit-exact by definition: no contraction into fused multiply-adds, on any instruction set.
CXX_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
CXX_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo", "-Icsrc"]
NVCC_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
# The one file that may use AVX2: chosen at run time, so the rest must stay on the baseline instruction set.
AVX2_SOURCE = "kernels_avx2.cpp"
AVX2_FLAGS = ["-mavx2", "-mf16c", "-mno-fma"]
AVX2_MACRO = ("MOE_EP_HAVE_AVX2", "1")
# Binaries for Ampere, Hopper and Blackwell data-centre GPUs; 'a' turns on what only that architecture has.
CUDA_ARCHITECTURES = "80;90a;100a"
# Kernels know neither Python nor the kind of build, so all builds in this tree share their objects.
KERNELS = Path("build") / "kernels"

NO_KERNELS = "no kernels in this version yet"


def relative(paths: object) -> list[str]:
    """Sorted paths below the project, as setuptools wants them."""
    return sorted(str(p.relative_to(ROOT)) for p in paths)  # type: ignore[attr-defined]


def host_part() -> tuple[Extension | None, str]:
    """The shared-memory backend: the extension and a note, or None and the reason."""
    if not sys.platform.startswith("linux"):
        return None, f"it needs Linux shared memory and futexes; this is {sys.platform}"
    bindings = CSRC / "bindings_host.cpp"
    if not (ROOT / bindings).exists():
        return None, f"{bindings} is missing from the sources"
    sources = [str(bindings), *relative((ROOT / CSRC / "host").glob("*.cpp"))]
    avx2 = [s for s in sources if s.endswith(AVX2_SOURCE)]
    with_avx2 = bool(avx2) and platform.machine().lower() in ("x86_64", "amd64")
    if not with_avx2:
        sources = [s for s in sources if s not in avx2]
    extension = Extension(
        f"{PACKAGE}._host",
        sources=sources,
        include_dirs=[str(CSRC), pybind11.get_include()],
        define_macros=[AVX2_MACRO] if with_avx2 else [],
        extra_compile_args=CXX_FLAGS,
        extra_link_args=["-pthread"],
        libraries=["rt"],  # shm_open before glibc 2.34
        depends=headers(),
        language="c++",
    )
    return extension, "with AVX2 kernels" if with_avx2 else f"baseline {platform.machine()} kernels"


def headers() -> list[str]:
    """Every header below csrc: a change in one rebuilds what depends on any."""
    return relative(path for kind in ("*.h", "*.cuh") for path in (ROOT / CSRC).rglob(kind))


class Toolkit(NamedTuple):
    """A CUDA compiler and where its headers and libraries are; no folder where the system's have them."""

    nvcc: str
    version: str
    include_dirs: list[str]
    library_dirs: list[str]


class CudaExtension(Extension):
    """An extension with kernels: the command that compiles one, and the folder of their objects."""

    nvcc: list[str]
    kernels: Path


def gencode(architecture: str) -> str:
    """The option that adds the binary of an architecture, and no PTX, to an object."""
    return f"-gencode=arch=compute_{architecture},code=sm_{architecture}"


def dry_run(nvcc: str, *options: str) -> subprocess.CompletedProcess[str]:
    """What nvcc would do to an empty source, on stderr; it fails on an architecture that it doesn't know."""
    return subprocess.run([nvcc, "--dryrun", *options, "-x", "cu", "-c", os.devnull], capture_output=True, text=True)


def find_toolkit() -> Toolkit | str:
    """The CUDA toolkit to build with, or why there is none."""
    asked = os.environ.get("NVCC")
    places = [f"{folder}/bin" for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if folder]
    nvcc = shutil.which(asked or "nvcc") or (None if asked else shutil.which("nvcc", path=os.pathsep.join(places)))
    if nvcc is None:
        looked = f"NVCC={asked} is no program" if asked else f"no nvcc on PATH or in {' or '.join(places)}"
        return f"{looked}; install the CUDA toolkit or set NVCC, then build again"
    # nvcc may be a script or a link that leads elsewhere, and only it knows how its toolkit is laid out.
    plan = dry_run(nvcc)
    version = re.search(r"MAJOR__=(\d+) \S+MINOR__=(\d+) \S+BUILD__=(\d+)", plan.stderr)
    if plan.returncode or version is None:
        return f"{nvcc} does not work: {(plan.stderr.strip().splitlines() or ['it prints nothing'])[-1]}"
    plans = defaultdict(str, re.findall(r"^#\$ (\w+)=(.*)$", plan.stderr, re.MULTILINE))
    top = plans["TOP"].strip()
    system = ["/usr/include", "/usr/lib64", f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}"]
    folders = []
    for wanted, options in (
        ("cuda_runtime_api.h", f"{plans['INCLUDES']} {plans['SYSTEM_INCLUDES']} -I{top}/include"),
        ("libcudart_static.a", f"{plans['LIBRARIES']} -L{top}/lib64 -L{top}/lib"),
    ):
        paths = [os.path.realpath(re.sub("^-[IL]", "", word)) for word in shlex.split(options) if "/" in word]
        folders.append(list(filter(os.path.isdir, dict.fromkeys(paths))))
        if not any(os.path.exists(f"{folder}/{wanted}") for folder in (*folders[-1], *system)):
            return f"{nvcc} comes without {wanted}; install the whole CUDA toolkit or set NVCC, then build again"
    return Toolkit(nvcc, ".".join(version.groups()), *folders)


def cuda_part() -> tuple[CudaExtension | None, str]:
    """The CUDA backend: the extension and a note, or None and the reason."""
    if os.environ.get("MOE_EP_BUILD_CUDA") == "0":
        return None, "MOE_EP_BUILD_CUDA=0"
    if not sys.platform.startswith("linux"):
        return None, f"it needs Linux; this is {sys.platform}"
    toolkit = find_toolkit()
    if isinstance(toolkit, str):
        return None, toolkit
    bindings = CSRC / "bindings_cuda.cpp"
    if not (ROOT / bindings).exists():
        return None, f"{bindings} is missing from the sources"
    asked = re.split(r"[;,\s]+", (os.environ.get("MOE_EP_CUDA_ARCHITECTURES") or CUDA_ARCHITECTURES).strip(";, "))
    if wrong := [a for a in asked if not re.fullmatch(r"\d+[af]?", a)]:
        sys.exit(f"MOE_EP_CUDA_ARCHITECTURES: {wrong[0]!r} is no architecture; write such as {CUDA_ARCHITECTURES!r}")
    known = [a for a in dict.fromkeys(asked) if not dry_run(toolkit.nvcc, gencode(a)).returncode]
    left_out = "".join(f"; without sm_{a}, which this nvcc does not know" for a in asked if a not in known)
    if not known:
        return None, f"{toolkit.nvcc} {toolkit.version} knows none of {', '.join(asked)}; install a newer CUDA toolkit"
    kernels = relative((ROOT / CSRC / "cuda").rglob("*.cu"))
    extension = CudaExtension(
        f"{PACKAGE}._cuda",
        # Kernels take longest, so they start first.
        sources=[*kernels, str(bindings), *relative((ROOT / CSRC / "cuda").rglob("*.cpp"))],
        include_dirs=[str(CSRC), pybind11.get_include(), *toolkit.include_dirs],
        extra_compile_args=CXX_FLAGS,
        # The runtime goes in: torch's own may be of another version. Its symbols must not be looked up there either.
        libraries=["cudart_static", "dl", "rt", "pthread"],
        library_dirs=toolkit.library_dirs,
        extra_link_args=["-pthread", "-Wl,--exclude-libs,ALL"],
        depends=headers(),
        language="c++",
    )
    # Where there are more cores than kernels, the architectures of one are compiled at once too.
    threads = f"--threads={max(1, (os.cpu_count() or 1) // max(1, len(kernels)))}"
    extension.nvcc = [toolkit.nvcc, *NVCC_FLAGS, threads, *map(gencode, known)]
    extension.kernels = KERNELS / "-".join(["cuda", toolkit.version, *known])
    return extension, f"nvcc {toolkit.version}, {', '.join(f'sm_{a}' for a in known)}{left_out}"


PARTS = {"host": host_part(), "cuda": cuda_part(), "nvshmem": (None, NO_KERNELS)}


def report(package_dir: Path) -> None:
    """Print what this build contains and keep it beside the package's modules."""
    info = {name: {"built": ext is not None, "note": note} for name, (ext, note) in PARTS.items()}
    for name, part in info.items():
        print(f"{PACKAGE}: {name}: {'built' if part['built'] else 'not built'}: {part['note']}", flush=True)
        if not part["built"]:  # Nor may what an earlier build left here be loaded or packed.
            for stale in package_dir.glob(f"_{name}.*.so"):
                stale.unlink()
    package_dir.mkdir(parents=True, exist_ok=True)
    (package_dir / "_build_info.json").write_text(
        json.dumps({"python": sys.version.split()[0], "parts": info}, indent=2)
    )


class BuildPy(build_py):
    """Adds the record of what was built; also runs where there is nothing to compile."""

    def run(self) -> None:
        """Copy the modules, then write the record."""
        super().run()
        report(ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE)


class BuildExt(build_ext):
    """Compiles sources in parallel, each with its own flags, and only those that changed."""

    def run(self) -> None:
        """Build; an in-place build writes its record in place too."""
        super().run()
        if self.inplace:
            report(ROOT / PACKAGE)

    def build_extension(self, ext: Extension) -> None:
        """Compile to objects here and leave the linking to setuptools."""
        ext.extra_objects = [*(ext.extra_objects or []), *self.compile_all(ext, ext.sources)]
        ext.sources = []
        # Linking is quick; what is there may be of other architectures, which no file's time tells.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().build_extension(ext)

    def compile_all(self, ext: Extension, sources: list[str]) -> list[str]:
        """The objects of some of an extension's sources, compiled where they are missing or old."""
        newest = max(Path(p).stat().st_mtime for p in (*ext.depends, ROOT / "setup.py"))
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            return list(threads.map(lambda source: self._object(ext, source, newest), sources))

    def _object(self, ext: Extension, source: str, newest_header: float) -> str:
        # One folder an extension: two may compile the same file with different flags.
        is_kernel = source.endswith(".cu")
        folder = ext.kernels if is_kernel else Path(self.build_temp) / ext.name.rpartition(".")[2]
        target = folder / Path(source).with_suffix(".o")
        if not (target.exists() and target.stat().st_mtime > max(newest_header, Path(source).stat().st_mtime)):
            target.parent.mkdir(parents=True, exist_ok=True)
            (self._compile_cuda if is_kernel else self._compile_cpp)(ext, source, folder, target)
        return str(target)

    def _compile_cpp(self, ext: Extension, source: str, folder: Path, target: Path) -> None:
        self.compiler.compile(
            [source],
            output_dir=str(folder),
            macros=list(ext.define_macros),
            include_dirs=ext.include_dirs,
            debug=self.debug,
            extra_postargs=[*ext.extra_compile_args, *(AVX2_FLAGS if source.endswith(AVX2_SOURCE) else [])],
        )

    def _compile_cuda(self, ext: CudaExtension, source: str, folder: Path, target: Path) -> None:
        # Builds may run at the same time: each writes a file of its own, and a whole one takes the name. Its time is
        # that of the start: an edit while nvcc was at work is then seen by the next build.
        own, started = target.with_suffix(f".{os.getpid()}.o"), time.time()
        command = [*ext.nvcc, "-c", source, "-o", str(own)]
        print(shlex.join(command), flush=True)
        try:
            if subprocess.run(command).returncode:
                raise CompileError(f"nvcc failed on {source}; MOE_EP_BUILD_CUDA=0 builds without the CUDA part")
            os.utime(own, (started, started))
            own.replace(target)
        finally:
            own.unlink(missing_ok=True)


class Kernels(BuildExt):
    """``python setup.py kernels``: the CUDA kernels' objects, up to date for the next build."""

    def run(self) -> None:
        """Compile, or say why not."""
        ext, note = PARTS["cuda"]
        if ext is not None:
            for target in self.compile_all(ext, [s for s in ext.sources if s.endswith(".cu")]):
                print(f"kernels: {target}")
        print(f"kernels: {'compiled' if ext else 'skipped'}: {note}")


setup(
    ext_modules=[ext for ext, _ in PARTS.values() if ext is not None],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "kernels": Kernels},
)
