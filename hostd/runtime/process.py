"""Speak with the spawner: start it when none answers, have it run processes, hear when they end.

The spawner (`hostd/runtime/spawner.py`, where the protocol is drawn) is the parent of every job and
outlives hostd. `Spawner` is its asyncio client and `ProcessStep` the last step of a launch. Called
by `launch`, `network` (for namespaces) and the daemon (for its own plain processes).

Refuses to guess: an answer that does not come in time is `DeadlineExceeded`, a spawner that went
away is `SpawnerUnavailable` (all its jobs died with it), a child that failed before its program ran
is `LaunchFailed` with the step, the errno and the target.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import os
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from discovery.wire.errors import Conflict, DeadlineExceeded, Internal, Invalid, ServiceError
from hostd.errors import JobExists, JobNotFound, LaunchFailed, SpawnerUnavailable

PROTOCOL = 1
SOCKET_NAME = "spawner.sock"
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
    moved into; then `namespaces` must hold `mount`. `root` is the directory of the host that they are
    mounted on until then (in the job's own mount namespace only; "" = one of the spawner's).
    `netns` names a namespace made with `create_netns`; "net" in `namespaces` makes a new one that has only `lo`.
    `capabilities` are names without `CAP_`, all others are dropped for good; `None` leaves the spawner's.
    `rlimits` are by name without `RLIMIT_` (soft and hard alike), cut to what the hard limit allows.
    `seccomp_path` is a file with compiled BPF. `has_init` runs `args` under `/dev/.hostd-init`.
    `log_path` (absolute) appends stdout and stderr there instead of to pipes, for what must never block on hostd.
    With `uid_base` (a multiple of 65536) ids 0 to 65535 of the process are the host's from there on; wants `mounts`.
    `waits` holds the program back, all set up, until `Spawner.start`.
    """

    id: str
    args: tuple[str, ...]
    env: dict[str, str] = {}
    working_dir: str = "/"
    uid: int = 0
    gid: int = 0
    uid_base: int = 0
    hostname: str = ""
    netns: str = ""
    namespaces: tuple[Namespace, ...] = ()
    mounts: Sequence[MountStep] | None = None
    root: str = ""
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


class ExecRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One more process inside a living job: in all its namespaces and its root, under the protections given here.

    `job_id` is the job's process, `id` the new one's own. `cgroup_procs`, `capabilities`, `seccomp_path` and
    `rlimits` mean what they do in `SpawnRequest`; give it the job's. It dies with the job's pid namespace.
    """

    id: str
    job_id: str
    args: tuple[str, ...]
    env: dict[str, str] = {}
    working_dir: str = "/"
    uid: int = 0
    gid: int = 0
    cgroup_procs: tuple[str, ...] = ()
    rlimits: dict[str, int] = {}
    capabilities: tuple[str, ...] | None = None
    seccomp_path: str = ""
    has_no_new_privs: bool = True
    has_tty: bool = False
    rows: int = 24
    columns: int = 80
    has_stdin: bool = False
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
    `job_id` is the job that one made by `Spawner.exec` runs in, "" for the others.
    """

    id: str
    pid: int
    state: Literal["starting", "waiting", "running", "exited"]
    started_at: float
    status: int | None = None
    ended_at: float = 0
    netns: str = ""
    job_id: str = ""
    uid_base: int = 0


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """All that the spawner holds: processes, and the names of the network namespaces."""

    children: tuple[Child, ...]
    netns: tuple[str, ...]


class _Answer(msgspec.Struct):
    """Any message of the spawner: an answer has `n`, an event `event`. What an op answers is read from `raw`."""

    n: int | None = None
    event: str = ""
    fds: int = 0
    error: dict[str, Any] | None = None


class _Streams(msgspec.Struct):
    pid: int
    streams: tuple[str, ...]


class _Exits(msgspec.Struct):
    exits: tuple[Exited, ...]


class _Hello(msgspec.Struct):
    protocol: int
    pid: int


T = TypeVar("T")
_Raw = tuple[bytes, list[int]]


