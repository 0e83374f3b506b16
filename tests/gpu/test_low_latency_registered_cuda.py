"""Rows of low-latency combines in registered memory: read where they lie, and not longer than the combine lasts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import ConfigError, EpBuffer, PeerTimeout, StateError
from tests import test_low_latency_misuse as misuse

from .helpers import DEVICE, PLACE, Mistakes, finish, integers, kernel_tests, make_config, needs_cuda
from .test_faults_cuda import start_again
from .test_low_latency_cuda import lags
from .test_streams_cuda import capture

pytestmark = [*kernel_tests, needs_cuda]

TOKENS, WIDTH, TOPK, EXPERTS = 48, 512, 4, 13


def make_buffer(**changes: object) -> EpBuffer:
    sizes = {"num_experts": EXPERTS, "num_topk": TOPK, "hidden": WIDTH, "low_latency_tokens_per_rank": TOKENS}
    return EpBuffer(None, make_config(**(sizes | {"dtype": torch.bfloat16} | changes)))


def slots_of(buffer: EpBuffer) -> tuple[int, ...]:
    """The shape of rows to combine."""
    return (*buffer._backend._c.low_latency_slots, buffer.config.hidden)  # type: ignore[attr-defined]


def routed(seed: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, topk_idx and topk_weights of whole numbers; some ids are -1."""
    x = integers(3 * seed + 1000 * rank, TOKENS, WIDTH).bfloat16().to(DEVICE)
    idx = integers(3 * seed + 1000 * rank + 1, TOKENS, TOPK, low=-1, high=EXPERTS).long().to(DEVICE)
    return x, idx, integers(3 * seed + 1000 * rank + 2, TOKENS, TOPK, low=1).to(DEVICE)


def sums(
    x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, by_rank: bool, buffer: EpBuffer, factor: int = 2
) -> torch.Tensor:
    """What experts that multiply their rows by ``factor`` send back."""
    if not by_rank:
        return (factor * x.float() * torch.where(idx >= 0, weights, 0.0).sum(1, keepdim=True)).bfloat16()
    rank_of = torch.tensor([*buffer.placement.expert_to_rank, -1], device=DEVICE)[idx]
    ranks = torch.stack([(rank_of == rank).any(1) for rank in range(buffer.num_ranks)]).sum(0)
    return (factor * x.float() * ranks[:, None]).bfloat16()


def registered_rows(layout: str) -> int:
    """Combines of rows anywhere in registered memory, which are written over as soon as the stream has come past."""
    mistakes, steps = Mistakes(), 0
    with make_buffer(low_latency_layout=layout) as buffer:
        by_rank = layout == "rank"
        stats = buffer.stats
        space = torch.empty(4, *slots_of(buffer), dtype=torch.bfloat16, device=DEVICE)
        assert buffer.register_rows(space) >= space.nbytes
        for step in range(12):
            x, idx, weights = routed(step, buffer.rank)
            out = buffer.low_latency_dispatch(x, idx, weights if by_rank else None).wait()
            rows = space[step % 4].copy_(out.x * 2)
            lags(buffer.rank == step % buffer.num_ranks)
            factors = None if by_rank else weights
            back = buffer.low_latency_combine(rows, idx, factors, out.handle, zero_copy=True).wait()
            rows.fill_(float("nan"))
            mistakes.compare(back.x, sums(x, idx, weights, by_rank, buffer))
            mistakes.compare(back.lost_weights, torch.zeros_like(back.lost_weights))
            steps += 1
            del out
        assert stats.staged == 0
        buffer.check()
        assert mistakes.none()
    return steps


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_rows_in_registered_memory_are_read_in_place(ranks, num_ranks, layout):
    assert ranks(num_ranks).run(registered_rows, layout) == [12] * num_ranks


def mixed_rows() -> int:
    """Some ranks' rows are registered, others' in the heap, and others' copied; and a combine of one handle again."""
    mistakes, steps = Mistakes(), 0
    with make_buffer() as buffer:
        space = torch.empty(2, *slots_of(buffer), dtype=torch.bfloat16, device=DEVICE)
        assert buffer.register_rows(*([space] if buffer.rank % 2 == 0 else [])) >= 0
        for step in range(9):
            x, idx, weights = routed(step, buffer.rank)
            out = buffer.low_latency_dispatch(x, idx).wait()
            for again in range(3):
                kind = (step + again + buffer.rank) % 3
                if again > 0 and kind == 1:
                    kind = 2  # A copy may still be read there.
                rows = out.x * (again + 1)
                if kind == 0:
                    rows = space[again % 2].copy_(rows)
                elif kind == 1:
                    rows = buffer.empty_rows(out.handle).copy_(rows)
                lags(buffer.rank == (step + again) % buffer.num_ranks)
                back = buffer.low_latency_combine(rows, idx, weights, out.handle).wait()
                mistakes.compare(back.x, sums(x, idx, weights, False, buffer, again + 1))
                steps += 1
                if kind == 0:
                    rows.fill_(float("nan"))
                del rows
            del out
        buffer.check()
        assert mistakes.none()
    return steps


def test_ranks_may_give_rows_in_different_ways(ranks):
    assert ranks(3).run(mixed_rows) == [27] * 3


