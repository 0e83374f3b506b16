"""The compiled host part (csrc/bindings_host.cpp). Tensors cross as addresses."""

_Address = tuple[int, int, int, int, int]

class Block:
    """Bytes of the heap, or of ordinary memory, through the buffer protocol; freed with its last user."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

class Heap:
    def __init__(
        self, *, directory: str, num_ranks: int, num_experts: int, pool_bytes: int, overflow_bytes: int
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
    def lease(self, bytes: int) -> Block | None: ...
    def depart(self, state: int, text: str) -> None: ...

def heap_bytes(num_ranks: int, num_experts: int, pool_bytes: int, overflow_bytes: int) -> tuple[int, int]: ...
def kernel_variant() -> str: ...
