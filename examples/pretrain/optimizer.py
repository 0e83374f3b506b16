"""AdamW over flat fp32 copies of the parameters, with the gradient sums that expert parallelism needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
FINAL_LR_FRACTION = 0.1


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth (at most 100 steps), then a cosine down to a tenth of ``peak``."""
    warmup = max(1, min(100, num_steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * (FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class _Flat:
    """Parameters of one kind and one fp32 vector that holds them all.

    Attributes:
        parameters: The model's own tensors.
        master: fp32 [total elements]; the optimizer's parameter.
        expert: Whether they belong to experts, which live on one rank of each expert-parallel group.
    """

    parameters: list[torch.nn.Parameter]
    master: torch.nn.Parameter
    expert: bool

    def gather_gradients(self) -> torch.Tensor:
        """fp32 [total elements]; zeros for an expert that received no token."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return torch.cat([grad.float().flatten() for grad in grads])

    @torch.no_grad()
    def write_back(self) -> None:
        parts = self.master.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))


class Optimizer:
    """Sums gradients over ranks, clips them by their global norm and steps.

    The loss is the mean over all ranks' tokens. A dense parameter is copied on every rank, so its gradient
    is averaged over all of them. A rank's expert gradient already holds the tokens of its whole
    expert-parallel group: it is summed over the ranks that hold copies of the expert, and divided by the
    number of all ranks too.
    """

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        self._peak_lr = lr
        kinds: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for parameter in model.parameters():
            # Megatron marks the parameters of experts with ``allreduce = False``.
            kind = (not getattr(parameter, "allreduce", True), parameter.dim() >= 2)
            kinds.setdefault(kind, []).append(parameter)
        self._flats = [
            _Flat(
                parameters=kinds[kind],
                master=torch.nn.Parameter(torch.cat([p.detach().float().flatten() for p in kinds[kind]])),
                expert=kind[0],
            )
            for kind in sorted(kinds)
        ]
        self._adamw = torch.optim.AdamW(
            [
                {"params": [flat.master], "weight_decay": WEIGHT_DECAY if decays else 0.0}
                for flat, (_, decays) in zip(self._flats, sorted(kinds), strict=True)
            ],
            betas=(0.9, 0.95),
            fused=True,
        )

    @torch.no_grad()
    def step(self, step: int, num_steps: int) -> float:
        """Apply the gradients that backward left in the model, and clear them; returns the learning rate."""
        ranks = parallel_state.get_data_parallel_world_size()
        squared = {False: 0.0, True: 0.0}
        for flat in self._flats:
            grad = flat.gather_gradients()
            group = (
                parallel_state.get_expert_data_parallel_group()
                if flat.expert
                else parallel_state.get_data_parallel_group()
            )
            if dist.get_world_size(group) > 1:
                dist.all_reduce(grad, group=group)
            grad /= ranks
            flat.master.grad = grad
            squared[flat.expert] = squared[flat.expert] + grad.square().sum()
        of_experts = torch.as_tensor(squared[True])
        dist.all_reduce(of_experts, group=parallel_state.get_expert_model_parallel_group())
        norm = (squared[False] + of_experts).sqrt()
        scale = (MAX_GRAD_NORM / (norm + 1e-6)).clamp(max=1.0)
        lr = learning_rate(step, num_steps, self._peak_lr)
        for group, flat in zip(self._adamw.param_groups, self._flats, strict=True):
            flat.master.grad *= scale
            group["lr"] = lr
        self._adamw.step()
        for flat in self._flats:
            flat.write_back()
            for parameter in flat.parameters:
                parameter.grad = None
        return lr

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, apart from gradients."""
        return {"masters": [flat.master.detach() for flat in self._flats], "adamw": self._adamw.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set masters, moments and the model's parameters."""
        for flat, master in zip(self._flats, state["masters"], strict=True):
            flat.master.copy_(master)
            flat.write_back()
        self._adamw.load_state_dict(state["adamw"])
