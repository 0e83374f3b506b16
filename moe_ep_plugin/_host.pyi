"""The compiled host part (csrc/bindings_host.cpp). Tensors cross as addresses."""

from collections.abc import Sequence

_Address = tuple[int, int, int, int, int]

class Block:
    """Bytes of the heap, or of ordinary memory, through the buffer protocol; freed with its last user."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

class Heap:
    def __init__(
        self,
        *,
        directory: str,
        num_ranks: int,
        num_experts: int,
        pool_bytes: int,
        overflow_bytes: int,
        low_receive_bytes: int = 0,
        low_rows_bytes: int = 0,
    ) -> None: ...
    def address(self) -> _Address: ...
    def leased_bytes(self) -> int: ...

class Routing:
    @property
    def num_rows(self) -> int: ...
    @property
    def num_received(self) -> int: ...
    @property
    def tokens_per_local_expert(self) -> list[int]: ...

class DispatchResult:
    @property
    def block(self) -> Block: ...
    @property
    def scales_offset(self) -> int: ...
    @property
    def weights_offset(self) -> int: ...
    @property
    def indices_offset(self) -> int: ...
    @property
    def routing(self) -> Routing: ...
    @property
    def copied_out(self) -> bool: ...
    @property
    def bytes_to_peers(self) -> int: ...

class CombineResult:
    @property
    def staged(self) -> bool: ...
    @property
    def bytes_to_peers(self) -> int: ...

class LowLatencyRouting:
    @property
    def bytes_to_peers(self) -> int: ...
    @property
    def scales_offset(self) -> int: ...
    @property
    def weights_offset(self) -> int: ...
    @property
    def indices_offset(self) -> int: ...

class LowLatencyCombine:
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
        addresses: list[_Address],
        expert_to_rank: list[int],
        alignment: int,
        two_stage: bool,
        num_threads: int,
        timeout_s: float,
        low_tokens: int = 0,
        low_layout: int = 0,
        mask_on_timeout: bool = False,
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
    ) -> DispatchResult: ...
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
    ) -> CombineResult: ...
    def send_low_latency_dispatch(
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
        index: int,
    ) -> LowLatencyRouting: ...
    def receive_low_latency_dispatch(self, routing: LowLatencyRouting) -> tuple[Block, Block]: ...
    def send_low_latency_combine(
        self,
        *,
        rows: int,
        element: int,
        hidden: int,
        routing: LowLatencyRouting,
        topk_idx: int,
        weights: int | None,
        quantize: bool,
        power_of_two: bool,
        out: int,
        lost_weights: int,
    ) -> LowLatencyCombine: ...
    def receive_low_latency_combine(self, combine: LowLatencyCombine) -> None: ...
    def low_latency_rows(self, index: int) -> Block: ...
    def low_latency_rows_address(self, index: int) -> int: ...
    def low_latency_held(self, index: int) -> bool: ...
    def mask_ranks(self, ranks: Sequence[int]) -> None: ...
    def masked_ranks(self) -> list[int]: ...
    def lease(self, bytes: int) -> Block | None: ...
    def depart(self, state: int, text: str) -> None: ...

def heap_bytes(
    num_ranks: int,
    num_experts: int,
    pool_bytes: int,
    overflow_bytes: int,
    low_receive_bytes: int = 0,
    low_rows_bytes: int = 0,
) -> tuple[int, int]: ...
def kernel_variant() -> str: ...
