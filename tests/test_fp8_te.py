"""FP8 grouped linear layers on a strict stand-in for TransformerEngine: against the emulation, on the CPU.

``te_stand_in.py`` says what it refuses. tests/gpu has the same layers on TransformerEngine itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from moe_ep_plugin import ConfigError, Fp8GroupedExperts, Fp8Recipe, Fp8Rows, _te, fp8_experts
from moe_ep_plugin.fp8 import quantize_columns, quantize_rows, split_rows, stand_in
from moe_ep_plugin.fp8_experts import Engine, Fp8GroupedLinear, Gradients, Keep, WeightBlock

from .cases import relative
from .te_stand_in import StandIn

Results = dict[str, torch.Tensor]
ENGINES: tuple[Engine, Engine] = ("te", "torch")
both_gradients = pytest.mark.parametrize("gradients", ["training", "fp8"])
# More than one block of 128 in each direction, a short block of rows, and an expert without rows.
IN, OUT = 384, 256
COUNTS = [32, 0, 144, 16]
TOTAL = sum(COUNTS)
NUM_ROWS = TOTAL + 5
# Rows that fill up the third expert's to a multiple of 16.
PADDING = slice(170, 176)
# Of relative errors. Another order of sums moves about one result in a thousand to the next bf16, at most 2^-7 away:
# 2^-12 over all. With unquantised gradients operands are rounded to bf16 first, by at most 2^-9 each. A row in the
# wrong place, or one rounding to FP8 more or less, is above 0.02.
BOUNDS = {"fp8": 1e-3, "training": 2**-8}


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    made = StandIn()
    monkeypatch.setattr(_te, "load", made.names)
    # The real one needs rows on a GPU.
    monkeypatch.setattr(fp8_experts, "_uses_te", lambda recipe, device, dtype: recipe.engine == "te")
    # torch.empty fills with NaN then, so a result that nobody wrote shows.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield made
    torch.use_deterministic_algorithms(before)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def few_bits(seed: int, num_rows: int, width: int) -> torch.Tensor:
    """Values that FP8 rounds, alike in all blockings, and whose products add up exactly in fp32, in whatever order.

    Magnitudes are 1 to 2 times 0.5, 1 or 2, chosen for each row and block, so scales differ. They are multiples of 2^-8
    with the 8 bits of bf16, and of 2^-4 in FP8. The gradient of a row is the longest sum with one factor in bf16: OUT =
    256 products of at most 16, multiples of 2^-12. That is up to 2^24 of these, as far as fp32 counts.
    """
    generator = torch.Generator().manual_seed(seed)
    values = (1 + torch.rand(num_rows, width, generator=generator)).to(torch.bfloat16)
    values *= 2 * torch.randint(2, values.shape, generator=generator) - 1
    power = torch.randint(-1, 2, (num_rows, width // 128), generator=generator)
    return torch.ldexp(values, power.repeat_interleave(128, dim=1)).to(torch.bfloat16)


def dispatched(x: torch.Tensor, *, power_of_two: bool = True) -> Fp8Rows:
    """Rows as they arrive: padding is zero with scale 0, and there is anything past the counts."""
    rows = quantize_rows(x, power_of_two=power_of_two)
    codes, scale = rows.codes.clone(), rows.scale.clone()
    codes[PADDING], scale[PADDING] = 0, 0
    codes[TOTAL:], scale[TOTAL:] = 0x7F, torch.nan
    return Fp8Rows(codes.view(rows.data.dtype), scale, stand_in(rows.data, x.dtype).requires_grad_())


def without_gradient(rows: Fp8Rows) -> Fp8Rows:
    return Fp8Rows(rows.data, rows.scale)


def output_grad(values: torch.Tensor) -> torch.Tensor:
    values[TOTAL:] = torch.nan
    return values


EXACT = few_bits(1, NUM_ROWS, IN), output_grad(few_bits(2, NUM_ROWS, OUT))
ROUNDED = randn(1, NUM_ROWS, IN), output_grad(randn(2, NUM_ROWS, OUT))


def make_layer(engine: Engine = "te", dtype: torch.dtype = torch.bfloat16, **recipe: Any) -> Fp8GroupedLinear:
    layer = Fp8GroupedLinear(len(COUNTS), IN, OUT, recipe=Fp8Recipe(engine=engine, **recipe), dtype=dtype)
    values = few_bits if layer.recipe.power_of_two_scales else randn
    with torch.no_grad():
        for index in range(layer.num_gemms):
            layer.weight(index).copy_(values(100 + index, OUT, IN))
    return layer


def run(layer: Fp8GroupedLinear, rows: Fp8Rows | torch.Tensor, dy: torch.Tensor) -> Results:
    """Output and gradients, without those that are None."""
    x = rows.grad_rows if isinstance(rows, Fp8Rows) else rows
    y = layer(rows, COUNTS)
    y.backward(dy)
    layer.backward_dw()
    grads = {"rows": None if x is None else x.grad} | {name: weight.grad for name, weight in layer.named_parameters()}
    return {"y": y.detach()} | {name: grad for name, grad in grads.items() if grad is not None}


def assert_equal(got: Results, want: Results) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def assert_close(got: Results, want: Results, bound: float) -> None:
    assert got.keys() == want.keys()
    errors = {name: relative(got[name], want[name]) for name in want}
    # Not "above the bound": NaN is no match.
    assert {name: error for name, error in errors.items() if not error < bound} == {}


@both_gradients
@pytest.mark.parametrize("weight_block", ["128x128", "1x128"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_are_those_of_the_emulation(
    te: StandIn, gradients: Gradients, weight_block: WeightBlock, dtype: torch.dtype
) -> None:
    x, dy = (values.to(dtype) for values in EXACT)
    recipe: Any = {"gradients": gradients, "weight_block": weight_block}
    got, want = (run(make_layer(engine, dtype, **recipe), dispatched(x), dy) for engine in ENGINES)
    assert_equal(got, want)
    assert not got["y"][TOTAL:].any() and not got["rows"][TOTAL:].any() and not got["weight1"].any()
    assert [gemm.layout for gemm in te.gemms] == (["TN", "NN", "NT"] if gradients == "fp8" else ["TN"])


@both_gradients
def test_fp32_scales_and_the_same_bits_on_every_run(te: StandIn, gradients: Gradients) -> None:
    """Here a value depends on its block: input columns are quantised from the FP8 rows that arrived."""
    x, dy = ROUNDED
    layer, emulated = (make_layer(e, gradients=gradients, power_of_two_scales=False) for e in ENGINES)
    got, want = (run(made, dispatched(x, power_of_two=False), dy) for made in (layer, emulated))
    assert {made.power_of_two for made in te.quantized} == {False}
    assert_close(got, want, BOUNDS[gradients])
    layer.zero_grad()
    assert_equal(run(layer, dispatched(x, power_of_two=False), dy), got)


@both_gradients
def test_weight_gradients_of_unquantised_rows(te: StandIn, gradients: Gradients) -> None:
    """They come from the rows before quantisation, as the second layer's do; in the emulation from its FP8 rows."""
    x, dy = ROUNDED
    recipe: Any = {"gradients": gradients, "power_of_two_scales": False}
    got, want = (run(make_layer(engine, **recipe), x.clone().requires_grad_(), dy) for engine in ENGINES)
    for index, (part, grad) in enumerate(zip(split_rows(x, COUNTS), split_rows(dy, COUNTS), strict=True)):
        operands = [quantize_columns(values).dequantize(torch.float32) for values in (part, grad)]
        a, b = operands if gradients == "fp8" else (part.float(), grad.float())
        emulated, want[f"weight{index}"] = want[f"weight{index}"], (b.t() @ a).to(torch.bfloat16)
        # So the comparison below tells them apart.
        assert len(part) == 0 or relative(want[f"weight{index}"], emulated) > 0.01
    assert_close(got, want, BOUNDS[gradients])


