"""Opens what an image comes in, an archive or a directory, as named files that can be read in any order.

An archive may be packed (gzip, zstd); then it is unpacked beside, within limits, into a file without a name. Links
inside of it are followed by their text only, never by the kernel; a directory's files are opened below it and nowhere
else (openat2). Refuses names that are there twice, sparse members, and anything that is no plain file.
Called by `rootfs.intake`.
"""

from __future__ import annotations

import io
import os
import posixpath
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from netns import syscalls
from netns.errors import KernelError
from rootfs.documents import DOCUMENT_BYTES_MAX
from rootfs.errors import ImageInvalid, LayerInvalid
from rootfs.layerstream import UNREADABLE, BoundedTarInfo, Limits, unpacked

_LIMITS = Limits(bytes_max=64 * 1024**3)
_ENTRIES_MAX = 20_000
_LINKS_MAX = 8
_CHUNK_BYTES = 1024 * 1024


class Source(Protocol):
    """Files by name."""

    def has(self, name: str) -> bool: ...
    def open(self, name: str) -> IO[bytes]: ...


def read(source: Source, name: str) -> bytes:
    """Return a document's bytes.

    Raises:
        ImageInvalid: not there, or too large for a document.
    """
    with source.open(name) as file:
        content = file.read(DOCUMENT_BYTES_MAX + 1)
    if len(content) > DOCUMENT_BYTES_MAX:
        raise ImageInvalid(f"{name} has more than {DOCUMENT_BYTES_MAX} bytes")
    return content


@contextmanager
def opened(path: Path, scratch: Path) -> Iterator[Source]:
    """Open an archive or a directory; `scratch` is where a packed one is unpacked to.

    Raises:
        ImageInvalid: neither of them, or broken.
    """
    if path.is_dir():
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield _Directory(fd)
        finally:
            os.close(fd)
        return
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageInvalid(f"{path} is neither a file nor a directory")
            with _plain(file, scratch) as plain:
                yield _Archive(plain)
    except UNREADABLE as error:
        raise ImageInvalid(f"{path} cannot be read: {error}", hint="a tar, or one packed by gzip or zstd") from error
    except FileNotFoundError as error:
        raise ImageInvalid(f"{path} is not there") from error


@contextmanager
def _plain(file: Any, scratch: Path) -> Iterator[Any]:
    stream = unpacked(file)
    if stream is file:
        yield file
        return
    bytes_max = _LIMITS.plain_bytes_max(os.fstat(file.fileno()).st_size)
    with tempfile.TemporaryFile(dir=scratch) as plain:
        size = 0
        while chunk := stream.read(_CHUNK_BYTES):
            size += len(chunk)
            if size > bytes_max:
                raise ImageInvalid(f"the archive unpacks to more than {bytes_max} bytes")
            plain.write(chunk)
        plain.seek(0)
        yield plain


class _Directory:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def has(self, name: str) -> bool:
        try:
            self.open(name).close()
        except ImageInvalid:
            return False
        return True

    def open(self, name: str) -> IO[bytes]:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a fifo must not keep us waiting
        resolve = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_MAGICLINKS
        try:
            fd = syscalls.openat2(self._fd, name, flags, 0, resolve)
        except (KernelError, ValueError) as error:
            raise ImageInvalid(f"the directory has no {name[:200]!r}") from error
        file = os.fdopen(fd, "rb")
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            file.close()
            raise ImageInvalid(f"{name[:200]!r} is no plain file")
        return file


class _Archive:
    """A plain tar; members are found once, their bytes are read where they lie."""

    def __init__(self, file: Any) -> None:
        self._fd = file.fileno()
        self._places: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedTarInfo, encoding="utf-8") as tar:
                for count, member in enumerate(tar, 1):
                    if count > _ENTRIES_MAX:
                        raise ImageInvalid(f"the archive has more than {_ENTRIES_MAX} entries")
                    self._add(member)
                    tar.members.clear()  # type: ignore[attr-defined]  # it would remember them all
        except LayerInvalid as error:
            raise ImageInvalid(f"the archive has {error}") from error

    def _add(self, member: tarfile.TarInfo) -> None:
        name = posixpath.normpath(member.name)
        if member.isdir():
            return
        if name in self._places or name in self._links:
            raise ImageInvalid(f"{name[:200]!r} is in the archive twice")
        if member.isreg():
            self._places[name] = (member.offset_data, member.size)
        elif member.issym():
            self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        elif member.islnk():
            self._links[name] = posixpath.normpath(member.linkname)
        else:
            raise ImageInvalid(f"{name[:200]!r} is no plain file")

    def _find(self, name: str) -> tuple[int, int] | None:
        name = posixpath.normpath(name)
        for _ in range(_LINKS_MAX):
            if name not in self._links:
                break
            name = self._links[name]
        return self._places.get(name)

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def open(self, name: str) -> IO[bytes]:
        found = self._find(name)
        if found is None:
            raise ImageInvalid(f"the archive has no {name[:200]!r}")
        return io.BufferedReader(_Section(self._fd, *found), _CHUNK_BYTES)


class _Section(io.RawIOBase):
    def __init__(self, fd: int, start: int, size_bytes: int) -> None:
        self._fd, self._at, self._left = fd, start, size_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = os.pread(self._fd, min(len(buffer), self._left), self._at)
        if self._left and buffer and not chunk:
            raise EOFError("the archive ends too early")
        self._at += len(chunk)
        self._left -= len(chunk)
        buffer[: len(chunk)] = chunk
        return len(chunk)
