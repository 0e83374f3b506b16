"""Low-latency mode of a buffer: the two alternating sets of fixed slots, and what may be done with them when."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from .errors import ConfigError, StateError
from .handle import LowLatencyHandle
from .low_latency_requests import LowLatencyChecker
from .types import LowLatencyCombineOutput, LowLatencyDispatchOutput, Wire

if TYPE_CHECKING:
    from .backends.base import Backend, BackendContext

Output = TypeVar("Output")


class Pending(Generic[Output]):
    """An operation whose receive half is still to come. Keeps no output alive that nobody else keeps."""

    def __init__(self, name: str, receive: Callable[[], Output], progress: _Progress) -> None:
        self._name = name
        self._receive: Callable[[], Output] | None = receive
        self._progress = progress
        self._output: weakref.ref[Output] | None = None

    def wait(self) -> Output:
        """Receive, in the order of the current stream; a later call returns the same output, if it is still held.

        Between the send and this call nothing of the operation runs on a GPU.

        Raises:
            PeerTimeout, PeerLost, PeerMismatch: A peer failed; the buffer can only be closed then.
            StateError: The buffer is closed, has failed, or is in another operation; or an earlier call has received
                already, and its output is gone.
        """
        receive, self._receive = self._receive, None
        if receive is not None:
            try:
                output = receive()
            except StateError:
                self._receive = receive  # Nothing was begun.
                raise
            finally:
                self._progress.waited = self._receive is None
            self._output = weakref.ref(output)
            return output
        held = None if self._output is None else self._output()
        if held is None:
            raise StateError(
                f"wait() of {self._name} was called again, but its output has been dropped (or it failed); keep what "
                "the first call returned"
            )
        return held


@dataclass
class _Progress:
    """How far an operation is: what is kept of it where its output must not be."""

    waited: bool = False


@dataclass
class _Slots:
    """One of the two sets: the dispatch that uses it, and how far what uses it is."""

    sequence: int = 0
    dispatch: _Progress = field(default_factory=lambda: _Progress(waited=True))
    combine: _Progress = field(default_factory=lambda: _Progress(waited=True))

    def unfinished(self) -> str | None:
        """What has not been waited for."""
        for what, progress in (("dispatch", self.dispatch), ("combine", self.combine)):
            if not progress.waited:
                return what
        return None


class LowLatency:
    """What :class:`EpBuffer` does in low-latency mode; see its methods for arguments and errors.

    Args:
        context: What the backend is made from.
        backend: Moves the rows.
        operation: ``operation(name)`` is entered for as long as a call may not meet another one.
        collective: Entered for what other ranks see.
    """

    def __init__(
        self,
        context: BackendContext,
        backend: Backend,
        *,
        operation: Callable[[str], AbstractContextManager[None]],
        collective: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._check = LowLatencyChecker(context)
        self._backend = backend
        self._operation = operation
        self._collective = collective
        self._count = 0
        self._slots = (_Slots(), _Slots())

    def dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        *,
        wire: Wire | None,
        num_sms: int | None,
        async_op: bool,
    ) -> Pending[LowLatencyDispatchOutput]:
        """See :meth:`EpBuffer.low_latency_dispatch`."""
        name = "low_latency_dispatch"
        with self._operation(name):
            request = self._check.low_latency_dispatch_request(
                x, topk_idx, topk_weights, wire=wire, num_sms=num_sms, async_op=async_op, sequence=self._count + 1
            )
            slots = self._slots[request.sequence % 2]
            self._check_free(slots, request.sequence)
            with self._collective():
                receive = self._backend.low_latency_dispatch(request)
            self._count += 1
            slots.sequence = self._count
            slots.dispatch = _Progress()
            return Pending(name, self._guarded(name, receive), slots.dispatch)

    def combine(
        self,
        rows: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        handle: LowLatencyHandle,
        *,
        out: torch.Tensor | None,
        zero_copy: bool,
        wire: Wire,
        num_sms: int | None,
        async_op: bool,
    ) -> Pending[LowLatencyCombineOutput]:
        """See :meth:`EpBuffer.low_latency_combine`."""
        name = "low_latency_combine"
        with self._operation(name):
            request = self._check.low_latency_combine_request(
                rows, topk_idx, topk_weights, handle, out=out, wire=wire, num_sms=num_sms, async_op=async_op
            )
            slots = self._slots_of(handle)
            if not slots.combine.waited:
                raise StateError(
                    f"a combine of low-latency dispatch {handle.sequence} is under way already; call its wait() first"
                )
            in_place = self._backend.reads_in_place(request.rows, handle)
            if in_place and request.wire == "fp8" and request.rows.numel() > 0:
                raise ConfigError.of(
                    "wire",
                    "'fp8'",
                    "rows of empty_rows(handle) cross from where they are, as they are",
                    "use wire='bf16', or pass rows in memory of your own",
                )
            # A copy that made them contiguous may lie in registered memory, too.
            given = request.rows.data_ptr() == rows.data_ptr()
            if zero_copy and not in_place and not (given and self._backend.reads_registered(request)):
                raise ConfigError.of(
                    "zero_copy",
                    True,
                    "only the rows of empty_rows(handle), on a backend with a heap, are read in place, and on GPUs "
                    "rows in registered memory",
                    "let the experts write there, call register_rows, or leave zero_copy out",
                )
            with self._collective():
                receive = self._backend.low_latency_combine(request)
            slots.combine = _Progress()
            return Pending(name, self._guarded(name, receive), slots.combine)

    def rows(self, handle: LowLatencyHandle, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`EpBuffer.empty_rows`."""
        self._check.check_handle(handle)
        self._slots_of(handle)
        return self._backend.low_latency_rows(handle, dtype)

    def register_rows(self, rows: tuple[torch.Tensor, ...]) -> int:
        """See :meth:`EpBuffer.register_rows`."""
        with self._operation("register_rows"):
            self._check_idle("register_rows")
            with self._collective():
                return self._backend.register_rows(rows)

    def unregister_rows(self) -> None:
        """See :meth:`EpBuffer.unregister_rows`."""
        with self._operation("unregister_rows"):
            self._check_idle("unregister_rows")
            with self._collective():
                self._backend.unregister_rows()

    def mask_ranks(self, ranks: tuple[int, ...]) -> None:
        """See :meth:`EpBuffer.mask_ranks`."""
        with self._operation("mask_ranks"):
            self._check.check_ranks(ranks)
            self._backend.mask_ranks(ranks)

    def masked_ranks(self) -> tuple[int, ...]:
        """See :meth:`EpBuffer.masked_ranks`."""
        with self._operation("masked_ranks"):
            self._check.check_enabled()
            return self._backend.masked_ranks()

    def _check_idle(self, what: str) -> None:
        self._check.check_enabled()
        for slots in self._slots:
            unfinished = slots.unfinished()
            if unfinished is not None:
                raise StateError(
                    f"{what} was called before wait() of the {unfinished} of low-latency dispatch {slots.sequence}; "
                    "call that first"
                )

    def _slots_of(self, handle: LowLatencyHandle) -> _Slots:
        slots = self._slots[handle.index]
        if slots.sequence != handle.sequence:
            raise StateError(
                f"handle is of low-latency dispatch {handle.sequence}, whose buffer dispatch {slots.sequence} uses "
                "now; combine before the second dispatch after it"
            )
        return slots

    def _check_free(self, slots: _Slots, sequence: int) -> None:
        unfinished = slots.unfinished()
        if unfinished is not None:
            raise StateError(
                f"low-latency dispatch {sequence} needs the buffer of dispatch {slots.sequence}, whose {unfinished} "
                "has not been waited for; call its wait() first"
            )
        if self._backend.low_latency_held(sequence % 2):
            gc.collect()  # An exception that was caught may keep them in a cycle.
        if self._backend.low_latency_held(sequence % 2):
            raise StateError(
                f"low-latency dispatch {sequence} needs the buffer of dispatch {slots.sequence}, whose tensors (x, "
                "scale, tokens_per_expert, or rows of empty_rows) are still held; two results are the most: drop "
                "the older one, or copy what you keep of it"
            )

    def _guarded(self, name: str, receive: Callable[[], Any]) -> Callable[[], Any]:
        """``receive`` as an operation of the buffer."""

        def guarded() -> Any:
            with self._operation(f"wait() of {name}"), self._collective():
                return receive()

        return guarded
