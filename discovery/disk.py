"""Every call that the store makes to a file system, in one thin object, so that a test can be the disk.

`journal`, `snapshot` and `identity` call `Disk` and nothing else; only the lock file and the wish to
know how big things are go past it. The real one does what its methods' names say. A test's own
loses what was not synced, refuses, or runs full: see `tests/discovery/crash`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class Disk:
    """The real disk; every method may raise `OSError`."""

    def open(self, path: Path, flags: int) -> int:
        """Open a file that only its owner may use."""
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def close(self, fd: int) -> None:
        os.close(fd)

    def write(self, fd: int, raw: bytes | memoryview, at: int) -> int:
        """Write some of `raw` at an offset; return how much."""
        return os.pwrite(fd, raw, at)

    def read(self, fd: int, count: int, at: int) -> bytes:
        return os.pread(fd, count, at)

    def read_file(self, path: Path) -> bytes:
        return path.read_bytes()

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def allocate(self, fd: int, size: int) -> None:
        """Take the room for a whole file now."""
        os.posix_fallocate(fd, 0, size)

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def exists(self, path: Path) -> bool:
        return path.exists()

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def names(self, directory: Path, prefix: str) -> list[str]:
        """Return the names in a directory that begin so, sorted."""
        return sorted(path.name for path in directory.iterdir() if path.name.startswith(prefix))

    def sync_directory(self, directory: Path) -> None:
        """Make the names in a directory durable."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self, directory: Path) -> int:
        return shutil.disk_usage(directory).free

    def write_all(self, fd: int, raw: bytes, at: int) -> int:
        """Write all of `raw` at an offset; return where it ends."""
        view = memoryview(raw)
        while view:
            done = self.write(fd, view, at)
            view, at = view[done:], at + done
        return at


DISK = Disk()
