"""Small models of each family, and models and DeepSpeed engines around the weights of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pretrain.data import VOCAB_SIZE
from pretrain.errors import UsageError

from .weights import CheckpointFiles, fill

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_HEAD = 32
_ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]


def small_config(options: argparse.Namespace) -> Any:
    """The Hugging Face config of a small byte-level model."""
    import transformers

    heads = options.hidden_size // _HEAD
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_experts_per_tok": options.topk,
        "max_position_embeddings": max(2048, options.seq_length),
        "tie_word_embeddings": False,
        # Bytes have no special ones.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    size = 2 * options.hidden_size
    if options.family == "mixtral":
        return transformers.MixtralConfig(
            **common, intermediate_size=size, num_key_value_heads=heads, num_local_experts=options.experts
        )
    if options.family == "deepseek_v3":
        return transformers.DeepseekV3Config(
            **common,
            intermediate_size=size,
            moe_intermediate_size=size,
            num_key_value_heads=heads,
            n_routed_experts=options.experts,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=min(1, options.layers - 1),
            q_lora_rank=None,
            kv_lora_rank=options.hidden_size // 2,
            qk_rope_head_dim=_HEAD // 2,
            qk_nope_head_dim=_HEAD // 2,
            v_head_dim=_HEAD,
        )
    return transformers.Qwen3MoeConfig(
        **common,
        intermediate_size=size,
        moe_intermediate_size=size,
        num_key_value_heads=heads,
        head_dim=_HEAD,
        num_experts=options.experts,
        norm_topk_prob=True,
    )


def new_model(config: Any, options: argparse.Namespace) -> torch.nn.Module:
    """A model with random weights, the same on every rank."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(options.seed)
    return AutoModelForCausalLM.from_config(config, dtype=DTYPES[options.dtype])


def num_experts(config: Any) -> int:
    """Routed experts in a layer; the families have different names for it."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    raise UsageError(f"model type {config.model_type!r} has no experts; name a Mixture-of-Experts model")


def load_model(folder: Path, options: argparse.Namespace) -> tuple[torch.nn.Module, int]:
    """The model of a checkpoint with this rank's experts, and the bytes that were read for it.

    Ranks that share experts are neighbours, as DeepSpeed's groups are.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"--model {folder}: its config.json has a quantization_config, but weights are read as they are stored; "
            "name a checkpoint that is not quantised"
        )
    experts, ep = num_experts(config), options.expert_parallel
    if experts % ep:
        raise UsageError(f"--expert-parallel {ep}: it must divide the {experts} experts of {folder}")
    files = CheckpointFiles(folder)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[options.dtype])
    first = dist.get_rank() % ep * (experts // ep)
    fill(model, files, range(first, first + experts // ep))
    return model, files.bytes_read


def add_adapters(model: torch.nn.Module, rank: int) -> None:
    """Freeze the model and add LoRA adapters to its attention; names of modules stay what they are."""
    from peft import LoraConfig, inject_adapter_in_model

    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    targets = [name for name in _ADAPTED if name in names]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def merge_adapters(model: torch.nn.Module) -> None:
    """Add what the adapters learnt to the weights that they stand beside."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()


def make_engine(model: torch.nn.Module, options: argparse.Namespace, lr: float, device: torch.device) -> Any:
    """A DeepSpeed engine that spreads the model's experts with AutoEP."""
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": options.zero},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Adam", "params": {"lr": lr, "betas": [0.9, 0.98], "torch_adam": True}},
        "bf16": {"enabled": options.dtype == "bf16"},
        "expert_parallel": {
            "enabled": True,
            "autoep_size": options.expert_parallel,
            # torch's grouped GEMM has kernels for GPUs, and falls back to a loop of its own on CPUs.
            "use_grouped_mm": device.type == "cuda" and options.dtype == "bf16",
            "comm_backend": options.comm_backend,
            "comm_max_tokens_per_rank": options.micro_batch_size * options.seq_length,
        },
    }
    return deepspeed.initialize(
        model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=config
    )[0]
