"""Every fault is caused here, and must end in its typed error within the timeout, naming who or what.

Faults leave a process group in an odd state, so each test has a pool of its own.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from moe_ep_plugin import CapacityError, EpBuffer, EpConfig
from tests.conftest import all_pids, shared_segments
from tests.harness import RankDied, RankPool

TIMEOUT_S = 4.0
# Longest that a test allows for noticing a fault: the timeout, and slack for a busy machine.
NOTICED_S = TIMEOUT_S + 8.0


needs_host = pytest.mark.usefixtures("host")


def make_config(backend: str, **changes: object) -> EpConfig:
    settings = {
        "num_experts": 8,
        "num_topk": 2,
        "hidden": 64,
        "max_tokens_per_rank": 256,
        "dtype": torch.float32,
        "backend": backend,
        "timeout_s": 30.0,
        "device": "cpu",
    }
    return EpConfig(**(settings | changes))  # type: ignore[arg-type]


def tokens(rank: int, count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randint(-8, 8, (count, 64), generator=generator).float()
    return x, torch.randint(0, 8, (count, 2), generator=generator)


def works(buffer: EpBuffer) -> bool:
    """One exact round trip: every token comes back twice, once from each of its experts."""
    x, idx = tokens(buffer.rank)
    out = buffer.dispatch(x, idx)
    return torch.equal(buffer.combine(out.x, out.handle), 2 * x)


def attempt(call, *args, **kwargs):  # type: ignore[no-untyped-def]
    """(error type names, message, seconds) of a call that must raise."""
    started = time.monotonic()
    try:
        call(*args, **kwargs)
    except Exception as error:
        names = [t.__name__ for t in type(error).__mro__]
        return names, str(error), time.monotonic() - started
    return ["nothing was raised"], "", time.monotonic() - started


# A rank that is killed


def killed_inside_dispatch(backend: str, victim: int, late: int):  # type: ignore[no-untyped-def]
    with (
        EpBuffer(None, make_config(backend)) as other,
        EpBuffer(None, make_config(backend)) as buffer,
    ):
        assert works(other) and works(buffer)
        if buffer.rank == victim:
            # It has begun the dispatch and waits for the late rank when it dies.
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if buffer.rank == late:
            time.sleep(1.0)
        return attempt(buffer.dispatch, *tokens(buffer.rank))


def test_rank_killed_in_the_middle_of_dispatch(backend: str) -> None:
    with RankPool(3) as pool:
        results = pool.run_with(killed_inside_dispatch, (backend, 1, 2), may_die=[1])
    assert isinstance(results[1], RankDied)
    for survivor in (results[0], results[2]):
        names, text, seconds = survivor
        assert "PeerTimeout" in names, text
        assert seconds < NOTICED_S
        if backend == "host":
            assert names[0] == "PeerLost"
            assert "for rank 1 " in text and "its process has ended" in text and "dispatch" in text


# A rank that does not come


def never_comes(backend: str):  # type: ignore[no-untyped-def]
    buffer = EpBuffer(None, make_config(backend, timeout_s=TIMEOUT_S))
    if buffer.rank == 2:
        time.sleep(TIMEOUT_S + 2.0)
        return None
    first = attempt(buffer.dispatch, *tokens(buffer.rank))
    second = attempt(buffer.dispatch, *tokens(buffer.rank))
    buffer.close()
    return first, second


def test_rank_that_never_dispatches(backend: str) -> None:
    with RankPool(3) as pool:
        results = pool.run(never_comes, backend)
    timeouts = 0
    for first, second in results[:2]:
        names, text, seconds = first
        assert "PeerTimeout" in names, (names, text)
        assert seconds < NOTICED_S
        # The survivor that gives up second may find that the first has left.
        if backend == "host" and names[0] == "PeerTimeout":
            timeouts += 1
            assert seconds >= TIMEOUT_S * 0.9
            assert re.search(r"rank \d waited 4 s for rank 2 \(pid \d+\)", text), text
            assert "expected operation 1, seen 0" in text
        assert second[0][0] == "StateError" and "has failed" in second[1]
    if backend == "host":
        assert timeouts >= 1, [first for first, _ in results[:2]]


def never_builds(backend: str):  # type: ignore[no-untyped-def]
    if torch.distributed.get_rank() == 1:
        time.sleep(TIMEOUT_S + 2.0)
        return None
    return attempt(EpBuffer, None, make_config(backend, timeout_s=TIMEOUT_S))


def test_rank_that_never_builds_its_buffer(backend: str) -> None:
    with RankPool(3) as pool:
        results = pool.run(never_builds, backend)
    for names, text, seconds in (results[0], results[2]):
        assert "PeerTimeout" in names, (names, text)
        assert "the start of EpBuffer" in text
        assert seconds < NOTICED_S


def comes_late(backend: str) -> bool:
    with EpBuffer(None, make_config(backend)) as buffer:
        for step in range(4):
            if step % buffer.num_ranks == buffer.rank:
                time.sleep(0.3)
            if not works(buffer):
                return False
    return True


def test_late_rank_is_waited_for(backend: str) -> None:
    with RankPool(3) as pool:
        assert pool.run(comes_late, backend) == [True] * 3


def one_leaves(backend: str):  # type: ignore[no-untyped-def]
    buffer = EpBuffer(None, make_config(backend))
    assert works(buffer)
    if buffer.rank == 0:
        buffer.close()
        time.sleep(2.0)
        return None
    return attempt(buffer.dispatch, *tokens(buffer.rank))


@needs_host
def test_closed_peer_is_noticed_before_the_timeout() -> None:
    with RankPool(2) as pool:
        names, text, seconds = pool.run(one_leaves, "host")[1]
    assert names[0] == "PeerLost" and "rank 0" in text and "has closed its buffer" in text
    assert seconds < NOTICED_S


# Two threads


def two_in_flight(backend: str):  # type: ignore[no-untyped-def]
    with EpBuffer(None, make_config(backend)) as buffer:
        x, idx = tokens(buffer.rank)
        if buffer.rank == 1:
            time.sleep(1.5)
            assert works(buffer)
            return None
        done: list[bool] = []
        thread = threading.Thread(target=lambda: done.append(works(buffer)))
        thread.start()
        time.sleep(0.5)
        result = attempt(buffer.dispatch, x, idx)
        thread.join()
        assert done == [True]
        return result


def test_two_operations_in_flight(backend: str) -> None:
    with RankPool(2) as pool:
        names, text, _ = pool.run(two_in_flight, backend)[0]
    assert names[0] == "StateError" and "in flight" in text


# Memory


def out_of_memory(shm_dir: str):  # type: ignore[no-untyped-def]
    """Received rows are held until the tmpfs is full; then the dispatch fails everywhere, and works when they go."""
    config = make_config("host", shm_dir=shm_dir, max_tokens_per_rank=4096)
    with EpBuffer(None, config) as buffer:
        x, idx = torch.ones(4096, 64), torch.zeros(4096, 2, dtype=torch.int64)
        held = []
        result = None
        while result is None and len(held) < 50:
            try:
                held.append(buffer.dispatch(x, idx))
            except CapacityError:
                result = attempt(buffer.dispatch, x, idx)
        del held
        assert result is not None, "the tmpfs never filled"
        assert works(buffer)
        return result


FULL_TMPFS = """
import json, sys
from tests.harness import run_ranks
from tests.test_faults import out_of_memory
print(json.dumps(run_ranks(2, out_of_memory, sys.argv[1])))
"""


@needs_host
def test_full_shared_memory(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=20m tmpfs "$0" || exit 77; exec "$@"'
    command = ["sh", "-c", mount, str(tmp_path), sys.executable, "-c", FULL_TMPFS, str(tmp_path)]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    # The mount is the job's own and ends with it. A user namespace gives the privilege to make it.
    for unshare in (["unshare", "--user", "--map-root-user", "--mount"], ["unshare", "--mount"]):
        done = subprocess.run([*unshare, *command], capture_output=True, text=True, timeout=120, env=environment)
        refused = done.returncode == 77 or done.stderr.startswith("unshare:")
        if not refused:
            break
    if refused:
        pytest.skip(f"mounting a small tmpfs needs privileges: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for names, text, _ in results:
        assert names[0] == "CapacityError" and "rank 0 has no room" in text, (names, text)
    assert "No space left on device" in results[0][1]


def no_memory_at_all(backend: str):  # type: ignore[no-untyped-def]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if torch.distributed.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    if backend == "host":
        return attempt(EpBuffer, None, make_config(backend))
    with EpBuffer(None, make_config("auto")) as buffer:
        assert works(buffer)
        return buffer.backend


@needs_host
def test_no_shared_memory_for_one_rank() -> None:
    """A named backend fails everywhere, with the rank and the reason; "auto" goes on without it."""
    with RankPool(2) as pool:
        for names, text, _ in pool.run(no_memory_at_all, "host"):
            assert names[0] == "BackendUnavailable" and "rank 1" in text and "File too large" in text, (names, text)
    with RankPool(2) as pool:
        assert pool.run(no_memory_at_all, "auto") == ["collective"] * 2


def exhaust_pool(pool_bytes: int):  # type: ignore[no-untyped-def]
    with EpBuffer(None, make_config("host", pool_bytes=pool_bytes)) as buffer:
        x, idx = tokens(buffer.rank)
        held = [buffer.dispatch(x, idx) for _ in range(12)]
        copied = buffer.stats.copied_out
        for out in held:
            assert torch.equal(out.x, held[0].x)
            assert torch.equal(buffer.combine(out.x, out.handle), 2 * x)
        del held, out
        assert works(buffer)
        return copied, buffer.stats.copied_out


@needs_host
def test_used_up_pool_copies_out() -> None:
    with RankPool(2) as pool:
        for copied, copied_later in pool.run(exhaust_pool, 64 << 10):
            assert 0 < copied < 12
            assert copied_later == copied, "freed leases were not used again"


# What a crash leaves behind


def hold(pool_size: int):  # type: ignore[no-untyped-def]
    buffer = EpBuffer(None, make_config("host"))
    assert works(buffer)
    globals()["_kept"] = buffer
    return pool_size


@needs_host
def test_sigkill_of_every_rank_leaves_nothing() -> None:
    with RankPool(3) as pool:
        pool.run(hold, 3)
        pids = pool.pids
        segments = shared_segments(pids)
        assert len(segments) == 3, "each rank has one segment"
        names = [name for held in segments.values() for name in held]
        assert all(name.endswith(" (deleted)") for name in names), "no segment has a name, even while in use"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    assert not segments.keys() & shared_segments(all_pids()).keys(), "some process still holds the memory"
    assert not segments.keys() & {entry.inode() for entry in os.scandir("/dev/shm")}


def others_survive(victim: int):  # type: ignore[no-untyped-def]
    """Two buffers on two groups: the fault of one must not touch the other."""
    pair = torch.distributed.new_group([0, 1])
    everyone = EpBuffer(None, make_config("host"))
    if torch.distributed.get_rank() == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    with EpBuffer(pair, make_config("host")) as small:
        assert works(small)
        failed = attempt(everyone.dispatch, *tokens(everyone.rank))
        assert works(small)
        everyone.close()
        assert works(small)
    return failed


@needs_host
def test_other_buffers_of_the_process_still_work() -> None:
    with RankPool(3) as pool:
        results = pool.run_with(others_survive, (2,), may_die=[2])
    for names, text, _ in results[:2]:
        assert names[0] == "PeerLost" and "rank 2" in text


@needs_host
def test_interrupt_ends_a_wait(tmp_path: Path) -> None:
    """Ctrl-C in a rank that waits for a peer raises KeyboardInterrupt, soon."""
    script = tmp_path / "wait.py"
    script.write_text(
        "import signal, sys, time, torch, torch.distributed as dist\n"
        "from moe_ep_plugin import EpBuffer, EpConfig\n"
        # A shell's background jobs, and CI may be one, start with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "rank = int(sys.argv[1])\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)\n"
        "config = EpConfig(num_experts=2, num_topk=1, hidden=64, max_tokens_per_rank=8, backend='host', device='cpu')\n"
        "buffer = EpBuffer(None, config)\n"
        "print('ready', flush=True)\n"
        "if rank == 1:\n"
        "    time.sleep(60)\n"
        "try:\n"
        "    buffer.dispatch(torch.zeros(1, 64).bfloat16(), torch.zeros(1, 1, dtype=torch.int64))\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
    )
    store = str(tmp_path / "store")
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(r), store], stdout=subprocess.PIPE, text=True)
        for r in (0, 1)
    ]
    try:
        for process in ranks:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        ranks[0].send_signal(signal.SIGINT)
        assert ranks[0].stdout is not None
        assert ranks[0].stdout.readline() == "interrupted\n"
    finally:
        for process in ranks:
            process.kill()
            process.wait()
