"""Fine-tune a Hugging Face MoE model with DeepSpeed: ZeRO, AutoEP, and moe_ep_plugin as its communication backend.

    torchrun --nproc-per-node 4 examples/finetune_deepspeed_moe.py [--model DIR] [--data PATH...] [--lora 8] [--help]

Each process is one rank and reads and holds a share of every layer's experts. There may be GPUs or none. Without
``--model`` a small model is made and trained on the Python standard library's sources first; it is then fine-tuned on
Python's manual. The result is a checkpoint that transformers loads. The last line printed is ``RESULT`` and a JSON
object: losses before and after, also of the text that the model came from.
"""

from __future__ import annotations

import json
import sys

from finetune.options import parse_options
from finetune.text import source_text, target_text
from pretrain.errors import UsageError
from pretrain.options import Launch, fail, need_modules

NEEDED = ("moe_ep_plugin", "deepspeed", "transformers", "safetensors", "matplotlib", "tqdm")


def main(argv: list[str]) -> int:
    """Run one rank; returns its exit status."""
    launch = Launch.from_environment()
    try:
        options = parse_options(argv, launch.num_ranks)
        source, target = source_text(options.source_data), target_text(options.data)
        need_modules(*NEEDED, *(("peft",) if options.lora else ()))
    except UsageError as error:
        fail(str(error), launch.rank)

    # Torch, DeepSpeed and transformers take many seconds to import; what could go wrong before has been checked.
    from finetune import setup

    from moe_ep_plugin import BackendUnavailable, ConfigError

    try:
        device = setup.join(launch, options)
        from finetune.trainer import Trainer

        result = Trainer(options, launch, source, target, device).run()
    except (UsageError, BackendUnavailable, ConfigError) as error:
        fail(str(error), launch.rank, everywhere=False)
    setup.leave()
    if launch.rank == 0:
        print("RESULT " + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
