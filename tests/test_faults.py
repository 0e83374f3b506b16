"""Every fault is caused here, and must end in its typed error within the timeout, naming who or what.

Faults leave a process group in an odd state, so each test has a pool of its own.
"""

from __future__ import annotations

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

from moe_ep_plugin import EpBuffer, EpConfig, EpError
from moe_ep_plugin._extension import load_host
from tests.harness import RankDied, RankPool

TIMEOUT_S = 4.0
# Longest that a test allows for noticing a fault: the timeout, and slack for a busy machine.
NOTICED_S = TIMEOUT_S + 8.0


def host_missing() -> str | None:
    try:
        load_host()
    except EpError as error:
        return str(error)
    return None


needs_host = pytest.mark.skipif(host_missing() is not None, reason=f"host backend: {host_missing()}")
backends = pytest.mark.parametrize("backend", [pytest.param("host", marks=needs_host), "collective"])


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


@backends
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


@backends
def test_rank_that_never_dispatches(backend: str) -> None:
    with RankPool(3) as pool:
        results = pool.run(never_comes, backend)
    for first, second in results[:2]:
        names, text, seconds = first
        assert "PeerTimeout" in names, (names, text)
        assert seconds < NOTICED_S
        if backend == "host" and names[0] == "PeerTimeout":
            assert seconds >= TIMEOUT_S * 0.9
            assert re.search(r"rank \d waited 4 s for rank 2 \(pid \d+\)", text), text
            assert "expected operation 1, seen 0" in text
        assert second[0][0] == "StateError" and "has failed" in second[1]


def never_builds(backend: str):  # type: ignore[no-untyped-def]
    if torch.distributed.get_rank() == 1:
        time.sleep(TIMEOUT_S + 2.0)
        return None
    return attempt(EpBuffer, None, make_config(backend, timeout_s=TIMEOUT_S))


@backends
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


@backends
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


# Ranks that disagree


def disagree_on_config(backend: str):  # type: ignore[no-untyped-def]
    hidden = 64 if torch.distributed.get_rank() != 1 else 128
    return attempt(EpBuffer, None, make_config(backend, hidden=hidden))


@backends
def test_ranks_that_disagree_on_the_config(backend: str) -> None:
    with RankPool(3) as pool:
        for names, text, _ in pool.run(disagree_on_config, backend):
            assert names[0] == "PeerMismatch"
            assert "hidden (rank 0: 64; rank 1: 128)" in text


def disagree_on_operation(backend: str, what: str):  # type: ignore[no-untyped-def]
    buffer = EpBuffer(None, make_config(backend))
    x, idx = tokens(buffer.rank)
    out = buffer.dispatch(x, idx)
    odd = buffer.rank == 1
    if what == "operation":
        result = attempt(buffer.combine, out.x, out.handle) if odd else attempt(buffer.dispatch, x, idx)
    elif what == "layout":
        result = attempt(buffer.dispatch, x, idx, layout="rank" if odd else "expert")
    else:
        result = attempt(buffer.dispatch, x.bfloat16() if odd else x, idx)
    time.sleep(0.5)
    return result


@backends
@pytest.mark.parametrize(
    ("what", "named"), [("operation", "operation"), ("layout", "layout"), ("dtype", "element type|row_bytes")]
)
def test_ranks_that_disagree_on_an_operation(backend: str, what: str, named: str) -> None:
    with RankPool(3) as pool:
        results = pool.run(disagree_on_operation, backend, what)
    for names, text, _ in results:
        # A rank may learn of it from a peer that found it first and left.
        assert names[0] in ("PeerMismatch", "PeerLost"), (names, text)
    assert any(names[0] == "PeerMismatch" and re.search(named, text) and "rank 1" in text for names, text, _ in results)


# Wrong arguments: nothing is sent, and the buffer goes on working


def wrong_arguments(backend: str):  # type: ignore[no-untyped-def]
    with EpBuffer(None, make_config(backend)) as buffer:
        x, idx = tokens(buffer.rank)
        many = torch.zeros(257, 64)
        bad_id = idx.clone()
        bad_id[3, 1] = 8
        negative = idx.clone()
        negative[0, 0] = -2
        results = {
            "tokens": attempt(buffer.dispatch, many, torch.zeros(257, 2, dtype=torch.int64)),
            "dtype": attempt(buffer.dispatch, x.double(), idx),
            "shape": attempt(buffer.dispatch, x[:, :32], idx),
            "idx dtype": attempt(buffer.dispatch, x, idx.int()),
            "device": attempt(buffer.dispatch, x.to("meta"), idx),
            "id": attempt(buffer.dispatch, x, bad_id),
            "negative id": attempt(buffer.dispatch, x, negative),
        }
        assert works(buffer)
    results["closed"] = attempt(buffer.dispatch, x, idx)
    buffer.close()
    return results


