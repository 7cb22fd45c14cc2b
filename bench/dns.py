"""DNS answers per second and their p99 at 5,000 a second: the discovery daemon beside unbound, with the same names.

1,000 services with 10 instances each, asked at random for A and SRV records over UDP on loopback. The rate is what
`WINDOW` questions that are always under way get; the p99 is of questions sent at fixed times whether answers come
or not, from the sending until the kernel has the answer, and a lost one counted as `LOST_S`.
"""

from __future__ import annotations

import asyncio
import os
import random
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.measure import Row, check_stop, row
from discovery.client import Store
from discovery.types import Instance, Put
from discovery.wire.blocking import BlockingCaller
from discovery.wire.errors import ServiceError

SERVICES, INSTANCES = 1000, 10
SECONDS = 2.0
WINDOW = 64
RATE = 5000
LOST_S = 1.0
_A, _SRV, _OPT = 1, 33, 41
_SO_TIMESTAMPNS = 35


def instances() -> Iterator[Instance]:
    for service in range(SERVICES):
        for number in range(INSTANCES):
            host = f"10.{service // 250}.{service % 250}.{number + 1}"
            yield Instance(id=f"h{number}-55000", service=f"service-{service}", host=host, port=55000)


def free_port() -> int:
    """Return a port that is free for UDP and for TCP."""
    while True:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
            socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other,
        ):
            one.bind(("127.0.0.1", 0))
            try:
                other.bind(one.getsockname())
            except OSError:
                continue
            return int(one.getsockname()[1])


