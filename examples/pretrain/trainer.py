"""One rank's training run: steps, validations, checkpoints, and the numbers that come out."""

from __future__ import annotations

import argparse
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from . import checkpoint
from .bigram import bigram_loss
from .comm_time import CommTimer
from .data import Corpus, held_out_windows, training_windows
from .errors import UsageError
from .model import LossFunction, build_model
from .optimizer import Optimizer
from .options import Launch
from .report import Report, plot_losses


class Interruption:
    """Remembers that SIGINT or SIGTERM arrived, so that the step in progress can be finished first."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number


class Trainer:
    """Builds or loads everything that :meth:`run` changes.

    Attributes:
        step: Steps done.
        checkpoints: Directory that checkpoints are written to.
        interrupted: Number of the signal that ended :meth:`run` early, on any rank; 0 without one.
    """

    def __init__(self, options: argparse.Namespace, launch: Launch, corpus: Corpus, device: torch.device) -> None:
        self._options, self._launch, self._corpus = options, launch, corpus
        self._model = build_model(options, parallel_state.get_expert_model_parallel_rank(), device)
        self._optimizer = Optimizer(self._model, options.lr)
        self._loss_of = LossFunction(self._model, options.seq_length, device)
        self._timer = CommTimer(self._model, device)
        self._held_out = held_out_windows(corpus, count=options.eval_windows, seq_length=options.seq_length)
        self._fixed = checkpoint.settings(options, launch.num_ranks, corpus.fingerprint)
        self._first_loss: float | None = None
        self._last_loss: float | None = None
        self._validation_loss: float | None = None
        self.step = 0
        self.interrupted = 0
        self.checkpoints: Path = options.save or options.out / "checkpoints"
        if options.load:
            self.step, self._first_loss = checkpoint.load(
                options.load, model=self._model, optimizer=self._optimizer, fixed=self._fixed
            )
        self._batch = options.micro_batch_size * launch.num_ranks
        self._report = Report(
            options.out,
            active=launch.rank == 0,
            first_step=self.step,
            num_steps=options.steps,
            tokens_per_step=self._batch * options.seq_length,
        )

    def run(self) -> None:
        """Train up to the last step, or until a signal; afterwards ``step`` says how far."""
        interruption = Interruption()
        options, report = self._options, self._report
        self._say_what_is_trained()
        while self.step < options.steps:
            self._train_step(interruption)
            if self.interrupted:
                break
            if self.step % options.eval_interval == 0 or self.step == options.steps:
                self._validate()
            if options.save_interval and self.step % options.save_interval == 0 and self.step < options.steps:
                self.save()
        if not self.interrupted and self._validation_loss is None:
            self._validate()
        if self.interrupted or options.save:
            self.save()
        report.close()

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        checkpoint.save(
            self.checkpoints,
            step=self.step,
            model=self._model,
            optimizer=self._optimizer,
            fixed=self._fixed,
            first_loss=self._first_loss,
        )

    def result(self) -> dict[str, Any]:
        """The numbers of the run; draws the loss plot too."""
        options, launch = self._options, self._launch
        baseline = bigram_loss(self._corpus.train, self._held_out)
        plot_losses(
            options.out / "loss.png",
            self._report.records,
            baseline=baseline,
            title=f"{launch.num_ranks} ranks, expert parallel {options.expert_parallel}, "
            f"{options.moe_token_dispatcher} ({self._timer.backend()})",
        )
        return {
            "first_loss": _rounded(self._first_loss),
            "last_loss": _rounded(self._last_loss),
            "validation_loss": _rounded(self._validation_loss),
            "bigram_loss": _rounded(baseline),
            **self._report.speed(),
            "dispatcher": options.moe_token_dispatcher,
            "backend": self._timer.backend(),
            "ranks": launch.num_ranks,
            "expert_parallel": options.expert_parallel,
            "dtype": options.dtype,
            "fp8": options.moe_ep_fp8,
            "steps": self.step,
        }

    def _train_step(self, interruption: Interruption) -> None:
        options, launch = self._options, self._launch
        windows = training_windows(
            self._corpus, seed=options.seed, step=self.step, count=self._batch, seq_length=options.seq_length
        )
        mine = windows[launch.rank * options.micro_batch_size :][: options.micro_batch_size]
        self._timer.take_seconds()
        started = time.perf_counter()
        loss = self._loss_of(mine).mean()
        loss.backward()
        lr = self._optimizer.step(self.step, options.steps)
        # The signal goes with the loss: all ranks must stop after the same step.
        shared = torch.tensor([loss.item() / launch.num_ranks, 0.0], dtype=torch.float64)
        shared[1] = interruption.signal / launch.num_ranks
        dist.all_reduce(shared)
        comm_seconds = self._timer.take_seconds()
        seconds = time.perf_counter() - started
        self.step += 1
        mean_loss = float(shared[0])
        if not math.isfinite(mean_loss):
            raise UsageError(f"the loss is {mean_loss} at step {self.step}: try a lower --lr than {options.lr}")
        self._first_loss = mean_loss if self._first_loss is None else self._first_loss
        self._last_loss = mean_loss
        self._report.step(self.step, loss=mean_loss, lr=lr, seconds=seconds, comm_seconds=comm_seconds)
        if shared[1] > 0:
            self.interrupted = interruption.signal or signal.SIGTERM

    def _validate(self) -> None:
        batch, windows = self._options.micro_batch_size, self._held_out
        self._model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for start in range(self._launch.rank * batch, len(windows) + self._launch.rank * batch, self._batch):
                # Ranks take part with full batches to the end, for their experts serve the others and
                # Megatron's allgather wants equal sizes. What a batch repeats is not counted.
                places = np.arange(start, start + batch)
                losses = self._loss_of(windows[places % len(windows)])[places < len(windows)]
                total += torch.tensor([losses.double().sum().item(), losses.numel()], dtype=torch.float64)
        self._model.train()
        dist.all_reduce(total)
        self._validation_loss = float(total[0] / total[1])
        self._report.validation(self.step, self._validation_loss)

    def _say_what_is_trained(self) -> None:
        corpus, options = self._corpus, self._options
        experts = sum(p.numel() for p in self._model.parameters() if not getattr(p, "allreduce", True))
        dense = sum(p.numel() for p in self._model.parameters()) - experts
        total = dense + experts * options.expert_parallel
        self._report.say(
            f"training on {corpus.num_train_files} files ({len(corpus.train):,} bytes), "
            f"{corpus.num_held_out_files} held out ({len(corpus.held_out):,} bytes)\n"
            f"{total:,} parameters, {dense:,} of them on every rank; {options.layers} layers of {options.experts} "
            f"experts over {options.expert_parallel} ranks; {self._batch * options.seq_length:,} bytes a step"
            + (f"\ngoing on after step {self.step} of {options.load}" if self.step else "")
        )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
