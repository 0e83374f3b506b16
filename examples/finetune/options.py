"""Command line of the fine-tuning job, and the checks that need no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.errors import UsageError
from pretrain.options import (
    Parser,
    add_backend,
    add_expert_parallel,
    check_expert_parallel,
    check_folders,
    check_sizes,
    count,
)

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")
LORA_RATE = 1e-2
FULL_RATE = 1e-3


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="finetune_deepspeed_moe.py",
        description="Fine-tune a Hugging Face MoE model with DeepSpeed (ZeRO, AutoEP) and moe_ep_plugin.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        type=Path,
        help="directory of a Hugging Face checkpoint (config.json, *.safetensors); each rank reads its experts alone. "
        "Without it a small model is made, trained on --source-data and saved in OUT/base first",
    )
    model.add_argument("--family", choices=FAMILIES, default="qwen3_moe", help="of the small model")
    model.add_argument("--layers", type=count, default=2, help="of the small model")
    model.add_argument("--hidden-size", type=count, default=128, help="of the small model, a multiple of 32")
    model.add_argument("--experts", type=count, default=8, help="of the small model, in a layer")
    model.add_argument("--topk", type=count, default=2, help="experts that a token of the small model is sent to")
    model.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and activations")
    model.add_argument("--lora", type=count, metavar="RANK", help="train adapters of this rank on attention only")

    data = parser.add_argument_group("data")
    data.add_argument("--data", nargs="+", metavar="PATH", help="text to fine-tune on; default: Python's manual")
    data.add_argument(
        "--source-data", nargs="+", metavar="PATH", help="text that the model comes from; default: Python's own sources"
    )
    data.add_argument("--seq-length", type=count, default=128, help="tokens in a training window")
    data.add_argument("--micro-batch-size", type=count, default=8, help="windows per rank and step")
    data.add_argument("--seed", type=int, default=1, help="decides the initial weights and the data order")

    training = parser.add_argument_group("training")
    training.add_argument("--base-steps", type=count, default=300, help="steps that the small model is trained first")
    training.add_argument("--base-lr", type=float, default=4e-3, help="peak learning rate then")
    training.add_argument("--steps", type=count, default=200, help="steps of fine-tuning")
    training.add_argument("--lr", type=float, help=f"peak learning rate; default: {FULL_RATE}, with --lora {LORA_RATE}")
    training.add_argument("--eval-windows", type=count, default=128, help="held-out windows, the same every time")
    training.add_argument(
        "--zero",
        type=int,
        choices=(0, 1, 2, 3),
        help="ZeRO stage; default: 2; with --lora, or where ranks share a GPU, 0",
    )

    parallel = parser.add_argument_group("expert parallelism")
    parallel.add_argument(
        "--comm-backend", choices=("deepep", "comm"), default="deepep", help="of AutoEP; deepep is ours"
    )
    add_backend(parallel, "what moves the rows under deepep")
    parallel.add_argument(
        "--fp8-experts",
        action="store_true",
        help="experts compute on FP8 rows as they were dispatched, in all training and evaluation of the job",
    )
    add_expert_parallel(parallel)

    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("runs/finetune"), help="everything goes here")
    output.add_argument("--save-interval", type=count, help="steps between checkpoints in OUT/checkpoints")
    output.add_argument("--resume", action="store_true", help="go on from the newest of OUT/checkpoints")
    return parser


def parse_options(argv: list[str], num_ranks: int) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        UsageError: An option has a value that can't work; says which and what would.
    """
    options = _parser().parse_args(argv)
    ep = check_expert_parallel(options, num_ranks)
    if options.lr is None:
        options.lr = LORA_RATE if options.lora else FULL_RATE
    if options.model is None:
        if options.experts % ep:
            raise UsageError(f"--experts {options.experts}: it must be a multiple of --expert-parallel, {ep}")
        check_sizes(options)
    elif not (options.model / "config.json").is_file():
        raise UsageError(f"--model {options.model}: there is no config.json in it; name a Hugging Face checkpoint")
    for name in ("lr", "base_lr"):
        if not getattr(options, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: it must be above 0")
    if options.lora and options.zero:
        raise UsageError(
            f"--lora with --zero {options.zero}: DeepSpeed shards the optimizer of a MoE model only if experts are "
            "trained, and adapters leave them as they are; leave --zero out"
        )
    if options.fp8_experts:
        _check_fp8_experts(options)
    check_folders(options, "out")
    if options.resume:
        if not (options.out / "checkpoints" / "latest").is_file():
            raise UsageError(
                f"--resume: no checkpoint in {options.out / 'checkpoints'}; run with --save-interval first"
            )
        if options.model is None and not (options.out / "base" / "config.json").is_file():
            raise UsageError(f"--resume: {options.out / 'base'} holds no model; start again without --resume")
    return options


def _check_fp8_experts(options: argparse.Namespace) -> None:
    if options.comm_backend != "deepep":
        raise UsageError(f"--fp8-experts with --comm-backend {options.comm_backend}: FP8 rows come from deepep alone")
    if options.expert_parallel == 1:
        raise UsageError("--fp8-experts: with one rank to an expert-parallel group nothing is dispatched; start more")
    if options.zero == 3:
        raise UsageError("--fp8-experts with --zero 3: experts are quantised whole; use --zero 2")
