"""Leased memory on GPUs: a pool that is used up, one that is in pieces, freeing across streams, and the plan."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import EpBuffer

from .helpers import (
    DEVICE,
    Mistakes,
    finish,
    integers,
    kernel_tests,
    make_config,
    needs_cuda,
    ranks_on_this_gpu,
    tokens,
    works,
)

pytestmark = kernel_tests

MIB = 1 << 20


def meet() -> None:
    """All ranks are here, and nothing is under way on any GPU."""
    finish()
    dist.barrier()


# The pool


def used_up_pool(layout: str, fixed: bool) -> tuple[int, int, int]:
    """(dispatches held, copied out while they were, copied out in all)."""
    with EpBuffer(None, make_config(pool_bytes=64 << 10)) as buffer:
        x, idx = tokens(buffer.rank)
        # Layout "rank": once for each of the two ranks, with four experts each, that a token went to.
        times = 2 if layout == "expert" else 1 + (idx // 4).diff(dim=1).ne(0)
        limit = 100 if fixed else None
        held = [buffer.dispatch(x, idx, layout=layout, max_recv_tokens=limit) for _ in range(12)]  # type: ignore[arg-type]
        copied = buffer.stats.copied_out
        for out in held:
            assert torch.equal(out.x, held[0].x)
            assert torch.equal(buffer.combine(out.x, out.handle), times * x)
        del held, out
        meet()
        assert works(buffer)
        return 12, copied, buffer.stats.copied_out


@pytest.mark.parametrize(("layout", "fixed"), [("expert", False), ("expert", True), ("rank", False)])
def test_used_up_pool_copies_out(ranks, layout, fixed):
    for held, copied, copied_in_all in ranks(2).run(used_up_pool, layout, fixed):
        assert 0 < copied < held
        assert copied_in_all == copied, "freed leases were not used again"


def staging() -> tuple[int, int]:
    """Combines staged of rows that lie (anywhere, in leases)."""
    with EpBuffer(None, make_config()) as buffer:
        x, idx = tokens(buffer.rank)
        out = buffer.dispatch(x, idx)
        rows = buffer.empty_rows(out.handle).copy_(out.x)
        assert torch.equal(buffer.combine(rows, out.handle), 2 * x)
        assert torch.equal(buffer.combine(out.x, out.handle), 2 * x)
        leased = buffer.stats.staged
        for _ in range(3):
            assert torch.equal(buffer.combine(out.x * 1, out.handle), 2 * x)
        return buffer.stats.staged - leased, leased


def test_only_rows_from_elsewhere_are_staged(ranks):
    assert ranks(2).run(staging) == [(3, 0)] * 2


def random_holding(operations: int) -> tuple[int, int]:
    """Leases of all sizes live for random times. Returns how many were compared at their end, and copied out."""
    mistakes, compared = Mistakes(), 0
    with EpBuffer(None, make_config(pool_bytes=256 << 10)) as buffer:
        choices = random.Random(buffer.rank)
        held: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(operations):
            x, idx = tokens(buffer.rank, choices.randrange(0, 200))
            x += step
            out = buffer.dispatch(x, idx)
            rows = buffer.empty_rows(out.handle).copy_(out.x)
            mistakes.compare(buffer.combine(rows, out.handle), 2 * x)
            held += [(t, t.clone()) for t in (out.x, rows) if choices.random() < 0.5]
            del out, rows
            while len(held) > 8 or (held and choices.random() < 0.3):
                mistakes.compare(*held.pop(choices.randrange(len(held))))
                compared += 1
        assert mistakes.none()
        return compared, buffer.stats.copied_out


def test_leases_freed_in_random_order(ranks):
    """A pool in pieces gives out no memory that is in use, and what finds no piece is copied out."""
    for compared, copied in ranks(3).run(random_holding, 200):
        assert compared > 100
        assert 0 < copied < 200


# Streams


def used_on_a_side_stream(rounds: int) -> tuple[bool, bool]:
    """Whether a lease that another stream used was freed and its memory leased again, and all contents were right."""
    side = torch.cuda.Stream()
    mistakes, addresses = Mistakes(), []
    # Room for three blocks.
    with EpBuffer(None, make_config(hidden=1024, pool_bytes=4 * MIB)) as buffer:
        for step in range(rounds):
            idx = tokens(buffer.rank, 128)[1]
            x = (integers(step, 128, 1) + buffer.rank).repeat(1, 1024).to(DEVICE)
            out = buffer.dispatch(x, idx)
            expected = out.x.clone()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(20_000_000)
                late = out.x * 1
            addresses.append(out.x.data_ptr())
            y = buffer.combine(out.x, out.handle)
            # Orders what comes next on this stream, the reuse of the memory included, after the side stream's read.
            torch.cuda.current_stream().wait_stream(side)
            del out
            after = buffer.dispatch(x + 100, idx)
            addresses.append(after.x.data_ptr())
            mistakes.compare(late, expected)
            mistakes.compare(after.x, expected + 100)
            mistakes.compare(y, 2 * x)
            finish()  # ``late`` is the side stream's memory.
    return len(set(addresses)) < len(addresses), mistakes.none()


@needs_cuda
def test_memory_is_reused_after_another_stream_read_it(ranks):
    assert ranks(2).run(used_on_a_side_stream, 10) == [(True, True)] * 2


def outlives_its_buffer() -> bool:
    """Leases keep their memory when the buffer is closed, and another buffer takes none of it."""
    kept = []
    for step in range(5):
        with EpBuffer(None, make_config(pool_bytes=MIB)) as buffer:
            x, idx = tokens(buffer.rank)
            out = buffer.dispatch(x + step, idx)
            kept.append((out.x, out.x.clone()))
            assert torch.equal(buffer.combine(out.x, out.handle), 2 * (x + step))
    return all(torch.equal(got, want) for got, want in kept)


def test_leases_outlive_their_buffer(ranks):
    assert ranks(2).run(outlives_its_buffer) == [True] * 2


# The plan


def free_bytes() -> int:
    """Of this GPU, while no rank takes or gives any."""
    meet()
    free = torch.cuda.mem_get_info()[0]
    dist.barrier()
    return free


def measured() -> tuple[int, int, int]:
    """Bytes (planned for the ranks on this GPU, taken by their buffers, not given back by close)."""
    config = make_config(pool_bytes=256 * MIB)
    with EpBuffer(None, config) as buffer:
        assert works(buffer)
    before = free_bytes()
    buffer = EpBuffer(None, config)
    taken = before - free_bytes()
    buffer.close()
    kept = before - free_bytes()
    return config.memory_plan(buffer.num_ranks).total * ranks_on_this_gpu(buffer.num_ranks), taken, kept


@needs_cuda
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_buffer_takes_what_its_plan_says(ranks, num_ranks):
    for planned, taken, kept in ranks(num_ranks).run(measured):
        print(f"{num_ranks} ranks on one GPU: planned {planned / MIB:.0f} MiB, taken {taken / MIB:.0f} MiB")
        assert abs(taken - planned) <= 64 * MIB
        assert abs(kept) <= 64 * MIB


def made_and_closed(times: int) -> int:
    """Bytes that making and closing buffers has cost."""
    config = make_config(pool_bytes=64 * MIB)
    with EpBuffer(None, config) as buffer:
        assert works(buffer)
    before = free_bytes()
    for _ in range(times):
        with EpBuffer(None, config) as buffer:
            assert works(buffer)
    return before - free_bytes()


@needs_cuda
def test_closed_buffers_leave_no_memory(ranks):
    assert max(ranks(2).run(made_and_closed, 10)) <= 16 * MIB
