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
from .fp8 import Fp8Rows
from .fp8_experts import Fp8GroupedExperts, Fp8Recipe
from .handle import DispatchHandle, LowLatencyHandle
from .low_latency import Pending
from .types import CombineOutput, DispatchOutput, LowLatencyCombineOutput, LowLatencyDispatchOutput

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
    "Fp8GroupedExperts",
    "Fp8Recipe",
    "Fp8Rows",
    "LowLatencyCombineOutput",
    "LowLatencyDispatchOutput",
    "LowLatencyHandle",
    "PeerLost",
    "PeerMismatch",
    "PeerTimeout",
    "Pending",
    "StateError",
    "TokenDispatcher",
    "__version__",
]
