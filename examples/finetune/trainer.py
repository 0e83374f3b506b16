"""One rank's run: train the small base model if none is given, fine-tune, evaluate, checkpoint, export."""

from __future__ import annotations

import argparse
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from pretrain.data import Corpus, check_length, held_out_windows, training_windows
from pretrain.errors import UsageError
from pretrain.options import Launch
from pretrain.report import Report
from torch.nn import functional as F

from moe_ep_plugin.integrations.deepspeed import statistics

from . import model as models
from .plot import plot_losses
from .text import tokens_of
from .weights import export

WARMUP = 0.1
# Options that decide the numbers of fine-tuning, beside the number of ranks.
_FIXED = (
    *("family", "layers", "hidden_size", "experts", "topk", "dtype", "lora", "seq_length", "micro_batch_size"),
    *("seed", "base_steps", "base_lr", "steps", "lr", "zero", "expert_parallel", "fp8_experts"),
)


class Trainer:
    """Fine-tunes one model.

    Args:
        options: The command line.
        launch: This rank and how many there are.
        source: Text that the model comes from.
        target: Text that it is fine-tuned on.
        device: Where to compute.
    """

    def __init__(
        self, options: argparse.Namespace, launch: Launch, source: Corpus, target: Corpus, device: torch.device
    ) -> None:
        self._options, self._launch, self._device = options, launch, device
        self._source, self._target = source, target
        self._batch = options.micro_batch_size * launch.num_ranks
        self._base_seconds = 0.0
        self._folder: Path = options.model or options.out / "base"
        if options.model is None and not options.resume:
            self._train_base()
        self._engine: Any = None

    def run(self) -> dict[str, Any]:
        """Fine-tune and export; returns the numbers of the run."""
        options = self._options
        network, bytes_read = models.load_model(self._folder, options)
        config = network.config
        tokens = tokens_of(self._folder, config.vocab_size)
        source, target = tokens.encode(self._source), tokens.encode(self._target)
        for corpus in (source, target):
            check_length(corpus, options.seq_length)
        if options.lora:
            models.add_adapters(network, options.lora)
        trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
        engine = self._engine = models.make_engine(network, options, options.lr, self._device)
        checkpoints = options.out / "checkpoints"
        fixed = {name: str(getattr(options, name)) for name in _FIXED}
        fixed |= {"ranks": str(self._launch.num_ranks), "text": source.fingerprint + target.fingerprint}
        if options.resume:
            state = self._load(checkpoints, fixed)
        else:
            before = {"target": self._evaluate(engine, target), "source": self._evaluate(engine, source)}
            state = {"step": 0, "before": before, "fixed": fixed}
        report = self._report(options.out, state["step"], options.steps)
        report.say(
            f"fine-tuning {self._folder} ({config.model_type}, {tokens.name}); rank 0 read {bytes_read / 1e6:.1f} MB\n"
            f"loss before: {state['before']['target']:.4f} on the new text, {state['before']['source']:.4f} on its own"
        )

        def save(step: int) -> None:
            if options.save_interval and (step % options.save_interval == 0 or step == options.steps):
                engine.save_checkpoint(str(checkpoints), tag=f"step-{step:08d}", client_state=state | {"step": step})

        losses = self._train(engine, target, state["step"], options.steps, options.lr, report, save)
        after = {"target": self._evaluate(engine, target), "source": self._evaluate(engine, source)}
        report.validation(options.steps, after["target"])
        if options.lora:
            models.merge_adapters(engine.module)
        difference = self._export(engine, config, options.out / "model", target)
        used = statistics()
        result = {
            "loss_before": round(state["before"]["target"], 6),
            "loss_after": round(after["target"], 6),
            "source_loss_before": round(state["before"]["source"], 6),
            "source_loss_after": round(after["source"], 6),
            "last_loss": round(losses[-1], 6) if losses else None,
            "export_difference": difference,
            **report.speed(),
            "base_seconds": round(self._base_seconds, 1),
            "model": str(self._folder),
            "exported": str(options.out / "model"),
            "trainable_parameters": trainable,
            "comm_backend": options.comm_backend,
            "backend": used.get("backend") or dist.get_backend(),
            "ranks": self._launch.num_ranks,
            "expert_parallel": options.expert_parallel,
            "zero": options.zero,
            "fp8_experts": options.fp8_experts,
            "dtype": options.dtype,
            "steps": options.steps,
        }
        if self._launch.rank == 0:
            plot_losses(options.out / "loss.png", report.records, state["before"], after)
        report.close()
        engine.destroy()
        return result

    def _train_base(self) -> None:
        """Make a small model, train it on the source text, save it as a Hugging Face checkpoint."""
        options, started = self._options, time.perf_counter()
        config = models.small_config(options)
        engine = models.make_engine(models.new_model(config, options), options, options.base_lr, self._device)
        report = self._report(self._folder, 0, options.base_steps)
        report.say(f"no --model: training a small {options.family} on {self._source.num_train_files} files first")
        self._train(engine, self._source, 0, options.base_steps, options.base_lr, report)
        report.close()
        export(engine, config, self._folder, self._expert_group())
        engine.destroy()
        self._base_seconds = time.perf_counter() - started

    def _report(self, out: Path, first_step: int, num_steps: int) -> Report:
        return Report(
            out,
            active=self._launch.rank == 0,
            first_step=first_step,
            num_steps=num_steps,
            tokens_per_step=self._batch * self._options.seq_length,
        )

    def _train(
        self, engine: Any, corpus: Corpus, first: int, steps: int, lr: float, report: Report, save: Any = None
    ) -> list[float]:
        """Steps ``first`` to ``steps``; returns their losses, means over ranks."""
        options, losses = self._options, []
        engine.train()
        for step in range(first, steps):
            windows = training_windows(
                corpus, seed=options.seed, step=step, count=self._batch, seq_length=options.seq_length
            )
            mine = windows[self._launch.rank * options.micro_batch_size :][: options.micro_batch_size]
            rate = _learning_rate(lr, step, steps)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            started, comm = time.perf_counter(), _comm_seconds()
            loss = self._losses(engine, mine).mean()
            engine.backward(loss)
            engine.step()
            mean = loss.detach().double().cpu()
            dist.all_reduce(mean)
            seconds = time.perf_counter() - started
            losses.append(float(mean) / self._launch.num_ranks)
            if not math.isfinite(losses[-1]):
                raise UsageError(f"the loss is {losses[-1]} at step {step + 1}: try a lower learning rate than {lr}")
            report.step(step + 1, loss=losses[-1], lr=rate, seconds=seconds, comm_seconds=_comm_seconds() - comm)
            if save is not None:
                save(step + 1)
        return losses

    def _losses(self, engine: Any, windows: Any) -> torch.Tensor:
        """Nats of each predicted token: [windows, seq_length]."""
        tokens = torch.from_numpy(windows).to(self._device)
        logits = engine(input_ids=tokens[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(
            tokens.shape[0], -1
        )

    def _evaluate(self, engine: Any, corpus: Corpus) -> float:
        """Mean nats per token of the held-out windows."""
        options, batch = self._options, self._options.micro_batch_size
        windows = held_out_windows(corpus, count=options.eval_windows, seq_length=options.seq_length)
        engine.eval()
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for start in range(self._launch.rank * batch, len(windows) + self._launch.rank * batch, self._batch):
                # Every rank takes part to the end, for its experts serve the others; repeats are not counted.
                places = np.arange(start, start + batch)
                losses = self._losses(engine, windows[places % len(windows)]).cpu()[places < len(windows)]
                total += torch.tensor([losses.double().sum().item(), losses.numel()], dtype=torch.float64)
        engine.train()
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def _load(self, checkpoints: Path, fixed: dict[str, str]) -> dict[str, Any]:
        path, state = self._engine.load_checkpoint(str(checkpoints))
        if path is None:
            raise UsageError(f"--resume: the newest checkpoint in {checkpoints} can't be loaded")
        differences = [
            f"{n}: {state['fixed'].get(n)} there, {v} here" for n, v in fixed.items() if state["fixed"].get(n) != v
        ]
        if differences:
            raise UsageError("--resume: the checkpoint is of a run with other settings: " + "; ".join(differences))
        return {name: state[name] for name in ("step", "before", "fixed")}

    def _export(self, engine: Any, config: Any, folder: Path, corpus: Corpus) -> float | None:
        """Write the model; returns how far its logits in transformers are from ours, None on ranks other than 0."""
        export(engine, config, folder, self._expert_group())
        window = held_out_windows(corpus, count=1, seq_length=self._options.seq_length)
        tokens = torch.from_numpy(window[:, :-1]).to(self._device)
        engine.eval()
        with torch.no_grad():
            ours = engine(input_ids=tokens, use_cache=False).logits.float().cpu()
        if self._launch.rank != 0:
            return None
        for name in self._folder.glob("*token*"):
            shutil.copy(name, folder)
        from transformers import AutoModelForCausalLM

        again = AutoModelForCausalLM.from_pretrained(folder, dtype=models.DTYPES[self._options.dtype]).eval()
        with torch.no_grad():
            theirs = again(input_ids=tokens.cpu(), use_cache=False).logits.float()
        return float((ours - theirs).abs().max())

    def _expert_group(self) -> Any:
        from deepspeed.utils import groups

        return groups._get_expert_parallel_group(f"ep_size_{self._options.expert_parallel}")


def _learning_rate(peak: float, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    warmup = max(1, int(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _comm_seconds() -> float:
    used = statistics()
    return float(used.get("dispatch_seconds", 0.0) + used.get("combine_seconds", 0.0))
