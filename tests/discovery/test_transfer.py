"""A snapshot on its way, while newer ones take its place on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from discovery import snapshot
from discovery.disk import DISK, Disk
from discovery.transfer import Receiver, Sender


class Replacing(Disk):
    """A disk on which a newer snapshot takes the place of the one that is just looked for."""

    def __init__(self, directory: Path, at: str) -> None:
        self._directory = directory
        self._at = at

    def _replace(self, at: str) -> None:
        if self._at == at:
            self._at = ""
            snapshot.save(self._directory, 9, 2, [b"newer" * 100])

    def size(self, path: Path) -> int:
        self._replace("before its size")
        size = super().size(path)
        self._replace("before it is open")
        return size

    def read(self, fd: int, count: int, at: int) -> bytes:
        self._replace("before it is read")
        return super().read(fd, count, at)


@pytest.mark.parametrize("at", ["before its size", "before it is open", "before it is read"])
def test_a_snapshot_that_is_replaced_while_it_is_sent_stops_nobody(tmp_path: Path, at: str) -> None:
    ours, theirs = tmp_path / "leader", tmp_path / "follower"
    ours.mkdir()
    theirs.mkdir()
    snapshot.save(ours, 5, 1, [b"old" * 100])
    sender, receiver = Sender(ours, Replacing(ours, at)), Receiver(theirs, DISK)
    chunk = sender.next_chunk("b", 3, (5, 1))
    if at == "before it is read":
        assert chunk is not None, "what is open can be read to its end"
        assert chunk.index == 5
    else:
        assert chunk is None
        chunk = sender.next_chunk("b", 3, (9, 2))
        assert chunk is not None
        assert chunk.index == 9
    assert receiver.take(chunk) == chunk.size
    assert receiver.finish().chunks == [b"old" * 100 if chunk.index == 5 else b"newer" * 100]
    sender.keep_only(set())
    receiver.forget()
