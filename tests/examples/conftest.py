"""Lets a test import what the example programs import."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from .programs import EXAMPLES


@pytest.fixture
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in [n for n in sys.modules if n.split(".")[0] in ("pretrain", "finetune")]:
        del sys.modules[name]