@backends
def test_wrong_arguments(backend: str) -> None:
    with RankPool(2) as pool:
        results = pool.run(wrong_arguments, backend)
    expected = {
        "tokens": ("ConfigError", "257", "max_tokens_per_rank is 256"),
        "dtype": ("ConfigError", "x.dtype", "float64"),
        "shape": ("ConfigError", "x.shape", "[any, 64]"),
        "idx dtype": ("ConfigError", "topk_idx.dtype", "int64"),
        "device": ("ConfigError", "x.device", "meta"),
        "id": ("ConfigError", "topk_idx[3, 1] is 8", "0 to 7"),
        "negative id": ("ConfigError", "topk_idx[0, 0] is -2", "0 to 7"),
        "closed": ("StateError", "closed", "make a new one"),
    }
    for result in results:
        for what, (kind, *texts) in expected.items():
            names, text, _ = result[what]
            assert names[0] == kind, (what, names, text)
            assert all(t in text for t in texts), (what, text)


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


@backends
def test_two_operations_in_flight(backend: str) -> None:
    with RankPool(2) as pool:
        names, text, _ = pool.run(two_in_flight, backend)[0]
    assert names[0] == "StateError" and "in flight" in text


# Memory


def out_of_memory(shm_dir: str):  # type: ignore[no-untyped-def]
    """The tmpfs holds the control regions and little more: a large dispatch must fail, a small one work."""
    config = make_config("host", shm_dir=shm_dir, max_tokens_per_rank=1 << 16)
    with EpBuffer(None, config) as buffer:
        assert works(buffer)
        big = torch.zeros(1 << 16, 64)
        result = attempt(buffer.dispatch, big, torch.zeros(1 << 16, 2, dtype=torch.int64))
        assert works(buffer)
        return result


@needs_host
def test_full_shared_memory(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small tmpfs needs privileges: {mounted.stderr.decode().strip()}")
    try:
        with RankPool(2) as pool:
            results = pool.run(out_of_memory, str(tmp_path))
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
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


def keep_after_close():  # type: ignore[no-untyped-def]
    with EpBuffer(None, make_config("host")) as buffer:
        x, idx = tokens(buffer.rank)
        out = buffer.dispatch(x, idx)
        before = out.x.clone()
    return torch.equal(out.x, before)


@needs_host
def test_rows_outlive_their_buffer() -> None:
    with RankPool(2) as pool:
        assert pool.run(keep_after_close) == [True, True]


# What a crash leaves behind


def shared_files() -> set[str]:
    return set(os.listdir("/dev/shm"))


def kept_files_of(pids: list[int]) -> list[str]:
    """Names that a directory listing would show for the segments that these processes have open."""
    names = []
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("/dev/shm"):
                names.append(target)
    return names


def hold(pool_size: int):  # type: ignore[no-untyped-def]
    buffer = EpBuffer(None, make_config("host"))
    assert works(buffer)
    globals()["_kept"] = buffer
    return pool_size


@needs_host
def test_sigkill_of_every_rank_leaves_nothing() -> None:
    before = shared_files()
    with RankPool(3) as pool:
        pool.run(hold, 3)
        pids = pool.pids
        names = kept_files_of(pids)
        assert len(names) == 3, "each rank has one segment open"
        assert all(name.endswith("(deleted)") for name in names), "no segment has a name, even while in use"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    assert shared_files() == before


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


def test_interrupt_ends_a_wait(tmp_path: Path) -> None:
    """Ctrl-C in a rank that waits for a peer raises KeyboardInterrupt, soon."""
    if host_missing() is not None:
        pytest.skip(f"host backend: {host_missing()}")
    script = tmp_path / "wait.py"
    script.write_text(
        "import sys, time, torch, torch.distributed as dist\n"
        "from moe_ep_plugin import EpBuffer, EpConfig\n"
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
