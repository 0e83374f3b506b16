"""Backend ``cuda`` in use: many operations, repeated runs, gradients, numbers of SMs, odd tensors and user errors."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import BackendUnavailable, ConfigError, DispatchHandle, EpBuffer, TokenDispatcher
from tests import oracle
from tests.cases import bits

from .helpers import (
    DEVICE,
    ON_GPU,
    PLACE,
    TWIN,
    Mistakes,
    integers,
    kernel_tests,
    layers_agree,
    make_config,
    needs_cuda,
    ranks_on_this_gpu,
    tokens,
    works,
)

pytestmark = kernel_tests

# Determinism


def repeats(count: int, layout: str, wire: str) -> int:
    """The same inputs again and again, other routings in between; returns how many runs were compared."""
    config = make_config(hidden=1024, num_topk=4, num_experts=16, max_tokens_per_rank=200, wire=wire)
    mistakes = Mistakes()
    with EpBuffer(None, config) as buffer:
        generator = torch.Generator().manual_seed(buffer.rank)
        x = torch.randn(200, 1024, generator=generator).to(DEVICE)
        idx = torch.randint(-1, 16, (200, 4), generator=generator).to(DEVICE)
        weights = torch.rand(200, 4, generator=generator).to(DEVICE)
        first: list[torch.Tensor] | None = None
        for run in range(count):
            out = buffer.dispatch(x, idx, weights, layout=layout)  # type: ignore[arg-type]
            # Sums of rows that have nothing in common with what any rank sent.
            rows = torch.sin(out.x.float() + 0.25)
            factors = out.topk_weights if layout == "expert" else None
            y = buffer.combine(rows, out.handle, topk_weights=factors)
            assert out.topk_weights is not None
            results = [t.clone() for t in (out.x, out.scale, out.topk_weights, y) if t is not None]
            first = results if first is None else first
            for got, want in zip(results, first, strict=True):
                mistakes.compare(bits(got), bits(want))
            if run % 5 == 0:
                buffer.dispatch(x[:run], idx[run : 2 * run], layout=layout)  # type: ignore[arg-type]
    assert mistakes.none()
    return count


@pytest.mark.parametrize(("layout", "wire"), [("expert", "bf16"), ("rank", "bf16"), ("expert", "fp8")])
def test_a_hundred_repeats_give_the_same_bits(ranks, layout, wire):
    assert ranks(4).run(repeats, 100, layout, wire) == [100] * 4


# Back to back

ROUTINGS, MOST, WIDTH, EXPERTS, TOPK = 61, 24, 32, 7, 3


@functools.cache
def prepared(routing: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and topk_idx of a rank, on the CPU."""
    seed = 10_000 + 100 * routing + rank
    num_tokens = int(integers(seed, 1, low=0, high=MOST + 1))
    x = integers(seed + 1, num_tokens, WIDTH).bfloat16()
    return x, integers(seed + 2, num_tokens, TOPK, low=-1, high=EXPERTS).long()


@functools.cache
def expected_sums(routing: int, rank: int, layout: str, num_ranks: int) -> torch.Tensor:
    """Every expert, or in layout "rank" every rank, returns its rows as they came."""
    x, idx = prepared(routing, rank)
    rank_of = torch.tensor(oracle.placement(EXPERTS, num_ranks, None) + [-1])
    if layout == "expert":
        return x * (idx >= 0).sum(1, keepdim=True)
    at = rank_of[idx]
    return x * sum((at == r).any(1, keepdim=True) for r in range(num_ranks))


def expected_rows(routing: int, me: int, layout: str, num_ranks: int) -> torch.Tensor:
    everyone = [prepared(routing, rank) for rank in range(num_ranks)]
    rank_of = oracle.placement(EXPERTS, num_ranks, None)
    keys = oracle.Routing(rank_of, num_ranks, [idx.numpy() for _, idx in everyone]).rows(me, layout, 1)
    return torch.stack([everyone[key[0]][0][key[1]] for key in keys if key] or [torch.zeros(WIDTH).bfloat16()])


