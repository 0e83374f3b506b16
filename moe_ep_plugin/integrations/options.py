"""What a job can set on the buffers that its framework's MoE layers make."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..types import BackendName, Expand, Wire


@dataclass(frozen=True, kw_only=True)
class BufferOptions:
    """Settings of every buffer that MoE layers make; equal on every rank. See :class:`EpConfig`.

    Attributes:
        backend: How bytes move.
        wire: ``"fp8"`` quantises rows while they are sent and dequantises them for the experts.
        grad_wire: The same for gradients on their way to the experts. Those that come back cross unquantised.
        power_of_two_scales: FP8 scales rounded up to powers of two.
        expand: How expert-major rows are made.
        host_threads: Copy threads a rank uses on the host backend.
        num_sms: SMs that communication kernels may use; no effect on the CPU backends.
        local_sms: SMs of kernels that stay on a GPU; see :class:`EpConfig`.
        pool_bytes: Most bytes for leased rows.
        shm_dir: Directory of a tmpfs that the host backend takes memory from.
        timeout_s: Longest wait for a peer, in seconds. The default is long because one rank may write a checkpoint
            or compile for minutes while the others wait in their next MoE layer.
        max_tokens_per_rank: Most tokens that a rank brings to one MoE layer, in training and in evaluation.
            None: the next power of two from twice the largest count over ranks in the first forward. A token
            with more than 32 experts (padding to capacity) counts once per 32.
    """

    backend: BackendName = field(default="auto", metadata={"help": "auto | host | cuda | collective"})
    wire: Wire = field(default="bf16", metadata={"help": "bf16 (unquantised) | fp8"})
    grad_wire: Wire = field(default="bf16", metadata={"help": "of gradients to the experts: bf16 (unquantised) | fp8"})
    power_of_two_scales: bool = False
    expand: Expand = "auto"
    host_threads: int | None = field(default=None, metadata={"help": "copy threads per rank, host backend"})
    num_sms: int | None = field(default=None, metadata={"help": "SMs for communication kernels, GPU only"})
    local_sms: int | None = field(default=None, metadata={"help": "SMs for kernels that stay on a GPU, GPU only"})
    pool_bytes: int | None = field(default=None, metadata={"help": "most bytes for leased rows"})
    shm_dir: str = field(default="/dev/shm", metadata={"help": "directory of a tmpfs, host backend"})
    timeout_s: float = field(default=600.0, metadata={"help": "longest wait for a peer, seconds"})
    max_tokens_per_rank: int | None = field(default=None, metadata={"help": "most tokens a rank brings to a layer"})

    def how_to_take(self, num_tokens: int) -> str:
        """What a user does to let a rank bring ``num_tokens`` tokens to a layer."""
        return f"install(max_tokens_per_rank={num_tokens})"
