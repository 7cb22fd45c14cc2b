"""Writes layer tars: a Debian tree, the difference of two, or plain files, always zstd-compressed.

Same input, same bytes: owners are numbers, times whole seconds, `from_files` knows no times at all. Refuses
nothing by itself; what it leaves out (devices, logs, caches, what belongs to one machine) is in `_LEFT_OUT`.
Called by `rootfs.images`.

Source: OCI image-spec `layer.md` (whiteouts), tar(5).
"""

from __future__ import annotations

import copy
import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from rootfs.types import MEDIA_TAR_ZSTD, Layer

_ZSTD_LEVEL = 3
_LEFT_OUT = re.compile(
    r"(dev|proc|sys|run|tmp)/.+"
    r"|etc/(resolv\.conf|hostname|apt/apt\.conf\.d/99mmdebstrap|machine-id|\.pwd\.lock)"
    r"|var/log/.+\.log|var/cache/(apt/.+|ldconfig/.+|debconf/.+-old)|var/lib/(dpkg/.+-old|apt/lists/.+)"
)
Signature = tuple[Any, ...]


class LayerWriter:
    """Collects members into one compressed tar and ends as a `Layer`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._packed: Any = _Hashing(file)
        compressor: Any = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        self._compressor = compressor.stream_writer(self._packed, closefd=False)
        self._plain: Any = _Hashing(self._compressor)
        open_tar: Any = tarfile.open  # its stubs know no bufsize for this mode
        self._tar = open_tar(fileobj=self._plain, mode="w|", format=tarfile.PAX_FORMAT, bufsize=2**20)

    def add(self, member: tarfile.TarInfo, content: IO[bytes] | None = None) -> None:
        """Add one member, cleaned of what differs between machines."""
        member = copy.copy(member)
        member.uname = member.gname = ""
        member.mtime = int(member.mtime)
        member.pax_headers = {}
        self._tar.addfile(member, content)

    def finish(self) -> Layer:
        self._tar.close()
        self._compressor.close()
        return Layer(
            digest="sha256:" + self._packed.hash.hexdigest(),
            size_bytes=self._packed.size,
            media_type=MEDIA_TAR_ZSTD,
            diff_id="sha256:" + self._plain.hash.hexdigest(),
        )


class _Hashing:
    def __init__(self, file: Any) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, chunk: bytes) -> int:
        self.hash.update(chunk)
        self.size += len(chunk)
        self._file.write(chunk)
        return len(chunk)


def from_tree(source: Path, target: Path) -> Layer:
    """Write a Debian tree's tar as a layer."""
    with target.open("wb") as file, tarfile.open(source) as tar:
        writer = LayerWriter(file)
        for name, member in _members(tar):
            writer.add(_renamed(member, name), _content(tar, member))
        return writer.finish()


def from_difference(below: Path, source: Path, target: Path) -> Layer:
    """Write what `source`, a Debian tree's tar, has or lacks against the layer `below`.

    A directory on the way to something new comes along with its own owner and mode, because overlayfs shows
    the topmost one's.
    """
    with open_layer(below) as tar:
        old = _signatures(tar)
    with target.open("wb") as file, tarfile.open(source) as tar:
        new = _signatures(tar)
        gone = _topmost(name for name in old if name not in new and not _is_covered(name, new))
        wanted = {name for name, signature in new.items() if old.get(name) != signature}
        for name in [*wanted, *gone]:
            wanted.update(_ancestors(name))
        writer = LayerWriter(file)
        written: set[str] = set()
        for name, member in _members(tar):
            if name not in wanted:
                continue
            content = _content(tar, member)
            if member.islnk() and _clean(member.linkname) not in written:
                content = tar.extractfile(member)
                member = _as_file(tar, member)
            writer.add(_renamed(member, name), content)
            written.add(name)
        for name in gone:
            writer.add(_whiteout(name))
        return writer.finish()


def from_files(files: Iterable[tuple[str, bytes | str, int]], target: Path) -> Layer:
    """Write files as a layer: (path, content, mode); a `str` is the target of a symlink. Owner root, time 0."""
    found = sorted(files)
    folders = sorted({parent for name, _, _ in found for parent in _ancestors(name)})
    with target.open("wb") as file:
        writer = LayerWriter(file)
        for name in folders:
            writer.add(_info(name, tarfile.DIRTYPE, 0o755))
        for name, content, mode in found:
            if isinstance(content, str):
                member = _info(name, tarfile.SYMTYPE, 0o777)
                member.linkname = content
                writer.add(member)
            else:
                member = _info(name, tarfile.REGTYPE, mode)
                member.size = len(content)
                writer.add(member, io.BytesIO(content))
        return writer.finish()


@contextmanager
def open_layer(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a zstd layer for one pass from front to back."""
    with (
        path.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file) as plain,
        tarfile.open(fileobj=plain, mode="r|", bufsize=2**20) as tar,
    ):
        yield tar


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    for member in tar:
        name = _clean(member.name)
        if not (member.isdev() or _LEFT_OUT.fullmatch(name)):
            yield name, member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes] | None:
    return tar.extractfile(member) if member.isreg() else None


def _signatures(tar: tarfile.TarFile) -> dict[str, Signature]:
    """Say for each path what it is, times left aside: two files with equal signatures may stand for each other."""
    found: dict[str, Signature] = {}
    for name, member in _members(tar):
        if member.islnk():
            found[name] = found[_clean(member.linkname)]
            continue
        content = _content(tar, member)
        digest = hashlib.file_digest(content, "sha256").hexdigest() if content else ""  # type: ignore[arg-type]
        found[name] = (member.type, member.mode, member.uid, member.gid, member.linkname, digest)
    return found


def _as_file(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Turn a hard link whose first name stays in the layer below into a file of its own."""
    original = tar.getmember(member.linkname)
    file = _info(member.name, tarfile.REGTYPE, original.mode)
    file.uid, file.gid, file.mtime, file.size = original.uid, original.gid, original.mtime, original.size
    return file


def _renamed(member: tarfile.TarInfo, name: str) -> tarfile.TarInfo:
    renamed = copy.copy(member)  # the tar still looks its members up by their own names
    renamed.name = name or "."
    if renamed.islnk():
        renamed.linkname = _clean(renamed.linkname)
    return renamed


def _whiteout(name: str) -> tarfile.TarInfo:
    parent, _, base = name.rpartition("/")
    return _info(f"{parent}/.wh.{base}" if parent else f".wh.{base}", tarfile.REGTYPE, 0o600)


def _info(name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name or ".")
    member.type, member.mode = kind, mode
    return member


def _clean(name: str) -> str:
    return name.removeprefix("./").strip("/") if name != "." else ""


def _ancestors(name: str) -> Iterator[str]:
    """Yield every folder above a path, up to `""`."""
    while name:
        name = name.rpartition("/")[0]
        yield name


def _is_covered(name: str, tree: dict[str, Signature]) -> bool:
    """Say whether a folder above `name` has become something else, which hides all that was in it."""
    return any(tree[parent][0] != tarfile.DIRTYPE for parent in _ancestors(name) if parent in tree)


def _topmost(names: Iterable[str]) -> list[str]:
    """Leave out what lies in another one: one whiteout hides a whole folder."""
    found = set(names)
    return sorted(name for name in found if not any(parent in found for parent in _ancestors(name)))
