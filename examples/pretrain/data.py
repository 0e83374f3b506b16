"""Text as bytes: which files, which of them are held out, and which windows a step trains on."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .errors import UsageError

VOCAB_SIZE = 256
HELD_OUT_FRACTION = 0.1
END_OF_FILE = b"\0"
_SKIPPED_DIRECTORIES = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
_TEST_DIRECTORIES = {"test", "tests", "idle_test"}
_SNIFFED_BYTES = 8192

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Corpus:
    """The bytes of the training files and of the held-out files, one after the other.

    Attributes:
        train: uint8 [train bytes].
        held_out: uint8 [held-out bytes].
        num_train_files, num_held_out_files: Files behind them.
        fingerprint: Changes when any name or byte of the files does.
    """

    train: Bytes
    held_out: Bytes
    num_train_files: int
    num_held_out_files: int
    fingerprint: str


def _walk(directory: Path, skipped: set[str]) -> Iterator[Path]:
    for folder, names, files in os.walk(directory):
        names[:] = sorted(n for n in names if n not in skipped and not n.startswith("."))
        yield from (Path(folder, file) for file in sorted(files) if not file.startswith("."))


def _standard_library() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in _walk(root, _SKIPPED_DIRECTORIES | _TEST_DIRECTORIES) if p.suffix == ".py"]
    if not files:
        raise UsageError(f"this Python has no standard library sources in {root}; name text files with --data PATH...")
    return [(p.relative_to(root).as_posix(), p) for p in files]


def _named_files(paths: list[str]) -> list[tuple[str, Path]]:
    found: dict[Path, str] = {}
    for given in paths:
        root = Path(given)
        if not root.exists():
            raise UsageError(f"--data {given}: there is no such file or directory")
        inside = [root] if root.is_file() else list(_walk(root, _SKIPPED_DIRECTORIES))
        for path in inside:
            name = path.name if path == root else path.relative_to(root).as_posix()
            found.setdefault(path.resolve(), name)
    return sorted((name, path) for path, name in found.items())


def _read(files: list[tuple[str, Path]], where: str) -> list[tuple[str, bytes]]:
    texts = []
    for name, path in files:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(f"{path} can't be read: {error.strerror}; leave it out of --data") from error
        # A zero byte early in a file is the usual sign of one that isn't text.
        if content and b"\0" not in content[:_SNIFFED_BYTES]:
            texts.append((name, content))
    if not texts:
        raise UsageError(
            f"no text in {where} (empty and binary files are skipped); name other files with --data PATH..."
        )
    return texts


def load_corpus(paths: list[str] | None, leave_out: str | None = None) -> Corpus:
    """Read files, or the Python standard library's own sources without ``paths``, and split them.

    Args:
        paths: Files and directories.
        leave_out: Without ``paths``, a directory of the standard library that is not read.

    Raises:
        UsageError: A path is missing, can't be read, or holds no text.
    """
    files = _named_files(paths) if paths else _standard_library()
    kept = [(name, path) for name, path in files if paths or name.split("/")[0] != leave_out]
    return split_texts(_read(kept, ", ".join(paths) if paths else "the standard library"))


def split_texts(texts: list[tuple[str, bytes]]) -> Corpus:
    """Split named texts into those to train on and those to hold out.

    About a tenth of the files, chosen by a hash of their names, is held out: the choice depends neither on
    where they lie nor on which other files there are. Of a single file, the last tenth is held out.
    """
    digest = hashlib.sha256()
    for name, content in texts:
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    if len(texts) == 1:
        content = texts[0][1]
        cut = len(content) - int(len(content) * HELD_OUT_FRACTION)
        train, held_out = [content[:cut]], [content[cut:]]
    else:
        by_hash = sorted((hashlib.sha256(name.encode()).digest(), content) for name, content in texts)
        below = sum(key[0] < 256 * HELD_OUT_FRACTION for key, _ in by_hash)
        count = min(max(below, 1), len(by_hash) - 1)
        held_out, train = [c for _, c in by_hash[:count]], [c for _, c in by_hash[count:]]
    return Corpus(
        train=np.frombuffer(END_OF_FILE.join(train), dtype=np.uint8),
        held_out=np.frombuffer(END_OF_FILE.join(held_out), dtype=np.uint8),
        num_train_files=len(train),
        num_held_out_files=len(held_out),
        fingerprint=digest.hexdigest()[:16],
    )


def check_length(corpus: Corpus, seq_length: int) -> None:
    """Raise UsageError unless both parts hold at least one window of ``seq_length`` + 1 bytes."""
    for part, content in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(content) < seq_length + 1:
            raise UsageError(
                f"--seq-length {seq_length}: the {part} files hold {len(content)} bytes, {seq_length + 1} are needed; "
                "name more text with --data PATH... or lower --seq-length"
            )


def _windows(content: Bytes, starts: npt.NDArray[np.int64], seq_length: int) -> npt.NDArray[np.int64]:
    return content[starts[:, None] + np.arange(seq_length + 1)].astype(np.int64)


def training_windows(corpus: Corpus, *, seed: int, step: int, count: int, seq_length: int) -> npt.NDArray[np.int64]:
    """All windows of a step, int64 [count, seq_length + 1]; a function of seed and step alone."""
    starts = np.random.default_rng([seed, step]).integers(0, len(corpus.train) - seq_length, size=count)
    return _windows(corpus.train, starts, seq_length)


def held_out_windows(corpus: Corpus, *, count: int, seq_length: int) -> npt.NDArray[np.int64]:
    """At most ``count`` windows spread evenly over the held-out bytes, int64 [n, seq_length + 1]."""
    last = len(corpus.held_out) - seq_length - 1
    starts = np.unique(np.linspace(0, last, num=count).astype(np.int64))
    return _windows(corpus.held_out, starts, seq_length)
