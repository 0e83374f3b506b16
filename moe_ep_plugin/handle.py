"""The routing state that links a dispatch to its combine and to both their backwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .types import Layout


@dataclass(frozen=True, eq=False)
class DispatchHandle:
    """Frozen routing state of one dispatch. It holds no rows, so keeping it is cheap.

    Attributes:
        layout: Layout of the received rows.
        num_tokens: Tokens that this rank sent.
        num_topk: Columns of the ``topk_idx`` that was dispatched.
        num_rows: Rows that this rank received, in ``layout``: padding included for ``"expert"``; the
            fixed size where ``max_recv_tokens`` was given.
        num_received: Rows among ``num_rows`` that carry a token (the others are padding). None where only the
            device knows: backend ``"cuda"`` with ``max_recv_tokens``.
        tokens_per_expert: int64 [num_local_experts]: received rows per local expert, no padding. On the CPU, or
            on the device where only it knows the sizes (see ``num_received``).
        max_recv_tokens: The fixed row count asked for, or None.
        buffer_id: Identifies the buffer that made the handle; another buffer refuses it.
        state: The backend's own routing tables.
    """

    layout: Layout
    num_tokens: int
    num_topk: int
    num_rows: int
    num_received: int | None
    tokens_per_expert: torch.Tensor
    max_recv_tokens: int | None
    buffer_id: int
    state: Any = field(repr=False)


@dataclass(frozen=True, eq=False)
class LowLatencyHandle:
    """Routing state of one low-latency dispatch; good until the second dispatch after it.

    Attributes:
        layout: ``EpConfig.low_latency_layout``.
        num_tokens: Tokens that this rank sent.
        num_topk: Columns of the ``topk_idx`` that was dispatched.
        capacity: Rows of each group that was received.
        sequence: How many low-latency dispatches the buffer had begun, this one included.
        buffer_id: Identifies the buffer that made the handle; another buffer refuses it.
        state: The backend's own routing tables.
    """

    layout: Layout
    num_tokens: int
    num_topk: int
    capacity: int
    sequence: int
    buffer_id: int
    state: Any = field(repr=False)

    @property
    def index(self) -> int:
        """Which of the two buffers the rows are in."""
        return self.sequence % 2
