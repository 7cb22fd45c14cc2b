"""The snapshots of one member: those that it takes of its own state, sends to followers, and gets from the leader.

Taking one and reading one that came are done in a thread, beside further turns; what touches the log
happens between two turns. The order is always: the snapshot is on disk, then the log forgets. Called
by `raft.Member` in its turns.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

from discovery import codec, membership, snapshot
from discovery.disk import Disk
from discovery.frames import Damaged
from discovery.journal import Journal
from discovery.operations import Image
from discovery.peerwire import Chunk, ChunkReply
from discovery.snapshot import Snapshot
from discovery.state import State
from discovery.transfer import Receiver, Sender
from discovery.wire import clock

if TYPE_CHECKING:
    from discovery.raft import Member

log = logging.getLogger(__name__)

RETRY_S = 60.0
T = TypeVar("T")
Words = TypeVarTuple("Words")


@dataclass
class Limits:
    """How long the log may grow, and how many entries a snapshot leaves for followers that are a little behind."""

    entries: int
    bytes: int
    keep_entries: int


class Snapshots:
    """All snapshots of one member; `place` is index and term of the newest."""

    def __init__(
        self, member: Member, directory: Path, disk: Disk, journal: Journal, place: tuple[int, int], limits: Limits
    ) -> None:
        self.limits = limits
        self.place = place
        self.taking: asyncio.Task[None] | None = None
        self._member = member
        self._directory = directory
        self._disk = disk
        self._journal = journal
        self._installing: asyncio.Task[None] | None = None
        self._after_s = 0.0
        self._worker = ThreadPoolExecutor(1, "snapshots")
        self._sender, self._receiver = Sender(directory, disk), Receiver(directory, disk)

    def close(self) -> None:
        """Wait for what is being written or read, and throw away what has not come whole."""
        self._worker.shutdown(cancel_futures=True)
        self._receiver.forget()

    async def _beside(self, act: Callable[[*Words], T], *words: *Words) -> T:
        """Do something in this member's own thread: nothing is written any more once `close` has returned."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, act, *words)

    # Its own

    def take_if_due(self, tasks: asyncio.TaskGroup) -> None:
        """Take the state as it is between two turns, if the log is long; the writing goes on beside further turns.

        Raises:
            OSError: the disk fails, otherwise than by being full.
        """
        if not self._is_due():
            return
        member = self._member
        index = member.index
        term, current = member.core.term_at(index), member.core.membership_at(index)
        meta = codec.Meta(membership.encode(current) if current else b"", member.requests_done())
        image = member.state.image()
        try:
            self._journal.rotate()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._later(error)
            return
        self.taking = tasks.create_task(self._save(index, term, meta, image))

    def _is_due(self) -> bool:
        if (self.taking is not None and not self.taking.done()) or self._installing is not None:
            return False
        entries = self._member.index - self.place[0]
        is_long = entries > self.limits.entries or self._journal.bytes_since_snapshot > self.limits.bytes
        return is_long and entries > 0 and clock.monotonic_s() >= self._after_s

    async def _save(self, index: int, term: int, meta: codec.Meta, image: Image) -> None:
        try:
            chunks = codec.encode_snapshot(meta, image)
            await self._beside(snapshot.save, self._directory, index, term, chunks, self._disk)
        except OSError as error:
            self._later(error)
            return
        if self.place[0] >= index:
            return
        self.place = (index, term)
        pinned = self._sender.lowest_index()
        behind = 0 if pinned is None else index - pinned
        self._journal.forget_to(index, keep=max(self.limits.keep_entries, behind))
        log.info("snapshot at log index %d, revision %d", index, image.revision)

    def _later(self, error: OSError) -> None:
        log.error("no snapshot could be written, the log stays long: %s", error)
        self._after_s = clock.monotonic_s() + RETRY_S

    # To followers

    def send(self) -> None:
        """Send the next piece to every follower that waits for one.

        Raises:
            OSError: it cannot be read.
        """
        core = self._member.core
        for id in list(core.needs_snapshot):
            chunk = self._sender.next_chunk(id, core.term, self.place)
            if chunk is not None:
                self._member.post(id, chunk)

    def send_only_to(self, ids: set[str]) -> None:
        """End all other transfers."""
        self._sender.keep_only(ids)

    def confirmed(self, id: str, reply: ChunkReply) -> None:
        """Take a follower's word on how much it has."""
        core = self._member.core
        core.see_term(reply.term, id)
        core.heard_from(id)
        if self._sender.confirmed(id, reply):
            core.snapshot_confirmed(id, reply.index)

    # From the leader

    def take_chunk(self, id: str, chunk: Chunk, tasks: asyncio.TaskGroup | None) -> None:
        """Take a piece of the leader's snapshot; the whole is checked beside further turns.

        Raises:
            OSError: the disk refuses.
        """
        core = self._member.core
        core.see_term(chunk.term, id)
        if chunk.term < core.term or self._installing is not None or tasks is None:
            return
        if self._has(chunk.index, chunk.place_term):
            self._receiver.forget()
            core.outbox.append((id, ChunkReply(core.term, chunk.index, chunk.size)))
            return
        got = self._receiver.take(chunk)
        if got < chunk.size:
            core.outbox.append((id, ChunkReply(core.term, chunk.index, got)))
        else:
            self._installing = tasks.create_task(self._install(id, chunk.size))

    def _has(self, index: int, term: int) -> bool:
        """Tell whether the log has all that a snapshot would bring."""
        if index <= self._member.index:
            return True
        first, last = self._journal[0][1], self._journal[-1][1]
        return first <= index <= last and self._member.core.term_at(index) == term

    async def _install(self, id: str, size: int) -> None:
        try:
            stored, meta, state = await self._beside(self._read)
            if self.taking is not None:
                await asyncio.wait([self.taking])
        except (Damaged, codec.Unreadable) as error:
            log.error("the snapshot from %s is not usable: %s", id, error)
            self._receiver.forget()
            self._installing = None
            return
        self._member.between_turns(lambda: self._finish(id, size, stored, meta, state))

    def _read(self) -> tuple[Snapshot, codec.Meta, State]:
        stored = self._receiver.finish()
        meta, image = codec.decode_snapshot(stored.chunks)
        return stored, meta, State.from_image(image)

    def _finish(self, id: str, size: int, stored: Snapshot, meta: codec.Meta, state: State) -> None:
        """Go on from the snapshot, unless entries that came meanwhile have brought the log as far."""
        member = self._member
        self._installing = None
        if self._has(stored.index, stored.term):
            self._receiver.forget()
            return
        self._receiver.publish()
        self.place = (stored.index, stored.term)
        self._journal.restart(stored.index, stored.term)
        member.core.installed(stored.index, membership.decode(meta.membership) if meta.membership else None)
        member.replace_state(state, meta.requests)
        log.info("snapshot at log index %d from %s: revision %d", stored.index, id, member.state.revision)
        member.post(id, ChunkReply(member.core.term, stored.index, size))
