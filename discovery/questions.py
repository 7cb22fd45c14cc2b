"""The questions that this member has asked others: numbered, so that each answer finds who waits for it.

An answer that a connection's end has lost is `None`; so is one that does not come in time. `raft.Member` has one
`Questions`, which `forming`, `reads` and whoever proposes ask through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from discovery.peerwire import Answer, Ask, Message, Question, Reply

Answered = Callable[[Answer | None], None]


@dataclass(eq=False)
class _Asked:
    peer: str
    tell: Answered


class Questions:
    """All that are under way; `send` sends a message to a member, and tells whether it could."""

    def __init__(self, send: Callable[[str, Message], bool]) -> None:
        self._send = send
        self._asked: dict[int, _Asked] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._asked)

    def ask(self, id: str, question: Question, tell: Answered) -> int:
        """Ask another member; `tell` hears the answer, or `None` if the connection ends before.

        Return the question's number; 0: it was not sent.
        """
        self._number += 1
        if not self._send(id, Ask(self._number, question)):
            return 0
        self._asked[self._number] = _Asked(id, tell)
        return self._number

    async def ask_for(self, id: str, question: Question, timeout_s: float) -> Answer | None:
        """Ask another member and wait; `None`: no answer came."""
        future: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        number = self.ask(id, question, lambda answer: None if future.done() else future.set_result(answer))
        if not number:
            return None
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            return None
        finally:
            self.forget(number)

    def forget(self, number: int) -> None:
        """Wait for an answer no longer."""
        self._asked.pop(number, None)

    def replied(self, reply: Reply) -> None:
        """Hand an answer to who waits for it, if anybody does."""
        if asked := self._asked.pop(reply.id, None):
            asked.tell(reply.answer)

    def lost(self, id: str) -> None:
        """Tell all who wait for a member that its connection has ended."""
        for number in [number for number, asked in self._asked.items() if asked.peer == id]:
            self._asked.pop(number).tell(None)
