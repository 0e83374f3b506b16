"""Megatron-Core's token dispatcher contract, served by a :class:`~moe_ep_plugin.TokenDispatcher`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

from ...config import MAX_TOPK
from ...dispatcher import TokenDispatcher
from ...errors import ConfigError
from ...fp8 import Fp8Rows
from ...fp8_experts import row_multiple
from ...handle import DispatchHandle
from ..session import Session
from .options import Options
from .routing import topk_routing


class CommManager:
    """What travels between the steps of one forward, under the names that Megatron's schedules use.

    The 1F1B overlap puts detached tensors into ``token_probs`` before the dispatch and into ``dispatched_probs``
    before the experts, and CUDA graphs save and restore ``token_probs`` and ``token_indices`` around the dispatch;
    so both are read from here when they are needed, never from a local copy. A combine forgets them all: they
    carry the forward's graph, and ``dispatched_probs`` shares its leased memory with the received rows.

    Attributes:
        token_indices: int64 [num_rows, width] experts of the TP x EP group, -1 for none.
        token_probs: [num_rows, width] gate values.
        token_owner: int64 [num_rows] token of a row where tokens were split, or None.
        dispatched_probs: [num_received] gate values of the received rows.
        fp8: Whether the experts take FP8 rows.
        expert_alignment: Rows of an expert are padded to a multiple of this where they do. None: what the device wants.
        power_of_two_scales: Of the FP8 rows; None: as the session's option says.
        fp8_rows: The received rows until the experts take them, where they do.
    """

    def __init__(
        self, session: Session[Options], group: Any, *, num_experts: int, width: int, params_dtype: torch.dtype
    ) -> None:
        self.session = session
        self.group = group
        self.num_experts = num_experts
        self.width = width
        self.params_dtype = params_dtype
        self.token_indices: torch.Tensor | None = None
        self.token_probs: torch.Tensor | None = None
        self.token_owner: torch.Tensor | None = None
        self.dispatched_probs: torch.Tensor | None = None
        self.tokens_per_expert: torch.Tensor | None = None
        self.fp8 = False
        self.expert_alignment: int | None = None
        self.power_of_two_scales: bool | None = None
        self.fp8_rows: Fp8Rows | None = None
        self.num_tokens = 0
        self.handle: DispatchHandle | None = None
        self._dispatcher: TokenDispatcher | None = None

    def dispatch(self, tokens: torch.Tensor) -> torch.Tensor:
        """Send [num_tokens, hidden]; returns the received rows [num_received, hidden], grouped by local expert."""
        assert self.token_indices is not None and self.token_probs is not None
        self.num_tokens = tokens.shape[0]
        rows = tokens if self.token_owner is None else tokens.index_select(0, self.token_owner)
        alignment = 1
        if self.fp8:
            alignment = self.expert_alignment or row_multiple(rows.device)
        self._dispatcher = self.session.dispatcher(
            self.group,
            num_experts=self.num_experts,
            num_topk=self.width,
            hidden=rows.shape[1],
            dtype=max(rows.dtype, self.params_dtype, key=lambda dtype: dtype.itemsize),
            num_tokens=rows.shape[0],
            expert_alignment=alignment,
            power_of_two_scales=self.power_of_two_scales,
        )
        # Gate values cross in fp32 and reach the experts in the router's own dtype.
        dispatch = self._dispatcher.dispatch_fp8 if self.fp8 else self._dispatcher.dispatch
        out = dispatch(rows, self.token_indices, self.token_probs.float())
        assert out.topk_weights is not None
        self.handle = out.handle
        self.tokens_per_expert = out.tokens_per_expert
        self.dispatched_probs = out.topk_weights.to(self.token_probs.dtype)
        if not self.fp8:
            return out.x
        self.fp8_rows = Fp8Rows.from_dispatch(out)
        assert out.grad_rows is not None
        return out.grad_rows

    def take_fp8_rows(self, stand_in: torch.Tensor) -> Fp8Rows:
        """The rows of the last dispatch, once. Their gradient goes to ``stand_in``: a schedule may have detached it."""
        assert self.fp8_rows is not None
        rows, self.fp8_rows = self.fp8_rows, None
        return replace(rows, grad_rows=stand_in)

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """Bring [num_received, hidden] expert outputs back as sums [num_tokens, hidden]."""
        assert self.handle is not None and self._dispatcher is not None
        handle, self.handle = self.handle, None
        owner, self.token_owner = self.token_owner, None
        self.token_indices = self.token_probs = self.dispatched_probs = None
        out = self._dispatcher.combine(rows, handle)
        if owner is None:
            return out
        sums = torch.zeros(self.num_tokens, out.shape[1], dtype=torch.float32, device=out.device)
        return sums.index_add(0, owner, out.float()).to(out.dtype)

    def get_number_of_tokens_per_expert(self) -> torch.Tensor | None:
        """int64 [num_local_experts] rows of each local expert in the last dispatch."""
        return self.tokens_per_expert


class DeepepTokenDispatcher(MoETokenDispatcher):
    """Dispatch and combine of one MoE layer over its TP x EP group.

    Rows arrive grouped by local expert and return reduced, so the permute and unpermute steps of the contract
    are empty here.

    Args:
        num_local_experts: Experts of this rank.
        local_expert_indices: Their ids; Megatron numbers them contiguously.
        config: The layer's TransformerConfig.
        session: Installation that owns the buffers.
        groups: ``pg_collection=`` or, in 0.14, ``model_comm_pgs=``: the layer's process groups.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: Any,
        session: Session[Options],
        **groups: Any,
    ) -> None:
        super().__init__(config=config, **groups)
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        self.hidden_shape: torch.Size | None = None
        # Padding can send a token to every expert; otherwise the router's top-k bounds it.
        padded = config.moe_pad_expert_input_to_capacity or _router_padding(config)
        self.most_experts = config.num_moe_experts if padded else config.moe_router_topk
        group = self.tp_ep_group
        num_ranks = self.tp_size * self.ep_size
        if group is None and torch.distributed.get_world_size() != num_ranks:
            raise ConfigError.of(
                "tp_ep group", None, f"the layer has {num_ranks} ranks of a larger job", "pass the process groups"
            )
        self._comm_manager = CommManager(
            session,
            group,
            num_experts=config.num_moe_experts * self.tp_size,
            width=min(self.most_experts * self.tp_size, MAX_TOPK),
            params_dtype=config.params_dtype,
        )
        self.cudagraph_attrs = ["_comm_manager.token_probs", "_comm_manager.token_indices"]

    def keep_fp8(self, *, power_of_two_scales: bool | None = None, expert_alignment: int | None = None) -> None:
        """Hand the experts :class:`Fp8Rows` from now on. A stand-in of NaN takes their place between the two steps.

        Args:
            power_of_two_scales: Of the rows. None: as the session's option says.
            expert_alignment: Rows of each expert are padded to a multiple of this, with rows of zeros, and
                ``tokens_per_expert`` counts those. None: 16 on GPUs, 1 on CPUs.
        """
        manager = self._comm_manager
        manager.fp8, manager.power_of_two_scales = True, power_of_two_scales
        manager.expert_alignment = expert_alignment

    def set_shared_experts(self, shared_experts: Any) -> None:
        """Run ``shared_experts`` beside dispatch and combine."""
        super().set_shared_experts(shared_experts)
        self.cudagraph_attrs.append("shared_experts.cached_fc1_input")
        if getattr(shared_experts, "use_shared_expert_gate", False):
            self.cudagraph_attrs.append("shared_experts.gate_score")

    def get_expert_zero_copy_buffers(self) -> tuple[None, None]:
        """No buffers: only grouped experts of TransformerEngine take them, combine reads other rows just as well."""
        return None, None

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """List the experts of [S, B, H] tokens; returns [S * B, H] tokens and their gate values."""
        self.hidden_shape = hidden_states.shape
        if _router_padding(self.config):
            # The helper writes into the map that it is given, and the map is the router's.
            routing_map = moe_utils.pad_routing_map(routing_map.clone(), _padding_multiple(self.config))
        most = self.most_experts
        if routing_map.device.type == "cpu" and routing_map.numel():
            # A router of somebody else may choose more than moe_router_topk. Looking costs a synchronisation on
            # a GPU, where Megatron's own dispatchers rely on the limit too.
            most = max(most, int(routing_map.sum(dim=1).max()))
        routing = topk_routing(
            routing_map,
            probs,
            most_experts=most,
            width=self._comm_manager.width,
            tp_size=self.tp_size,
            num_local_experts=self.num_local_experts,
        )
        manager = self._comm_manager
        manager.token_indices, manager.token_probs, manager.token_owner = routing.indices, routing.probs, routing.owner
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        return hidden_states.reshape(-1, hidden_states.shape[-1]), routing.probs

    def token_dispatch(
        self,
        hidden_states: torch.Tensor,
        probs: torch.Tensor | None = None,
        async_finish: bool = True,
        allocate_on_comm_stream: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Send [S * B, H] tokens; returns received rows, grouped by local expert, and their gate values."""
        self._wait_for_shared_experts()
        rows = self._comm_manager.dispatch(hidden_states)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(rows)
        return rows, self._comm_manager.dispatched_probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor | None
    ) -> tuple[torch.Tensor | Fp8Rows, torch.Tensor | None, torch.Tensor | None]:
        """Returns rows, int64 [num_local_experts] rows per expert, and gate values [num_rows]; see :meth:`keep_fp8`."""
        manager = self._comm_manager
        if manager.fp8:
            return manager.take_fp8_rows(hidden_states), manager.tokens_per_expert, manager.dispatched_probs
        return hidden_states, manager.get_number_of_tokens_per_expert(), manager.dispatched_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Nothing to undo: combine takes the rows in the order in which they came."""
        return hidden_states

    def token_combine(
        self, hidden_states: torch.Tensor, async_finish: bool = True, allocate_on_comm_stream: bool = True
    ) -> torch.Tensor:
        """Bring expert outputs back; returns [S * B, H] sums."""
        self._wait_for_shared_experts()
        output = self._comm_manager.combine(hidden_states)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(output)
            self.shared_experts.post_forward_comm()
        return output

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Restore [S, B, H] and add the shared experts' output if they ran beside."""
        assert self.hidden_shape is not None
        output = hidden_states.view(self.hidden_shape)
        return output if self.shared_experts is None else output + self.shared_experts.get_output()

    def _wait_for_shared_experts(self) -> None:
        # Orders the shared experts' stream after the routed work that was queued; 0.14 to 0.17 lack the method
        # and order it in pre_forward_comm.
        if self.shared_experts is not None and hasattr(self.shared_experts, "wait_current_stream"):
            self.shared_experts.wait_current_stream()


def _router_padding(config: Any) -> bool:
    """Whether expert inputs are padded through the routing map; the setting was renamed in 0.16."""
    names = ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8")
    return any(getattr(config, name, False) for name in names)


def _padding_multiple(config: Any) -> int:
    """Rows per expert that quantised GEMMs want a multiple of; 1 where they want none."""
    if hasattr(moe_utils, "get_align_size_for_quantization"):
        return max(1, int(moe_utils.get_align_size_for_quantization(config)))
    from megatron.core.fp8_utils import get_fp8_align_size

    return int(get_fp8_align_size(config.fp8_recipe))
