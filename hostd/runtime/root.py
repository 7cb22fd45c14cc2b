"""Write down the calls that make a job's root, from the steps of `rootfs.mounts`; called by `child` only.

Every target is opened inside the new root with openat2(RESOLVE_IN_ROOT) first, so that no symbolic link of an image
can point a mount at the host. What needs no such care is what lies in a file system that the plan itself has just
mounted, on a directory right below the root: proc, sysfs, a tmpfs. Nobody else has put anything there. The child
goes into such a directory, and names what is in it as it is.

Refuses steps that it does not know and options that the kernel would cut.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from hostd.runtime.table import Label, Passage, Table
from netns import syscalls
from netns.errors import KernelError

AT_FDCWD = -100
_PAGE_BYTES = 4096
_PER_MOUNT = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
_OWN_TYPES = ("proc", "sysfs", "tmpfs", "devpts", "mqueue")
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_PASSAGES: dict[Any, tuple[Passage, dict[str, bool], tuple[str, str | None, bool, bool]]] = {}
_PASSAGES_MAX = 64
_SEEN: set[tuple[Any, ...]] = set()  # the steps of earlier plans: most are the same for every job
_SEEN_MAX = 512


class Places(NamedTuple):
    """Numbers of fds that nothing else has in the child: texts such as /proc/self/fd/7 have to be known before."""

    root: int
    target: int
    parent: int
    source: int
    empty: int


class Root:
    """The root directory under construction, in the child's own mount namespace."""

    def __init__(self, table: Table, directory: str, places: Places, userns: int = -1) -> None:
        """Use the (empty) `directory` as the place where the first mount puts the root itself."""
        self._table = table
        self._directory = directory
        self._places = places
        self._userns = userns
        self._has_root = False
        self._is_ours: dict[str, bool] = {}  # what is mounted or linked where; none but us put things there
        self._inside = ""  # the directory that the child is in then
        self._parent_path: str | None = None
        self._has_null = False
        self._has_empty = False
        self._acts: dict[str, Callable[..., None]] = {
            **{"idmap": self._idmap, "attach": self._attach, "mount": self._mount, "mask": self._mask},
            **{"mkdir": self._mkdir, "file": self._file, "symlink": self._symlink, "mknod": self._mknod},
            **{"umount": self._umount, "cover": self._cover},
        }

    def carry_out(self, steps: Iterable[Sequence[Any]]) -> None:
        """Add the steps of a plan; those in a row that other jobs had, too, are worked out once.

        Raises:
            KernelError: one is none, or the kernel would not do it as told.
        """
        alike: list[tuple[Any, ...]] = []
        for step in map(tuple, steps):
            if self._has_root and step in _SEEN:
                alike.append(step)
                continue
            self._carry_out_alike(alike)
            alike = []
            self._carry_out_one(step)
            if len(_SEEN) >= _SEEN_MAX:
                _SEEN.clear()
            _SEEN.add(step)
        self._carry_out_alike(alike)

    def _carry_out_alike(self, steps: list[tuple[Any, ...]]) -> None:
        """Add steps as a passage, which is theirs together with all that they build on."""
        if not steps:
            return
        before = (self._inside, self._parent_path, self._has_null, self._has_empty, frozenset(self._is_ours.items()))
        key = (tuple(steps), before, self._places, self._userns, self._table.step)
        if key not in _PASSAGES:
            whole, self._table = self._table, self._table.apart()
            try:
                for step in steps:
                    self._carry_out_one(step)
                after = (self._inside, self._parent_path, self._has_null, self._has_empty)
                _PASSAGES[key] = (self._table.passage(), self._is_ours.copy(), after)
            finally:
                self._table = whole
            if len(_PASSAGES) > _PASSAGES_MAX:
                del _PASSAGES[next(iter(_PASSAGES))]
        passage, is_ours, after = _PASSAGES[key]
        self._inside, self._parent_path, self._has_null, self._has_empty = after
        self._is_ours = is_ours.copy()
        self._table.add(passage)

    def _carry_out_one(self, step: Sequence[Any]) -> None:
        act = self._acts.get(step[0])
        if act is None:
            raise KernelError(errno.EINVAL, "mount plan", str(step[0]))
        act(*step[1:])

    def enter(self) -> None:
        """Make it the root and let go of the old one: pivot_root(".", "."), as in pivot_root(2)."""
        call = self._table.call
        call("fchdir", self._places.root)
        call("pivot_root", ".", ".")
        call("umount2", ".", syscalls.MNT_DETACH)
        call("chdir", "/")

    # how to name a place inside the root

    def _open(
        self,
        path: str,
        flags: int = os.O_PATH | os.O_CLOEXEC,
        *,
        error: Label | None = None,
        more: Label | None = None,
    ) -> None:
        """Open inside the root and give the fd to the next entry, as its first argument, unless `more` leads on.

        Again when the kernel could not tell, for a mount elsewhere, whether the walk left the root (EAGAIN).
        """
        table, again = self._table, Label()
        how = table.keep(table.words(flags, 0, syscalls.RESOLVE_IN_ROOT))
        store = table.next_argument(0) if more is None else 0
        table.place(again)
        table.call(
            "openat2",
            *(self._places.root, path, how, 24),
            target=path,
            accept=-errno.EAGAIN,
            store=store,
            zero=again,
            error=error,
            more=more,
        )

    def _go_where_ours(self, target: str) -> str | None:
        """Go to the directory of ours that holds `target` and return its name there; None: it is in none of ours."""
        if self._is_ours.get(target) is False:
            return None
        place = target
        while place:
            place = place[: place.rfind("/")]
            if place in self._is_ours:
                break
        if not self._is_ours.get(place):
            return None
        if self._inside != place:
            self._open(place, _DIRECTORY)
            self._table.call("fchdir", -1, target=place)
            self._inside = place
        return target[len(place) + 1 :]

    def _at(self, target: str) -> str:
        """Return a path that leads, for the next entry, to exactly what `target` means inside the root."""
        name = self._go_where_ours(target)
        if name is not None:
            return name
        self._open(target)
        self._table.call("dup3", -1, self._places.target, os.O_CLOEXEC)
        return f"/proc/self/fd/{self._places.target}"

    def _parent(self, target: str) -> tuple[int, str]:
        """Return the fd of the directory that holds `target`, made where it is missing, and the last name.

        The fd is kept for the next step until something is mounted.
        """
        directory, name = posixpath.split(target.rstrip("/"))
        inner = self._go_where_ours(target)
        if inner == name:
            return AT_FDCWD, name
        if directory != self._parent_path:
            self._open_parent(directory or "/")
            self._parent_path = directory
        return self._places.parent, name

    def _open_parent(self, path: str) -> None:
        """Open a directory inside as `parent`, made with its own parents where it is missing."""
        table, missing, done = self._table, Label(), Label()
        if path != "/":
            self._open(path, _DIRECTORY, error=missing)
            table.call("dup3", -1, self._places.parent, os.O_CLOEXEC)
            table.jump(done)
            table.place(missing)
            above = "/"
            for name in path.strip("/").split("/"):
                self._open(above, _DIRECTORY)
                table.call("mkdirat", -1, name, 0o755, target=path, accept=-errno.EEXIST)
                above = posixpath.join(above, name)
        self._open(path, _DIRECTORY)
        table.call("dup3", -1, self._places.parent, os.O_CLOEXEC)
        table.place(done)

    def _mounted(self, target: str, *, is_ours: bool) -> None:
        """Remember what is mounted there now, and that it hides what we may have known of it."""
        self._is_ours[target] = is_ours
        self._parent_path = None
        if self._inside == target or self._inside.startswith(target.rstrip("/") + "/"):
            self._inside = ""
        if target in ("/", "/dev"):
            self._has_null = False

    # the verbs

    def _idmap(self, path: str) -> None:
        """Lay a mapped copy of a mount of the host over itself; later steps find it under the same path."""
        flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_RECURSIVE | os.O_CLOEXEC
        self._table.call("open_tree", AT_FDCWD, path, flags, target=path, store=self._table.next_argument(0))
        self._table.call("dup3", -1, self._places.source, os.O_CLOEXEC)
        self._shift_owners(path)
        self._hang_up(path)

    def _attach(self, source: str, place: str, is_mapped: bool) -> None:
        """Hang up a mount that another process holds: `source` leads to it through /proc, `place` is the HOST's."""
        self._table.call("openat", AT_FDCWD, source, _DIRECTORY, target=source, store=self._table.next_argument(0))
        self._table.call("dup3", -1, self._places.source, os.O_CLOEXEC)
        if is_mapped and self._userns >= 0:
            self._shift_owners(source)
        self._hang_up(place)

    def _shift_owners(self, path: str) -> None:
        table = self._table
        attributes = table.keep(table.words(syscalls.MOUNT_ATTR_IDMAP, 0, 0, self._userns))
        flags = syscalls.AT_EMPTY_PATH
        table.call("mount_setattr", self._places.source, "", flags, attributes, 32, target=path)

    def _hang_up(self, path: str) -> None:
        flags = syscalls.MOVE_MOUNT_F_EMPTY_PATH
        self._table.call("move_mount", self._places.source, "", AT_FDCWD, path, flags, target=path)

    def _mount(self, source: str | None, target: str, fstype: str | None, flags: int, data: str | None) -> None:
        table = self._table
        if data is not None and len(data) >= _PAGE_BYTES:  # the kernel would cut it without a word
            raise KernelError(errno.E2BIG, "mount", f"{target}: options of {len(data)} bytes")
        if not self._has_root:
            table.call("mount", source or 0, self._directory, fstype or 0, flags, data or 0, target=self._directory)
            table.call("openat", AT_FDCWD, self._directory, _DIRECTORY, store=table.next_argument(0))
            table.call("dup3", -1, self._places.root, os.O_CLOEXEC)
            self._has_root = True
            return
        is_again = bool(flags & syscalls.MS_REMOUNT)
        is_bind = bool(flags & syscalls.MS_BIND) and not is_again
        path = self._at(target)
        # A bind of nothing is a bind onto itself, to give a path inside flags of its own.
        what = path if is_bind and source is None else source
        table.call("mount", what or 0, path, fstype or 0, flags, data or 0, target=target)
        if is_bind and flags & _PER_MOUNT:  # the kernel ignores these flags on the bind itself
            again = syscalls.MS_REMOUNT | syscalls.MS_BIND | (flags & _PER_MOUNT)
            table.call("mount", 0, self._at(target), 0, again, 0, target=target)
        if not is_again and not (is_bind and source is None):
            is_safe_place = posixpath.dirname(target) == "/" or not path.startswith("/")
            self._mounted(target, is_ours=not is_bind and fstype in _OWN_TYPES and is_safe_place)

    def _mask(self, target: str) -> None:
        """Hide a file behind the root's own /dev/null."""
        if not self._has_null:
            self._open("/dev/null")
            self._table.call("dup3", -1, self._places.source, os.O_CLOEXEC)
            self._has_null = True
        path = self._at(target)
        null = f"/proc/self/fd/{self._places.source}"
        self._table.call("mount", null, path, 0, syscalls.MS_BIND, 0, target=target)
        self._parent_path = None

    def _cover(self, target: str) -> None:
        """Hide a directory behind an empty one: the first is made, the others show that one again."""
        table, path = self._table, self._at(target)
        if self._has_empty:
            table.call("mount", f"/proc/self/fd/{self._places.empty}", path, 0, syscalls.MS_BIND, 0, target=target)
        else:
            # nr_inodes and size say "nothing fits here" twice; the mount is read-only anyway, and so are its copies.
            table.call("mount", "tmpfs", path, "tmpfs", _PER_MOUNT, "size=0,nr_inodes=1", target=target)
            self._open(target, _DIRECTORY)
            table.call("dup3", -1, self._places.empty, os.O_CLOEXEC)
            self._has_empty = True
        self._mounted(target, is_ours=False)

    def _umount(self, target: str) -> None:
        self._table.call("umount2", self._at(target), syscalls.MNT_DETACH, target=target)
        self._mounted(target, is_ours=False)

    def _mkdir(self, target: str, mode: int) -> None:
        parent, name = self._parent(target)
        self._table.call("mkdirat", parent, name, mode, target=target, accept=-errno.EEXIST)

    def _symlink(self, to: str, target: str) -> None:
        parent, name = self._parent(target)
        self._table.call("symlinkat", to, parent, name, target=target, accept=-errno.EEXIST)
        self._is_ours[target] = False

    def _mknod(self, target: str, mode: int, major: int, minor: int) -> None:
        parent, name = self._parent(target)
        kind = 0 if stat.S_IFMT(mode) else stat.S_IFCHR
        self._table.call("mknodat", parent, name, mode | kind, os.makedev(major, minor), target=target)

    def _file(self, target: str, mode: int = 0o644) -> None:
        """Create an empty file unless there is one; a dangling link in its place gives way."""
        table, missing, done = self._table, Label(), Label()
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        ours = self._go_where_ours(target)
        if ours is not None:
            table.call("openat", AT_FDCWD, ours, flags, mode, target=target, accept=-errno.EEXIST)
            return
        self._open(target, error=missing, more=done)
        table.place(missing)
        parent, name = self._parent(target)
        table.call("unlinkat", parent, name, 0, target=target, accept=-errno.ENOENT)
        table.call("openat", parent, name, flags, mode, target=target)
        table.place(done)
        self._parent_path = None  # that fd is there on one of the two ways only
