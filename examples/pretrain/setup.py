"""Joins the job: torch, Megatron-Core and the dispatcher, on whatever devices this machine has."""

from __future__ import annotations

import argparse
import os
import warnings

import torch
import torch.distributed as dist

from .options import Launch


def gpus_are_shared(launch: Launch) -> bool:
    """Whether several ranks compute on one GPU of this machine."""
    return torch.cuda.is_available() and launch.num_local_ranks > torch.cuda.device_count()


def join_ranks(launch: Launch, *, on_gpu: bool) -> torch.device:
    """Form the default process group; returns this rank's device."""
    if on_gpu:
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # Ranks that each use every core slow each other down; a container may be allowed fewer than there are.
        torch.set_num_threads(max(1, num_cores() // launch.num_local_ranks))
    # NCCL refuses two ranks on one GPU.
    kind = "cpu:gloo,cuda:nccl" if on_gpu and not gpus_are_shared(launch) else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(kind)
    else:
        dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    return device


def join(launch: Launch, options: argparse.Namespace) -> torch.device:
    """Prepare this process and form the process groups; returns the device to train on."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        # Megatron-Core passes functions to torch.compile, which takes minutes and a C++ compiler on a CPU.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    device = join_ranks(launch, on_gpu=on_gpu)

    # Both packages warn about options that are not used here.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed\.")
    from moe_ep_plugin.integrations import megatron
    from moe_ep_plugin.integrations.megatron.install import check_version

    # First, because what they raise for a version or a module that is missing says what to do about it.
    check_version()
    if not on_gpu:
        megatron.enable_cpu()
    # Changes nothing for layers of the other types.
    megatron.install(backend=options.backend, fp8=options.moe_ep_fp8 or "follow")

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=options.expert_parallel, expert_tensor_parallel_size=1
    )
    torch.manual_seed(options.seed)
    model_parallel_cuda_manual_seed(options.seed)
    return device


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def leave() -> None:
    """Take the process groups down, once every rank is done with them."""
    from megatron.core import parallel_state

    from moe_ep_plugin.integrations import megatron

    dist.barrier()
    megatron.uninstall()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
