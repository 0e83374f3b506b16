r"""Runs an unmodified Megatron script with our dispatcher.

    torchrun --nproc-per-node 4 -m moe_ep_plugin.integrations.megatron pretrain_gpt.py \
        --moe-token-dispatcher deepep --num-experts 8 ...

The script runs as ``__main__`` with its own directory first on the path, as if it had been started itself.
``moe_token_dispatcher_type="deepep"`` works in configs that it makes by hand, with or without the flag, and the
``--moe-ep-*`` options count there too. On a machine without a GPU, Megatron-Core is made to run on the CPU first.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

import torch

from .cpu import enable_cpu
from .flags import rewrite_argv
from .install import install

_USAGE = "usage: python -m moe_ep_plugin.integrations.megatron SCRIPT [ARGUMENTS...]"


def main(argv: Sequence[str]) -> None:
    """Run ``argv[0]`` with the arguments after it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{_USAGE}\n\n{__doc__}", file=sys.stderr)
        raise SystemExit(0 if argv else 2)
    script = os.path.abspath(argv[0])
    if not os.path.isfile(script):
        raise SystemExit(f"{_USAGE}\n{argv[0]} is not a file")
    arguments, options = rewrite_argv(argv[1:])
    sys.argv = [argv[0], *arguments]
    # Megatron may be a source tree beside the script, so the path comes before Megatron is imported.
    sys.path[0] = os.path.dirname(script)
    if not torch.cuda.is_available():
        enable_cpu()
    install(**options)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
