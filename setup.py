"""Builds the compiled parts; everything declarative is in pyproject.toml.

Nothing here needs torch: csrc binds through pybind11 and takes addresses, so one binary serves every torch
version. Each part that can't be built on this machine is left out with a reason, which is printed (``pip
install -v``) and kept in ``moe_ep_plugin/_build_info.json`` for ``python -m moe_ep_plugin``. A part that should
build but fails to compile stops the installation: a silent fallback would be found out much later.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
CSRC = Path("csrc")
PACKAGE = "moe_ep_plugin"

# Results are bit-exact by definition: no contraction into fused multiply-adds, on any instruction set.
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-fvisibility=hidden",
    "-pthread",
]
# The one file that may use AVX2: chosen at run time, so the rest must stay on the baseline instruction set.
AVX2_SOURCE = "kernels_avx2.cpp"
AVX2_FLAGS = ["-mavx2", "-mf16c", "-mno-fma"]
AVX2_MACRO = ("MOE_EP_HAVE_AVX2", "1")

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
    return relative((ROOT / CSRC).rglob("*.h"))


PARTS = {"host": host_part(), "cuda": (None, NO_KERNELS), "nvshmem": (None, NO_KERNELS)}


def report(package_dir: Path) -> None:
    """Print what this build contains and keep it beside the package's modules."""
    info = {name: {"built": ext is not None, "note": note} for name, (ext, note) in PARTS.items()}
    for name, part in info.items():
        print(f"{PACKAGE}: {name}: {'built' if part['built'] else 'not built'}: {part['note']}", flush=True)
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
        newest_header = max((Path(h).stat().st_mtime for h in ext.depends), default=0.0)
        newest_header = max(newest_header, (ROOT / "setup.py").stat().st_mtime)
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            jobs = [threads.submit(self._compile, ext, source, newest_header) for source in ext.sources]
            objects = [job.result() for job in jobs]
        ext.extra_objects = [*(ext.extra_objects or []), *objects]
        # With no sources left, setuptools decides by these whether to link again.
        ext.depends, ext.sources = [*ext.depends, *ext.sources, "setup.py"], []
        super().build_extension(ext)

    def _compile(self, ext: Extension, source: str, newest_header: float) -> str:
        # One folder an extension: two may compile the same file with different flags.
        target = Path(self.build_temp) / ext.name.rpartition(".")[2] / Path(source).with_suffix(".o")
        if target.exists() and target.stat().st_mtime > max(newest_header, Path(source).stat().st_mtime):
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = [*ext.extra_compile_args, *(AVX2_FLAGS if source.endswith(AVX2_SOURCE) else [])]
        (compiled,) = self.compiler.compile(
            [source],
            output_dir=str(Path(self.build_temp) / ext.name.rpartition(".")[2]),
            macros=list(ext.define_macros),
            include_dirs=ext.include_dirs,
            debug=self.debug,
            extra_postargs=flags,
        )
        return str(compiled)


setup(
    ext_modules=[ext for ext, _ in PARTS.values() if ext is not None],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
