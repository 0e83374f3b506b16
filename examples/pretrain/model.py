"""The model: a GPT of Megatron-Core's own layers, with the token dispatcher that was asked for."""

from __future__ import annotations

import argparse
import math
import re
import zlib
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from .data import VOCAB_SIZE
from .saved import plain_name

HEAD_SIZE = 32
_EXPERT_NAME = re.compile(r"(?<=\.local_experts\.)\d+")


def build_model(options: argparse.Namespace, expert_rank: int, device: torch.device) -> GPTModel:
    """Make the model on ``device``, with weights that depend on the seed but not on how experts are spread.

    Args:
        options: The command line.
        expert_rank: This rank within the ranks that share one set of experts.
        device: Where the parameters go.
    """
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    expert_size = 2 * options.hidden_size
    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.hidden_size // HEAD_SIZE,
        ffn_hidden_size=expert_size,
        num_moe_experts=options.experts,
        moe_router_topk=options.topk,
        moe_ffn_hidden_size=expert_size,
        moe_shared_expert_intermediate_size=expert_size if options.shared_expert else None,
        moe_token_dispatcher_type=options.moe_token_dispatcher,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        moe_router_dtype="fp32",
        expert_model_parallel_size=options.expert_parallel,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        # Fused kernels that are not part of Megatron-Core itself.
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=options.experts, moe_grouped_gemm=False),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=options.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    first_expert = expert_rank * (options.experts // options.expert_parallel)
    _initialise(model, options, first_expert)
    # Norms come in fp32 whatever params_dtype says, and on GPUs they take rows of their own type only.
    return model.to(device=device, dtype=dtype)


def _initialise(model: GPTModel, options: argparse.Namespace, first_expert: int) -> None:
    """Draw every matrix from a generator seeded by its own global name.

    Megatron's draws depend on the order of construction, hence on the number of local experts. With these,
    a run on one rank and a run on four start from the same model.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        # An FP8 expert starts with the weights of the expert that it stands for.
        name = _EXPERT_NAME.sub(lambda match: str(int(match.group()) + first_expert), plain_name(name))
        generator = torch.Generator().manual_seed((options.seed << 32) + zlib.crc32(name.encode()))
        std = 0.02 if "embedding" in name else parameter.shape[-1] ** -0.5
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            # These add to the residual stream, twice a layer.
            std /= math.sqrt(2 * options.layers)
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


class LossFunction:
    """Per-byte losses of windows of text under the model."""

    def __init__(self, model: GPTModel, seq_length: int, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._positions = torch.arange(seq_length, device=device).unsqueeze(0)
        # Megatron's mask says what may not be seen.
        self._mask = torch.ones(1, 1, seq_length, seq_length, dtype=torch.bool, device=device).triu(1)

    def __call__(self, windows: Any) -> torch.Tensor:
        """fp32 [n, seq_length] from int64 windows [n, seq_length + 1] (numpy)."""
        tokens = torch.from_numpy(windows).to(self._device)
        losses: torch.Tensor = self._model(
            tokens[:, :-1].contiguous(),
            self._positions.expand(len(tokens), -1),
            self._mask,
            labels=tokens[:, 1:].contiguous(),
        )
        return losses.float()
