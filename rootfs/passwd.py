"""Finds who an image's `User` is, in the image's own /etc/passwd and /etc/group and in nobody else's.

Looks at unpacked layers as overlayfs would show them: top first, whiteouts and opaque directories hide what is below,
symlinks are followed inside of the image only. Nothing is mounted and no path of a stranger is given to the kernel: one
name at a time is opened in a directory that is already open, never through a symlink, so that none leads out. Refuses
files that are large or no files. Blocking; called by `hostd.runtime.files`.

Source: passwd(5), group(5); OCI image-spec `config.md`, `User`; Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rootfs.errors import NameInvalid

_FILE_BYTES_MAX = 1024 * 1024
_LINKS_MAX = 40
_PARTS_MAX = 256
_NUMBER = re.compile(r"\d{1,9}")
_NAME = re.compile(r"[^\s:/\x00]{1,256}")
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)


@dataclass(frozen=True, kw_only=True)
class User:
    """Whom a program runs as. `home` is empty when the image does not know."""

    uid: int
    gid: int
    home: str = ""


def find_user(layers: Sequence[Path], text: str) -> User:
    """Return the user that `USER[:GROUP]` means in an image of these unpacked layers, bottom first.

    Names and numbers may be mixed. A number that the image does not know is itself, with group 0 unless one is named.

    Raises:
        NameInvalid: the image has no such user or group, or none can be called so.
    """
    user, colon, group = text.partition(":")
    if not _NAME.fullmatch(user) or (colon and not _NAME.fullmatch(group)):
        raise NameInvalid(f"user {text[:80]!r}", hint="USER or USER:GROUP, names or numbers")
    entry = _user(read(layers, "etc/passwd"), user)
    if entry is None and not _NUMBER.fullmatch(user):
        raise NameInvalid(f"the image has no user {user[:80]!r}", hint="a number is always possible")
    found = entry or User(uid=int(user), gid=0)
    if not group:
        return found
    gid = int(group) if _NUMBER.fullmatch(group) else _group(read(layers, "etc/group"), group)
    return User(uid=found.uid, gid=gid, home=found.home)


def _user(content: bytes, wanted: str) -> User | None:
    for line in content.decode("utf-8", "replace").split("\n"):
        parts = line.split(":")
        if len(parts) < 6 or not (_NUMBER.fullmatch(parts[2]) and _NUMBER.fullmatch(parts[3])):
            continue
        if wanted in (parts[0], str(int(parts[2]))):
            home = parts[5] if parts[5].startswith("/") and "\0" not in parts[5] and len(parts[5]) < 4096 else ""
            return User(uid=int(parts[2]), gid=int(parts[3]), home=home)
    return None


def _group(content: bytes, wanted: str) -> int:
    for line in content.decode("utf-8", "replace").split("\n"):
        parts = line.split(":")
        if len(parts) >= 3 and parts[0] == wanted and _NUMBER.fullmatch(parts[2]):
            return int(parts[2])
    raise NameInvalid(f"the image has no group {wanted[:80]!r}", hint="a number is always possible")


def read(layers: Sequence[Path], path: str) -> bytes:
    """Return the bytes of a file of the image, none if there is no such file.

    Raises:
        NameInvalid: it is too large, or symlinks lead in circles.
    """
    with ExitStack() as stack:
        return _Walk(layers, stack).read(path)


class _Walk:
    """One look through layers; a directory is the list of its open parts, top layer first."""

    def __init__(self, layers: Sequence[Path], stack: ExitStack) -> None:
        self._stack = stack
        self._root = [self._kept(os.open(layer, _LOOK | os.O_DIRECTORY)) for layer in reversed(layers)]

    def _kept(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def read(self, path: str) -> bytes:
        todo = _parts(path)
        stack = [self._root]
        links = steps = 0
        while todo:
            steps += 1
            name = todo.pop(0)
            if steps > _PARTS_MAX * 4:
                raise NameInvalid(f"{path} leads too far")
            if name == "..":
                stack = stack[:-1] or stack
                continue
            found = self._look(stack[-1], name)
            if isinstance(found, list):
                stack.append(found)
                continue
            parent, mode = found
            if stat.S_ISLNK(mode) and (links := links + 1) <= _LINKS_MAX:
                target = os.readlink(name, dir_fd=parent)
                stack = [self._root] if target.startswith("/") else stack
                todo = _parts(target) + todo
            elif stat.S_ISREG(mode) and not todo:
                return self._content(parent, name, path)
            elif stat.S_ISLNK(mode):
                raise NameInvalid(f"{path} leads in circles")
            else:
                return b""
        return b""

    def _look(self, folder: list[int], name: str) -> list[int] | tuple[int, int]:
        """Return what `name` is there: a directory's parts, or the part where it lies and its mode (0: nothing)."""
        parts: list[int] = []
        for parent in folder:
            try:
                fd = self._kept(os.open(name, _LOOK, dir_fd=parent))
            except OSError as error:
                if error.errno in _NOT_THERE:
                    continue
                raise
            found = os.fstat(fd)
            if not stat.S_ISDIR(found.st_mode):
                is_whiteout = stat.S_ISCHR(found.st_mode) and found.st_rdev == 0
                return parts or (parent, 0 if is_whiteout else found.st_mode)
            parts.append(fd)
            if _is_opaque(fd):
                break
        return parts or (-1, 0)

    def _content(self, parent: int, name: str, path: str) -> bytes:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        with os.fdopen(fd, "rb") as file:
            content = file.read(_FILE_BYTES_MAX + 1)
        if len(content) > _FILE_BYTES_MAX:
            raise NameInvalid(f"{path} of the image has more than {_FILE_BYTES_MAX} bytes")
        return content


def _parts(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if len(parts) > _PARTS_MAX:
        raise NameInvalid("a symlink of the image leads too far")
    return parts


def _is_opaque(fd: int) -> bool:
    try:
        return os.getxattr(f"/proc/self/fd/{fd}", "trusted.overlay.opaque") == b"y"
    except OSError:
        return False
