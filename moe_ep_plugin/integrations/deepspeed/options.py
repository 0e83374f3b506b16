"""What a DeepSpeed job can set on our dispatcher, by ``install(...)`` or in the DeepSpeed config."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import BufferOptions

CONFIG_KEY = "moe_ep_plugin"
"""Section of the DeepSpeed config that holds these options, and ``"enabled"``."""


@dataclass(frozen=True, kw_only=True)
class Options(BufferOptions):
    """Settings of every buffer, and what else is served.

    Attributes:
        autoep: Serve AutoEP's communication backend ``"deepep"``. False leaves it to the deep_ep package.
    """

    autoep: bool = True

    def how_to_take(self, num_tokens: int) -> str:
        """What a user does to let a rank bring ``num_tokens`` tokens to a layer."""
        section = f'"{CONFIG_KEY}": {{"max_tokens_per_rank": {num_tokens}}}'
        return f"put {section} in the DeepSpeed config, or {super().how_to_take(num_tokens)}"
