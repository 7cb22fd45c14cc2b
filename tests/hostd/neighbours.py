"""Hostile jobs with default limits, a well-behaved service beside them, and a client that measures it."""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass

from hostd.types import Job, JobSpec, Port, Resources
from tests.hostd.node import Node, wait_until

SERVICE = """
import asyncio, os
BODY = b"x" * 1024
ANSWER = b"HTTP/1.1 200 OK\\r\\nContent-Length: 1024\\r\\n\\r\\n" + BODY
async def serve(reader, writer):
    try:
        while await reader.readuntil(b"\\r\\n\\r\\n"):
            writer.write(ANSWER)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
async def main():
    async with await asyncio.start_server(serve, "0.0.0.0", int(os.environ["PORT"])) as server:
        await server.serve_forever()
asyncio.run(main())
"""

HOG = """
import os, sys, time
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:  # children first: the job survives those kills
    if not (child := os.fork()):
        held = []
        while True: held.append(bytearray(os.urandom(4096)) * 1024)
    os.waitpid(child, 0)
held = []
while True: held.append(bytearray(os.urandom(4096)) * 1024)
"""

BOMB = """
import os
while True:
    try: os.fork()
    except OSError: pass
"""

FILLER = """
import os, sys, time
end = time.monotonic() + float(sys.argv[1])
block = os.urandom(1 << 20)
while True:
    fd = os.open("/big", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        while True:
            if os.write(fd, block) < len(block): os.write(fd, b"x" * (1 << 20))
    except OSError:
        if time.monotonic() > end: raise
    finally:
        os.close(fd)
"""

OPENER = """
import os, sys, time
end = time.monotonic() + float(sys.argv[1])
while True:
    held = []
    try:
        while True: held.append(os.open("/etc/passwd", os.O_RDONLY))
    except OSError:
        if time.monotonic() > end: raise
    for fd in held: os.close(fd)
"""

FLOODER = """
import os
line = (b"y" * 99 + b"\\n") * 600
while True: os.write(1, line)
"""

CLIENT = """
import json, socket, sys, time
host, port, seconds, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
connection = socket.create_connection((host, port), timeout=30)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
took, failed = [], 0
begin = time.monotonic()
for number in range(int(seconds * rate)):
    due = begin + number / rate
    if (pause := due - time.monotonic()) > 0: time.sleep(pause)
    began = time.monotonic()
    connection.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    got = b""
    while not got.endswith(b"x" * 1024): got += connection.recv(65536) or sys.exit("closed")
    failed += not got.startswith(b"HTTP/1.1 200 ")
    took.append(time.monotonic() - began)
print(json.dumps({"took_ms": [1000 * t for t in took], "failed": failed}))
"""
"""One connection, `rate` requests a second; a late answer delays the next request and is seen in its own time only."""


@dataclass(frozen=True)
class Measured:
    """What the client saw."""

    took_ms: tuple[float, ...]
    failed: int

    def percentile(self, percent: float) -> float:
        return sorted(self.took_ms)[max(0, math.ceil(len(self.took_ms) * percent / 100) - 1)]


def spec(node: Node, job_id: str, script: str, *words: str, **more: object) -> JobSpec:
    """A default job: default limits, weights and protections."""
    more.setdefault("resources", Resources())
    return node.spec(job_id, "/usr/bin/python3", "-c", script, *words, image="system", **more)


def start_service(node: Node) -> Job:
    node.start(spec(node, "service", SERVICE, ports=(Port(service="service"),)))
    wait_until("the service runs", lambda: node.job("service").status == "running", 180)
    return node.wait_up("service")


def hostile(node: Node, seconds: float, resources: Resources | None = None, *, prefix: str = "") -> list[JobSpec]:
    """The neighbours; hog, filler and opener end by their own excess after `seconds`, the others never do."""
    given = {"resources": resources or Resources()}
    return [
        spec(node, f"{prefix}hog", HOG, str(seconds), **given),
        spec(node, f"{prefix}bomb", BOMB, **given),
        spec(node, f"{prefix}filler", FILLER, str(seconds), **given),
        spec(node, f"{prefix}opener", OPENER, str(seconds), **given),
        spec(node, f"{prefix}flooder", FLOODER, **given),
    ]


def measure_outside(node: Node, service: Job, seconds: float, rate: float = 100.0) -> Measured:
    """Ask the service for a while, from an ordinary process of the host.

    Raises:
        AssertionError: it closed the connection, or did not answer in 30 s.
    """
    words = (service.host_ip, str(service.ports[0]), str(seconds), str(rate))
    done = node.python("-c", CLIENT, *words, timeout_s=seconds * 5 + 120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return Measured(tuple(found["took_ms"]), found["failed"])


def measure(node: Node, service: Job, seconds: float, rate: float = 100.0) -> Measured:
    """Ask the service for a while, from a default job beside it, as the router is.

    Raises:
        AssertionError: it closed the connection, or did not answer in 30 s.
    """
    job_id = f"client-{secrets.token_hex(4)}"
    words = (service.host_ip, str(service.ports[0]), str(seconds), str(rate))
    node.start(spec(node, job_id, CLIENT, *words))
    wait_until("the client is done", lambda: node.job(job_id).ended_at, seconds * 5 + 120)
    printed = node.log(job_id)
    assert node.job(job_id).exit_status == 0, printed
    found = json.loads(printed[-1])
    return Measured(tuple(found["took_ms"]), found["failed"])
