"""Runs a job on forked ranks, for programs that import a framework once and test it in several worlds."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

# Below what a test waits for the whole program, which it then kills without its ranks.
WORLD_SECONDS = 200.0

Job = Callable[[], dict[str, Any]]


def _rank(rank: int, size: int, job: Job, start: Callable[..., None], finish: Callable[[], None], folder: str) -> None:
    try:
        start(rank, size, folder)
        result = job()
        finish()
    except BaseException:
        result = {"error": traceback.format_exc()}
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(result, file)


def world(size: int, job: Job, start: Callable[..., None], finish: Callable[[], None]) -> list[dict[str, Any]]:
    """Run ``job`` on ``size`` forked ranks; returns their results. Ranks that overstay are ended.

    Args:
        size: Ranks.
        job: What every rank does.
        start: ``start(rank, size, folder)`` forms the process group, with a file store in ``folder`` if it wants.
        finish: Takes down what ``start`` and ``job`` made.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [fork.Process(target=_rank, args=(rank, size, job, start, finish, folder)) for rank in range(size)]
        for process in ranks:
            process.start()
        end = time.monotonic() + WORLD_SECONDS
        for process in ranks:
            process.join(max(0.0, end - time.monotonic()))
        for process in ranks:
            if process.is_alive():
                process.terminate()
            process.join()
        results = []
        for rank in range(size):
            path = f"{folder}/{rank}.json"
            lost = {"error": f"rank {rank} left no result, exit code {ranks[rank].exitcode}"}
            if not os.path.exists(path):
                results.append(lost)
                continue
            with open(path) as file:
                results.append(json.load(file))
    return results
