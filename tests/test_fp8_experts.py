"""Fp8GroupedExperts against dense references: values, gradients, uneven and empty experts, delayed gradients."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import (
    ConfigError,
    EpBuffer,
    EpConfig,
    Fp8GroupedExperts,
    Fp8Recipe,
    Fp8Rows,
    StateError,
    TokenDispatcher,
    _te,
    fp8_experts,
)
from moe_ep_plugin.fp8 import quantize_rows, quantize_tiles
from moe_ep_plugin.fp8_experts import Fp8GroupedLinear
from moe_ep_plugin.wire import dequantize_blocks, quantize_blocks

from . import oracle
from .test_dispatcher import E, T, config_of, integers

H, F = 264, 136
COUNTS = [5, 0, 131, 1]
NUM_ROWS = sum(COUNTS) + 3
RECIPES = {
    "defaults": Fp8Recipe(),
    "fp32 scales": Fp8Recipe(power_of_two_scales=False),
    # With power-of-two scales the blocks of a weight hardly matter: e4m3 rounds alike under either.
    "1x128 weights": Fp8Recipe(weight_block="1x128", power_of_two_scales=False),
    "fp8 gradients": Fp8Recipe(gradients="fp8"),
}


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_experts(recipe: Fp8Recipe | None = None, dtype: torch.dtype = torch.float32) -> Fp8GroupedExperts:
    torch.manual_seed(3)
    return Fp8GroupedExperts(len(COUNTS), H, F, recipe=recipe, dtype=dtype)


def dispatched(x: torch.Tensor) -> Fp8Rows:
    """Rows as :meth:`TokenDispatcher.dispatch_fp8` hands them out: fp32 scales, a stand-in for the gradient."""
    stand_in = torch.full((1, 1), torch.nan, dtype=x.dtype).expand(x.shape).requires_grad_()
    return Fp8Rows(*quantize_blocks(x), grad_rows=stand_in)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


class _PassGradient(torch.autograd.Function):
    """Other values, the same gradient."""

    @staticmethod
    def forward(ctx, x, values):
        return values

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _RoundGradient(torch.autograd.Function):
    """x @ weight^T with the backward of FP8 gradients written out from wire functions."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        by_row = dequantize_blocks(*quantize_blocks(grad, True), torch.float32)
        by_column = dequantize_blocks(*quantize_blocks(grad.t().contiguous(), True), torch.float32)
        x_by_column = dequantize_blocks(*quantize_blocks(x.t().contiguous(), True), torch.float32)
        return by_row @ weight, by_column @ x_by_column.t()


def dequantized_experts(experts: Fp8GroupedExperts, x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """The same computation on dequantised values, one expert at a time, through autograd (fp32).

    ``x`` holds the values of the dispatched rows.
    """
    recipe = experts.recipe
    weight_blocks = quantize_tiles if recipe.weight_block == "128x128" else quantize_rows

    def quantized(values, quantize, power_of_two=recipe.power_of_two_scales):
        return _PassGradient.apply(values, quantize(values, power_of_two=power_of_two).dequantize(values.dtype))

    def linear(values, weight):
        return _RoundGradient.apply(values, weight) if recipe.gradients == "fp8" else values @ weight.t()

    out, start = [], 0
    for expert, count in enumerate(COUNTS):
        part, p = x[start : start + count], probs[start : start + count]
        gate, up = linear(part, quantized(experts.linear_fc1.weight(expert), weight_blocks)).chunk(2, -1)
        act = torch.nn.functional.silu(gate) * up * p[:, None]
        out.append(linear(quantized(act, quantize_rows), quantized(experts.linear_fc2.weight(expert), weight_blocks)))
        start += count
    return torch.cat([*out, x.new_zeros(NUM_ROWS - start, H)])


@pytest.mark.parametrize("name", RECIPES)
def test_values_and_gradients_are_those_of_the_dequantised_computation(name):
    """In fp32, where nothing is rounded but to FP8: equal up to the order of sums."""
    experts = make_experts(RECIPES[name])
    rows = dispatched(randn(1, NUM_ROWS, H))
    probs = randn(2, NUM_ROWS).abs().requires_grad_()
    upstream = randn(4, NUM_ROWS, H)

    out = experts(rows, torch.tensor(COUNTS), probs)
    out.backward(upstream)
    got = [rows.grad_rows.grad, probs.grad, *(w.grad for w in experts.parameters())]

    x = rows.dequantize(torch.float32).requires_grad_()
    dense_probs = probs.detach().clone().requires_grad_()
    reference = make_experts(RECIPES[name])
    expected_out = dequantized_experts(reference, x, dense_probs)
    expected_out.backward(upstream)
    expected = [x.grad, dense_probs.grad, *(w.grad for w in reference.parameters())]

    # A sum in another order may move a value across a rounding boundary of the second quantisation, by one e4m3 step
    # of one element in 136: far below the format's own error of 4 %, far above fp32's.
    assert relative_error(out, expected_out) < 1e-3
    for have, want in zip(got, expected, strict=True):
        assert have.shape == want.shape
        if want.abs().max() > 0:
            assert relative_error(have, want) < 1e-3
        else:
            assert (have == 0).all()


def test_forward_takes_the_rows_as_they_came():
    """Rows that no quantisation of their values would give: kept exactly."""
    layer = Fp8GroupedLinear(1, 128, 128, recipe=Fp8Recipe(power_of_two_scales=False), dtype=torch.float32)
    with torch.no_grad():
        layer.weight0.copy_(448 * torch.eye(128))
    data = torch.full((4, 128), 3.0).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0], [0.3], [1e-30], [7e20]])
    out = layer(Fp8Rows(data, scale), [4])
    assert torch.equal(out, (3.0 * scale * 448).expand(4, 128))


