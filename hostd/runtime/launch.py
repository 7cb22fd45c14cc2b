"""Launch a job: the ordered list of steps, cgroup, network, files, process, each undone if a later one fails.

Called by `jobs`. It refuses nothing itself; what a step refuses comes up as `LaunchFailed(step)`, or
unchanged when the step already says what the caller did wrong (a `ServiceError` below 500, such as `PortTaken`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hostd.runtime.process import Spawned
from hostd.types import JobSpec, Port, Resources


class NetworkState(Protocol):
    """What a job got from the network step; `numbers` are the published ports, in the spec's order."""

    @property
    def netns_name(self) -> str | None: ...
    @property
    def ip(self) -> str: ...
    @property
    def numbers(self) -> tuple[int, ...]: ...


class CgroupState(Protocol):
    """Where the job's first process enters its limits."""

    @property
    def procs(self) -> tuple[str, ...]: ...


class FilesState(Protocol):
    """How to build the job's root."""

    @property
    def plan(self) -> Sequence[Sequence[Any]]: ...


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A running job (or one that waits before exec, if the spec asks for a terminal or stdin).

    `fds` are the caller's to close. `network` is what `NetworkStep.reconcile` wants back after a restart.
    """

    job_id: str
    fds: Spawned
    network: NetworkState
    is_waiting: bool

    @property
    def pid(self) -> int:
        return self.fds.pid


class Launcher:
    """The steps of this host, in order."""

    async def launch(self, spec: JobSpec) -> Launched:
        """Take every step; a failure undoes all.

        Raises:
            LaunchFailed: a step failed; `detail["step"]` is cgroup, network, files or process.
            ServiceError: a step refused the spec (`PortTaken`, `HostFull`, `NotFound`…), unchanged.
        """
        raise NotImplementedError

    async def undo(self, job_id: str) -> None:
        """Kill what lives of the job and remove all that it had; works from the id alone, any number of times.

        Every step is undone even if another fails; the first failure is raised at the end.
        """
