"""The files step of a launch: layers present, volumes there, an own upper directory, and the plan of mounts.

Refuses names that lead out of the state directory and mounts of paths that are not there. Mounts nothing:
the plan is carried out by the spawner's child in the job's own namespace, so `undo` only removes
`jobs/<id>` and may be called at any time after the job's last process is gone, twice, or without `apply`.
Called by `hostd.runtime.launch` and, for reconciling, by the daemon.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from hostd.types import JobSpec
from rootfs.artifacts import Resolve
from rootfs.mounts import Step


class FilesState(msgspec.Struct, frozen=True, kw_only=True):
    """What the process step needs: the mount point `root` (a directory of the host) and the `plan` for it."""

    root: str
    plan: tuple[Step, ...]


class FilesStep:
    """Owns `layers`, `jobs` and `volumes` of one state directory."""

    def __init__(
        self,
        state_dir: Path,
        *,
        resolve: Resolve | None = None,
        init_path: Path = Path("/usr/bin/tini-static"),
        ca_bundle: Path = Path("/etc/ssl/certs/ca-certificates.crt"),
    ) -> None:
        raise NotImplementedError

    async def open(self) -> None:
        """Make the directories, throw away what a crash left half done."""
        raise NotImplementedError

    async def apply(self, spec: JobSpec, *, hostname: str, nameserver: str = "", ip: str = "") -> FilesState:
        """Make the job's directories and return its plan; `nameserver=""` copies the host's resolv.conf."""
        raise NotImplementedError

    async def undo(self, job_id: str) -> None:
        """Remove `jobs/<id>`; nothing happens if it is not there."""
        raise NotImplementedError

    def orphans(self, known: Iterable[str]) -> tuple[str, ...]:
        """Return the ids that have a directory here and are not in `known`."""
        raise NotImplementedError

    async def collect(self, keep: Iterable[str]) -> int:
        """Remove unpacked layers whose digest is neither in `keep` nor part of a stored image; return how many."""
        raise NotImplementedError

    def volumes(self) -> tuple[str, ...]:
        """Return the names of the volumes of this host."""
        raise NotImplementedError

    async def remove_volume(self, name: str) -> None:
        """Remove a volume and all that is in it."""
        raise NotImplementedError

    async def close(self) -> None:
        """Wait for the background threads."""
        raise NotImplementedError
