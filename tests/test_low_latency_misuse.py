"""Low-latency mode called wrongly: typed errors that say what to do, after which the buffer goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import CapacityError, ConfigError, EpBuffer, EpConfig, LowLatencyDispatchOutput, StateError
from tests.cases import Place, bits
from tests.harness import RankPool
from tests.test_faults import attempt

E, K, H, T = 4, 2, 16, 8


def config_of(place: Place, **changes: object) -> EpConfig:
    settings = {"num_experts": E, "num_topk": K, "hidden": H, "max_tokens_per_rank": 32, "timeout_s": 20}
    return EpConfig(**(settings | {"low_latency_tokens_per_rank": T} | place._asdict() | changes))


def inputs(place: Place, num_tokens: int = T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.arange(num_tokens * H).remainder(7).view(num_tokens, H).to(place.device, torch.bfloat16)
    idx = torch.arange(num_tokens * K).remainder(E).view(num_tokens, K).to(place.device)
    return x, idx, torch.full((num_tokens, K), 0.5, device=place.device)


def assert_usable(buffer: EpBuffer, steps: int = 2) -> None:
    """Steps of both kinds are exact; two of low-latency mode use both of its buffers."""
    x, idx, weights = inputs(Place(buffer.backend, buffer.config.device_type))
    by_rank = buffer.config.low_latency_layout == "rank"
    ranks_of = [len({buffer.placement.expert_to_rank[e] for e in row}) for row in idx.tolist()]
    factor = torch.tensor(ranks_of, device=x.device)[:, None] if by_rank else 1
    for _ in range(steps):
        out = buffer.low_latency_dispatch(x, idx).wait()
        back = buffer.low_latency_combine(out.x, idx, None if by_rank else weights, out.handle).wait()
        assert torch.equal(back.x, x * factor)
        assert not back.lost_weights.any()
        del out, back
    ordinary = buffer.dispatch(x, idx)
    assert torch.equal(buffer.combine(ordinary.x, ordinary.handle), 2 * x)


@contextmanager
def refused(argument: str, *parts: str, kind: type[Exception] = ConfigError) -> Iterator[None]:
    """The call in its body raises ``kind``; a ConfigError has its four parts."""
    with pytest.raises(kind) as caught:
        yield
    text = str(caught.value)
    del caught  # Its traceback keeps the tensors of the call.
    if kind is ConfigError:
        assert text.startswith(f"{argument} is "), text
        assert ", but " in text and "; " in text, text
    for part in (argument, *parts):
        assert part in text, text


# Settings


@pytest.mark.parametrize(
    "changes, argument, parts",
    [
        ({"low_latency_tokens_per_rank": 0}, "low_latency_tokens_per_rank", ["0", "at least 1"]),
        ({"low_latency_tokens_per_rank": True}, "low_latency_tokens_per_rank", ["True", "at least 1"]),
        ({"low_latency_tokens_per_rank": 2.5}, "low_latency_tokens_per_rank", ["2.5", "at least 1"]),
        ({"low_latency_tokens_per_rank": 4097}, "low_latency_tokens_per_rank", ["4097", "8192", "(2)", "dispatch"]),
        ({"low_latency_tokens_per_rank": 257, "num_topk": 32}, "low_latency_tokens_per_rank", ["257", "8192"]),
        ({"low_latency_layout": "column"}, "low_latency_layout", ["'column'", "'rank'"]),
        ({"mask_on_timeout": 1}, "mask_on_timeout", ["1", "True or False"]),
    ],
)
def test_settings_are_checked(changes, argument, parts):
    with refused(argument, *parts):
        config_of(Place("host"), **changes)


def test_as_many_routes_as_there_may_be():
    assert config_of(Place("host"), low_latency_tokens_per_rank=4096).low_latency_tokens_per_rank == 4096


def without_the_mode(place: Place) -> None:
    x, idx, weights = inputs(place)
    with (
        EpBuffer(None, config_of(place)) as fitted,
        EpBuffer(None, config_of(place, low_latency_tokens_per_rank=None)) as plain,
    ):
        out = fitted.low_latency_dispatch(x, idx).wait()
        rows, handle = out.x.clone(), out.handle
        del out
        calls: list[Callable[[], object]] = [
            lambda: plain.low_latency_dispatch(x, idx),
            lambda: plain.low_latency_combine(rows, idx, weights, handle),
            lambda: plain.empty_rows(handle),
            lambda: plain.mask_ranks(0),
            plain.masked_ranks,
            plain.register_rows,
        ]
        for call in calls:
            with refused("low_latency_tokens_per_rank", "None", "EpConfig(low_latency_tokens_per_rank=...)"):
                call()
        ordinary = plain.dispatch(x, idx)
        assert torch.equal(plain.combine(ordinary.x, ordinary.handle), 2 * x)
        assert_usable(fitted)


def test_buffer_without_the_mode(ranks, backend):
    ranks(2).run(without_the_mode, Place(backend))


# Arguments of a dispatch


def bad_dispatches(place: Place) -> None:
    x, idx, weights = inputs(place)
    more_x, more_idx, _ = inputs(place, T + 1)
    fp8, scale = x.to(torch.float8_e4m3fn), torch.ones(T, 1, device=place.device)
    cases: list[tuple[str, list[str], dict[str, object]]] = [
        ("x", ["torch.Tensor"], {"x": [1.0]}),
        ("x", ["a tuple of 3", "(q, scale)"], {"x": (fp8, scale, scale)}),
        ("x.shape", ["[8, 8]", "[any, 16]"], {"x": x[:, :8]}),
        ("x.shape", ["[any, 16]"], {"x": x[0]}),
        ("x.dtype", ["float64"], {"x": x.double()}),
        ("x.dtype", ["EpConfig(dtype=torch.float32)"], {"x": x.float()}),
        ("x.dtype", ["float8"], {"x": fp8}),
        ("x.device", ["meta"], {"x": x.to("meta")}),
        ("x.shape[0]", ["9", "low_latency_tokens_per_rank is 8", ">= 9"], {"x": more_x, "topk_idx": more_idx}),
        ("x[0].dtype", ["float8_e4m3fn"], {"x": (x, scale)}),
        ("x[1].shape", ["[8, 1]"], {"x": (fp8, scale.repeat(1, 2))}),
        ("x[1].dtype", ["float32"], {"x": (fp8, scale.double())}),
        ("topk_idx", ["NoneType", "torch.Tensor"], {"topk_idx": None}),
        ("topk_idx.dtype", ["int32", "int64"], {"topk_idx": idx.int()}),
        ("topk_idx.shape", ["[7, 2]", "[8, any]"], {"topk_idx": idx[:-1]}),
        ("topk_idx.shape", ["[8, any]"], {"topk_idx": idx.view(-1)}),
        ("topk_idx.shape[1]", ["4", "config.num_topk is 2"], {"topk_idx": idx.repeat(1, 2)}),
        ("topk_idx.shape[1]", ["0"], {"topk_idx": idx[:, :0]}),
        ("topk_weights", ["layout 'expert'", "low_latency_combine"], {"topk_weights": weights}),
        ("wire", ["'int4'"], {"wire": "int4"}),
        ("num_sms", ["0", "at least 1"], {"num_sms": 0}),
    ]
    with EpBuffer(None, config_of(place)) as buffer:
        for argument, parts, changes in cases:
            with refused(argument, *parts):
                buffer.low_latency_dispatch(**({"x": x, "topk_idx": idx} | changes))
        assert_usable(buffer)
    with EpBuffer(None, config_of(place, low_latency_layout="rank")) as buffer:
        for argument, parts, changes in [
            ("topk_weights.dtype", ["float32"], {"topk_weights": weights.bfloat16()}),
            ("topk_weights.shape", ["[8, 2]"], {"topk_weights": weights[:, :1]}),
        ]:
            with refused(argument, *parts):
                buffer.low_latency_dispatch(x, idx, **changes)
        assert_usable(buffer)
    with EpBuffer(None, config_of(place, wire="fp8")) as buffer:
        with refused("wire", "'bf16'", "sized for FP8", "EpConfig(wire='bf16')"):
            buffer.low_latency_dispatch(x, idx, wire="bf16")
        out = buffer.low_latency_dispatch(x, idx).wait()
        assert out.scale is not None


def test_arguments_of_a_dispatch(ranks, backend):
    ranks(2).run(bad_dispatches, Place(backend))


def wrong_id_on_one_rank(place: Place) -> None:
    """Only the last rank's ids are bad; every rank must say so, and go on."""
    x, idx, _ = inputs(place)
    for layout in ("expert", "rank"):
        with EpBuffer(None, config_of(place, low_latency_layout=layout)) as buffer:
            bad_rank = buffer.num_ranks - 1
            for bad in (E, -2, 1 << 40):
                ids = idx.clone()
                if buffer.rank == bad_rank:
                    ids[3, 1] = bad
                with pytest.raises(ConfigError, match=rf"topk_idx\[3, 1\] is {bad}\b.* 0 to {E - 1} .*; "):
                    buffer.low_latency_dispatch(x, ids).wait()
                    buffer.check()
                assert_usable(buffer)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_wrong_id_on_one_rank_is_raised_on_all(ranks, backend, num_ranks):
    ranks(num_ranks).run(wrong_id_on_one_rank, Place(backend))


