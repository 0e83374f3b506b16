"""Backend ``cuda`` on streams: CUDA graphs, the communication stream and its events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import CapacityError, ConfigError, DispatchOutput, EpBuffer
from tests.cases import bits

from .helpers import DEVICE, Mistakes, finish, integers, kernel_tests, make_config, needs_cuda

pytestmark = [*kernel_tests, needs_cuda]

TOKENS, WIDTH, TOPK, EXPERTS, REPLAYS = 32, 136, 2, 8, 50

# Graphs


def routing(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, topk_idx and topk_weights: whole numbers, so that sums are exact in bf16."""
    seed = 1000 * step + 10 * rank
    x = integers(seed, TOKENS, WIDTH).bfloat16()
    idx = integers(seed + 1, TOKENS, TOPK, low=-1, high=EXPERTS).long()
    return x.to(DEVICE), idx.to(DEVICE), integers(seed + 2, TOKENS, TOPK, low=1).to(DEVICE)


def capture(work: Callable[[], tuple[Any, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Any, ...]]:
    """The graph, and what ``work`` returned while it was captured. Keep that: the graph writes there.

    ``work`` runs once before, as kernels are loaded when they are first used.
    """
    work()
    finish()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    return graph, captured


def captured_layer(layout: str, wire: str, leased: bool, limit: int) -> int:
    """Replays of dispatch, experts and combine against the same calls outside of the graph."""
    config = make_config(
        hidden=WIDTH, dtype=torch.bfloat16, num_topk=TOPK, num_experts=EXPERTS, expert_alignment=4, wire=wire
    )
    mistakes = Mistakes()
    with EpBuffer(None, config) as buffer:
        x, idx, weights = routing(0, buffer.rank)

        def layer(max_recv_tokens: int | None) -> tuple[torch.Tensor, DispatchOutput, torch.Tensor]:
            out = buffer.dispatch(x, idx, weights, layout=layout, max_recv_tokens=max_recv_tokens)  # type: ignore[arg-type]
            assert out.topk_weights is not None
            results = out.x.to(torch.bfloat16) * 3
            rows = buffer.empty_rows(out.handle).copy_(results) if leased else results
            factors = out.topk_weights if layout == "expert" else None
            return buffer.combine(rows, out.handle, topk_weights=factors), out, rows

        graph, (y, out, _rows) = capture(lambda: layer(limit))
        assert out.handle.num_received is None and len(out.x) == limit
        for step in range(1, REPLAYS + 1):
            for static, new in zip((x, idx, weights), routing(step, buffer.rank), strict=True):
                static.copy_(new)
            if step == REPLAYS // 2:
                idx.zero_()  # More than fits on rank 0.
                graph.replay()
                with pytest.raises(CapacityError, match=r"rank 0\b.*max_recv_tokens"):
                    buffer.check()
                continue
            graph.replay()
            exact_y, exact, _ = layer(None)
            mistakes.compare(bits(y), bits(exact_y))
            rows = len(exact.x)
            mistakes.compare(bits(out.x[:rows]), bits(exact.x))
            assert out.topk_weights is not None and exact.topk_weights is not None
            mistakes.compare(out.topk_weights[:rows], exact.topk_weights)
            mistakes.compare(bits(out.x[rows:]), torch.zeros_like(bits(out.x[rows:])))
            mistakes.compare(out.tokens_per_expert, exact.tokens_per_expert.to(DEVICE))
        buffer.check()
        assert mistakes.none()
        assert y.any(), "nothing was compared but zeros"
    return REPLAYS


@pytest.mark.parametrize(
    ("layout", "wire", "leased", "limit"),
    [("expert", "bf16", True, 144), ("expert", "fp8", False, 144), ("rank", "bf16", False, 80)],
)
def test_a_layer_is_captured_and_replayed(ranks, layout, wire, leased, limit):
    """Routing changes between replays; sizes stay on the device; an overflow in one replay does not hurt the next."""
    assert ranks(3).run(captured_layer, layout, wire, leased, limit) == [REPLAYS] * 3


def captured_reuse() -> int:
    mistakes = Mistakes()
    with EpBuffer(None, make_config(hidden=WIDTH, dtype=torch.bfloat16)) as buffer:
        x, idx, _ = routing(0, buffer.rank)
        first = buffer.dispatch(x, idx)

        def again() -> tuple[torch.Tensor, DispatchOutput]:
            out = buffer.dispatch(x, handle=first.handle)
            return buffer.combine(out.x, first.handle), out

        graph, (y, out) = capture(again)
        for step in range(1, REPLAYS + 1):
            x.copy_(routing(step, buffer.rank)[0])
            graph.replay()
            mistakes.compare(y, x * (idx >= 0).sum(1, keepdim=True))
            mistakes.compare(out.x, buffer.dispatch(x, idx).x)
        buffer.check()
        assert mistakes.none()
    return REPLAYS


def test_reuse_of_a_handle_is_captured_and_replayed(ranks):
    """No count comes to the host, and so none is waited for."""
    assert ranks(3).run(captured_reuse) == [REPLAYS] * 3


def captured_with_exact_sizes() -> None:
    """Sizes can't come to the host from a capture: refused on this rank before anything is sent."""
    with EpBuffer(None, make_config(hidden=WIDTH, dtype=torch.bfloat16)) as buffer:
        x, idx, _ = routing(0, buffer.rank)
        buffer.dispatch(x, idx)
        finish()
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(ConfigError, match="max_recv_tokens is None"):
            buffer.dispatch(x, idx)
        assert buffer.dispatch(x, idx).x.shape[1] == WIDTH


def test_exact_sizes_are_refused_in_a_capture(ranks):
    ranks(2).run(captured_with_exact_sizes)


# The communication stream

MANY, WIDE = 256, 1024
A_WHILE = 1_500_000_000
"""Clock cycles: more than half a second."""


def busy_buffer() -> EpBuffer:
    """A buffer whose kernels are all loaded: that may wait for everything that is on the GPU."""
    buffer = EpBuffer(None, make_config(hidden=WIDE, max_tokens_per_rank=MANY))
    x, idx = source(buffer.rank, 0)
    for limit in (None, 4 * MANY):
        out = buffer.dispatch(x, idx, max_recv_tokens=limit, async_op=True)
        buffer.combine(out.x, out.handle, async_op=True, previous_event=out.event).event.synchronize()
    finish()
    dist.barrier()
    return buffer


def source(rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = integers(100 * seed + rank, MANY, WIDE)
    return x.to(DEVICE), integers(100 * seed + rank + 50, MANY, 2, low=0, high=8).long().to(DEVICE)


def waits_for_the_event_alone() -> bool:
    """With a previous event the communication stream overtakes what the current stream is busy with."""
    with busy_buffer() as buffer:
        x, idx = source(buffer.rank, 1)
        ready = torch.cuda.current_stream().record_event()
        torch.cuda._sleep(A_WHILE)
        out = buffer.dispatch(x, idx, max_recv_tokens=4 * MANY, async_op=True, previous_event=ready)
        back = buffer.combine(out.x, out.handle, async_op=True, previous_event=out.event)
        back.event.synchronize()
        overtook = not torch.cuda.current_stream().query()
        assert out.event.query() and back.event.query()
        assert torch.equal(back.x, 2 * x)
        dist.barrier()
        return overtook


def test_previous_event_takes_the_place_of_the_current_stream(ranks):
    assert ranks(2).run(waits_for_the_event_alone) == [True] * 2


def waits_for_the_current_stream() -> None:
    with busy_buffer() as buffer:
        late, idx = source(buffer.rank, 2)
        for limit in (None, 4 * MANY):
            x = torch.full_like(late, float("nan"))
            finish()
            torch.cuda._sleep(A_WHILE // 20)
            x.copy_(late)
            out = buffer.dispatch(x, idx, max_recv_tokens=limit, async_op=True)
            out.event.wait()
            y = buffer.combine(out.x * 1, out.handle)
            assert torch.equal(y, 2 * late)


def test_without_an_event_the_current_stream_is_waited_for(ranks):
    ranks(2).run(waits_for_the_current_stream)


def drops_everything_early(rounds: int) -> int:
    """Inputs and results go as soon as the call returned; what takes their memory must come after their use."""
    mistakes = Mistakes()
    with busy_buffer() as buffer:
        sources = [source(buffer.rank, seed) for seed in range(4)]
        for step in range(rounds):
            values, idx = sources[step % 4]
            limit = 4 * MANY if step % 2 else None
            x, routes = values.clone(), idx.clone()
            out = buffer.dispatch(x, routes, max_recv_tokens=limit, async_op=True)
            del x, routes
            junk = [torch.full_like(values, float("nan")), torch.full_like(idx, 1 << 40)]
            out.event.wait()
            rows = out.x * 1 if step % 3 else buffer.empty_rows(out.handle).copy_(out.x)
            back = buffer.combine(rows, out.handle, async_op=True)
            del rows, out
            junk += [torch.full((4 * MANY, WIDE), float("nan"), device=DEVICE), torch.full_like(values, float("nan"))]
            back.event.wait()
            mistakes.compare(back.x, 2 * values)
            del junk, back
        buffer.check()
        assert mistakes.none()
    return rounds


def test_memory_of_inputs_is_kept_until_it_was_read(ranks):
    assert ranks(4).run(drops_everything_early, 60) == [60] * 4


def overlaps_compute(rounds: int) -> int:
    """Matrices are multiplied on another stream while rows cross; both are right."""
    mistakes = Mistakes()
    side = torch.cuda.Stream()
    with busy_buffer() as buffer:
        matrix = integers(7 + buffer.rank, 512, 512, low=-1, high=2).to(DEVICE)
        product = matrix @ matrix
        finish()
        for step in range(rounds):
            x, idx = source(buffer.rank, step % 5)
            out = buffer.dispatch(x, idx, async_op=True)
            with torch.cuda.stream(side):
                for _ in range(4):
                    mistakes.compare(matrix @ matrix, product)
            out.event.wait()
            back = buffer.combine(out.x, out.handle, async_op=True, previous_event=out.event)
            back.event.wait()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                mistakes.compare(back.x, 2 * x)
            torch.cuda.current_stream().wait_stream(side)
        finish()
        assert mistakes.none()
    return rounds


def test_compute_on_another_stream_overlaps(ranks):
    assert ranks(4).run(overlaps_compute, 20) == [20] * 4


def on_a_side_stream() -> int:
    """The current stream is whatever the caller says, and may change between a dispatch and its combine."""
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    mistakes = Mistakes()
    with busy_buffer() as buffer:
        for step in range(30):
            x, idx = source(buffer.rank, step % 3)
            before, after = streams[step % 3], streams[(step + 1 + step % 2) % 3]
            before.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(before):
                out = buffer.dispatch(x, idx, max_recv_tokens=4 * MANY if step % 2 else None)
            after.wait_stream(before)
            with torch.cuda.stream(after):
                y = buffer.combine(out.x, out.handle)
            torch.cuda.current_stream().wait_stream(after)
            mistakes.compare(y, 2 * x)
            finish()  # Memory of one stream is freed on another below.
        assert mistakes.none()
    return 30


def test_streams_may_change_between_calls(ranks):
    assert ranks(3).run(on_a_side_stream) == [30] * 3
