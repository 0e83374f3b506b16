"""What a Megatron job can set on our dispatcher, by ``install(...)`` or by flags."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import BufferOptions


@dataclass(frozen=True, kw_only=True)
class Options(BufferOptions):
    """Settings of every buffer, and which layers are served.

    Attributes:
        take_flex: Serve layers of type ``"flex"`` too, not only ``"deepep"``. The command line needs it,
            where Megatron's own parser knows no other value.
    """

    take_flex: bool = False

    def how_to_take(self, num_tokens: int) -> str:
        """What a user does to let a rank bring ``num_tokens`` tokens to a layer."""
        return f"start with --moe-ep-max-tokens-per-rank {num_tokens}, or {super().how_to_take(num_tokens)}"
