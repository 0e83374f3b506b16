"""What can go wrong, as types: every error the package raises on purpose is an :class:`EpError`.

Messages name the argument or rank, the value seen, the limit it broke and what to do about it.
"""

from __future__ import annotations


class EpError(RuntimeError):
    """Base class of every error that this package raises on purpose."""


class ConfigError(EpError, ValueError):
    """An argument or a setting is outside its limits.

    Raised before anything is sent, so the buffer stays usable and the call can be made again.
    """

    @classmethod
    def of(cls, argument: str, value: object, limit: str, remedy: str) -> ConfigError:
        """Build the usual four-part message: argument, value, limit, remedy."""
        return cls(f"{argument} is {value}, but {limit}; {remedy}")


class StateError(EpError):
    """The call does not fit the state of its object: closed, failed, or already in an operation."""


class BackendUnavailable(EpError):
    """The requested backend can't run here; the message gives the reason for each one tried."""


class CapacityError(EpError):
    """Rows did not fit: ``max_recv_tokens`` or the memory behind the symmetric heap is too small.

    Every rank of the group raises it for the same operation, so none is left waiting.
    """


class PeerTimeout(EpError):
    """A peer did not do its part within ``timeout_s``: who waited, for whom, expected, seen."""


class PeerLost(PeerTimeout):
    """A peer's process ended while this rank waited for it (found well before the timeout)."""


class PeerMismatch(EpError):
    """Ranks disagree on the configuration, or call different operations at the same step."""
