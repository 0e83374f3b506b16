"""Importing Megatron-Core with errors that say what to do, a name that it forgets to define, and TransformerEngine."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import BackendUnavailable


def import_megatron(name: str) -> Any:
    """The module ``name`` of Megatron-Core.

    Raises:
        BackendUnavailable: It can't be imported; says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        remedy = "pip install 'megatron-core>=0.14,<0.20', or put its source tree on PYTHONPATH"
        if (error.name or "").split(".")[0] == "triton":
            remedy = "Megatron-Core 0.18 and later import triton at start, also without a GPU: pip install triton"
        raise BackendUnavailable(f"{name} can't be imported ({error}); {remedy}") from error


def define_missing_names() -> None:
    """0.14 to 0.16 use a name that they define only where TransformerEngine is installed. Idempotent."""
    moe_utils = import_megatron("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def has_transformer_engine() -> bool:
    """Whether TransformerEngine can be imported, as Megatron-Core itself finds out."""
    try:
        importlib.import_module("transformer_engine")
    except (ImportError, OSError):
        return False
    return True
