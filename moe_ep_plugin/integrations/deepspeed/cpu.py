"""DeepSpeed on a machine without a GPU."""

from __future__ import annotations

import os

import torch

from ...errors import ConfigError
from .upstream import import_deepspeed


def enable_cpu() -> None:
    """Make DeepSpeed use the CPU and gloo in this process, without compiling anything. Idempotent.

    Call it before ``deepspeed.init_distributed``. DeepSpeed otherwise compiles a communication kernel for CPUs at the
    first start, which takes about a minute, and fails without a C++ compiler.

    Raises:
        ConfigError: This machine has a GPU.
        BackendUnavailable: DeepSpeed can't be imported.
    """
    if torch.cuda.is_available():
        raise ConfigError.of(
            "torch.cuda.is_available()",
            True,
            "enable_cpu() would keep DeepSpeed from the GPU",
            "leave the call out, or hide the GPUs with CUDA_VISIBLE_DEVICES=''",
        )
    os.environ["DS_ACCELERATOR"] = "cpu"
    # torch.distributed works without it; DeepSpeed asks whether it is there.
    import_deepspeed("deepspeed.comm.torch").build_shm_op = _no_kernel


def _no_kernel() -> None:
    return None
