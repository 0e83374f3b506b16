"""The two kinds of text: what a model comes from, and what it is fine-tuned on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pretrain.data import Corpus, load_corpus, split_texts
from pretrain.errors import UsageError

_MANUAL = "pydoc_data"


def source_text(paths: list[str] | None) -> Corpus:
    """The named files, or the standard library's sources but for its manual."""
    return load_corpus(paths, leave_out=_MANUAL)


def target_text(paths: list[str] | None) -> Corpus:
    """The named files, or the chapters of the language manual that come with Python: English, not code."""
    if paths:
        return load_corpus(paths)
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError("this Python comes without its manual (pydoc_data); name text files with --data") from error
    return split_texts(sorted((name, text.encode()) for name, text in topics.items()))


class Bytes:
    """The tokens of a model without a tokenizer: the bytes themselves."""

    name = "bytes"

    def encode(self, corpus: Corpus) -> Corpus:
        return corpus


class Subwords:
    """The tokens of a model's own tokenizer."""

    name = "its tokenizer"

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def encode(self, corpus: Corpus) -> Corpus:
        """``corpus`` with int32 token ids where it has bytes."""

        def ids(part: Any) -> Any:
            text = part.tobytes().decode("utf-8", errors="replace")
            return np.array(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

        return replace(corpus, train=ids(corpus.train), held_out=ids(corpus.held_out))


def tokens_of(folder: Path, vocabulary: int) -> Bytes | Subwords:
    """How the model in ``folder`` reads text.

    Raises:
        UsageError: It has no tokenizer, and bytes don't fit its vocabulary.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return Subwords(folder)
    if vocabulary < 256:
        raise UsageError(
            f"--model {folder}: it has no tokenizer and a vocabulary of {vocabulary}, too few for bytes; "
            "put its tokenizer's files there"
        )
    return Bytes()
