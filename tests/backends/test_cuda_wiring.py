"""The Python half of backend "cuda" without a GPU: what it passes to the compiled half and what it makes of the answer.

The compiled half is a stand-in on CPU memory; streams are inert. What the kernels do is tests/gpu's matter.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_ep_plugin import ConfigError, EpBuffer, EpConfig, StateError
from moe_ep_plugin.backends import cuda as cuda_backend
from moe_ep_plugin.backends import gpu_tensors, select
from moe_ep_plugin.backends.base import BackendContext

HIDDEN, TOPK, TOKENS, EXPERTS, ROWS = 64, 2, 5, 3, 7
HEADER_BYTES = 16


class Stream:
    """A stream on which everything has happened already."""

    def __init__(self, number: int = 0) -> None:
        self.cuda_stream = number

    def wait_stream(self, other: Any) -> None: ...


class Lease:
    """Bytes of a heap that is ordinary memory; a tensor over part of it is a copy, which serves for reading."""

    device = 0

    def __init__(self, content: torch.Tensor) -> None:
        self.content = content
        self.data = content.data_ptr()

    def array(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        size = dtype.itemsize * torch.Size(shape).numel()
        return self.content[offset : offset + size].view(dtype).view(shape)


class Compiled:
    """Stands in for the module and its communicator: answers with ``result`` and remembers the calls."""

    routing_header_bytes, fan_bytes = HEADER_BYTES, 8

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.registered: set[int] = set()
        routing = SimpleNamespace(
            num_rows=ROWS,
            num_received=6,
            sent_rows=4,
            block_rows=ROWS,
            tokens_per_local_expert=bytearray(torch.tensor([1, 2, 3]).numpy().tobytes()),
            set_fan=lambda address: self.calls.append(("set_fan", {"address": address})),
        )
        total = 4096
        # No byte pattern that is NaN in any type, so that equal means equal.
        content = (torch.arange(total) % 60).to(torch.uint8)
        self.heap = content
        self.low_slots = content.repeat(64)
        self.held: set[int] = set()
        self.result = SimpleNamespace(
            routing=routing,
            block=Lease(content),
            data=content.data_ptr(),
            offsets=(0, 1024, 2048, 3072, total),
            bytes_per_row=10,
        )

    def num_sms_of(self, device: int) -> int:
        return 132

    def routing_bytes(self, num_tokens: int, topk: int) -> int:
        return 1024

    def dispatch(self, **arguments: Any) -> Any:
        self.calls.append(("dispatch", arguments))
        return self.result

    def expand(self, **arguments: Any) -> None:
        self.calls.append(("expand", arguments))

    def stage_stream(self, *, num_sms: int, local_sms: int, bytes: int) -> int:
        return 77 if local_sms > 8 and bytes == self.result.offsets[-1] else 0

    def expanded_offsets(self, staged: Any) -> tuple[int, ...]:
        return self.result.offsets

    def lease(self, size: int, *, stream: int, home: int) -> Lease | None:
        return Lease(self.heap)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        self.calls.append(("copy", {"source": source, "size": size}))

    def combine(self, **arguments: Any) -> Any:
        self.calls.append(("combine", arguments))
        return SimpleNamespace(staged=True, bytes_to_peers=11)

    def check(self) -> None:
        self.calls.append(("check", {}))

    def low_routing_bytes(self, num_tokens: int, topk: int) -> int:
        return 512

    def low_dispatch(self, **arguments: Any) -> None:
        self.calls.append(("low_dispatch", arguments))

    def low_receive(self, **arguments: Any) -> None:
        self.calls.append(("low_receive", arguments))

    def low_combine(self, **arguments: Any) -> bool:
        self.calls.append(("low_combine", arguments))
        return bool(arguments["sends"] and arguments["rows"] != self.low_rows_address(arguments["index"]))

    def low_block(self, index: int, **sizes: int) -> Lease:
        self.calls.append(("low_block", {"index": index} | sizes))
        block = Lease(self.low_slots)
        block.offsets, block.rows = (0, 1 << 15, 1 << 16, 3 << 15, 0), 1 << 16
        return block

    def low_rows_address(self, index: int) -> int:
        return 64 + index

    def note_rows(self, rows: int) -> bool:
        return rows in self.registered

    def low_held(self, index: int) -> bool:
        return index in self.held

    def low_mask(self, ranks: list[int], *, stream: int) -> None:
        self.calls.append(("low_mask", {"ranks": ranks, "stream": stream}))

    def low_masked(self) -> list[int]:
        return [3, 5]

    def depart(self, state: int, reason: str) -> None: ...


@pytest.fixture
def compiled() -> Compiled:
    return Compiled()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, compiled: Compiled) -> Any:
    """``make(two_stage=False, ranks_on_device=8, gpus=1, **config)``: a buffer on the CUDA backend on the stand-in."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **kwargs: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gpu_tensors, "_leased", lambda block, *rest: block.array(*rest))

    def buffer(two_stage: bool = False, ranks_on_device: int = 8, gpus: int = 1, **changes: Any) -> EpBuffer:
        def connect(context: BackendContext) -> Any:
            return cuda_backend.CudaBackend(
                context,
                compiled,
                None,
                compiled,
                device=torch.device("cpu"),
                two_stage=two_stage,
                ranks_on_device=ranks_on_device,
                gpus=gpus,
            )

        monkeypatch.setitem(select._MAKERS, "host", connect)
        settings = {"num_experts": EXPERTS, "num_topk": TOPK, "hidden": HIDDEN, "max_tokens_per_rank": 8}
        return EpBuffer(None, EpConfig(**(settings | {"backend": "host", "device": "cpu"} | changes)))

    return buffer


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ones(TOKENS, HIDDEN).bfloat16(), torch.zeros(TOKENS, TOPK).long(), torch.ones(TOKENS, TOPK)


