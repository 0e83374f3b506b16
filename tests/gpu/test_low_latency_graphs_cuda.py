"""Low-latency mode of backend ``cuda`` in CUDA graphs: rows, routing and weights change between replays."""

from __future__ import annotations

import functools

import pytest
import torch

from moe_ep_plugin import EpBuffer, LowLatencyCombineOutput, LowLatencyDispatchOutput
from tests import oracle

from .helpers import DEVICE, Mistakes, integers, kernel_tests, make_config, needs_cuda
from .test_streams_cuda import capture

pytestmark = [*kernel_tests, needs_cuda]

# The layers that are captured. Whole numbers, which FP8 with scales of powers of two holds too: all sums are exact.
TOKENS, WIDTH, TOPK, EXPERTS, ROUTINGS, REPLAYS = 40, 256, 4, 10, 41, 1000


@functools.cache
def routing(number: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_idx and topk_weights, on the CPU. Ids of the last tokens are -1, as if a rank had fewer of them."""
    seed = 1000 * number + 10 * rank
    idx = integers(seed, TOKENS, TOPK, low=-1, high=EXPERTS).long()
    idx[int(integers(seed + 1, 1, low=0, high=TOKENS + 1)) :] = -1
    return idx, integers(seed + 2, TOKENS, TOPK, low=1)


@functools.cache
def values(number: int, rank: int) -> torch.Tensor:
    return integers(1000 * number + 10 * rank + 3, TOKENS, WIDTH).bfloat16()


def multiple(expert: torch.Tensor) -> torch.Tensor:
    """What an expert multiplies its rows by."""
    return expert % 5 + 1


class Layer:
    """Dispatch, experts and combine with tensors that stay where they are, so that a graph can be made of it.

    Replay ``step`` has its own routing, weights and rows; nothing waits for the device in between.
    """

    def __init__(self, buffer: EpBuffer, wire: str, *, async_op: bool = False, seed: int = 0) -> None:
        self._buffer, self._wire, self._async_op, self._seed = buffer, wire, async_op, seed
        me = buffer.rank
        self._all_idx = torch.stack([routing(seed + n, me)[0] for n in range(ROUTINGS)]).to(DEVICE)
        self._all_weights = torch.stack([routing(seed + n, me)[1] for n in range(ROUTINGS)]).to(DEVICE)
        self._all_x = torch.stack([values(seed + n, me) for n in range(ROUTINGS)]).to(DEVICE)
        factors = torch.where(self._all_idx >= 0, multiple(self._all_idx) * self._all_weights, 0.0)
        self._all_factors = factors.sum(2)[:, :, None]
        self.x, self.idx, self.weights = (a[0].clone() for a in (self._all_x, self._all_idx, self._all_weights))
        experts = torch.tensor(buffer.placement.experts_of_rank[me], dtype=torch.int64, device=DEVICE)
        self.multiples = multiple(experts).view(-1, 1, 1)

    def numbers(self, step: int) -> tuple[int, int]:
        """Which rows and which routing a replay has."""
        return step % ROUTINGS, (7 * step + step // ROUTINGS) % ROUTINGS

    def load(self, step: int) -> None:
        rows, route = self.numbers(step)
        self.x.copy_(self._all_x[rows])
        self.idx.copy_(self._all_idx[route])
        self.weights.copy_(self._all_weights[route])

    def run(self, x: torch.Tensor | None = None) -> tuple[LowLatencyCombineOutput, LowLatencyDispatchOutput]:
        buffer = self._buffer
        source = self.x if x is None else x
        out = buffer.low_latency_dispatch(
            source,
            self.idx,
            wire=self._wire,  # type: ignore[arg-type]
            async_op=self._async_op,
        ).wait()
        received = out.x.float()
        if out.scale is not None:
            received = received.unflatten(-1, (-1, 128)).mul(out.scale[..., None]).flatten(-2)
        rows = buffer.empty_rows(out.handle).copy_(received * self.multiples)
        back = buffer.low_latency_combine(
            rows, self.idx, self.weights, out.handle, zero_copy=True, async_op=self._async_op
        ).wait()
        return back, out

    def expected(self, step: int, x: torch.Tensor | None = None) -> torch.Tensor:
        """The sums, which no row of another rank has a part in, computed on the device."""
        rows, route = self.numbers(step)
        source = self._all_x[rows] if x is None else x
        return (source.float() * self._all_factors[route]).bfloat16()

    def check_received(self, step: int, out: LowLatencyDispatchOutput) -> None:
        """Rows and counts against the oracle, with the inputs of all ranks."""
        buffer, (rows, route) = self._buffer, self.numbers(step)
        ids = [routing(self._seed + route, rank)[0].numpy() for rank in range(buffer.num_ranks)]
        x = [values(self._seed + rows, rank) for rank in range(buffer.num_ranks)]
        placed = oracle.placement(EXPERTS, buffer.num_ranks, None)
        groups = oracle.Routing(placed, buffer.num_ranks, ids).groups(buffer.rank)
        counts = [len(group) for group in groups]
        assert out.tokens_per_expert.tolist() == counts
        assert int(out.num_received) == sum(counts)
        got = out.x.float().cpu()
        if out.scale is not None:
            got = got.unflatten(-1, (-1, 128)).mul(out.scale.cpu()[..., None]).flatten(-2)
        for expert, group in enumerate(groups):
            for row, key in enumerate(group):
                assert key is not None
                assert torch.equal(got[expert, row], x[key[0]][key[1]].float()), (step, expert, row)


def make_buffer(wire: str = "bf16", **changes: object) -> EpBuffer:
    sizes = {"num_experts": EXPERTS, "num_topk": TOPK, "hidden": WIDTH, "low_latency_tokens_per_rank": TOKENS}
    options = {"dtype": torch.bfloat16, "wire": wire, "power_of_two_scales": True}
    return EpBuffer(None, make_config(**(sizes | options | changes)))


# Graphs


def captured_layer(wire: str, async_op: bool, replays: int) -> int:
    mistakes, compared = Mistakes(), 0
    with make_buffer(wire) as buffer:
        layer = Layer(buffer, wire, async_op=async_op)
        graph, (back, out) = capture(layer.run)
        for step in range(1, replays + 1):
            layer.load(step)
            graph.replay()
            mistakes.compare(back.x, layer.expected(step))
            mistakes.compare(back.lost_weights, torch.zeros_like(back.lost_weights))
            if step % 97 == 0:
                layer.check_received(step, out)
                compared += 1
        buffer.check()
        assert mistakes.none()
        assert back.x.any() or not layer.idx.ge(0).any(), "nothing was compared but zeros"
        assert buffer.masked_ranks() == ()
        # Calls outside of the graph go on where its replays have left off.
        del out
        for step in range(5):
            layer.load(step)
            mistakes.compare(layer.run()[0].x, layer.expected(step))
            layer.load(step + 1)
            graph.replay()
            mistakes.compare(back.x, layer.expected(step + 1))
        buffer.check()
        assert mistakes.none()
    return compared


@pytest.mark.parametrize(
    ("wire", "async_op", "replays"),
    [("bf16", False, REPLAYS), ("fp8", False, REPLAYS), ("bf16", True, 200), ("fp8", True, 200)],
)
def test_a_layer_is_captured_and_replayed(ranks, wire, async_op, replays):
    """Rows, routing, weights and how many tokens a rank has change between replays, which come back to back."""
    assert ranks(4).run(captured_layer, wire, async_op, replays) == [replays // 97] * 4


def captured_layers(wire: str, num_layers: int, replays: int) -> int:
    """Layers in a row in one graph, each with what the one before it returned."""
    mistakes = Mistakes()
    with make_buffer(wire) as buffer:
        layers = [Layer(buffer, wire, seed=100 * n) for n in range(num_layers)]

        def between(sums: torch.Tensor) -> torch.Tensor:
            """Whole numbers again that are small enough."""
            return (sums.float().remainder(9.0) - 4.0).bfloat16()

        def all_layers() -> tuple[torch.Tensor, ...]:
            x, sums = layers[0].x, []
            for layer in layers:
                # Results of a layer are dropped before the second one after it.
                sums.append(layer.run(x)[0].x)
                x = between(sums[-1])
            return tuple(sums)

        graph, sums = capture(all_layers)
        for step in range(1, replays + 1):
            x = None
            for layer in layers:
                layer.load(step)
            graph.replay()
            for layer, got in zip(layers, sums, strict=True):
                want = layer.expected(step, x)
                mistakes.compare(got, want)
                x = between(want)
        buffer.check()
        assert mistakes.none()
        assert any(bool(s.any()) for s in sums)
    return replays


@pytest.mark.parametrize(("wire", "num_layers"), [("bf16", 2), ("fp8", 2), ("bf16", 3)])
def test_layers_in_a_row_are_captured_and_replayed(ranks, wire, num_layers):
    """Three of them use one of the two buffers twice, and twice in a row from one replay to the next."""
    assert ranks(4).run(captured_layers, wire, num_layers, 200) == [200] * 4


def replayed_elsewhere(replays: int) -> int:
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-1)]
    mistakes = Mistakes()
    with make_buffer() as buffer:
        layer = Layer(buffer, "bf16")
        graph, (back, _out) = capture(layer.run)
        for step in range(1, replays + 1):
            layer.load(step)
            stream = streams[step % 3]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.replay()
            torch.cuda.current_stream().wait_stream(stream)
            mistakes.compare(back.x, layer.expected(step))
        buffer.check()
        assert mistakes.none()
    return replays


def test_replays_on_other_streams(ranks):
    assert ranks(3).run(replayed_elsewhere, 100) == [100] * 3


def between_large_kernels(wire: str, replays: int) -> int:
    """Products that want every SM right before and behind a layer, on as many SMs a rank as there may be."""
    mistakes = Mistakes()
    with make_buffer(wire, timeout_s=10.0) as buffer:
        layer = Layer(buffer, wire)
        a, b = (torch.ones(2048, 2048, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        product = torch.empty_like(a)

        def step_of_a_model() -> torch.Tensor:
            torch.mm(a, b, out=product)
            # Nothing but the products is between the operations.
            out = buffer.low_latency_dispatch(layer.x, layer.idx, wire=wire, async_op=False).wait()  # type: ignore[arg-type]
            torch.mm(a, b, out=product)
            rows = buffer.empty_rows(out.handle).fill_(1.0)
            torch.mm(a, b, out=product)
            return (
                buffer.low_latency_combine(rows, layer.idx, layer.weights, out.handle, zero_copy=True, async_op=False)
                .wait()
                .x
            )

        graph, got = capture(step_of_a_model)
        for step in range(1, replays + 1):
            layer.load(step)
            graph.replay()
            want = torch.where(layer.idx >= 0, layer.weights, 0.0).sum(1, keepdim=True)
            mistakes.compare(got, want.expand(-1, WIDTH).bfloat16())
        buffer.check()
        assert mistakes.none() and got.any()
    return replays


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_large_kernels_before_and_behind(ranks, wire):
    """A kernel that begins before the one ahead has ended must leave room for the other ranks' kernels."""
    assert ranks(8).run(between_large_kernels, wire, 100) == [100] * 8
