"""Megatron-Core 0.14 to 0.19: its MoE layers on our dispatcher.

From a program: ``install()``, then ``TransformerConfig(moe_token_dispatcher_type="deepep", ...)``. For an unmodified
script: ``python -m moe_ep_plugin.integrations.megatron script.py --moe-token-dispatcher deepep ...``. Importing this
package does not import Megatron-Core.
"""

from ..session import Session
from .cpu import enable_cpu
from .flags import add_arguments, rewrite_argv
from .install import current_session, install, statistics, uninstall
from .options import Options

__all__ = [
    "Options",
    "Session",
    "add_arguments",
    "current_session",
    "enable_cpu",
    "install",
    "rewrite_argv",
    "statistics",
    "uninstall",
]
