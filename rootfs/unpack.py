"""Unpacks one layer tar into an empty directory that nobody else knows yet, or only looks whether that would work.

Turns OCI whiteouts into what overlayfs reads: `.wh.x` a character device 0/0 named `x`, `.wh..wh..opq` the xattr
`trusted.overlay.opaque`. Of attributes it keeps `user.*` and `security.capability`. Refuses paths that are absolute,
contain `..` or lead through a symlink, hard links to anything but an earlier file of the same layer, devices,
attributes that are words to overlayfs, names that no disk takes, and whatever `rootfs.layerstream` refuses.
Blocking; called by `rootfs.layers` in a thread and by `rootfs.intake`.

Because the directory is new and only this function writes into it, a table of what was made is enough to
know that no parent is a symlink: no path is ever resolved by the kernel through anything unknown.

Source: OCI image-spec `layer.md`; Documentation/filesystems/overlayfs.rst; capabilities(7).
"""

from __future__ import annotations

import errno
import math
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rootfs.errors import DiskFull, LayerInvalid
from rootfs.layerstream import Limits, members, opened

_CHUNK_BYTES = 1024 * 1024
_WHITEOUT, _OPAQUE, _WHITEOUT_META = ".wh.", ".wh..wh..opq", ".wh..wh."
_XATTR = "SCHILY.xattr."
_REFUSED_XATTRS = tuple(word + name for word in (_XATTR, "LIBARCHIVE.xattr.") for name in ("trusted.", "user.overlay."))
_NAME_BYTES_MAX, _PATH_BYTES_MAX, _LINK_BYTES_MAX = 255, 3584, 4095  # the directory's own path goes before
_XATTR_BYTES_MAX = 3072  # what ext4 has room for in one block
_TIME_S_MAX = 2**34
_ID_MAX = 2**32 - 2
_NOT_FOR_A_DISK = (errno.ENAMETOOLONG, errno.EMLINK, errno.EINVAL, errno.E2BIG, errno.ERANGE, errno.ENOENT)


def unpack(blob: Path, into: Path, *, digest: str = "", diff_id: str = "", limits: Limits | None = None) -> int:
    """Unpack `blob` into the empty directory `into`; return the bytes of its files.

    Raises:
        LayerInvalid: not a tar, or one of the things that this module refuses.
        BlobMismatch: the bytes read do not have `digest`, or the tar inside not `diff_id`.
        DiskFull: no room.
    """
    return _walk(blob, _Disk(into), digest, diff_id, limits or Limits()).bytes_written


def look_through(blob: Path, *, digest: str = "", diff_id: str = "", limits: Limits | None = None) -> tuple[int, int]:
    """Do all that `unpack` does but write; return the bytes and the entries.

    Raises:
        LayerInvalid, BlobMismatch: as `unpack`.
    """
    writer = _walk(blob, _Nowhere(), digest, diff_id, limits or Limits())
    return writer.bytes_written, writer.entries


def _walk(blob: Path, disk: _Disk | _Nowhere, digest: str, diff_id: str, limits: Limits) -> _Writer:
    try:
        with opened(blob, limits, digest=digest, diff_id=diff_id) as tar:
            writer = _Writer(disk, tar, limits.plain_bytes_max(blob.stat().st_size))
            for member in members(tar, limits.entries_max):
                writer.write(member)
            writer.finish()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no room for layer {digest or blob}", hint="free some disk space") from error
        if error.errno in _NOT_FOR_A_DISK:
            raise LayerInvalid(f"layer {digest or blob} has what no disk takes: {error.strerror}") from error
        raise
    return writer


