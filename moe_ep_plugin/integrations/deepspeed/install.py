"""Putting our dispatch into DeepSpeed's MoE layers, and taking it out again."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ...errors import ConfigError
from ...fp8_experts import load_engine
from ..patching import Installation
from ..session import Session
from .options import CONFIG_KEY, Options
from .upstream import AUTOEP_BACKENDS_SINCE, check_version, import_deepspeed

_MARK = "moe_ep_installation"


def install(**options: Any) -> Session[Options]:
    """Let DeepSpeed's MoE layers dispatch without capacity, and serve AutoEP's backend ``"deepep"``. Idempotent.

    Native layers (``deepspeed.moe.layer.MoE``) that are built afterwards are ours; for a model that is built already
    see :func:`convert`. ``deepspeed.initialize`` then also reads the section ``"moe_ep_plugin"`` of its config: the
    fields of :class:`Options`, and ``"enabled"`` (true unless given), which converts the native layers of the model,
    or gives them back to DeepSpeed where it is false. A second call returns the same session, with the options given
    changed.

    Args:
        options: Fields of :class:`Options`.

    Returns:
        The session: ``statistics()``, ``close()``.

    Raises:
        BackendUnavailable: DeepSpeed is missing, or of a version that was not tested.
        ConfigError: An option is unknown, or is changed while buffers are open.
    """
    version = check_version()
    if options.get("fp8_experts"):
        load_engine()
    present = _installation()
    if present is not None:
        present.session.configure(**options)
        return present.session
    session = Session(Options())
    session.configure(**options)
    installation = Installation(session)
    with installation.whole():
        _convert_new_layers(installation)
        _prepare_engines(installation)
        if version >= AUTOEP_BACKENDS_SINCE:
            from .autoep import serve_autoep
            from .fp8_experts import serve_fp8_experts

            serve_autoep(installation)
            serve_fp8_experts(installation)
    return session


def uninstall() -> None:
    """Undo :func:`install` and close the buffers; no-op when not installed. Layers made ours before stop working."""
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


def convert(
    model: torch.nn.Module, *, optimizer: torch.optim.Optimizer | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Make the native MoE layers of a built model ours; calls :func:`install` first. Idempotent.

    Objects stay what they are, parameters included, so an optimizer or a checkpoint made before still fits.

    Args:
        model: Any module; layers of other kinds are not touched.
        optimizer: An optimizer over the model's parameters; experts get marked groups in it if there are none.
        options: Fields of :class:`Options`.

    Returns:
        Parameter groups of the model, or of the optimizer, with experts in groups that carry ``"moe": True``: for
        ``deepspeed.initialize(model_parameters=...)`` or for an optimizer to be made.

    Raises:
        ConfigError: A layer has parts that are not DeepSpeed's own.
    """
    install(**options)
    from .layers import add_moe_groups, convert_layers, moe_layers

    convert_layers(moe_layers(model))
    if optimizer is not None:
        return add_moe_groups(optimizer.param_groups)
    return add_moe_groups([{"params": [p for p in model.parameters() if p.requires_grad]}])


def _installation() -> Installation[Options] | None:
    # A module that nobody has imported has not been changed by us.
    layer = sys.modules.get("deepspeed.moe.layer")
    return getattr(layer.MoE.__init__, _MARK, None) if layer is not None else None


def _convert_new_layers(installation: Installation[Options]) -> None:
    moe_class = import_deepspeed("deepspeed.moe.layer").MoE
    build = moe_class.__init__

    @functools.wraps(build)
    def init(layer: Any, *args: Any, **kwargs: Any) -> None:
        from .layers import convert_layers

        build(layer, *args, **kwargs)
        convert_layers([layer])

    setattr(init, _MARK, installation)
    installation.put(moe_class, "__init__", init)


def _prepare_engines(installation: Installation[Options]) -> None:
    engine_class = import_deepspeed("deepspeed.runtime.engine").DeepSpeedEngine
    build: Callable[..., None] = engine_class.__init__
    signature = inspect.signature(build)
    from .layers import mark_experts

    @functools.wraps(build)
    def init(engine: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(engine, *args, **kwargs).arguments
        _prepare(installation.session, given["model"], given["config_class"])
        mark_experts(given["model"], given.get("optimizer"), given.get("lr_scheduler"), given["config_class"])
        build(engine, *args, **kwargs)

    installation.put(engine_class, "__init__", init)


def _prepare(session: Session[Options], model: torch.nn.Module, config: Any) -> None:
    """Settle what a model needs before its engine is made; refuse what can't work."""
    from .layers import convert_layers, moe_layers, restore_layers

    section = _section(config._param_dict)
    layers = moe_layers(model)
    if section is not None:
        change = convert_layers if section.pop("enabled", True) else restore_layers
        session.configure(**section)
        change(layers)
    if session.options.fp8_experts:
        _check_fp8_experts(layers, config)
    if not layers:
        return
    if config.zero_optimization_stage == 3:
        raise ConfigError.of(
            "zero_optimization.stage",
            3,
            f"the model has {len(layers)} native MoE layers, which DeepSpeed trains at stages 0 to 2",
            'set the stage to 2, or use a Hugging Face MoE model with "expert_parallel" (AutoEP), which has stage 3',
        )
    for layer in layers:
        if dist.get_world_size() % layer.ep_size:
            raise ConfigError.of(
                "ep_size of a MoE layer",
                layer.ep_size,
                f"it must divide the number of ranks, {dist.get_world_size()}",
                "start a multiple of ep_size ranks, or build the layer with another ep_size",
            )


def _check_fp8_experts(native_layers: list[Any], config: Any) -> None:
    """Refuse what an engine can't have with FP8 experts; the rest is checked by layers, as they are built."""
    version = check_version()
    if version < AUTOEP_BACKENDS_SINCE:
        needed = ".".join(map(str, AUTOEP_BACKENDS_SINCE))
        limit, remedy = (
            f"deepspeed is {'.'.join(map(str, version))}, and AutoEP takes our rows from {needed} on",
            "update",
        )
        raise ConfigError.of("fp8_experts", True, limit, f"{remedy}, or leave it out")
    if native_layers:
        raise ConfigError.of(
            "fp8_experts",
            True,
            f"the model has {len(native_layers)} native MoE layers, whose experts are modules of the model",
            "leave it out; experts of AutoEP layers can have FP8",
        )
    if config.zero_optimization_stage == 3 and (config._param_dict.get("expert_parallel") or {}).get("enabled"):
        from .fp8_experts import refuse_zero3

        refuse_zero3()


def _section(config: dict[str, Any]) -> dict[str, Any] | None:
    section = config.get(CONFIG_KEY)
    if section is None:
        return None
    if not isinstance(section, dict):
        raise ConfigError.of(
            f'"{CONFIG_KEY}" in the DeepSpeed config', repr(section), "it holds a section", "write {} for the defaults"
        )
    return dict(section)
