"""Runs a function on N ranks: N processes that share a gloo group, kept for as many calls as wanted.

    with RankPool(4) as pool:
        sums = pool.run(add_ranks, 10)  # add_ranks(10) on every rank; one result a rank

A call that fails anywhere raises :class:`RankFailure` with the traceback of each failing rank; one that does
not end in time raises it with the stack of every rank that hangs. Either way all processes of the pool are
killed, and the next call starts fresh ones. Functions and arguments are pickled, so functions must be at the
top level of an importable module; draw random cases in the parent and send seeds.

Processes are forked from one server that has imported torch already: a pool starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

P = ParamSpec("P")
T = TypeVar("T")

# Once a rank has failed, how long the others get to answer before they are taken to be waiting for it.
_GRACE_S = 1.0
_START_S = 60.0


class RankFailure(AssertionError):
    """A rank raised, died or hung; the text has each rank's traceback or stack."""


class RankDied:
    """Stands for the result of a rank that was allowed to die and did."""

    def __repr__(self) -> str:
        return "<rank died>"


@dataclass
class _Answer:
    value: Any = None
    error: str | None = None


@dataclass
class _Worker:
    process: Any
    connection: Connection
    stacks: Path


class RankPool:
    """Processes with ranks 0 to ``num_ranks - 1`` of a gloo group on the loopback interface.

    Args:
        num_ranks: How many.
        timeout_s: Longest time for one :meth:`run`.
        group_timeout_s: The process group's own limit for a collective.
        env: Environment variables set in every rank before its group starts.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        timeout_s: float = 60.0,
        group_timeout_s: float = 60.0,
        env: dict[str, str] | None = None,
    ) -> None:
        self.num_ranks = num_ranks
        self.timeout_s = timeout_s
        self._group_timeout_s = group_timeout_s
        self._env = env or {}
        self._workers: list[_Worker] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty before the first run and after a failure."""
        return [worker.process.pid for worker in self._workers]

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """Call ``function`` on every rank and return the results by rank.

        Raises:
            RankFailure: Some rank raised, died or did not answer within ``timeout_s``.
        """
        return self.run_with(function, args, kwargs)

    def run_with(
        self,
        function: Callable[..., T],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        may_die: Collection[int] = (),
    ) -> list[T]:
        """As :meth:`run`, where the ranks in ``may_die`` may end; theirs is a :class:`RankDied`."""
        message = pickle.dumps((function, args, kwargs or {}))
        self.start()
        try:
            for worker in self._workers:
                worker.connection.send_bytes(message)
            answers = self._collect(self.timeout_s, may_die)
        except BaseException:
            # Interrupted or broken: the ranks may be anywhere by now, so none of them can be used again.
            self.close()
            raise
        failed = {rank: a.error for rank, a in answers.items() if a.error is not None}
        if failed:
            self.close()
            name = getattr(function, "__qualname__", repr(function))
            parts = [f"--- rank {rank} of {self.num_ranks} in {name}:\n{text}" for rank, text in failed.items()]
            raise RankFailure("\n".join(["", *parts]))
        if any(isinstance(a.value, RankDied) for a in answers.values()):
            self.close()
        return [answers[rank].value for rank in range(self.num_ranks)]

    def start(self) -> None:
        """Start the processes unless they run already."""
        if self._workers:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="moe-ep-ranks-")
        folder = Path(self._folder.name)
        context = _server()
        try:
            for rank in range(self.num_ranks):
                ours, theirs = context.Pipe()
                stacks = folder / f"stacks.{rank}"
                process = context.Process(
                    target=_serve,
                    args=(
                        theirs,
                        rank,
                        self.num_ranks,
                        str(folder / "store"),
                        str(stacks),
                        self._group_timeout_s,
                        self._env,
                    ),
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours, stacks))
            answers = self._collect(_START_S, ())
            failed = [f"rank {rank}: {a.error}" for rank, a in answers.items() if a.error is not None]
            if failed:
                raise RankFailure("ranks did not start:\n" + "\n".join(failed))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill every process of the pool; idempotent."""
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(10)
            worker.connection.close()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _collect(self, timeout_s: float, may_die: Collection[int]) -> dict[int, _Answer]:
        answers: dict[int, _Answer] = {}
        deadline = time.monotonic() + timeout_s
        by_connection = {worker.connection: rank for rank, worker in enumerate(self._workers)}
        while by_connection:
            ready = wait(list(by_connection), max(0.0, deadline - time.monotonic()))
            if not ready:
                stuck = list(by_connection.values())
                others_failed = any(a.error is not None for a in answers.values())
                why = "was still busy after another rank had failed" if others_failed else f"hung for {timeout_s:g} s"
                for rank, stack in self._stacks(stuck).items():
                    answers[rank] = _Answer(error=f"{why}; its stack:\n{stack}")
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = by_connection.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    answers[rank] = self._dead(rank, rank in may_die)
                if answers[rank].error is not None:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        return dict(sorted(answers.items()))

    def _dead(self, rank: int, allowed: bool) -> _Answer:
        if allowed:
            return _Answer(value=RankDied())
        process = self._workers[rank].process
        process.join(5)
        stacks = self._workers[rank].stacks
        text = stacks.read_text() if stacks.exists() else ""
        return _Answer(error=f"process died with exit code {process.exitcode}\n{text}")

    def _stacks(self, ranks: list[int]) -> dict[int, str]:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._workers[rank].process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        return {rank: self._workers[rank].stacks.read_text() for rank in ranks}


def run_ranks(num_ranks: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
    """Call ``function`` once on ``num_ranks`` fresh processes; see :meth:`RankPool.run`."""
    with RankPool(num_ranks) as pool:
        return pool.run(function, *args, **kwargs)


def pools_of(kind: Callable[[int], RankPool]) -> Iterator[Callable[[int], RankPool]]:
    """Body of a fixture: gives ``ranks(n)``, one pool of n ranks for all who ask, and closes them in the end."""
    pools: dict[int, RankPool] = {}

    def pool_of(num_ranks: int) -> RankPool:
        return pools.setdefault(num_ranks, kind(num_ranks))

    yield pool_of
    for pool in pools.values():
        pool.close()


def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "numpy", "moe_ep_plugin", "tests.harness"])
    return context


def _serve(
    connection: Connection,
    rank: int,
    num_ranks: int,
    store: str,
    stacks: str,
    group_timeout_s: float,
    env: dict[str, str],
) -> None:
    """Body of a rank: join the group, then answer calls until the parent goes."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the fork server ends with the parent, a rank with it
    # Freed and fresh memory is filled with a pattern, large blocks too, so that reading either shows.
    libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    libc.mallopt(-6, 0x5A)  # M_PERTURB
    with open(stacks, "w") as stacks_file:
        faulthandler.enable(stacks_file)
        faulthandler.register(signal.SIGUSR1, stacks_file, all_threads=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"} | env
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=group_timeout_s),
        )
        connection.send_bytes(pickle.dumps(_Answer()))
        while True:
            try:
                message = connection.recv_bytes()
            except (EOFError, ConnectionResetError):
                break
            try:
                function, args, kwargs = pickle.loads(message)
                reply = pickle.dumps(_Answer(value=function(*args, **kwargs)))
            except BaseException:
                reply = pickle.dumps(_Answer(error=traceback.format_exc()))
            sys.stdout.flush()
            sys.stderr.flush()
            connection.send_bytes(reply)
        # No clean shutdown of the group: its other ranks may be gone.
        os._exit(0)
