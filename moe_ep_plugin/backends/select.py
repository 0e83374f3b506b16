"""Chooses the backend of a buffer: the one asked for, or the first of the ladder that all ranks can run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ..bootstrap import exchange
from ..errors import BackendUnavailable
from .base import Backend, BackendContext

logger = logging.getLogger("moe_ep_plugin")


def _make_collective(context: BackendContext) -> Backend:
    from .collective import CollectiveBackend

    return CollectiveBackend(context)


def _make_host(context: BackendContext) -> Backend:
    from .host import HostBackend

    return HostBackend.connect(context)


def _make_cuda(context: BackendContext) -> Backend:
    from .cuda import CudaBackend

    return CudaBackend.connect(context)


_MAKERS: dict[str, Callable[[BackendContext], Backend]] = {
    "cuda": _make_cuda,
    "host": _make_host,
    "collective": _make_collective,
}
_LADDER = {"cpu": ("host", "collective"), "cuda": ("cuda", "collective")}


def make_backend(context: BackendContext) -> Backend:
    """Build ``config.backend``; every rank of the group ends with the same kind.

    Raises:
        BackendUnavailable: A named backend can't run on some rank; says which rank and why.
    """
    config = context.config
    if config.backend != "auto":
        return _MAKERS[config.backend](context)
    reasons = []
    for name in _LADDER[config.device_type]:
        try:
            return _MAKERS[name](context)
        except BackendUnavailable as error:
            reasons.append(str(error))
            if context.rank == 0:
                logger.warning("moe_ep_plugin: backend %r is not used: %s", name, error)
    raise BackendUnavailable("; ".join(reasons))


def agree(context: BackendContext, reason: str | None, what: str) -> None:
    """Raise BackendUnavailable on every rank if any rank has a reason not to go on with ``what``."""
    answers = exchange(
        context.group, context.num_ranks, {"reason": reason}, context.config.timeout_s, f"the check of {what}"
    )
    refuse(what, reasons_of(answers))


def reasons_of(answers: list[dict[str, Any]]) -> list[str]:
    """The ``reason`` of every rank that gave one, with the rank."""
    return [f"rank {rank}: {a['reason']}" for rank, a in enumerate(answers) if a["reason"] is not None]


def refuse(what: str, reasons: list[str]) -> None:
    """Raise BackendUnavailable if there are reasons not to go on with ``what``."""
    if reasons:
        raise BackendUnavailable(f"{what} can't be used: {'; '.join(reasons)}")
