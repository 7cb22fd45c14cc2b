"""The member's half of `powercut`: a disk that does everything for real but syncs, and tells a tape of each step."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

from discovery.disk import Disk
from tests.discovery.crash.tape import (
    CLOSE,
    OPEN,
    RENAME,
    SYNC,
    SYNC_NAMES,
    TRUNCATE,
    UNLINK,
    WRITE,
    Tape,
)

SLOW_S = 0.06
"""What every sync of a slow disk takes at least."""


class TapingDisk(Disk):
    """The real disk, less its syncs (the tape is the truth of them), which take as long as `sync_s` says at most."""

    def __init__(self, tape: Path, sync_s: float = 0.0) -> None:
        self._tape = Tape(tape)
        self._lock = threading.Lock()
        self._handles: dict[int, int] = {}
        self._next_handle = 1
        self._steps_left = 0
        self._dice = random.Random()
        self._sync_s = sync_s * self._dice.choice([0.1, 0.5, 1.0, 3.0])
        self._least_s = 0.0

    def doom(self) -> None:
        """Have the process die in the middle of one of its next few steps, as if that were the moment of a fault."""
        self._steps_left = self._dice.randint(1, 5)

    def slow(self) -> None:
        """Take long for every sync from now on."""
        self._least_s = SLOW_S

    def _may_die(self) -> None:
        if self._steps_left > 0:
            self._steps_left -= 1
            if self._steps_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        with self._lock:
            self._handles[fd] = self._next_handle
            self._next_handle += 1
            self._tape.note(OPEN, self._handles[fd], 1 if flags & os.O_TRUNC else 0, os.fsencode(path))
        return fd

    def close(self, fd: int) -> None:
        with self._lock:
            handle = self._handles.pop(fd, 0)
            self._tape.note(CLOSE, handle, 0)
        super().close(fd)

    def write(self, fd: int, raw: bytes | memoryview, at: int) -> int:
        self._may_die()
        done = super().write(fd, raw, at)
        with self._lock:
            self._tape.note(WRITE, self._handles[fd], at, bytes(raw[:done]))
        return done

    def truncate(self, fd: int, size: int) -> None:
        self._may_die()
        super().truncate(fd, size)
        with self._lock:
            self._tape.note(TRUNCATE, self._handles[fd], size)

    def allocate(self, fd: int, size: int) -> None:
        super().allocate(fd, size)
        with self._lock:
            self._tape.note(TRUNCATE, self._handles[fd], max(size, os.fstat(fd).st_size))

    def fdatasync(self, fd: int) -> None:
        self.fsync(fd)

    def fsync(self, fd: int) -> None:
        began = self._tape.steps
        time.sleep(self._take_s())
        self._may_die()
        with self._lock:
            self._tape.note(SYNC, self._handles[fd], began)

    def _take_s(self) -> float:
        """Return how long this sync takes: some disks are slow, all are at times."""
        return self._least_s + self._dice.random() * self._sync_s * (8 if self._dice.random() < 0.05 else 1)

    def rename(self, old: Path, new: Path) -> None:
        self._may_die()
        super().rename(old, new)
        with self._lock:
            self._tape.note(RENAME, 0, 0, os.fsencode(old) + b"\0" + os.fsencode(new))

    def unlink(self, path: Path) -> None:
        self._may_die()
        super().unlink(path)
        with self._lock:
            self._tape.note(UNLINK, 0, 0, os.fsencode(path))

    def sync_directory(self, directory: Path) -> None:
        began = self._tape.steps
        time.sleep(self._take_s())
        self._may_die()
        with self._lock:
            self._tape.note(SYNC_NAMES, 0, began, os.fsencode(directory))
