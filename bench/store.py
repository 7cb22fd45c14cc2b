"""Our store beside Debian's etcd: both sync every write to the same disk, both are asked over their JSON gateway.

Each side has `MEMBERS` members on loopback, with mutual TLS between them; clients ask the leader over plain HTTP with
wrk, which shares the machine's cores with the servers. Values have 256 bytes, keys are 1,000 different ones.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from bench.measure import Row, check_stop, interleave, row
from bench.router import free_ports
from hostd.authority import Authority

MEMBERS = 3
CLIENTS = (1, 16, 64)
SECONDS = 3
WATCHERS = 1000
KEYS = 100_000
PEER = f"etcd 3.4, {MEMBERS} member{'s' if MEMBERS > 1 else ''}"
START_S = 60.0
_BATCH = 100
_SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local number = 0
local value = string.rep("dmFs", 85) .. "dg=="
function request()
  number = (number + 1) % 1000
  local key = string.format("a2V5LW%04dAA", number)
  return wrk.format(nil, "PATH", nil, '{"key":"' .. key .. '"VALUE}')
end
"""


class Http:
    """One connection that stays open."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)

    def __call__(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self._connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        raw = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {raw[:200]!r}")
        return dict(json.loads(raw))

    def close(self) -> None:
        self._connection.close()


@dataclass
class Side:
    """The members of one store."""

    name: str
    folder: Path
    client_ports: list[int] = field(default_factory=lambda: free_ports(MEMBERS))
    peer_ports: list[int] = field(default_factory=lambda: free_ports(MEMBERS))
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def prepare(self) -> None:
        """Make what the members need, once."""
        raise NotImplementedError

    def command(self, number: int) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        if not self.folder.exists():
            self.folder.mkdir()
            self.prepare()
        for number in range(MEMBERS):
            with (self.folder / f"log{number}").open("ab") as log:
                self.children.append(subprocess.Popen(self.command(number), stdout=log, stderr=log))

    def wait_ready(self) -> Http:
        """Wait until the store answers with its newest state; return a connection to who leads."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                connection = Http(self.leader())
                connection("/v3/kv/range", {"key": "AA=="})
                return connection
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                if time.monotonic() > deadline or any(child.poll() is not None for child in self.children):
                    logs = [(self.folder / f"log{number}").read_text()[-1000:] for number in range(MEMBERS)]
                    raise RuntimeError(f"{self.name} does not answer: {error}: {logs}") from error
                time.sleep(0.002)

    def leader(self) -> int:
        """Return the port of the member that leads."""
        for port in self.client_ports:
            with contextlib.suppress(OSError, RuntimeError, http.client.HTTPException):
                status = Http(port)("/v3/maintenance/status", {})
                if status["leader"] == status["header"]["member_id"]:
                    return port
        raise RuntimeError("nobody leads")

    def kill(self) -> None:
        for child in self.children:
            child.send_signal(signal.SIGKILL)
        for child in self.children:
            child.wait()
        self.children.clear()

    def pss_mib(self) -> float:
        """Return the memory of one member, on average."""
        found = []
        for child in self.children:
            text = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
            found.append(next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024)
        return statistics.mean(found)


class Ours(Side):
    def prepare(self) -> None:
        authority = Authority.make()
        (self.folder / "ca.pem").write_bytes(authority.certificate.public_bytes(Encoding.PEM))
        for number in range(MEMBERS):
            (self.folder / str(number)).mkdir()
            (self.folder / str(number) / "tls.pem").write_bytes(authority.member(str(number)))

    def command(self, number: int) -> list[str]:
        members = ",".join(f"{name}=127.0.0.1:{port}" for name, port in enumerate(self.peer_ports))
        command = [sys.executable, "-m", "bench.store_member", str(self.folder / str(number))]
        return [*command, str(self.client_ports[number]), str(number), members if MEMBERS > 1 else ""]


