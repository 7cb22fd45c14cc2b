"""Reads a layer blob as a tar, one member at a time, without believing anything it says.

Accepts plain tar, gzip and zstd, told apart by their first bytes. What is read is hashed on the way, packed and plain,
and counted: a stream that grows beyond the limits ends in `LayerInvalid`, however it is nested. Refuses sparse
members (the OCI spec advises against them, and tarfile loops for ever on some), headers with negative or huge sizes,
and more bytes of names and attributes than an honest layer has. Called by `rootfs.unpack` and `rootfs.archive`.

Source: OCI image-spec `layer.md`; tar(5); CPython's Lib/tarfile.py.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from rootfs.errors import BlobMismatch, LayerInvalid

_CHUNK_BYTES = 1024 * 1024
_TAR_BUFFER_BYTES = 64 * 1024  # tarfile copies what is left of its buffer with every read
_HEADER_BYTES_MAX = 1024 * 1024
_HEADERS_BYTES_MAX = 256 * 1024 * 1024
_GIB = 1024**3
_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
UNREADABLE = (
    *(tarfile.TarError, zstandard.ZstdError, zlib.error, gzip.BadGzipFile, EOFError, ValueError),
    *(OverflowError, RecursionError),  # an owner or time that is no number of the kernel's; a path without an end
)
"""What the readers below raise over bytes that are no tar."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one layer may unpack to; `free_bytes` it may always, beyond that at most `ratio_max` times its size."""

    bytes_max: int = 16 * _GIB
    entries_max: int = 2_000_000
    ratio_max: int = 1000
    free_bytes: int = _GIB

    def plain_bytes_max(self, packed_bytes: int) -> int:
        """Return how many bytes a blob of this size may unpack to."""
        return min(self.bytes_max, max(self.free_bytes, packed_bytes * self.ratio_max))


class _Counting(io.RawIOBase):
    """Hashes and counts what is read."""

    def __init__(self, file: Any, bytes_max: int | None = None) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes_max = bytes_max
        self.size_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._file.read(len(buffer))
        self._hash.update(chunk)
        self.size_bytes += len(chunk)
        if self._bytes_max is not None and self.size_bytes > self._bytes_max:
            raise LayerInvalid(f"unpacks to more than {self._bytes_max} bytes")
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def drain(self) -> None:
        while self.read(_CHUNK_BYTES):
            pass

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()


class BoundedTarInfo(tarfile.TarInfo):
    """Refuses headers that tarfile would read into memory whole, loop on, or go backwards for."""

    def _proc_member(self, tar: Any) -> Any:
        if self.size < 0:
            raise LayerInvalid(f"a member of {self.size} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise _sparse()
        if self.type in _EXTENDED:
            if self.size > _HEADER_BYTES_MAX:
                raise LayerInvalid(f"a header of {self.size} bytes")
            tar.header_bytes = getattr(tar, "header_bytes", 0) + self.size
            # Global ones are kept for all that follows, so all of them together get what one may have.
            tar.global_bytes = getattr(tar, "global_bytes", 0) + (self.size if self.type == tarfile.XGLTYPE else 0)
            if tar.header_bytes > _HEADERS_BYTES_MAX or tar.global_bytes > _HEADER_BYTES_MAX:
                raise LayerInvalid("too many bytes of names and attributes")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _apply_pax_info(self, *arguments: Any) -> None:
        super()._apply_pax_info(*arguments)  # type: ignore[misc]
        if self.size < 0:
            raise LayerInvalid(f"a member of {self.size} bytes")

    def _proc_gnusparse_00(self, *_: Any) -> None:
        raise _sparse()

    def _proc_gnusparse_01(self, *_: Any) -> None:
        raise _sparse()

    def _proc_gnusparse_10(self, *_: Any) -> None:
        raise _sparse()


def _sparse() -> LayerInvalid:
    return LayerInvalid("a sparse file, which no layer should have")


@contextmanager
def opened(blob: Path, limits: Limits, *, digest: str = "", diff_id: str = "") -> Iterator[tarfile.TarFile]:
    """Open a layer to be read member by member; at the end of the block its bytes have been compared.

    Raises:
        LayerInvalid: not a tar, or more than the limits allow.
        BlobMismatch: packed it is not `digest`, or unpacked not `diff_id`.
    """
    what = digest or blob.name
    with blob.open("rb") as file:
        packed = _Counting(file)
        try:
            plain = _Counting(_unpacked(packed, file), limits.plain_bytes_max(blob.stat().st_size))
            buffered: Any = io.BufferedReader(plain, _CHUNK_BYTES)
            with tarfile.open(
                fileobj=buffered, mode="r|", tarinfo=BoundedTarInfo, bufsize=_TAR_BUFFER_BYTES, encoding="utf-8"
            ) as tar:
                yield tar
            if diff_id:
                plain.drain()
            packed.drain()
        except UNREADABLE as error:
            raise LayerInvalid(f"layer {what} cannot be read: {error}") from error
    if digest and packed.digest != digest:
        raise BlobMismatch(f"layer {digest} has the bytes of {packed.digest}")
    if diff_id and plain.digest != diff_id:
        raise BlobMismatch(f"layer {what} unpacks to {plain.digest}, its image says {diff_id}")


def members(tar: tarfile.TarFile, entries_max: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members in order, remembering none of them.

    Raises:
        LayerInvalid: there are too many.
    """
    for count, member in enumerate(tar, 1):
        if count > entries_max:
            raise LayerInvalid(f"more than {entries_max} entries")
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # it would remember them all
        _skip(tar)


def _skip(tar: Any) -> None:
    """Go to the next header; tarfile would, too, but reads on after the end, as long as the size says: for years."""
    while (left := tar.offset - tar.fileobj.tell()) > 0:
        if not tar.fileobj.read(min(left, _TAR_BUFFER_BYTES)):
            raise EOFError("it ends in the middle of a member")


def unpacked(file: IO[bytes]) -> Any:
    """Return the stream inside a seekable file that may be packed; reading it raises one of `UNREADABLE`."""
    return _unpacked(file, file)


def _unpacked(reader: Any, file: IO[bytes]) -> Any:
    head = file.read(4)
    file.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=reader, mode="rb")
    if head == b"\x28\xb5\x2f\xfd":
        return zstandard.ZstdDecompressor().stream_reader(reader, read_across_frames=True)
    return reader