def test_input_gradients_with_1x128_weights(te: StandIn) -> None:
    """Weights are quantised down their columns for them; in the emulation along rows, as for the forward."""
    x, dy = ROUNDED
    recipe: Any = {"gradients": "fp8", "weight_block": "1x128", "power_of_two_scales": False}
    got, want = (run(make_layer(engine, **recipe), dispatched(x, power_of_two=False), dy) for engine in ENGINES)
    emulated, want["rows"] = want["rows"], torch.zeros_like(want["rows"])
    layer = make_layer(**recipe)
    for index, (dx, grad) in enumerate(zip(split_rows(want["rows"], COUNTS), split_rows(dy, COUNTS), strict=True)):
        weight = quantize_columns(layer.weight(index)).dequantize(torch.float32)
        dx.copy_(quantize_rows(grad).dequantize(torch.float32) @ weight)
    assert relative(want["rows"], emulated) > 0.01
    assert_close(got, want, BOUNDS["fp8"])


@both_gradients
def test_both_layers(te: StandIn, gradients: Gradients) -> None:
    results: dict[str, Results] = {}
    for engine in ENGINES:
        torch.manual_seed(3)
        experts = Fp8GroupedExperts(len(COUNTS), IN, 128, recipe=Fp8Recipe(engine=engine, gradients=gradients))
        rows, probs = dispatched(randn(1, NUM_ROWS, IN)), torch.linspace(0.2, 1, NUM_ROWS).requires_grad_()
        y = experts(rows, COUNTS, probs)
        y.backward(output_grad(randn(2, NUM_ROWS, IN)))
        assert rows.grad_rows is not None and rows.grad_rows.grad is not None and probs.grad is not None
        grads = {name: weight.grad for name, weight in experts.named_parameters() if weight.grad is not None}
        results[engine] = {"y": y, "rows": rows.grad_rows.grad, "probs": probs.grad} | grads
    # A value moved to the next bf16 may become another e4m3 code of the second layer's input. What that layer's weight
    # gradients come from differs, see above: hardly, where scales are powers of two and both are FP8, but
    # unquantised rows by the 0.026 that FP8 rounds by.
    assert_close(results["te"], results["torch"], 0.01 if gradients == "fp8" else 0.03)


