"""What a DeepSpeed job can set on our dispatcher, by ``install(...)`` or in the DeepSpeed config."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ConfigError
from ..options import BufferOptions

CONFIG_KEY = "moe_ep_plugin"
"""Section of the DeepSpeed config that holds these options, and ``"enabled"``."""


@dataclass(frozen=True, kw_only=True)
class Options(BufferOptions):
    """Settings of every buffer, and what else is served.

    Attributes:
        autoep: Serve AutoEP's communication backend ``"deepep"``. False leaves it to the deep_ep package.
        fp8_experts: Experts of AutoEP layers compute on FP8 rows as they were dispatched, with TransformerEngine's
            GEMMs on GPUs, emulated elsewhere (:class:`~moe_ep_plugin.Fp8GroupedExperts`). Rows cross on the FP8 wire
            with power-of-two scales then, whatever ``wire`` and ``power_of_two_scales`` say. ZeRO stages 0 to 2,
            SwiGLU experts without bias; anything else is refused. Parameters and checkpoints are DeepSpeed's.

    Raises:
        ConfigError: ``fp8_experts`` without ``autoep``.
    """

    autoep: bool = True
    fp8_experts: bool = False

    def __post_init__(self) -> None:
        if self.fp8_experts and not self.autoep:
            raise ConfigError.of("autoep", False, "fp8_experts needs AutoEP's rows from us", "leave one of the two out")

    def how_to_take(self, num_tokens: int) -> str:
        """What a user does to let a rank bring ``num_tokens`` tokens to a layer."""
        section = f'"{CONFIG_KEY}": {{"max_tokens_per_rank": {num_tokens}}}'
        return f"put {section} in the DeepSpeed config, or {super().how_to_take(num_tokens)}"