def too_many_duplicates(place: Place) -> None:
    """Every token of every rank twice to one expert: twice the slots it has."""
    x, idx, _ = inputs(place)
    with EpBuffer(None, config_of(place)) as buffer:
        capacity = buffer.num_ranks * T
        crowded, last = torch.full_like(idx, E - 1), buffer.num_ranks - 1
        for _ in range(3):
            with pytest.raises(CapacityError, match=rf"rank {last}\b.*\b{2 * capacity}\b.*\b{capacity}\b.*; send"):
                buffer.low_latency_dispatch(x, crowded).wait()
                buffer.check()
            assert_usable(buffer)
        # As many as there are slots for: half of the ranks' tokens twice.
        half = torch.full_like(idx, E - 1)
        half[T // 2 :] = -1
        out = buffer.low_latency_dispatch(x, half).wait()
        received = capacity if buffer.rank == last else 0
        assert int(out.num_received) == received
        back = buffer.low_latency_combine(out.x, half, None, out.handle).wait()
        assert torch.equal(back.x[: T // 2], 2 * x[: T // 2]) and not back.x[T // 2 :].any()
        del out, back
        assert_usable(buffer)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_too_many_duplicates_are_raised_on_all(ranks, backend, num_ranks):
    ranks(num_ranks).run(too_many_duplicates, Place(backend))


# Arguments of a combine


def bad_combines(place: Place) -> None:
    x, idx, weights = inputs(place)
    with EpBuffer(None, config_of(place)) as buffer, EpBuffer(None, config_of(place)) as other:
        out, foreign = buffer.low_latency_dispatch(x, idx).wait(), other.low_latency_dispatch(x, idx).wait().handle
        ordinary = buffer.dispatch(x, idx)
        rows = torch.zeros(2, 2 * T, H, dtype=torch.bfloat16, device=place.device)
        sums = torch.zeros(T, H, dtype=torch.bfloat16, device=place.device)
        gaps = torch.zeros(T, 2 * H, dtype=torch.bfloat16, device=place.device)[:, :H]
        odd = torch.zeros(T * H + 1, dtype=torch.bfloat16, device=place.device)[1:].view(T, H)
        cases: list[tuple[str, list[str], dict[str, object]]] = [
            ("rows", ["torch.Tensor"], {"rows": None}),
            ("rows.shape", ["[2, 8, 16]", "[2, 16, 16]"], {"rows": rows[:, :8]}),
            ("rows.shape", ["[2, 16, 16]"], {"rows": rows.view(-1, H)}),
            ("rows.dtype", ["float64"], {"rows": rows.double()}),
            ("rows.dtype", ["EpConfig(dtype=torch.float32)"], {"rows": rows.float()}),
            ("rows.dtype", ["float8"], {"rows": rows.to(torch.float8_e4m3fn)}),
            ("rows.device", ["meta"], {"rows": rows.to("meta")}),
            ("topk_idx", ["torch.Tensor"], {"topk_idx": None}),
            ("topk_idx.dtype", ["int32", "int64"], {"topk_idx": idx.int()}),
            ("topk_idx.shape", ["[8, 1]", "[8, 2]"], {"topk_idx": idx[:, :1]}),
            ("topk_weights.shape", ["[8, 1]", "[8, 2]"], {"topk_weights": weights[:, :1]}),
            ("topk_weights.dtype", ["bfloat16", "float32"], {"topk_weights": weights.bfloat16()}),
            ("handle", ["NoneType", "LowLatencyHandle"], {"handle": None}),
            ("handle", ["DispatchHandle", "low_latency_dispatch"], {"handle": ordinary.handle}),
            ("handle", ["another EpBuffer"], {"handle": foreign}),
            ("out.shape", ["[4, 16]", "[8, 16]"], {"out": sums[:4]}),
            ("out.dtype", ["float32", "bfloat16"], {"out": sums.float()}),
            ("out", ["gaps"], {"out": gaps}),
            ("out", ["odd start"], {"out": odd}),
            ("wire", ["'plain'"], {"wire": "plain"}),
            ("num_sms", ["-1", "at least 1"], {"num_sms": -1}),
            ("zero_copy", ["True", "empty_rows(handle)", "leave zero_copy out"], {"zero_copy": True}),
        ]
        right = {"rows": out.x, "topk_idx": idx, "topk_weights": weights, "handle": out.handle}
        for argument, parts, changes in cases:
            with refused(argument, *parts):
                buffer.low_latency_combine(**(right | changes))
        with refused("handle", "LowLatencyHandle", "DispatchHandle"):
            buffer.combine(ordinary.x, out.handle)  # type: ignore[arg-type]
        with refused("handle", "another EpBuffer"):
            buffer.empty_rows(foreign)
        with refused("dtype", "float32"):
            buffer.empty_rows(out.handle, torch.float32)
        # None of these was begun: the same handle still combines.
        assert torch.equal(buffer.low_latency_combine(**right).wait().x, x)
        assert torch.equal(buffer.combine(ordinary.x, ordinary.handle), 2 * x)
        del out, right, cases
        assert_usable(buffer)


def test_arguments_of_a_combine(ranks, backend):
    ranks(2).run(bad_combines, Place(backend))


def weights_in_the_wrong_layout(place: Place) -> None:
    x, idx, weights = inputs(place)
    with EpBuffer(None, config_of(place, low_latency_layout="rank")) as buffer:
        out = buffer.low_latency_dispatch(x, idx, weights).wait()
        with refused("topk_weights", "given", "layout 'rank'", "before the combine"):
            buffer.low_latency_combine(out.x, idx, weights, out.handle)
        with refused("rows.shape", "[1, 16, 16]", "[16, 16]"):
            buffer.low_latency_combine(out.x[None], idx, None, out.handle)
        assert torch.equal(buffer.low_latency_combine(out.x, idx, None, out.handle).wait().x, x)
        del out
        assert_usable(buffer)


def test_weights_in_the_wrong_layout(ranks, backend):
    ranks(2).run(weights_in_the_wrong_layout, Place(backend))


def other_ids_at_the_combine(place: Place) -> None:
    """One rank passes ids that it has not dispatched: it alone is told, before anything is sent, and tries again."""
    x, idx, weights = inputs(place)
    idx[5, 0] = -1
    with EpBuffer(None, config_of(place)) as buffer:
        for _ in range(2):
            out = buffer.low_latency_dispatch(x, idx).wait()
            if buffer.rank == 0:
                swapped, revived = idx.clone(), idx.clone()
                swapped[2, 1] = (idx[2, 1] + 1) % E
                revived[5, 0] = 2
                for where, other in (("topk_idx[2, 1]", swapped), ("topk_idx[5, 0]", revived)):
                    if buffer.backend == "cuda":
                        continue  # There the device finds out.
                    with refused(where, "another expert", "ids that were dispatched"):
                        buffer.low_latency_combine(out.x, other, weights, out.handle).wait()
            back = buffer.low_latency_combine(out.x, idx, weights, out.handle).wait()
            factor = torch.ones(T, 1, device=x.device)
            factor[5] = 0.5
            assert torch.equal(back.x, (x * factor).bfloat16())
            del out, back
        assert_usable(buffer)


def test_other_ids_at_the_combine(ranks, backend):
    ranks(2).run(other_ids_at_the_combine, Place(backend))


def copies_refused(place: Place) -> None:
    x, idx, weights = inputs(place)
    with EpBuffer(None, config_of(place)) as buffer:
        first = buffer.low_latency_dispatch(x, idx).wait()
        second = buffer.low_latency_dispatch(x, idx).wait()
        rows = buffer.empty_rows(second.handle).copy_(second.x)
        for other in (second.x, rows.clone(), buffer.empty_rows(first.handle).copy_(first.x)):
            with refused("zero_copy", "True", "empty_rows(handle)"):
                buffer.low_latency_combine(other, idx, weights, second.handle, zero_copy=True)
        in_place = buffer.backend != "collective"
        if in_place:
            with refused("wire", "'fp8'", "empty_rows(handle)", "memory of your own"):
                buffer.low_latency_combine(rows, idx, weights, second.handle, wire="fp8")
        back = buffer.low_latency_combine(rows, idx, weights, second.handle, zero_copy=in_place).wait()
        assert torch.equal(back.x, x)
        # Each call returns the same memory, where there is memory that is read in place.
        assert not in_place or buffer.empty_rows(second.handle).data_ptr() == rows.data_ptr()
        del first, second, rows, other
        assert_usable(buffer)


def test_zero_copy_refuses_rows_from_elsewhere(ranks, backend):
    ranks(2).run(copies_refused, Place(backend))


# The order of calls


def stale_handles(place: Place) -> None:
    x, idx, weights = inputs(place)
    with EpBuffer(None, config_of(place)) as buffer:
        out = buffer.low_latency_dispatch(x, idx).wait()
        handle, rows = out.handle, out.x.clone()
        del out
        for _ in range(2):
            buffer.low_latency_dispatch(x, idx).wait()
        calls: list[Callable[[], object]] = [
            lambda: buffer.low_latency_combine(rows, idx, weights, handle),
            lambda: buffer.empty_rows(handle),
        ]
        for call in calls:
            with refused("handle is of low-latency dispatch 1", "dispatch 3 uses", "combine before", kind=StateError):
                call()
        assert_usable(buffer)


def test_handle_whose_buffer_is_in_use_again(ranks, backend):
    ranks(2).run(stale_handles, Place(backend))


def not_waited_for(place: Place) -> None:
    x, idx, weights = inputs(place)
    with EpBuffer(None, config_of(place)) as buffer:
        first = buffer.low_latency_dispatch(x, idx, async_op=True)
        second = buffer.low_latency_dispatch(x, idx, async_op=True)
        with refused("low-latency dispatch 3", "dispatch 1, whose dispatch", "call its wait()", kind=StateError):
            buffer.low_latency_dispatch(x, idx)
        one, two = first.wait(), second.wait()
        del first, second
        rows = one.x.clone()
        pending = buffer.low_latency_combine(rows, idx, weights, one.handle, async_op=True)
        with refused("a combine of low-latency dispatch 1", "under way", "wait()", kind=StateError):
            buffer.low_latency_combine(rows, idx, weights, one.handle)
        handle = one.handle
        del one
        with refused("low-latency dispatch 3", "dispatch 1, whose combine", "call its wait()", kind=StateError):
            buffer.low_latency_dispatch(x, idx)
        back = pending.wait()
        assert torch.equal(back.x, x) and pending.wait() is back
        del back
        with refused("wait() of low_latency_combine", "called again", "dropped", kind=StateError):
            pending.wait()
        # Waited for, and of the same handle: combined again.
        assert torch.equal(buffer.low_latency_combine(rows, idx, None, handle).wait().x, 2 * x)
        assert torch.equal(buffer.low_latency_combine(two.x, idx, weights, two.handle).wait().x, x)
        del two
        assert_usable(buffer, 3)


def test_operations_that_are_not_waited_for(ranks, backend):
    ranks(2).run(not_waited_for, Place(backend))


def held(place: Place) -> None:
    """Two results are the most, whatever part of one is kept; a copy is none."""
    x, idx, weights = inputs(place)

    def parts(out: LowLatencyDispatchOutput, buffer: EpBuffer) -> list[torch.Tensor]:
        kept = [out.x, out.x[0, :1], out.tokens_per_expert, buffer.empty_rows(out.handle)]
        return kept + [t for t in (out.scale, out.topk_idx, out.topk_weights) if t is not None]

    for layout in ("expert", "rank"):
        some_weights = weights if layout == "rank" else None
        with EpBuffer(None, config_of(place, low_latency_layout=layout)) as buffer:
            for part in range(5 if layout == "expert" else 7):
                out = buffer.low_latency_dispatch(x, idx, some_weights, wire="fp8").wait()
                number, kept = out.handle.sequence, parts(out, buffer)[part]
                copy = kept.clone()
                del out
                buffer.low_latency_dispatch(x, idx, some_weights).wait()
                with refused(
                    f"low-latency dispatch {number + 2}", f"dispatch {number},", "still held", "drop", kind=StateError
                ):
                    buffer.low_latency_dispatch(x, idx, some_weights)
                assert torch.equal(bits(kept), bits(copy))
                del kept
                buffer.low_latency_dispatch(x, idx, some_weights).wait()
            assert_usable(buffer)


@pytest.mark.usefixtures("host")
def test_third_result_while_two_are_held(ranks):
    ranks(2).run(held, Place("host"))


def rows_written_after_wait(place: Place) -> bool:
    """Rows in place may be written again once their rank's wait() has run, though a peer may not have come so far."""
    x, idx, weights = inputs(place)
    right = True
    with EpBuffer(None, config_of(place)) as buffer:
        for late in (0, 1):
            out = buffer.low_latency_dispatch(x, idx).wait()
            rows = buffer.empty_rows(out.handle).copy_(out.x)
            pending = buffer.low_latency_combine(rows, idx, weights, out.handle, async_op=True)
            if buffer.rank == late:
                time.sleep(0.5)
            back = pending.wait()
            rows.fill_(float("nan"))
            right = right and torch.equal(back.x, x)
            del out, rows, pending, back
    return right


def test_rows_may_be_written_again_after_wait(ranks, backend):
    assert ranks(2).run(rows_written_after_wait, Place(backend)) == [True, True]


def closed_between_the_halves(place: Place) -> None:
    x, idx, _ = inputs(place)
    buffer = EpBuffer(None, config_of(place))
    pending = buffer.low_latency_dispatch(x, idx, async_op=True)
    dist.barrier()
    buffer.close()
    for call in (pending.wait, pending.wait, lambda: buffer.low_latency_dispatch(x, idx), buffer.masked_ranks):
        with pytest.raises(StateError, match="closed"):
            call()


def test_closed_between_the_halves(ranks, backend):
    ranks(2).run(closed_between_the_halves, Place(backend))


# Masks


def bad_masks(place: Place) -> None:
    with EpBuffer(None, config_of(place)) as buffer:
        for bad in (2, -1, "0", 0.5):
            with refused("a rank", repr(bad), "0 to 1"):
                buffer.mask_ranks(bad)  # type: ignore[arg-type]
        assert buffer.masked_ranks() == ()
        if place.backend == "collective":
            with refused("ranks", "(1,)", "backend 'collective' has no masks"):
                buffer.mask_ranks(1)
        else:
            with refused("a rank", str(buffer.rank), "this one", "mask others"):
                buffer.mask_ranks(buffer.rank)
        assert_usable(buffer)


def test_masks_that_there_are_not(ranks, backend):
    ranks(2).run(bad_masks, Place(backend))


def masks_on_timeout() -> None:
    with refused("mask_on_timeout", "True", "backend 'collective' has no masks"):
        EpBuffer(None, config_of(Place("collective"), mask_on_timeout=True))


def test_collective_refuses_to_mask_on_timeout(ranks):
    ranks(2).run(masks_on_timeout)


# Ranks that differ


def differing_calls(place: Place, difference: str):  # type: ignore[no-untyped-def]
    x, idx, weights = inputs(place)
    odd = dist.get_rank() == 1
    layout = "rank" if difference == "weights of a dispatch" else "expert"
    buffer = EpBuffer(None, config_of(place, low_latency_layout=layout, timeout_s=3.0))
    outs = [buffer.low_latency_dispatch(x, idx).wait() for _ in range(2)]
    own = outs[1 - odd]

    def dispatch(*args: object, **kwargs: object) -> object:
        return buffer.low_latency_dispatch(*args, **kwargs).wait()  # type: ignore[arg-type]

    def combine(*args: object, **kwargs: object) -> object:
        return buffer.low_latency_combine(*args, **kwargs).wait()  # type: ignore[arg-type]

    def drop(call: Callable[..., object], *args: object) -> object:
        outs.clear()
        return call(*args)

    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "operation": (
            lambda: combine(outs[1].x, idx, weights, outs[1].handle),
            lambda: drop(dispatch, x, idx),
        ),
        "kind": (lambda: combine(outs[1].x, idx, weights, outs[1].handle), lambda: buffer.dispatch(x, idx)),
        "topk": (lambda: drop(dispatch, x, idx), lambda: drop(dispatch, x, idx[:, :1])),
        "element": (lambda: drop(dispatch, x, idx), lambda: drop(dispatch, x.half(), idx)),
        "weights of a dispatch": (lambda: drop(dispatch, x, idx), lambda: drop(dispatch, x, idx, weights)),
        "weights of a combine": (
            lambda: combine(outs[1].x, idx, weights, outs[1].handle),
            lambda: combine(outs[1].x, idx, None, outs[1].handle),
        ),
        "handle": (lambda: combine(own.x, idx, weights, own.handle),) * 2,
    }
    if difference != "handle":
        del own
    result = attempt(calls[difference][odd])
    time.sleep(0.5)
    buffer.close()
    return result


@pytest.mark.parametrize(
    "difference", ["operation", "kind", "topk", "element", "weights of a dispatch", "weights of a combine", "handle"]
)
def test_ranks_that_call_different_operations(backend, difference):
    with RankPool(2) as pool:
        results = pool.run(differing_calls, Place(backend), difference)
    # The one that finds it first leaves; the other may find that it has left.
    for names, text, _ in results:
        assert names[0] in ("PeerMismatch", "PeerTimeout", "PeerLost"), (names, text)
    if difference != "kind" or backend == "collective":
        assert any(names[0] == "PeerMismatch" and "same order on every rank" in text for names, text, _ in results), (
            results
        )
