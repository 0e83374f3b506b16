"""Command line of the training job, and the checks that need no torch."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from . import saved
from .errors import UsageError


@dataclass(frozen=True)
class Launch:
    """What torchrun told this process; a plain ``python`` start is a job of one rank."""

    rank: int
    num_ranks: int
    local_rank: int
    num_local_ranks: int

    @staticmethod
    def from_environment() -> Launch:
        def number(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        ranks = number("WORLD_SIZE", 1)
        return Launch(number("RANK", 0), ranks, number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", ranks))


def fail(message: str, rank: int, *, everywhere: bool = True) -> NoReturn:
    """Say what is wrong, once for all ranks, and end this process with status 2.

    Args:
        message: What is wrong.
        rank: This rank.
        everywhere: All ranks fail in the same way. Otherwise this rank says it, whichever it is.
    """
    if not everywhere:
        print(f"error{f' on rank {rank}' if rank else ''}: {message}", file=sys.stderr, flush=True)
    elif rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        # torchrun stops every rank as soon as one has failed: leave rank 0 the time to say why.
        time.sleep(3)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Reports errors as UsageError, so that they are printed by one rank."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def need_modules(*names: str) -> None:
    """Raise UsageError if one can't be imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} missing; run in the repository: pip install '.[examples]'")


def add_backend(group: argparse._ArgumentGroup, what: str) -> None:
    """The option ``--backend``; ``what`` it decides."""
    group.add_argument("--backend", choices=("auto", "cuda", "host", "collective"), default="auto", help=what)


def add_expert_parallel(group: argparse._ArgumentGroup) -> None:
    """The option ``--expert-parallel``, for :func:`check_expert_parallel`."""
    group.add_argument("--expert-parallel", type=count, help="ranks that share one set of experts; default: all")


def check_expert_parallel(options: argparse.Namespace, num_ranks: int) -> int:
    """``--expert-parallel``, with its default set; raises UsageError unless it divides the ranks."""
    if options.expert_parallel is None:
        options.expert_parallel = num_ranks
    ep: int = options.expert_parallel
    if num_ranks % ep:
        raise UsageError(f"--expert-parallel {ep}: it must divide the number of ranks, {num_ranks}")
    return ep


def check_sizes(options: argparse.Namespace) -> None:
    """Raise UsageError unless a model can have these ``topk``, ``experts`` and ``hidden_size``."""
    if options.topk > options.experts:
        raise UsageError(f"--topk {options.topk}: there are only {options.experts} experts (--experts)")
    if options.hidden_size % 32:
        raise UsageError(f"--hidden-size {options.hidden_size}: it must be a multiple of 32, the size of a head")


def check_folders(options: argparse.Namespace, *names: str) -> None:
    """Raise UsageError if what is to become a folder is something else."""
    for name in names:
        path = getattr(options, name)
        if path is not None and path.exists() and not path.is_dir():
            raise UsageError(f"--{name} {path}: it exists and is not a directory")


def _at_least(low: int, text: str) -> int:
    value = int(text)
    if value < low:
        raise argparse.ArgumentTypeError(f"{value} is below {low}")
    return value


def count(text: str) -> int:
    """A number of things, as argparse's type."""
    return _at_least(1, text)


def _count_or_zero(text: str) -> int:
    return _at_least(0, text)


count.__name__ = _count_or_zero.__name__ = "whole number"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="pretrain_megatron_moe.py",
        description="Train a byte-level GPT with Mixture-of-Experts layers on Megatron-Core.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text files, or directories of them (held in memory by every rank); "
        "without it, the Python standard library's sources",
    )
    data.add_argument("--seq-length", type=count, default=128, help="bytes in a training window")
    data.add_argument("--micro-batch-size", type=count, default=8, help="windows per rank and step")
    data.add_argument("--seed", type=_count_or_zero, default=1, help="decides the initial weights and the data order")

    model = parser.add_argument_group("model")
    model.add_argument("--layers", type=count, default=3, help="transformer layers, each with experts")
    model.add_argument("--hidden-size", type=count, default=128, help="a multiple of 32, the size of a head")
    model.add_argument("--experts", type=count, default=8, help="experts in a layer")
    model.add_argument("--topk", type=count, default=2, help="experts that a token is sent to")
    model.add_argument("--shared-expert", action="store_true", help="add an expert that every token goes to")
    model.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and activations")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=count, default=300, help="optimizer steps")
    training.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    training.add_argument("--eval-interval", type=count, default=50, help="steps between validations")
    training.add_argument("--eval-windows", type=count, default=256, help="held-out windows, the same every time")

    parallel = parser.add_argument_group("expert parallelism")
    parallel.add_argument(
        "--moe-token-dispatcher", choices=("deepep", "alltoall", "allgather"), default="deepep", help="deepep is ours"
    )
    parallel.add_argument(
        "--moe-ep-fp8",
        choices=("experts",),
        help="experts compute on FP8 rows, as they are dispatched; without it, nothing is quantised",
    )
    add_backend(parallel, "what moves the rows under deepep")
    add_expert_parallel(parallel)

    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="metrics.jsonl and loss.png go here")
    output.add_argument("--save", type=Path, help="directory of checkpoints; default: OUT/checkpoints, if interrupted")
    output.add_argument("--save-interval", type=count, help="steps between checkpoints; default: only at the end")
    output.add_argument("--load", type=Path, help="directory of checkpoints to go on from, as if never stopped")
    return parser


def parse_options(argv: list[str], num_ranks: int) -> argparse.Namespace:
    """Read and check the command line.

    Raises:
        UsageError: An option has a value that can't work; says which and what would.
    """
    options = _parser().parse_args(argv)
    ep = check_expert_parallel(options, num_ranks)
    if options.experts % ep:
        raise UsageError(
            f"--experts {options.experts}: it must be a multiple of the {ep} ranks that share them "
            "(--expert-parallel); Megatron-Core spreads experts evenly"
        )
    check_sizes(options)
    if options.moe_ep_fp8 and options.moe_token_dispatcher != "deepep":
        raise UsageError(
            f"--moe-ep-fp8 {options.moe_ep_fp8}: --moe-token-dispatcher {options.moe_token_dispatcher} sends no FP8 "
            "rows; use deepep"
        )
    if not options.lr > 0:
        raise UsageError(f"--lr {options.lr}: it must be above 0")
    if options.save_interval is not None and options.save is None:
        raise UsageError("--save-interval: say where to with --save DIR")
    check_folders(options, "out", "save")
    if options.load is not None:
        saved.check_ranks(saved.find(options.load), num_ranks)
    return options


def without(option: str, argv: list[str]) -> list[str]:
    """``argv`` without ``option`` and its one value."""
    kept, skip = [], False
    for argument in argv:
        if not skip and argument != option and not argument.startswith(option + "="):
            kept.append(argument)
        skip = argument == option and not skip
    return kept
