"""The buffers of one installation: shared by all MoE layers, made on first use, closed together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from ..bootstrap import exchange, group_rank_and_size
from ..buffer import EpBuffer
from ..config import EpConfig
from ..dispatcher import TokenDispatcher
from ..errors import ConfigError
from .options import BufferOptions

OptionsT = TypeVar("OptionsT", bound=BufferOptions)


class Session(Generic[OptionsT]):
    """Options and buffers of one :func:`install`.

    Layers that agree on group, experts, top-k, hidden size, dtype and what FP8 experts need share a buffer: MoE
    layers run one after the other, so one heap serves a whole model.
    """

    def __init__(self, options: OptionsT) -> None:
        self.options = options
        self._dispatchers: dict[tuple[Any, ...], TokenDispatcher] = {}
        self._buffers: list[EpBuffer] = []

    def configure(self, **changes: Any) -> None:
        """Change options.

        Raises:
            ConfigError: An option is unknown, or buffers that were made with the old ones are open.
        """
        try:
            options = replace(self.options, **changes)
        except TypeError as error:
            raise ConfigError.of(
                "install()",
                f"called with {sorted(changes)}",
                f"{error}",
                f"use fields of {type(self.options).__name__}",
            ) from error
        if options != self.options and self._buffers:
            raise ConfigError.of(
                "install()",
                f"called with {changes}",
                f"buffers are open with {self.options}",
                "install before the first forward, or close() the session",
            )
        self.options = options

    def dispatcher(
        self,
        group: dist.ProcessGroup | None,
        *,
        num_experts: int,
        num_topk: int,
        hidden: int,
        dtype: torch.dtype,
        num_tokens: int,
        device: str | None = None,
        expert_alignment: int = 1,
        power_of_two_scales: bool | None = None,
    ) -> TokenDispatcher:
        """The dispatcher for layers of this shape; the first call with a shape is collective over ``group``.

        Args:
            group: Ranks that share the experts.
            num_experts: Experts in the group; a tensor-parallel shard of an expert counts as one.
            num_topk: Columns of the routing.
            hidden: Elements in a row.
            dtype: Widest dtype of rows.
            num_tokens: Tokens of this rank, from which the heap is sized unless an option says it.
            device: Type of the device that rows are on; None: CUDA if there is one.
            expert_alignment: Rows of each local expert are padded to a multiple of this.
            power_of_two_scales: Of rows on the FP8 wire; None: as the option says.

        Raises:
            ConfigError: This rank has more tokens than the buffer takes; nothing was sent.
        """
        if power_of_two_scales is None:
            power_of_two_scales = self.options.power_of_two_scales
        shape = {
            "num_experts": num_experts,
            "num_topk": num_topk,
            "hidden": hidden,
            "dtype": dtype,
            "device": device,
            "expert_alignment": expert_alignment,
            "power_of_two_scales": power_of_two_scales,
        }
        key = (group, *shape.values())
        if key not in self._dispatchers:
            self._dispatchers[key] = self._make(group, num_tokens, shape)
        dispatcher = self._dispatchers[key]
        limit = dispatcher.buffer.config.max_tokens_per_rank
        if num_tokens > limit:
            sized = "was set" if self.options.max_tokens_per_rank is not None else "follows from the first forward"
            raise ConfigError.of(
                "the number of tokens that this rank brings to a MoE layer",
                num_tokens,
                f"its buffer takes {limit}, which {sized}",
                f"{self.options.how_to_take(num_tokens)}: at least the largest micro-batch of training and evaluation",
            )
        return dispatcher

    def _make(self, group: dist.ProcessGroup | None, num_tokens: int, shape: dict[str, Any]) -> TokenDispatcher:
        limit = self.options.max_tokens_per_rank
        if limit is None:
            _, num_ranks = group_rank_and_size(group)
            timeout_s = self.options.timeout_s
            counts = exchange(group, num_ranks, {"num_tokens": num_tokens}, timeout_s, "the first MoE dispatch")
            most = max(int(message["num_tokens"]) for message in counts)
            # Micro-batches and evaluation batches differ in length; twice the first covers the usual spread.
            limit = 1 << max(2 * most - 1, 1).bit_length()
        buffer = self.open_buffer(group, max_tokens_per_rank=limit, **shape)
        return TokenDispatcher(buffer, grad_wire=self.options.grad_wire)

    def open_buffer(self, group: dist.ProcessGroup | None, **shape: Any) -> EpBuffer:
        """A buffer of its own with the session's options; collective over ``group``.

        Args:
            group: Ranks that share the experts.
            shape: The fields of :class:`EpConfig` that options don't set, and ``power_of_two_scales`` where it is not
                the option's.
        """
        options = self.options
        config = EpConfig(
            backend=options.backend,
            wire=options.wire,
            expand=options.expand,
            host_threads=options.host_threads,
            num_sms=options.num_sms,
            local_sms=options.local_sms,
            pool_bytes=options.pool_bytes,
            shm_dir=options.shm_dir,
            timeout_s=options.timeout_s,
            **{"power_of_two_scales": options.power_of_two_scales, **shape},
        )
        buffer = EpBuffer(group, config)
        self._buffers.append(buffer)
        return buffer

    def close_buffer(self, buffer: EpBuffer) -> None:
        """Close a buffer of :meth:`open_buffer`; collective over its group, idempotent."""
        buffer.close()
        self._buffers = [other for other in self._buffers if other is not buffer]

    @property
    def buffers(self) -> list[EpBuffer]:
        """Open buffers, in the order they were made."""
        return list(self._buffers)

    def statistics(self) -> dict[str, Any]:
        """Totals over the open buffers of this rank, for reports.

        Returns:
            ``buffers`` (their number), ``backend`` (names, joined), ``operations``, ``bytes_to_peers``,
            ``dispatch_seconds`` and ``combine_seconds`` (time the calling thread spent), ``copied_out`` and
            ``staged``; see :class:`~moe_ep_plugin.backends.base.BufferStats`.
        """
        buffers = self.buffers
        totals: dict[str, Any] = {
            "buffers": len(buffers),
            "backend": "+".join(sorted({buffer.backend for buffer in buffers})),
        }
        for name in ("operations", "bytes_to_peers", "dispatch_seconds", "combine_seconds", "copied_out", "staged"):
            totals[name] = sum(getattr(buffer.stats, name) for buffer in buffers)
        return totals

    def close(self) -> None:
        """Close every buffer; idempotent. Layers make new ones if they run again."""
        self._dispatchers.clear()
        while self._buffers:
            self._buffers.pop().close()
