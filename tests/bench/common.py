"""What the benchmarks share: ranks, timing of alternating contestants, tables and JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def start_rank() -> tuple[int, int]:
    """Join the gloo group that torchrun describes, with one compute thread; returns (rank, size)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def time_in_turn(contestants: dict[str, Callable[[], object]], iterations: int, warmup: int = 3) -> dict[str, float]:
    """Median milliseconds of each contestant, the slowest rank counting, all ranks starting together.

    Contestants take turns within every iteration, so a drift of the machine's speed meets all alike.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for iteration in range(iterations + warmup):
        for name, run in contestants.items():
            dist.barrier()
            started = time.perf_counter()
            run()
            spent = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
            dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            if iteration >= warmup:
                times[name].append(float(spent) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def machine() -> dict[str, object]:
    """Facts a reader needs to judge a figure."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x), model)
    return {"cpu": model, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}


def driver_version() -> str | None:
    """Version of the NVIDIA kernel driver, or None where there is none to ask."""
    told = Path("/proc/driver/nvidia/version")
    if told.exists():
        numbers = re.findall(r"\b\d{3,}\.\d+(?:\.\d+)?\b", told.read_text())
        if numbers:
            return numbers[0]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def gpu_facts(device: torch.device) -> dict[str, object]:
    """Facts a reader needs to judge a figure of a GPU; empty for a CPU."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
    }


def ranks_sharing(ranks: int, device: torch.device) -> int:
    """Most ranks on one GPU, where ranks are dealt over the GPUs in turn; all of them on a CPU."""
    return -(-ranks // gpus_used(ranks, device))


def gpus_used(ranks: int, device: torch.device) -> int:
    """GPUs that this many ranks are dealt over; a CPU counts as one."""
    return min(ranks, torch.cuda.device_count()) if device.type == "cuda" else 1


def write_json(path: str | None, results: object) -> None:
    """Write results where the caller asked for it."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(results, indent=2) + "\n")
