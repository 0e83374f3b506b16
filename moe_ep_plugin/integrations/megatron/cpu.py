"""Megatron-Core on a machine without a GPU: the work-arounds it needs, in one place.

Megatron-Core asks ``torch.cuda`` for devices, random states and streams even where its tensors are on the
CPU. :func:`enable_cpu` gives those questions CPU answers. It changes the process (names in ``torch.cuda``,
``torch.Tensor.cuda``, four names of Megatron), so nothing calls it by itself where a GPU is present, and it
refuses to run there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from ...errors import ConfigError
from .upstream import define_missing_names, import_megatron

_MARK = "_moe_ep_plugin_cpu"


class CpuStream:
    """A stream and an event of a machine where work is done when the call returns: nothing to wait for."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None:
        """Return at once."""

    def wait_event(self, event: Any) -> None:
        """Return at once."""

    def wait(self, stream: Any = None) -> None:
        """Return at once."""

    def record(self, stream: Any = None) -> None:
        """Note nothing: there is nothing under way."""

    def record_event(self, event: Any = None) -> CpuStream:
        """The stream doubles as the event of what was queued on it."""
        return self

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Return True: everything has completed."""
        return True


def _replace(owner: Any, name: str, value: Callable[..., Any]) -> None:
    """Set ``owner.name`` once; a second call of enable_cpu leaves it alone."""
    if not getattr(getattr(owner, name, None), _MARK, False):
        setattr(value, _MARK, True)
        setattr(owner, name, value)


def enable_cpu() -> None:
    """Make Megatron-Core usable in this process, which has no GPU. Idempotent.

    Call it before models are built; Megatron-Core may have been imported already or not.

    Raises:
        ConfigError: This machine has a GPU.
        BackendUnavailable: Megatron-Core can't be imported.
    """
    if torch.cuda.is_available():
        raise ConfigError.of(
            "torch.cuda.is_available()",
            True,
            "enable_cpu() would send Megatron's GPU calls to the CPU",
            "leave the call out, or hide the GPUs with CUDA_VISIBLE_DEVICES=''",
        )
    _device_answers()
    _stream_answers()
    _random_answers()
    _megatron_fixes()


def _device_answers() -> None:
    def current_device() -> torch.device:
        return torch.device("cpu")

    def synchronize(device: Any = None) -> None: ...

    def cuda(self: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self

    # Megatron passes it as ``device=`` when it makes parameters, masks and receive buffers.
    _replace(torch.cuda, "current_device", current_device)
    # Timers, DDP and checkpoint code wait for the device.
    _replace(torch.cuda, "synchronize", synchronize)
    # Input batches, rotary tables and ``model.cuda()`` are moved with it.
    _replace(torch.Tensor, "cuda", cuda)


def _stream_answers() -> None:
    stream_of_process = CpuStream()

    class Stream(CpuStream):
        """``torch.cuda.Stream`` stays a class: annotations and isinstance use it as one."""

    class Event(CpuStream):
        """``torch.cuda.Event`` likewise."""

    def current_stream(device: Any = None) -> CpuStream:
        return stream_of_process

    def default_stream(device: Any = None) -> CpuStream:
        return stream_of_process

    def stream(stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    # The alltoall dispatcher copies its splits on a side stream and overlapped shared experts run on another
    # one; both create streams when the model is built.
    _replace(torch.cuda, "Stream", Stream)
    _replace(torch.cuda, "Event", Event)
    _replace(torch.cuda, "current_stream", current_stream)
    _replace(torch.cuda, "default_stream", default_stream)
    _replace(torch.cuda, "stream", stream)


def _random_answers() -> None:
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    # The tracker of model-parallel random states keeps named states and switches between them (weight
    # initialisation, dropout, recompute). On the CPU there is one generator, and it is switched instead.
    _replace(torch.cuda, "get_rng_state", get_rng_state)
    _replace(torch.cuda, "set_rng_state", set_rng_state)
    _replace(torch.cuda, "manual_seed", manual_seed)


def _megatron_fixes() -> None:
    define_missing_names()
    random = import_megatron("megatron.core.tensor_parallel.random")
    token_dispatcher = import_megatron("megatron.core.transformer.moe.token_dispatcher")

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    # Same reason as above; these two go to the CUDA generator without passing torch.cuda's public functions.
    # tensor_parallel.checkpoint saves and restores through them.
    _replace(random, "_get_cuda_rng_state", get_state)
    _replace(random, "_set_cuda_rng_state", set_state)

    move = token_dispatcher.maybe_move_tensor_to_cpu

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor) and tensor.device.type == "cpu":
            return tensor.numpy()
        return move(tensor, as_numpy=as_numpy, record_stream=record_stream)

    # It honours ``as_numpy`` for CUDA tensors only, and all_to_all_single refuses splits that are tensors.
    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", maybe_move_tensor_to_cpu)

    # Where TransformerEngine is installed this is its norm, whatever the layers are, and that computes on GPUs alone.
    block = import_megatron("megatron.core.transformer.transformer_block")
    norm = import_megatron("megatron.core.transformer.torch_norm").WrappedTorchNorm
    _replace(block, "LayerNormImpl", norm)
