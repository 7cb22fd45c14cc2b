"""Wakes tasks that wait for a change: many may wait, a ring between looking and waiting is never missed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Bell:
    """Rung after every change of what it belongs to."""

    def __init__(self) -> None:
        self.count = 0
        self._event = asyncio.Event()

    def ring(self) -> None:
        self.count += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, seen: int, timeout_s: float) -> bool:
        """Return once rung after `count` was `seen`, or `False` when `timeout_s` has passed."""
        if self.count != seen:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        return True

    async def until(self, is_so: Callable[[], bool], timeout_s: float) -> bool:
        """Return `True` once `is_so()`, looking after every ring, or `False` when `timeout_s` has passed."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    event = self._event
                    if is_so():
                        return True
                    await event.wait()
        except TimeoutError:
            return is_so()
