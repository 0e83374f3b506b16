"""Putting our dispatcher where Megatron-Core's MoE layers look for theirs, and taking it out again."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

from ...errors import BackendUnavailable, ConfigError
from ..patching import Installation
from ..session import Session
from .options import Options
from .upstream import define_missing_names, has_transformer_engine, import_megatron

OLDEST = (0, 14)
NEWEST = (0, 19)

_OURS = "deepep"


class DispatcherType(str):
    """The value ``"flex"`` of ``moe_token_dispatcher_type``, marked as ours.

    Megatron's code compares it and finds the dispatcher type whose contract we serve; the mark survives copies of
    the config and ``dataclasses.replace``.
    """

    __slots__ = ()

    def __new__(cls, value: str = "flex") -> DispatcherType:
        """Make the value; copies pass it on."""
        return super().__new__(cls, value)


class MegatronInstallation(Installation[Options]):
    """Our changes in Megatron's modules.

    It replaces ``MoEFlexTokenDispatcher`` in Megatron's MoE layer module, so the installation is found where it
    acts and nowhere else.
    """

    def __call__(self, num_local_experts: int, local_expert_indices: list[int], config: Any, **groups: Any) -> Any:
        """Make the dispatcher of a layer of type flex: ours if its config says so."""
        if not isinstance(config.moe_token_dispatcher_type, DispatcherType):
            return self.upstream(num_local_experts, local_expert_indices, config=config, **groups)
        from .dispatcher import DeepepTokenDispatcher

        return DeepepTokenDispatcher(num_local_experts, local_expert_indices, config, self.session, **groups)

    upstream: Callable[..., Any]


def install(**options: Any) -> Session[Options]:
    """Let ``TransformerConfig(moe_token_dispatcher_type="deepep")`` mean our dispatcher. Idempotent.

    Call it before configs are made. Layers of other types are not touched. A second call returns the same
    session, with the options given changed.

    Args:
        options: Fields of :class:`Options`.

    Returns:
        The session: ``statistics()``, ``close()``.

    Raises:
        BackendUnavailable: Megatron-Core is missing, or of a version that was not tested.
        ConfigError: An option is unknown, or is changed while buffers are open.
    """
    check_version()
    present = _installation()
    if present is not None:
        present.session.configure(**options)
        return present.session
    session = Session(Options())
    session.configure(**options)
    installation = MegatronInstallation(session)
    define_missing_names()
    moe_layer = import_megatron("megatron.core.transformer.moe.moe_layer")
    with installation.whole():
        _accept_type(installation)
        _keep_expert_inputs(installation)
        _convert_experts(installation, moe_layer.MoELayer)
        installation.upstream = installation.put(moe_layer, "MoEFlexTokenDispatcher", installation)
    return session


def uninstall() -> None:
    """Undo :func:`install` and close the buffers; no-op when not installed. Layers made before stop working."""
    present = _installation()
    if present is not None:
        present.remove()


def current_session() -> Session[Options] | None:
    """The session of :func:`install`, None when not installed."""
    present = _installation()
    return None if present is None else present.session


def statistics() -> dict[str, Any]:
    """:meth:`Session.statistics` of the installation; empty when not installed."""
    session = current_session()
    return {} if session is None else session.statistics()


def check_version() -> str:
    """The version of Megatron-Core, if it is one that we serve.

    Raises:
        BackendUnavailable: It is missing, can't be imported, or is outside the range.
    """
    supported = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    version = str(import_megatron("megatron.core").__version__)
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        raise BackendUnavailable(
            f"megatron-core is {version}, but {supported} are supported; install one of these "
            f"(pip install 'megatron-core>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}'), or a moe_ep_plugin "
            "that knows this version"
        )
    return version


def _installation() -> MegatronInstallation | None:
    # A module that nobody has imported has not been changed by us.
    moe_layer = sys.modules.get("megatron.core.transformer.moe.moe_layer")
    found = getattr(moe_layer, "MoEFlexTokenDispatcher", None)
    return found if isinstance(found, MegatronInstallation) else None


def _accept_type(installation: MegatronInstallation) -> None:
    config_class = importlib.import_module("megatron.core.transformer.transformer_config").TransformerConfig
    validate = config_class.__post_init__

    @functools.wraps(validate)
    def post_init(config: Any) -> None:
        wanted = config.moe_token_dispatcher_type
        take_flex = installation.session.options.take_flex
        if not (wanted == _OURS or isinstance(wanted, DispatcherType) or (take_flex and wanted == "flex")):
            validate(config)
            return
        if getattr(config, "fp8", None) and not has_transformer_engine():
            raise ConfigError.of(
                "fp8",
                repr(config.fp8),
                "Megatron-Core computes in FP8 with TransformerEngine, which is not installed",
                "install transformer-engine, or leave fp8 (--fp8-format) out and let the experts alone compute in FP8: "
                "--moe-ep-fp8 experts, install(fp8='experts')",
            )
        # Megatron refuses for flex what its own flex back ends lack and we have (padding to capacity, shared
        # expert overlap), and permits for alltoall what we serve.
        config.moe_token_dispatcher_type = "alltoall"
        config.moe_enable_deepep = False
        by_name = hasattr(config, "moe_flex_dispatcher_backend")
        if by_name:
            config.moe_flex_dispatcher_backend = "deepep"
        validate(config)
        config.moe_token_dispatcher_type = DispatcherType()
        # From 0.16 on schedules recognise the contract by the back end's name, before by this switch.
        config.moe_enable_deepep = not by_name

    installation.put(config_class, "__post_init__", post_init)


def _convert_experts(installation: MegatronInstallation, layer_class: Any) -> None:
    """Let new layers have FP8 experts where options and configs say so.

    A layer is given its number when it has been built, and which layers stay in bf16 goes by number.
    """
    number = layer_class.set_layer_number

    @functools.wraps(number)
    def set_layer_number(layer: Any, layer_number: int) -> None:
        number(layer, layer_number)
        from .fp8_experts import convert_new_layer

        convert_new_layer(layer, installation.session.options)

    installation.put(layer_class, "set_layer_number", set_layer_number)


def _keep_expert_inputs(installation: MegatronInstallation) -> None:
    """Stop the 1F1B overlap from freeing the experts' input.

    It frees what a dispatcher's postprocess copied from. Ours copies nothing: the rows that came are what the
    experts save for their backward, and their memory is leased from the heap.
    """
    for name in ("megatron.core.models.common.utils", "megatron.core.models.gpt.fine_grained_callables"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        decide = getattr(module, "should_free_input", None)
        if decide is not None:
            installation.put(module, "should_free_input", _keeping(decide))


def _keeping(decide: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(decide)
    def should_free_input(name: str, is_moe: bool, config: Any, *rest: Any) -> bool:
        # Up to 0.15 the third argument is only whether the layer has the deepep contract.
        ours = config is True or isinstance(getattr(config, "moe_token_dispatcher_type", None), DispatcherType)
        return not (name == "mlp" and is_moe and ours) and decide(name, is_moe, config, *rest)

    return should_free_input