def wait_answering(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until there are answers.

    Raises:
        RuntimeError: there are none.
    """
    deadline = time.monotonic() + 30
    with connect(port) as sock:
        sock.settimeout(0.2)
        while True:
            try:
                sock.send(b"\0\0" + question("service-0.discoverd", _A))
                check(sock.recv(4096))
                return
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(log.read_text()) from None
                time.sleep(0.02)


def question(name: str, kind: int) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    options = struct.pack(">BHHIH", 0, _OPT, 1232, 0, 0)
    return struct.pack(">HHHHH", 0x0100, 1, 0, 0, 1) + labels + struct.pack(">BHH", 0, kind, 1) + options


def questions() -> list[bytes]:
    dice = random.Random(1)
    return [question(f"service-{dice.randrange(SERVICES)}.discoverd", dice.choice((_A, _SRV))) for _ in range(20_000)]


def connect(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(("127.0.0.1", port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    return sock


def check(answer: bytes) -> None:
    """Raise `RuntimeError` unless there are records in it: refusals are quick, and are no answers."""
    if answer[3] & 0x0F or answer[6:8] == b"\0\0":
        raise RuntimeError(f"no answer: {answer[:12].hex()}")


def rate(port: int, asked: list[bytes]) -> float:
    """Return the answers per second with `WINDOW` questions under way."""
    with connect(port) as sock:
        sock.settimeout(5.0)
        sent = 0
        for sent in range(WINDOW):
            sock.send(sent.to_bytes(2) + asked[sent])
        begin, count = time.monotonic(), 0
        while (now := time.monotonic()) - begin < SECONDS:
            for _ in range(100):
                check(sock.recv(4096))
                sent += 1
                sock.send((sent & 0xFFFF).to_bytes(2) + asked[sent % len(asked)])
                count += 1
        return count / (now - begin)


def p99_ms(port: int, asked: list[bytes]) -> float:
    """Return the 99th percentile at `RATE` questions a second, in milliseconds, from the sending to the arrival.

    The kernel says when an answer arrived: a client that has to wait for a core is no slow server. Questions never
    wait for answers.
    """
    total = int(RATE * SECONDS)
    sent_ns, took = [0] * total, [LOST_S] * total
    with connect(port) as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        begin, sent, received = time.monotonic(), 0, 0
        while received < total and time.monotonic() - begin < SECONDS + LOST_S:
            while sent < total and begin + sent / RATE <= time.monotonic():
                sent_ns[sent] = time.clock_gettime_ns(time.CLOCK_REALTIME)
                sock.send(sent.to_bytes(2) + asked[sent % len(asked)])
                sent += 1
            until = begin + sent / RATE if sent < total else begin + SECONDS + LOST_S
            if not select.select([sock], [], [], max(0.0, until - time.monotonic()))[0]:
                continue
            answer, extra, _, _ = sock.recvmsg(4096, 64)
            check(answer)
            number = int.from_bytes(answer[:2])
            seconds, nanoseconds = struct.unpack("qq", extra[0][2])
            took[number] = (seconds * 10**9 + nanoseconds - sent_ns[number]) / 1e9
            received += 1
    return sorted(took)[int(total * 0.99)] * 1000


async def fill(address: str) -> None:
    known = list(instances())
    async with Store(address) as store:
        for start in range(0, len(known), 100):
            puts = [
                Put(f"/discoverd/instances/{one.service}/{one.id}", msgspec.json.encode(one))
                for one in known[start : start + 100]
            ]
            await store.txn([], puts)


@contextmanager
def ours(folder: Path, port: int) -> Iterator[None]:
    socket_path = folder / "d.sock"
    flags = [f"--state-dir={folder / 'state'}", f"--socket={socket_path}", f"--dns-address=127.0.0.1:{port}"]
    with (folder / "discovery.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "discovery.daemon", *flags], stderr=log)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                BlockingCaller(f"unix://{socket_path}", timeout_s=5.0).request("GET", "/ping")
                break
            except ServiceError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "discovery.log").read_text()) from None
                time.sleep(0.05)
        asyncio.run(fill(f"unix://{socket_path}"))
        wait_answering(process, port, folder / "discovery.log")
        yield
    finally:
        process.terminate()
        process.wait()


@contextmanager
def unbound(folder: Path, port: int) -> Iterator[None]:
    lines = [
        "server:", "do-daemonize: no", 'chroot: ""', 'username: ""', 'directory: "/"', 'pidfile: ""', "use-syslog: no",
        "interface: 127.0.0.1", f"port: {port}", "num-threads: 1", 'module-config: "iterator"',
        'local-zone: "discoverd." static',
    ]  # fmt: skip
    for one in instances():
        name = f"{one.id}.{one.service}._i.discoverd."
        lines.append(f'local-data: "{one.service}.discoverd. 0 IN A {one.host}"')
        lines.append(f'local-data: "{one.service}.discoverd. 0 IN SRV 1 1 {one.port} {name}"')
        lines.append(f'local-data: "{name} 0 IN A {one.host}"')
    (folder / "unbound.conf").write_text("\n".join(lines) + "\nremote-control:\n control-enable: no\n")
    with (folder / "unbound.log").open("wb") as log:
        process = subprocess.Popen(["unbound", "-c", str(folder / "unbound.conf")], stderr=log)
    try:
        wait_answering(process, port, folder / "unbound.log")
        yield
    finally:
        process.terminate()
        process.wait()


def measure(rounds: int) -> list[Row]:
    asked = questions()
    ports = {"ours": free_port(), "peer": free_port()}
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    p99s: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory(prefix=f"hostd-bench-{os.getpid()}-") as name:
        folder = Path(name)
        with ours(folder, ports["ours"]), unbound(folder, ports["peer"]):
            for port in ports.values():
                rate(port, asked)
            for number in range(rounds):
                for arm in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
                    check_stop()
                    rates[arm].append(rate(ports[arm], asked))
                    p99s[arm].append(p99_ms(ports[arm], asked))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [
        row("dns_rps", rates["ours"], rates["peer"], "unbound, 1 thread, same names", "answer/s"),
        row("dns_p99", p99s["ours"], p99s["peer"], f"unbound, at {RATE}/s", "ms"),
    ]
