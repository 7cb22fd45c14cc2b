"""Be the parent of every job: fork it, keep its pipes, remember how it ended, until hostd has it all.

Started by path, `python3 -SIE spawner.py --run-dir DIR`, by `hostd.runtime.process`; it puts itself in
the background and the starting process ends with 0 once the socket answers. One warm process, one
thread, one epoll loop; it imports the standard library, `netns.syscalls` and its own other files,
`child`, `root`, `table`, `seed`, `connection` and `ending`. It outlives hostd: a hostd that comes back
finds all processes, their unread output and the exit statuses nobody has acked. Its processes outlive
it in turn: a new spawner is told of them one by one (`adopt`) and hears of their end as it can. What is
left of a child that had not yet become its program ends by itself or is killed by who starts the new spawner.

Refuses peers that are not uid 0 and a second spawner in the same directory.

The protocol, on the unix stream socket `DIR/spawner.sock`: 4 bytes length, big-endian, then JSON. File
descriptors travel as SCM_RIGHTS with the first byte of the message that names their number in `fds`.

    hostd                                           spawner
      {"n": 1, "op": "hello", "protocol": 3}  ──▶
                                              ◀──  {"n": 1, "protocol": 3, "pid": 4711, "children": …}
      {"n": 2, "op": "create_netns",
       "name": "hostd-7"}                     ──▶
                                              ◀──  {"n": 2, "fds": 2}        + [netns, netlink socket]
      {"n": 3, "op": "spawn", "request": {…}} ──▶        clone3 ─▶ child
                                                          ◀─ {"pty": 1} + master, end of file (it runs)
                                              ◀──  {"n": 3, "pid": 4720, "streams": ["stdout", "stderr"],
                                                    "fds": 2}                + [stdout, stderr]
      {"n": 4, "op": "watch"}                 ──▶
                                              ◀──  {"n": 4, "exits": []}     (those not yet acked)
                                              ◀──  {"event": "exited", "id": …, "pid": …, "status": 0, "at": …}
      {"n": 5, "op": "ack", "id": …}          ──▶
                                              ◀──  {"n": 5}
      anything refused                        ◀──  {"n": 6, "error": {"code": …, "message": …, …}}

    op             fields             answer
    hello          protocol           protocol, pid, children (how they come to be, for the operator)
    create_netns   name, uid_base     fds: the namespace, a NETLINK_ROUTE datagram socket opened inside
    open_netns     name               the same, of one that is there
    drop_netns     name
    spawn          request            pid, streams; comes when the program runs, or waits, or failed
    exec           request            the same, for a process inside the job `request.job_id`, in all its namespaces
    start          id                 comes when the held-back program runs, or failed
    signal         id, number
    kill           id                 SIGKILL; comes when it is dead: id, pid, status, at
    close_stdin    id                 drops the spawner's own copy of the write end
    take           id                 pid, streams; comes when the program runs, or waits
    adopt          process, fds       nothing; `process` is id, pid, job_id, netns, uid_base, started_at, status,
                                      ended_at and the names of the fds: `pidfd` (none: it has ended), its streams
    ack            id                 forgets an ended process
    list                              children, netns
    watch                             exits, then events on this connection
    quit           kill_all           comes when nothing is left; then the spawner ends

Error codes: `step` (a child failed before its program ran: step, errno, syscall, target), `not_found`,
`exists`, `conflict`, `kernel` (a call of the spawner's own was refused: errno, syscall), `invalid`.
A status of null is one that nobody can know. `hello`, `list`, `take` and `watch` stay as they are in every later
protocol, so that a hostd of another version can take everything over before it ends a spawner of this one.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import gc
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# Started by path without site-packages; at the end, so that nothing there hides the standard library.
_TREE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if _TREE not in sys.path:
    sys.path.append(_TREE)

from hostd.runtime import child as children  # noqa: E402
from hostd.runtime import ending  # noqa: E402
from hostd.runtime.connection import Connection, close_fds  # noqa: E402
from hostd.runtime.seed import Copies, Maker, Seed  # noqa: E402
from hostd.runtime.table import Note, Table, failure, told  # noqa: E402
from netns import syscalls  # noqa: E402
from netns.errors import KernelError  # noqa: E402

PROTOCOL = 3
PIPE_BYTES = 256 * 1024  # what hostd reads at once; also what a job can say while hostd is away
COLLECT_EVERY = 512
USER_IDS = 65536
_F_SETPIPE_SZ = 1031
_INSIDE: dict[str, Any] = {
    **{"hostname": "", "netns": "", "namespaces": [], "mounts": None, "root": ""},
    **{"uid_base": 0, "has_init": False, "log_path": "", "note_path": "", "waits": False},
}
"""What a request for a process inside a job need not say: it is the job's."""


