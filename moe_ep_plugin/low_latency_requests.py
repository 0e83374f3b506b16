"""Checks of what a caller passes to a buffer in low-latency mode."""

from __future__ import annotations

import torch

from .backends.base import BackendContext, LowLatencyCombineRequest, LowLatencyDispatchRequest
from .errors import ConfigError
from .handle import LowLatencyHandle
from .requests import RequestChecker, check_wire, checked_sms
from .types import Wire


class LowLatencyChecker(RequestChecker):
    """Turns arguments into requests, or raises ConfigError with argument, value, limit and remedy.

    Args:
        context: What the buffer's backend is made from.
    """

    def __init__(self, context: BackendContext) -> None:
        super().__init__(context.config, context.buffer_id)
        self._num_ranks = context.num_ranks
        self._rows_shape = (*context.low_latency_slots, context.config.hidden)

    def check_enabled(self) -> None:
        """Raise ConfigError unless the buffer has low-latency mode."""
        if self.config.low_latency_tokens_per_rank is None:
            raise ConfigError.of(
                "low_latency_tokens_per_rank",
                None,
                "low-latency mode needs its fixed slots",
                "build the EpBuffer with EpConfig(low_latency_tokens_per_rank=...)",
            )

    def check_handle(self, handle: object) -> None:
        """Raise ConfigError unless ``handle`` is of a low-latency dispatch of this buffer."""
        self.check_enabled()
        if not isinstance(handle, LowLatencyHandle):
            raise ConfigError.of(
                "handle",
                type(handle).__name__,
                "a LowLatencyHandle is needed",
                "pass the handle of a low_latency_dispatch",
            )
        self.check_owner(handle)

    def check_ranks(self, ranks: tuple[int, ...]) -> None:
        """Raise ConfigError unless all are ranks of the group."""
        self.check_enabled()
        for rank in ranks:
            if not isinstance(rank, int) or not 0 <= rank < self._num_ranks:
                raise ConfigError.of(
                    "a rank", repr(rank), f"the group has ranks 0 to {self._num_ranks - 1}", "mask one of these"
                )

    def low_latency_dispatch_request(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        *,
        wire: Wire | None,
        num_sms: int | None,
        async_op: bool,
        sequence: int,
    ) -> LowLatencyDispatchRequest:
        """Arguments of :meth:`EpBuffer.low_latency_dispatch`, checked."""
        config = self.config
        self.check_enabled()
        rows, scale, wire = self._check_rows(x, config.wire if wire is None else wire)
        if config.wire == "fp8" and wire != "fp8":
            raise ConfigError.of(
                "wire",
                repr(wire),
                "the receive buffers are sized for FP8 rows",
                "build the EpBuffer with EpConfig(wire='bf16')",
            )
        num_tokens, limit = rows.shape[0], config.low_latency_tokens_per_rank
        if limit is not None and num_tokens > limit:
            raise ConfigError.of(
                "x.shape[0]",
                num_tokens,
                f"low_latency_tokens_per_rank is {limit}",
                f"build the EpBuffer with low_latency_tokens_per_rank >= {num_tokens}, or use dispatch",
            )
        topk_idx = self._check_idx(topk_idx, num_tokens)
        if topk_weights is not None:
            if config.low_latency_layout == "expert":
                raise ConfigError.of(
                    "topk_weights",
                    "given",
                    "layout 'expert' applies them in the combine",
                    "pass them to low_latency_combine",
                )
            topk_weights = self._check_tensor("topk_weights", topk_weights, tuple(topk_idx.shape), torch.float32)
        return LowLatencyDispatchRequest(
            x=rows,
            scale=scale,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            wire=wire,
            sequence=sequence,
            num_sms=checked_sms(num_sms),
            async_op=async_op,
        )

    def low_latency_combine_request(
        self,
        rows: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        handle: LowLatencyHandle,
        *,
        out: torch.Tensor | None,
        wire: Wire,
        num_sms: int | None,
        async_op: bool,
    ) -> LowLatencyCombineRequest:
        """Arguments of :meth:`EpBuffer.low_latency_combine`, checked."""
        self.check_handle(handle)
        check_wire(wire)
        rows = self._check_tensor("rows", rows, self._rows_shape)
        self.check_dtype("rows.dtype", rows.dtype)
        shape = (handle.num_tokens, handle.num_topk)
        topk_idx = self._check_tensor("topk_idx", topk_idx, shape, torch.int64)
        if topk_weights is not None:
            if handle.layout == "rank":
                raise ConfigError.of(
                    "topk_weights",
                    "given",
                    "rows of layout 'rank' are summed over local experts already",
                    "apply the weights before the combine",
                )
            topk_weights = self._check_tensor("topk_weights", topk_weights, shape, torch.float32)
        if out is not None:
            checked = self._check_tensor("out", out, (handle.num_tokens, self.config.hidden), rows.dtype)
            if checked.data_ptr() != out.data_ptr() or out.data_ptr() % 16 != 0:
                raise ConfigError.of(
                    "out",
                    "a view with gaps or an odd start",
                    "sums are written as whole vectors",
                    "pass a fresh tensor",
                )
        return LowLatencyCombineRequest(
            rows=rows,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            handle=handle,
            out=out,
            wire=wire,
            num_sms=checked_sms(num_sms),
            async_op=async_op,
        )
