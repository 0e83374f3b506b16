"""What bench_throughput.py compares its figures with."""

from __future__ import annotations

from dataclasses import dataclass

from throughput_data import Shape


@dataclass(frozen=True)
class Target:
    """µs a call: what this project set itself (bar, stretch), and DeepEP V1 on an H200, same rig."""

    bar: int | None
    stretch: int | None
    deepep: int | None
    beside: str = ""  # Work that DeepEP leaves to another kernel, not in its figure.


# targets: bars and stretch goals that were set before the kernels were written, for one H200 with ranks as processes
# under MPS and the workload of bench_throughput.py. DeepEP V1 (commit 567632d) was measured on that rig with the same
# shapes. Keys are ranks x SMs a rank.
TARGETS: dict[str, dict[str, Target]] = {
    "8x16": {
        "dispatch_rank": Target(850, 760, 2554),
        "dispatch_rank_handle": Target(None, None, 2430),
        "dispatch_rank_fp8": Target(580, 470, 1453),
        "dispatch_rank_fp8_handle": Target(None, None, 1362),
        "combine_rank": Target(800, 740, 2296),
        "combine_rank_any": Target(1900, 1500, 2296),
        "dispatch_expert": Target(1200, 1080, 2554, "permute"),
        "combine_expert": Target(1100, 1030, 2296, "unpermute"),
    },
    "4x24": {
        "dispatch_rank": Target(350, 310, 1141),
        "dispatch_rank_handle": Target(None, None, 1104),
        "dispatch_rank_fp8": Target(230, 190, 610),
        "dispatch_rank_fp8_handle": Target(None, None, 589),
        "combine_rank": Target(330, 290, 901),
        "combine_rank_any": Target(None, None, 901),
        "dispatch_expert": Target(None, None, 1141, "permute"),
        "combine_expert": Target(None, None, 901, "unpermute"),
    },
    "2x24": {
        "dispatch_rank": Target(210, 175, 440),
        "dispatch_rank_handle": Target(None, None, 386),
        "dispatch_rank_fp8": Target(150, 120, 329),
        "dispatch_rank_fp8_handle": Target(None, None, 260),
        "combine_rank": Target(225, 180, 460),
        "combine_rank_any": Target(None, None, 460),
        "dispatch_expert": Target(None, None, 440, "permute"),
        "combine_expert": Target(None, None, 460, "unpermute"),
    },
}
TARGET_GPU = "H200"
TARGET_SHAPE = Shape(tokens=4096, hidden=7168, topk=8, experts=256)
