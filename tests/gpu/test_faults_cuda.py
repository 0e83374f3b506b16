"""Faults on GPUs: each is caused here and must end in its typed error in time; CUDA and new buffers work afterwards.

Kernels wait for their peers on the GPU alone, so the process group is as it was, and the session's ranks go on.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from moe_ep_plugin import EpBuffer
from tests.harness import RankDied
from tests.test_faults import attempt

from .helpers import DEVICE, ON_GPU, GpuPool, finish, kernel_tests, make_config, needs_cuda, tokens, works

pytestmark = kernel_tests

TIMEOUT_S = 2.0
# Longest that a test allows for noticing a fault: the timeout, and slack for a busy machine.
NOTICED_S = TIMEOUT_S + 6.0

# What an operation raised, its text, and after how long.
Raised = tuple[list[str], str, float]


def impatient(timeout_s: float = TIMEOUT_S) -> EpBuffer:
    """A buffer with a short timeout, made when all ranks have loaded all kernels and are here."""
    with EpBuffer(None, make_config()) as patient:
        assert works(patient)
    dist.barrier()
    return EpBuffer(None, make_config(timeout_s=timeout_s))


def start_again(failed: EpBuffer) -> bool:
    """Whether this process can still use its GPU, and all ranks a new buffer."""
    failed.close()
    matrix = torch.eye(64, device=DEVICE)
    usable = bool((matrix @ matrix).sum() == 64)
    finish()
    dist.barrier()
    with EpBuffer(None, make_config()) as buffer:
        return usable and works(buffer) and works(buffer)


def dispatch(buffer: EpBuffer) -> None:
    buffer.dispatch(*tokens(buffer.rank))
    buffer.check()


def describes_wait(text: str, late: int, operation: str, sequence: int) -> bool:
    """Who waited how long for whom, in which step of which operation, what was expected and what was seen."""
    pattern = (
        rf"rank \d waited 2 s for rank {late} \(pid \d+\) in .+ of {operation} {sequence}\b"
        rf".*expected operation {sequence}, seen {sequence - 1}\b"
    )
    return re.search(pattern, text) is not None


# A rank that does not come


def late_for_dispatch(late: int) -> tuple[Raised, Raised, bool]:
    buffer = impatient()
    if buffer.rank == late:
        time.sleep(TIMEOUT_S + 1.5)
    first = attempt(dispatch, buffer)
    second = attempt(buffer.dispatch, *tokens(buffer.rank))
    return first, second, start_again(buffer)


def check_timeouts(results: list[tuple[Raised, bool]], late: int, operation: str, sequence: int) -> None:
    """Every rank failed in time, those that waited out their timeout with its full story."""
    timeouts = 0
    for rank, ((names, text, seconds), usable) in enumerate(results):
        assert "PeerTimeout" in names, (rank, names, text)
        assert seconds < NOTICED_S
        assert usable, rank
        # Who gives up second may find that the first has left.
        if rank != late and names[0] == "PeerTimeout":
            timeouts += 1
            assert seconds >= TIMEOUT_S * 0.9
            assert describes_wait(text, late, operation, sequence), text
    assert timeouts >= 1, results


@pytest.mark.parametrize("late", [0, 2])
def test_rank_that_is_late_for_a_dispatch(ranks, late):
    results = ranks(3).run(late_for_dispatch, late)
    check_timeouts([(first, usable) for first, _, usable in results], late, "dispatch", 1)
    for _, (names, text, _), _ in results:
        assert names[0] == "StateError" and "has failed" in text


def late_for_combine(late: int, told_by: str) -> tuple[Raised, bool]:
    buffer = impatient()
    x, idx = tokens(buffer.rank)
    out = buffer.dispatch(x, idx)
    if buffer.rank == late:
        time.sleep(TIMEOUT_S + 1.5)

    def combine() -> None:
        buffer.combine(out.x, out.handle)
        if told_by == "check":
            buffer.check()
        else:
            # The next call fails, however often it is made before the timeout has passed.
            for _ in range(2):
                time.sleep(TIMEOUT_S / 2 + 0.5)
                buffer.combine(out.x, out.handle)

    raised = attempt(combine)
    return raised, start_again(buffer)


@pytest.mark.parametrize("told_by", ["check", pytest.param("the next call", marks=needs_cuda)])
def test_rank_that_is_late_for_a_combine(ranks, told_by):
    """The call has returned by then: the failure is told by check(), or by the next call."""
    check_timeouts(ranks(3).run(late_for_combine, 1, told_by), 1, "combine", 2)


def comes_late() -> bool:
    with EpBuffer(None, make_config()) as buffer:
        for step in range(3):
            if step == buffer.rank:
                time.sleep(0.4)
            if not works(buffer):
                return False
    return True


def test_late_rank_is_waited_for(ranks):
    assert ranks(3).run(comes_late) == [True] * 3


# A rank that leaves


def one_closes(call: str) -> tuple[Raised | None, bool]:
    buffer = impatient(20.0)
    x, idx = tokens(buffer.rank)
    out = buffer.dispatch(x, idx)
    buffer.check()
    dist.barrier()
    raised = None
    if buffer.rank == 0:
        buffer.close()
    elif call == "dispatch":
        raised = attempt(buffer.dispatch, x, idx)
    else:

        def combine() -> None:
            buffer.combine(out.x, out.handle)
            buffer.check()

        raised = attempt(combine)
    return raised, start_again(buffer)


@pytest.mark.parametrize("call", ["dispatch", "combine"])
def test_closed_peer_is_noticed_before_the_timeout(ranks, call):
    results = ranks(2).run(one_closes, call)
    assert [usable for _, usable in results] == [True, True]
    assert results[1][0] is not None
    names, text, seconds = results[1][0]
    assert names[0] == "PeerLost" and "rank 0" in text and "has closed its buffer" in text, (names, text)
    assert seconds < 8


# Ranks that disagree


def disagree(difference: str) -> tuple[Raised, bool]:
    buffer = impatient(20.0)
    odd = buffer.rank == 1
    x, idx = tokens(buffer.rank)
    weights = torch.ones(idx.shape, device=DEVICE)
    out = buffer.dispatch(x, idx)

    def call() -> None:
        if difference == "operation" and odd:
            buffer.combine(out.x, out.handle)
        elif difference == "layout":
            buffer.dispatch(x, idx, layout="rank" if odd else "expert")
        elif difference == "dtype":
            buffer.dispatch(x.bfloat16() if odd else x, idx)
        elif difference == "weights":
            buffer.dispatch(x, idx, weights if odd else None)
        elif difference == "handle" and odd:
            buffer.dispatch(x, handle=out.handle)
        elif difference == "sum":
            buffer.combine(out.x if odd else out.x.bfloat16(), out.handle)
        else:
            buffer.dispatch(x, idx)
        buffer.check()

    raised = attempt(call)
    dist.barrier()  # Who leaves first would otherwise be lost to the other before the comparison.
    return raised, start_again(buffer)


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        ("operation", "operation"),
        ("layout", "layout"),
        ("dtype", "element type"),
        ("weights", "has topk_weights"),
        ("handle", "handle"),
        ("sum", "element type"),
    ],
)
def test_ranks_that_call_different_operations(ranks, difference, named):
    for rank, ((names, text, seconds), usable) in enumerate(ranks(2).run(disagree, difference)):
        assert names[0] == "PeerMismatch", (names, text)
        who = f"rank {1 - rank} differs from rank {rank}"
        assert re.search(rf"{who} at operation 2: {named}\b.* is \d+ there and \d+ here; ", text), text
        assert seconds < 8
        assert usable


# Rows that do not fit


def overflow_then_go_on() -> int:
    """Some overflow, on one rank or on all; check() says so on all ranks, and every routing after it is right."""
    told = 0
    with EpBuffer(None, make_config()) as buffer:
        for step in range(6):
            x, idx = tokens(buffer.rank)
            crowded = step % 2 == 0
            if crowded:
                idx = torch.zeros_like(idx)  # To rank 0.
            limit = 2 * len(x) * buffer.num_ranks - (1 if buffer.rank == 0 and crowded else 0)

            def call(x: torch.Tensor = x, idx: torch.Tensor = idx, limit: int = limit) -> torch.Tensor:
                out = buffer.dispatch(x, idx, max_recv_tokens=limit)
                buffer.check()
                return buffer.combine(out.x, out.handle)

            if crowded:
                names, text, _ = attempt(call)
                need = 2 * len(x) * buffer.num_ranks
                assert names[0] == "CapacityError", (names, text)
                assert re.search(rf"rank 0\b.*\b{need}\b.*max_recv_tokens.*\b{need - 1}\b", text), text
                told += 1
            else:
                assert torch.equal(call(), 2 * x)
            assert works(buffer)
    return told


def test_overflow_is_told_on_all_ranks_and_the_buffer_goes_on(ranks):
    assert ranks(3).run(overflow_then_go_on) == [3] * 3


# Two threads


def two_in_flight() -> Raised | None:
    with EpBuffer(None, make_config()) as buffer:
        assert works(buffer)
        if buffer.rank == 1:
            time.sleep(1.0)
            assert works(buffer)
            return None
        # Made before: a copy to the device would wait behind the thread's kernel on the stream that both use.
        arguments = tokens(buffer.rank)
        done: list[bool] = []
        thread = threading.Thread(target=lambda: done.append(works(buffer)))
        thread.start()
        time.sleep(0.4)
        result = attempt(buffer.dispatch, *arguments)
        thread.join()
        assert done == [True]
        return result


def test_two_operations_in_flight(ranks):
    raised = ranks(2).run(two_in_flight)[0]
    assert raised is not None
    names, text, _ = raised
    assert names[0] == "StateError" and "in flight" in text


# A rank that is killed


def one_is_killed(victim: int) -> tuple[Raised, bool]:
    buffer = impatient(30.0)
    finish()
    dist.barrier()
    if buffer.rank == victim:
        # Nothing of it is on the GPU: MPS does not survive the end of a process whose kernels run.
        os.kill(os.getpid(), signal.SIGKILL)
    raised = attempt(buffer.dispatch, *tokens(buffer.rank))
    buffer.close()
    matrix = torch.eye(64, device=DEVICE)
    return raised, bool((matrix @ matrix).sum() == 64)


def test_rank_that_is_killed_is_noticed_before_the_timeout():
    with GpuPool(3) as pool:
        results = pool.run_with(one_is_killed, (1,), may_die=[1])
    assert isinstance(results[1], RankDied)
    for (names, text, seconds), usable in (results[0], results[2]):
        assert "PeerTimeout" in names and "dispatch 1" in text, (names, text)
        assert seconds < (15 if ON_GPU else 8)
        assert usable
        # Who finds out second may find that the first has left.
        assert names[0] == "PeerLost", (names, text)
    assert any("for rank 1 " in text and "process has ended" in text for (_, text, _), _ in (results[0], results[2]))
