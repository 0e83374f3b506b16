"""The compiled CUDA part (csrc/bindings_cuda.cpp). Tensors and streams cross as addresses."""

from collections.abc import Sequence
from typing import Any

_Offsets = tuple[int, int, int, int, int]

routing_header_bytes: int
fan_bytes: int
most_fp8_experts: int

class Block:
    """A lease of the heap; given back with its last user."""

    @property
    def data(self) -> int: ...
    @property
    def device(self) -> int: ...
    def dlpack(self, offset: int, type: tuple[int, int], shape: tuple[int, ...]) -> Any: ...

class Heap:
    def __init__(
        self,
        *,
        device: int,
        num_ranks: int,
        num_experts: int,
        pool_bytes: int,
        overflow_bytes: int,
        low_receive_bytes: int,
        low_rows_bytes: int,
    ) -> None: ...
    def ipc_handle(self) -> bytes: ...
    def leased_bytes(self) -> int: ...
    def bytes(self) -> int: ...

class LowBlock:
    """One of the two sets of low-latency buffers, held while any tensor over it lives."""

    @property
    def device(self) -> int: ...
    @property
    def offsets(self) -> _Offsets: ...
    @property
    def rows(self) -> int:
        """Where the buffer of rows begins, from where offsets are counted."""
    def dlpack(self, offset: int, type: tuple[int, int], shape: tuple[int, ...]) -> Any: ...

class Routing:
    @property
    def num_rows(self) -> int: ...
    @property
    def num_received(self) -> int: ...
    @property
    def block_rows(self) -> int: ...
    @property
    def sent_rows(self) -> int: ...
    @property
    def tokens_per_local_expert(self) -> bytearray: ...
    def set_fan(self, address: int) -> None: ...

class DispatchResult:
    @property
    def block(self) -> Block | None: ...
    @property
    def data(self) -> int: ...
    @property
    def offsets(self) -> _Offsets: ...
    @property
    def routing(self) -> Routing: ...
    @property
    def bytes_per_row(self) -> int: ...

class CombineResult:
    @property
    def staged(self) -> bool: ...
    @property
    def bytes_to_peers(self) -> int: ...

class Communicator:
    def __init__(
        self,
        heap: Heap,
        *,
        rank: int,
        peers: list[tuple[int, bytes]],
        expert_to_rank: list[int],
        alignment: int,
        two_stage: bool,
        max_tokens: int,
        timeout_s: float,
        default_sms: int,
        ranks_on_device: int,
        gpu_each: bool,
        low_tokens: int,
        low_layout: int,
        mask_on_timeout: bool,
    ) -> None: ...
    def dispatch(
        self,
        *,
        x: int,
        element: int,
        scales: int | None,
        num_tokens: int,
        hidden: int,
        topk_idx: int,
        topk: int,
        weights: int | None,
        layout: int,
        max_recv_rows: int,
        quantize: bool,
        power_of_two: bool,
        routing: Routing | None,
        routing_memory: int,
        num_sms: int,
        stream: int,
        home: int,
    ) -> DispatchResult: ...
    def stage_stream(self, *, num_sms: int, local_sms: int, bytes: int) -> int: ...
    def expand(
        self,
        *,
        staged: DispatchResult,
        element: int,
        hidden: int,
        fresh: bool,
        beside: bool,
        block: int,
        num_sms: int,
        local_sms: int,
        stream: int,
    ) -> None: ...
    def expanded_offsets(self, staged: DispatchResult) -> _Offsets: ...
    def combine(
        self,
        *,
        rows: int,
        element: int,
        hidden: int,
        routing: Routing,
        weights: int | None,
        values: int | None,
        out: int,
        values_out: int,
        num_sms: int,
        local_sms: int,
        stream: int,
        home: int,
    ) -> CombineResult: ...
    def lease(self, bytes: int, *, stream: int, home: int) -> Block | None: ...
    def copy(self, to: int, source: int, bytes: int, stream: int) -> None: ...
    def low_dispatch(
        self,
        *,
        x: int,
        element: int,
        scales: int | None,
        num_tokens: int,
        hidden: int,
        topk_idx: int,
        topk: int,
        weights: int | None,
        quantize: bool,
        power_of_two: bool,
        routing_memory: int,
        index: int,
        receives: bool,
        num_sms: int,
        stream: int,
    ) -> None: ...
    def low_receive(self, *, routing_memory: int, num_tokens: int, topk: int, index: int, stream: int) -> None: ...
    def note_rows(self, rows: int) -> bool: ...
    def forget_rows(self, *, all: bool) -> None: ...
    def offer_rows(self) -> tuple[list[tuple[int, int, bytes]], str]: ...
    def map_rows(self, rank: int, offers: list[tuple[int, int, bytes]]) -> tuple[list[int], str]: ...
    def commit_rows(self, indices: list[int]) -> int: ...
    def low_combine(
        self,
        *,
        rows: int,
        element: int,
        num_tokens: int,
        hidden: int,
        topk_idx: int,
        topk: int,
        weights: int | None,
        quantize: bool,
        power_of_two: bool,
        routing_memory: int,
        index: int,
        out: int,
        lost: int,
        sends: bool,
        receives: bool,
        num_sms: int,
        stream: int,
    ) -> bool: ...
    def low_block(
        self, index: int, *, row_bytes: int, scale_bytes: int, weight_bytes: int, index_bytes: int, stream: int
    ) -> LowBlock: ...
    def low_rows_address(self, index: int) -> int: ...
    def low_held(self, index: int) -> bool: ...
    def low_mask(self, ranks: list[int], *, stream: int) -> None: ...
    def low_masked(self) -> list[int]: ...
    def low_routing_bytes(self, num_tokens: int, topk: int) -> int: ...
    def check(self) -> None: ...
    def depart(self, state: int, text: str) -> None: ...
    def routing_bytes(self, num_tokens: int, topk: int) -> int: ...
    def tune(
        self,
        *,
        send_warps: int = 0,
        chunk_bytes: int = 0,
        reduce_warps: int = 0,
        reduce_stages: int = 0,
        reduce_chunk: int = 0,
        reduce_rows: int = 0,
        gather_scales: int = 0,
        overlap_stages: int = 0,
    ) -> None: ...

def device_uuid(device: int) -> str: ...
def num_sms_of(device: int) -> int: ...
def transpose_fp8_scales(
    *,
    scales: int,
    row_stride: int,
    block_stride: int,
    num_blocks: int,
    rows_per_expert: Sequence[int],
    out: int,
    device: int,
    stream: int,
) -> None: ...
def quantize_fp8_columns(
    *,
    data: int,
    hidden: int,
    scales: int,
    row_stride: int,
    block_stride: int,
    rows_per_expert: Sequence[int],
    power_of_two: bool,
    codes: int,
    column_scales: int,
    device: int,
    stream: int,
) -> None: ...