def test_one_linear_layer_errs_as_the_format_implies():
    """Relative error about 0.037, measured against fp64.

    e4m3 keeps three bits after the leading one. Rounding is uniform within half a step of 2^-3, so its root mean
    square is 2^-3 / sqrt(12) = 0.036 of the power of two below the value. The values of one binade have a root mean
    square of about 1.53 of it: 0.024, and a little more with the values near zero, where steps no longer shrink.
    Both operands of a product are rounded, independently: 0.026 * sqrt(2) = 0.037, and sums of products keep it.
    """
    torch.manual_seed(9)
    for name in ("defaults", "fp32 scales", "1x128 weights"):
        layer = Fp8GroupedLinear(1, 512, 256, recipe=RECIPES[name], dtype=torch.bfloat16)
        x = randn(5, 300, 512, dtype=torch.bfloat16)
        got = layer(Fp8Rows(*quantize_blocks(x)), [300])
        error = relative_error(got, x.double() @ layer.weight0.double().t())
        print(f"{name}: one layer {error:.4f}")
        assert 0.033 < error < 0.040


def dense_experts(
    experts: Fp8GroupedExperts, x: torch.Tensor, probs: torch.Tensor, counts: list[int] = COUNTS
) -> torch.Tensor:
    """No FP8 anywhere, in the dtype of ``x``."""
    out, start = [], 0
    for expert, count in enumerate(counts):
        part, p = x[start : start + count], probs[start : start + count]
        gate, up = (part @ experts.linear_fc1.weight(expert).to(x.dtype).t()).chunk(2, -1)
        act = torch.nn.functional.silu(gate) * up * p[:, None].to(x.dtype)
        out.append(act @ experts.linear_fc2.weight(expert).to(x.dtype).t())
        start += count
    return torch.cat([*out, x.new_zeros(x.shape[0] - start, x.shape[1])])


@pytest.mark.parametrize("name", RECIPES)
def test_experts_err_as_the_format_implies(name):
    """Against fp64: output within 0.075, gradients within 0.09; and no better than FP8 can be.

    Gate and up each err by 0.037 (one linear layer). Their product errs by sqrt(2) times that, 0.052; rounding the
    activation and the second weight adds 0.026 each: sqrt(0.052^2 + 2 * 0.026^2) = 0.064.
    """
    experts = make_experts(RECIPES[name], torch.bfloat16)
    with torch.no_grad():
        # Gate and up of order one, as in a trained model: SwiGLU is then far from linear.
        for weight in experts.linear_fc1.parameters():
            weight.mul_(3)
    x = randn(6, NUM_ROWS, H, dtype=torch.bfloat16)
    rows, probs = dispatched(x), randn(7, NUM_ROWS).abs().requires_grad_()
    upstream = randn(8, NUM_ROWS, H, dtype=torch.bfloat16)
    out = experts(rows, COUNTS, probs)
    out.backward(upstream)

    wide = x.double().requires_grad_()
    dense_probs = probs.detach().clone().requires_grad_()
    reference = copy.deepcopy(experts).double()
    reference.zero_grad()
    expected = dense_experts(reference, wide, dense_probs)
    expected.backward(upstream.double())

    errors = {"output": relative_error(out, expected), "rows": relative_error(rows.grad_rows.grad, wide.grad)}
    errors["gate values"] = relative_error(probs.grad, dense_probs.grad)
    for (label, have), want in zip(experts.named_parameters(), reference.parameters(), strict=True):
        if want.grad.abs().max() > 0:
            errors[label] = relative_error(have.grad, want.grad)
        else:
            assert (have.grad == 0).all()
    print(name, {label: round(error, 4) for label, error in errors.items()})
    assert out.dtype == rows.grad_rows.grad.dtype == torch.bfloat16
    assert 0.04 < errors.pop("output") < 0.075
    assert all(0.04 < error < 0.09 for error in errors.values())