_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("id", "job_id", "working_dir", "hostname", "netns", "root"), str),
    **dict.fromkeys(("seccomp_path", "log_path", "note_path"), str),
    **dict.fromkeys(("uid", "gid", "uid_base", "rows", "columns"), int),
    **dict.fromkeys(("args", "namespaces", "cgroup_procs"), (list, tuple)),
    **dict.fromkeys(("env", "rlimits"), dict),
    **dict.fromkeys(("has_no_new_privs", "has_init", "has_tty", "has_stdin", "waits"), bool),
    **dict.fromkeys(("mounts", "capabilities"), (list, type(None))),
}


class Refusal(Exception):
    """An answer that says no."""

    def __init__(self, code: str, message: str, **detail: Any) -> None:
        super().__init__(message)
        self.body = {"code": code, "message": message, **detail}


Asker = tuple[Connection, Any]
"""Whom an answer goes to: the connection and its number for the call."""


class Process:
    """One process of ours, from clone3 until it is acked; `streams` are our ends of its pipes, by name."""

    def __init__(self, job_id: str, pid: int, pidfd: int, channel: socket.socket | None, netns: str) -> None:
        self.id = job_id
        self.pid = pid
        self.pidfd = pidfd
        self.channel = channel
        self.netns = netns
        self.job_id = ""
        self.uid_base = 0
        self.streams: dict[str, int] = {}
        self.state = "starting"
        self.started_at = _now_s()
        self.ended_at = 0.0
        self.status: int | None = None
        self.failure: dict[str, Any] | None = None
        self.table: tuple[int, list[Note]] | None = None  # until its program runs, or it is dead
        self.is_known = False  # its spawn was answered: whoever asked knows that it is there
        self.asker: Asker | None = None
        self.takers: list[Asker] = []
        self.killers: list[Asker] = []

    @property
    def is_alive(self) -> bool:
        return self.state != "exited"

    def read_table(self) -> dict[str, Any] | None:
        """Return what failed of all that it had to do to become its program, and let go of the table."""
        if self.table is None:
            return None
        fd, notes = self.table
        self.table = None
        try:
            failed = failure(fd, notes)
        finally:
            os.close(fd)
        return told(*failed) if failed is not None else None

    def exit_message(self) -> dict[str, Any]:
        return {"id": self.id, "pid": self.pid, "status": self.status, "at": self.ended_at}

    def list_message(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "pid": self.pid,
            "state": self.state,
            "started_at": self.started_at,
            "status": self.status,
            "ended_at": self.ended_at,
            "netns": self.netns,
            "job_id": self.job_id,
            "uid_base": self.uid_base,
        }

    def send_signal(self, number: int) -> None:
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)


