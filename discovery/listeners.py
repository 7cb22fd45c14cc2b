"""Who is told of something that happens in this process: called one after the other, and none of them harms another.

`raft.Member` and `mirror.Mirror` have one `Listeners` for each thing that they tell of; the parts of the daemon listen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class Listeners(Generic[T]):
    """Called with a listener it takes that; `tell` calls all that it has."""

    def __init__(self) -> None:
        self._all: list[Callable[[T], object]] = []

    def __call__(self, listener: Callable[[T], object], /) -> None:
        """Call `listener` from now on."""
        self._all.append(listener)

    def clear(self) -> None:
        """Call nobody any more."""
        self._all.clear()

    def tell(self, what: T) -> None:
        """Call all; one that raises is a line in the log."""
        for listener in self._all:
            try:
                listener(what)
            except Exception:  # the log is applied all the same, and the others have to hear of it
                log.exception("a listener failed")