def test_exact_sizes_come_to_the_host(make: Any, compiled: Compiled) -> None:
    x, idx, weights = inputs()
    with make() as buffer:
        out = buffer.dispatch(x, idx, weights, layout="rank", num_sms=16)
    name, passed = compiled.calls[0]
    assert name == "dispatch"
    assert (passed["x"], passed["num_tokens"], passed["topk"]) == (x.data_ptr(), TOKENS, TOPK)
    assert (passed["topk_idx"], passed["weights"], passed["scales"]) == (idx.data_ptr(), weights.data_ptr(), None)
    assert (passed["max_recv_rows"], passed["num_sms"], passed["layout"], passed["routing"]) == (-1, 16, 1, None)
    content = compiled.heap
    assert torch.equal(out.x, content[: ROWS * HIDDEN * 2].view(torch.bfloat16).view(ROWS, HIDDEN))
    assert torch.equal(out.topk_weights, content[2048 : 2048 + ROWS * TOPK * 4].view(torch.float32).view(ROWS, TOPK))
    assert torch.equal(out.topk_idx, content[3072 : 3072 + ROWS * TOPK * 8].view(torch.int64).view(ROWS, TOPK))
    assert out.scale is None
    assert out.tokens_per_expert.tolist() == out.handle.tokens_per_expert.tolist() == [1, 2, 3]
    assert (out.handle.num_rows, out.handle.num_received) == (ROWS, 6)
    assert buffer.stats.bytes_to_peers == 40


def test_fp8_rows_come_with_scales(make: Any, compiled: Compiled) -> None:
    x, idx, _ = inputs()
    with make() as buffer:
        out = buffer.dispatch(x, idx, wire="fp8")
    assert compiled.calls[0][1]["quantize"] is True
    assert (out.x.dtype, out.x.shape) == (torch.float8_e4m3fn, (ROWS, HIDDEN))
    assert torch.equal(out.scale, compiled.heap[1024 : 1024 + ROWS * 4].view(torch.float32).view(ROWS, 1))
    assert out.topk_idx is None and out.topk_weights is None


def test_fixed_sizes_stay_on_the_device(make: Any, compiled: Compiled) -> None:
    x, idx, _ = inputs()
    with make() as buffer:
        out = buffer.dispatch(x, idx, max_recv_tokens=ROWS)
        memory = out.handle.state.memory
        memory[HEADER_BYTES : HEADER_BYTES + 8 * 2 * EXPERTS].view(torch.int64).copy_(torch.arange(6))
    assert compiled.calls[0][1]["max_recv_rows"] == ROWS
    assert out.handle.num_received is None
    assert out.handle.tokens_per_expert.tolist() == [0, 1, 2]
    assert out.tokens_per_expert.tolist() == [3, 4, 5]


