"""The patches for source trees: well-formed, and they apply to the releases that they name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import REPOSITORY, WHEELS, DeepSpeed, find_deepspeed

LINES = ("0.14", "0.15", "0.16", "0.17", "0.18", "0.19")
TARGET = "megatron/training/arguments.py"
DEEPSPEED_PATCH = REPOSITORY / "patches" / "deepspeed-0.19.8.patch"


def patch_of(line: str) -> Path:
    return REPOSITORY / "patches" / f"megatron-lm-{line}.patch"


def git(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=check)


def apply_and_compile(line: str, text: str, folder: Path) -> str:
    """The patched file; it must compile, and reversing the patch must restore it."""
    file = folder / TARGET
    file.parent.mkdir(parents=True)
    file.write_text(text)
    applied = git("apply", str(patch_of(line)), cwd=folder, check=False)
    assert applied.returncode == 0, applied.stderr
    patched = file.read_text()
    compile(patched, TARGET, "exec")
    git("apply", "--reverse", str(patch_of(line)), cwd=folder)
    assert file.read_text() == text
    return patched


def test_every_line_has_a_patch_and_the_readme_names_it() -> None:
    names = {path.name for path in (REPOSITORY / "patches").glob("*.patch")}
    assert names == {patch_of(line).name for line in LINES} | {DEEPSPEED_PATCH.name}
    readme = (REPOSITORY / "patches" / "README.md").read_text()
    assert all(name in readme for name in names)


@pytest.mark.parametrize("line", LINES)
def test_hunks_are_well_formed(line: str) -> None:
    lines = patch_of(line).read_text().splitlines()
    assert lines[:2] == [f"--- a/{TARGET}", f"+++ b/{TARGET}"]
    header = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")
    starts = [index for index, text in enumerate(lines) if header.match(text)]
    assert starts and starts[0] == 2
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        found = header.match(lines[start])
        assert found is not None
        body = lines[start + 1 : end]
        assert all(text[:1] in (" ", "+", "-") for text in body)
        assert int(found[1] or 1) == sum(text[0] in " -" for text in body)
        assert int(found[2] or 1) == sum(text[0] in " +" for text in body)
    added = [text[1:].strip() for text in lines if text.startswith("+") and not text.startswith("+++")]
    assert "from moe_ep_plugin.integrations.megatron import add_arguments" in added
    assert sum(text.startswith((" ", "-")) for text in lines[2:]) <= 6, "more upstream text than a hunk needs"


def test_patches_apply_to_wheels(tmp_path: Path) -> None:
    applied = 0
    for path in sorted(WHEELS.glob("*/megatron/training/arguments.py")):
        version = path.parents[2].name
        line = ".".join(version.split(".")[:2])
        if line in LINES:
            folder = tmp_path / version
            folder.mkdir()
            assert "add_arguments" in apply_and_compile(line, path.read_text(), folder)
            applied += 1
    if not applied:
        pytest.skip(f"no wheel in {WHEELS} holds {TARGET} (0.17 and later do)")


@pytest.mark.parametrize("line", LINES)
def test_patches_apply_to_release_tags(line: str, tmp_path: Path) -> None:
    source = os.environ.get("MEGATRON_LM_SOURCE")
    if not source:
        pytest.skip("MEGATRON_LM_SOURCE does not name a git clone of Megatron-LM")
    tags = git("tag", "--list", f"core_v{line}.[0-9]", cwd=Path(source)).stdout.split()
    assert tags, f"no release tag core_v{line}.* in {source}"
    for tag in tags:
        folder = tmp_path / tag
        folder.mkdir()
        apply_and_compile(line, git("show", f"{tag}:{TARGET}", cwd=Path(source)).stdout, folder)


def test_deepspeed_patch_applies_and_its_registry_works(tmp_path: Path) -> None:
    released = find_deepspeed("0.19.8")
    shutil.copytree(released.path / "deepspeed", tmp_path / "deepspeed", ignore=shutil.ignore_patterns("__pycache__"))
    changed = [f"deepspeed/module_inject/auto_ep_{part}.py" for part in ("comm", "config", "layer")]
    before = {name: (tmp_path / name).read_text() for name in changed}
    applied = git("apply", str(DEEPSPEED_PATCH), cwd=tmp_path, check=False)
    assert applied.returncode == 0, applied.stderr
    assert all((tmp_path / name).read_text() != text for name, text in before.items())

    found = DeepSpeed("0.19.8", tmp_path).measure("deepspeed_jobs.py", "registry")
    for rank in found["registry"]:
        assert "error" not in rank, rank["error"]
        # fp32, where sums of two rows are the same in either order.
        assert rank["comm"] == pytest.approx(rank["moe_ep_plugin"], abs=1e-5) and len(rank["comm"]) == 4
        assert rank["dispatches"] > 0 and rank["others_stay"]
        assert "comm_backend must be one of ('comm', 'deepep')" in rank["uninstalled"]

    git("apply", "--reverse", str(DEEPSPEED_PATCH), cwd=tmp_path)
    assert all((tmp_path / name).read_text() == text for name, text in before.items())
