"""Unpacks one layer tar into an empty directory that nobody else knows yet.

Accepts plain tar, gzip and zstd, told apart by their first bytes. Turns OCI whiteouts into what overlayfs
reads: `.wh.x` a character device 0/0 named `x`, `.wh..wh..opq` the xattr `trusted.overlay.opaque`.
Refuses paths that are absolute, contain `..` or lead through a symlink, hard links to anything but an
earlier file of the same layer, devices, and more bytes or entries than the limits. Blocking; called by
`rootfs.layers` in a thread.

Because the directory is new and only this function writes into it, a table of what was made is enough to
know that no parent is a symlink: no path is ever resolved by the kernel through anything unknown.

Source: OCI image-spec `layer.md`; Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import stat
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from rootfs.errors import BlobMismatch, DiskFull, LayerInvalid

_CHUNK_BYTES = 1024 * 1024
_TAR_BUFFER_BYTES = 64 * 1024  # tarfile copies what is left of its buffer with every read
_HEADER_BYTES_MAX = 1024 * 1024
_WHITEOUT, _OPAQUE, _WHITEOUT_META = ".wh.", ".wh..wh..opq", ".wh..wh."
_XATTR = "SCHILY.xattr."
_GIB = 1024**3
_UNREADABLE = (
    *(tarfile.TarError, zstandard.ZstdError, zlib.error, gzip.BadGzipFile, EOFError, ValueError),
    *(OverflowError, RecursionError),  # an owner or time that is no number of the kernel's; a path without an end
)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one layer may unpack to."""

    bytes_max: int = 16 * _GIB
    entries_max: int = 2_000_000


def unpack(blob: Path, into: Path, *, digest: str = "", limits: Limits | None = None) -> int:
    """Unpack `blob` into the empty directory `into`; return the bytes of its files.

    Raises:
        LayerInvalid: not a tar, or one of the things that this module refuses.
        BlobMismatch: the bytes read do not have `digest`.
        DiskFull: no room.
    """
    with blob.open("rb") as file:
        reader = _HashingReader(file)
        try:
            with tarfile.open(
                fileobj=_plain(reader), mode="r|", tarinfo=_BoundedTarInfo, bufsize=_TAR_BUFFER_BYTES
            ) as tar:
                writer = _Writer(into, tar, limits or Limits())
                for member in tar:
                    writer.write(member)
                    tar.members.clear()  # type: ignore[attr-defined]  # it would remember them all
                writer.finish()
            reader.drain()
        except _UNREADABLE as error:
            raise LayerInvalid(f"layer {digest or blob} cannot be read: {error}") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"no room for layer {digest or blob}", hint="free some disk space") from error
            if error.errno == errno.ENAMETOOLONG:
                raise LayerInvalid(f"layer {digest or blob} has a name that is too long") from error
            raise
    if digest and reader.digest != digest:
        raise BlobMismatch(f"layer {digest} has the bytes of {reader.digest}")
    return writer.bytes_written


