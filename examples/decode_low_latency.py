"""Generate text with a model that ``pretrain_megatron_moe.py`` has trained, through the low-latency operations.

    torchrun --nproc-per-node 4 examples/decode_low_latency.py [--prompt "def " --tokens 200] [--help]

Each process is one rank: it holds a share of every layer's experts and decodes sequences of its own. There may be
GPUs or none, and ranks may share a GPU; there, a whole step is replayed from a CUDA graph. Megatron-Core is not
needed. The last line that it prints is ``RESULT`` and a JSON object. ``--check`` compares the loss on held-out text
with what the training job reported.
"""

from __future__ import annotations

import json
import sys

from decode.options import parse_options
from pretrain.data import load_corpus
from pretrain.errors import UsageError
from pretrain.options import Launch, fail, need_modules

NEEDED = ("moe_ep_plugin", "matplotlib")


def main(argv: list[str]) -> int:
    """Run one rank; returns its exit status."""
    launch = Launch.from_environment()
    try:
        options = parse_options(argv)
        corpus = load_corpus(options.data) if options.check else None
        need_modules(*NEEDED)
    except UsageError as error:
        fail(str(error), launch.rank)

    # Torch takes seconds to import; what could go wrong before has been checked.
    from decode import report
    from decode.check import compare
    from decode.job import Job

    from moe_ep_plugin import BackendUnavailable, ConfigError

    first = launch.rank == 0
    try:
        job = Job(options, launch, corpus)
    except (UsageError, BackendUnavailable, ConfigError) as error:
        fail(str(error), launch.rank, everywhere=False)

    shape, tokens_per_step = job.shape, options.batch * launch.num_ranks
    if first:
        origin = f"{job.checkpoint.folder}, step {job.checkpoint.step}" if job.checkpoint else "random weights"
        ranks = report.counted(launch.num_ranks, "rank")
        print(
            f"{origin}: {shape.layers} layers of {shape.experts} experts over {ranks}, {job.parameters:,} parameters "
            f"on this one; {tokens_per_step} sequences, {job.steps} steps"
            + (", each one CUDA graph" if job.graph else ""),
            flush=True,
        )
    text, texts = job.generate(report.Progress(job.steps, tokens_per_step) if first else None)
    exchange_ms = job.exchange_ms()
    loss = job.held_out_loss(corpus) if corpus is not None else None
    job.close()
    if not first:
        return 0

    report.show(texts)
    result = {
        **report.speed(text.step_ms, exchange_ms, tokens_per_step),
        "backend": job.backend,
        "ranks": launch.num_ranks,
        "graph": job.graph,
        "wire": options.wire,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "batch": options.batch,
        "steps": job.steps,
    }
    wrong = None
    if loss is not None and job.checkpoint is not None:
        losses, wrong = compare(loss, job.checkpoint, options.wire)
        result |= losses
    report.write(options.out, texts, text.step_ms, result)
    if wrong is not None:
        print(f"error: {wrong}", file=sys.stderr, flush=True)
    print("RESULT " + json.dumps(result), flush=True)
    return 0 if wrong is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
