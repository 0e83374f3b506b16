"""The parts of a native DeepSpeed MoE layer as dropless ones.

Layers become ours by having the class of three modules changed: the MOELayer, its gate and its experts. Parameters,
names, groups, marks and hooks are attributes of the objects, which stay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.mappings import drop_tokens, gather_tokens
from deepspeed.moe.sharded_moe import FIRST_ALLTOALL_TIMER, MOE_TIMER, SECOND_ALLTOALL_TIMER, MOELayer
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch.nn import functional as F

from ...errors import StateError
from .gate import Routes
from .install import current_session


class EpExperts(Experts):
    """Local experts on ragged rows."""

    def forward(self, rows: torch.Tensor, tokens_per_expert: torch.Tensor) -> torch.Tensor:
        """Run each expert on its rows, also on none: its gradients must be there on every replica.

        Args:
            rows: [num_rows, hidden], grouped by local expert.
            tokens_per_expert: int64 [num_local_experts].

        Returns:
            [num_rows, hidden].
        """
        chunks = rows.split(tokens_per_expert.tolist())
        outputs = [expert(chunk) for chunk, expert in zip(chunks, self.deepspeed_experts, strict=True)]
        # An expert may return (output, bias), of which upstream takes the output.
        return torch.cat([output[0] if isinstance(output, tuple) else output for output in outputs])


class EpMOELayer(MOELayer):
    """Dispatch, experts, combine: no capacity, no padding, no all-reduce of counts."""

    def forward(self, hidden_states: torch.Tensor, used_token: torch.Tensor | None = None) -> torch.Tensor:
        """Run the layer on [..., hidden]; sets ``l_aux`` and ``exp_counts``."""
        session = current_session()
        if session is None:
            raise StateError(
                "this MoE layer was converted, but moe_ep_plugin has been uninstalled since; call install() again"
            )
        if self.ep_group is None:
            raise StateError(
                f"the expert-parallel group {self.ep_group_name} of this MoE layer is None, but a forward needs it; "
                "pass the model to deepspeed.initialize first, or call set_deepspeed_parallelism() of every MoE layer"
            )
        with self._timed(MOE_TIMER, "time_moe"):
            x = hidden_states.reshape(-1, hidden_states.shape[-1])
            routes = self.gate(x, used_token)
            if not isinstance(routes, Routes):
                raise StateError(
                    f"the gate of this MoE layer is a {type(self.gate).__name__}, put there after the layer was made "
                    'ours, and gives no routes; install with "enabled": false in the DeepSpeed config, or give '
                    "convert() the parts of a model without it"
                )
            self.l_aux, self.exp_counts = routes.l_aux, routes.exp_counts
            num_tokens, experts, weights = x.shape[0], routes.experts, routes.weights
            split = _tokens_are_split()
            if split:
                x, experts, weights = _my_tokens(x, experts, weights)
            weight_dtype = next((p.dtype for p in self.experts.parameters()), x.dtype)
            dispatcher = session.dispatcher(
                self.ep_group,
                num_experts=self.ep_size * self.num_local_experts,
                num_topk=experts.shape[1],
                hidden=x.shape[1],
                dtype=max(x.dtype, weight_dtype, key=lambda dtype: dtype.itemsize),
                num_tokens=x.shape[0],
                # DS_ACCELERATOR=cpu keeps a job from the GPU that is there.
                device=x.device.type,
            )
            with self._timed(FIRST_ALLTOALL_TIMER, "time_falltoall"):
                sent = dispatcher.dispatch(x.contiguous(), experts, weights)
            rows = self.experts(sent.x, sent.tokens_per_expert)
            with self._timed(SECOND_ALLTOALL_TIMER, "time_salltoall"):
                output = dispatcher.combine(rows, sent.handle, topk_weights=sent.topk_weights)
            if split:
                output = gather_tokens(output.reshape(-1), dim=0).view(-1, x.shape[1])[:num_tokens]
            return output.reshape(hidden_states.shape)

    @contextlib.contextmanager
    def _timed(self, timer: str, attribute: str) -> Iterator[None]:
        if not self.wall_clock_breakdown:
            yield
            return
        self.timers(timer).start()
        try:
            yield
        finally:
            self.timers(timer).stop()
        setattr(self, attribute, self.timers(timer).elapsed(reset=False))


def _tokens_are_split() -> bool:
    """Whether each tensor-parallel rank dispatches a share of the tokens, which all of them hold.

    Where experts are tensor-parallel too, the shards of an expert need all rows, and get them from the rank with the
    same tensor-parallel index.
    """
    tensor_parallel = groups.mpu is not None and bwc_tensor_model_parallel_world_size(groups.mpu) > 1
    return bool(tensor_parallel and groups._get_expert_model_parallel_world_size() == 1)


def _my_tokens(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """This tensor-parallel rank's share of x, experts and weights [num_tokens, ...], padded to equal shares."""
    x, experts, weights = tensors
    missing = -len(x) % bwc_tensor_model_parallel_world_size(groups.mpu)
    if missing:
        x, weights = (F.pad(tensor, (0, 0, 0, missing)) for tensor in (x, weights))
        experts = F.pad(experts, (0, 0, 0, missing), value=-1)
    # Flat, because the gather of gradients in the backward of drop_tokens passes shapes that gloo refuses.
    return [drop_tokens(tensor.reshape(-1), dim=0).view(-1, tensor.shape[1]) for tensor in (x, experts, weights)]
