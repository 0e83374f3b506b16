"""EpBuffer's own part: argument checks that leave it usable, its states, and ranks that disagree."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

import moe_ep_plugin
from moe_ep_plugin import ConfigError, EpBuffer, EpConfig, EpError, PeerMismatch, StateError, errors

E, K, H, T = 4, 2, 16, 8


def config_of(backend: str, **changes: object) -> EpConfig:
    settings = {"num_experts": E, "num_topk": K, "hidden": H, "max_tokens_per_rank": T}
    return EpConfig(**settings | {"backend": backend, "device": "cpu", "timeout_s": 20} | changes)


def inputs(num_tokens: int = T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.arange(num_tokens * H).remainder(7).view(num_tokens, H).to(torch.bfloat16)
    idx = torch.arange(num_tokens * K).remainder(E).view(num_tokens, K)
    return x, idx, torch.full((num_tokens, K), 0.5)


def assert_usable(buffer: EpBuffer) -> None:
    x, idx, weights = inputs()
    out = buffer.dispatch(x, idx, weights)
    assert torch.equal(buffer.combine(out.x, out.handle, topk_weights=out.topk_weights), x)


def bad_dispatches(handle: object, foreign: object) -> list[tuple[str, str, dict[str, object]]]:
    """(argument named in the error, part of the text, arguments) of calls that must be refused."""
    x, idx, weights = inputs()
    fp8 = x.to(torch.float8_e4m3fn)
    more = inputs(T + 1)
    return [
        ("x", "torch.Tensor", {"x": [1.0]}),
        ("x.shape", "[any, 16]", {"x": x[:, :8]}),
        ("x.shape", "[any, 16]", {"x": x[0]}),
        ("x.dtype", "float64", {"x": x.double()}),
        ("x.dtype", "int32", {"x": x.int()}),
        ("x.dtype", "EpConfig(dtype=torch.float32)", {"x": x.float()}),
        ("x.dtype", "float8", {"x": fp8}),
        ("x.device", "meta", {"x": x.to("meta")}),
        ("x.shape[0]", "max_tokens_per_rank >= 9", {"x": more[0], "topk_idx": more[1], "topk_weights": more[2]}),
        ("x[0].dtype", "float8_e4m3fn", {"x": (x, torch.ones(T, 1))}),
        ("x[1].shape", "[8, 1]", {"x": (fp8, torch.ones(T, 2))}),
        ("x[1].dtype", "float32", {"x": (fp8, torch.ones(T, 1, dtype=torch.float64))}),
        ("topk_idx", "None", {"topk_idx": None}),
        ("topk_idx", "torch.Tensor", {"topk_idx": idx.tolist()}),
        ("topk_idx.dtype", "int64", {"topk_idx": idx.int()}),
        ("topk_idx.shape", "[8, any]", {"topk_idx": idx[:-1]}),
        ("topk_idx.shape", "[8, any]", {"topk_idx": idx.view(-1)}),
        ("topk_idx.shape[1]", "config.num_topk is 2", {"topk_idx": idx.repeat(1, 2), "topk_weights": None}),
        ("topk_idx.shape[1]", "0", {"topk_idx": idx[:, :0], "topk_weights": None}),
        (
            "topk_idx[3, 1]",
            "0 to 3",
            {"topk_idx": idx.clone().index_put_((torch.tensor(3), torch.tensor(1)), torch.tensor(E))},
        ),
        (
            "topk_idx[0, 0]",
            "0 to 3",
            {"topk_idx": idx.clone().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(-2))},
        ),
        ("topk_weights.dtype", "float32", {"topk_weights": weights.bfloat16()}),
        ("topk_weights.shape", "[8, 2]", {"topk_weights": weights[:, :1]}),
        ("layout", "'column'", {"layout": "column"}),
        ("wire", "'int4'", {"wire": "int4"}),
        ("max_recv_tokens", "-1", {"max_recv_tokens": -1}),
        ("max_recv_tokens", "2.5", {"max_recv_tokens": 2.5}),
        ("handle", "DispatchHandle", {"handle": (1, 2), "topk_idx": None}),
        ("handle", "another EpBuffer", {"handle": foreign, "topk_idx": None}),
        ("topk_idx", "handle", {"handle": handle}),
        (
            "x.shape[0]",
            "handle routes 8 tokens",
            {"handle": handle, "topk_idx": None, "x": x[:3], "topk_weights": None},
        ),
        ("max_recv_tokens", "handle has None", {"handle": handle, "topk_idx": None, "max_recv_tokens": 99}),
    ]


def check_bad_dispatches(backend: str) -> None:
    x, idx, weights = inputs()
    with EpBuffer(None, config_of(backend)) as buffer, EpBuffer(None, config_of(backend)) as other:
        handle, foreign = buffer.dispatch(x, idx).handle, other.dispatch(x, idx).handle
        for argument, part, changes in bad_dispatches(handle, foreign):
            arguments = {"x": x, "topk_idx": idx, "topk_weights": weights} | changes
            with pytest.raises(ConfigError) as caught:
                buffer.dispatch(**arguments)
            text = str(caught.value)
            assert text.startswith(f"{argument} is "), text
            assert part in text, text
            assert "; " in text, text
        assert_usable(buffer)


def check_bad_combines(backend: str) -> None:
    x, idx, weights = inputs()
    with EpBuffer(None, config_of(backend)) as buffer, EpBuffer(None, config_of(backend)) as other:
        out = buffer.dispatch(x, idx, weights)
        by_rank = buffer.dispatch(x, idx, weights, layout="rank")
        foreign = other.dispatch(x, idx).handle
        rows, w = out.x.clone(), out.topk_weights
        n = len(rows)
        cases = [
            ("rows", "torch.Tensor", {"rows": None}),
            ("rows.shape", f"[{n}, 16]", {"rows": torch.cat([rows, rows])}),
            ("rows.shape", f"[{n}, 16]", {"rows": rows[:, :8]}),
            ("rows.dtype", "float64", {"rows": rows.double()}),
            ("rows.dtype", "EpConfig(dtype=torch.float32)", {"rows": rows.float()}),
            ("rows.device", "meta", {"rows": rows.to("meta")}),
            ("handle", "DispatchHandle", {"handle": None}),
            ("handle", "another EpBuffer", {"handle": foreign}),
            ("topk_weights.shape", f"[{n}]", {"topk_weights": torch.ones(n, K)}),
            ("topk_weights.dtype", "float32", {"topk_weights": w.half()}),
            ("topk_weights", "layout 'rank'", {"rows": by_rank.x, "handle": by_rank.handle}),
            ("row_values.shape", f"[{n}]", {"row_values": torch.ones(n + 1)}),
            ("row_values.dtype", "float32", {"row_values": torch.ones(n, dtype=torch.int64)}),
        ]
        for argument, part, changes in cases:
            arguments = {"rows": rows, "handle": out.handle, "topk_weights": w} | changes
            with pytest.raises(ConfigError) as caught:
                buffer.combine_with_values(**arguments)
            text = str(caught.value)
            assert text.startswith(f"{argument} is "), text
            assert part in text, text
            assert "; " in text, text
        with pytest.raises(ConfigError, match="^dtype is torch.float32"):
            buffer.empty_rows(out.handle, torch.float32)
        with pytest.raises(ConfigError, match="^dtype is \\[16\\]"):
            buffer.empty_rows(out.handle, [16])
        with pytest.raises(ConfigError, match="another EpBuffer"):
            buffer.empty_rows(foreign)
        assert torch.equal(buffer.combine(rows, out.handle, topk_weights=w), x)
        assert_usable(buffer)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_bad_dispatch_arguments(ranks, backend, num_ranks):
    ranks(num_ranks).run(check_bad_dispatches, backend)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_bad_combine_arguments(ranks, backend, num_ranks):
    ranks(num_ranks).run(check_bad_combines, backend)


def refused_on_one_rank(backend: str) -> None:
    """A rank that was refused may call again; its peers only wait a little longer."""
    x, idx, _ = inputs()
    with EpBuffer(None, config_of(backend)) as buffer:
        if buffer.rank == 1:
            with pytest.raises(ConfigError, match=r"topk_idx\[0, 0\] is 77"):
                buffer.dispatch(x, torch.full_like(idx, 77))
        assert_usable(buffer)


def test_error_on_one_rank_does_not_hurt_the_others(ranks, backend):
    ranks(2).run(refused_on_one_rank, backend)


def states(backend: str) -> None:
    x, idx, _ = inputs()
    buffer = EpBuffer(None, config_of(backend))
    out = buffer.dispatch(x, idx)
    kept = out.x.clone()
    buffer.close()
    buffer.close()
    assert torch.equal(out.x, kept)
    for call in (
        lambda: buffer.dispatch(x, idx),
        lambda: buffer.combine(out.x, out.handle),
        lambda: buffer.empty_rows(out.handle),
    ):
        with pytest.raises(StateError, match="closed EpBuffer; make a new one"):
            call()
    with EpBuffer(None, config_of(backend)) as fresh:
        assert_usable(fresh)
        x, idx, weights = inputs()
        before = fresh.stats.operations
        out = fresh.dispatch(x, idx, weights, async_op=True)
        out.event.wait()
        back = fresh.combine(out.x, out.handle, topk_weights=out.topk_weights, async_op=True, previous_event=out.event)
        back.event.synchronize()
        assert torch.equal(back.x, x)
        assert fresh.stats.operations == before + 2


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_use_after_close_and_events(ranks, backend, num_ranks):
    ranks(num_ranks).run(states, backend)


def disagree(backend: str, changes: dict[str, object]) -> None:
    mine = changes if dist.get_rank() == 1 else {}
    with pytest.raises(PeerMismatch) as caught:
        EpBuffer(None, config_of(backend, **mine))
    for name, value in changes.items():
        assert name in str(caught.value)
        assert f"rank 1: {value}" in str(caught.value)
    with EpBuffer(None, config_of(backend)) as buffer:
        assert_usable(buffer)


@pytest.mark.parametrize(
    "changes", [{"hidden": 32}, {"expert_alignment": 4, "num_topk": 1}, {"dtype": torch.float32}, {"wire": "fp8"}]
)
def test_ranks_that_disagree_on_the_config(ranks, backend, changes):
    ranks(2).run(disagree, backend, changes)


def differ_in_operation(backend: str, difference: str, named: str) -> None:
    x, idx, weights = inputs()
    dtype = torch.float32 if difference == "dtype" else torch.bfloat16
    odd = dist.get_rank() == 1
    with EpBuffer(None, config_of(backend)) as bystander:
        buffer = EpBuffer(None, config_of(backend, dtype=dtype))
        handle = buffer.dispatch(x, idx).handle
        rows = torch.zeros(handle.num_rows, H, dtype=torch.bfloat16)
        with pytest.raises(PeerMismatch) as caught:
            if difference == "operation" and odd:
                buffer.combine(rows, handle)
            elif difference == "layout":
                buffer.dispatch(x, idx, layout="rank" if odd else "expert")
            elif difference == "wire":
                buffer.dispatch(x, idx, wire="fp8" if odd else "bf16")
            elif difference == "weights":
                buffer.dispatch(x, idx, weights if odd else None)
            elif difference == "dtype":
                buffer.dispatch(x if odd else x.float(), idx)
            else:
                buffer.dispatch(x, idx)
        text = str(caught.value)
        who = f"rank {1 - buffer.rank} differs from rank {buffer.rank}"
        assert re.search(rf"{who} at operation \d+: ({named})\b.* is \d+ there and \d+ here; ", text), text
        with pytest.raises(StateError, match="PeerMismatch"):
            buffer.dispatch(x, idx)
        dist.barrier()  # Who leaves first would otherwise be lost to the other before the comparison.
        buffer.close()
        assert_usable(bystander)


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        ("operation", "operation"),
        ("layout", "layout"),
        ("wire", "element type|row_bytes"),
        ("weights", "has topk_weights|has_weights"),
        ("dtype", "element type|row_bytes"),
    ],
)
def test_ranks_that_call_different_operations(ranks, backend, difference, named):
    ranks(2).run(differ_in_operation, backend, difference, named)


def bad_map(backend: str) -> None:
    with pytest.raises(ConfigError, match=r"expert_to_rank\[2\] is 5"):
        EpBuffer(None, config_of(backend, expert_to_rank=(0, 0, 5, 1)))


def test_map_to_a_rank_outside_the_group(ranks, backend):
    ranks(2).run(bad_map, backend)


def test_one_process_needs_no_process_group(backend):
    assert not dist.is_initialized()
    with EpBuffer(None, config_of(backend)) as buffer:
        assert (buffer.rank, buffer.num_ranks, buffer.num_local_experts) == (0, 1, E)
        assert_usable(buffer)


def test_config_must_be_an_ep_config():
    with pytest.raises(ConfigError, match="EpConfig"):
        EpBuffer(None, {"num_experts": 4})


def test_every_error_is_an_ep_error():
    named = {value for value in vars(errors).values() if isinstance(value, type)}
    assert {error.__name__ for error in named} == {
        *("EpError", "ConfigError", "StateError", "BackendUnavailable"),
        *("CapacityError", "PeerTimeout", "PeerLost", "PeerMismatch"),
    }
    for error in named:
        assert issubclass(error, EpError) and issubclass(error, RuntimeError)
        assert getattr(moe_ep_plugin, error.__name__) is error
    assert issubclass(ConfigError, ValueError)
    assert issubclass(errors.PeerLost, errors.PeerTimeout)


def subgroup(backend: str) -> None:
    """Buffers over parts of the world: each group is its own ranks, and they don't meet."""
    world = dist.get_rank()
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    with EpBuffer(groups[world % 2], config_of(backend)) as buffer:
        assert (buffer.rank, buffer.num_ranks) == (world // 2, 2)
        for _ in range(5):
            assert_usable(buffer)
    with pytest.raises(EpError, match="group is without this process"):
        EpBuffer(groups[1 - world % 2], config_of(backend))


def test_buffers_of_disjoint_groups(ranks, backend):
    ranks(4).run(subgroup, backend)
