"""Fills a decoder: from a checkpoint of the pretraining example, written by any number of ranks, or at random."""

from __future__ import annotations

import pickle
import zlib
from pathlib import Path
from typing import Any

import torch
from pretrain.errors import UsageError
from pretrain.saved import file_name, plain_name
from torch import Tensor

from .model import Decoder, Shape
from .moe import Experts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _read(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank of the training job saved. Tensors stay in the file until they are used."""
    path = folder / file_name(rank)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state["settings"], state["model"], state["step"]  # noqa: B018
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"{path} can't be read ({type(error).__name__}: {error}); it must be of examples/pretrain_megatron_moe.py"
        ) from error
    return state


class Checkpoint:
    """A folder of the pretraining example's checkpoints.

    Attributes:
        folder: Where it is.
        step: Steps that the model was trained for.
        corpus: Fingerprint of the text that it was trained on.
        fp8_experts: Whether its experts computed in FP8 then; here the weights are used as they are.
        shape: Sizes of the model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        first = _read(folder, 0)
        settings = first["settings"]
        self._files = settings["expert_parallel"]
        self.step: int = first["step"]
        self.corpus: str = settings["text (--data)"]
        self.fp8_experts = bool(settings.get("moe_ep_fp8"))
        self.shape = Shape(
            layers=settings["layers"],
            hidden_size=settings["hidden_size"],
            experts=settings["experts"],
            topk=settings["topk"],
            shared_expert=settings["shared_expert"],
            dtype=DTYPES[settings["dtype"]],
            context=settings["seq_length"],
        )

    def load_into(self, decoder: Decoder) -> None:
        """Set all parameters; of the experts only this rank's are read."""
        per_file = self.shape.experts // self._files
        weights: dict[str, Tensor] = {}
        # The first of the ranks that shared one set of experts have them all.
        for file in range(self._files):
            for name, tensor in _read(self.folder, file)["model"].items():
                if name.endswith("._extra_state"):
                    continue
                name = plain_name(name)
                before, local, after = name.partition(".local_experts.")
                if not local:
                    weights.setdefault(name, tensor)
                    continue
                number, _, matrix = after.partition(".")
                weights[f"{before}{local}{int(number) + file * per_file}.{matrix}"] = tensor
        for name, module in decoder.named_modules():
            if isinstance(module, Experts):
                for matrix in ("linear_fc1", "linear_fc2"):
                    stack = [weights[f"{name}.local_experts.{expert}.{matrix}.weight"] for expert in module.ids]
                    weights[f"{name}.{matrix}"] = torch.stack(stack) if stack else getattr(module, matrix)
        missing, unexpected = decoder.load_state_dict(
            {name: tensor for name, tensor in weights.items() if ".local_experts." not in name}, strict=False
        )
        if missing or unexpected:
            raise UsageError(f"{self.folder} does not fit this model: {', '.join([*missing, *unexpected])}")


def randomise(decoder: Decoder, seed: int) -> None:
    """Draw every matrix from a generator of its own, so that the model is the same on any number of ranks."""

    def draw(matrix: Tensor, name: str) -> None:
        generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
        matrix.copy_(torch.randn(matrix.shape, generator=generator) * matrix.shape[-1] ** -0.5)

    modules = dict(decoder.named_modules())
    for name, parameter in decoder.named_parameters():
        owner, _, matrix = name.rpartition(".")
        experts = modules[owner]
        if isinstance(experts, Experts):
            for expert, part in zip(experts.ids, parameter, strict=True):
                draw(part, f"{owner}.{expert}.{matrix}")
        elif parameter.dim() == 2:
            draw(parameter, name)
