"""Target: the messages of the spawner, sent to a real one by a peer of uid 0.

An input is a JSON list of messages (or raw bytes, when it is no such list), sent on one connection. Afterwards the
spawner has to answer, and once its processes are killed and acked and its namespaces dropped, nothing may be left:
no process, no namespace, no fd. Runs only in the box that `__main__` makes: the requests are mutated, the rights are not.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from hostd.runtime.process import NO_RSEQ, SCRIPT, ExecRequest, SpawnRequest
from tests.fuzz import mutation
from tests.fuzz.harness import Violation

_DEADLINE_S = 20.0
_LENGTH = struct.Struct(">I")


def _spawn(number: int, **more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"id": "p", "args": ("/bin/true",), "env": {"PATH": "/usr/bin:/bin"}, **more}
    return {"n": number, "op": "spawn", "request": msgspec.to_builtins(SpawnRequest(**fields))}


class Messages:
    def open(self) -> None:
        self._dir = Path(tempfile.mkdtemp(prefix="fuzz-spawner-", dir="/run"))
        self.restarts = 0
        self._is_spoiled = False
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-SIE", str(SCRIPT), "--run-dir", str(self._dir)]
        env = {"PATH": os.defpath, "GLIBC_TUNABLES": NO_RSEQ}  # as hostd starts it
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=_DEADLINE_S, env=env)
        self.pid = int((self._dir / "spawner.pid").read_text())
        self._ask([{"n": 0, "op": "hello", "protocol": 1}])
        # What it makes for itself with the first process and then keeps: the seed.
        self._ask([_spawn(1), {"n": 2, "op": "kill", "id": "p"}, {"n": 3, "op": "ack", "id": "p"}])
        _reap()
        self._seeds = len(_processes()) - 1
        self._fds = self._count_fds()

    def close(self) -> None:
        with contextlib.suppress(OSError, Violation):
            self._ask([{"n": 1, "op": "quit", "kill_all": True}])

    def seeds(self) -> Iterable[bytes]:
        box: dict[str, Any] = {"namespaces": ("mount", "pid", "uts", "ipc", "net", "cgroup"), "hostname": "h"}
        mounts = [["mount", "tmpfs", "/", "tmpfs", 0, None], ["mkdir", "/a/b", 0o755], ["symlink", "x", "/l"]]
        for messages in (
            [{"n": 1, "op": "hello", "protocol": 1}, {"n": 2, "op": "list"}, {"n": 3, "op": "watch"}],
            [{"n": 1, "op": "create_netns", "name": "a"}, {"n": 2, "op": "open_netns", "name": "a"}, {"n": 3, "op": "drop_netns", "name": "a"}],
            [_spawn(1), {"n": 2, "op": "kill", "id": "p"}, {"n": 3, "op": "ack", "id": "p"}],
            [_spawn(1, args=("/bin/sleep", "60")), {"n": 2, "op": "signal", "id": "p", "number": 15}],
            [_spawn(1, has_stdin=True, waits=True), {"n": 2, "op": "start", "id": "p"}, {"n": 3, "op": "close_stdin", "id": "p"}, {"n": 4, "op": "take", "id": "p"}],
            [_spawn(1, has_tty=True, args=("/bin/sleep", "60")), {"n": 2, "op": "kill", "id": "p"}],
            [{"n": 1, "op": "create_netns", "name": "a"}, _spawn(2, netns="a", **box)],
            [_spawn(1, mounts=mounts, **box)],
            [_spawn(1, capabilities=("CHOWN",), has_no_new_privs=True, rlimits={"NOFILE": 64}, uid=7, gid=7, **box)],
            [_spawn(1, args=("/bin/sleep", "60"), **box), {"n": 2, "op": "exec", "request": msgspec.to_builtins(
                ExecRequest(id="e", job_id="p", args=("/bin/true",)))}, {"n": 3, "op": "kill", "id": "p"}],
            [{"n": 1, "op": "quit", "kill_all": False}],
        ):  # fmt: skip
            yield mutation.dump(messages)

    def mutate(self, data: bytes, dice: random.Random) -> bytes:
        return mutation.of_bytes(data, dice) if dice.random() < 0.08 else mutation.of_json_text(data, dice)

    def run(self, data: bytes) -> str:
        if self._is_spoiled:  # by a finding; the next one is not to be blamed
            self._replace()
        self._is_spoiled = True
        outcome = self._run(data)
        self._is_spoiled = False
        return outcome

    def _replace(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
        for pid in _processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + _DEADLINE_S
        while _processes() and time.monotonic() < end:
            _reap()
            time.sleep(0.005)
        self._start()

    def _run(self, data: bytes) -> str:
        outcome = self._send(data)
        has_quit = not self._is_serving(outcome)
        if has_quit:
            self.restarts += 1
            self._start()
            return "quit"
        self._clear()
        return outcome

    # one input

    def _send(self, data: bytes) -> str:
        """Send the input; return what was answered, in short."""
        try:
            messages = json.loads(data)
        except (ValueError, RecursionError):
            messages = None
        frames = [data]
        if isinstance(messages, list):
            frames = [_framed(mutation.dump(message)) for message in messages[:50]]
        words: list[str] = []
        is_patient = True
        with self._connect() as peer:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
                for frame in frames:
                    peer.sendall(frame)
                if is_patient := len(data) % 2 == 0:
                    words = [_word_of(answer) for answer, _ in zip(_answers(peer, 0.08), frames, strict=False)]
                else:  # whoever does not wait for answers leaves them with the spawner
                    peer.shutdown(socket.SHUT_WR)
            if not is_patient:
                words = [_word_of(answer) for answer in _answers(peer, 2.0)]
        return ",".join(words)[:60] or "silence"

    def _connect(self) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.settimeout(_DEADLINE_S)
        peer.connect(str(self._dir / "spawner.sock"))
        return peer

    def _ask(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with self._connect() as peer:
            for message in messages:
                peer.sendall(_framed(mutation.dump(message)))
            found = []
            for answer in _answers(peer, _DEADLINE_S):
                if "n" in answer:
                    found.append(answer)
                if len(found) == len(messages):
                    return found
        raise Violation(f"no answer to {messages}")

    def _is_serving(self, outcome: str) -> bool:
        try:
            self._ask([{"n": 0, "op": "list"}])
            return True
        except (OSError, Violation) as error:
            log = (self._dir / "spawner.log").read_text()[-2000:]
            if not self._is_gone():
                raise Violation(f"it does not answer after {outcome}: {error!r}\n{log}") from error
            return False

    def _is_gone(self) -> bool:
        end = time.monotonic() + _DEADLINE_S
        while time.monotonic() < end and not (self._dir / "spawner.sock").exists():
            _reap()
            if not Path(f"/proc/{self.pid}").exists():
                return True
            time.sleep(0.005)
        return False

    def _clear(self) -> None:
        """End what the input has begun, and look whether anything is left."""
        end = time.monotonic() + _DEADLINE_S
        while time.monotonic() < end:
            (listing,) = self._ask([{"n": 0, "op": "list"}])
            for child in listing["children"]:
                self._ask([{"n": 1, "op": "kill", "id": child["id"]}])
                self._ask([{"n": 2, "op": "ack", "id": child["id"]}])
            for name in listing["netns"]:
                self._ask([{"n": 3, "op": "drop_netns", "name": name}])
            _reap()
            others = _processes() - {self.pid}
            fds = self._count_fds()
            is_clear = not (listing["children"] or listing["netns"]) and len(others) <= self._seeds
            if is_clear and fds <= self._fds:
                return
            for pid in (
                others if len(others) > self._seeds else ()
            ):  # of a plain process that left its parent: nobody's but ours
                with contextlib.suppress(OSError):
                    if _parent_of(pid) != self.pid:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        links = [os.readlink(f"/proc/{self.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{self.pid}/fd")]
        raise Violation(f"left: {listing}, processes {others}, {fds} fds, not {self._fds}: {sorted(links)}")

    def _count_fds(self) -> int:
        """Count what it holds, but for the namespaces of users, which it keeps on purpose."""
        folder = f"/proc/{self.pid}/fd"
        count = 0
        for fd in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                count += not os.readlink(f"{folder}/{fd}").startswith("user:")
        return count


def _framed(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


def _answers(peer: socket.socket, timeout_s: float) -> Iterable[dict[str, Any]]:
    """Yield answers until the end, or until nothing comes any more."""
    peer.settimeout(timeout_s)
    held = b""
    while True:
        try:
            data, rights, _, _ = socket.recv_fds(peer, 1 << 16, 64)
        except (OSError, ValueError):
            return
        for fd in rights:
            os.close(fd)
        if not data:
            return
        held += data
        while len(held) >= 4 and len(held) >= 4 + _LENGTH.unpack_from(held)[0]:
            end = 4 + _LENGTH.unpack_from(held)[0]
            yield json.loads(held[4:end])
            held = held[end:]


def _word_of(answer: dict[str, Any]) -> str:
    if "error" in answer:
        error = answer["error"]
        text = str(error.get("message", ""))[:24] if error["code"] == "invalid" else str(error.get("step", ""))
        return f"{error['code']}:{text}"
    return "event" if "event" in answer else "fds" if "fds" in answer else "yes"


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid()}


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