class _Writer:
    """Decides what each member becomes. Knows every name it has made, and what it is."""

    def __init__(self, disk: _Disk | _Nowhere, tar: tarfile.TarFile, bytes_max: int) -> None:
        self._disk = disk
        self._tar = tar
        self._bytes_max = bytes_max
        self._kinds: dict[str, int] = {"": stat.S_IFDIR}
        self._dir_times: list[tuple[str, int]] = []
        self.entries = 0
        self.bytes_written = 0

    def write(self, member: tarfile.TarInfo) -> None:
        self.entries += 1
        name = _clean(member.name)
        parent, _, base = name.rpartition("/")
        if any(part.startswith(_WHITEOUT_META) for part in parent.split("/")):
            return  # aufs bookkeeping
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
            self._disk.set_time(name, at)

    def _ensure_parents(self, name: str) -> None:
        kind = self._kinds.get(name)
        if kind == stat.S_IFDIR:
            return
        if kind is not None:
            raise LayerInvalid(f"{name!r} is not a directory, yet something lies in it")
        self._ensure_parents(name.rpartition("/")[0])
        self._disk.make_dir(name)
        self._disk.set_mode(name, 0o755)  # against the umask
        self._kinds[name] = stat.S_IFDIR

    def _whiteout(self, parent: str, base: str) -> None:
        if base == _OPAQUE:
            self._disk.make_opaque(parent)
            return
        if base.startswith(_WHITEOUT_META):
            return  # aufs bookkeeping, too
        hidden = base.removeprefix(_WHITEOUT)
        if hidden in ("", ".", ".."):
            raise LayerInvalid(f"whiteout {base!r}")
        name = f"{parent}/{hidden}" if parent else hidden
        kind = self._kinds.get(name)
        if kind == stat.S_IFDIR:  # hides what lower layers have there, not what this one has
            self._disk.make_opaque(name)
        elif kind is None:
            self._disk.make_whiteout(name)
            self._kinds[name] = stat.S_IFCHR

    def _dir(self, name: str, member: tarfile.TarInfo) -> None:
        kind = self._kinds.get(name)
        if kind not in (None, stat.S_IFDIR, stat.S_IFCHR):
            raise LayerInvalid(f"{name!r} is there twice, as different things")
        attributes = _Attributes(name, member)
        if kind == stat.S_IFCHR:
            self._disk.remove(name)
        if kind != stat.S_IFDIR:
            self._disk.make_dir(name)
        if kind == stat.S_IFCHR:
            self._disk.make_opaque(name)
        self._kinds[name] = stat.S_IFDIR
        self._disk.set_attributes(name, attributes)
        self._dir_times.append((name, attributes.at))

    def _not_dir(self, name: str, member: tarfile.TarInfo) -> None:
        kind = self._kinds.get(name)
        if kind == stat.S_IFDIR:
            raise LayerInvalid(f"{name!r} is there twice, as different things")
        target = self._linked(name, member) if member.islnk() else ""
        attributes = _Attributes(name, member)
        if kind is not None:
            self._disk.remove(name)
        if target:
            self._disk.link(target, name)
            self._kinds[name] = self._kinds[target]
            return
        if member.issym():
            self._disk.make_symlink(name, _link_target(member))
            self._kinds[name] = stat.S_IFLNK
        elif member.isreg():
            self._file(name, member)
            self._kinds[name] = stat.S_IFREG
        elif member.isfifo():
            self._disk.make_fifo(name)
            self._kinds[name] = stat.S_IFIFO
        else:
            raise LayerInvalid(f"{name!r} is a device or of unknown type {member.type!r}")
        self._disk.set_attributes(name, attributes, is_symlink=member.issym())
        self._disk.set_time(name, attributes.at)

    def _linked(self, name: str, member: tarfile.TarInfo) -> str:
        target = _clean(member.linkname)
        if self._kinds.get(target) not in (stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO) or target == name:
            raise LayerInvalid(f"hard link to {member.linkname[:100]!r}, which is no earlier file of this layer")
        return target

    def _file(self, name: str, member: tarfile.TarInfo) -> None:
        self.bytes_written += member.size
        if self.bytes_written > self._bytes_max:
            raise LayerInvalid(f"unpacks to more than {self._bytes_max} bytes")
        source = self._tar.extractfile(member)
        assert source is not None
        self._disk.make_file(name, source, member.size)


class _Attributes:
    """What a member says of its owner, mode, time and attributes, refused where no kernel would take it."""

    def __init__(self, name: str, member: tarfile.TarInfo) -> None:
        if not (0 <= member.uid <= _ID_MAX and 0 <= member.gid <= _ID_MAX):
            raise LayerInvalid(f"{name!r} belongs to {member.uid}:{member.gid}")
        if not math.isfinite(member.mtime) or abs(member.mtime) > _TIME_S_MAX:
            raise LayerInvalid(f"{name!r} is of the time {member.mtime}")
        self.uid, self.gid, self.mode, self.at = member.uid, member.gid, member.mode & 0o7777, int(member.mtime)
        self.xattrs = []
        for key, value in member.pax_headers.items():
            if key.startswith(_REFUSED_XATTRS):
                raise LayerInvalid(f"{name!r} has the attribute {key[:60]!r}, which would be a word to overlayfs")
            if not key.startswith((_XATTR + "user.", _XATTR + "security.capability")):
                continue
            content = value.encode("utf-8", "surrogateescape")
            attribute = key.removeprefix(_XATTR)
            if len(content) > _XATTR_BYTES_MAX or len(attribute.encode("utf-8", "surrogateescape")) > _NAME_BYTES_MAX:
                raise LayerInvalid(f"{name!r} has the attribute {key[:60]!r} of {len(content)} bytes")
            self.xattrs.append((attribute, content))


