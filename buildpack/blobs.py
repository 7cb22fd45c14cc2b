"""Keeps blobs on disk: for ever by SHA-256, or for a while under a name; blocking, called in threads by `blobstore`.

Layout: `sha256/<first two hex>/<hex>`, `temp/<name>.<hex>` whose modification time is when it ends, and
`incoming/` for what is still being written. A blob appears whole by a rename or not at all; what is kept is
synced before it is promised. Refuses to fill the disk beyond a reserve.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from buildpack.errors import BlobExists, BlobNotFound, BlobTooLarge, DigestMismatch, DiskFull
from buildpack.types import Blob
from discovery.wire.errors import Invalid

_HEX = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{7,62}")
_SPACE_CHECK_BYTES = 8 * 1024 * 1024


def parse_hex(text: str) -> str:
    """Accept the hexadecimal form of a SHA-256.

    Raises:
        Invalid: it is anything else.
    """
    if not _HEX.fullmatch(text):
        raise Invalid(f"blob digest {text[:80]!r}", hint="64 lowercase hexadecimal digits")
    return text


def parse_name(text: str) -> str:
    """Accept the name of a temporary blob.

    Raises:
        Invalid: it is anything else.
    """
    if not _NAME.fullmatch(text):
        raise Invalid(f"blob name {text[:80]!r}", hint="8 to 63 lowercase letters, digits and dashes")
    return text


class Incoming:
    """A blob that is being written; left by an exception, or never finished, it leaves nothing."""

    def __init__(self, blobs: Blobs, bytes_max: int) -> None:
        self._blobs = blobs
        self._bytes_max = bytes_max
        self._hash = hashlib.sha256()
        self._size = 0
        self._checked = 0
        self.path = blobs.folder / "incoming" / secrets.token_hex(16)
        self._file = self.path.open("xb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk may refuse the last flush, too; the file goes anyway
            self._file.close()
        self.path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise self._blobs.full() from error

    def write(self, chunk: bytes) -> None:
        """Append.

        Raises:
            BlobTooLarge: it is more than was allowed. DiskFull: it does not fit.
        """
        self._size += len(chunk)
        if self._bytes_max and self._size > self._bytes_max:
            raise BlobTooLarge(f"blob above {self._bytes_max} bytes")
        if self._size - self._checked > _SPACE_CHECK_BYTES:
            self._blobs.check_space(0)
            self._checked = self._size
        self._hash.update(chunk)
        self._file.write(chunk)

    def finish(self, *, is_lasting: bool) -> Blob:
        """Bring the file to its end, to the disk itself if it is to last, and return what it is."""
        self._file.flush()
        if is_lasting:
            os.fsync(self._file.fileno())
        return Blob(digest=f"sha256:{self._hash.hexdigest()}", size_bytes=self._size)


class Blobs:
    """The folder of blobs; there is one per folder."""

    def __init__(self, folder: Path, *, reserve_bytes: int) -> None:
        self.folder = folder
        self._reserve_bytes = reserve_bytes
        for name in ("sha256", "temp", "incoming"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for path in (folder / "incoming").iterdir():  # what a crash has left
            path.unlink()

    def full(self) -> DiskFull:
        return DiskFull("the blob store's disk is full", hint="free space on the host, then push again")

    def check_space(self, wanted_bytes: int) -> None:
        """Raise `DiskFull` unless `wanted_bytes` and the reserve fit."""
        status = os.statvfs(self.folder)
        if status.f_bavail * status.f_frsize < wanted_bytes + self._reserve_bytes:
            raise self.full()

    def receive(self, *, size_bytes: int = 0, bytes_max: int = 0) -> Incoming:
        """Begin to write a blob of `size_bytes`, if that is known, and at most `bytes_max`, if that is set."""
        if bytes_max and size_bytes > bytes_max:
            raise BlobTooLarge(f"blob of {size_bytes} bytes", hint=f"at most {bytes_max}")
        self.check_space(size_bytes)
        try:
            return Incoming(self, bytes_max)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self.full() from error
            raise

    def keep(self, incoming: Incoming, expected_hex: str) -> Blob:
        """Finish `incoming` as a blob for ever.

        Raises:
            DigestMismatch: its content is not `expected_hex`.
        """
        blob = incoming.finish(is_lasting=True)
        if blob.digest != f"sha256:{expected_hex}":
            raise DigestMismatch(f"expected sha256:{expected_hex}, got {blob.digest}")
        self._enshrine(incoming.path, expected_hex)
        return blob

    def hold(self, incoming: Incoming, name: str, *, ends_at: float) -> Blob:
        """Finish `incoming` as a blob under `name` until `ends_at`.

        Raises:
            BlobExists: the name is taken.
        """
        blob = incoming.finish(is_lasting=False)
        if next(self._held(name), None) is not None:
            raise BlobExists(f"blob {name} was stored already")
        os.utime(incoming.path, (ends_at, ends_at))
        incoming.path.rename(self.folder / "temp" / f"{name}.{blob.digest.removeprefix('sha256:')}")
        return blob

    def keep_held(self, name: str) -> Blob:
        """Turn a temporary blob into one for ever. Raises `BlobNotFound`."""
        path = self.find_held(name)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        size_bytes = path.stat().st_size
        hexadecimal = path.name.rpartition(".")[2]
        self._enshrine(path, hexadecimal)
        return Blob(digest=f"sha256:{hexadecimal}", size_bytes=size_bytes)

    def _enshrine(self, path: Path, hexadecimal: str) -> None:
        target = self._path(hexadecimal)
        if not target.parent.exists():
            target.parent.mkdir(exist_ok=True)
            _sync_folder(target.parent.parent)
        path.rename(target)
        _sync_folder(target.parent)

    def _path(self, hexadecimal: str) -> Path:
        return self.folder / "sha256" / hexadecimal[:2] / hexadecimal

    def _held(self, name: str) -> Iterator[Path]:
        return (self.folder / "temp").glob(f"{name}.*")

    def find(self, hexadecimal: str) -> Path:
        """Return the file of a kept blob. Raises `BlobNotFound`."""
        path = self._path(hexadecimal)
        if not path.is_file():
            raise BlobNotFound(f"no blob sha256:{hexadecimal}")
        return path

    def find_held(self, name: str) -> Path:
        """Return the file of a temporary blob. Raises `BlobNotFound`."""
        path = next(self._held(name), None)
        if path is None:
            raise BlobNotFound(f"no blob {name}", hint="it was read already, or its time is over: push again")
        return path

    def drop(self, path: Path) -> None:
        """Remove a blob's file; gone already is fine."""
        path.unlink(missing_ok=True)

    def list(self) -> list[Blob]:
        """Return every kept blob."""
        files = sorted((self.folder / "sha256").glob("*/*"))
        return [Blob(digest=f"sha256:{path.name}", size_bytes=path.stat().st_size) for path in files]

    def sweep(self, now_s: float, incoming_age_s: float) -> int:
        """Remove temporary blobs whose time is over and uploads that nobody continues; return how many."""
        ended = [path for path in (self.folder / "temp").iterdir() if path.stat().st_mtime < now_s]
        ended += [p for p in (self.folder / "incoming").iterdir() if p.stat().st_mtime < now_s - incoming_age_s]
        for path in ended:
            path.unlink(missing_ok=True)
        return len(ended)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