class Etcd(Side):
    def prepare(self) -> None:
        """Make one certificate for all, which is its own authority."""
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=bench"
        names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(self.folder / "tls.key")]
        done = [*command.split(), *names, "-out", str(self.folder / "tls.crt")]
        subprocess.run(done, check=True, capture_output=True)

    def command(self, number: int) -> list[str]:
        peers = [f"https://127.0.0.1:{port}" for port in self.peer_ports]
        client = f"http://127.0.0.1:{self.client_ports[number]}"
        return [
            "etcd", "--name", str(number), "--data-dir", str(self.folder / f"data{number}"),
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peers[number], "--initial-advertise-peer-urls", peers[number],
            "--initial-cluster", ",".join(f"{name}={peer}" for name, peer in enumerate(peers)),
            "--peer-client-cert-auth", "--peer-trusted-ca-file", str(self.folder / "tls.crt"),
            "--peer-cert-file", str(self.folder / "tls.crt"), "--peer-key-file", str(self.folder / "tls.key"),
        ]  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What wrk saw: requests a second, and latencies in milliseconds."""

    per_s: float
    p50_ms: float
    p99_ms: float


def wrk(port: int, script: Path, clients: int) -> Load:
    """Ask as fast as so many connections can.

    Raises:
        RuntimeError: an answer was not 2xx, or a connection failed: such a round measures nothing.
    """
    command = [
        "wrk",
        "-t1",
        f"-c{clients}",
        f"-d{SECONDS}s",
        "--latency",
        "-s",
        str(script),
        f"http://127.0.0.1:{port}/",
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS + 30).stdout
    if "Non-2xx" in out or "Socket errors" in out:
        raise RuntimeError(out)
    scale = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    times = {
        share: float(value) * scale[unit] for share, value, unit in re.findall(r"(\d\d)%\s+([\d.]+)(us|ms|s)\b", out)
    }
    per_s = re.search(r"Requests/sec:\s+([\d.]+)", out)
    assert per_s is not None
    return Load(float(per_s[1]), times["50"], times["99"])


def loads(sides: dict[str, Side], folder: Path, rounds: int) -> list[Row]:
    """Measure writing and reading at each number of clients."""
    put, get = folder / "put.lua", folder / "get.lua"
    put.write_text(_SCRIPT.replace("PATH", "/v3/kv/put").replace("VALUE", ',"value":"\' .. value .. \'"'))
    get.write_text(_SCRIPT.replace("PATH", "/v3/kv/range").replace("VALUE", ""))
    rows = []
    for script, verb, clients in ((put, "put", CLIENTS), (get, "read", (16,))):
        for count in clients:
            seen: dict[str, list[Load]] = {name: [] for name in sides}

            def measure(name: str, script: Path = script, count: int = count, seen: Any = seen) -> float:
                seen[name].append(wrk(sides[name].leader(), script, count))
                return 0.0

            interleave({name: lambda name=name: measure(name) for name in sides}, rounds)  # type: ignore[misc]
            ours, theirs = (found[1:] for found in seen.values())  # the first is the warm-up
            for what, unit in (("per_s", f"{verb}s/s"), ("p50_ms", "ms"), ("p99_ms", "ms")):
                name = f"store_{verb}_{count}" + ("" if what == "per_s" else "_" + what.removesuffix("_ms"))
                mine, other = ([float(getattr(load, what)) for load in found] for found in (ours, theirs))
                rows.append(row(name, mine, other, PEER, unit))
    return rows


@contextlib.contextmanager
def watching(port: int) -> Iterator[list[socket.socket]]:
    """Have many watch one prefix, each on a connection of its own."""
    body = json.dumps({"create_request": {"key": b64("w/"), "range_end": b64("w0")}}).encode()
    request = b"POST /v3/watch HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    sockets: list[socket.socket] = []
    try:
        for _ in range(WATCHERS):
            sockets.append(socket.create_connection(("127.0.0.1", port), timeout=START_S))
            sockets[-1].sendall(request)
        for found in sockets:
            seen = b""
            while b'"created"' not in seen:
                seen += found.recv(4096)
        yield sockets
    finally:
        for found in sockets:
            found.close()


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def fan_out_ms(ask: Http, sockets: list[socket.socket]) -> float:
    """Return how long a change takes, from its request until the last watcher has it."""
    poll = select.epoll()
    by_fd = {found.fileno(): found for found in sockets}
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    missing = set(by_fd)
    begin = time.perf_counter()
    ask("/v3/kv/put", {"key": b64("w/a"), "value": b64("x" * 256)})
    while missing:
        for fd, _ in poll.poll(START_S):
            if b'"events"' in by_fd[fd].recv(65536):
                missing.discard(fd)
    taken_ms = (time.perf_counter() - begin) * 1000
    poll.close()
    return taken_ms


def fan_out(sides: dict[str, Side], rounds: int) -> Row:
    with contextlib.ExitStack() as stack:
        arms: dict[str, Callable[[], float]] = {}
        for name, side in sides.items():
            port = side.leader()
            ask, sockets = Http(port), stack.enter_context(watching(port))
            arms[name] = lambda ask=ask, sockets=sockets: fan_out_ms(ask, sockets)  # type: ignore[misc]
        found = interleave(arms, rounds)
    return row("store_watch_1000", found["ours"], found["etcd"], PEER, "ms")


def fill(ask: Http) -> None:
    """Put `KEYS` keys of 256 bytes."""
    value = b64("v" * 256)
    for start in range(0, KEYS, _BATCH):
        check_stop()
        puts = [{"request_put": {"key": b64(f"full/{n:06}"), "value": value}} for n in range(start, start + _BATCH)]
        ask("/v3/kv/txn", {"success": puts})


def restart_ms(side: Side) -> float:
    """Return how long the store is away when all its members are killed and started again."""
    side.kill()
    begin = time.perf_counter()
    side.start()
    side.wait_ready().close()
    return (time.perf_counter() - begin) * 1000


def full(sides: dict[str, Side], rounds: int) -> list[Row]:
    for side in sides.values():
        ask = side.wait_ready()
        fill(ask)
        ask.close()
    found = interleave({name: lambda side=side: restart_ms(side) for name, side in sides.items()}, rounds)  # type: ignore[misc]
    return [
        row("store_restart", found["ours"], found["etcd"], PEER, "ms"),
        row("store_memory", [sides["ours"].pss_mib()], [sides["etcd"].pss_mib()], PEER, "MiB"),
    ]


def measure(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix=f"hostd-bench-{os.getpid()}-store-", dir="/var/tmp") as name:
        folder = Path(name)
        sides: dict[str, Side] = {"ours": Ours("ours", folder / "ours"), "etcd": Etcd("etcd", folder / "etcd")}
        try:
            for side in sides.values():
                side.start()
            for side in sides.values():
                side.wait_ready().close()
            rows = loads(sides, folder, rounds)
            rows.append(fan_out(sides, 2 * rounds))
            return rows + full(sides, 3)
        finally:
            for side in sides.values():
                side.kill()
