"""The settings of a buffer: frozen, validated when made, equal on every rank of the group."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, get_args

import torch

from .errors import ConfigError
from .types import BackendName, Expand, Layout, Wire

if TYPE_CHECKING:
    from .memory import MemoryPlan

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TOPK = 32
ROW_ALIGNMENT_BYTES = 16
MAX_TIMEOUT_S = 1_000_000
MAX_LOW_LATENCY_ROUTES = 8192
"""Tokens times top-k of one low-latency dispatch: every block of a kernel looks at all of them."""


def _require(ok: bool, argument: str, value: object, limit: str, remedy: str) -> None:
    if not ok:
        raise ConfigError.of(argument, value, limit, remedy)


@dataclass(frozen=True, kw_only=True)
class EpConfig:
    """Settings of an expert-parallel buffer.

    All but ``host_threads``, ``num_sms``, ``local_sms`` and ``shm_dir`` must be equal on all ranks, which is checked.

    Attributes:
        num_experts: Experts in the whole group, at least 1. May be fewer than ranks and need not divide
            evenly.
        num_topk: Most experts that a token may be sent to: columns of ``topk_idx``, 1 to 32.
        hidden: Elements in a row; ``hidden`` times the element size must be a multiple of 16 bytes.
        max_tokens_per_rank: Most tokens that a rank passes to one dispatch; sizes the heap.
        dtype: Widest element type that rows will have; sizes the heap.
        backend: ``"auto"`` takes the first that can run of cuda, host, collective, and logs why the
            earlier ones could not.
        device: ``"cpu"`` or ``"cuda"``: where the tensors live. None: CUDA if there is a device.
        wire: ``"bf16"``: rows cross unquantised, in their own dtype (fp16 and fp32 rows too).
            ``"fp8"``: e4m3 in blocks of 128 along hidden, quantised while sending.
        power_of_two_scales: FP8 scales rounded up to powers of two.
        expert_alignment: Rows of each local expert are padded to a multiple of this in layout
            ``"expert"``.
        expert_to_rank: The rank of every expert. None: contiguous, as even as possible.
        expand: How layout ``"expert"`` is made: ``"direct"`` writes every copy from the sender,
            ``"two_stage"`` sends a token once per rank and fans it out there; ``"auto"`` takes what moves
            fewer bytes through the slowest link, which is ``"direct"`` inside one machine's or GPU's memory. In two
            stages a rank's sum for a token crosses rounded to the rows' dtype.
        num_sms: SMs that communication kernels may use. None: this rank's share of its GPU, at most 24; at most 16
            for dispatch and combine, of any layout, of a buffer whose expert-major rows take two stages among more
            than two GPUs. No effect on the CPU backends.
        local_sms: SMs of kernels that stay on a GPU, as two stages have: rows written to their experts' places after
            they have crossed, and summed before they cross back. Where each rank has a GPU of its own they run beside
            those of ``num_sms``, on SMs that these leave: of the whole GPU for sums, of half of it for a dispatch;
            after them, where that is less than half of ``local_sms``. None: ``num_sms`` where it or the call sets it,
            else this rank's share of its GPU, at most 64.
        host_threads: Copy threads a rank uses on the host backend. None: this process's cores divided by
            the ranks that share them.
        pool_bytes: Most bytes of the heap for leased rows; on GPUs they are taken when the buffer is made. None: see
            :meth:`memory_plan`. When it is used up, received rows are copied out of the heap instead, and that is
            counted and logged.
        low_latency_tokens_per_rank: Most tokens that a rank passes to one low-latency dispatch; the fixed slots of
            that mode are reserved when the buffer is made, see :meth:`memory_plan`. None: no low-latency mode.
            This times ``num_topk`` is at most 8192: more is what :meth:`EpBuffer.dispatch` is for.
        low_latency_layout: What a low-latency dispatch returns: ``"expert"``, rows by local expert, or ``"rank"``,
            one row per (source rank, token), which needs less memory. ``wire`` sizes its receive buffers.
        mask_on_timeout: In low-latency mode, go on without a rank that does not do its part within ``timeout_s``
            instead of raising PeerTimeout; see :meth:`EpBuffer.mask_ranks`.
        shm_dir: Directory of a tmpfs that the host backend takes memory from.
        timeout_s: Longest wait for a peer, in seconds.
    """

    num_experts: int
    num_topk: int
    hidden: int
    max_tokens_per_rank: int
    dtype: torch.dtype = torch.bfloat16
    backend: BackendName = "auto"
    device: str | None = None
    wire: Wire = "bf16"
    power_of_two_scales: bool = False
    expert_alignment: int = 1
    expert_to_rank: tuple[int, ...] | None = None
    expand: Expand = "auto"
    num_sms: int | None = None
    local_sms: int | None = None
    host_threads: int | None = None
    pool_bytes: int | None = None
    low_latency_tokens_per_rank: int | None = None
    low_latency_layout: Layout = "expert"
    mask_on_timeout: bool = False
    shm_dir: str = "/dev/shm"
    timeout_s: float = 100.0

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_topk", "hidden", "max_tokens_per_rank", "expert_alignment"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(
                whole and value >= 1, name, repr(value), "it must be a whole number of at least 1", f"set {name} >= 1"
            )
        for name in ("num_sms", "local_sms", "host_threads", "pool_bytes", "low_latency_tokens_per_rank"):
            value = getattr(self, name)
            _require(
                value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1),
                name,
                repr(value),
                "it must be None or a whole number of at least 1",
                f"leave {name} out",
            )
        for name, kind in (
            ("backend", BackendName),
            ("wire", Wire),
            ("expand", Expand),
            ("low_latency_layout", Layout),
        ):
            value = getattr(self, name)
            _require(
                value in get_args(kind), name, repr(value), f"it must be one of {get_args(kind)}", "choose one of these"
            )
        _require(
            self.num_topk <= MAX_TOPK, "num_topk", self.num_topk, f"at most {MAX_TOPK} are supported", "lower num_topk"
        )
        tokens = self.low_latency_tokens_per_rank
        _require(
            tokens is None or tokens * self.num_topk <= MAX_LOW_LATENCY_ROUTES,
            "low_latency_tokens_per_rank",
            tokens,
            f"times num_topk ({self.num_topk}) it may be at most {MAX_LOW_LATENCY_ROUTES}",
            "use EpBuffer.dispatch for so many tokens",
        )
        _require(
            isinstance(self.mask_on_timeout, bool),
            "mask_on_timeout",
            repr(self.mask_on_timeout),
            "it must be True or False",
            "choose one",
        )
        _require(
            self.dtype in SUPPORTED_DTYPES,
            "dtype",
            self.dtype,
            f"rows must be one of {SUPPORTED_DTYPES}",
            "set dtype to the widest of these that you dispatch",
        )
        self.check_row_bytes(self.dtype)
        _require(
            self.device is None or (isinstance(self.device, str) and self.device.split(":")[0] in ("cpu", "cuda")),
            "device",
            repr(self.device),
            "rows live on 'cpu' or 'cuda'",
            "choose one of these, or leave it out",
        )
        _require(
            isinstance(self.timeout_s, (int, float)) and 0 < self.timeout_s <= MAX_TIMEOUT_S,
            "timeout_s",
            repr(self.timeout_s),
            f"it must be a number of seconds above 0 and at most {MAX_TIMEOUT_S}",
            "use a large value such as 3600 if waits are long",
        )
        _require(isinstance(self.shm_dir, str), "shm_dir", repr(self.shm_dir), "it must be a path", "use '/dev/shm'")
        if self.expert_to_rank is not None:
            whole = all(isinstance(rank, int) for rank in self.expert_to_rank)
            _require(whole, "expert_to_rank", self.expert_to_rank, "it must hold whole numbers", "give a rank each")
            object.__setattr__(self, "expert_to_rank", tuple(int(r) for r in self.expert_to_rank))
            _require(
                len(self.expert_to_rank) == self.num_experts,
                "expert_to_rank",
                f"{len(self.expert_to_rank)} entries long",
                f"num_experts is {self.num_experts}",
                "give one rank for every expert",
            )

    def check_row_bytes(self, dtype: torch.dtype) -> None:
        """Raise ConfigError unless a row of ``dtype`` is a multiple of 16 bytes."""
        row_bytes = self.hidden * dtype.itemsize
        _require(
            row_bytes % ROW_ALIGNMENT_BYTES == 0,
            "hidden",
            f"{self.hidden} ({row_bytes} bytes of {dtype})",
            f"a row must be a multiple of {ROW_ALIGNMENT_BYTES} bytes",
            f"pad hidden to a multiple of {ROW_ALIGNMENT_BYTES // dtype.itemsize}",
        )

    @cached_property
    def device_type(self) -> str:
        """``"cpu"`` or ``"cuda"``, chosen by what the machine has where ``device`` is None."""
        if self.device is not None:
            return torch.device(self.device).type
        return "cuda" if torch.cuda.is_available() else "cpu"

    def agreed_fields(self) -> dict[str, str]:
        """The settings that every rank must have set alike, as text, for the check at start-up."""
        own = {"host_threads", "num_sms", "local_sms", "device", "shm_dir"}
        return {f.name: str(getattr(self, f.name)) for f in fields(self) if f.name not in own} | {
            "device": self.device_type
        }

    def memory_plan(self, num_ranks: int) -> MemoryPlan:
        """Bytes of the symmetric heap that one rank of ``num_ranks`` reserves, by purpose."""
        from .memory import plan

        return plan(self, num_ranks)
