"""What bench_low_latency.py compares its figures with."""

from __future__ import annotations

from dataclasses import dataclass

FLOOR_BYTES_PER_S = 4.25e12
"""Bytes read + written by a large device-to-device copy on an H200; docs/performance.md."""

TARGET_GPU = "H200"
TARGET_SHAPE = {"hidden": 7168, "topk": 8, "experts": 256}


@dataclass(frozen=True)
class Target:
    """µs a call that this project set itself before the kernels were written."""

    bar: float
    stretch: float


# By ranks x SMs a rank, and tokens a rank; for one H200 with ranks as processes under MPS.
TARGETS: dict[tuple[str, int], dict[str, Target]] = {
    ("8x16", 128): {
        "dispatch_fp8": Target(40, 30),
        "combine_zero_copy": Target(55, 42),
        "combine_any": Target(80, 65),
        "combine_registered": Target(80, 65),
    },
    ("2x64", 128): {"dispatch_fp8": Target(20, 14), "combine_zero_copy": Target(25, 18)},
    ("8x16", 8): {"dispatch_fp8": Target(15, 10), "combine_zero_copy": Target(15, 10)},
}


@dataclass(frozen=True)
class Published:
    """µs a call that others published, on other hardware: 8 GPUs, each with a memory of its own, over a network."""

    deepep: float
    pplx: float


# 128 tokens a rank on 8 ranks, hidden 7168, top-8 of 256, fp8 dispatch and bf16 combine: DeepEP V1 on H800 with RDMA
# (its README), pplx-garden on H100 with ConnectX-7 (its README).
PUBLISHED_AT = (8, 128)
PUBLISHED = {
    "dispatch_fp8": Published(77, 50.5),
    "combine_zero_copy": Published(114, 65.3),
    "combine_any": Published(114, 65.3),
    "combine_registered": Published(114, 65.3),
}
