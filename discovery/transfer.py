"""Snapshots on their way from the leader to a follower: file bytes in bounded pieces, one piece under way at a time.

So a transfer takes little of the line and of either member's turn, heartbeats go between the
pieces, and what the follower believes is checked like any of its own files. `raft` is the caller.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from discovery import snapshot
from discovery.disk import Disk
from discovery.peerwire import CHUNK_BYTES, Chunk, ChunkReply
from discovery.wire import clock

log = logging.getLogger(__name__)

_AGAIN_S = 1.0


@dataclass
class _Sending:
    fd: int
    index: int
    term: int
    size: int
    offset: int = 0
    sent_s: float = 0.0


class Sender:
    """The leader's end."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk
        self._sending: dict[str, _Sending] = {}

    def lowest_index(self) -> int | None:
        """Return the oldest snapshot under way: the log after it is still needed."""
        return min((sending.index for sending in self._sending.values()), default=None)

    def next_chunk(self, id: str, term: int, place: tuple[int, int]) -> Chunk | None:
        """Return what to send to a follower now, if anything; `place` is the newest snapshot's index and term.

        Raises:
            OSError: it cannot be read.
        """
        sending = self._sending.get(id)
        if sending is None:
            path = snapshot.path_of(self._directory, place[0])
            try:
                size = self._disk.size(path)
                sending = _Sending(self._disk.open(path, os.O_RDONLY), *place, size)
            except FileNotFoundError:
                return None  # a newer one has just taken its place
            self._sending[id] = sending
            log.info("%s is too far behind: it gets the snapshot at %d (%d bytes)", id, place[0], size)
        now = clock.monotonic_s()
        if now < sending.sent_s + _AGAIN_S:
            return None
        sending.sent_s = now
        data = self._disk.read(sending.fd, min(CHUNK_BYTES, sending.size - sending.offset), sending.offset)
        return Chunk(term, sending.index, sending.term, sending.offset, sending.size, data)

    def confirmed(self, id: str, reply: ChunkReply) -> bool:
        """Take a follower's answer; tell whether it has the whole snapshot now."""
        sending = self._sending.get(id)
        if sending is None or sending.index != reply.index or not 0 <= reply.offset <= sending.size:
            return False
        if reply.offset == sending.size:
            self.forget(id)
            return True
        if reply.offset != sending.offset:
            sending.offset, sending.sent_s = reply.offset, 0.0
        return False

    def forget(self, id: str) -> None:
        """End a transfer."""
        if sending := self._sending.pop(id, None):
            self._disk.close(sending.fd)

    def keep_only(self, ids: set[str]) -> None:
        """End all other transfers."""
        for id in [id for id in self._sending if id not in ids]:
            self.forget(id)


class Receiver:
    """The follower's end: a draft that grows."""

    def __init__(self, directory: Path, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk
        self._fd = -1
        self._place = (0, 0, 0, 0)
        self._offset = 0

    @property
    def draft(self) -> Path:
        """Return where the pieces go."""
        return snapshot.path_of(self._directory, self._place[0]).with_suffix(".draft")

    def take(self, chunk: Chunk) -> int:
        """Store a piece; return how much of the snapshot is here.

        Raises:
            OSError: the disk refuses.
        """
        place = (chunk.index, chunk.place_term, chunk.size, chunk.term)  # two leaders' files may differ byte by byte
        if place != self._place or self._fd < 0:
            self.forget()
            self._place = place
            self._fd = self._disk.open(self.draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if chunk.offset == self._offset and self._offset + len(chunk.data) <= chunk.size:
            self._offset = self._disk.write_all(self._fd, chunk.data, self._offset)
        return self._offset

    def finish(self) -> snapshot.Snapshot:
        """Put the draft on disk and read it; runs in a thread.

        Raises:
            OSError: the disk refuses.
            Damaged: it is not what the leader had.
        """
        self._disk.fsync(self._fd)
        return snapshot.load_file(self.draft, self._disk)

    def publish(self) -> None:
        """Make it this member's snapshot.

        Raises:
            OSError: the disk refuses.
        """
        snapshot.publish(self.draft, self._directory, self._place[0], self._disk)
        self._disk.close(self._fd)
        self._fd, self._offset = -1, 0

    def forget(self) -> None:
        """Throw the draft away."""
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._disk.unlink(self.draft)
        self._fd, self._offset = -1, 0
