"""Requests per second and p99 through our router's HAProxy against a plain HAProxy with the same backends.

wrk with 64 connections that stay open, for a few seconds a round, on loopback. The backends are a third
HAProxy that answers 1 KB by itself.
"""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from bench.measure import Row, check_stop, row
from discovery.types import Instance
from router.config import Settings
from router.haproxy import Haproxy
from router.table import build
from router.types import Route

SECONDS = 3
CONNECTIONS = 64
ROUTES = 100


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


def start_plain(folder: Path, name: str, text: str, port: int) -> subprocess.Popen[bytes]:
    path = folder / f"{name}.cfg"
    path.write_text("defaults\n mode http\n timeout connect 3s\n timeout client 75s\n timeout server 75s\n" + text)
    process = subprocess.Popen(["haproxy", "-db", "-f", str(path)])
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.02)
    process.kill()
    raise RuntimeError(f"{name} does not listen on {port}")


def wrk(port: int) -> tuple[float, float]:
    """Return (requests per second, p99 in milliseconds).

    Raises:
        RuntimeError: an answer was not 2xx, or a connection failed: such a round measures nothing.
    """
    command = [
        "wrk",
        "-t1",
        f"-c{CONNECTIONS}",
        f"-d{SECONDS}s",
        "--latency",
        "-H",
        "Host: app50.test",
        f"http://127.0.0.1:{port}/",
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS + 30).stdout
    if "Non-2xx" in out or "Socket errors" in out:
        raise RuntimeError(out)
    rps = float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1])  # type: ignore[index]
    value, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)\b", out).groups()  # type: ignore[union-attr]
    return rps, float(value) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]


async def measure(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours_port, tls_port, plain_port, *backends = free_ports(5)
        static = f"http-request return status 200 content-type text/plain string {'x' * 1024}"
        answer = "".join(f"frontend b{p}\n bind 127.0.0.1:{p}\n {static}\n" for p in backends)
        servers = "".join(f" server s{p} 127.0.0.1:{p}\n" for p in backends)
        plain = f"frontend f\n bind 127.0.0.1:{plain_port}\n default_backend b\n"
        plain += f"backend b\n balance roundrobin\n http-reuse safe\n{servers}"
        ours = Haproxy(Settings(directory=folder, http_port=ours_port, https_port=tls_port, bind_address="127.0.0.1"))
        processes = []
        try:
            processes.append(start_plain(folder, "backend", answer, backends[0]))
            processes.append(start_plain(folder, "plain", plain, plain_port))
            routes = [Route(id=str(n), kind="http", service="web", domain=f"app{n}.test") for n in range(ROUTES)]
            instances = [Instance(id=str(p), service="web", host="127.0.0.1", port=p) for p in backends]
            await ours.apply(build(routes, {"web": instances}))
            pairs = []
            await asyncio.to_thread(wrk, ours_port)
            for number in range(rounds):
                order = [ours_port, plain_port] if number % 2 == 0 else [plain_port, ours_port]
                found = {}
                for port in order:
                    check_stop()
                    found[port] = await asyncio.to_thread(wrk, port)
                pairs.append((found[ours_port], found[plain_port]))
        finally:
            await ours.stop()
            for process in processes:
                process.kill()
                process.wait()
    peer = "HAProxy, 2 servers, no routing"
    return [
        row("router_rps", [a[0] for a, _ in pairs], [b[0] for _, b in pairs], peer, "req/s"),
        row("router_p99", [a[1] for a, _ in pairs], [b[1] for _, b in pairs], peer, "ms"),
    ]


def main(rounds: int = 7) -> list[Row]:
    return asyncio.run(measure(rounds))
