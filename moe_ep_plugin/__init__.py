"""moe_ep_plugin: expert-parallel dispatch and combine for Mixture-of-Experts models.

Imports go down only: integrations -> dispatcher -> buffer -> backends -> the compiled extension.
Importing this package starts no device and no network.
"""

from .buffer import EpBuffer
from .config import EpConfig
from .dispatcher import TokenDispatcher
from .errors import (
    BackendUnavailable,
    CapacityError,
    ConfigError,
    EpError,
    PeerLost,
    PeerMismatch,
    PeerTimeout,
    StateError,
)
from .handle import DispatchHandle
from .types import CombineOutput, DispatchOutput

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "CapacityError",
    "CombineOutput",
    "ConfigError",
    "DispatchHandle",
    "DispatchOutput",
    "EpBuffer",
    "EpConfig",
    "EpError",
    "PeerLost",
    "PeerMismatch",
    "PeerTimeout",
    "StateError",
    "TokenDispatcher",
    "__version__",
]