class Spawner:
    """The asyncio client of one spawner. Any number of calls may be under way at once."""

    def __init__(self, connection: socket.socket) -> None:
        """Take a connected socket; `open` is the usual way."""
        connection.setblocking(False)
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[_Raw]] = {}
        self._watchers: set[asyncio.Queue[Exited | None]] = set()
        self._ended: set[str] = set()
        self._in = bytearray()
        self._fds: deque[int] = deque()
        self._out = bytearray()
        self._is_connected = True
        self._pid = 0
        self._loop.add_reader(connection.fileno(), self._on_readable)

    @classmethod
    async def open(
        cls, run_dir: Path, *, may_start: bool = True, python: str = sys.executable, timeout_s: float = 15.0
    ) -> Spawner:
        """Connect to the spawner of `run_dir`, starting one if none answers and `may_start`.

        Raises:
            SpawnerUnavailable: none answers and none could be started; the message says why.
        """
        connection = _connect(run_dir)
        failure = SpawnerUnavailable(f"no spawner answers in {run_dir}")
        if connection is None and may_start:
            try:
                await _start(run_dir, python, timeout_s)
            except SpawnerUnavailable as error:
                failure = error  # perhaps because somebody else has just started one: see if it answers
            connection = _connect(run_dir)
        if connection is None:
            raise failure
        self = cls(connection)
        try:
            hello = await self._call(_Hello, "hello", timeout_s=timeout_s, protocol=PROTOCOL)
            if hello.protocol != PROTOCOL:
                raise SpawnerUnavailable(
                    f"the spawner {hello.pid} speaks protocol {hello.protocol}, we speak {PROTOCOL}",
                    hint="it is of another version: stop the node's jobs and start it again (hostd down; hostd up)",
                )
        except BaseException:
            await self.close()
            raise
        self._pid = hello.pid
        return self

    @property
    def pid(self) -> int:
        """The spawner's own process id."""
        return self._pid

    @property
    def is_connected(self) -> bool:
        """Whether the spawner is still there."""
        return self._is_connected

    async def close(self) -> None:
        """Leave the spawner alone with its jobs; calls under way raise `SpawnerUnavailable`."""
        self._disconnect()

    async def create_netns(self, name: str) -> Netns:
        """Make a network namespace that lives until `drop_netns`.

        Raises:
            JobExists: the spawner holds one of that name already.
        """
        _, fds = await self._exchange("create_netns", name=name)
        return Netns(*fds)

    async def open_netns(self, name: str) -> Netns:
        """Return fresh fds of a namespace that the spawner holds (after a restart of hostd).

        Raises:
            JobNotFound: it holds none of that name.
        """
        _, fds = await self._exchange("open_netns", name=name)
        return Netns(*fds)

    async def drop_netns(self, name: str) -> None:
        """Forget a namespace; the kernel frees it once no process is inside. An unknown name is fine."""
        await self._exchange("drop_netns", name=name)

    async def spawn(self, request: SpawnRequest, *, timeout_s: float = 30.0) -> Spawned:
        """Run a process; returns once its program is running (or, with `waits`, about to).

        Raises:
            LaunchFailed: it failed before that; `detail` has `step`, `errno`, `target`. Nothing is left to `ack`.
            JobExists: the spawner holds a process of that id (also an ended one that nobody has acked).
        """
        return _spawned(await self._exchange("spawn", timeout_s=timeout_s, request=request))

    async def exec(self, request: ExecRequest, *, timeout_s: float = 30.0) -> Spawned:
        """Run a process inside a living job; its end is told like any other's, and wants its `ack`.

        Raises:
            JobNotFound: the spawner holds no process `job_id`.
            Conflict: the job has ended, or its own program does not run yet.
            LaunchFailed: as `spawn`.
            JobExists: as `spawn`.
        """
        return _spawned(await self._exchange("exec", timeout_s=timeout_s, request=request))

    async def start(self, job_id: str) -> None:
        """Release a process that waits; returns once its program is running. A running one is fine.

        Raises:
            JobNotFound: the spawner holds none of that id.
            LaunchFailed: its program could not be executed; it ends with status 127, as `exits` tells.
        """
        await self._exchange("start", id=job_id)

    async def signal(self, job_id: str, number: int) -> None:
        """Send a signal to the process alone (a job's init passes it on to the program). An ended one is fine.

        Raises:
            JobNotFound: the spawner holds none of that id.
        """
        await self._exchange("signal", id=job_id, number=number)

    async def kill(self, job_id: str, *, timeout_s: float = 30.0) -> Exited:
        """SIGKILL the process (with a pid namespace: everything in it) and return when it is dead.

        Raises:
            JobNotFound: the spawner holds none of that id.
        """
        return await self._call(Exited, "kill", timeout_s=timeout_s, id=job_id)

    async def close_stdin(self, job_id: str) -> None:
        """Drop the spawner's own copy of the write end, so that closing yours ends the job's stdin. Unknown is fine."""
        await self._exchange("close_stdin", id=job_id)

    async def take(self, job_id: str) -> Spawned:
        """Return fresh fds of a process that the spawner holds, living or ended.

        Raises:
            JobNotFound: the spawner holds none of that id.
        """
        return _spawned(await self._exchange("take", id=job_id))

    def has_ended(self, job_id: str) -> bool:
        """Tell whether the spawner has said that this process ended, and still holds it (False: it may have)."""
        return job_id in self._ended

    async def ack(self, job_id: str) -> None:
        """Forget an ended process: its status and output are safe with you. An unknown id is fine.

        Raises:
            Conflict: it has not ended.
        """
        self._ended.discard(job_id)  # first: from here on the id may belong to another process
        await self._exchange("ack", id=job_id)

    async def listing(self) -> Listing:
        """Return all that the spawner holds."""
        return await self._call(Listing, "list")

    async def exits(self) -> AsyncIterator[Exited]:
        """Yield every end of a process: first those that nobody has acked yet, then each as it happens, once.

        Raises:
            SpawnerUnavailable: the connection is gone (the iterator never ends otherwise).
        """
        queue: asyncio.Queue[Exited | None] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            early = (await self._call(_Exits, "watch")).exits
            seen = {(exited.id, exited.pid) for exited in early}
            for exited in early:
                yield exited
            while (next_one := await queue.get()) is not None:
                if (next_one.id, next_one.pid) not in seen:  # a second watcher hears events before its own answer
                    yield next_one
        finally:
            self._watchers.discard(queue)
        raise SpawnerUnavailable("the spawner is gone, and its jobs with it")

    async def quit(self, *, kill_all: bool = False) -> None:
        """End the spawner, after SIGKILL to all its processes if `kill_all`.

        Raises:
            Conflict: processes live and `kill_all` is not set.
        """
        await self._exchange("quit", kill_all=kill_all)
        self._disconnect()

    async def list(self) -> Listing:
        """Do as `listing`, under the name that `network.NamespaceSource` asks for."""
        return await self.listing()

    async def _call(self, into: type[T], op: str, *, timeout_s: float = 30.0, **fields: Any) -> T:
        raw, _ = await self._exchange(op, timeout_s=timeout_s, **fields)
        return msgspec.json.decode(raw, type=into)

    async def _exchange(self, op: str, *, timeout_s: float = 30.0, **fields: Any) -> _Raw:
        """Send one request and wait for its answer, whose fds are the caller's."""
        if not self._is_connected:
            raise SpawnerUnavailable("the spawner is gone")
        number = next(self._numbers)
        body = msgspec.json.encode({"n": number, "op": op, **fields})
        future: asyncio.Future[_Raw] = self._loop.create_future()
        self._calls[number] = future
        self._send(len(body).to_bytes(4, "big") + body)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except BaseException as error:
            if future.done() and not future.cancelled() and future.exception() is None:
                _close_all(future.result()[1])  # the answer came, and nobody takes it
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(f"the spawner did not answer {op} within {timeout_s:g} s") from None
            raise
        finally:
            self._calls.pop(number, None)

    def _send(self, data: bytes) -> None:
        if self._out:
            self._out += data
            return
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._disconnect()
            return
        if sent < len(data):
            self._out += data[sent:]
            self._loop.add_writer(self._socket.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        try:
            sent = self._socket.send(self._out)
        except BlockingIOError:
            return
        except OSError:
            self._disconnect()
            return
        del self._out[:sent]
        if not self._out:
            self._loop.remove_writer(self._socket.fileno())

    def _on_readable(self) -> None:
        try:
            data, rights, _, _ = self._socket.recvmsg(1 << 18, socket.CMSG_SPACE(FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, rights = b"", []
        for level, kind, payload in rights:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds.extend(array.array("i", payload[: len(payload) // 4 * 4]))
        if not data:
            self._disconnect()
            return
        self._in += data
        while len(self._in) >= 4:
            end = 4 + int.from_bytes(self._in[:4], "big")
            if len(self._in) < end:
                return
            body = bytes(self._in[4:end])
            del self._in[:end]
            self._on_message(body)

    def _on_message(self, body: bytes) -> None:
        answer = msgspec.json.decode(body, type=_Answer)
        fds = [self._fds.popleft() for _ in range(answer.fds)]
        if answer.event == "exited":
            exited = msgspec.json.decode(body, type=Exited)
            self._ended.add(exited.id)
            for queue in self._watchers:
                queue.put_nowait(exited)
            return
        future = self._calls.get(answer.n or 0)
        if future is None or future.done():  # nobody waits for it any more
            _close_all(fds)
        elif answer.error is not None:
            future.set_exception(_refusal(answer.error))
        else:
            future.set_result((body, fds))

    def _disconnect(self) -> None:
        if not self._is_connected:
            return
        self._is_connected = False
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        _close_all(self._fds)
        self._fds.clear()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(SpawnerUnavailable("the spawner is gone"))
        for queue in self._watchers:
            queue.put_nowait(None)


class ProcessStep:
    """The last step of a launch: have the spawner run it; undone by killing it."""

    def __init__(self, spawner: Spawner) -> None:
        self.spawner = spawner

    async def apply(self, request: SpawnRequest) -> Spawned:
        """Run it; see `Spawner.spawn`."""
        return await self.spawner.spawn(request)

    async def undo(self, job_id: str) -> None:
        """Kill what lives of it; may be called twice, or without `apply`.

        How it ended stays with the spawner until `Spawner.ack`, for the record has to be written first.
        """
        if self.spawner.has_ended(job_id):  # the usual way: no need to ask
            return
        with contextlib.suppress(JobNotFound):
            await self.spawner.kill(job_id)

    async def discard(self, job_id: str) -> None:
        """Undo, and forget how it ended: nobody was told that it ran."""
        await self.undo(job_id)
        await self.spawner.ack(job_id)


def _spawned(raw: _Raw) -> Spawned:
    body, fds = raw
    answer = msgspec.json.decode(body, type=_Streams)
    return Spawned(answer.pid, **{f"{name}_fd": fd for name, fd in zip(answer.streams, fds, strict=True)})


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _refusal(error: dict[str, Any]) -> ServiceError:
    """Turn the spawner's error into ours."""
    code, message = error.pop("code", ""), error.pop("message", "")
    if code == "step":
        return LaunchFailed(message, **error)
    if code == "kernel":
        return LaunchFailed(f"the spawner: {message}", step="spawner", **error)
    families = {"not_found": JobNotFound, "exists": JobExists, "conflict": Conflict, "invalid": Invalid}
    return families.get(code, Internal)(message, **error)


def _connect(run_dir: Path) -> socket.socket | None:
    """Connect, or return None if nobody listens. A unix socket connects at once or not at all."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(run_dir / SOCKET_NAME))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise SpawnerUnavailable(f"{run_dir / SOCKET_NAME}: {error.strerror}") from error
    return connection


async def _start(run_dir: Path, python: str, timeout_s: float) -> None:
    """Start a spawner that outlives us: it leaves our session, and its starter ends once its socket answers."""
    starter = await asyncio.create_subprocess_exec(
        python,
        "-SIE",
        str(SCRIPT),
        "--run-dir",
        str(run_dir),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        cwd="/",
        env={"PATH": os.defpath},
    )
    try:
        async with asyncio.timeout(timeout_s):
            _, complaint = await starter.communicate()
    except TimeoutError:
        starter.kill()
        await starter.wait()
        raise SpawnerUnavailable(f"the spawner did not start within {timeout_s:g} s") from None
    if starter.returncode != 0:
        raise SpawnerUnavailable(f"the spawner did not start: {complaint.decode(errors='replace').strip()[-500:]}")