def many_operations(pairs: int) -> int:
    """Dispatch and combine with a routing that changes every time; all sums are compared on the device.

    Exact sizes, fixed sizes, layout "rank" and reused handles take turns. Returns how many dispatches and sums were
    compared on the host.
    """
    config = make_config(
        num_experts=EXPERTS, num_topk=TOPK, hidden=WIDTH, dtype=torch.bfloat16, max_tokens_per_rank=MOST
    )
    mistakes, compared = Mistakes(), 0
    with EpBuffer(None, config) as buffer:
        me, num_ranks = buffer.rank, buffer.num_ranks
        inputs = [tuple(t.to(DEVICE) for t in prepared(routing, me)) for routing in range(ROUTINGS)]
        sums = {
            layout: [expected_sums(r, me, layout, num_ranks).to(DEVICE) for r in range(ROUTINGS)]
            for layout in ("expert", "rank")
        }
        bound = num_ranks * MOST * TOPK
        kept: tuple[int, DispatchHandle] | None = None
        for pair in range(pairs):
            routing = (37 * pair + pair // ROUTINGS) % ROUTINGS
            way = ("exact", "fixed", "rank", "reused")[pair % 4]
            layout = "rank" if way == "rank" else "expert"
            if way == "reused" and kept is not None:
                routing, handle = kept
                out = buffer.dispatch(inputs[routing][0], handle=handle)
            else:
                limit = bound if way == "fixed" else None
                out = buffer.dispatch(*inputs[routing], layout=layout, max_recv_tokens=limit)  # type: ignore[arg-type]
            if way == "exact":
                kept = routing, out.handle
            rows = buffer.empty_rows(out.handle).copy_(out.x) if pair % 3 else out.x
            y = buffer.combine(rows, out.handle)
            mistakes.compare(y, sums[layout][routing])
            if pair % 49 == 0:  # Not a multiple of the four ways, so that each has its turn.
                rows = expected_rows(routing, me, layout, num_ranks)[: len(out.x)]
                assert torch.equal(out.x[: len(rows)].cpu(), rows), (pair, way)
                assert not out.x[len(rows) :].any(), (pair, way)
                assert torch.equal(y.cpu(), expected_sums(routing, me, layout, num_ranks)), (pair, way)
                compared += 1
        buffer.check()
        assert buffer.stats.operations == 2 * pairs
        assert mistakes.none()
    return compared


def test_ten_thousand_operations(ranks):
    pairs = 5000 if ON_GPU else 300
    assert ranks(4).run(many_operations, pairs) == [(pairs - 1) // 49 + 1] * 4


# Autograd


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_gradients_have_the_bits_of_the_twin(ranks, num_ranks, wire):
    assert ranks(num_ranks).run(layers_agree, (TWIN, PLACE), wire, 4) == [24] * num_ranks


def adjoint(layout: str) -> None:
    """<dispatch(x), y> = <x, combine(y)>, for the buffer and for the backwards that autograd takes."""
    with EpBuffer(None, make_config(expert_alignment=4)) as buffer:
        dispatcher = TokenDispatcher(buffer)
        for seed in range(5):
            x, idx = tokens(buffer.rank, 40 - 7 * seed)
            x.requires_grad_()
            out = dispatcher.dispatch(x, idx, layout=layout)  # type: ignore[arg-type]
            y = integers(seed * 31 + buffer.rank, *out.x.shape).to(DEVICE).requires_grad_()
            back = dispatcher.combine(y, out.handle)
            sides = torch.stack([(out.x * y).sum(), (x * back).sum()]).detach().cpu()
            dist.all_reduce(sides)
            assert sides[0] == sides[1] != 0
            from_dispatch = torch.autograd.grad(out.x, x, y.detach())[0]
            from_combine = torch.autograd.grad(back, y, x.detach())[0]
            assert torch.equal(from_dispatch, back)
            assert torch.equal(from_combine, out.x)


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_combine_is_the_adjoint_of_dispatch(ranks, layout):
    ranks(4).run(adjoint, layout)


# SMs


def with_sms(num_sms: int | None, in_config: bool, layout: str, wire: str) -> list[torch.Tensor]:
    config = make_config(hidden=512, num_topk=4, wire=wire, num_sms=num_sms if in_config else None)
    per_call = None if in_config else num_sms
    with EpBuffer(None, config) as buffer:
        generator = torch.Generator().manual_seed(buffer.rank)
        x = torch.randn(150 + buffer.rank, 512, generator=generator).to(DEVICE)
        idx = torch.randint(-1, 8, (len(x), 4), generator=generator).to(DEVICE)
        out = buffer.dispatch(x, idx, layout=layout, num_sms=per_call)  # type: ignore[arg-type]
        y = buffer.combine(torch.sin(out.x.float()), out.handle, num_sms=per_call)
        return [t.cpu().clone() for t in (out.x.view(torch.uint8), y)]


def all_numbers_of_sms(layout: str, wire: str) -> int:
    default = with_sms(None, False, layout, wire)
    for num_sms, in_config in itertools.product((1, 3, 16), (False, True)):
        for got, want in zip(with_sms(num_sms, in_config, layout, wire), default, strict=True):
            assert torch.equal(got, want), (num_sms, in_config)
    return 6


@pytest.mark.parametrize(("layout", "wire"), [("expert", "bf16"), ("rank", "fp8")])
def test_any_number_of_sms_gives_the_same_bits(ranks, layout, wire):
    assert ranks(4).run(all_numbers_of_sms, layout, wire) == [6] * 4


def more_sms_than_there_are() -> None:
    sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    most = sms // ranks_on_this_gpu(dist.get_world_size())
    with EpBuffer(None, make_config()) as buffer:
        x, idx = tokens(buffer.rank)
        handle = buffer.dispatch(x, idx, num_sms=most).handle
        for too_many in (most + 1, 100_000):
            with pytest.raises(ConfigError, match=f"num_sms.*{too_many}"):
                buffer.dispatch(x, idx, num_sms=too_many)
            with pytest.raises(ConfigError, match=f"num_sms.*{too_many}"):
                buffer.combine(torch.zeros(handle.num_rows, 64, device=DEVICE), handle, num_sms=too_many)
        assert works(buffer)
    with pytest.raises(ConfigError, match="num_sms"), EpBuffer(None, make_config(num_sms=most + 1)) as buffer:
        works(buffer)


@needs_cuda
def test_more_sms_than_the_gpu_has_are_refused(ranks):
    ranks(4).run(more_sms_than_there_are)


# Arguments


def bad_ids(odd_rank: int) -> None:
    """One rank's bad id is told on every rank; the next call goes on."""
    with EpBuffer(None, make_config()) as buffer:
        for bad, limit in itertools.product((77, -2, 1 << 40), (None, 500)):
            x, idx = tokens(buffer.rank)
            if buffer.rank == odd_rank:
                idx[3, 1] = bad
            with pytest.raises(ConfigError, match=rf"topk_idx\[3, 1\] is {bad}\b") as caught:
                buffer.dispatch(x, idx, max_recv_tokens=limit)
                buffer.check()
            assert f"rank {odd_rank}" in str(caught.value)
            assert works(buffer)


@needs_cuda
@pytest.mark.parametrize("odd_rank", [0, 2])
def test_bad_ids_are_refused_on_all_ranks(ranks, odd_rank):
    ranks(3).run(bad_ids, odd_rank)


def elsewhere() -> None:
    """Tensors on another device are refused before anything is sent."""
    with EpBuffer(None, make_config()) as buffer:
        x, idx = tokens(buffer.rank)
        handle = buffer.dispatch(x, idx).handle
        rows = torch.zeros(handle.num_rows, 64)
        calls = {
            "x": lambda: buffer.dispatch(x.cpu(), idx),
            "topk_idx": lambda: buffer.dispatch(x, idx.cpu()),
            "topk_weights": lambda: buffer.dispatch(x, idx, torch.ones(32, 2)),
            "rows": lambda: buffer.combine(rows, handle),
        }
        for name, call in calls.items():
            with pytest.raises(ConfigError, match=rf"^{name}\.device is cpu"):
                call()
        assert works(buffer)
    with pytest.raises(BackendUnavailable, match="cuda"):
        EpBuffer(None, make_config(device="cpu"))


@needs_cuda
def test_tensors_on_the_wrong_device_are_refused(ranks):
    ranks(2).run(elsewhere)


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same values one element into a storage, where no vector of 16 bytes begins."""
    storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return storage[1:].view(t.shape).copy_(t)


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values as every second column of a wider tensor."""
    wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
    return wide[..., ::2].copy_(t)


def odd_tensors() -> int:
    checked = 0
    for dtype, odd in itertools.product((torch.float32, torch.bfloat16), (shifted, strided)):
        with EpBuffer(None, make_config(dtype=dtype)) as buffer:
            x, idx = tokens(buffer.rank)
            x, weights = x.to(dtype), torch.full(idx.shape, 0.5, device=DEVICE)
            for layout in ("expert", "rank"):
                plain = buffer.dispatch(x, idx, weights, layout=layout)  # type: ignore[arg-type]
                out = buffer.dispatch(odd(x), odd(idx), odd(weights), layout=layout)  # type: ignore[arg-type]
                assert torch.equal(out.x, plain.x)
                assert plain.topk_weights is not None and torch.equal(out.topk_weights, plain.topk_weights)
                factors = plain.topk_weights if layout == "expert" else None
                want = buffer.combine(plain.x, plain.handle, topk_weights=factors)
                y = buffer.combine(odd(plain.x), out.handle, topk_weights=None if factors is None else odd(factors))
                assert torch.equal(y, want)
                assert layout == "rank" or torch.equal(y, x)
                checked += 1
            q, scale = x.to(torch.float8_e4m3fn), torch.ones(len(x), 1, device=DEVICE)
            out = buffer.dispatch((odd(q), odd(scale)), idx)
            plain = buffer.dispatch((q, scale), idx)
            assert torch.equal(bits(out.x), bits(plain.x))
            assert torch.equal(out.x.float(), buffer.dispatch(x, idx).x.float())
    return checked


def test_tensors_that_are_shifted_or_strided(ranks):
    assert ranks(2).run(odd_tensors) == [8] * 2
