"""Joins the job: torch, DeepSpeed and our communication backend, on whatever devices this machine has."""

from __future__ import annotations

import argparse
import logging
import os
import warnings

import torch
import torch.distributed as dist
from pretrain.options import Launch


def join(launch: Launch, options: argparse.Namespace) -> torch.device:
    """Prepare this process and form the process group; returns the device to train on."""
    # Everything that they say is about options that are not used here.
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ |= {"HF_HUB_OFFLINE": "1", "LOCAL_RANK": str(launch.local_rank)}
    from moe_ep_plugin.integrations import deepspeed as integration

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Ranks that each use every core slow each other down.
        torch.set_num_threads(max(1, cores // launch.num_local_ranks))
        integration.enable_cpu()
    integration.install(backend=options.backend)
    # NCCL refuses two ranks on one GPU, and of GPU tensors gloo moves what all-reduces and broadcasts move.
    shared = on_gpu and launch.num_local_ranks > torch.cuda.device_count()
    kind = "cpu:gloo,cuda:nccl" if on_gpu and not shared else "gloo"
    if options.zero is None:
        options.zero = 0 if options.lora or shared else 2
    if "RANK" in os.environ:
        dist.init_process_group(kind)
    else:
        dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Takes the group that is there.
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return device


def leave() -> None:
    """Take the process groups down, once every rank is done with them."""
    from moe_ep_plugin.integrations import deepspeed as integration

    dist.barrier()
    integration.uninstall()
    dist.destroy_process_group()