def test_a_used_up_pool_is_copied_out_and_counted(make: Any, compiled: Compiled) -> None:
    x, idx, _ = inputs()
    compiled.result.block = None
    with make() as buffer:
        out = buffer.dispatch(x, idx)
    assert compiled.calls[1] == ("copy", {"source": compiled.result.data, "size": 4096})
    assert buffer.stats.copied_out == 1 and out.x.shape == (ROWS, HIDDEN)


def test_no_room_at_all_gives_zeros(make: Any, compiled: Compiled) -> None:
    x, idx, weights = inputs()
    compiled.result.block, compiled.result.data = None, 0
    with make() as buffer:
        out = buffer.dispatch(x, idx, weights, layout="rank", max_recv_tokens=ROWS)
    assert not out.x.any() and not out.topk_weights.any()
    assert (out.topk_idx == -1).all()


@pytest.mark.parametrize(("two_stage", "num_sms", "expected"), [(True, None, 16), (False, None, 24), (True, 20, 20)])
def test_sms_where_none_are_asked_for(
    make: Any, compiled: Compiled, two_stage: bool, num_sms: int | None, expected: int
) -> None:
    x, idx, weights = inputs()
    with make(two_stage=two_stage, ranks_on_device=1, gpus=4, num_sms=num_sms) as buffer:
        out = buffer.dispatch(x, idx, weights)
        buffer.combine(out.x, out.handle)
    asked = [(name, passed["num_sms"]) for name, passed in compiled.calls if name in ("dispatch", "combine")]
    assert asked == [("dispatch", expected), ("combine", expected)]


def test_two_stages_expand_into_a_block_of_their_own(make: Any, compiled: Compiled) -> None:
    x, idx, weights = inputs()
    with make(two_stage=True) as buffer:
        first = buffer.dispatch(x, idx, weights)
        buffer.dispatch(x, handle=first.handle, num_sms=8)
    names = [name for name, _ in compiled.calls]
    assert names == ["dispatch", "set_fan", "expand", "dispatch", "expand"]
    expands = [passed for name, passed in compiled.calls if name == "expand"]
    assert [passed["fresh"] for passed in expands] == [True, False]
    assert expands[0]["block"] == compiled.heap.data_ptr()
    # Beside the dispatch, with its own number of SMs, where there are enough.
    sms = [(passed["num_sms"], passed["local_sms"], passed["beside"]) for passed in expands]
    assert sms == [(16, 16, True), (8, 8, False)]
    assert compiled.calls[1][1]["address"] == first.handle.state.fan.data_ptr()
    assert compiled.calls[3][1]["routing"] is compiled.result.routing


def test_combine_passes_what_it_was_given(make: Any, compiled: Compiled) -> None:
    x, idx, weights = inputs()
    with make() as buffer:
        out = buffer.dispatch(x, idx, weights)
        rows, factors, values = torch.ones(ROWS, HIDDEN).bfloat16(), torch.ones(ROWS), torch.ones(ROWS)
        back = buffer.combine_with_values(rows, out.handle, topk_weights=factors, row_values=values)
        buffer.check()
    name, passed = compiled.calls[1]
    assert name == "combine" and compiled.calls[2][0] == "check"
    assert (passed["rows"], passed["weights"], passed["values"]) == tuple(t.data_ptr() for t in (rows, factors, values))
    assert (passed["out"], passed["values_out"]) == (back.x.data_ptr(), back.row_values.data_ptr())
    assert (back.x.shape, back.row_values.shape) == ((TOKENS, HIDDEN), (TOKENS, TOPK))
    assert (buffer.stats.staged, buffer.stats.bytes_to_peers) == (1, 40 + 11)


# Low-latency mode

