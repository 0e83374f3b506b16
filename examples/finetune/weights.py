"""Hugging Face checkpoints and a model whose experts are spread over ranks: reading shares, writing the whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pretrain.errors import UsageError
from safetensors import safe_open

_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")
# Mixtral's files have names of their own for what the model calls as the others do.
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# As safetensors names them.
_DTYPES = ("F64", "F32", "F16", "BF16")


class CheckpointFiles:
    """The tensors in the *.safetensors files of a folder, read piece by piece."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise UsageError(f"--model {folder}: there are no *.safetensors files in it")
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or some of its first dimension.

        Raises:
            UsageError: It is not there, or is quantised.
        """
        if name not in self:
            raise UsageError(f"--model {self.folder}: {name} is missing from its files")
        file = self._file_of[name]
        stored = file.get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise UsageError(
                f"--model {self.folder}: {name} is stored as {stored}, but weights must be one of "
                f"{', '.join(_DTYPES)}; name a checkpoint that is not quantised"
            )
        tensor = file.get_tensor(name) if rows is None else file.get_slice(name)[rows]
        self.bytes_read += tensor.numel() * tensor.itemsize
        return tensor


def fill(model: torch.nn.Module, files: CheckpointFiles, local: range) -> None:
    """Copy a checkpoint into a model, of every layer's experts those in ``local`` alone.

    The memory of the other experts is never touched, so the system has not given it.
    """
    with torch.no_grad():
        for name, target in model.state_dict(keep_vars=True).items():
            experts = _EXPERTS.match(name)
            if experts is None:
                target.copy_(files.read(_file_name(name, files)))
            elif name in files:
                target[local.start : local.stop].copy_(files.read(name, slice(local.start, local.stop)))
            else:
                _fill_experts(target, files, experts[1], experts[2], local)


def _file_name(name: str, files: CheckpointFiles) -> str:
    renamed = name.replace(".mlp.", ".block_sparse_moe.")
    if name not in files and renamed in files:
        return renamed
    tied = name == "lm_head.weight" and name not in files
    return "model.embed_tokens.weight" if tied else name


def _fill_experts(target: torch.Tensor, files: CheckpointFiles, prefix: str, kind: str, local: range) -> None:
    projections = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    mixtral = prefix.replace(".mlp.", ".block_sparse_moe.")
    for expert in local:
        parts = []
        for projection in projections:
            name = f"{prefix}.{expert}.{projection}.weight"
            other = f"{mixtral}.{expert}.{_MIXTRAL[projection]}.weight"
            parts.append(files.read(other if other in files else name))
        target[expert].copy_(torch.cat(parts))


def whole_state(engine: Any, expert_group: dist.ProcessGroup | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and CPU tensors of the Hugging Face model, experts of all ranks together; every rank iterates.

    Adapters must be merged before; with ZeRO 3 parameters are gathered one by one.
    """
    import deepspeed

    tensors = engine.module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        # AutoEP names a router twice where transformers calls it "gate".
        alias = name.replace(".mlp.gate.", ".mlp.router.")
        if ".lora_" in name or (alias != name and alias in tensors):
            continue
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            # On the CPU, where every process group can gather.
            value = tensor.detach().cpu().clone()
        name = name.replace(".base_layer.", ".")
        if re.search(r"\.mlp\.experts\.w[123]$", name):
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size(expert_group))]
            dist.all_gather(parts, value.contiguous(), group=expert_group)
            value = torch.cat(parts)
        yield name.replace(".mlp.router.gate.", ".mlp.gate.").replace(".mlp.router.", ".mlp.gate."), value


def export(engine: Any, config: Any, folder: Path, expert_group: dist.ProcessGroup | None) -> None:
    """Write the model as a checkpoint that transformers loads; every rank calls it, rank 0 holds the whole."""
    from transformers import AutoModelForCausalLM

    first, state = dist.get_rank() == 0, {}
    for name, value in whole_state(engine, expert_group):
        # The other ranks only take part in gathering: the whole need not fit beside them.
        if first:
            state[name] = value
    if first:
        for gate in [name for name in state if name.endswith(".experts.w1")]:
            prefix = gate.removesuffix("w1")
            state[prefix + "gate_up_proj"] = torch.cat([state.pop(gate), state.pop(prefix + "w3")], dim=1)
            state[prefix + "down_proj"] = state.pop(prefix + "w2")
        dtype = next(iter(state.values())).dtype
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.load_state_dict(state, strict=True, assign=True)
        model.save_pretrained(folder)
        # What transformers writes last, so that a folder with it is complete.
        assert json.loads((folder / "config.json").read_text())
    dist.barrier()