class _Disk:
    """Carries it out. Names are checked, no parent is a symlink."""

    def __init__(self, into: Path) -> None:
        self._root = str(into)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def make_dir(self, name: str) -> None:
        os.mkdir(self._path(name))  # noqa: PTH102 — 20 000 times in a row: no Path objects here

    def set_mode(self, name: str, mode: int) -> None:
        os.chmod(self._path(name), mode)  # noqa: PTH101

    def make_opaque(self, name: str) -> None:
        os.setxattr(self._path(name), "trusted.overlay.opaque", b"y")

    def make_whiteout(self, name: str) -> None:
        os.mknod(self._path(name), stat.S_IFCHR | 0o600, os.makedev(0, 0))

    def make_symlink(self, name: str, target: str) -> None:
        os.symlink(target, self._path(name))  # noqa: PTH211

    def make_fifo(self, name: str) -> None:
        os.mkfifo(self._path(name))

    def link(self, target: str, name: str) -> None:
        os.link(self._path(target), self._path(name), follow_symlinks=False)

    def remove(self, name: str) -> None:
        os.unlink(self._path(name))  # noqa: PTH108

    def make_file(self, name: str, source: IO[bytes], size_bytes: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._path(name), flags, 0o600)
        try:
            for chunk in _chunks(name, source, size_bytes):
                view = memoryview(chunk)
                while view:
                    view = view[os.write(fd, view) :]
        finally:
            os.close(fd)

    def set_attributes(self, name: str, attributes: _Attributes, *, is_symlink: bool = False) -> None:
        path = self._path(name)
        os.chown(path, attributes.uid, attributes.gid, follow_symlinks=False)
        if is_symlink:
            return
        os.chmod(path, attributes.mode)  # noqa: PTH101 — after chown, which clears setuid and capabilities
        for key, content in attributes.xattrs:
            try:
                os.setxattr(path, key, content)
            except OSError as error:
                # ENOSPC is said by ext4 of one file's attributes, too; a really full disk shows at the next write.
                raise LayerInvalid(f"{name!r} cannot have the attribute {key!r}: {error.strerror}") from error

    def set_time(self, name: str, at: int) -> None:
        os.utime(self._path(name), (at, at), follow_symlinks=False)


class _Nowhere:
    """Does nothing with it, but reads what there is to read."""

    def make_dir(self, name: str) -> None: ...
    def set_mode(self, name: str, mode: int) -> None: ...
    def make_opaque(self, name: str) -> None: ...
    def make_whiteout(self, name: str) -> None: ...
    def make_symlink(self, name: str, target: str) -> None: ...
    def make_fifo(self, name: str) -> None: ...
    def link(self, target: str, name: str) -> None: ...
    def remove(self, name: str) -> None: ...
    def set_time(self, name: str, at: int) -> None: ...
    def set_attributes(self, name: str, attributes: _Attributes, *, is_symlink: bool = False) -> None: ...

    def make_file(self, name: str, source: IO[bytes], size_bytes: int) -> None:
        for _ in _chunks(name, source, size_bytes):
            pass


def _chunks(name: str, source: IO[bytes], size_bytes: int) -> Iterator[bytes]:
    left = size_bytes
    while left > 0:
        chunk = source.read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise EOFError(f"{name!r}: the layer ends in the middle of it")
        left -= len(chunk)
        yield chunk


def _clean(name: str) -> str:
    """Return a member's path without `./` and a trailing slash, `""` for the root."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise LayerInvalid(f"path {name[:100]!r} leads out of the layer")
    lengths = [len(part.encode("utf-8", "surrogateescape")) for part in parts]
    if any(length > _NAME_BYTES_MAX for length in lengths) or sum(lengths) + len(lengths) > _PATH_BYTES_MAX:
        raise LayerInvalid(f"path {name[:100]!r} is too long")
    return "/".join(parts)


def _link_target(member: tarfile.TarInfo) -> str:
    target = member.linkname
    if not target or "\0" in target or len(target.encode("utf-8", "surrogateescape")) > _LINK_BYTES_MAX:
        raise LayerInvalid(f"symlink {member.name[:100]!r} to {target[:100]!r}")
    return target
