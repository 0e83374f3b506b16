"""Joins the job: torch, DeepSpeed and our communication backend, on whatever devices this machine has."""

from __future__ import annotations

import argparse
import logging
import os
import warnings

import torch
import torch.distributed as dist
from pretrain.options import Launch
from pretrain.setup import gpus_are_shared, join_ranks


def join_ranks_for_deepspeed(launch: Launch) -> torch.device:
    """Form the process group before DeepSpeed is imported; returns the device to train on.

    DeepSpeed's engine computes on the GPU whose number is $LOCAL_RANK, which is there for as many ranks as GPUs only.
    Its own start would also tie the process group to that GPU.
    """
    on_gpu = torch.cuda.is_available()
    number = launch.local_rank % torch.cuda.device_count() if on_gpu else launch.local_rank
    os.environ["LOCAL_RANK"] = str(number)
    device = join_ranks(launch, on_gpu=on_gpu)
    if not on_gpu:
        from moe_ep_plugin.integrations.deepspeed import enable_cpu

        enable_cpu()
    return device


def zero_stage(launch: Launch, otherwise: int) -> int:
    """The ZeRO stage of a job that asks for none: of GPU tensors, gloo can't gather what stages above 0 gather."""
    return 0 if gpus_are_shared(launch) else otherwise


def join(launch: Launch, options: argparse.Namespace) -> torch.device:
    """Prepare this process and form the process group; returns the device to train on."""
    # Everything that they say is about options that are not used here.
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    device = join_ranks_for_deepspeed(launch)
    from moe_ep_plugin.integrations import deepspeed as integration

    integration.install(backend=options.backend, fp8_experts=options.fp8_experts)
    if options.zero is None:
        options.zero = zero_stage(launch, 0 if options.lora else 2)
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