def replayed() -> tuple[int, int]:
    """A graph that is captured while its rows are copied reads them in place once their memory is registered."""
    mistakes = Mistakes()
    with make_buffer() as buffer:
        x, idx, weights = routed(0, buffer.rank)

        def layer() -> tuple[torch.Tensor, torch.Tensor]:
            out = buffer.low_latency_dispatch(x, idx).wait()
            rows = out.x * 2
            back = buffer.low_latency_combine(rows, idx, weights, out.handle).wait()
            rows.fill_(float("nan"))
            return back.x, rows

        graph, (back, _rows) = capture(layer)
        registered = 0
        for step in range(1, 61):
            if step == 20:
                registered = buffer.register_rows()
                assert registered > 0
            for static, new in zip((x, idx, weights), routed(step, buffer.rank), strict=True):
                static.copy_(new)
            graph.replay()
            mistakes.compare(back, sums(x, idx, weights, False, buffer))
        copied = buffer.stats.staged
        more = torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE)
        assert buffer.register_rows(more) >= registered
        for step in range(5):
            x.copy_(routed(step, buffer.rank)[0])
            graph.replay()
            mistakes.compare(back, sums(x, idx, weights, False, buffer))
        buffer.check()
        assert mistakes.none()
    return copied, step


def test_graphs_read_in_place_what_is_registered_later(ranks):
    assert ranks(4).run(replayed) == [(2, 4)] * 4


def freed_rows() -> int:
    """Memory that has been freed is not taken for what has come to its address."""
    x, idx, weights = misuse.inputs(PLACE)
    mistakes, copies = Mistakes(), 0
    torch.cuda.empty_cache()
    with EpBuffer(None, misuse.config_of(PLACE)) as buffer:
        slots = slots_of(buffer)
        for _ in range(4):
            space = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
            rows = space[: 2 * torch.Size(slots).numel()].view(torch.bfloat16).view(slots)
            for registered in (False, True):
                if registered:
                    assert buffer.register_rows() >= space.nbytes
                before = buffer.stats.staged
                out = buffer.low_latency_dispatch(x, idx).wait()
                rows.copy_(out.x)
                mistakes.compare(buffer.low_latency_combine(rows, idx, weights, out.handle).wait().x, x)
                copies += buffer.stats.staged - before
                del out
            del space, rows
            finish()
            buffer.unregister_rows()
            torch.cuda.empty_cache()
        buffer.check()
        assert mistakes.none()
        misuse.assert_usable(buffer)
    return copies


def test_memory_that_has_been_freed_is_not_read(ranks):
    assert ranks(2).run(freed_rows) == [4] * 2


def copied_as_before() -> None:
    """Halves launched apart, FP8, and a buffer that masks late ranks: a copy, whatever is registered."""
    x, idx, weights = misuse.inputs(PLACE)
    mistakes = Mistakes()
    for masks in (False, True):
        with EpBuffer(None, misuse.config_of(PLACE, mask_on_timeout=masks, power_of_two_scales=True)) as buffer:
            for wire, async_op in (("bf16", True), ("fp8", False), ("bf16", False)):
                out = buffer.low_latency_dispatch(x, idx).wait()
                rows = out.x * 1
                assert (buffer.register_rows(rows) > 0) != masks
                before = buffer.stats.staged
                back = buffer.low_latency_combine(rows, idx, weights, out.handle, wire=wire, async_op=async_op)  # type: ignore[arg-type]
                mistakes.compare(back.wait().x, x)
                copied = buffer.stats.staged - before
                assert copied == (1 if async_op or masks or wire == "fp8" else 0), (masks, wire, async_op)
                if copied:
                    with misuse.refused("zero_copy", "register_rows"):
                        buffer.low_latency_combine(
                            rows,
                            idx,
                            weights,
                            out.handle,
                            zero_copy=True,
                            async_op=async_op,
                            wire=wire,  # type: ignore[arg-type]
                        )
                del out, rows, back
            buffer.check()
    assert mistakes.none()


def test_combines_that_copy_as_before(ranks):
    ranks(2).run(copied_as_before)


def reader_that_stays_away() -> bool:
    """A peer that has sent but never reads holds the owner of the rows up: it is named when the time is over."""
    x, idx, weights = misuse.inputs(PLACE)
    buffer = EpBuffer(None, misuse.config_of(PLACE, timeout_s=2))
    out = buffer.low_latency_dispatch(x, idx).wait()
    rows = out.x * 1
    buffer.register_rows(rows)
    reads = buffer.rank == 0
    pending = buffer.low_latency_combine(rows, idx, weights, out.handle, async_op=not reads)
    if reads:
        with pytest.raises(PeerTimeout, match="rank 1.*the reading of rows"):
            buffer.check()
    dist.barrier()
    del pending, out
    return start_again(buffer)


def test_a_reader_that_stays_away_is_named(ranks):
    assert ranks(2).run(reader_that_stays_away) == [True] * 2


def wrong_calls() -> None:
    """One rank's mistake is every rank's error, and the buffers go on."""
    x, idx, weights = misuse.inputs(PLACE)
    with EpBuffer(None, misuse.config_of(PLACE)) as buffer:
        with pytest.raises(ConfigError, match="device"):
            buffer.register_rows(*([torch.empty(4)] if buffer.rank == 0 else []))
        out = buffer.low_latency_dispatch(x, idx).wait()
        pending = buffer.low_latency_combine(out.x, idx, weights, out.handle, async_op=True)
        with pytest.raises(StateError, match=r"wait\(\)"):
            buffer.register_rows()
        assert torch.equal(pending.wait().x, x)
        del out, pending
        misuse.assert_usable(buffer)


def test_wrong_calls(ranks):
    ranks(2).run(wrong_calls)
