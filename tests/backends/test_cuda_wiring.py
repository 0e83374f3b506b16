"""The Python half of backend "cuda" without a GPU: what it passes to the compiled half and what it makes of the answer.

The compiled half is a stand-in on CPU memory; streams are inert. What the kernels do is tests/gpu's matter.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_ep_plugin import ConfigError, EpBuffer, EpConfig
from moe_ep_plugin.backends import cuda as cuda_backend
from moe_ep_plugin.backends import gpu_tensors, select
from moe_ep_plugin.backends.base import BackendContext

HIDDEN, TOPK, TOKENS, EXPERTS, ROWS = 64, 2, 5, 3, 7
HEADER_BYTES = 16


class Stream:
    """A stream on which everything has happened already."""

    cuda_stream = 0

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

    def depart(self, state: int, reason: str) -> None: ...


@pytest.fixture
def compiled() -> Compiled:
    return Compiled()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, compiled: Compiled) -> Any:
    """``make(two_stage=False)``: a buffer whose backend is the CUDA one on the stand-in."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **kwargs: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gpu_tensors, "_leased", lambda block, *rest: block.array(*rest))

    def buffer(two_stage: bool = False) -> EpBuffer:
        def connect(context: BackendContext) -> Any:
            return cuda_backend.CudaBackend(
                context,
                compiled,
                None,
                compiled,
                device=torch.device("cpu"),
                two_stage=two_stage,
                ranks_on_device=8,
            )

        monkeypatch.setitem(select._MAKERS, "host", connect)
        config = EpConfig(
            num_experts=EXPERTS, num_topk=TOPK, hidden=HIDDEN, max_tokens_per_rank=8, backend="host", device="cpu"
        )
        return EpBuffer(None, config)

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


def test_two_stages_expand_into_a_block_of_their_own(make: Any, compiled: Compiled) -> None:
    x, idx, weights = inputs()
    with make(two_stage=True) as buffer:
        first = buffer.dispatch(x, idx, weights)
        buffer.dispatch(x, handle=first.handle)
    names = [name for name, _ in compiled.calls]
    assert names == ["dispatch", "set_fan", "expand", "dispatch", "expand"]
    expands = [passed for name, passed in compiled.calls if name == "expand"]
    assert [passed["fresh"] for passed in expands] == [True, False]
    assert expands[0]["block"] == compiled.heap.data_ptr()
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