class Spawner:
    """The loop and the tables: processes by id, namespaces by name, handlers by fd."""

    def __init__(self, run_dir: str, listener: socket.socket, maker: Maker) -> None:
        self._maker = maker
        self._root_dir = os.path.join(run_dir, "root")
        os.makedirs(self._root_dir, mode=0o700, exist_ok=True)
        self._listener = listener
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._connections: set[Connection] = set()
        self._processes: dict[str, Process] = {}
        self._netns: dict[str, int] = {}
        self._programs: dict[str, bytes] = {"": b""}
        self._userns: dict[int, int] = {}
        self._own_netns = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._bounding_set = syscalls.capability_bounding_set()
        self._known_capabilities = syscalls.capabilities_known()
        self._has_lowered_oom_score = _lower_oom_score()
        self._quitter: Asker | None = None
        self._is_done = False
        self._served = 0
        self._ops: dict[str, Callable[[dict[str, Any], Asker], None]] = {
            "hello": self._hello,
            "create_netns": self._create_netns,
            "open_netns": self._open_netns,
            "drop_netns": self._drop_netns,
            "spawn": self._spawn,
            "exec": self._exec,
            "start": self._start,
            "signal": self._signal,
            "kill": self._kill,
            "close_stdin": self._close_stdin,
            "take": self._take,
            "adopt": self._adopt,
            "ack": self._ack,
            "list": self._list,
            "watch": self._watch,
            "quit": self._quit,
        }

    def run(self) -> None:
        """Serve until told to quit."""
        self._listen_to(self._listener.fileno(), self._accept)
        while not self._is_done:
            for fd, events in self._epoll.poll():
                # A handler may find nothing to do: an earlier one of this round may have closed and reused its fd.
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler(events)

    # The loop's own business

    def _listen_to(self, fd: int, handler: Callable[[int], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def _forget(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _accept(self, _: int) -> None:
        try:
            sock, _address = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no fd left: the connection stays queued; do not spin on it
            _say(f"accept: {error}")
            time.sleep(0.05)
            return
        uid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if uid != 0:
            _say(f"refused a peer of uid {uid}")
            sock.close()
            return
        sock.setblocking(False)
        connection = Connection(sock)
        self._connections.add(connection)
        self._listen_to(sock.fileno(), lambda events: self._on_connection(connection, events))

    def _on_connection(self, connection: Connection, events: int) -> None:
        if events & select.EPOLLOUT:
            connection.flush()
        if events & ~select.EPOLLOUT:
            try:
                for message in connection.messages():
                    self._serve(message, (connection, message.get("n")))
            except (ValueError, AttributeError, TypeError) as error:  # not JSON, or not an object: nobody of ours
                _say(f"closed a connection: {error}")
                connection.is_open = False
        self._look_after(connection)

    def _look_after(self, connection: Connection) -> None:
        """Wait for room if it has a backlog; close it if it is broken."""
        fd = connection.sock.fileno()
        if fd < 0:
            return
        if connection.is_open:
            if connection.waits_for_room != connection.has_backlog:
                connection.waits_for_room = connection.has_backlog
                self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if connection.has_backlog else 0))
            return
        self._forget(fd)
        self._connections.discard(connection)
        connection.close()

    def _serve(self, message: dict[str, Any], asker: Asker) -> None:
        self._served += 1
        if self._served % COLLECT_EVERY == 0:
            gc.collect()
        try:
            op = self._ops.get(message.get("op", ""))
            if op is None:
                raise Refusal("invalid", f"unknown op {message.get('op')!r}")
            op(message, asker)
        except Refusal as refusal:
            self._refuse(asker, refusal.body)
        except OSError as error:
            body = {"errno": error.errno or 0, "syscall": getattr(error, "syscall", ""), "message": str(error)}
            self._refuse(asker, {"code": "kernel", **body})
        except Exception as error:  # one request
            import traceback  # a bug: only now worth its memory

            _say(traceback.format_exc())
            self._refuse(asker, {"code": "invalid", "message": f"{type(error).__name__}: {error}"})
        finally:
            close_fds(message.get("fds", ()))  # those that nobody took

    def _answer(self, asker: Asker | None, body: dict[str, Any], fds: list[int] | None = None) -> None:
        if asker is not None and asker[0].is_open:
            asker[0].send({"n": asker[1], **body}, fds or [])
            self._look_after(asker[0])

    def _refuse(self, asker: Asker | None, error: dict[str, Any]) -> None:
        self._answer(asker, {"error": error})

    # The requests

    def _hello(self, message: dict[str, Any], asker: Asker) -> None:
        """Greet; but first do what others still asked for: a hostd that died may have been the newcomer's last."""
        for connection in self._connections - {asker[0]}:
            self._on_connection(connection, select.EPOLLIN)
        self._answer(asker, {"protocol": PROTOCOL, "pid": os.getpid(), "children": self._maker.kind})

    def _create_netns(self, message: dict[str, Any], asker: Asker) -> None:
        name = _text(message["name"], "name")
        if name in self._netns:
            raise Refusal("exists", f"network namespace {name} exists")
        base = _uid_base(message.get("uid_base", 0))
        owned = _make_netns_of(self._userns_of(base)) if base else -1
        try:
            if base:
                self._netns[name] = owned
                syscalls.setns(owned, syscalls.CLONE_NEWNET)
            else:
                syscalls.unshare(syscalls.CLONE_NEWNET)
                self._netns[name] = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            for path, data in children.LOOSE_NETWORK:
                with open(path, "wb", buffering=0) as file:
                    file.write(data)
        finally:
            self._go_home()
        self._open_netns(message, asker)

    def _open_netns(self, message: dict[str, Any], asker: Asker) -> None:
        fd = self._netns.get(message["name"])
        if fd is None:
            raise Refusal("not_found", f"no network namespace {message['name']}")
        syscalls.setns(fd, syscalls.CLONE_NEWNET)
        try:
            netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, socket.NETLINK_ROUTE)
        finally:
            self._go_home()
        with netlink:
            self._answer(asker, {}, [fd, netlink.fileno()])

    def _go_home(self) -> None:
        """Return to the host's network; a spawner that cannot must not go on as if it were there."""
        try:
            syscalls.setns(self._own_netns, syscalls.CLONE_NEWNET)
        except KernelError as error:
            _say(f"lost in a network namespace: {error}")
            os._exit(1)

    def _drop_netns(self, message: dict[str, Any], asker: Asker) -> None:
        fd = self._netns.pop(message["name"], None)
        if fd is not None:
            os.close(fd)
        self._answer(asker, {})

    def _spawn(self, message: dict[str, Any], asker: Asker) -> None:
        request = message["request"]
        self._check(request)
        self._create(request, None, asker)

    def _exec(self, message: dict[str, Any], asker: Asker) -> None:
        """Run one more process inside a job: it is told apart from the job's own by its `job_id` only."""
        request = {**_INSIDE, **message["request"]}
        self._check(request)
        job = self._process({"id": request["job_id"]})
        if job.state != "running":
            raise Refusal("conflict", f"process {job.id} is not running")
        request["uid_base"] = job.uid_base
        self._create(request, job, asker)

    def _create(self, request: dict[str, Any], job: Process | None, asker: Asker) -> None:
        """Make the child; in `job`, if one is given, whose pid namespace its children are to be born in."""
        mine: dict[str, int] = {}
        theirs: dict[str, int] = {}
        table_fd = -1
        try:
            _make_streams(request, mine, theirs)
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            theirs["channel"] = far.detach()
            try:
                table = self._table_of(request, theirs, job)
                table_fd = table.write()
                pid, pidfd = self._maker.make(table_fd, children.clone_flags(request), job.pidfd if job else -1)
            except BaseException:
                near.close()
                raise
        except children.CannotBegin as error:
            close_fds(mine.values())
            raise Refusal("step", **error.failure) from None
        except BaseException:  # a field that is not there, too: what is open must not stay open
            close_fds([*mine.values(), table_fd])
            raise
        finally:
            close_fds(set(theirs.values()))
        process = Process(request["id"], pid, pidfd, near, request["netns"])
        process.job_id = request.get("job_id", "")
        process.uid_base = request["uid_base"]
        process.table = (table_fd, table.notes)
        process.streams = mine
        process.asker = asker
        self._processes[process.id] = process
        self._listen_to(near.fileno(), lambda _: self._on_channel(process))
        self._listen_to(pidfd, lambda _: self._on_exit(process))

    def _table_of(self, request: dict[str, Any], theirs: dict[str, int], job: Process | None) -> Table:
        if job is None:
            userns = self._userns_of(request["uid_base"])
        else:
            userns = job.pidfd if job.uid_base else -1
        ends = children.Ends(
            channel=theirs["channel"],
            stdin=theirs.get("stdin", -1),
            stdout=theirs.get("stdout", -1),
            stderr=theirs.get("stderr", -1),
            netns=self._netns.get(request["netns"], -1),
            job=job.pidfd if job is not None else -1,
            userns=userns,
            note=theirs.get("note", -1),
        )
        warm = children.Warm(
            request["root"] or self._root_dir,
            self._bounding_set,
            self._known_capabilities,
            self._has_lowered_oom_score,
        )
        return children.table_of(request, ends, warm, self._program(request["seccomp_path"]))

    def _userns_of(self, base: int) -> int:
        """Return the user namespace in which 0 to 65535 are the host's ids from `base` on; -1 for 0.

        Made once and kept: hostd gives a range back only when nothing of its job is left.
        """
        if base and base not in self._userns:
            self._userns[base] = _make_userns(base)
        return self._userns[base] if base else -1

    def _check(self, request: dict[str, Any]) -> None:
        _check_kinds(request)
        job_id = _text(request["id"], "id")
        if self._quitter is not None:
            raise Refusal("conflict", "the spawner is about to quit")
        if job_id in self._processes:
            raise Refusal("exists", f"process {job_id} exists")
        if not request["args"] or not all(isinstance(each, str) for each in request["args"]):
            raise Refusal("invalid", "args: at least one text")
        if _uid_base(request["uid_base"]) and request["mounts"] is None:
            raise Refusal("invalid", "a user namespace needs a root of its own")
        if request["mounts"] is not None and "mount" not in request["namespaces"]:
            raise Refusal("invalid", "mounts without a mount namespace would be the host's")
        if request["netns"] and request["netns"] not in self._netns:
            raise Refusal("not_found", f"no network namespace {request['netns']}")

    def _program(self, path: str) -> bytes:
        """Return a seccomp filter, read once: its file is named after what is in it."""
        if path not in self._programs:
            with open(path, "rb") as file:
                self._programs[path] = file.read()
        return self._programs[path]

    def _start(self, message: dict[str, Any], asker: Asker) -> None:
        process = self._process(message)
        if process.state != "waiting" or process.channel is None:
            return self._answer(asker, {})
        if process.asker is not None:
            raise Refusal("conflict", f"process {process.id} is being started")
        process.asker = asker
        with contextlib.suppress(OSError):  # it died just now: its end answers
            process.channel.send(b"g")

    def _signal(self, message: dict[str, Any], asker: Asker) -> None:
        self._process(message).send_signal(message["number"])
        self._answer(asker, {})

    def _kill(self, message: dict[str, Any], asker: Asker) -> None:
        process = self._process(message)
        if not process.is_alive:
            return self._answer(asker, process.exit_message())
        process.killers.append(asker)
        process.send_signal(signal.SIGKILL)

    def _close_stdin(self, message: dict[str, Any], asker: Asker) -> None:
        process = self._processes.get(message["id"])
        if process is not None and "stdin" in process.streams:
            os.close(process.streams.pop("stdin"))
        self._answer(asker, {})

    def _take(self, message: dict[str, Any], asker: Asker) -> None:
        process = self._process(message)
        if process.state == "starting":
            process.takers.append(asker)
        else:
            self._answer_streams(process, asker)

    def _adopt(self, message: dict[str, Any], asker: Asker) -> None:
        """Take in a process that another spawner started; what is known of its end is all that it will have."""
        told = message["process"]
        job_id, names = _text(told["id"], "id"), told["streams"]
        if job_id in self._processes:
            raise Refusal("exists", f"process {job_id} exists")
        if len(names) != len(message["fds"]):
            raise Refusal("invalid", "one fd for each name")
        fds = dict(zip(names, message.pop("fds"), strict=True))
        process = Process(job_id, told["pid"], fds.pop("pidfd", -1), None, told["netns"])
        process.is_known, process.streams, process.started_at = True, fds, told["started_at"]
        process.job_id, process.uid_base = told["job_id"], told["uid_base"]
        self._processes[job_id] = process
        if process.pidfd < 0:
            process.state, process.status, process.ended_at = "exited", told["status"], told["ended_at"]
        else:
            process.state = "running"
            self._keep_netns(process)
            self._listen_to(process.pidfd, lambda _: self._on_exit(process))
        self._answer(asker, {})

    def _keep_netns(self, process: Process) -> None:
        if not process.netns or process.netns in self._netns:
            return
        with contextlib.suppress(OSError):
            fd = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            if ending.is_over(process.pidfd):  # its number may be another's by now
                os.close(fd)
            else:
                self._netns[process.netns] = fd

    def _ack(self, message: dict[str, Any], asker: Asker) -> None:
        process = self._processes.get(message["id"])
        if process is not None and process.is_alive:
            raise Refusal("conflict", f"process {process.id} has not ended")
        if process is not None:
            self._remove(process)
        self._answer(asker, {})

    def _list(self, _: dict[str, Any], asker: Asker) -> None:
        found = [process.list_message() for process in self._processes.values()]
        self._answer(asker, {"children": found, "netns": list(self._netns)})

    def _watch(self, _: dict[str, Any], asker: Asker) -> None:
        asker[0].is_watching = True
        ended = [process.exit_message() for process in self._processes.values() if not process.is_alive]
        self._answer(asker, {"exits": ended})

    def _quit(self, message: dict[str, Any], asker: Asker) -> None:
        living = [process for process in self._processes.values() if process.is_alive]
        if living and not message.get("kill_all"):
            raise Refusal("conflict", f"{len(living)} processes are running")
        self._quitter = asker
        for process in living:
            process.send_signal(signal.SIGKILL)
        self._end_if_asked()

    # What happens to processes

    def _process(self, message: dict[str, Any]) -> Process:
        process = self._processes.get(message["id"])
        if process is None:
            raise Refusal("not_found", f"no process {message['id']}")
        return process

    def _on_channel(self, process: Process) -> None:
        """Hear what a child says until its program runs; the end of file is the good news."""
        while process.channel is not None:
            try:
                flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                data, rights, _, _ = process.channel.recvmsg(64, socket.CMSG_SPACE(4), flags)
            except BlockingIOError:
                return
            except OSError:
                data, rights = b"", []
            fds = array.array("i")
            for _, _, payload in rights:
                fds.frombytes(payload)
            if not data:
                self._forget(process.channel.fileno())
                process.channel.close()
                process.channel = None
                process.failure = process.read_table()  # told when it is dead
                if process.failure is None:
                    self._on_ready(process, "running")
                return
            if data == children.PTY:
                process.streams["pty"] = fds[0]
            elif data == children.READY:
                self._on_ready(process, "waiting")

    def _on_ready(self, process: Process, state: str) -> None:
        process.state = state
        asker, process.asker = process.asker, None
        if process.is_known:
            self._answer(asker, {})
        else:
            process.is_known = True
            self._answer_streams(process, asker)
        for taker in process.takers:
            self._answer_streams(process, taker)
        process.takers.clear()

    def _answer_streams(self, process: Process, asker: Asker | None) -> None:
        body = {"pid": process.pid, "streams": list(process.streams)}
        self._answer(asker, body, list(process.streams.values()))

    def _on_exit(self, process: Process) -> None:
        self._on_channel(process)  # what it said comes before its end
        is_over, process.status = ending.status_of(process.pid, process.pidfd)
        if not is_over:
            return
        process.ended_at = _now_s()
        process.state = "exited"
        self._forget(process.pidfd)
        os.close(process.pidfd)
        process.pidfd = -1
        if process.is_known:
            self._tell_exit(process)
        else:  # whoever asked hears only that it failed, when nothing of it is left
            self._remove(process)
            for taker in process.takers:
                self._refuse(taker, {"code": "not_found", "message": f"no process {process.id}"})
        if process.failure is not None:
            self._refuse(process.asker, {"code": "step", **process.failure})
            process.asker = None
        for killer in process.killers:
            self._answer(killer, process.exit_message())
        process.killers.clear()
        self._end_if_asked()

    def _tell_exit(self, process: Process) -> None:
        for connection in [each for each in self._connections if each.is_watching and each.is_open]:
            connection.send({"event": "exited", **process.exit_message()}, [])
            self._look_after(connection)

    def _remove(self, process: Process) -> None:
        close_fds(process.streams.values())
        process.streams.clear()
        del self._processes[process.id]

    def _end_if_asked(self) -> None:
        if self._quitter is not None and not any(each.is_alive for each in self._processes.values()):
            self._answer(self._quitter, {})
            self._is_done = True


