"""Command line of the decode program, and the checks that need no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain import saved
from pretrain.data import VOCAB_SIZE
from pretrain.errors import UsageError
from pretrain.options import Parser, add_backend, check_folders, check_sizes, count

CHECKPOINTS = Path("runs/pretrain/checkpoints")
REMEDY = "train one with: make pretrain (or --save DIR there and --load DIR here), or try --random"
PROMPTS = ("def ", "class ", "import ", "    for ", "    return ", "if __name__", '"""Return ', "    self.")
# Of a --random model; a checkpoint has its own.
SIZES = {"layers": 4, "hidden_size": 256, "experts": 16, "topk": 2, "context": 128, "dtype": "fp32"}


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not 0 or above")
    return value


_temperature.__name__ = "number"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="decode_low_latency.py",
        description="Generate text with a model of pretrain_megatron_moe.py, its experts spread over the ranks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--load", type=Path, help=f"directory of checkpoints; without it, {CHECKPOINTS}")
    model.add_argument("--random", action="store_true", help="a model with random weights instead, to try the speed")
    for name, default in SIZES.items():
        flag = "--" + name.replace("_", "-")
        if name == "dtype":
            model.add_argument(flag, choices=("fp32", "bf16"), help=f"of a random model; without it, {default}")
        else:
            model.add_argument(flag, type=count, help=f"of a random model; without it, {default}")

    text = parser.add_argument_group("text")
    text.add_argument(
        "--prompt", action="append", help="what to go on from; several, one after the other, with several --prompt"
    )
    text.add_argument("--tokens", type=count, default=200, help="bytes to add to the longest prompt")
    text.add_argument("--batch", type=count, default=8, help="sequences of each rank")
    text.add_argument("--temperature", type=_temperature, default=0.0, help="0: always the likeliest byte")
    text.add_argument("--top-k", type=count, help="draw from so many of the likeliest bytes; needs --temperature")
    text.add_argument("--seed", type=count, default=1, help="of the draws, and of a random model")

    run = parser.add_argument_group("run")
    add_backend(run, "what moves the rows")
    run.add_argument("--wire", choices=("bf16", "fp8"), default="bf16", help="fp8: rows cross quantised to experts")
    run.add_argument("--no-graph", action="store_true", help="on GPUs, launch op by op instead of CUDA graphs")
    run.add_argument("--out", type=Path, default=Path("runs/decode"), help="texts, metrics and plot go here")

    check = parser.add_argument_group("check")
    check.add_argument(
        "--check", action="store_true", help="compare the loss on the held-out text with what training reported"
    )
    check.add_argument("--data", nargs="+", metavar="PATH", help="the training job's --data")
    check.add_argument("--eval-windows", type=count, default=256, help="the training job's --eval-windows")
    return parser


def parse_options(argv: list[str]) -> argparse.Namespace:
    """Read and check the command line; ``load`` becomes the folder of a checkpoint, or None with ``random``.

    Raises:
        UsageError: An option has a value that can't work; says which and what would.
    """
    options = _parser().parse_args(argv)
    if options.random:
        _set_sizes(options)
    else:
        for name in SIZES:
            if getattr(options, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')}: a checkpoint has its own; give it with --random only")
        options.load = _find(options.load)
    if options.top_k is not None and not options.temperature:
        raise UsageError(f"--top-k {options.top_k}: at --temperature 0 nothing is drawn; give a temperature")
    if options.top_k is not None and options.top_k > VOCAB_SIZE:
        raise UsageError(f"--top-k {options.top_k}: there are only {VOCAB_SIZE} bytes")
    if "" in (options.prompt or ()):
        raise UsageError("--prompt '': it is empty; give at least one character")
    check_folders(options, "out")
    return options


def _set_sizes(options: argparse.Namespace) -> None:
    for option in ("load", "check"):
        if getattr(options, option):
            raise UsageError(f"--{option}: a --random model has no checkpoint; leave one of the two out")
    for name, default in SIZES.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    check_sizes(options)


def _find(load: Path | None) -> Path:
    if load is None and not CHECKPOINTS.is_dir():
        raise UsageError(f"no checkpoint: {CHECKPOINTS} isn't there; {REMEDY}")
    try:
        return saved.find(load or CHECKPOINTS)
    except UsageError as error:
        raise UsageError(f"{error}; {REMEDY}") from None


def prompts_of(options: argparse.Namespace, num_ranks: int) -> list[list[bytes]]:
    """The prompts of every rank's sequences: those there are, dealt out in turn."""
    texts = [text.encode() for text in options.prompt or PROMPTS]
    first = [rank * options.batch for rank in range(num_ranks)]
    return [[texts[(start + i) % len(texts)] for i in range(options.batch)] for start in first]