def step(experts: Fp8GroupedExperts, seed: int, counts: list[int] = COUNTS) -> list[torch.Tensor]:
    """One forward and backward; returns the output and the gradients of rows and gate values."""
    num_rows = sum(counts) + 3
    dtype = experts.linear_fc1.weight0.dtype
    rows, probs = dispatched(randn(seed, num_rows, H, dtype=dtype)), randn(seed + 1, num_rows).requires_grad_()
    out = experts(rows, counts, probs)
    out.backward(randn(seed + 2, num_rows, H, dtype=dtype))
    return [out, rows.grad_rows.grad, probs.grad]


def test_rows_past_the_counts_and_experts_without_rows():
    experts = make_experts()
    out, grad_rows, grad_probs = step(experts, 20)
    assert (out[-3:] == 0).all()
    assert (grad_rows[-3:] == 0).all()
    assert (grad_probs[-3:] == 0).all()
    for layer in (experts.linear_fc1, experts.linear_fc2):
        assert (layer.weight1.grad == 0).all()
        assert layer.weight3.grad.abs().sum() > 0


@pytest.mark.parametrize("past", [0, 3])
def test_no_rows_at_all(past):
    """Gradients are zero, not missing: data-parallel reductions wait for every parameter."""
    experts = make_experts()
    rows, probs = dispatched(randn(21, past, H)), randn(22, past).requires_grad_()
    out = experts(rows, [0] * len(COUNTS), probs)
    assert out.shape == (past, H)
    out.sum().backward()
    assert all((weight.grad == 0).all() for weight in experts.parameters())
    assert rows.grad_rows.grad.shape == (past, H)
    assert (probs.grad == 0).all()


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_bits_on_every_run(name):
    runs = []
    for _ in range(2):
        experts = make_experts(RECIPES[name], torch.bfloat16)
        runs.append([*step(experts, 30), *(weight.grad for weight in experts.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradients_have_the_dtype_of_what_they_belong_to():
    experts = make_experts(dtype=torch.bfloat16)
    rows, probs = dispatched(randn(35, NUM_ROWS, H)), randn(36, NUM_ROWS).requires_grad_()
    out = experts(rows, COUNTS, probs)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert rows.grad_rows.grad.dtype == probs.grad.dtype == torch.float32
    assert {weight.grad.dtype for weight in experts.parameters()} == {torch.bfloat16}
    same = dispatched(randn(35, NUM_ROWS, H).bfloat16())
    assert experts(same, COUNTS).dtype == torch.bfloat16


def test_an_expert_does_not_depend_on_the_others():
    """The rows and weights of other experts change nothing, NaN included."""
    experts = make_experts()
    clean, *_ = step(experts, 40)
    with torch.no_grad():
        experts.linear_fc1.weight2.fill_(torch.nan)
    out, *_ = step(experts, 40)
    first, last = slice(0, COUNTS[0]), slice(sum(COUNTS[:3]), None)
    assert torch.isnan(out[COUNTS[0] : sum(COUNTS[:3])]).all()
    assert torch.equal(out[first], clean[first])
    assert torch.equal(out[last], clean[last])


def test_a_bad_row_stays_alone():
    experts = make_experts()
    x = randn(41, NUM_ROWS, H)
    clean = experts(dispatched(x), COUNTS)
    x[7, 3] = torch.inf
    out = experts(dispatched(x), COUNTS)
    others = [row for row in range(NUM_ROWS) if row != 7]
    assert torch.isnan(out[7]).all()
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("name", ["defaults", "fp8 gradients"])
def test_delayed_weight_gradients_are_equal(name):
    """Two steps are accumulated, backward_dw once for each; it may also come after both."""
    at_once = make_experts(RECIPES[name], torch.bfloat16)
    want = [step(at_once, 50), step(at_once, 60)]
    for interleaved in (True, False):
        delayed = make_experts(replace(RECIPES[name], delay_weight_grad=True), torch.bfloat16)
        got = [step(delayed, 50)]
        assert all(weight.grad is None for weight in delayed.parameters())
        if interleaved:
            delayed.backward_dw()
        got.append(step(delayed, 60))
        for _ in range(1 if interleaved else 2):
            delayed.backward_dw()
        assert all(torch.equal(a, b) for g, w in zip(got, want, strict=True) for a, b in zip(g, w, strict=True))
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(at_once.parameters(), delayed.parameters(), strict=True))


def test_backward_dw_takes_the_oldest_backward():
    delayed, at_once = make_experts(Fp8Recipe(delay_weight_grad=True)), make_experts()
    step(at_once, 50)
    step(delayed, 50)
    step(delayed, 60)
    delayed.backward_dw()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(at_once.parameters(), delayed.parameters(), strict=True))


def test_backward_dw_has_nothing_to_do_unless_delayed():
    experts = make_experts()
    step(experts, 70)
    before = [weight.grad.clone() for weight in experts.parameters()]
    experts.backward_dw()
    assert all(torch.equal(weight.grad, old) for weight, old in zip(experts.parameters(), before, strict=True))


def test_backward_dw_without_a_backward():
    experts = make_experts(Fp8Recipe(delay_weight_grad=True))
    with pytest.raises(StateError, match="more often than backward"):
        experts.backward_dw()


def test_frozen_weights_get_no_gradient():
    for recipe in (Fp8Recipe(), Fp8Recipe(delay_weight_grad=True)):
        experts = make_experts(recipe)
        experts.linear_fc1.requires_grad_(False)
        experts.linear_fc2.weight0.requires_grad_(False)
        _, grad_rows, _ = step(experts, 80)
        experts.backward_dw()
        found = [name for name, weight in experts.named_parameters() if weight.grad is not None]
        assert found == ["linear_fc2.weight1", "linear_fc2.weight2", "linear_fc2.weight3"]
        assert grad_rows.abs().sum() > 0


def test_under_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    plain, recomputed = make_experts(), make_experts()
    step(plain, 90)
    rows, probs = dispatched(randn(90, NUM_ROWS, H)), randn(91, NUM_ROWS).requires_grad_()
    checkpoint(recomputed, rows, COUNTS, probs, use_reentrant=False).backward(randn(92, NUM_ROWS, H))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True))


