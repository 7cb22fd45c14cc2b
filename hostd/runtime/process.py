"""Speak with the spawner: start it when none answers, have it run processes, hear when they end.

The spawner (`hostd/runtime/spawner.py`, where the protocol is drawn) is the parent of every job and
outlives hostd. `Spawner` is its asyncio client and `ProcessStep` the last step of a launch. Called
by `launch`, `network` (for namespaces) and the daemon (for its own plain processes).

Refuses to guess: an answer that does not come in time is `DeadlineExceeded`, a spawner that went
away is `SpawnerUnavailable` (all its jobs died with it), a child that failed before its program ran
is `LaunchFailed` with the step, the errno and the target.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from discovery.wire.errors import DeadlineExceeded, Internal, Invalid, ServiceError
from hostd.errors import JobExists, JobNotFound, LaunchFailed, SpawnerUnavailable

PROTOCOL = 1
SOCKET_NAME, PID_NAME, LOG_NAME = "spawner.sock", "spawner.pid", "spawner.log"
MESSAGE_BYTES_MAX = 16 * 1024 * 1024
FDS_MAX = 16
SCRIPT = Path(__file__).with_name("spawner.py")

Namespace = Literal["mount", "net", "uts", "ipc", "cgroup", "pid"]
JOB_NAMESPACES: tuple[Namespace, ...] = ("mount", "pid", "uts", "ipc", "cgroup")
MountStep = Sequence[Any]
"""One step of `rootfs.mounts.plan`: plain data such as `["mkdir", "/dev/pts", 0o755]`."""


class SpawnRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One process to run, isolated or plain.

    `mounts=None` is a plain process of the node: it keeps the host's files (give it no `namespaces`
    and no `netns` either, and it keeps those, too). Otherwise the steps build its root, which it is
    moved into; then `namespaces` must hold `mount`.
    `netns` names a namespace made with `create_netns`; "net" in `namespaces` makes a new one that has only `lo`.
    `capabilities` are names without `CAP_`, all others are dropped for good; `None` leaves the spawner's.
    `rlimits` are by name without `RLIMIT_` (soft and hard alike), cut to what the hard limit allows.
    `seccomp_path` is a file with compiled BPF. `has_init` runs `args` under `/dev/.hostd-init`.
    `log_path` (absolute) appends stdout and stderr there instead of to pipes, for what must never block on hostd.
    `waits` holds the program back, all set up, until `Spawner.start`.
    """

    id: str
    args: tuple[str, ...]
    env: dict[str, str] = {}
    working_dir: str = "/"
    uid: int = 0
    gid: int = 0
    hostname: str = ""
    netns: str = ""
    namespaces: tuple[Namespace, ...] = ()
    mounts: Sequence[MountStep] | None = None
    cgroup_procs: tuple[str, ...] = ()
    rlimits: dict[str, int] = {}
    capabilities: tuple[str, ...] | None = None
    seccomp_path: str = ""
    has_no_new_privs: bool = False
    has_init: bool = False
    has_tty: bool = False
    rows: int = 24
    columns: int = 80
    has_stdin: bool = False
    log_path: str = ""
    waits: bool = False


class Netns(NamedTuple):
    """A network namespace made by the spawner, which keeps it until `drop_netns`.

    Both fds are the caller's to close: the namespace itself, and a NETLINK_ROUTE datagram socket opened inside.
    """

    netns_fd: int
    netlink_fd: int


class Spawned(NamedTuple):
    """A started process and its ends of the pipes; -1 = there is none. The fds are the caller's to close.

    With a terminal there is only `pty_fd` (its master), which is input as well as output.
    """

    pid: int
    stdout_fd: int = -1
    stderr_fd: int = -1
    stdin_fd: int = -1
    pty_fd: int = -1

    def close(self) -> None:
        """Close every fd that is there."""
        for fd in self[1:]:
            if fd >= 0:
                os.close(fd)


class Exited(msgspec.Struct, frozen=True, kw_only=True):
    """A process ended, at `at` seconds since the epoch. `status` is its exit code, 128+N for signal N."""

    id: str
    pid: int
    status: int
    at: float


