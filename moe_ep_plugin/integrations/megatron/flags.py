"""The flag ``--moe-token-dispatcher deepep`` and its ``--moe-ep-*`` companions.

Megatron's own parser knows neither the value ``deepep`` nor, depending on version, the short spelling of the flag,
so they are either added to a parser (:func:`add_arguments`, an ``extra_args_provider``) or taken out of argv before
Megatron sees it (:func:`rewrite_argv`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

from ...types import BackendName, Expand, Wire
from .install import install
from .options import Fp8Experts, Options

DISPATCHERS = ("deepep", "alltoall", "allgather", "flex")
_SELECTORS = ("--moe-token-dispatcher", "--moe-token-dispatcher-type")
_KINDS: dict[str, dict[str, Any]] = {
    "backend": {"choices": get_args(BackendName)},
    "wire": {"choices": get_args(Wire)},
    "grad_wire": {"choices": get_args(Wire)},
    "expand": {"choices": get_args(Expand)},
    "timeout_s": {"type": float},
    "host_threads": {"type": int},
    "num_sms": {"type": int},
    "local_sms": {"type": int},
    "pool_bytes": {"type": int},
    "shm_dir": {"type": str},
    "max_tokens_per_rank": {"type": int},
    "power_of_two_scales": {"nargs": 0},
    "fp8": {"choices": get_args(Fp8Experts)},
}


def _flag(name: str) -> str:
    return "--moe-ep-" + {"timeout_s": "timeout"}.get(name, name).replace("_", "-")


class _Chosen:
    """What the flags of one parser have said so far; installs once ``deepep`` or an option was among it."""

    def __init__(self) -> None:
        self.deepep = False
        self.took_flex = False
        self.options: dict[str, Any] = {}

    def select(self, dispatcher: str) -> str:
        """The ``type=`` of the selecting flags: what Megatron's config is to be given."""
        self.deepep = dispatcher == "deepep"
        self.apply()
        return "flex" if self.deepep else dispatcher

    def apply(self) -> None:
        # A config made by hand may say deepep where no flag does, so options count without it.
        changes = dict(self.options)
        if self.deepep or self.took_flex:
            changes["take_flex"] = self.took_flex = self.deepep
        if changes:
            install(**changes)


class _OptionAction(argparse.Action):
    chosen: _Chosen

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        value = True if self.nargs == 0 else values
        setattr(namespace, self.dest, value)
        self.chosen.options[self.dest.removeprefix("moe_ep_")] = value
        self.chosen.apply()


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Teach Megatron's parser ``--moe-token-dispatcher deepep`` and the ``--moe-ep-*`` flags; returns the parser.

    Use as ``pretrain(..., extra_args_provider=add_arguments)``. Both spellings of the flag accept ``deepep`` then;
    parsing it calls :func:`install` and sets ``args.moe_token_dispatcher_type``, from which Megatron builds its
    config, to ``"flex"``. Parsing a ``--moe-ep-*`` flag calls :func:`install` too, for configs that say ``deepep``
    themselves. A parser that has the flags already, as in a patched source tree, is left alone.
    """
    if any(_SELECTORS[0] in action.option_strings for action in parser._actions):
        return parser
    group = parser.add_argument_group(title="moe_ep_plugin")
    chosen = _Chosen()
    spellings = list(_SELECTORS)
    for action in parser._actions:  # argparse has no public way to find an option that others added.
        if _SELECTORS[1] in action.option_strings:
            action.type = chosen.select
            if action.choices is not None:
                action.choices = [*action.choices, "deepep"]
            spellings.remove(_SELECTORS[1])
    group.add_argument(
        *spellings,
        dest="moe_token_dispatcher_type",
        type=chosen.select,
        choices=DISPATCHERS,
        default=argparse.SUPPRESS,
        help="Token dispatcher of MoE layers; deepep is moe_ep_plugin's.",
    )
    for field in fields(Options):
        if field.name in _KINDS:
            option = group.add_argument(
                _flag(field.name),
                dest=f"moe_ep_{field.name}",
                action=_OptionAction,
                default=argparse.SUPPRESS,
                help=field.metadata.get("help", ""),
                **_KINDS[field.name],
            )
            option.chosen = chosen  # type: ignore[attr-defined]
    return parser


def rewrite_argv(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take our flags out of a command line.

    ``--moe-token-dispatcher`` and ``--moe-token-dispatcher-type`` are accepted in both forms (``--flag value``,
    ``--flag=value``); the last one given counts, as usual. Everything else stays as it is, in order.

    Args:
        argv: Arguments without the program's name.

    Returns:
        Arguments for Megatron (``deepep`` became ``--moe-token-dispatcher-type flex``), and the options for
        :func:`install`: those given, and ``take_flex`` if ``deepep`` was asked for.
    """
    parser = argparse.ArgumentParser(prog="moe_ep_plugin", add_help=False, allow_abbrev=False)
    parser.add_argument(*_SELECTORS, dest="dispatcher", choices=DISPATCHERS)
    for name, kind in _KINDS.items():
        kind = {"action": "store_true"} if kind.get("nargs") == 0 else kind
        parser.add_argument(_flag(name), dest=name, default=argparse.SUPPRESS, **kind)
    ours: list[str] = []
    rest: list[str] = []
    valueless = _flag("power_of_two_scales")
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in _SELECTORS and not name.startswith("--moe-ep-"):
            rest.append(word)
            continue
        ours.append(word)
        if not equals and name != valueless:
            ours.extend([value] if (value := next(words, None)) is not None else [])
    options = vars(parser.parse_args(ours))
    dispatcher = options.pop("dispatcher")
    if dispatcher is not None:
        rest += ["--moe-token-dispatcher-type", "flex" if dispatcher == "deepep" else dispatcher]
    return rest, {**options, "take_flex": True} if dispatcher == "deepep" else options