def test_parameters_and_checkpoint_have_the_names_of_te_grouped_mlp():
    experts = make_experts(dtype=torch.bfloat16)
    state = experts.state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        **{f"linear_fc1.weight{e}": (2 * F, H) for e in range(4)},
        **{f"linear_fc2.weight{e}": (H, F) for e in range(4)},
        "linear_fc1._extra_state": (0,),
        "linear_fc2._extra_state": (0,),
    }
    other = Fp8GroupedExperts(4, H, F)
    # As a layer with another FP8 recipe leaves it.
    state["linear_fc1._extra_state"] = torch.arange(9, dtype=torch.uint8)
    other.load_state_dict(state)
    assert torch.equal(step(other, 95)[0], step(experts, 95)[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e, r: e(r, [1, 2, 3]), r"tokens_per_expert is \[1, 2, 3\], but there are 4 local experts"),
        (lambda e, r: e(r, [1, 2, 3, 200]), "there are 140 rows"),
        (lambda e, r: e(r, [1, -1, 3, 0]), "no count may be negative"),
        (lambda e, r: e(quantize_rows(torch.ones(2, 8)), [0] * 4), r"rows.data.shape is \[2, 8\].* in_features 264"),
        (lambda e, r: e(r, COUNTS, torch.ones(3)), r"probs.shape is \[3\].* 140 rows"),
        (lambda e, r: Fp8Recipe(weight_block="64x64"), "weight_block is '64x64'"),
        (lambda e, r: Fp8Recipe(gradients="bf16"), "gradients is 'bf16'"),
        (lambda e, r: Fp8GroupedExperts(0, H, F), "num_gemms is 0"),
        (lambda e, r: Fp8GroupedExperts(1, H, F, dtype=torch.float64), "dtype is torch.float64"),
    ],
)
def test_errors_name_argument_value_and_limit(call, words):
    with pytest.raises(ConfigError, match=words):
        call(make_experts(), dispatched(randn(1, NUM_ROWS, H)))


HIDDEN, FFN = 136, 72