@both_gradients
@pytest.mark.parametrize(("inputs", "weights"), [(True, False), (False, True)])
def test_only_what_a_gradient_needs_is_made(te: StandIn, gradients: Gradients, inputs: bool, weights: bool) -> None:
    x, dy = EXACT
    want = run(make_layer("torch", gradients=gradients), dispatched(x), dy)
    layer = make_layer(gradients=gradients, delay_weight_grad=True).requires_grad_(weights)
    rows = dispatched(x)
    got = run(layer, rows if inputs else without_gradient(rows), dy)
    assert_equal(got, {name: want[name] for name in want if name == "y" or (inputs if name == "rows" else weights)})
    assert not layer.delayed
    in_fp8 = gradients == "fp8"
    asked = {(made.block_dims, made.rowwise, made.columnwise) for made in te.quantized}
    # Of the weights and the output gradients; dispatched rows are not quantised, nor are their codes copied.
    assert asked == {(2, True, inputs and in_fp8)} | ({(1, inputs, weights)} if in_fp8 else set())
    assert [gemm.layout for gemm in te.gemms] == ["TN", *(["NN" if inputs else "NT"] if in_fp8 else [])]
    operands = te.gemms[0].b
    # By column only for the weights' gradients, when these are computed.
    assert {operand.columnwise for operand in operands} == {None}
    if weights and in_fp8:
        assert all(operand.columnwise is not None and operand.rowwise is None for operand in te.gemms[1].a)
    if inputs:
        starts = [part.data_ptr() for part in split_rows(rows.codes, COUNTS)]
        assert [operand.rowwise[0].data_ptr() for operand in operands] == starts


@pytest.mark.parametrize("keep", ["rows", "columns"])
@pytest.mark.parametrize("quantised", [True, False])
@both_gradients
def test_what_is_kept_for_a_backward(te: StandIn, gradients: Gradients, quantised: bool, keep: Keep) -> None:
    """Received rows, as they came, or with "fp8" their columns; of unquantised rows always those. Nothing after it."""
    x, dy = EXACT
    layer = make_layer(gradients=gradients, keep=keep)
    rows = dispatched(x) if quantised else x.clone()
    in_columns = gradients == "fp8" and (keep == "columns" or not quantised)
    received = (rows.data, rows.scale) if isinstance(rows, Fp8Rows) else (rows,)
    storages = [StorageWeakRef(values.untyped_storage()) for values in received]
    y = layer(rows, COUNTS)
    assert {operand.columnwise is not None for operand in te.gemms[0].b} == {in_columns}
    te.gemms.clear()
    del rows, received
    assert {storage.expired() for storage in storages} == {in_columns}
    y.backward(dy)
    assert layer.weight(2).grad is not None
    te.gemms.clear()
    assert all(storage.expired() for storage in storages)


