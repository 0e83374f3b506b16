"""The only loader of the compiled parts. A load that failed is remembered, and so is why."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import BackendUnavailable


def build_info() -> dict[str, Any]:
    """What the build that made this package enabled: ``{"python": ..., "parts": {part: {built, note}}}``.

    Empty where the package runs from sources that were never built.
    """
    path = Path(__file__).with_name("_build_info.json")
    try:
        info: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return info


def _why_missing(part: str) -> str:
    built = build_info().get("parts", {}).get(part)
    if built is None:
        return "the package was not built; run `pip install .`"
    if not built["built"]:
        return f"it was left out of this build: {built['note']}"
    return "it was built, but not for this Python or this place; run `pip install .` again"


@functools.cache
def _load(part: str) -> ModuleType | str:
    """The compiled module of a part, or the reason why there is none."""
    name = f"{__package__}._{part}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return _why_missing(part) if error.name == name else f"{name} failed to load: {error}"
    except Exception as error:  # A broken binary may raise anything; all of it is a reason.
        return f"{name} failed to load: {type(error).__name__}: {error}"


def _module(part: str) -> Any:
    loaded = _load(part)
    if isinstance(loaded, str):
        raise BackendUnavailable(f"the compiled {part} part of moe_ep_plugin can't be used: {loaded}")
    return loaded


def load_host() -> Any:
    """The compiled module of the host backend.

    Raises:
        BackendUnavailable: It is not there or does not load; says why, the same at every call.
    """
    return _module("host")


def load_cuda() -> Any:
    """The compiled module of the CUDA backend; loading it needs neither a driver nor a device.

    Raises:
        BackendUnavailable: It is not there or does not load; says why, the same at every call.
    """
    return _module("cuda")
