"""What backend ``"cuda"`` decides before anything runs: SMs, and how rows reach the experts' order."""

from __future__ import annotations

from ..errors import ConfigError

# More SMs than this gain little: with 2 ranks on an H200, 24 of the 64 that each could have do a dispatch or a combine
# at 89 % of their speed (docs/performance.md).
_MOST_USEFUL_SMS = 24
# Among more than two GPUs links are full with fewer, and what does not fit queues up in them: in two stages, 4 H200,
# a dispatch and a combine took 1038 us with 16 and 1095 with 24, with FP8 rows 858 and 954.
_MOST_STAGED_SMS = 16
# Of what stays in a GPU's memory: with 64 of 132 SMs on an H100, sums of rows run at three quarters of their speed.
_MOST_USEFUL_LOCAL_SMS = 64
# NVLink over HBM, each way: 450 GB/s of 4.2 TB/s on an H200. PCIe makes two stages pay the more.
LINK_SHARE = 0.107


def default_local_sms(num_sms: int | None, device_sms: int, ranks_on_device: int) -> int:
    """SMs of kernels that stay on a GPU: as many as others where those are asked for, else what keeps memory busy."""
    return num_sms or max(1, min(_MOST_USEFUL_LOCAL_SMS, device_sms // ranks_on_device))


def default_num_sms(device_sms: int, ranks_on_device: int, *, staged_gpus: int = 0) -> int:
    """SMs of one rank where none are asked for: its share of the GPU, up to what still helps.

    Args:
        device_sms: SMs of its GPU.
        ranks_on_device: Ranks on it.
        staged_gpus: For dispatch and combine of a buffer of two stages, GPUs that take part; else 0.
    """
    most = _MOST_STAGED_SMS if staged_gpus > 2 else _MOST_USEFUL_SMS
    return max(1, min(most, device_sms // ranks_on_device))


def direct_moves_fewer_bytes(num_ranks: int, num_topk: int, link_share: float) -> bool:
    """Whether layout ``"expert"`` is made faster by writing every copy from the sender than in two stages.

    Time of one token's rows over the slowest resource, for uniformly random experts. A token reaches
    ``R (1 - (1 - 1/R)^K)`` ranks. Directly, K rows leave it, ``K (R - 1) / R`` of them over the link. In two stages
    one row a rank crosses, and the receiver then reads each and writes K.

    Args:
        num_ranks: R.
        num_topk: K.
        link_share: Bandwidth of the link between ranks, relative to that of memory (reads and writes added).
    """
    ranks_reached = num_ranks * (1 - (1 - 1 / num_ranks) ** num_topk)
    remote = (num_ranks - 1) / num_ranks
    direct = max(num_topk * remote / link_share, 1 + num_topk)
    two_stage = max(ranks_reached * remote / link_share, 1 + ranks_reached) + ranks_reached + num_topk
    return direct <= two_stage


def check_sms(num_sms: int | None, device_sms: int, ranks_on_device: int, name: str = "num_sms") -> None:
    """Ranks on one GPU wait for each other, so all their blocks must find room on it at the same time.

    Under ``CUDA_MPS_ACTIVE_THREAD_PERCENTAGE`` a process sees its share of the SMs alone, and that is what counts:
    nothing keeps the shares of two processes apart. Four with a quarter each, of whose 33 SMs a rank used 24, came to a
    halt.
    """
    if num_sms is not None and num_sms * ranks_on_device > device_sms:
        raise ConfigError.of(
            name,
            num_sms,
            f"{ranks_on_device} ranks share a GPU of {device_sms} SMs",
            f"use at most {device_sms // ranks_on_device}",
        )