@pytest.mark.parametrize("delayed", [False, True])
def test_rows_and_columns_kept_give_the_same_bits(te: StandIn, delayed: bool) -> None:
    x, dy = ROUNDED
    found = []
    for keep in ("rows", "columns"):
        layer = make_layer(gradients="fp8", keep=keep, delay_weight_grad=delayed)
        found.append(run(layer, dispatched(x), dy))
        assert len(found[-1]) == 2 + len(COUNTS)
    assert_equal(found[0], found[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_makes_nothing_for_a_backward(te: StandIn, mode: Callable[[], Any]) -> None:
    layer = make_layer(gradients="fp8")
    want = layer(dispatched(EXACT[0]), COUNTS)
    te.quantized.clear()
    te.gemms.clear()
    with mode():
        got = layer(dispatched(EXACT[0]), COUNTS)
    assert torch.equal(got, want) and not got.requires_grad
    assert {(made.block_dims, made.columnwise) for made in te.quantized} == {(2, False)}
    assert {operand.columnwise for operand in te.gemms[0].b} == {None}


@both_gradients
def test_activation_checkpointing_keeps_nothing(te: StandIn, gradients: Gradients) -> None:
    x, dy = EXACT
    want = run(make_layer(gradients=gradients), dispatched(x), dy)
    te.gemms.clear()
    layer, rows = make_layer(gradients=gradients), dispatched(x)
    y = checkpoint(layer, rows, COUNTS, use_reentrant=False)
    # The weights'; those of the rows are made in backward.
    columns = [operand.columnwise[0] for operand in [*te.gemms[0].a, *te.gemms[0].b] if operand.columnwise]
    assert len(columns) == (len(COUNTS) if gradients == "fp8" else 0)
    storages = [StorageWeakRef(values.untyped_storage()) for values in columns]
    te.gemms.clear()
    del columns
    assert all(storage.expired() for storage in storages)
    y.backward(dy)
    assert rows.grad_rows is not None and torch.equal(rows.grad_rows.grad, want["rows"])  # type: ignore[arg-type]
    grads = {name: weight.grad for name, weight in layer.named_parameters() if weight.grad is not None}
    assert_equal(grads, {name: want[name] for name in grads})
    assert len(grads) == len(COUNTS)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


@both_gradients
def test_frozen_experts_get_no_gradient(te: StandIn, gradients: Gradients) -> None:
    x, dy = EXACT
    layer, whole = make_layer(gradients=gradients), make_layer(gradients=gradients)
    layer.weight(0).requires_grad_(False)
    got, want = (run(made, dispatched(x), dy) for made in (layer, whole))
    del want["weight0"]
    assert_equal(got, want)


@both_gradients
def test_delayed_weight_gradients(te: StandIn, gradients: Gradients) -> None:
    """backward_dw() takes the oldest backward, and adds to what is there."""
    delayed, at_once = make_layer(gradients=gradients, delay_weight_grad=True), make_layer(gradients=gradients)
    steps = [EXACT, (few_bits(3, NUM_ROWS, IN), output_grad(few_bits(4, NUM_ROWS, OUT)))]
    for x, dy in steps:
        delayed(dispatched(x), COUNTS).backward(dy)
    assert all(weight.grad is None for weight in delayed.parameters())
    for x, dy in steps:
        want = run(at_once, dispatched(x), dy)
        delayed.backward_dw()
        got = {name: weight.grad for name, weight in delayed.named_parameters() if weight.grad is not None}
        assert_equal(got, {name: want[name] for name in want if name.startswith("weight")})
    assert not delayed.delayed


def test_kept_weights(te: StandIn) -> None:
    layer = make_layer(gradients="fp8")
    times = []

    def step(changed: bool | None, rows: Fp8Rows) -> Results:
        """What comes of a step; also notes how many weights it quantised."""
        layer.weights_changed = changed
        layer.zero_grad()
        te.quantized.clear()
        got = run(layer, rows, EXACT[1])
        times.append(sum(made.block_dims == 2 for made in te.quantized))
        return got

    want = step(None, dispatched(EXACT[0]))
    assert_equal(step(None, dispatched(EXACT[0])), want)
    # Without a gradient of the input they lack columns: they are made again when it is wanted.
    step(True, without_gradient(dispatched(EXACT[0])))
    assert_equal(step(layer.weights_changed, dispatched(EXACT[0])), want)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(2)
    assert_equal(step(layer.weights_changed, dispatched(EXACT[0])), want)
    step(layer.weights_changed, without_gradient(dispatched(EXACT[0])))
    doubled = want | {name: 2 * want[name] for name in ("y", "rows")}
    assert_equal(step(True, dispatched(EXACT[0])), doubled)
    assert_equal(step(None, dispatched(EXACT[0])), doubled)
    assert layer.kept_weights is None
    assert times == [4, 4, 4, 4, 0, 0, 4, 4]


def test_weights_may_begin_anywhere(te: StandIn) -> None:
    """As in a flat buffer of parameters."""
    want = run(make_layer(gradients="fp8"), dispatched(EXACT[0]), EXACT[1])
    layer = make_layer(gradients="fp8")
    for index in range(layer.num_gemms):
        weight = layer.weight(index)
        flat = weight.new_empty(weight.numel() + 1)
        flat[1:] = weight.detach().flatten()
        weight.data = flat[1:].view_as(weight)
        assert weight.data_ptr() % 16 == 2
    assert_equal(run(layer, dispatched(EXACT[0]), EXACT[1]), want)


@both_gradients
def test_a_row_of_nan_stays_alone(te: StandIn, gradients: Gradients) -> None:
    x, dy = EXACT
    clean = run(make_layer(gradients=gradients), dispatched(x), dy)
    x = x.clone()
    x[7] = torch.nan
    got = run(make_layer(gradients=gradients), dispatched(x), dy)
    # Its expert's weight gradient is a sum over it.
    assert got["y"][7].isnan().all() and got.pop("weight0").isnan().all()
    del clean["weight0"]
    got["y"][7] = clean["y"][7]
    assert_equal(got, clean)


@both_gradients
@pytest.mark.parametrize("past", [0, 3])
def test_no_rows_at_all(te: StandIn, gradients: Gradients, past: int) -> None:
    layer, x = make_layer(gradients=gradients), randn(1, past, IN).requires_grad_()
    for rows in (quantize_rows(x), x):
        layer.zero_grad()
        x.grad = None
        out = layer(rows, [0] * len(COUNTS))
        out.sum().backward()
        assert out.shape == (past, OUT) and not out.any()
        grads = [x.grad, *(weight.grad for weight in layer.parameters())]
        assert all(grad is not None and not grad.any() for grad in grads)
    assert not te.gemms and {made.block_dims for made in te.quantized} == {2}


@pytest.mark.parametrize(
    ("sizes", "options", "counts", "words"),
    [
        ((128, 128), {}, [5, 16], r"tokens_per_expert is \[5, 16\].* multiples of 16 rows.*expert_alignment=16"),
        ((200, 128), {}, [16, 16], "in_features is 200.* multiples of 128.*engine='torch'"),
        ((128, 64), {}, [16, 16], "out_features is 64.* multiples of 128.*engine='torch'"),
        ((128, 128), {"dtype": torch.float32}, [16, 16], "dtype is torch.float32.* bfloat16 or float16"),
        ((128, 128), {"device": "meta"}, [16, 16], "rows.device is cpu.* weights are on meta; move"),
    ],
)
def test_refusals(te: StandIn, sizes: tuple[int, int], options: Any, counts: list[int], words: str) -> None:
    layer = Fp8GroupedLinear(2, *sizes, recipe=Fp8Recipe(engine="te"), **options)
    with pytest.raises(ConfigError, match=words):
        layer(quantize_rows(torch.ones(32, sizes[0])), counts)
    assert not te.quantized


def test_rows_on_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="recipe.engine is te.* rows on a GPU, these are on cpu"):
        make_layer()(dispatched(EXACT[0]), COUNTS)


def test_the_stand_in_refuses_what_transformer_engine_does(te: StandIn) -> None:
    def operand(num_rows: int, width: int, block_dims: int = 1, columnwise: bool = True) -> Any:
        by = _te.quantizer(block_dims, rowwise=True, columnwise=columnwise, power_of_two_scales=True)
        return _te.split_quantize(torch.ones(num_rows, width), [num_rows], by)[0]

    def gemm(a: Any, b: Any, layout: str, *shape: int, count: int = 16) -> None:
        _te.grouped_gemm([a], [b], [torch.empty(shape, dtype=torch.bfloat16)], layout, [count], grad=layout != "TN")

    weight, rows, kept = operand(256, 128, block_dims=2), operand(16, 128), operand(16, 128)
    gemm(weight, rows, "TN", 16, 256)
    kept.update_usage(rowwise_usage=False, columnwise_usage=True)
    by = _te.quantizer(1, rowwise=True, columnwise=False, power_of_two_scales=True)
    unpadded = (rows.rowwise[0][:2], torch.zeros(1, 2))
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: gemm(weight, kept, "TN", 16, 256), "lacks row-wise usage"),
        (lambda: gemm(operand(256, 128, 2, False), operand(16, 256), "NN", 16, 128), "lacks column-wise usage"),
        (lambda: gemm(operand(8, 128), operand(8, 256), "NT", 256, 128, count=8), "inner dimension is 8"),
        (lambda: gemm(weight, rows, "TN", 16, 128), "out is"),
        (lambda: gemm(weight, rows, "TN", 16, 256, count=32), "m_splits"),
        (lambda: _te.operand(rows=unpadded, columns=None, dtype=torch.bfloat16, made_by=by), "scales are"),
    ]
    for call, words in calls:
        with pytest.raises(AssertionError, match=words):
            call()
