"""Where checkpoints lie: looked for before torch is imported, so that a wrong path is reported at once."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import UsageError

LATEST = "latest"
"""Name of the file that holds the name of the newest complete checkpoint's folder."""


_FP8_EXPERT_NAME = re.compile(r"(?<=\.experts)\.(linear_fc[12])\.weight(\d+)$")


def plain_name(name: str) -> str:
    """The name of a parameter in a model without FP8 experts, which keep the same weights under other names."""
    return _FP8_EXPERT_NAME.sub(r".local_experts.\2.\1.weight", name)


def file_name(rank: int) -> str:
    """The file of ``rank`` in a checkpoint's folder."""
    return f"rank-{rank:05d}.pt"


def find(directory: Path) -> Path:
    """The folder of the latest checkpoint under ``directory``, or ``directory`` itself if it is one.

    Raises:
        UsageError: There is none.
    """
    if not directory.is_dir():
        raise UsageError(f"--load {directory}: there is no such directory")
    if (directory / file_name(0)).is_file():
        return directory
    pointer = directory / LATEST
    folder = directory / pointer.read_text().strip() if pointer.is_file() else None
    if folder is None or not (folder / file_name(0)).is_file():
        raise UsageError(
            f"--load {directory}: no complete checkpoint is in it; name a directory given to --save before"
        )
    return folder


def check_ranks(folder: Path, num_ranks: int) -> None:
    """Raise UsageError unless the checkpoint in ``folder`` was written by ``num_ranks`` ranks."""
    files = len(list(folder.glob("rank-*.pt")))
    if files != num_ranks:
        raise UsageError(f"--load {folder}: it was saved by {files} ranks, this is a run of {num_ranks}; start {files}")