def fill_by_id(experts: Fp8GroupedExperts, ids: list[int]) -> None:
    with torch.no_grad():
        for index, expert in enumerate(ids):
            experts.linear_fc1.weight(index).copy_(randn(1000 + expert, 2 * FFN, HIDDEN) * 0.2)
            experts.linear_fc2.weight(index).copy_(randn(2000 + expert, HIDDEN, FFN) * 0.2)


def one_process_layer(
    experts: Fp8GroupedExperts, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The MoE layer with all experts here and no dispatch: rows are picked by index."""
    token, k = (idx >= 0).nonzero(as_tuple=True)
    order = idx[token, k].argsort(stable=True)
    token, k = token[order], k[order]
    data, scale = quantize_blocks(x.detach())
    rows = Fp8Rows(data.view(torch.uint8)[token].view(data.dtype), scale[token], x[token])
    counts = idx[token, k].bincount(minlength=E)
    return torch.zeros_like(x).index_add(0, token, experts(rows, counts, weights[token, k]))


def whole_layer(backend: str, alignment: int, fixed: bool) -> None:
    with EpBuffer(None, config_of(backend, expert_alignment=alignment)) as buffer:
        dispatcher = TokenDispatcher(buffer)
        num_tokens = 0 if buffer.rank and buffer.rank == buffer.num_ranks - 1 else T - buffer.rank
        idx = integers(10 + buffer.rank, num_tokens, 3, low=-1, high=E).long()
        x, weights = randn(20 + buffer.rank, num_tokens, HIDDEN), randn(30 + buffer.rank, num_tokens, 3)
        grad = randn(40 + buffer.rank, num_tokens, HIDDEN)
        ids = [e for e, rank in enumerate(oracle.placement(E, buffer.num_ranks, None)) if rank == buffer.rank]
        here, everywhere = (Fp8GroupedExperts(n, HIDDEN, FFN, dtype=torch.float32) for n in (len(ids), E))
        fill_by_id(here, ids)
        fill_by_id(everywhere, list(range(E)))

        x1, w1 = x.clone().requires_grad_(), weights.clone().requires_grad_()
        limit = buffer.num_ranks * T * 3 + alignment * E if fixed else None
        out = dispatcher.dispatch_fp8(x1, idx, w1, max_recv_tokens=limit)
        assert torch.isnan(out.grad_rows).all()
        rows = Fp8Rows.from_dispatch(out)
        assert rows.data.data_ptr() == out.x.data_ptr()
        y = dispatcher.combine(here(rows, out.tokens_per_expert, out.topk_weights), out.handle)
        y.backward(grad)

        x2, w2 = x.clone().requires_grad_(), weights.clone().requires_grad_()
        want = one_process_layer(everywhere, x2, idx, w2)
        want.backward(grad)
        pairs = [(y, want), (x1.grad, x2.grad), (w1.grad, w2.grad)]
        for layer, dense in ((here.linear_fc1, everywhere.linear_fc1), (here.linear_fc2, everywhere.linear_fc2)):
            for expert in range(E):
                dist.all_reduce(dense.weight(expert).grad)
            pairs += [(layer.weight(i).grad, dense.weight(expert).grad) for i, expert in enumerate(ids)]
        for have, expected in pairs:
            # As above: the order of sums, and what it moves across a rounding boundary.
            assert have.shape == expected.shape
            assert (have - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize(("num_ranks", "alignment", "fixed"), [(1, 1, False), (3, 16, False), (3, 4, True)])
def test_a_layer_over_ranks_equals_one_process(ranks, backend, num_ranks, alignment, fixed):
    ranks(num_ranks).run(whole_layer, backend, alignment, fixed)


def used_in_other_ways(backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    with EpBuffer(None, config_of(backend)) as buffer:
        dispatcher = TokenDispatcher(buffer)
        idx = integers(10 + buffer.rank, T, 3, low=-1, high=E).long()
        x, weights = randn(20 + buffer.rank, T, HIDDEN), randn(30 + buffer.rank, T, 3)
        ids = [e for e, rank in enumerate(oracle.placement(E, buffer.num_ranks, None)) if rank == buffer.rank]
        experts = Fp8GroupedExperts(len(ids), HIDDEN, FFN, dtype=torch.float32)
        fill_by_id(experts, ids)

        def layer(x, weights, handle=None):
            out = dispatcher.dispatch_fp8(x, None if handle else idx, None if handle else weights, handle=handle)
            rows = experts(Fp8Rows.from_dispatch(out), out.tokens_per_expert, out.topk_weights)
            return dispatcher.combine(rows, out.handle), out.handle

        def gradients(run):
            a, b = x.clone().requires_grad_(), weights.clone().requires_grad_()
            experts.zero_grad()
            y = run(a, b)
            y.square().sum().backward()
            return [y, a.grad, b.grad, *(weight.grad for weight in experts.parameters())]

        plain = gradients(lambda a, b: layer(a, b)[0])
        recomputed = gradients(lambda a, b: checkpoint(lambda *ab: layer(*ab)[0], a, b, use_reentrant=False))
        assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
        # A reused handle brings no gate values: the experts' plain sum.
        y, handle = layer(x, torch.ones_like(weights))
        again, _ = layer(x, None, handle)
        assert torch.equal(again, y)
        with torch.no_grad():
            assert torch.equal(layer(x, weights)[0], plain[0])
        # Only the experts are trained.
        experts.zero_grad()
        y, _ = layer(x, weights)
        y.square().sum().backward()
        assert all(torch.equal(w.grad, want) for w, want in zip(experts.parameters(), plain[3:], strict=True))


def test_recompute_handle_reuse_inference_and_frozen_inputs(ranks, backend):
    ranks(2).run(used_in_other_ways, backend)


def unquantised(backend: str) -> None:
    with EpBuffer(None, config_of(backend)) as buffer:
        x, idx = randn(1, 4, HIDDEN), torch.zeros(4, 1, dtype=torch.int64)
        with pytest.raises(ConfigError, match="out.scale is None"):
            Fp8Rows.from_dispatch(TokenDispatcher(buffer).dispatch(x, idx))


def test_rows_that_crossed_unquantised_are_refused(ranks, backend):
    ranks(1).run(unquantised, backend)


def final_loss(fp8: bool) -> tuple[float, float]:
    """Train embedding, router, experts and output to predict a Markov chain; loss at the start and at the end."""
    vocab, hidden, ffn, num_experts, num_tokens, steps = 64, 128, 64, 4, 256, 150
    generator = torch.Generator().manual_seed(0)
    chain = (3 * torch.randn(vocab, vocab, generator=generator)).softmax(1)
    torch.manual_seed(1)
    embedding = torch.nn.Parameter(torch.randn(vocab, hidden))
    router, output = torch.nn.Linear(hidden, num_experts), torch.nn.Linear(hidden, vocab)
    experts = Fp8GroupedExperts(
        num_experts, hidden, ffn, dtype=torch.float32, init_method=lambda w: torch.nn.init.normal_(w, std=0.1)
    )
    parameters = [embedding, *router.parameters(), *output.parameters(), *experts.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    config = EpConfig(num_experts=num_experts, num_topk=2, hidden=hidden, max_tokens_per_rank=num_tokens, device="cpu")
    losses = []
    with EpBuffer(None, replace(config, dtype=torch.float32, backend="host")) as buffer:
        dispatcher = TokenDispatcher(buffer)
        for _ in range(steps):
            now = torch.randint(vocab, (num_tokens,), generator=generator)
            after = torch.multinomial(chain[now], 1, generator=generator)[:, 0]
            x = embedding[now]
            gates, idx = router(x).softmax(1).topk(2)
            if fp8:
                out = dispatcher.dispatch_fp8(x, idx, gates)
                rows = experts(Fp8Rows.from_dispatch(out), out.tokens_per_expert, out.topk_weights)
            else:
                out = dispatcher.dispatch(x, idx, gates)
                rows = dense_experts(experts, out.x, out.topk_weights, out.tokens_per_expert.tolist())
            logits = output(dispatcher.combine(rows, out.handle))
            loss = torch.nn.functional.cross_entropy(logits, after)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses[0], sum(losses[-30:]) / 30


def test_training_ends_where_unquantised_training_does(ranks, host):
    """Final loss within 1 % of the same training with nothing quantised."""
    (start, quantised), (_, plain) = (ranks(1).run(final_loss, fp8)[0] for fp8 in (True, False))
    print(f"loss {start:.3f} -> FP8 {quantised:.4f}, unquantised {plain:.4f}")
    assert plain < 0.6 * start
    assert abs(quantised / plain - 1) < 0.01


@pytest.mark.parametrize("gpus", [True, False])
def test_the_engine_is_loaded_where_there_are_gpus(monkeypatch: pytest.MonkeyPatch, gpus: bool) -> None:
    looked: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(_te, "why_not", lambda: looked.append(True))
    fp8_experts.load_engine()
    assert looked == [True] * gpus
