"""Linearizable reads: the log index that a read must have seen, asked of the leader once for many reads.

A question that is on its way cannot serve a read that began after it was sent; such reads share the
next question. An answer that gets lost is asked for again whenever the leader changes or is
connected anew. `raft` is the caller.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from discovery.peerwire import Answer, Done, ReadIndex

if TYPE_CHECKING:
    from discovery.raft import Member

_RETRY_S = 0.05

Waiting = list["asyncio.Future[int]"]


class Reads:
    """All reads of one member that wait for their index."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._next: Waiting = []
        self._asking: Waiting = []
        self._number = 0

    async def index(self) -> int:
        """Return up to where the log must be applied for a read that begins now."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._next.append(future)
        if not self._asking:
            self._ask()
        return await future

    def again(self) -> None:
        """Ask anew: whoever was asked may not answer any more."""
        self._next, self._asking = self._asking + self._next, []
        self._ask()

    def fail(self, error: Exception) -> None:
        """Tell all who wait that there will be no answer."""
        waiting, self._next, self._asking = self._asking + self._next, [], []
        for future in waiting:
            if not future.done():
                future.set_exception(error)

    def _ask(self) -> None:
        self._next = [future for future in self._next if not future.done()]
        if not self._next:
            return
        self._number += 1
        number = self._number
        self._asking, self._next = self._next, []
        core = self._member.core
        if core.is_leader:
            core.ask_read_index(lambda index: self._answered(number, index))
            self._member.wake()
        elif not core.leader_id or not self._member.questions.ask(
            core.leader_id, ReadIndex(), lambda answer: self._replied(number, answer)
        ):
            self._answered(number, None)

    def _replied(self, number: int, answer: Answer | None) -> None:
        self._answered(number, answer.index if isinstance(answer, Done) else None)

    def _answered(self, number: int, index: int | None) -> None:
        if number != self._number:
            return
        asking, self._asking = self._asking, []
        if index is None:
            self._next = asking + self._next
            asyncio.get_running_loop().call_later(_RETRY_S, self._retry, number)
            return
        for future in asking:
            if not future.done():
                future.set_result(index)
        if self._next:
            self._ask()

    def _retry(self, number: int) -> None:
        if number == self._number and not self._asking:
            self._ask()
