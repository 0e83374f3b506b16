"""Settings of the Megatron integration, given to ``install(...)`` or by flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ...errors import ConfigError
from ..options import BufferOptions

Fp8Experts = Literal["follow", "experts"]


@dataclass(frozen=True, kw_only=True)
class Options(BufferOptions):
    """Settings of every buffer, and which layers are served.

    Attributes:
        take_flex: Serve layers of type ``"flex"`` too, not only ``"deepep"``. The command line needs it,
            where Megatron's own parser knows no other value.
        fp8: Which layers get experts that compute on the FP8 rows that they receive. ``"follow"``: those that
            Megatron's own settings (``fp8``, ``fp8_recipe="blockwise"``, ``first_last_layers_bf16``) let compute in
            FP8, where ``wire`` is ``"fp8"``; gradients are e4m3 there, with ``fp8="hybrid"`` too. ``"experts"``: all,
            whatever Megatron's settings and the wire are, and nothing else of the model computes in FP8; needs no
            TransformerEngine.
    """

    take_flex: bool = False
    fp8: Fp8Experts = field(default="follow", metadata={"help": "follow (Megatron's fp8 settings) | experts (alone)"})

    def __post_init__(self) -> None:
        if self.fp8 not in get_args(Fp8Experts):
            limit = f"it must be one of {get_args(Fp8Experts)}"
            raise ConfigError.of("fp8", repr(self.fp8), limit, "choose one of these")

    def how_to_take(self, num_tokens: int) -> str:
        """What a user does to let a rank bring ``num_tokens`` tokens to a layer."""
        return f"start with --moe-ep-max-tokens-per-rank {num_tokens}, or {super().how_to_take(num_tokens)}"
