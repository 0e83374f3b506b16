"""Train a GPT with Mixture-of-Experts layers on Megatron-Core, its tokens dispatched by moe_ep_plugin.

    torchrun --nproc-per-node 4 examples/pretrain_megatron_moe.py [--moe-token-dispatcher alltoall] [--help]

Each process is one rank and holds a share of every layer's experts. There may be GPUs or none, and ranks may
share a GPU. Without options it learns the bytes of the Python standard library's sources. The last line that
it prints is ``RESULT`` and a JSON object. Ctrl-C saves a checkpoint and says how to go on from it.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys

from pretrain.data import check_length, load_corpus
from pretrain.errors import UsageError
from pretrain.options import Launch, fail, need_modules, parse_options, without

NEEDED = ("moe_ep_plugin", "megatron", "matplotlib", "tqdm")


def main(argv: list[str]) -> int:
    """Run one rank; returns its exit status."""
    # Until training starts there is nothing to save: Ctrl-C ends the process at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    launch = Launch.from_environment()
    try:
        options = parse_options(argv, launch.num_ranks)
        corpus = load_corpus(options.data)
        check_length(corpus, options.seq_length)
        need_modules(*NEEDED)
    except UsageError as error:
        fail(str(error), launch.rank)

    # Torch and Megatron-Core take many seconds to import; what could go wrong before has been checked.
    from pretrain import setup

    from moe_ep_plugin import BackendUnavailable, ConfigError

    try:
        device = setup.join(launch, options)
        from pretrain.trainer import Trainer

        trainer = Trainer(options, launch, corpus, device)
        trainer.run()
    except (UsageError, BackendUnavailable, ConfigError) as error:
        fail(str(error), launch.rank, everywhere=False)
    result = trainer.result() if launch.rank == 0 and not trainer.interrupted else None
    setup.leave()
    if trainer.interrupted:
        if launch.rank == 0:
            again = [*without("--load", without("--save", argv)), "--save", str(trainer.checkpoints)]
            start = f"torchrun --nproc-per-node {launch.num_ranks} {sys.argv[0]}"
            print(
                f"\ninterrupted after step {trainer.step} of {options.steps}; saved in {trainer.checkpoints}\n"
                f"go on with: {start} {shlex.join([*again, '--load', str(trainer.checkpoints)])}",
                flush=True,
            )
        return 128 + trainer.interrupted
    if result is not None:
        print("RESULT " + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