CAPACITY = 8


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``current``: the stream that calls are made on; ``recorded``: tensors (by address) used on another one."""
    seen = SimpleNamespace(current=Stream(1), other=Stream(2), recorded=[])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: seen.current)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, on: seen.recorded.append((self.data_ptr(), on)), raising=False
    )
    return seen


def names_of(compiled: Compiled) -> list[str]:
    return [name for name, _ in compiled.calls]


def test_a_low_latency_dispatch_is_one_launch(make: Any, compiled: Compiled) -> None:
    x, idx, weights = inputs()
    with make(low_latency_tokens_per_rank=CAPACITY, low_latency_layout="rank") as buffer:
        buffer.low_latency_dispatch(x, idx).wait()
        compiled.calls.clear()
        out = buffer.low_latency_dispatch(x, idx, weights, wire="fp8", num_sms=16).wait()
    assert names_of(compiled) == ["low_dispatch", "low_block"]
    passed = compiled.calls[0][1]
    assert (passed["x"], passed["num_tokens"], passed["topk"]) == (x.data_ptr(), TOKENS, TOPK)
    assert (passed["topk_idx"], passed["weights"], passed["scales"]) == (idx.data_ptr(), weights.data_ptr(), None)
    assert (passed["quantize"], passed["receives"], passed["num_sms"], passed["index"]) == (True, True, 16, 0)
    sizes = {"row_bytes": HIDDEN, "scale_bytes": 4, "weight_bytes": 4 * TOPK, "index_bytes": 8 * TOPK, "stream": 0}
    assert compiled.calls[1][1] == {"index": 0} | sizes
    assert (out.x.dtype, out.x.shape) == (torch.float8_e4m3fn, (CAPACITY, HIDDEN))
    assert out.scale is not None and out.topk_idx is not None and out.topk_weights is not None
    assert (out.scale.shape, out.scale.stride()) == ((CAPACITY, 1), (1, CAPACITY))
    assert out.topk_idx.shape == out.topk_weights.shape == (CAPACITY, TOPK)
    memory = out.handle.state.memory
    assert passed["routing_memory"] == memory.data_ptr()
    memory[12:28].view(torch.int32).copy_(torch.tensor([6, 1, 2, 3]))
    assert out.num_received.tolist() == [6] and out.tokens_per_expert.tolist() == [1, 2, 3]


def test_halves_are_launches_on_their_own_streams(make: Any, compiled: Compiled, streams: SimpleNamespace) -> None:
    x, idx, weights = inputs()
    first, second = streams.current, streams.other
    with make(low_latency_tokens_per_rank=CAPACITY) as buffer:
        pending = buffer.low_latency_dispatch(x, idx, async_op=True)
        assert names_of(compiled) == ["low_dispatch"]
        assert (compiled.calls[0][1]["receives"], compiled.calls[0][1]["stream"]) == (False, first.cuda_stream)
        streams.current = second
        out = pending.wait()
        memory = out.handle.state.memory.data_ptr()
        assert streams.recorded == [(memory, second)]
        received = {"routing_memory": memory, "num_tokens": TOKENS, "topk": TOPK, "index": 1, "stream": 2}
        assert compiled.calls[1] == ("low_receive", received)
        assert out.x.shape == (EXPERTS, CAPACITY, HIDDEN) and out.topk_idx is None

        compiled.calls.clear()
        streams.recorded.clear()
        rows, sums = torch.ones(EXPERTS, CAPACITY, HIDDEN).bfloat16(), torch.ones(TOKENS, HIDDEN).bfloat16()
        pending = buffer.low_latency_combine(rows, idx, weights, out.handle, out=sums, wire="fp8", async_op=True)
        # The handle's memory belongs to the stream of its dispatch.
        assert streams.recorded == [(memory, second)]
        assert names_of(compiled) == ["low_combine"]
        streams.current = first
        back = pending.wait()
    sent, brought = (passed for _, passed in compiled.calls)
    assert (sent["sends"], sent["receives"], sent["stream"], sent["out"]) == (True, False, 2, 0)
    assert (brought["sends"], brought["receives"], brought["stream"]) == (False, True, 1)
    for passed in (sent, brought):
        assert (passed["rows"], passed["topk_idx"]) == (rows.data_ptr(), idx.data_ptr())
        assert (passed["weights"], passed["quantize"], passed["index"]) == (weights.data_ptr(), True, 1)
        assert passed["routing_memory"] == memory
    assert back.x is sums and brought["out"] == sums.data_ptr()
    assert (brought["lost"], back.lost_weights.shape) == (back.lost_weights.data_ptr(), (TOKENS,))
    used = {t.data_ptr() for t in (rows, idx, weights)} | {memory}
    assert {address for address, on in streams.recorded if on is first} == used
    assert buffer.stats.staged == 1


def test_a_low_latency_combine_in_place_is_one_launch(
    make: Any, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, idx, _ = inputs()
    with make(low_latency_tokens_per_rank=CAPACITY) as buffer:
        out = buffer.low_latency_dispatch(x, idx).wait()
        rows = buffer.empty_rows(out.handle)
        assert (rows.dtype, rows.shape) == (torch.bfloat16, (EXPERTS, CAPACITY, HIDDEN))
        with pytest.raises(ConfigError, match="zero_copy"):
            buffer.low_latency_combine(rows, idx, None, out.handle, zero_copy=True)
        monkeypatch.setattr(compiled, "low_rows_address", lambda index: rows.data_ptr() if index == 1 else 0)
        compiled.calls.clear()
        back = buffer.low_latency_combine(rows, idx, None, out.handle, zero_copy=True).wait()
    ((name, passed),) = compiled.calls
    assert name == "low_combine" and passed["rows"] == rows.data_ptr()
    assert (passed["sends"], passed["receives"], passed["quantize"], passed["weights"]) == (True, True, False, None)
    assert (back.x.dtype, back.x.shape, passed["out"]) == (torch.bfloat16, (TOKENS, HIDDEN), back.x.data_ptr())
    assert buffer.stats.staged == 0


def test_registered_rows_are_no_copies_but_in_halves(make: Any, compiled: Compiled) -> None:
    x, idx, _ = inputs()
    with make(low_latency_tokens_per_rank=CAPACITY) as buffer:
        out = buffer.low_latency_dispatch(x, idx).wait()
        rows = buffer.empty_rows(out.handle)
        compiled.registered = {rows.data_ptr()}
        for options in ({"async_op": True}, {"wire": "fp8"}):
            with pytest.raises(ConfigError, match="register_rows"):
                buffer.low_latency_combine(rows, idx, None, out.handle, zero_copy=True, **options)
        compiled.calls.clear()
        buffer.low_latency_combine(rows, idx, None, out.handle, zero_copy=True).wait()
    ((name, passed),) = compiled.calls
    assert name == "low_combine" and passed["rows"] == rows.data_ptr()


def test_held_results_and_masks_are_asked_of_the_compiled_half(make: Any, compiled: Compiled) -> None:
    x, idx, _ = inputs()
    with make(low_latency_tokens_per_rank=CAPACITY) as buffer:
        compiled.held = {1}
        with pytest.raises(StateError, match="still held"):
            buffer.low_latency_dispatch(x, idx)
        compiled.held = {0}
        buffer.low_latency_dispatch(x, idx).wait()
        with pytest.raises(StateError, match="still held"):
            buffer.low_latency_dispatch(x, idx)
        compiled.calls.clear()
        with pytest.raises(ConfigError, match="a rank is 0, but it is this one"):
            buffer.mask_ranks(0)
        assert compiled.calls == []
        buffer._backend.mask_ranks((3, 5))  # This group has no other rank.
        assert compiled.calls == [("low_mask", {"ranks": [3, 5], "stream": 0})]
        assert buffer.masked_ranks() == (3, 5)


def test_a_view_between_two_vectors_is_copied(make: Any, compiled: Compiled) -> None:
    _, idx, _ = inputs()
    x = torch.ones(TOKENS * HIDDEN + 1).bfloat16()[1:].view(TOKENS, HIDDEN)
    with make() as buffer:
        buffer.dispatch(x, idx)
    assert compiled.calls[0][1]["x"] % 16 == 0 and compiled.calls[0][1]["x"] != x.data_ptr()


def test_too_many_sms_and_exact_sizes_in_a_capture_are_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, idx, _ = inputs()
    with make() as buffer:
        with pytest.raises(ConfigError, match=r"num_sms is 17, but 8 ranks share a GPU of 132 SMs"):
            buffer.dispatch(x, idx, num_sms=17)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(ConfigError, match=r"max_recv_tokens.*captured.*pass max_recv_tokens, or a handle"):
            buffer.dispatch(x, idx)
        buffer.dispatch(x, idx, max_recv_tokens=4)


def test_the_current_stream_is_made_an_object_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Stream] = []
    raw = [0]

    def current_stream(index: int) -> Stream:
        assert index == 1
        made.append(Stream())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: raw[0], raising=False)
    stream = gpu_tensors.CurrentStream(torch.device("cuda", 1))
    first = stream()
    assert stream() is first
    raw[0] = 77
    second = stream()
    assert second is not first
    raw[0] = 0
    assert stream() is first
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream")
    plain = gpu_tensors.CurrentStream(torch.device("cuda", 1))
    assert plain() is not plain(), "without torch's short cut it asks every time"
    assert len(made) == 4


def test_what_dlpack_can_carry_is_found_under_any_default_device() -> None:
    expected = gpu_tensors._exchanges_fp8()
    with torch.device("meta"):
        assert gpu_tensors._exchanges_fp8() == expected