def _make_streams(request: dict[str, Any], mine: dict[str, int], theirs: dict[str, int]) -> None:
    """Open the standard streams of a child (a terminal it opens itself) and its note, into our ends and its ends."""
    if request["note_path"]:
        theirs["note"] = os.open(request["note_path"], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    if request["has_tty"]:
        return
    if request["log_path"]:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        theirs["stdout"] = theirs["stderr"] = os.open(request["log_path"], flags, 0o640)
    else:
        for name in ("stdout", "stderr"):
            mine[name], theirs[name] = _make_pipe()
    if request["has_stdin"]:
        theirs["stdin"], mine["stdin"] = os.pipe()


def _make_userns(base: int) -> int:
    """Make a user namespace and return its fd: a stub of a child is in it until its maps are written."""
    with _stub(syscalls.CLONE_NEWUSER, lambda: None) as pid:
        for kind in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{kind}", "w") as file:
                file.write(f"0 {base} {USER_IDS}")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)


def _make_netns_of(userns: int) -> int:
    """Make a network namespace that a user namespace owns: it is made by who is inside, and we could not come back."""

    def enter() -> None:
        syscalls.setns(userns, syscalls.CLONE_NEWUSER)
        syscalls.unshare(syscalls.CLONE_NEWNET)

    with _stub(0, enter) as pid:
        return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def _stub(flags: int, act: Callable[[], None]) -> Iterator[int]:
    """Have a child of ours do something, and keep it for the body, which looks at it under its pid."""
    here, there = socket.socketpair()
    pid, pidfd = syscalls.clone3(flags, signal.SIGCHLD)
    if pid == 0:
        try:
            here.close()
            act()
            there.send(b"d")
            there.recv(1)
        finally:
            os._exit(0)
    os.close(pidfd)
    there.close()
    try:
        if here.recv(1) != b"d":
            raise KernelError(errno.EPERM, "unshare", "a namespace in a child of the spawner")
        yield pid
    finally:
        here.close()
        os.waitpid(pid, 0)


