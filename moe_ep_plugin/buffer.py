"""The kernel user's view: dispatch and combine over one expert-parallel group."""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Literal, overload

import torch

from .backends.base import BackendContext, BufferStats
from .backends.select import make_backend
from .bootstrap import check_agreement, exchange, group_rank_and_size
from .config import EpConfig
from .errors import CapacityError, ConfigError, StateError
from .handle import DispatchHandle, LowLatencyHandle
from .low_latency import LowLatency, Pending
from .requests import RequestChecker
from .routing import ExpertPlacement
from .types import (
    CombineOutput,
    DispatchOutput,
    Event,
    Layout,
    LowLatencyCombineOutput,
    LowLatencyDispatchOutput,
    Wire,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger("moe_ep_plugin")
_ids = itertools.count(1)


class EpBuffer:
    """Dispatch and combine for one group of ranks that share one set of experts.

    Making a buffer, every operation on it and closing it are collective: all ranks do the same, in the
    same order. One operation runs at a time. Use it as a context manager, or call :meth:`close`.

    Args:
        group: Process group, used to exchange addresses (and by backend ``"collective"``, to move
            rows). None: the default group, or this process alone without torch.distributed.
        config: Settings, equal on every rank.

    Raises:
        PeerMismatch: Ranks have different settings.
        BackendUnavailable: The backend asked for can't run here.
        PeerTimeout: Not every rank made the buffer within ``config.timeout_s``.
    """

    def __init__(self, group: ProcessGroup | None, config: EpConfig) -> None:
        if not isinstance(config, EpConfig):
            raise ConfigError.of("config", type(config).__name__, "an EpConfig is needed", "pass EpConfig(...)")
        self.config = config
        self.rank, self.num_ranks = group_rank_and_size(group)
        fields = exchange(group, self.num_ranks, config.agreed_fields(), config.timeout_s, "the start of EpBuffer")
        check_agreement(fields)
        self.placement = ExpertPlacement.make(config.num_experts, self.num_ranks, config.expert_to_rank)
        self.stats = BufferStats()
        self._id = next(_ids)
        self._check = RequestChecker(config, self._id)
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._closed = False
        context = BackendContext(
            group=group,
            rank=self.rank,
            num_ranks=self.num_ranks,
            config=config,
            placement=self.placement,
            buffer_id=self._id,
            stats=self.stats,
        )
        self._backend = make_backend(context)
        self._low_latency = LowLatency(
            context,
            self._backend,
            operation=self._operation,
            collective=lambda: _Collective(self),
        )
        self._finalizer = weakref.finalize(self, self._backend.close)
        if self.rank == 0:
            logger.info("moe_ep_plugin: %d ranks use backend %r", self.num_ranks, self._backend.name)

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend.name

    @property
    def most_sms(self) -> int | None:
        """The largest ``num_sms`` of a call: this rank's share of its GPU; None on CPU backends."""
        return self._backend.most_sms

    @property
    def num_local_experts(self) -> int:
        """Experts stored on this rank; may be 0."""
        return len(self.placement.experts_of_rank[self.rank])

    def dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        layout: Layout = "expert",
        handle: DispatchHandle | None = None,
        max_recv_tokens: int | None = None,
        wire: Wire | None = None,
        num_sms: int | None = None,
        async_op: bool = False,
        previous_event: Event | None = None,
    ) -> DispatchOutput:
        """Send every token's row to the ranks that hold its experts.

        Args:
            x: [num_tokens, hidden] fp32, bf16 or fp16, or ``(q, scale)``: float8_e4m3fn rows with fp32
                [num_tokens, ceil(hidden / 128)] factors. num_tokens may be 0 and differ between ranks.
            topk_idx: int64 [num_tokens, num_topk] expert ids, -1 for none; an expert may appear twice in
                a row. Leave out with ``handle``.
            topk_weights: fp32 [num_tokens, num_topk], carried to the experts' side.
            layout: ``"expert"`` groups the received rows by local expert, ``"rank"`` keeps one row per
                (source rank, token).
            handle: Reuse the routing of an earlier dispatch: no counting. ``layout`` is the handle's.
            max_recv_tokens: Fixed number of rows to return, so that no size depends on the routing. On GPUs the
                host then waits for nothing, the call can be captured in a CUDA graph, and rows that do not fit
                are reported by :meth:`check` (or by the next dispatch of exact sizes), never written elsewhere.
            wire: Overrides ``config.wire`` for this call.
            num_sms: Overrides ``config.num_sms`` for this call; backend ``"cuda"`` only.
            async_op: On GPUs, run on the buffer's communication stream and return without making the current
                stream wait: wait on ``event`` before the results are used. The CPU backends and
                ``"collective"`` complete the call first.
            previous_event: Waited on before anything is read; by the communication stream with ``async_op``,
                which then does not wait for the current stream.

        Returns:
            The received rows; see :class:`DispatchOutput` for shapes.

        Raises:
            ConfigError: An argument is unfit; nothing was sent.
            CapacityError: Rows exceed ``max_recv_tokens`` or memory; raised on all ranks.
            PeerTimeout, PeerLost, PeerMismatch: A peer failed; the buffer can only be closed then.
            StateError: The buffer is closed, has failed, or is in another operation.
        """
        with self._operation("dispatch"):
            started = time.perf_counter()
            request = self._check.dispatch_request(
                x,
                topk_idx,
                topk_weights,
                layout,
                handle,
                max_recv_tokens,
                wire,
                num_sms=num_sms,
                async_op=async_op,
                previous_event=previous_event,
            )
            with _Collective(self):
                if previous_event is not None and not self._backend.orders_streams:
                    previous_event.wait()
                out = self._backend.dispatch(request)
            self.stats.operations += 1
            self.stats.dispatch_seconds += time.perf_counter() - started
            return out

    @overload
    def combine(
        self,
        rows: torch.Tensor,
        handle: DispatchHandle,
        *,
        topk_weights: torch.Tensor | None = None,
        num_sms: int | None = None,
        async_op: Literal[False] = False,
        previous_event: Event | None = None,
    ) -> torch.Tensor: ...

    @overload
    def combine(
        self,
        rows: torch.Tensor,
        handle: DispatchHandle,
        *,
        topk_weights: torch.Tensor | None = None,
        num_sms: int | None = None,
        async_op: Literal[True],
        previous_event: Event | None = None,
    ) -> CombineOutput: ...

    def combine(
        self,
        rows: torch.Tensor,
        handle: DispatchHandle,
        *,
        topk_weights: torch.Tensor | None = None,
        num_sms: int | None = None,
        async_op: bool = False,
        previous_event: Event | None = None,
    ) -> torch.Tensor | CombineOutput:
        """Bring rows back to their tokens and sum them in fp32, in one fixed order.

        ``rows`` may be written again once this returns (once ``event`` completed, with ``async_op``).

        Args:
            rows: [handle.num_rows, hidden] in the order that the dispatch returned. Rows made by
                :meth:`empty_rows` are read in place; others cost one copy. Padding rows are ignored.
            handle: The dispatch to reverse.
            topk_weights: fp32 [handle.num_rows] factors of the rows, as received beside them. Layout
                ``"expert"`` only; without it the sum is plain.
            num_sms, async_op, previous_event: As in :meth:`dispatch`.

        Returns:
            [num_tokens, hidden] of the dtype of ``rows``; zeros for a token without experts. With
            ``async_op=True`` a :class:`CombineOutput`.

        Raises:
            As :meth:`dispatch`.
        """
        out = self.combine_with_values(
            rows,
            handle,
            topk_weights=topk_weights,
            num_sms=num_sms,
            async_op=async_op,
            previous_event=previous_event,
        )
        return out if async_op else out.x

    def combine_with_values(
        self,
        rows: torch.Tensor,
        handle: DispatchHandle,
        *,
        topk_weights: torch.Tensor | None = None,
        row_values: torch.Tensor | None = None,
        num_sms: int | None = None,
        async_op: bool = False,
        previous_event: Event | None = None,
    ) -> CombineOutput:
        """Combine, and return one fp32 value per (token, top-k position) beside the sums.

        The values travel the way ``topk_weights`` came, backwards: this is what carries their gradients.

        Args:
            rows, handle, topk_weights, num_sms, async_op, previous_event: As in :meth:`combine`.
            row_values: fp32 [handle.num_rows] in layout ``"expert"``, [handle.num_rows, num_topk] in
                layout ``"rank"``, where values for experts of other ranks are ignored.

        Returns:
            Sums, and values [num_tokens, num_topk] (0 where ``topk_idx`` was -1).
        """
        with self._operation("combine"):
            started = time.perf_counter()
            request = self._check.combine_request(
                rows,
                handle,
                topk_weights,
                row_values,
                num_sms=num_sms,
                async_op=async_op,
                previous_event=previous_event,
            )
            with _Collective(self):
                if previous_event is not None and not self._backend.orders_streams:
                    previous_event.wait()
                out = self._backend.combine(request)
            self.stats.operations += 1
            self.stats.combine_seconds += time.perf_counter() - started
            return out

    def empty_rows(self, handle: DispatchHandle | LowLatencyHandle, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialised rows for a combine of ``handle``, which reads them without a copy.

        Let the last expert layer write its output here. Not collective. ``dtype`` defaults to
        ``config.dtype``. Falls back to ordinary memory when the pool is used up.

        Returns:
            [handle.num_rows, hidden]. Of a low-latency handle, the shape of ``x`` of its dispatch; each call
            returns the same memory (but for backend ``"collective"``).
        """
        self._check_open("empty_rows")
        dtype = self.config.dtype if dtype is None else dtype
        self._check.check_dtype("dtype", dtype)
        if isinstance(handle, LowLatencyHandle):
            return self._low_latency.rows(handle, dtype)
        self._check.check_handle(handle)
        return self._backend.empty_rows(handle, dtype)

    def low_latency_dispatch(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        *,
        wire: Wire | None = None,
        num_sms: int | None = None,
        async_op: bool = False,
    ) -> Pending[LowLatencyDispatchOutput]:
        """Send a few tokens' rows to fixed slots at the ranks of their experts: for decoding.

        Collective. The host waits for nothing, no size depends on the routing, and a CUDA graph can capture the
        call; ranks may have different numbers of tokens, and none. Results lie in one of two buffers that dispatches
        use in turn: those of a dispatch must be dropped, and its combine waited for, before the second dispatch
        after it. After DeepEP's low-latency mode, with slots that are packed and in a fixed order.

        Args:
            x: As in :meth:`dispatch`; at most ``config.low_latency_tokens_per_rank`` tokens.
            topk_idx: As in :meth:`dispatch`.
            topk_weights: fp32 [num_tokens, num_topk], carried to the experts' side; layout ``"rank"`` only. In layout
                ``"expert"`` the weights are for :meth:`low_latency_combine`.
            wire: Overrides ``config.wire``, which must not need less room.
            num_sms: Overrides ``config.num_sms`` for this call; backend ``"cuda"`` only.
            async_op: On GPUs, send only: ``wait()`` of what is returned launches the receive half, in the order of
                its current stream, and between the two nothing runs. Without it both are one launch.

        Returns:
            A pending operation; its ``wait()`` returns the :class:`LowLatencyDispatchOutput`.

        Raises:
            ConfigError: An argument is unfit, or the buffer was made without low-latency mode; nothing was sent. An
                id out of range is told like CapacityError.
            CapacityError: Experts that appear twice in a token's row had more rows than there are slots. On GPUs it
                is raised by :meth:`check`; every rank's rows of that step are dropped.
            StateError: A result of the dispatch before the last is still held or not waited for; or as
                :meth:`dispatch`.
            PeerTimeout, PeerLost, PeerMismatch: A peer failed; on GPUs raised by a later call. The buffer can only be
                closed then. With ``config.mask_on_timeout`` see :meth:`mask_ranks`.
        """
        return self._low_latency.dispatch(x, topk_idx, topk_weights, wire=wire, num_sms=num_sms, async_op=async_op)

    def low_latency_combine(
        self,
        rows: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        handle: LowLatencyHandle,
        *,
        out: torch.Tensor | None = None,
        zero_copy: bool = False,
        wire: Wire = "bf16",
        num_sms: int | None = None,
        async_op: bool = False,
    ) -> Pending[LowLatencyCombineOutput]:
        """Bring rows back and sum each token's, weighted, in fp32 and in one fixed order: for decoding.

        Args:
            rows: The experts' results, of the shape of the dispatch's ``x``; rows that carry no token are ignored.
                Those of :meth:`empty_rows` are read in place, and must not be written again before the next low-latency
                dispatch has been received; others may be written once ``wait()`` has run, and cost one copy, into the
                memory of ``empty_rows`` (of which the same is true then), unless they are registered
                (:meth:`register_rows`).
            topk_idx: int64 [num_tokens, num_topk], as dispatched; routes whose id is -1 here are left out.
            topk_weights: fp32 [num_tokens, num_topk] factors, None for a plain sum. Layout ``"rank"`` takes none: its
                rows are sums over a rank's experts already.
            handle: The dispatch to reverse.
            out: [num_tokens, hidden] to write the sums to. None: new memory.
            zero_copy: Refuse rows that would have to be copied.
            wire: ``"bf16"``: rows cross as they are. ``"fp8"``: e4m3 in blocks of 128, half the bytes; not for rows
                of :meth:`empty_rows`.
            num_sms, async_op: As in :meth:`low_latency_dispatch`.

        Returns:
            A pending operation; its ``wait()`` returns the :class:`LowLatencyCombineOutput`.

        Raises:
            As :meth:`low_latency_dispatch`; StateError where a later dispatch uses the handle's buffer already.
        """
        return self._low_latency.combine(
            rows,
            topk_idx,
            topk_weights,
            handle,
            out=out,
            zero_copy=zero_copy,
            wire=wire,
            num_sms=num_sms,
            async_op=async_op,
        )

    def register_rows(self, *rows: torch.Tensor) -> int:
        """Let all ranks read rows of combines where they lie, in memory of the caller's own.

        Collective: every rank calls it, when no operation of its own is under way or being captured. Registered are the
        allocations that ``rows`` are in, and those of rows that :meth:`low_latency_combine` has been given so far, also
        in a CUDA graph that has been captured: its replays then copy them no more. Rows of a combine whose halves are
        launched apart (``async_op=True``), that cross in FP8, or under ``config.mask_on_timeout`` are copied as before.

        A combine of such rows ends when all ranks have read them. So the others must receive it (``wait()``) before
        they do anything that waits for the owner's next operation; where all launch both halves at once they do.

        Other ranks map the memory, and the GPU gets it back only when they don't: what is freed meanwhile stays taken,
        though nobody reads it. Call :meth:`unregister_rows` before ``torch.cuda.empty_cache()``.

        Args:
            rows: Tensors that rows of later combines are parts of. Each rank has its own.

        Returns:
            Bytes of this rank that are registered: whole allocations, 64 at most, usually many times what the rows
            take. 0 on backends other than ``"cuda"``, which have no such thing, and under ``config.mask_on_timeout``.

        Raises:
            ConfigError: The buffer has no low-latency mode; a tensor of some rank is not on the buffer's device.
            StateError: Something has not been waited for, or a rank is masked.
            PeerTimeout: Not all ranks have called it.
        """
        return self._low_latency.register_rows(rows)

    def unregister_rows(self) -> None:
        """Undo :meth:`register_rows`: no rank maps memory of another one's rows any more. Collective likewise."""
        self._low_latency.unregister_rows()

    def mask_ranks(self, *ranks: int) -> None:
        """Leave ranks out of the low-latency operations that follow: nothing is sent to them or awaited of them.

        What their experts would have added is missing from the sums; :class:`LowLatencyCombineOutput` tells how much.
        All other ranks should make the same call: one that has not gives one dispatch up, together with all others,
        to take the mask over (its rows are dropped and ``lost_weights`` tells). With ``config.mask_on_timeout`` ranks
        that do not do their part in time, or have ended, are masked by themselves, after a step that is given up in the
        same way.
        A masked rank stays masked, and can only close its buffer. Backend ``"collective"`` has no masks.
        """
        self._low_latency.mask_ranks(ranks)

    def masked_ranks(self) -> tuple[int, ...]:
        """Ranks that are left out, ascending. Waits for this rank's operations under way."""
        return self._low_latency.masked_ranks()

    def check(self) -> None:
        """Wait for this rank's operations under way and raise what they ran into.

        Only operations that return before they have completed need it: on GPUs, those with
        ``max_recv_tokens``, with ``handle``, and combines. What went wrong in them is raised here, or by the
        next dispatch of exact sizes, where all ranks find it at the same call; a peer's failure by any next call.

        Raises:
            CapacityError: Rows of a dispatch did not fit ``max_recv_tokens``; they were dropped on all ranks.
            PeerTimeout, PeerLost, PeerMismatch: As :meth:`dispatch`.
        """
        with self._operation("check"), _Collective(self):
            self._backend.check()

    def close(self) -> None:
        """Give the heap back; idempotent, and waits for no peer. Tensors handed out stay valid."""
        self._closed = True
        self._finalizer()

    def __enter__(self) -> EpBuffer:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    # State

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise StateError(f"{what} was called on a closed EpBuffer; make a new one")
        if self._failure is not None:
            raise StateError(
                f"{what} was called on an EpBuffer that has failed ({self._failure}); close it and make a new one"
            )

    def _operation(self, what: str) -> _Operation:
        return _Operation(self, what)

    def _fail(self, error: BaseException) -> None:
        self._failure = f"{type(error).__name__}: {error}"
        self._backend.abandon(self._failure)


class _Operation:
    """One operation on a buffer that is open and in no other one. A class, as it is entered at every call."""

    def __init__(self, buffer: EpBuffer, what: str) -> None:
        self._buffer = buffer
        self._what = what

    def __enter__(self) -> None:
        buffer = self._buffer
        buffer._check_open(self._what)
        if not buffer._lock.acquire(blocking=False):
            raise StateError(
                f"{self._what} was called while another operation of this EpBuffer is in flight; "
                "wait for it, or use one buffer per thread"
            )

    def __exit__(self, *exc: object) -> None:
        self._buffer._lock.release()


class _Collective:
    """The part of an operation that other ranks see: an error in it may leave ranks in different places."""

    def __init__(self, buffer: EpBuffer) -> None:
        self._buffer = buffer

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After these nothing was begun, or all ranks gave the operation up together.
        if error is not None and not isinstance(error, (ConfigError, CapacityError)):
            self._buffer._fail(error)
