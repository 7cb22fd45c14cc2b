"""Whose ids the jobs have: each job's own range of 65536 unprivileged ids of the host, root of the job among them.

`Ranges` is pure: it hands out ranges and takes them back. `probe` finds out, by starting a program exactly as a
job is started, whether this kernel and the file systems of this node can do it; what cannot is said by `hostd status`,
and such jobs run with the host's ids, as they do when they ask for it (`user_namespace="host"`). Called by `launch`
and `daemon`.

Source: user_namespaces(7); mount_setattr(2) on idmapped mounts; systemd's UIDS-GIDS.md for the range of containers.
"""

from __future__ import annotations

import contextlib
import logging
import os
from errno import EINVAL, ENOSPC, ENOSYS, EOPNOTSUPP, EPERM, EUSERS
from typing import Protocol

import msgspec

from discovery.wire.errors import ServiceError
from hostd.errors import HostFull, JobNotFound, LaunchFailed
from hostd.runtime.files import FilesState
from hostd.runtime.process import JOB_NAMESPACES, ProcessStep, SpawnRequest
from hostd.types import JobSpec
from rootfs.mounts import INIT_PATH

RANGE_IDS = 65536
LOW, HIGH = 524288, 1879048191
_COUNT = (HIGH + 1 - LOW) // RANGE_IDS
PROBE_ID = "probe"
_REFUSING = frozenset({"open_tree", "mount_setattr", "move_mount", "mount", "setns"})
_LOG = logging.getLogger(__name__)


class Ranges:
    """Who has which range. The lowest free one goes first: its user namespace is likely to be there already."""

    def __init__(self, start: int = 0) -> None:
        """Begin at range number `start` (any number), so that two nodes on one machine seldom meet."""
        self._start = start
        self._base_of: dict[str, int] = {}
        self._taken: set[int] = set()

    def take(self, job_id: str) -> int:
        """Return the first id of the job's range; the same one if it has a range already.

        Raises:
            HostFull: 28664 jobs have one.
        """
        if (base := self._base_of.get(job_id)) is not None:
            return base
        for index in range(_COUNT):
            base = LOW + (self._start + index) % _COUNT * RANGE_IDS
            if base not in self._taken:
                self.hold(job_id, base)
                return base
        raise HostFull("every range of user ids is in use", hint="stop jobs")

    def hold(self, job_id: str, base: int) -> None:
        """Note that a job has this range, from before a restart; 0 is no range."""
        if base:
            self._base_of[job_id] = base
            self._taken.add(base)

    def give_back(self, job_id: str) -> None:
        """Free the job's range; none is fine. Nothing of the job may be left."""
        base = self._base_of.pop(job_id, None)
        if base is not None and base not in self._base_of.values():
            self._taken.discard(base)


class Support(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel can do here. `has_run_dir`: also for jobs with the directories of hostd's sockets."""

    is_on: bool = False
    has_run_dir: bool = False
    why: str = "not tried"

    def __str__(self) -> str:
        """Say it as `hostd status` shows it."""
        if not self.is_on:
            return f"not used: {self.why}"
        return "one for each job" if self.has_run_dir else f"one for each job without directories of run: {self.why}"


class Users:
    """The ranges of this node's jobs, as far as there is support for them."""

    def __init__(self, *, run_dir: str = "/", start: int = 0) -> None:
        self.support = Support()
        self.ranges = Ranges(start)
        self._run_dir = run_dir

    def take(self, spec: JobSpec) -> int:
        """Return where the job's ids begin on the host, 0 if they are the host's own.

        Raises:
            HostFull: no range is left.
        """
        needs_run_dir = any(os.path.realpath(mount.source).startswith(self._run_dir) for mount in spec.mounts)
        if spec.user_namespace == "host" or not self.support.is_on:
            return 0
        return 0 if needs_run_dir and not self.support.has_run_dir else self.ranges.take(spec.id)

    async def give_back(self, job_id: str) -> None:
        """Take a job's range back; none is fine."""
        self.ranges.give_back(job_id)


class Files(Protocol):
    """`hostd.runtime.files.FilesStep`, as far as a probe needs it."""

    async def trial(self, job_id: str, *, uid_base: int, bind: str) -> FilesState: ...
    async def undo(self, job_id: str) -> None: ...


async def probe(files: Files, process: ProcessStep, granted: str) -> Support:
    """Run the init of jobs in a user namespace on idmapped mounts, with the directory `granted` and then without.

    Only an answer of the kernel that says it cannot turns the namespaces off: after any other failure (a full disk)
    they count as there, and a job that then cannot have one is refused instead of run with the host's ids.
    """
    try:
        await _try(files, process, granted)
        return Support(is_on=True, has_run_dir=True, why="")
    except (ServiceError, OSError) as error:
        if not _is_refusal(error):
            _LOG.warning("whether jobs can have user namespaces is not known, they get them: %s", error)
            return Support(is_on=True, has_run_dir=True, why="")
        why = str(error)
    try:
        await _try(files, process, "")
    except (ServiceError, OSError) as error:
        return Support(is_on=not _is_refusal(error), why=str(error))
    return Support(is_on=True, why=why)


def _is_refusal(error: Exception) -> bool:
    """Tell whether the kernel, asked for a namespace or a mapped mount, said that it has none."""
    if not isinstance(error, LaunchFailed):
        return False
    number, syscall = error.detail.get("errno"), error.detail.get("syscall")
    if syscall == "clone3":  # none compiled in, or none allowed (user.max_user_namespaces)
        return number in (EINVAL, EPERM, ENOSPC, EUSERS)
    return syscall in _REFUSING and number in (EINVAL, EPERM, ENOSYS, EOPNOTSUPP)


async def _try(files: Files, process: ProcessStep, bind: str) -> None:
    with contextlib.suppress(JobNotFound):
        await process.discard(PROBE_ID)  # of a hostd that was killed in the middle
    state = await files.trial(PROBE_ID, uid_base=LOW, bind=bind)
    request = SpawnRequest(
        id=PROBE_ID,
        args=(INIT_PATH, "--version"),
        namespaces=(*JOB_NAMESPACES, "net"),
        mounts=state.plan,
        root=state.root,
        uid_base=LOW,
        capabilities=(),
        has_no_new_privs=True,
    )
    try:
        (await process.apply(request)).close()
    finally:
        await process.discard(PROBE_ID)
        await files.undo(PROBE_ID)