class Child(msgspec.Struct, frozen=True, kw_only=True):
    """A process that the spawner holds. `exited` ones stay until `ack`, with their unread output.

    `waiting` ones are set up and held back until `start`. `started_at` is in seconds since the epoch.
    """

    id: str
    pid: int
    state: Literal["starting", "waiting", "running", "exited"]
    started_at: float
    status: int | None = None
    ended_at: float = 0
    netns: str = ""


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """All that the spawner holds: processes, and the names of the network namespaces."""

    children: tuple[Child, ...]
    netns: tuple[str, ...]


class Spawner:
    """The asyncio client of one spawner. Any number of calls may be under way at once."""

    def __init__(self, connection: socket.socket) -> None:
        """Take a connected, non-blocking socket; `open` is the usual way."""

    @classmethod
    async def open(
        cls, run_dir: Path, *, may_start: bool = True, python: str = sys.executable, timeout_s: float = 15.0
    ) -> Spawner:
        """Connect to the spawner of `run_dir`, starting one if none answers and `may_start`.

        Raises:
            SpawnerUnavailable: none answers and none could be started; the message says why.
        """
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The spawner's own process id."""
        raise NotImplementedError

    @property
    def is_connected(self) -> bool:
        """Whether the spawner is still there."""
        raise NotImplementedError

    async def close(self) -> None:
        """Leave the spawner alone with its jobs; calls under way raise `SpawnerUnavailable`."""

    async def create_netns(self, name: str) -> Netns:
        """Make a network namespace that lives until `drop_netns`.

        Raises:
            JobExists: the spawner holds one of that name already.
        """
        raise NotImplementedError

    async def open_netns(self, name: str) -> Netns:
        """Return fresh fds of a namespace that the spawner holds (after a restart of hostd).

        Raises:
            JobNotFound: it holds none of that name.
        """
        raise NotImplementedError

    async def drop_netns(self, name: str) -> None:
        """Forget a namespace; the kernel frees it once no process is inside. An unknown name is fine."""

    async def spawn(self, request: SpawnRequest, *, timeout_s: float = 30.0) -> Spawned:
        """Run a process; returns once its program is running (or, with `waits`, about to).

        Raises:
            LaunchFailed: it failed before that; `detail` has `step`, `errno`, `target`. Nothing is left to `ack`.
            JobExists: the spawner holds a process of that id (also an ended one that nobody has acked).
        """
        raise NotImplementedError

    async def start(self, job_id: str) -> None:
        """Release a process that waits; returns once its program is running. A running one is fine.

        Raises:
            JobNotFound: the spawner holds none of that id.
            LaunchFailed: its program could not be executed; it ends with status 127, as `exits` tells.
        """

    async def signal(self, job_id: str, number: int) -> None:
        """Send a signal to the process alone (a job's init passes it on to the program). An ended one is fine.

        Raises:
            JobNotFound: the spawner holds none of that id.
        """

    async def kill(self, job_id: str, *, timeout_s: float = 30.0) -> Exited:
        """SIGKILL the process (with a pid namespace: everything in it) and return when it is dead.

        Raises:
            JobNotFound: the spawner holds none of that id.
        """
        raise NotImplementedError

    async def close_stdin(self, job_id: str) -> None:
        """Drop the spawner's own copy of the write end, so that closing yours ends the job's stdin. Unknown is fine."""

    async def take(self, job_id: str) -> Spawned:
        """Return fresh fds of a process that the spawner holds, living or ended.

        Raises:
            JobNotFound: the spawner holds none of that id.
        """
        raise NotImplementedError

    async def ack(self, job_id: str) -> None:
        """Forget an ended process: its status and output are safe with you. An unknown id is fine.

        Raises:
            Conflict: it has not ended.
        """

    async def listing(self) -> Listing:
        """Return all that the spawner holds."""
        raise NotImplementedError

    async def exits(self) -> AsyncIterator[Exited]:
        """Yield every end of a process: first those that nobody has acked yet, then each as it happens, once.

        Raises:
            SpawnerUnavailable: the connection is gone (the iterator never ends otherwise).
        """
        raise NotImplementedError
        yield

    async def quit(self, *, kill_all: bool = False) -> None:
        """End the spawner, after SIGKILL to all its processes if `kill_all`.

        Raises:
            Conflict: processes live and `kill_all` is not set.
        """
