"""AutoEP's communication backend ``"deepep"``, served by our buffers.

AutoEP asks a module named deep_ep for an ``ElasticBuffer``; while we are installed it is given one that has the
methods and attributes that AutoEP uses, on CPUs and GPUs, in fp32, bf16 and fp16.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ...buffer import EpBuffer
from ...config import SUPPORTED_DTYPES
from ...errors import ConfigError, StateError
from ...fp8 import stand_in
from ...fp8_experts import row_multiple
from ...handle import DispatchHandle
from ...types import DispatchOutput
from ...wire import dequantized
from ..patching import Installation
from ..session import Session
from .install import current_session
from .options import CONFIG_KEY, Options
from .upstream import import_deepspeed


@dataclass(frozen=True, eq=False)
class ElasticHandle:
    """What AutoEP reads of a dispatch's handle.

    Attributes:
        routing: Our own handle.
        topk_idx: int64 [num_tokens, num_topk] as dispatched.
        num_expanded_tokens: Rows received.
        psum_num_recv_tokens_per_expert: int32 [num_local_experts]: rows received up to and with each local expert.
        do_expand: Rows are grouped by expert, one for every (token, expert).
    """

    routing: DispatchHandle
    topk_idx: torch.Tensor
    num_expanded_tokens: int
    psum_num_recv_tokens_per_expert: torch.Tensor
    do_expand: bool = True


class ElasticBuffer:
    """Dispatch and combine as AutoEP calls them.

    Memory is taken at the first dispatch, when the rows' dtype is known, from the installation that is there then;
    and again at the next dispatch after its session was closed.

    With the option ``fp8_experts`` a forward dispatch keeps its rows FP8 for :meth:`take_fp8`, and returns what stands
    for them in autograd.

    Args:
        group: The expert-parallel group.
        num_max_tokens_per_rank: Most tokens of one dispatch.
        hidden: Elements of a row.
        num_topk: Experts of a token.
        unused: Settings of networks that our buffers don't have.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int,
        **unused: Any,
    ) -> None:
        self._group = group
        self._shape = {"max_tokens_per_rank": num_max_tokens_per_rank, "hidden": hidden, "num_topk": num_topk}
        self._buffer: EpBuffer | None = None
        self._owner: Session[Options] | None = None
        self._received: DispatchOutput | None = None

    def dispatch(
        self,
        x: torch.Tensor,
        *,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        num_experts: int | None = None,
        handle: ElasticHandle | None = None,
        do_expand: bool = True,
        expert_alignment: int = 1,
        num_sms: int = 0,
    ) -> tuple[torch.Tensor, None, torch.Tensor | None, ElasticHandle, None]:
        """Send [num_tokens, hidden], anew or along an earlier dispatch's routing.

        Returns:
            Rows grouped by local expert, None, their weights fp32 [num_rows] (None if none were sent), the handle,
            None. Rows that stay FP8 are replaced by [num_rows, hidden] of NaN in the dtype of ``x``, one element of
            memory.
        """
        if not do_expand or expert_alignment != 1:
            raise ConfigError.of(
                "dispatch of AutoEP's backend",
                f"called with do_expand={do_expand}, expert_alignment={expert_alignment}",
                "rows are grouped by expert without padding",
                "use a DeepSpeed version that moe_ep_plugin supports",
            )
        buffer = self._open(num_experts, x) if handle is None else self._opened()
        assert self._owner is not None
        # Gradients come without weights.
        forward = topk_weights is not None
        keep_fp8 = forward and self._owner.options.fp8_experts
        out = buffer.dispatch(
            x.contiguous(),
            topk_idx,
            topk_weights,
            handle=None if handle is None else handle.routing,
            wire=("fp8" if keep_fp8 else None) if forward else self._owner.options.grad_wire,
            num_sms=_sms(buffer, num_sms),
        )
        if handle is None:
            assert topk_idx is not None
            places = out.tokens_per_expert.cumsum(0).to(device=x.device, dtype=torch.int32)
            handle = ElasticHandle(out.handle, topk_idx, out.handle.num_rows, places)
        if keep_fp8:
            self._received = out
        rows = stand_in(out.x, x.dtype) if keep_fp8 else dequantized(out.x, out.scale, x.dtype)
        return rows, None, out.topk_weights, handle, None

    def take_fp8(self) -> DispatchOutput:
        """What the last forward dispatch received, FP8 rows and scales among it; once."""
        out, self._received = self._received, None
        assert out is not None, "the option fp8_experts is set, and a dispatch came before"
        return out

    def combine(
        self, rows: torch.Tensor, *, handle: ElasticHandle, topk_weights: torch.Tensor | None = None, num_sms: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Bring [num_rows, hidden] back as sums; ``topk_weights`` [num_rows] travel beside and weigh nothing.

        Returns:
            [num_tokens, hidden], fp32 [num_tokens, num_topk] or None, None.
        """
        buffer = self._opened()
        values = None if topk_weights is None else topk_weights.float().reshape(-1)
        out = buffer.combine_with_values(
            rows.contiguous(), handle.routing, row_values=values, num_sms=_sms(buffer, num_sms)
        )
        return out.x, out.row_values, None

    def destroy(self) -> None:
        """Give the memory back; collective, idempotent."""
        if self._buffer is not None and self._owner is not None:
            self._owner.close_buffer(self._buffer)
        self._buffer = self._owner = self._received = None

    def _open(self, num_experts: int | None, x: torch.Tensor) -> EpBuffer:
        session = current_session()
        if session is None:
            raise StateError(
                "AutoEP's layers use moe_ep_plugin, which has been uninstalled since; call install() again"
            )
        if self._buffer is None or self._buffer not in session.buffers:
            self._owner = session
            shape: dict[str, Any] = dict(self._shape)
            if session.options.fp8_experts:
                shape |= {"expert_alignment": row_multiple(x.device), "power_of_two_scales": True}
            self._buffer = session.open_buffer(
                self._group, num_experts=num_experts, dtype=x.dtype, device=x.device.type, **shape
            )
        return self._buffer

    def _opened(self) -> EpBuffer:
        assert self._buffer is not None, "a handle comes from a dispatch"
        return self._buffer


def _sms(buffer: EpBuffer, num_sms: int) -> int | None:
    """AutoEP's ``comm_num_sm``, unless the options have a number; it has no meaning on CPU backends.

    AutoEP asks for 12 where a job says nothing, which may be more than the share of a rank that shares its GPU.
    """
    most = buffer.most_sms
    return min(num_sms, most) if most is not None and buffer.config.num_sms is None and num_sms > 0 else None


def serve_autoep(installation: Installation[Options]) -> None:
    """Give our buffers to AutoEP layers of backend ``"deepep"``."""
    comm = import_deepspeed("deepspeed.module_inject.auto_ep_comm")
    layer = import_deepspeed("deepspeed.module_inject.auto_ep_layer")
    deepspeed_comm = import_deepspeed("deepspeed.comm")
    session = installation.session
    ours = types.SimpleNamespace(
        ElasticBuffer=ElasticBuffer,
        topk_idx_t=torch.int64,
        SUPPORTED_DTYPES=SUPPORTED_DTYPES,
    )
    find, refuse, barrier = comm._import_deep_ep, layer.assert_dtype_supported, deepspeed_comm.barrier

    @functools.wraps(find)
    def import_deep_ep() -> Any:
        return ours if session.options.autoep else find()

    @functools.wraps(refuse)
    def assert_dtype_supported(dtype: torch.dtype, *backend: str) -> None:
        if not session.options.autoep:
            refuse(dtype, *backend)
        elif dtype not in SUPPORTED_DTYPES:
            raise ConfigError.of("dtype of AutoEP's rows", dtype, f"it must be one of {SUPPORTED_DTYPES}", "choose one")

    @functools.wraps(barrier)
    def barrier_of_devices(group: Any = None, async_op: bool = False, device_ids: Any = None, **more: Any) -> Any:
        # AutoEP names the device of its tensors; a CPU has no number, and gloo takes none.
        numbered = device_ids and None not in device_ids and dist.get_backend(group) != "gloo"
        return barrier(group=group, async_op=async_op, device_ids=device_ids if numbered else None, **more)

    installation.put(comm, "_import_deep_ep", import_deep_ep)
    installation.put(layer, "assert_dtype_supported", assert_dtype_supported)
    installation.put(deepspeed_comm, "barrier", barrier_of_devices)
    if hasattr(comm, "COMM_MODULES"):
        # A source tree with our patch has a name for us, beside which deep_ep itself can be used.
        installation.add(comm.COMM_MODULES, CONFIG_KEY, ours)
