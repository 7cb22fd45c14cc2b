"""Keeps the host's volumes and their snapshots, and who has a volume mounted.

A volume is a directory `volumes/NAME`; a snapshot is `snapshots/NAME/SNAP/data`, a copy that shares its blocks with the
original where the file system can (reflink), and else is a plain one. A copy is made beside, brought to the disk and
renamed: it is complete or not there. `open` ends what a crash cut short. Refuses a second job on a volume that one of
them wants for itself, and to restore or remove one that is used. Blocking but for `hold`; called by
`hostd.runtime.files` and, through threads, by the daemon.

Source: cp(1) of coreutils (`--reflink`, sparse files, xattrs, hard links), ioctl_ficlone(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from discovery.wire.errors import AlreadyExists, NotFound
from hostd.errors import HostFull, InvalidSpec, VolumeInUse
from hostd.types import Snapshot, VolumeMount
from rootfs.removal import remove_tree
from rootfs.store import sync_dir

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DATA, _NEW, _OLD = "data", ".new-", ".old-"
_FICLONE = 0x40049409
_log = logging.getLogger(__name__)


def check_volume_name(name: str) -> str:
    """Accept a volume's (or snapshot's) name: 1 to 63 of `a-z 0-9 . _ -`, starting with a letter or digit.

    Raises:
        InvalidSpec: it is anything else.
    """
    if not _NAME.fullmatch(name):
        raise InvalidSpec(f"volume name {name[:80]!r}", hint="1 to 63 lowercase letters, digits, dots, dashes")
    return name


class Volumes:
    """The volumes of one state directory."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "volumes"
        self._snapshots = state_dir / "snapshots"
        self._users: dict[str, dict[str, bool]] = {}
        self._busy: set[str] = set()
        self._one = threading.Lock()
        self._guard = threading.Lock()
        self.has_reflinks = False

    def open(self) -> None:
        """Make the directories; undo or finish what a crash cut short."""
        for folder in (self.path, self._snapshots):
            folder.mkdir(parents=True, exist_ok=True)
        for old in self.path.glob(f"{_OLD}*"):
            name = old.name.removeprefix(_OLD)
            if not (self.path / name).exists():
                old.rename(self.path / name)  # a restore that had not got far enough never was
            else:
                remove_tree(old)
        for left in (*self.path.glob(f"{_NEW}*"), *self._snapshots.glob(f"*/{_NEW}*")):
            remove_tree(left)
        self.has_reflinks = _has_reflinks(self.path)

    # --- who uses what

    def hold(self, job_id: str, mounts: Iterable[VolumeMount]) -> None:
        """Note that a job uses volumes.

        Raises:
            VolumeInUse: another job uses one, and one of the two wants it for itself; or it is being restored.
        """
        wanted = tuple(mounts)
        with self._guard:
            for mount in wanted:
                others = {user: alone for user, alone in self._users.get(mount.name, {}).items() if user != job_id}
                self._check_free(mount.name)
                if others and (mount.is_exclusive or any(others.values())):
                    raise VolumeInUse(
                        f"volume {mount.name} is in use by {', '.join(sorted(others))}",
                        hint="a volume that is_exclusive serves one job at a time",
                    )
            for mount in wanted:
                self._users.setdefault(mount.name, {})[job_id] = mount.is_exclusive

    def _check_free(self, name: str) -> None:
        if name in self._busy:
            raise VolumeInUse(f"volume {name} is being copied, restored or removed", hint="try again later")

    def let_go(self, job_id: str) -> None:
        """Note that a job is gone."""
        with self._guard:
            for name in [name for name, users in self._users.items() if users.pop(job_id, None) is not None]:
                if not self._users[name]:
                    del self._users[name]

    def users(self, name: str) -> tuple[str, ...]:
        """Return the jobs that have the volume mounted."""
        return tuple(sorted(self._users.get(name, ())))

    @contextlib.contextmanager
    def _kept_from_new_jobs(self, name: str, *, is_unused: bool = True) -> Iterator[None]:
        with self._guard:
            if is_unused and (users := self.users(name)):
                raise VolumeInUse(f"volume {name} is in use by {', '.join(users)}", hint="stop these jobs first")
            self._check_free(name)
            self._busy.add(name)
        try:
            yield
        finally:
            with self._guard:
                self._busy.discard(name)

    # --- volumes

    def names(self) -> tuple[str, ...]:
        """Return the names of all volumes."""
        return tuple(sorted(path.name for path in self.path.iterdir() if path.is_dir() and path.name[0] != "."))

    def ensure(self, name: str) -> Path:
        """Return a volume's directory, made if it is not there."""
        path = self.path / check_volume_name(name)
        if not path.is_dir():
            path.mkdir(exist_ok=True)
            path.chmod(0o755)  # whatever the daemon's umask: users of jobs who are not root pass through here
            sync_dir(self.path)
        return path

    def remove(self, name: str) -> None:
        """Remove a volume and all that is in it; its snapshots stay.

        Raises:
            NotFound: there is none. VolumeInUse: a job has it mounted.
        """
        path = self._existing(name)
        with self._one, self._kept_from_new_jobs(name):
            gone = self.path / f"{_NEW}{secrets.token_hex(6)}"
            path.rename(gone)
            sync_dir(self.path)
            remove_tree(gone)

    def _existing(self, name: str) -> Path:
        path = self.path / check_volume_name(name)
        if not path.is_dir():
            raise NotFound(f"no volume {name[:80]!r}", hint="hostd volume list")
        return path

    # --- snapshots

    def snapshots(self, name: str = "") -> tuple[Snapshot, ...]:
        """Return the snapshots of one volume, or of all; oldest first."""
        found = [
            Snapshot(volume=path.parent.name, name=path.name, created_at=path.stat().st_mtime)
            for path in self._snapshots.glob(f"{check_volume_name(name) if name else '*'}/*")
            if not path.name.startswith(".")
        ]
        return tuple(sorted(found, key=lambda each: (each.created_at, each.name)))

    def snapshot(self, name: str, snapshot: str) -> Snapshot:
        """Copy a volume as it is now; who calls sees to it that nobody writes meanwhile.

        Raises:
            NotFound: no such volume. AlreadyExists: a snapshot of that name. HostFull: no room; nothing is left.
        """
        source = self._existing(name)
        target = self._snapshots / name / check_volume_name(snapshot)
        with self._one, self._kept_from_new_jobs(name, is_unused=False):
            if target.exists():
                raise AlreadyExists(f"volume {name} has a snapshot {snapshot}", hint="choose another name")
            target.parent.mkdir(exist_ok=True)
            sync_dir(self._snapshots)
            staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=_NEW))
            try:
                _copy(source, staging / _DATA)
                staging.rename(target)
                sync_dir(target.parent)
            except BaseException:
                remove_tree(staging)
                raise
        return Snapshot(volume=name, name=snapshot, created_at=target.stat().st_mtime)

    def restore(self, name: str, snapshot: str) -> None:
        """Make a volume what it was; the snapshot stays.

        Raises:
            NotFound: no such snapshot. VolumeInUse: a job has the volume mounted. HostFull: no room; nothing changed.
        """
        source = self._existing_snapshot(name, snapshot) / _DATA
        with self._one, self._kept_from_new_jobs(name):
            staging = Path(tempfile.mkdtemp(dir=self.path, prefix=_NEW))
            path, old = self.path / name, self.path / f"{_OLD}{name}"
            try:
                _copy(source, staging / _DATA)
                if path.exists():
                    path.rename(old)
                (staging / _DATA).rename(path)  # a crash before this leaves `old`, which `open` puts back
                sync_dir(self.path)
            finally:
                if old.exists() and not path.exists():
                    old.rename(path)
                remove_tree(staging)
                remove_tree(old)

    def remove_snapshot(self, name: str, snapshot: str) -> None:
        """Remove a snapshot.

        Raises:
            NotFound: there is none.
        """
        path = self._existing_snapshot(name, snapshot)
        with self._one:
            gone = path.with_name(f"{_NEW}{secrets.token_hex(6)}")
            path.rename(gone)
            remove_tree(gone)
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    def _existing_snapshot(self, name: str, snapshot: str) -> Path:
        path = self._snapshots / check_volume_name(name) / check_volume_name(snapshot)
        if not path.is_dir():
            raise NotFound(f"volume {name} has no snapshot {snapshot[:80]!r}", hint=f"hostd volume snapshots {name}")
        return path

    def place(self, name: str, snapshot: str = "") -> Path:
        """Return where a volume, or one of its snapshots, lies."""
        return self._snapshots / name / snapshot / _DATA if snapshot else self.path / name


def _copy(source: Path, target: Path) -> None:
    """Copy a tree with all that files have, and bring it to the disk; ends with us if we are killed."""
    # the process dies with the thread that waits for it, so that no copy goes on behind the next hostd's back
    command = ["setpriv", "--pdeathsig", "KILL", "cp", "-a", "--reflink=auto", "-T", str(source), str(target)]
    _run(command)
    _run(["sync", "-f", str(target)])  # coreutils' `sync -f` is syncfs(2)


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False, env={
            "LC_ALL": "C", "PATH": os.defpath,
        },
    )  # fmt: skip
    if done.returncode != 0:
        first = done.stderr.strip().partition("\n")[0][:300]
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise HostFull(f"no room for the copy: {first}", hint="free some disk space")
        raise OSError(errno.EIO, f"{command[-4]}: {first}")


def _has_reflinks(folder: Path) -> bool:
    """Say whether files of this file system can share blocks, by trying; a full one does not show it."""
    try:
        with tempfile.TemporaryFile(dir=folder) as one, tempfile.TemporaryFile(dir=folder) as two:
            one.write(b"x" * 4096)
            one.flush()
            fcntl.ioctl(two, _FICLONE, one.fileno())
    except OSError:
        return False
    return True
