"""Downloads the framework versions that the tests run with and unpacks them.

    python tests/integrations/fetch_frameworks.py megatron|deepspeed [FOLDER [VERSION...]]

FOLDER defaults to $MEGATRON_WHEELS or $DEEPSPEED_WHEELS, else .cache/megatron or .cache/deepspeed. Each version lands
in FOLDER/VERSION, to be put on PYTHONPATH, because no two can be installed at once; and Megatron-Core 0.17 and later
declare Python 3.12, though their core runs on 3.11. Megatron-Core 0.18 and later import triton, also without a GPU: pip
install triton. What DeepSpeed needs comes with the package's extra ``deepspeed``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Where a framework's wheels come from.

    Attributes:
        project: Name in the package index.
        package: Folder of the wheel that shows that it is unpacked.
        versions: What the tests run with.
        pip: pip's command and options that leave a wheel in ``--{into}=FOLDER``.
        into: Name of that option.
        environment: Set while pip runs.
    """

    project: str
    package: str
    versions: tuple[str, ...]
    pip: tuple[str, ...]
    into: str
    environment: dict[str, str]


SOURCES = {
    "megatron": Source(
        "megatron-core",
        "megatron",
        ("0.14.0", "0.16.1", "0.19.2"),
        (
            *("download", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"),
            *("--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_24_x86_64"),
        ),
        "dest",
        {},
    ),
    # Published as sources: pip builds a wheel, of Python files alone with these settings.
    "deepspeed": Source(
        "deepspeed",
        "deepspeed",
        ("0.18.9", "0.19.3", "0.19.8"),
        ("wheel",),
        "wheel-dir",
        {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"},
    ),
}


def default_folder(framework: str) -> Path:
    """Where the versions of a framework lie unless a folder is given."""
    return Path(os.environ.get(f"{framework.upper()}_WHEELS", Path(__file__).parents[2] / ".cache" / framework))


def fetch(source: Source, version: str, folder: Path) -> None:
    """Unpack one version, unless it is there already."""
    target = folder / version
    if (target / source.package).is_dir():
        print(f"{source.project} {version}: already in {target}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{source.project} {version}: downloading", flush=True)
        command, *options = source.pip
        done = subprocess.run(
            [sys.executable, "-m", "pip", command, "--quiet", "--retries=1", "--no-deps", *options]
            + [f"--{source.into}={scratch}", f"{source.project}=={version}"],
            env=os.environ | source.environment,
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"{source.project} {version}: pip could not get it (see above)")
        (wheel,) = Path(scratch).glob("*.whl")
        # Beside the target first, so that an interrupted run leaves nothing that looks complete.
        partial = folder / f".{version}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        partial.rename(target)
    print(f"{source.project} {version}: unpacked in {target}")


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in SOURCES:
        sys.exit(__doc__)
    framework, *rest = arguments
    folder = Path(rest[0]) if rest else default_folder(framework)
    folder.mkdir(parents=True, exist_ok=True)
    for version in rest[1:] or SOURCES[framework].versions:
        fetch(SOURCES[framework], version, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
