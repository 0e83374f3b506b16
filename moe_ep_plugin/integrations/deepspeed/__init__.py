"""DeepSpeed 0.18 and 0.19: its native MoE layers on our dispatcher, and AutoEP's communication backend ``"deepep"``.

``install()`` before models are built, or ``convert(model)`` afterwards; then ``deepspeed.initialize`` as usual.
Importing this package does not import DeepSpeed.
"""

from .cpu import enable_cpu
from .install import convert, current_session, install, statistics, uninstall
from .options import Options

__all__ = ["Options", "convert", "current_session", "enable_cpu", "install", "statistics", "uninstall"]
