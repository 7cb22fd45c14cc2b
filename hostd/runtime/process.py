"""Speak with the spawner: start it when none answers, have it run processes, hear when they end.

The spawner (`hostd/runtime/spawner.py`, where the protocol is drawn) is the parent of every job and
outlives hostd. `Spawner` is its asyncio client and `ProcessStep` the last step of a launch. Called
by `launch`, `network` (for namespaces) and the daemon (for its own plain processes).

Jobs outlive the spawner: when it dies, `exits` says so, and `reopen` starts another and tells it of every
process that lives. Calls that may be made twice wait for that, the others (`spawn`, `create_netns`) fail.

Refuses to guess: an answer that does not come in time is `DeadlineExceeded`, a spawner that went
away is `SpawnerUnavailable`, a child that failed before its program ran is `LaunchFailed` with the
step, the errno and the target; how a process ended that nobody could see is `None`.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from discovery.wire import clock
from discovery.wire.errors import Conflict, DeadlineExceeded, Internal, Invalid, ServiceError
from hostd.errors import JobExists, JobNotFound, LaunchFailed, SpawnerUnavailable
from hostd.runtime import adoption
from hostd.runtime.adoption import Adoption, Living
from hostd.runtime.connection import READ_BYTES, close_fds

PROTOCOL = 3
_OUTLIVED_SINCE = 2
"""Jobs of a spawner with an older protocol die with it."""
NO_RSEQ = "glibc.pthread.rseq=0"  # see `seed`
SOCKET_NAME = "spawner.sock"
FDS_MAX = 16
SCRIPT = Path(__file__).with_name("spawner.py")

Namespace = Literal["mount", "net", "uts", "ipc", "cgroup", "pid"]
JOB_NAMESPACES: tuple[Namespace, ...] = ("mount", "pid", "uts", "ipc", "cgroup")
MountStep = Sequence[Any]
"""One step of `rootfs.mounts.plan`: plain data such as `["mkdir", "/dev/pts", 0o755]`."""


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """What any process to run is told.

    `capabilities` are names without `CAP_`, all others are dropped for good; `None` leaves the spawner's.
    `rlimits` are by name without `RLIMIT_` (soft and hard alike), cut to what the hard limit allows.
    `seccomp_path` is a file with compiled BPF. `waits` holds the program back, all set up, until `Spawner.start`.
    """

    id: str
    args: tuple[str, ...]
    env: dict[str, str] = {}
    working_dir: str = "/"
    uid: int = 0
    gid: int = 0
    cgroup_procs: tuple[str, ...] = ()
    rlimits: dict[str, int] = {}
    capabilities: tuple[str, ...] | None = None
    seccomp_path: str = ""
    has_no_new_privs: bool = False
    has_tty: bool = False
    rows: int = 24
    columns: int = 80
    has_stdin: bool = False
    waits: bool = False


class SpawnRequest(_Request, frozen=True, kw_only=True):
    """One process to run, isolated or plain.

    `mounts=None` is a plain process of the node: it keeps the host's files (give it no `namespaces`
    and no `netns` either, and it keeps those, too). Otherwise the steps build its root, which it is
    moved into; then `namespaces` must hold `mount`. `root` is the directory of the host that they are
    mounted on until then (in the job's own mount namespace only; "" = one of the spawner's).
    `netns` names a namespace made with `create_netns`; "net" in `namespaces` makes a new one that has only `lo`.
    `has_init` runs `args` under `/dev/.hostd-init`.
    `log_path` (absolute) appends stdout and stderr there instead of to pipes, for what must never block on hostd.
    With `uid_base` (a multiple of 65536) ids 0 to 65535 of the process are the host's from there on; wants `mounts`.
    `note_path` is a file of the host that a byte is added to right before the program is executed.
    """

    uid_base: int = 0
    hostname: str = ""
    netns: str = ""
    namespaces: tuple[Namespace, ...] = ()
    mounts: Sequence[MountStep] | None = None
    root: str = ""
    has_init: bool = False
    log_path: str = ""
    note_path: str = ""


class ExecRequest(_Request, frozen=True, kw_only=True):
    """One more process inside a living job: in all its namespaces and its root, under the protections given here.

    `job_id` is the job's process, `id` the new one's own; give it the job's `cgroup_procs`, `capabilities`,
    `seccomp_path` and `rlimits`. It dies with the job's pid namespace.
    """

    job_id: str
    has_no_new_privs: bool = True


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

    def by_name(self) -> dict[str, int]:
        """Return the fds that are there by the names that the spawner has for them."""
        named = {"stdout": self.stdout_fd, "stderr": self.stderr_fd, "stdin": self.stdin_fd, "pty": self.pty_fd}
        return {name: fd for name, fd in named.items() if fd >= 0}

    def close(self) -> None:
        """Close every fd that is there."""
        for fd in self[1:]:
            if fd >= 0:
                os.close(fd)


class Exited(msgspec.Struct, frozen=True, kw_only=True):
    """A process ended, at `at` seconds since the epoch. `status` is its exit code, 128+N for signal N, None unknown."""

    id: str
    pid: int
    status: int | None
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


class Belongings(NamedTuple):
    """What a new spawner has to know of a process besides its pid; `streams` are our ends, by name, and stay ours."""

    netns: str = ""
    uid_base: int = 0
    started_at: float = 0
    streams: Mapping[str, int] = {}


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
    children: str = "not told"  # a spawner of a hostd before this one


class _Held(NamedTuple):
    """A process that we have started or taken: held fast if it lives, and the job that it is an extra process of."""

    living: Living | None
    job_id: str = ""


T = TypeVar("T")
_Raw = tuple[bytes, list[int]]
_ONCE = frozenset({"spawn", "exec", "create_netns", "quit"})
"""What must not be asked of a second spawner when the first may have done it."""


class Spawner:
    """The asyncio client of one spawner. Any number of calls may be under way at once."""

    def __init__(self, connection: socket.socket) -> None:
        """Take a connected socket; `open` is the usual way."""
        connection.setblocking(False)
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[_Raw]] = {}
        self._held: dict[str, _Held] = {}
        self._watchers: set[asyncio.Queue[Exited | None]] = set()
        self._ended: set[str] = set()
        self._in = bytearray()
        self._fds: deque[int] = deque()
        self._out: deque[tuple[bytes, list[int]]] = deque()
        self._is_connected = True
        self._is_closed = False
        self._pid = 0
        self._kind_of_children = ""
        self._start_again: Callable[[], Awaitable[socket.socket]] | None = None
        self._run_dir: Path | None = None
        self._is_back = asyncio.Event()
        self._is_back.set()
        self.has_keeper = False
        """Somebody calls `reopen` when the spawner has died, so what can wait for that does."""
        self._loop.add_reader(connection.fileno(), self._on_readable)

    @classmethod
    async def open(
        cls,
        run_dir: Path,
        *,
        may_start: bool = True,
        may_have_seed: bool = True,
        python: str = sys.executable,
        timeout_s: float = 15.0,
    ) -> Spawner:
        """Connect to the spawner of `run_dir`, starting one if none answers and `may_start`.

        One of another version hands everything over to a new one of ours, and is ended.
        `may_have_seed` is for tests: without, its children come to be as on a machine that `seed` does not know.

        Raises:
            SpawnerUnavailable: none answers and none could be started; the message says why.
        """
        options = [] if may_have_seed else ["--without-seed"]

        async def reach() -> socket.socket:
            return await _reach(run_dir, python, timeout_s, options) if may_start else _connect_to(run_dir)

        self = cls(await reach())
        self._run_dir, self._start_again = run_dir, reach
        try:
            protocol = await self._greet(timeout_s)
            if may_start and protocol != PROTOCOL and protocol >= _OUTLIVED_SINCE:
                await self._replace()
                protocol = await self._greet(timeout_s)
            if protocol != PROTOCOL:
                raise SpawnerUnavailable(
                    f"the spawner {self.pid} speaks protocol {protocol}, we speak {PROTOCOL}",
                    hint="it is of another version: stop the node's jobs and start it again (hostd down; hostd up)",
                )
        except BaseException:
            await self.close()
            raise
        return self

    async def _greet(self, timeout_s: float = 15.0) -> int:
        """Say hello and return the protocol; a spawner that is just dying may have let us in."""
        for is_last in (False, False, True):
            try:
                hello = await self._call(_Hello, "hello", timeout_s=timeout_s, is_urgent=True, protocol=PROTOCOL)
            except SpawnerUnavailable:
                if is_last or self._start_again is None:
                    raise
                self._attach(await self._start_again())
            else:
                break
        self._pid, self._kind_of_children = hello.pid, hello.children
        return hello.protocol

    async def _replace(self) -> None:
        """End a spawner of another version and have a new one go on with all that it held."""
        assert self._start_again is not None
        assert self._run_dir is not None
        children = [child for child in (await self.listing()).children if child.state in ("running", "exited")]
        with contextlib.ExitStack() as stack:
            held = []
            for child in children:
                fds = await self.take(child.id)
                stack.callback(fds.close)
                held.append((child, fds))
            os.kill(self._pid, signal.SIGKILL)
            self._disconnect()
            adoption.kill_stragglers(self._run_dir)
            self._attach(await self._start_again())
            await self._greet()
            for child, fds in held:
                await self._adopt_child(child, fds)

    async def reopen(self, belongings_of: Callable[[str], Belongings | None]) -> None:
        """Go on with a new spawner after ours has died, and tell it of all that lives; then calls that wait go on.

        A process whose belongings are `None` is left out.

        Raises:
            SpawnerUnavailable: none could be started; may be called again.
        """
        assert self._start_again is not None
        self._attach(await self._start_again())
        try:
            if (protocol := await self._greet()) != PROTOCOL:
                raise SpawnerUnavailable(f"a spawner of protocol {protocol} has come in between")
            known = {child.id for child in (await self._call(Listing, "list", is_urgent=True)).children}
            for job_id in [job_id for job_id in self._held if job_id not in known and job_id not in self._ended]:
                if (belongings := belongings_of(job_id)) is None:
                    self._let_go(job_id)
                else:
                    await self._adopt_held(job_id, belongings)
        except BaseException:
            self._disconnect()
            raise
        self._is_back.set()

    async def _adopt_held(self, job_id: str, belongings: Belongings) -> None:
        living, extra_of = self._held[job_id]
        streams = dict(belongings.streams) if living is None else {"pidfd": living.pidfd, **belongings.streams}
        told = Adoption(
            id=job_id,
            pid=0 if living is None else living.pid,
            streams=tuple(streams),
            job_id=extra_of,
            netns=belongings.netns,
            uid_base=belongings.uid_base,
            started_at=belongings.started_at,
            ended_at=clock.now_s() if living is None else 0,
        )
        await self._exchange("adopt", fds=list(streams.values()), is_urgent=True, process=told)

    async def adopt(self, living: Living | None, job_id: str, belongings: Belongings) -> None:
        """Tell the spawner of a process that another one started; `living` is ours from here on, without it has ended.

        Raises:
            JobExists: it holds one of that id.
        """
        await self._is_back.wait()
        self._let_go(job_id)
        self._held[job_id] = _Held(living)
        await self._adopt_held(job_id, belongings)

    async def _adopt_child(self, child: Child, fds: Spawned) -> None:
        """Tell the spawner what another one knew."""
        if child.state == "exited":
            streams = fds.by_name()
            told = Adoption(
                id=child.id,
                pid=child.pid,
                streams=tuple(streams),
                job_id=child.job_id,
                netns=child.netns,
                uid_base=child.uid_base,
                started_at=child.started_at,
                status=child.status,
                ended_at=child.ended_at,
            )
            await self._exchange("adopt", fds=list(streams.values()), process=told)
        else:
            self._held[child.id] = _Held(adoption.hold(child.pid), child.job_id)
            await self._adopt_held(child.id, Belongings(child.netns, child.uid_base, child.started_at, fds.by_name()))

    @property
    def pid(self) -> int:
        """The spawner's own process id."""
        return self._pid

    @property
    def kind_of_children(self) -> str:
        """How the processes it starts come to be, for the operator: copies of a seed, or why not."""
        return self._kind_of_children

    @property
    def is_connected(self) -> bool:
        """Whether the spawner is still there."""
        return self._is_connected

    async def close(self) -> None:
        """Leave the spawner alone with its jobs; calls under way raise `SpawnerUnavailable`."""
        self._is_closed = True
        self._disconnect()
        self._is_back.set()
        for job_id in list(self._held):
            self._let_go(job_id)

    async def create_netns(self, name: str, uid_base: int = 0) -> Netns:
        """Make a network namespace that lives until `drop_netns`.

        The user namespace of `uid_base` owns it, so its root can change it (0 = the host's).

        Raises:
            JobExists: the spawner holds one of that name already.
        """
        _, fds = await self._exchange("create_netns", name=name, uid_base=uid_base)
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
        return self._held_fast(request.id, await self._exchange("spawn", timeout_s=timeout_s, request=request))

    async def exec(self, request: ExecRequest, *, timeout_s: float = 30.0) -> Spawned:
        """Run a process inside a living job; its end is told like any other's, and wants its `ack`.

        Raises:
            JobNotFound: the spawner holds no process `job_id`.
            Conflict: the job has ended, or its own program does not run yet.
            LaunchFailed: as `spawn`.
            JobExists: as `spawn`.
        """
        raw = await self._exchange("exec", timeout_s=timeout_s, request=request)
        return self._held_fast(request.id, raw, request.job_id)

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
        return self._held_fast(job_id, await self._exchange("take", id=job_id))

    def _held_fast(self, job_id: str, raw: _Raw, extra_of: str = "") -> Spawned:
        """Hold a process by a pidfd of our own: with it the kernel tells how it ended, whoever its parent is then."""
        spawned = _spawned(raw)
        if job_id not in self._held:
            self._held[job_id] = _Held(adoption.hold(spawned.pid), extra_of)
        return spawned

    def _let_go(self, job_id: str) -> None:
        held = self._held.pop(job_id, None)
        if held is not None and held.living is not None:
            os.close(held.living.pidfd)

    def is_alive(self, job_id: str) -> bool:
        """Tell whether a process lives that this client has started or taken, without asking the spawner."""
        held = self._held.get(job_id)
        return held is not None and held.living is not None and not held.living.is_over

    def has_ended(self, job_id: str) -> bool:
        """Tell whether the spawner has said that this process ended, and still holds it (False: it may have)."""
        return job_id in self._ended

    async def ack(self, job_id: str) -> None:
        """Forget an ended process: its status and output are safe with you. An unknown id is fine.

        Raises:
            Conflict: it has not ended.
        """
        self._ended.discard(job_id)  # first: from here on the id may belong to another process
        self._let_go(job_id)
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
            self._ended |= {exited.id for exited in early}
            for exited in early:
                yield exited
            while (next_one := await queue.get()) is not None:
                if (next_one.id, next_one.pid) not in seen:  # a second watcher hears events before its own answer
                    yield next_one
        finally:
            self._watchers.discard(queue)
        raise SpawnerUnavailable("the spawner is gone")

    async def quit(self, *, kill_all: bool = False) -> None:
        """End the spawner, after SIGKILL to all its processes if `kill_all`.

        Raises:
            Conflict: processes live and `kill_all` is not set.
        """
        await self._exchange("quit", kill_all=kill_all)
        await self.close()

    async def list(self) -> Listing:
        """Do as `listing`, under the name that `network.NamespaceSource` asks for."""
        return await self.listing()

    async def _call(self, into: type[T], op: str, *, timeout_s: float = 30.0, **fields: Any) -> T:
        raw, _ = await self._exchange(op, timeout_s=timeout_s, **fields)
        return msgspec.json.decode(raw, type=into)

    async def _exchange(
        self, op: str, *, timeout_s: float = 30.0, fds: Sequence[int] = (), is_urgent: bool = False, **fields: Any
    ) -> _Raw:
        """Send one request and wait for its answer, whose fds are the caller's; `fds` go with it and stay ours."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if not is_urgent:
                        await self._is_back.wait()
                    try:
                        return await self._ask(op, fds, fields)
                    except SpawnerUnavailable:
                        if op in _ONCE or is_urgent or self._is_closed or not self.has_keeper:
                            raise
        except TimeoutError:
            raise DeadlineExceeded(f"the spawner did not answer {op} within {timeout_s:g} s") from None

    async def _ask(self, op: str, fds: Sequence[int], fields: dict[str, Any]) -> _Raw:
        if not self._is_connected:
            raise SpawnerUnavailable("the spawner is gone")
        number = next(self._numbers)
        body = msgspec.json.encode({"n": number, "op": op, **({"fds": len(fds)} if fds else {}), **fields})
        future: asyncio.Future[_Raw] = self._loop.create_future()
        self._calls[number] = future
        self._send(len(body).to_bytes(4, "big") + body, fds)
        try:
            return await future
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                close_fds(future.result()[1])  # the answer came, and nobody takes it
            raise
        finally:
            self._calls.pop(number, None)

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        self._out.append((data, [os.dup(fd) for fd in fds]))
        if len(self._out) == 1 and not self._flush():
            self._loop.add_writer(self._socket.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        if self._flush() and self._is_connected:
            self._loop.remove_writer(self._socket.fileno())

    def _flush(self) -> bool:
        """Send as much as the socket takes; tell whether that was all."""
        while self._out:
            data, fds = self._out[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self._socket.sendmsg([data], rights)
            except BlockingIOError:
                return False
            except OSError:
                self._disconnect()
                return True
            close_fds(fds)  # they went with the first byte
            self._out.popleft()
            if sent < len(data):
                self._out.appendleft((data[sent:], []))
        return True

    def _on_readable(self) -> None:
        try:
            data, rights, _, _ = self._socket.recvmsg(
                READ_BYTES, socket.CMSG_SPACE(FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC
            )
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
            close_fds(fds)
        elif answer.error is not None:
            future.set_exception(_refusal(answer.error))
        else:
            future.set_result((body, fds))

    def _attach(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket, self._is_connected = connection, True
        self._in.clear()
        self._loop.add_reader(connection.fileno(), self._on_readable)

    def _disconnect(self) -> None:
        if not self._is_connected:
            return
        self._is_connected = False
        if self.has_keeper and not self._is_closed:
            self._is_back.clear()
            if self._run_dir is not None:  # before anyone acts on it: what is alive after this is a program
                adoption.kill_stragglers(self._run_dir)
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        close_fds(self._fds)
        self._fds.clear()
        for _, fds in self._out:
            close_fds(fds)
        self._out.clear()
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

    async def adopt(self, job_id: str, living: Living | None, belongings: Belongings) -> Spawned:
        """Go on with one that another spawner ran, and that has ended if not `living`, which is ours from here on."""
        await self.spawner.adopt(living, job_id, belongings)
        return await self.spawner.take(job_id)

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


def _refusal(error: dict[str, Any]) -> ServiceError:
    """Turn the spawner's error into ours."""
    code, message = error.pop("code", ""), error.pop("message", "")
    if code == "step":
        return LaunchFailed(message, **error)
    if code == "kernel":
        return LaunchFailed(f"the spawner: {message}", step="spawner", **error)
    families = {"not_found": JobNotFound, "exists": JobExists, "conflict": Conflict, "invalid": Invalid}
    return families.get(code, Internal)(message, **error)


async def _reach(run_dir: Path, python: str, timeout_s: float, options: Sequence[str]) -> socket.socket:
    """Connect to the spawner, or clear away what is left of the last one, start one and connect to that."""
    if connection := _connect(run_dir):
        return connection
    adoption.kill_stragglers(run_dir)
    try:
        await _start(run_dir, python, timeout_s, options)
    except SpawnerUnavailable:
        if connection := _connect(run_dir):  # somebody else has just started one
            return connection
        raise
    return _connect_to(run_dir)


def _connect_to(run_dir: Path) -> socket.socket:
    if connection := _connect(run_dir):
        return connection
    raise SpawnerUnavailable(f"no spawner answers in {run_dir}")


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


async def _start(run_dir: Path, python: str, timeout_s: float, options: Sequence[str]) -> None:
    """Start a spawner that outlives us: it leaves our session, and its starter ends once its socket answers."""
    starter = await asyncio.create_subprocess_exec(
        python,
        "-SIE",
        str(SCRIPT),
        *options,
        "--run-dir",
        str(run_dir),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        cwd="/",
        env={"PATH": os.defpath, "GLIBC_TUNABLES": NO_RSEQ},
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
