"""Uses that break the contract between ranks, threads or processes, and must be told apart from bad luck."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from moe_ep_plugin import EpBuffer
from tests.harness import RankPool
from tests.test_faults import attempt, make_config, needs_host, tokens, works


def different_handles(backend: str, operation: str):  # type: ignore[no-untyped-def]
    with EpBuffer(None, make_config(backend)) as buffer:
        x, idx = tokens(buffer.rank)
        outs = [buffer.dispatch(x, idx), buffer.dispatch(x, idx.flip(0))]
        mine = outs[buffer.rank % 2]
        if operation == "combine":
            result = attempt(buffer.combine, mine.x, mine.handle)
        else:
            result = attempt(buffer.dispatch, x, handle=mine.handle)
        time.sleep(0.5)
        return result


@pytest.mark.parametrize("operation", ["combine", "dispatch"])
def test_ranks_that_pass_different_handles(backend: str, operation: str) -> None:
    """Slots of one routing used with the rows of another would give wrong sums without a word."""
    with RankPool(2) as pool:
        results = pool.run(different_handles, backend, operation)
    for names, text, _ in results:
        assert names[0] in ("PeerMismatch", "PeerLost"), (names, text)
    assert any(names[0] == "PeerMismatch" and "handle" in text for names, text, _ in results), results


def changes_ids_while_waiting() -> bool:
    """Routing is read once: what happens to the tensor while the rank waits for its peers changes nothing."""
    with EpBuffer(None, make_config("host")) as buffer:
        x, idx = tokens(buffer.rank)
        if buffer.rank == 1:
            time.sleep(1.0)
            return works(buffer)

        def overwrite() -> None:
            idx.zero_()

        threading.Timer(0.3, overwrite).start()
        out = buffer.dispatch(x, idx)
        assert bool((idx == 0).all()), "the dispatch was over before the ids changed"
        return torch.equal(buffer.combine(out.x, out.handle), 2 * x)


@needs_host
def test_ids_may_change_once_dispatch_has_begun() -> None:
    with RankPool(2) as pool:
        assert pool.run(changes_ids_while_waiting) == [True, True]


def closes_while_waiting():  # type: ignore[no-untyped-def]
    buffer = EpBuffer(None, make_config("host"))
    assert works(buffer)
    if buffer.rank == 1:
        time.sleep(2.0)
        return None
    threading.Timer(0.5, buffer.close).start()
    return attempt(buffer.dispatch, *tokens(buffer.rank))


@needs_host
def test_close_ends_a_wait_of_another_thread() -> None:
    with RankPool(2) as pool:
        names, text, seconds = pool.run(closes_while_waiting)[0]
    assert names[0] == "StateError" and "closed while an operation was in flight" in text, (names, text)
    assert seconds < 10


FORKING = """
import atexit, os, sys, torch, torch.distributed as dist
from moe_ep_plugin import EpBuffer, EpConfig, StateError
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
sizes = dict(num_experts=2, num_topk=1, hidden=64, max_tokens_per_rank=8)
config = EpConfig(**sizes, backend="host", device="cpu", host_threads=2)
buffer = EpBuffer(None, config)
x, idx = torch.ones(4, 64).bfloat16(), torch.arange(4).view(4, 1) % 2
def round_trip():
    out = buffer.dispatch(x, idx)
    return torch.equal(buffer.combine(out.x, out.handle), x)
assert round_trip()
if rank == 0:
    child = os.fork()
    if child == 0:
        try:
            buffer.dispatch(x, idx)
        except StateError as error:
            assert "forked" in str(error)
            atexit._run_exitfuncs()  # among them the buffer's, which must not close the parent's rank
            os._exit(0)  # gloo's own threads, missing here, would be waited for
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert round_trip()
print("fine", flush=True)
buffer.close()
"""


@needs_host
def test_forked_child_does_not_leave_for_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "forking.py"
    script.write_text(FORKING)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    try:
        for process in ranks:
            assert process.communicate(timeout=60)[0] == "fine\n"
    finally:
        for process in ranks:
            process.kill()


def too_small(backend: str):  # type: ignore[no-untyped-def]
    config = make_config(backend, max_tokens_per_rank=1 << 20, hidden=1 << 16)
    if backend == "host":
        return attempt(EpBuffer, None, config)
    with EpBuffer(None, config) as buffer:
        return buffer.backend


@needs_host
def test_shared_memory_far_too_small() -> None:
    """Terabytes would be needed: said at the start, with the remedy, and "auto" goes on without shared memory."""
    with RankPool(2) as pool:
        for names, text, _ in pool.run(too_small, "host"):
            assert names[0] == "BackendUnavailable" and "--shm-size" in text and "MiB free" in text, (names, text)
        assert pool.run(too_small, "auto") == ["collective"] * 2
