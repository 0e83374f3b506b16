"""TokenDispatcher: autograd through dispatch and combine equals a dense model, exactly.

All values are small integers, so every sum is exact in every dtype and results are compared with torch.equal.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import ConfigError, DispatchOutput, EpBuffer, EpConfig, TokenDispatcher
from moe_ep_plugin.wire import dequantize_blocks, quantize_blocks

from . import oracle

E, K, H, T = 7, 3, 136, 11


def config_of(backend: str, dtype: torch.dtype = torch.float32, **changes: object) -> EpConfig:
    settings = {"num_experts": E, "num_topk": K, "hidden": H, "max_tokens_per_rank": T, "dtype": dtype}
    return EpConfig(**settings | {"backend": backend, "device": "cpu", "timeout_s": 20} | changes)


def integers(seed: int, *shape: int, low: int = -2, high: int = 3) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def rank_inputs(seed: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, topk_idx (repeats and -1 included) and weights of a rank; token counts differ, the last rank has none."""
    num_tokens = 0 if rank and rank == dist.get_world_size() - 1 else T - rank
    base = 1000 * seed + 10 * rank
    idx = integers(base + 1, num_tokens, K, low=-1, high=E).long()
    x, weights = integers(base + 2, num_tokens, H).to(dtype), integers(base + 3, num_tokens, K)
    return x.requires_grad_(), idx, weights.requires_grad_()


def expert_factors() -> torch.Tensor:
    """Expert e multiplies a row elementwise by row e of this."""
    return integers(5, E, H, low=1)


def local_factors(buffer: EpBuffer) -> torch.Tensor:
    rank_of = oracle.placement(E, buffer.num_ranks, None)
    return expert_factors()[[e for e in range(E) if rank_of[e] == buffer.rank]]


