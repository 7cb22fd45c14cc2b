"""Launch step one: put a limit on a job, on cgroup v1 or v2, whichever the machine has.

Touches nothing outside `<mount>/<parent>`. Controllers that the machine lacks are skipped and named in
`missing`. Called by `hostd.runtime.launch` (apply, undo) and `hostd.daemon` (kill, usage, oom_count, teardown).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from hostd.types import Resources


class CgroupState(msgspec.Struct, frozen=True, kw_only=True):
    """`procs` are the cgroup.procs files into which the job's first process writes `0` before anything else."""

    procs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a job uses now; 0 where the machine cannot say."""

    memory_bytes: int
    cpu_s: float
    pids: int


class CgroupStep(Protocol):
    """The limits of this node's jobs; `open_cgroups` chooses the version."""

    version: int
    missing: tuple[str, ...]

    async def apply(self, job_id: str, resources: Resources) -> CgroupState:
        """Make the job's cgroups with their limits set.

        Raises:
            KernelError
        """

    async def undo(self, job_id: str) -> None:
        """Kill what is left inside and remove the job's cgroups; may be called twice, or without apply."""

    async def kill(self, job_id: str, timeout_s: float = 5.0) -> None:
        """Kill every process of the job and return when none is left.

        Raises:
            KernelError: (ETIMEDOUT) some did not die in time.
        """

    def pids(self, job_id: str) -> tuple[int, ...]:
        """Return the job's processes, as the host numbers them."""

    def oom_count(self, job_id: str) -> int:
        """Return how many of the job's processes were killed for its memory limit."""

    def usage(self, job_id: str) -> Usage:
        """Return what the job uses now."""

    def list(self) -> tuple[str, ...]:
        """Return the ids of all jobs that have a cgroup."""

    async def teardown(self) -> None:
        """Kill all jobs that are left and remove `<parent>` itself."""


def open_cgroups(parent: str) -> CgroupStep:
    """Choose v2 when it carries the memory and pids controllers, else v1.

    Raises:
        KernelError: neither is mounted.
    """
    raise NotImplementedError
