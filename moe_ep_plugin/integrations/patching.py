"""Putting our objects into a framework's modules, and taking them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic

from .session import OptionsT, Session


class Installation(Generic[OptionsT]):
    """What stands in a framework's modules while we are installed, with what stood there before.

    Args:
        session: Options and buffers of the installation.
    """

    def __init__(self, session: Session[OptionsT]) -> None:
        self.session = session
        self._undo: list[Callable[[], object]] = []

    def put(self, owner: Any, name: str, value: Any) -> Any:
        """Set ``owner.name``, remembering and returning what was there."""
        before = getattr(owner, name)
        self._undo.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)
        return before

    def add(self, table: dict[str, Any], key: str, value: Any) -> None:
        """Give a framework's table one more key; what others add to it meanwhile stays when ours is removed."""
        self._undo.append(lambda: table.pop(key, None))
        table[key] = value

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Undo everything if the body, which installs, raises: half of it would pass for a whole one."""
        try:
            yield
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore everything and close the buffers."""
        while self._undo:
            self._undo.pop()()
        self.session.close()