def dense(x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The layer on one process: y[t] = sum over k of weight * expert(x[t])."""
    factors = torch.cat([expert_factors(), torch.zeros(1, H)])[idx]
    return (x.float()[:, None] * factors * weights[:, :, None]).sum(1).to(x.dtype)


def experts(out: DispatchOutput, factors: torch.Tensor) -> torch.Tensor:
    """Apply local experts to rows of layout "expert"; padding rows past the groups stay as they are."""
    per_row = factors.repeat_interleave(out.tokens_per_expert, dim=0)
    padding = torch.zeros(len(out.x) - len(per_row), H)
    return (out.x.float() * torch.cat([per_row, padding])).to(out.x.dtype)


def run_layer(
    dispatcher: TokenDispatcher,
    x: torch.Tensor,
    idx: torch.Tensor,
    weights: torch.Tensor,
    how: str,
    max_recv_tokens: int | None = None,
) -> torch.Tensor:
    factors = local_factors(dispatcher.buffer)
    if how == "rank":
        out = dispatcher.dispatch(x, idx, weights, layout="rank", max_recv_tokens=max_recv_tokens)
        factors = torch.cat([factors, torch.zeros(1, H)])
        scaled = factors[out.topk_idx] * out.topk_weights[:, :, None]
        return dispatcher.combine((out.x.float() * scaled.sum(1)).to(x.dtype), out.handle)
    out = dispatcher.dispatch(x, idx, weights, max_recv_tokens=max_recv_tokens)
    rows = experts(out, factors)
    if how == "weights_in_combine":
        return dispatcher.combine(rows, out.handle, topk_weights=out.topk_weights)
    return dispatcher.combine((rows.float() * out.topk_weights[:, None]).to(x.dtype), out.handle)


HOW = pytest.mark.parametrize("how", ["weights_in_combine", "weights_on_rows", "rank"])


def gradients(backend: str, how: str, dtype: torch.dtype, alignment: int, fixed: bool) -> None:
    with EpBuffer(None, config_of(backend, dtype, expert_alignment=alignment)) as buffer:
        dispatcher = TokenDispatcher(buffer)
        for seed in range(3):
            x, idx, weights = rank_inputs(seed, buffer.rank, dtype)
            limit = buffer.num_ranks * T * K + alignment * E if fixed else None
            y = run_layer(dispatcher, x, idx, weights, how, limit)
            grad = integers(seed + 77, *y.shape).to(dtype)
            y.backward(grad)
            x2, w2 = (t.detach().clone().requires_grad_() for t in (x, weights))
            want = dense(x2, idx, w2)
            want.backward(grad)
            assert torch.equal(y, want)
            assert torch.equal(x.grad, x2.grad)
            assert torch.equal(weights.grad, w2.grad)
            assert not weights.grad[idx < 0].any()


@HOW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_equal_a_dense_layer(ranks, backend, how, dtype):
    ranks(3).run(gradients, backend, how, dtype, 1, False)


@HOW
@pytest.mark.parametrize(("num_ranks", "alignment", "fixed"), [(1, 4, False), (2, 16, True), (5, 1, True)])
def test_gradients_with_padding_and_fixed_sizes(ranks, backend, how, num_ranks, alignment, fixed):
    ranks(num_ranks).run(gradients, backend, how, torch.float32, alignment, fixed)


def adjoint(backend: str, layout: str) -> None:
    with EpBuffer(None, config_of(backend, expert_alignment=4)) as buffer:
        for seed in range(5):
            x, idx, _ = rank_inputs(seed, buffer.rank, torch.float32)
            out = buffer.dispatch(x, idx, layout=layout)
            y = integers(seed * 31 + buffer.rank, *out.x.shape)
            sides = torch.stack([(out.x * y).sum(), (x.detach() * buffer.combine(y, out.handle)).sum()])
            dist.all_reduce(sides)
            assert sides[0] == sides[1]
            assert sides[0] != 0


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_combine_is_the_adjoint_of_dispatch(ranks, backend, layout):
    ranks(4).run(adjoint, backend, layout)


def straight_through(backend: str, layout: str, power_of_two: bool) -> None:
    config = config_of(backend, wire="fp8", power_of_two_scales=power_of_two)
    with EpBuffer(None, config) as buffer:
        dispatcher = TokenDispatcher(buffer)
        x, idx, weights = rank_inputs(1, buffer.rank, torch.float32)
        x = (x.detach() * 1.37).requires_grad_()
        out = dispatcher.dispatch(x, idx, weights, layout=layout)
        assert out.scale is None
        assert out.x.dtype == x.dtype
        plain = buffer.dispatch(
            dequantize_blocks(*quantize_blocks(x.detach(), power_of_two), x.dtype), idx, layout=layout, wire="bf16"
        )
        assert torch.equal(out.x, plain.x)
        # As if nothing had been quantised: gradients cross unquantised too.
        grad = integers(9 + buffer.rank, *out.x.shape) * 1.37
        out.x.backward(grad)
        assert torch.equal(x.grad, buffer.combine(grad, plain.handle))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_fp8_gradient_is_straight_through(ranks, backend, layout, power_of_two):
    ranks(3).run(straight_through, backend, layout, power_of_two)


def used_twice(backend: str) -> None:
    """One dispatch feeds two combines, a handle is reused for a second input, and backwards run interleaved."""
    with EpBuffer(None, config_of(backend)) as buffer:
        dispatcher = TokenDispatcher(buffer)
        factors = local_factors(buffer)
        x, idx, weights = rank_inputs(2, buffer.rank, torch.float32)
        second = integers(404 + buffer.rank, *x.shape).requires_grad_()
        out = dispatcher.dispatch(x, idx, weights)
        again = dispatcher.dispatch(second, handle=out.handle)
        assert again.topk_weights is None
        rows = experts(out, factors)
        y = dispatcher.combine(rows, out.handle, topk_weights=out.topk_weights)
        y = y + dispatcher.combine(rows * 2, out.handle)
        y = y + dispatcher.combine(experts(again, factors), again.handle, topk_weights=out.topk_weights)
        grad = integers(505 + buffer.rank, *y.shape)
        y.backward(grad)

        ones = (idx >= 0).float()
        dense_x, dense_second, dense_w = (t.detach().clone().requires_grad_() for t in (x, second, weights))
        want = dense(dense_x, idx, dense_w) + 2 * dense(dense_x, idx, ones) + dense(dense_second, idx, dense_w)
        want.backward(grad)
        assert torch.equal(y, want)
        assert torch.equal(x.grad, dense_x.grad)
        assert torch.equal(second.grad, dense_second.grad)
        assert torch.equal(weights.grad, dense_w.grad)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_handle_reuse_and_double_use(ranks, backend, num_ranks):
    ranks(num_ranks).run(used_twice, backend)


def partly_needed(backend: str) -> None:
    with EpBuffer(None, config_of(backend)) as buffer:
        dispatcher = TokenDispatcher(buffer)
        for x_needs, w_needs in itertools.product((True, False), repeat=2):
            x, idx, weights = rank_inputs(3, buffer.rank, torch.float32)
            y = run_layer(
                dispatcher,
                x.detach().requires_grad_(x_needs),
                idx,
                weights.detach().requires_grad_(w_needs),
                "weights_in_combine",
            )
            assert y.requires_grad == (x_needs or w_needs)
            if y.requires_grad:
                y.sum().backward()
            assert torch.equal(y, dense(x, idx, weights))
        with torch.no_grad():
            assert not run_layer(dispatcher, x, idx, weights, "rank").requires_grad


def test_only_what_needs_a_gradient(ranks, backend):
    ranks(2).run(partly_needed, backend)


def recompute(backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    with EpBuffer(None, config_of(backend)) as buffer:
        dispatcher = TokenDispatcher(buffer)
        x, idx, weights = rank_inputs(4, buffer.rank, torch.float32)
        y = checkpoint(
            lambda a, w: run_layer(dispatcher, a, idx, w, "weights_in_combine"), x, weights, use_reentrant=False
        )
        y.sum().backward()
        x2, w2 = (t.detach().clone().requires_grad_() for t in (x, weights))
        dense(x2, idx, w2).sum().backward()
        assert torch.equal(x.grad, x2.grad)
        assert torch.equal(weights.grad, w2.grad)


def test_under_activation_checkpointing(ranks, backend):
    ranks(2).run(recompute, backend)


def leased_output(backend: str) -> None:
    """The experts write into empty_rows; what autograd saved of it must not change under it."""
    with EpBuffer(None, config_of(backend)) as buffer:
        dispatcher = TokenDispatcher(buffer)
        x, idx, weights = rank_inputs(6, buffer.rank, torch.float32)
        results = []
        for _ in range(4):
            out = dispatcher.dispatch(x, idx, weights)
            rows = dispatcher.empty_rows(out.handle)
            assert (rows.shape, rows.dtype) == (out.x.shape, torch.float32)
            with torch.no_grad():
                rows.copy_(experts(out, local_factors(buffer)))
            results.append(dispatcher.combine(rows.requires_grad_(), out.handle, topk_weights=out.topk_weights))
        for y in results:
            assert torch.equal(y, dense(x, idx, weights))
        sum(results).sum().backward()
        w2 = weights.detach().clone().requires_grad_()
        (4 * dense(x.detach(), idx, w2).sum()).backward()
        assert torch.equal(weights.grad, w2.grad)


def test_experts_may_write_into_leased_rows(ranks, backend):
    ranks(3).run(leased_output, backend)


def fp8_gradients(backend: str, how: str) -> None:
    """Gradients cross quantised: exactly what the wire makes of them, on any wire of the forward."""
    for wire in ("bf16", "fp8"):
        with EpBuffer(None, config_of(backend, wire=wire)) as buffer:
            x, idx, weights = rank_inputs(4, buffer.rank, torch.float32)
            grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(buffer.rank))
            found = []
            for grad_wire, value in (("fp8", grad), ("bf16", through_the_wire(grad))):
                dispatcher = TokenDispatcher(buffer, grad_wire=grad_wire)
                inputs = [t.detach().clone().requires_grad_() for t in (x, weights)]
                run_layer(dispatcher, inputs[0], idx, inputs[1], how, None).backward(value)
                found.append([t.grad for t in inputs])
            for quantised, given in zip(*found, strict=True):
                assert torch.equal(quantised, given)


def through_the_wire(x: torch.Tensor) -> torch.Tensor:
    """What arrives of rows that cross in FP8."""
    return dequantize_blocks(*quantize_blocks(x), x.dtype)


@HOW
def test_gradients_may_cross_in_fp8(ranks, backend, how):
    ranks(3).run(fp8_gradients, backend, how)


def test_an_unknown_wire_of_gradients_is_refused():
    with pytest.raises(ConfigError, match="grad_wire.*'fp16'"):
        TokenDispatcher(None, grad_wire="fp16")