def _make_pipe() -> tuple[int, int]:
    """Return (our end, the job's end), which can read as well: so the job never writes into a pipe without a reader.

    Neither what it prints is lost nor is it killed by SIGPIPE while both hostd and the spawner are gone, and
    what comes after them gets another end of the pipe from /proc/PID/fd.
    """
    ours, narrow = os.pipe()
    try:
        fcntl.fcntl(ours, _F_SETPIPE_SZ, PIPE_BYTES)
        return ours, os.open(f"/proc/self/fd/{narrow}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        os.close(ours)
        raise
    finally:
        os.close(narrow)


def _uid_base(value: Any) -> int:
    if not isinstance(value, int) or value % USER_IDS or not 0 <= value < 1 << 31:
        raise Refusal("invalid", f"uid_base {value!r}: a multiple of {USER_IDS}")
    return value


def _check_kinds(request: dict[str, Any]) -> None:
    """Refuse fields of another type before anything is opened for them: half-way, what is open would stay open."""
    for name, kind in _KINDS.items():
        if name in request and not isinstance(request[name], kind):
            raise Refusal("invalid", f"{name}: {type(request[name]).__name__} is not possible")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 128:
        raise Refusal("invalid", f"{what}: 1 to 128 characters")
    return value


def _now_s() -> float:
    return time.time()  # noqa: TID251 — wire.clock is not for the spawner: the standard library only


def _say(text: str) -> None:
    sys.stderr.write(text.rstrip() + "\n")
    sys.stderr.flush()


def _lower_oom_score() -> bool:
    """Be the last one the kernel kills for memory: jobs live on, but nobody could start one. Wants CAP_SYS_RESOURCE."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-900")
    except OSError:
        return False
    return True


def _lock(path: str) -> int:
    """Own the directory: a lock that dies with this process, in the file that says who we are."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SystemExit(f"another spawner holds {path}") from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def _listen(path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(64)
    listener.setblocking(False)
    return listener


def _make_maker(*, may_have_seed: bool) -> Maker:
    if not may_have_seed:
        return Copies("turned off")
    try:
        return Seed()
    except OSError as error:  # slower, and as good
        _say(f"no seed: {error}")
        return Copies(str(error))


def _serve(run_dir: str, ready_fd: int, *, may_have_seed: bool) -> None:
    """Be the spawner, in the background, until told to quit."""
    os.setsid()
    os.umask(0o077)
    os.chdir("/")
    # A child may already be among a job's processes when it is not yet its program: nobody but the host's root may
    # look into it (its memory, its files, its executable), the kernel checks on every way there.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # only `quit` ends us: without us nobody could start a job
    for internal in (32, 33):  # make(1) and all that start programs through posix_spawn leave glibc's own two ignored
        syscalls.rt_sigaction_default(internal)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.makedirs(run_dir, mode=0o700, exist_ok=True)
    lock = _lock(os.path.join(run_dir, "spawner.pid"))
    socket_path = os.path.join(run_dir, "spawner.sock")
    maker = _make_maker(may_have_seed=may_have_seed)
    spawner = Spawner(run_dir, _listen(socket_path), maker)
    log = os.open(os.path.join(run_dir, "spawner.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for target, fd in ((0, null), (1, log), (2, log)):
        os.dup2(fd, target)
    gc.collect()
    gc.disable()  # we collect by hand, between requests
    gc.freeze()
    os.write(ready_fd, b"ok")
    os.close(ready_fd)
    spawner.run()
    maker.close()
    for path in (socket_path, os.path.join(run_dir, "spawner.pid")):
        with contextlib.suppress(OSError):
            os.unlink(path)
    os.close(lock)


def main() -> int:
    """Start the spawner in the background; 0 once its socket answers, 1 with the reason on stderr."""
    words = sys.argv[1:]  # argparse would stay in memory
    may_have_seed = words[:1] != ["--without-seed"]
    if not may_have_seed:
        del words[0]
    if len(words) != 2 or words[0] != "--run-dir":
        _say("usage: python3 -SIE spawner.py [--without-seed] --run-dir DIR   (hostd starts it, with DIR/spawner.sock)")
        return 64
    run_dir = os.path.abspath(words[1])
    here, there = os.pipe()
    if os.fork() == 0:
        os.close(here)
        _serve(run_dir, there, may_have_seed=may_have_seed)
        return 0
    os.close(there)
    return 0 if os.read(here, 2) == b"ok" else 1


if __name__ == "__main__":
    sys.exit(main())
