"""Downloads Megatron-Core wheels and unpacks them for the tests.

    python tests/integrations/fetch_megatron.py [FOLDER [VERSION...]]

FOLDER defaults to $MEGATRON_WHEELS or .cache/megatron. Each version lands in FOLDER/VERSION, to be put on PYTHONPATH,
because no two can be installed at once and 0.17 and later declare Python 3.12, though their core runs on 3.11.
0.18 and later import triton, also without a GPU: pip install triton.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = ("0.14.0", "0.16.1", "0.19.2")


def fetch(version: str, folder: Path) -> None:
    """Unpack one version, unless it is there already."""
    target = folder / version
    if (target / "megatron").is_dir():
        print(f"megatron-core {version}: already in {target}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        platforms = [f"--platform=manylinux_{glibc}_x86_64" for glibc in ("2_28", "2_24")]
        print(f"megatron-core {version}: downloading", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", "--no-deps", "--only-binary=:all:"]
            + ["--python-version=3.12", "--implementation=cp", *platforms]
            + [f"--dest={scratch}", f"megatron-core=={version}"],
            check=False,
        )
        if done.returncode != 0:
            sys.exit(f"megatron-core {version}: pip could not download it (see above)")
        (wheel,) = Path(scratch).glob("*.whl")
        # Beside the target first, so that an interrupted run leaves nothing that looks complete.
        partial = folder / f".{version}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        partial.rename(target)
    print(f"megatron-core {version}: unpacked in {target}")


def main(arguments: list[str]) -> None:
    default = os.environ.get("MEGATRON_WHEELS", Path(__file__).parents[2] / ".cache" / "megatron")
    folder = Path(arguments[0] if arguments else default)
    folder.mkdir(parents=True, exist_ok=True)
    for version in arguments[1:] or VERSIONS:
        fetch(version, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
