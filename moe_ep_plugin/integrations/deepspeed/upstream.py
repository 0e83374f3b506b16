"""Importing DeepSpeed with errors that say what to do, and which of its versions are served."""

from __future__ import annotations

import importlib
import re
from typing import Any

from ...errors import BackendUnavailable

OLDEST = (0, 18, 9)
NEWEST = (0, 19)
OLDEST_TEXT = ".".join(map(str, OLDEST))
AUTOEP_BACKENDS_SINCE = (0, 19, 7)
"""The first version whose AutoEP layers can take another communication backend."""


def import_deepspeed(name: str) -> Any:
    """The module ``name`` of DeepSpeed.

    Raises:
        BackendUnavailable: It can't be imported; says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendUnavailable(
            f"{name} can't be imported ({error}); "
            "DS_BUILD_OPS=0 pip install 'deepspeed>=0.18.9,<0.20', or put an unpacked release on PYTHONPATH"
        ) from error


def numbers_of(version: str) -> tuple[int, ...]:
    """The leading whole numbers of a version: (0, 19, 8) of ``"0.19.8+cpu"``; shorter where it has fewer."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")[:3]) if found else ()


def check_version() -> tuple[int, ...]:
    """The version of DeepSpeed, if it is one that we serve.

    Raises:
        BackendUnavailable: It is missing, can't be imported, or is outside the range.
    """
    version = str(import_deepspeed("deepspeed").__version__)
    numbers = numbers_of(version)
    if not (numbers >= OLDEST and numbers[:2] <= NEWEST):
        supported = f"{OLDEST_TEXT} to {NEWEST[0]}.{NEWEST[1]}"
        raise BackendUnavailable(
            f"deepspeed is {version}, but {supported} are supported; install one of these "
            f"(pip install 'deepspeed>={OLDEST_TEXT},<{NEWEST[0]}.{NEWEST[1] + 1}'), or a moe_ep_plugin that "
            "knows this version"
        )
    return numbers
