"""The model that the pretraining example trains, for one token of every sequence at a time, without Megatron-Core.

Parameters have the names of Megatron-Core's, apart from the experts: those of this rank are stacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pretrain.data import VOCAB_SIZE
from torch import Tensor, nn
from torch.nn import functional

from .moe import Exchange, MoE, gated

# As the training job sets them, or leaves them at Megatron-Core's defaults.
HEAD_SIZE = 32
NORM_EPSILON = 1e-5
ROTARY_BASE = 10000.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model.

    Attributes:
        layers, hidden_size, experts, topk, shared_expert: As the training job's options of these names.
        dtype: Of weights and activations.
        context: Tokens that attention looks back at; the training job's --seq-length.
    """

    layers: int
    hidden_size: int
    experts: int
    topk: int
    shared_expert: bool
    dtype: torch.dtype
    context: int

    @property
    def expert_size(self) -> int:
        return 2 * self.hidden_size


@dataclass(frozen=True)
class Place:
    """What all layers need to know of the position of the tokens in hand, worked out once a step.

    Attributes:
        slot: int64 [1]: where keys and values of this position go in the caches.
        unseen: bool [context]: the slots that nothing has been written to.
        cos, sin: [HEAD_SIZE] of the rotary embedding, in the dtype of the model.
    """

    slot: Tensor
    unseen: Tensor
    cos: Tensor
    sin: Tensor

    def rotated(self, x: Tensor) -> Tensor:
        """``x`` [..., HEAD_SIZE], turned by its position."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], dim=-1) * self.sin


class Places(nn.Module):
    """Makes a :class:`Place` of a position, whose value never comes to the host."""

    _frequencies: Tensor
    _slots: Tensor

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        self._shape = shape
        halves = torch.arange(0, HEAD_SIZE, 2, dtype=torch.float32, device=device) / HEAD_SIZE
        self.register_buffer("_frequencies", (ROTARY_BASE**-halves).repeat(2), persistent=False)
        self.register_buffer("_slots", torch.arange(shape.context, device=device), persistent=False)

    def forward(self, position: Tensor) -> Place:
        """``position``: int64 [1]."""
        angles = position * self._frequencies
        return Place(
            slot=position % self._shape.context,
            unseen=self._slots > position,
            cos=angles.cos().to(self._shape.dtype),
            sin=angles.sin().to(self._shape.dtype),
        )


class Attention(nn.Module):
    """Attention over the last ``context`` tokens. The caches are rings: all shapes are fixed, and text has no end.

    Text longer than the context is seen through a sliding window, which the model was not trained with.
    """

    _keys: Tensor
    _values: Tensor

    def __init__(self, shape: Shape, batch: int, **factory: Any) -> None:
        super().__init__()
        self._heads = shape.hidden_size // HEAD_SIZE
        self.linear_qkv = nn.Linear(shape.hidden_size, 3 * shape.hidden_size, bias=False, **factory)
        self.linear_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False, **factory)
        cache = torch.zeros(2, batch, self._heads, shape.context, HEAD_SIZE, **factory)
        self.register_buffer("_keys", cache[0], persistent=False)
        self.register_buffer("_values", cache[1], persistent=False)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """[batch, hidden] of [batch, hidden]."""
        # Megatron-Core keeps query, key and value of a head together.
        query, key, value = self.linear_qkv(x).view(len(x), self._heads, 3, 1, HEAD_SIZE).unbind(2)
        self._keys.index_copy_(2, place.slot, place.rotated(key))
        self._values.index_copy_(2, place.slot, value)
        scores = place.rotated(query) @ self._keys.transpose(2, 3) * HEAD_SIZE**-0.5
        weights = scores.float().masked_fill(place.unseen, -torch.inf).softmax(dim=-1).to(x.dtype)
        out: Tensor = self.linear_proj((weights @ self._values).flatten(1))
        return out


class SharedExpert(nn.Module):
    """The expert that every token goes to, on the token's own rank."""

    def __init__(self, shape: Shape, **factory: Any) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(shape.hidden_size, 2 * shape.expert_size, bias=False, **factory)
        self.linear_fc2 = nn.Linear(shape.expert_size, shape.hidden_size, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_fc2(gated(self.linear_fc1(x)))
        return out


class FeedForward(MoE):
    """The experts of a layer, and the shared one if there is one."""

    def __init__(self, shape: Shape, exchange: Exchange, **factory: Any) -> None:
        super().__init__(
            hidden=shape.hidden_size,
            expert_size=shape.expert_size,
            num_experts=shape.experts,
            topk=shape.topk,
            exchange=exchange,
            **factory,
        )
        self.shared_experts = SharedExpert(shape, **factory) if shape.shared_expert else None

    def forward(self, x: Tensor) -> Tensor:
        routed = super().forward(x)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


class Layer(nn.Module):
    """Attention, then experts, each added to what came in."""

    def __init__(self, shape: Shape, batch: int, exchange: Exchange, **factory: Any) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(shape.hidden_size, eps=NORM_EPSILON, **factory)
        self.self_attention = Attention(shape, batch, **factory)
        self.pre_mlp_layernorm = nn.LayerNorm(shape.hidden_size, eps=NORM_EPSILON, **factory)
        self.mlp = FeedForward(shape, exchange, **factory)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x), place)
        out: Tensor = x + self.mlp(self.pre_mlp_layernorm(x))
        return out


class Embedding(nn.Module):
    """Vectors of the bytes; their products with the last layer's output are the logits too."""

    def __init__(self, shape: Shape, **factory: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB_SIZE, shape.hidden_size, **factory)


class Stack(nn.Module):
    """All layers."""

    def __init__(self, shape: Shape, batch: int, exchange: Exchange, **factory: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shape, batch, exchange, **factory) for _ in range(shape.layers))
        self.final_layernorm = nn.LayerNorm(shape.hidden_size, eps=NORM_EPSILON, **factory)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        for layer in self.layers:
            x = layer(x, place)
        out: Tensor = self.final_layernorm(x)
        return out


class Decoder(nn.Module):
    """Logits of the next byte of every sequence.

    Args:
        shape: Sizes.
        batch: Sequences of this rank.
        exchange: Brings rows to the experts and back.
        device: Where parameters and caches are.
    """

    def __init__(self, shape: Shape, *, batch: int, exchange: Exchange, device: torch.device) -> None:
        super().__init__()
        self.shape, self.batch, self.device = shape, batch, device
        self._places = Places(shape, device)
        factory: dict[str, Any] = {"device": device, "dtype": shape.dtype}
        self.embedding = Embedding(shape, **factory)
        self.decoder = Stack(shape, batch, exchange, **factory)
        self.requires_grad_(False)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """fp32 [batch, VOCAB_SIZE].

        Args:
            tokens: int64 [batch]; the caches hold those of the positions before.
            position: int64 [1], the same for all sequences.
        """
        words = self.embedding.word_embeddings
        x = self.decoder(words(tokens), self._places(position))
        return functional.linear(x, words.weight).float()