class _HashingReader(io.RawIOBase):
    """Hashes what is read, so that a layer is checked without a second pass."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def peek(self, size: int) -> bytes:
        head = self._file.read(size)
        self._file.seek(0)
        return head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._file.read(len(buffer))
        self._hash.update(chunk)
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def drain(self) -> None:
        while self.read(_CHUNK_BYTES):
            pass

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()


class _BoundedTarInfo(tarfile.TarInfo):
    """Refuses name and attribute headers that tarfile would read into memory whole, however long they say they are."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if not self.isreg() and self.type not in (tarfile.GNUTYPE_SPARSE,) and self.size > _HEADER_BYTES_MAX:
            raise LayerInvalid(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


class _Writer:
    def __init__(self, into: Path, tar: tarfile.TarFile, limits: Limits) -> None:
        self._root = str(into)
        self._tar = tar
        self._limits = limits
        self._kinds: dict[str, int] = {"": stat.S_IFDIR}
        self._dir_times: list[tuple[str, int]] = []
        self._entries = 0
        self.bytes_written = 0

    def write(self, member: tarfile.TarInfo) -> None:
        self._entries += 1
        if self._entries > self._limits.entries_max:
            raise LayerInvalid(f"more than {self._limits.entries_max} entries")
        name = _clean(member.name)
        parent, _, base = name.rpartition("/")
        if name:
            self._ensure_parents(parent)
        if base.startswith(_WHITEOUT):
            self._whiteout(parent, base)
        elif member.isdir():
            self._dir(name, member)
        elif not name:
            raise LayerInvalid("the root is not a directory")
        else:
            self._not_dir(name, member)

    def finish(self) -> None:
        """Set the times of directories, which writing into them has changed."""
        for name, at in reversed(self._dir_times):
            os.utime(self._path(name), (at, at))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _ensure_parents(self, name: str) -> None:
        kind = self._kinds.get(name)
        if kind == stat.S_IFDIR:
            return
        if kind is not None:
            raise LayerInvalid(f"{name!r} is not a directory, yet something lies in it")
        self._ensure_parents(name.rpartition("/")[0])
        os.mkdir(self._path(name))  # noqa: PTH102 — 20 000 times in a row: no Path objects here
        os.chmod(self._path(name), 0o755)  # noqa: PTH101, S103 — against the umask
        self._kinds[name] = stat.S_IFDIR

    def _whiteout(self, parent: str, base: str) -> None:
        if base == _OPAQUE:
            os.setxattr(self._path(parent), "trusted.overlay.opaque", b"y")
            return
        if base.startswith(_WHITEOUT_META):
            return  # aufs bookkeeping
        hidden = base.removeprefix(_WHITEOUT)
        if hidden in ("", ".", ".."):
            raise LayerInvalid(f"whiteout {base!r}")
        name = f"{parent}/{hidden}" if parent else hidden
        kind = self._kinds.get(name)
        if kind == stat.S_IFDIR:  # hides what lower layers have there, not what this one has
            os.setxattr(self._path(name), "trusted.overlay.opaque", b"y")
        elif kind is None:
            os.mknod(self._path(name), stat.S_IFCHR | 0o600, os.makedev(0, 0))
            self._kinds[name] = stat.S_IFCHR

    def _dir(self, name: str, member: tarfile.TarInfo) -> None:
        path = self._path(name)
        kind = self._kinds.get(name)
        if kind not in (None, stat.S_IFDIR, stat.S_IFCHR):
            raise LayerInvalid(f"{name!r} is there twice, as different things")
        if kind == stat.S_IFCHR:
            os.unlink(path)  # noqa: PTH108
        if kind != stat.S_IFDIR:
            os.mkdir(path)  # noqa: PTH102
        if kind == stat.S_IFCHR:
            os.setxattr(path, "trusted.overlay.opaque", b"y")
        self._kinds[name] = stat.S_IFDIR
        os.chown(path, member.uid, member.gid)
        os.chmod(path, member.mode & 0o7777)  # noqa: PTH101
        self._xattrs(path, member)
        self._dir_times.append((name, int(member.mtime)))

    def _not_dir(self, name: str, member: tarfile.TarInfo) -> None:
        path = self._path(name)
        kind = self._kinds.get(name)
        if kind == stat.S_IFDIR:
            raise LayerInvalid(f"{name!r} is there twice, as different things")
        if kind is not None:
            os.unlink(path)  # noqa: PTH108
        if member.islnk():
            self._kinds[name] = self._hard_link(path, member)
            return
        if member.issym():
            os.symlink(member.linkname, path)  # noqa: PTH211
            self._kinds[name] = stat.S_IFLNK
        elif member.isreg() or member.issparse():
            self._file(path, member)
            self._kinds[name] = stat.S_IFREG
        elif member.isfifo():
            os.mkfifo(path)
            self._kinds[name] = stat.S_IFIFO
        else:
            raise LayerInvalid(f"{name!r} is a device or of unknown type {member.type!r}")
        self._attributes(path, member)

    def _hard_link(self, path: str, member: tarfile.TarInfo) -> int:
        target = _clean(member.linkname)
        if self._kinds.get(target) not in (stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO):
            raise LayerInvalid(f"hard link to {member.linkname!r}, which is no earlier file of this layer")
        os.link(self._path(target), path, follow_symlinks=False)
        return self._kinds[target]

    def _file(self, path: str, member: tarfile.TarInfo) -> None:
        self.bytes_written += member.size
        if self.bytes_written > self._limits.bytes_max:
            raise LayerInvalid(f"unpacks to more than {self._limits.bytes_max} bytes")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if member.size:
                self._copy(fd, member)
        finally:
            os.close(fd)

    def _copy(self, fd: int, member: tarfile.TarInfo) -> None:
        source = self._tar.extractfile(member)
        assert source is not None
        left = member.size
        while left > 0:
            chunk = source.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise EOFError(f"{member.name}: the layer ends in the middle of it")
            left -= len(chunk)
            view = memoryview(chunk)
            while view:
                view = view[os.write(fd, view) :]

    def _attributes(self, path: str, member: tarfile.TarInfo) -> None:
        os.chown(path, member.uid, member.gid, follow_symlinks=False)
        if not member.issym():
            os.chmod(path, member.mode & 0o7777)  # noqa: PTH101 — after chown, which clears setuid
            self._xattrs(path, member)
        at = int(member.mtime)
        os.utime(path, (at, at), follow_symlinks=False)

    def _xattrs(self, path: str, member: tarfile.TarInfo) -> None:
        # Only what belongs to users: `trusted.*` would be words to overlayfs, file capabilities a privilege.
        for key, value in member.pax_headers.items():
            if key.startswith(_XATTR + "user."):
                os.setxattr(path, key.removeprefix(_XATTR), value.encode("utf-8", "surrogateescape"))


def _clean(name: str) -> str:
    """Return a member's path without `./` and a trailing slash, `""` for the root."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise LayerInvalid(f"path {name[:100]!r} leads out of the layer")
    return "/".join(parts)


def _plain(reader: _HashingReader) -> IO[bytes]:
    head = reader.peek(4)
    file: Any = reader
    if head.startswith(b"\x1f\x8b"):
        file = gzip.GzipFile(fileobj=file, mode="rb")
    elif head == b"\x28\xb5\x2f\xfd":
        file = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return io.BufferedReader(file, _CHUNK_BYTES)
