"""The named results and the small enumerations that pass between a caller, a buffer and a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from .handle import DispatchHandle, LowLatencyHandle

Layout = Literal["expert", "rank"]
BackendName = Literal["auto", "cuda", "host", "collective"]
Wire = Literal["bf16", "fp8"]
Expand = Literal["auto", "direct", "two_stage"]

FP8_BLOCK = 128
"""Elements along hidden that share one dequantisation scale on the FP8 wire."""


class Event(Protocol):
    """What an operation can be waited on by: ``torch.cuda.Event`` on GPUs, :class:`DoneEvent` on CPUs."""

    def wait(self) -> None:
        """Make the caller (its current stream on GPUs) wait for the operation."""

    def query(self) -> bool:
        """Whether the operation has completed."""
        ...

    def synchronize(self) -> None:
        """Block the calling thread until the operation has completed."""


class DoneEvent:
    """The event of an operation that had completed when its call returned, as on the CPU backends."""

    def wait(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True."""
        return True

    def synchronize(self) -> None:
        """Return at once."""


@dataclass(frozen=True)
class DispatchOutput:
    """What :meth:`EpBuffer.dispatch` received.

    Attributes:
        x: Rows. Layout ``"expert"``: [num_rows, hidden], grouped by local expert, each group padded
            with zero rows to a multiple of ``expert_alignment``; within a group in (source rank, token,
            top-k position) order. Layout ``"rank"``: [num_recv_tokens, hidden], one row per (source
            rank, token), in that order. dtype of the input, or ``torch.float8_e4m3fn`` on the FP8 wire.
            With ``max_recv_tokens=n`` there are exactly n rows and those past the received ones are zero.
        scale: fp32 [rows, ceil(hidden / 128)] dequantisation factors on the FP8 wire, otherwise None.
        topk_idx: Layout ``"rank"``: int64 [num_recv_tokens, num_topk] local expert ids, -1 where the
            expert lives elsewhere (and in the rows past the received ones). None in layout ``"expert"``.
        topk_weights: fp32, 0 where there is no local expert: [num_rows] in layout ``"expert"``,
            [num_recv_tokens, num_topk] in layout ``"rank"``. None if no weights were sent.
        tokens_per_expert: int64 [num_local_experts]: rows per local expert, padding included in layout
            ``"expert"``. On the CPU; on the device with backend ``"cuda"`` and ``max_recv_tokens``, where no size
            comes to the host.
        handle: Routing state; give it to ``combine`` and to later ``dispatch`` calls.
        event: Completion of the operation.
        grad_rows: From :meth:`TokenDispatcher.dispatch_fp8`: what stands for the FP8 rows in autograd, [rows, hidden]
            in the dtype of the input, one element of memory. Otherwise None.
    """

    x: torch.Tensor
    scale: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    tokens_per_expert: torch.Tensor
    handle: DispatchHandle
    event: Event
    grad_rows: torch.Tensor | None = None


@dataclass(frozen=True)
class CombineOutput:
    """What a combine brought back.

    Attributes:
        x: [num_tokens, hidden] sums, dtype of the rows given.
        row_values: fp32 [num_tokens, num_topk]: the values that travelled back beside the rows (see
            :meth:`EpBuffer.combine_with_values`), 0 where ``topk_idx`` was -1. None if none were given.
        event: Completion of the operation.
    """

    x: torch.Tensor
    row_values: torch.Tensor | None
    event: Event


@dataclass(frozen=True)
class LowLatencyDispatchOutput:
    """What a low-latency dispatch received. Its tensors lie in one of the buffer's two receive buffers.

    Attributes:
        x: Layout ``"expert"``: [num_local_experts, capacity, hidden], the rows of local expert e in
            ``x[e, :tokens_per_expert[e]]``, in (source rank, token, top-k position) order. Layout ``"rank"``:
            [capacity, hidden], one row per (source rank, token) in ``x[:num_received]``, in that order. ``capacity``
            is num_ranks times ``EpConfig.low_latency_tokens_per_rank``. Rows past those are of earlier steps.
            dtype of the input, or ``torch.float8_e4m3fn`` on the FP8 wire.
        scale: fp32 [num_local_experts, capacity, ceil(hidden / 128)] or [capacity, ceil(hidden / 128)]
            dequantisation factors on the FP8 wire, otherwise None. Row by row they lie next to each other (strides
            ..., 1, capacity), as DeepGEMM and TransformerEngine read them.
        tokens_per_expert: int32 [num_local_experts]: received rows of each local expert; on the device.
        num_received: int32 [1]: received rows in all; on the device.
        topk_idx: Layout ``"rank"``: int64 [capacity, num_topk] local expert ids, -1 where the expert lives elsewhere
            and in the rows past the received ones. None in layout ``"expert"``.
        topk_weights: Layout ``"rank"``, where weights were sent: fp32 [capacity, num_topk], 0 where ``topk_idx`` is
            -1. Otherwise None.
        handle: Routing state for the combine.
    """

    x: torch.Tensor
    scale: torch.Tensor | None
    tokens_per_expert: torch.Tensor
    num_received: torch.Tensor
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    handle: LowLatencyHandle


@dataclass(frozen=True)
class LowLatencyCombineOutput:
    """What a low-latency combine brought back.

    Attributes:
        x: [num_tokens, hidden] sums, dtype of the rows given; ``out`` where that was given.
        lost_weights: fp32 [num_tokens]: weights of the routes that are missing from ``x`` because their rank is
            masked or gave the step up; without weights, and in layout ``"rank"``, how many those routes are. 0 where
            nothing is missing.
    """

    x: torch.Tensor
    lost_weights: torch.Tensor
