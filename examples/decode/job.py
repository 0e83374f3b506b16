"""One rank's decode job: joins the others, builds the model, generates, measures and checks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from pretrain.data import Corpus, held_out_windows
from pretrain.errors import UsageError
from pretrain.options import Launch
from pretrain.setup import join_ranks

from moe_ep_plugin import EpBuffer, EpConfig
from moe_ep_plugin.config import MAX_LOW_LATENCY_ROUTES

from .check import check_corpus, held_out_loss
from .generator import FREE, Generator, Sampling, Text
from .model import Decoder, Shape
from .moe import Exchange
from .options import prompts_of
from .program import Program, Stopwatch
from .weights import DTYPES, Checkpoint, randomise

EXCHANGE_RUNS = 50


class Job:
    """Builds or loads the model. Every rank holds the dense layers, its share of the experts and its own sequences.

    Args:
        options: The command line.
        launch: What torchrun said.
        corpus: The text that the model must have been trained on, if that is to be checked.

    Raises:
        UsageError: The checkpoint can't be used, or is of other text.

    Attributes:
        checkpoint: Where the model is from; None with random weights.
        shape: Sizes of the model.
        backend: What moves the rows.
        graph: Whether a step is replayed from CUDA graphs.
        parameters: How many this rank holds.
        steps: From the first byte of a prompt to the last one of the longest sequence.
    """

    def __init__(self, options: argparse.Namespace, launch: Launch, corpus: Corpus | None) -> None:
        self._options, self._launch = options, launch
        self.checkpoint = Checkpoint(options.load) if options.load else None
        self.shape = self.checkpoint.shape if self.checkpoint else _random_shape(options)
        if corpus is not None and self.checkpoint is not None:
            check_corpus(corpus, self.checkpoint)
        most = MAX_LOW_LATENCY_ROUTES // self.shape.topk
        if options.batch > most:
            raise UsageError(
                f"--batch {options.batch}: with {self.shape.topk} experts a token, low-latency operations take at most "
                f"{most} sequences of a rank; lower it"
            )
        on_gpu = torch.cuda.is_available() and options.backend != "host"
        self._device = device = join_ranks(launch, on_gpu=on_gpu)
        self._buffer = EpBuffer(
            None,
            EpConfig(
                num_experts=self.shape.experts,
                num_topk=self.shape.topk,
                hidden=self.shape.hidden_size,
                max_tokens_per_rank=options.batch,
                low_latency_tokens_per_rank=options.batch,
                dtype=self.shape.dtype,
                wire=options.wire,
                backend=options.backend,
                device=device.type,
            ),
        )
        self.backend = self._buffer.backend
        self.graph = self.backend == "cuda" and not options.no_graph
        self._exchange = Exchange(self._buffer, hidden=self.shape.hidden_size, dtype=self.shape.dtype, device=device)
        decoder = Decoder(self.shape, batch=options.batch, exchange=self._exchange, device=device)
        with torch.no_grad():
            self.checkpoint.load_into(decoder) if self.checkpoint else randomise(decoder, options.seed)
        self.parameters = sum(p.numel() for p in decoder.parameters())
        self._prompts = prompts_of(options, launch.num_ranks)
        self.steps = max(len(prompt) for prompts in self._prompts for prompt in prompts) + options.tokens - 1
        # Ranks draw differently.
        torch.manual_seed((options.seed << 16) + launch.rank)
        with torch.no_grad():
            self._generator = Generator(
                decoder,
                Sampling(options.temperature, options.top_k),
                length=max(self.steps, self.shape.context if options.check else 0),
                graph=self.graph,
            )

    def generate(self, on_progress: Callable[[int], None] | None) -> tuple[Text, list[list[bytes]]]:
        """Go on from the prompts; what this rank made, and on rank 0 the texts of all ranks, prompts included."""
        prompts = self._prompts[self._launch.rank]
        given = torch.full((len(prompts), self.steps + 1), FREE, dtype=torch.int64)
        for row, prompt in zip(given, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(list(prompt))
        with torch.no_grad():
            text = self._generator.run(given, self._checked(on_progress))
        lengths = [len(prompt) + self._options.tokens for prompt in prompts]
        mine = [bytes(row[:n]) for row, n in zip(text.tokens.tolist(), lengths, strict=True)]
        texts: list[list[bytes]] = [[] for _ in range(self._launch.num_ranks)]
        dist.gather_object(mine, texts if self._launch.rank == 0 else None)
        return text, texts

    def exchange_ms(self) -> list[float]:
        """Milliseconds of the dispatches and combines of a step on their own, for tokens spread at random."""
        shape, batch = self.shape, self._options.batch
        x = torch.randn(batch, shape.hidden_size, dtype=shape.dtype, device=self._device)
        weights, topk_idx = torch.rand(batch, shape.experts, device=self._device).topk(shape.topk, dim=-1)

        def exchange() -> None:
            for _ in range(shape.layers):
                out = self._exchange.dispatch(x, topk_idx)
                self._exchange.combine(self._exchange.empty_results(out), topk_idx, weights, out)
                # Two results are the most that the buffer has room for.
                del out

        with torch.no_grad():
            program = Program(exchange, dispatches=shape.layers, device=self._device, graph=self.graph)
            watch = Stopwatch(self._device)
            for _ in range(EXCHANGE_RUNS * program.cycle):
                watch.time(program)
        return watch.take_milliseconds()

    def held_out_loss(self, corpus: Corpus) -> float:
        """Mean nats per byte over the windows that training validates with, one byte at a time."""
        windows = held_out_windows(corpus, count=self._options.eval_windows, seq_length=self.shape.context)
        launch = self._launch
        with torch.no_grad():
            loss = held_out_loss(
                self._generator,
                windows,
                batch=self._options.batch,
                rank=launch.rank,
                num_ranks=launch.num_ranks,
            )
        self._buffer.check()
        return loss

    def close(self) -> None:
        """Give the buffer back and take the process group down, once every rank is done."""
        self._buffer.close()
        dist.barrier()
        dist.destroy_process_group()

    def _checked(self, on_progress: Callable[[int], None] | None) -> Callable[[int], None]:
        """Now and then, also raise what steps that the host did not wait for ran into."""

        def checked(step: int) -> None:
            self._buffer.check()
            if on_progress is not None:
                on_progress(step)

        return checked


def _random_shape(options: argparse.Namespace) -> Shape:
    sizes: dict[str, Any] = {
        name: getattr(options, name) for name in ("layers", "hidden_size", "experts", "topk", "context")
    }
    return Shape(**sizes, shared_expert=False, dtype=DTYPES[options.dtype])
