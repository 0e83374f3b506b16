"""The decode loop: everything that a step reads and writes stays on the device, so that a step can be replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .model import Decoder
from .program import Program, Stopwatch

CHUNKS = 10
FREE = -1


@dataclass(frozen=True)
class Sampling:
    """How the next byte is chosen: the likeliest one at temperature 0, else drawn.

    Attributes:
        temperature: Logits are divided by this.
        top_k: Only so many of the likeliest bytes are drawn from; None: all.
    """

    temperature: float = 0.0
    top_k: int | None = None

    def choose(self, logits: Tensor) -> Tensor:
        """int64 [batch] from fp32 [batch, vocabulary]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature
        if self.top_k is not None:
            lowest = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -torch.inf)
        # The first of several exponential clocks to ring is each one with its rate's share of probability: a draw
        # without torch.multinomial, for which the host waits.
        probabilities = logits.softmax(dim=-1)
        return (probabilities / torch.empty_like(probabilities).exponential_().clamp_min(1e-20)).argmax(dim=-1)


@dataclass(frozen=True)
class Text:
    """What a run made.

    Attributes:
        tokens: int64 [batch, steps + 1], the given ones included; on the CPU.
        log_probabilities: fp32 [batch, steps]: of each token after the first, by the model; on the CPU.
        step_ms: Milliseconds of each step.
    """

    tokens: Tensor
    log_probabilities: Tensor
    step_ms: list[float]


class Generator:
    """Continues a batch of sequences by one token a step.

    A prompt goes through the same steps as what follows it: as long as there is a given token, it is taken in
    place of the chosen one.

    Args:
        decoder: The model.
        sampling: How tokens are chosen.
        length: Most steps of a :meth:`run`.
        graph: Replay a step from CUDA graphs.
    """

    def __init__(self, decoder: Decoder, sampling: Sampling, *, length: int, graph: bool) -> None:
        device, batch = decoder.device, decoder.batch
        self._decoder, self._sampling = decoder, sampling
        # One more, for a run is rounded up to whole cycles of the program.
        self._given = torch.full((batch, length + 1), FREE, device=device)
        self._chosen = torch.zeros(batch, length + 1, dtype=torch.int64, device=device)
        self._log_probabilities = torch.zeros(batch, length + 1, device=device)
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._watch = Stopwatch(device)
        self._program = Program(self._step, dispatches=decoder.shape.layers, device=device, graph=graph)

    def run(self, given: Tensor, on_progress: Callable[[int], None] | None = None) -> Text:
        """Start new sequences; all ranks do so with the same number of steps.

        Args:
            given: int64 [batch, steps + 1], FREE where a token is to be chosen; the first must be given.
            on_progress: Called now and then with the number of steps that are done.
        """
        steps = given.shape[1] - 1
        self._given.fill_(FREE)
        self._given[:, :steps].copy_(given[:, 1:])
        self._tokens.copy_(given[:, 0])
        self._position.zero_()
        rounded = -(-steps // self._program.cycle) * self._program.cycle
        chunk = max(1, steps // CHUNKS)
        for step in range(1, rounded + 1):
            self._watch.time(self._program)
            if on_progress is not None and (step % chunk == 0 or step == rounded):
                self._watch.finish()
                on_progress(min(step, steps))
        step_ms = self._watch.take_milliseconds()[:steps]
        tokens = torch.cat([given[:, :1], self._chosen[:, :steps].cpu()], dim=1)
        return Text(tokens, self._log_probabilities[:, :steps].cpu(), step_ms)

    def _step(self) -> None:
        """Take the tokens in hand, choose the next ones. In a graph this is all of a step."""
        logits = self._decoder(self._tokens, self._position)
        chosen = self._sampling.choose(logits)
        column = self._position.clamp(max=self._given.shape[1] - 1)
        given = self._given.index_select(1, column).squeeze(1)
        following = torch.where(given == FREE, chosen, given)
        likelihood = logits.log_softmax(dim=-1).gather(1, following.unsqueeze(1))
        self._chosen.index_copy_(1, column, following.unsqueeze(1))
        self._log_probabilities.index_copy_(1, column, likelihood)
        self._tokens.copy_(following)
        self._position.add_(1)
