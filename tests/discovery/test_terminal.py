"""`wire.terminal` against a real server that runs a real program, with real pseudo-terminals and pipes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import select
import signal
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from discovery.wire import attach, serve
from discovery.wire.blocking import certificate_pin
from discovery.wire.errors import Conflict, NotFound

CLIENT = """
import sys
from discovery.wire.blocking import BlockingCaller
from discovery.wire.errors import ServiceError
from discovery.wire.terminal import attach
try:
    reach = {"pin": sys.argv[4], "connect_to": "127.0.0.1"} if len(sys.argv) > 4 else {}
    caller = BlockingCaller(sys.argv[1], key="sesame", timeout_s=5, **reach)
    sys.exit(attach(caller, sys.argv[2], has_tty=sys.argv[3] == "tty", stdin=None if sys.argv[3] == "watch" else 0))
except ServiceError as error:
    print(f"{type(error).__name__}: {error.message}", file=sys.stderr)
    sys.exit(error.exit_code)
"""
DEADLINE_S = 20.0


class Server:
    """Answers attach requests by running programs; keeps what the client sent for the tests to see."""

    def __init__(self) -> None:
        self.frames: list[attach.Frame] = []
        self.headers: dict[str, str] = {}
        self.pids: list[int] = []

    async def run(self, call: serve.Call) -> Any:
        """Run `sh -c` of `?sh=` with pipes, or on a pty with `?tty=1`, speaking attach frames."""
        self.headers = dict(call.raw.headers)
        has_tty = call.flag("tty")
        async with serve.open_websocket(call) as websocket:
            if has_tty:
                main, sub = pty.openpty()
                stdin = stdout = stderr = sub
            else:
                stdin = stdout = stderr = subprocess.PIPE
            process = await asyncio.create_subprocess_exec(
                "setsid", "-w", *(["-c"] if has_tty else []), "sh", "-c", call.query["sh"],
                stdin=stdin, stdout=stdout, stderr=stderr,
            )  # fmt: skip
            self.pids.append(process.pid)
            async with asyncio.TaskGroup() as group:
                if has_tty:
                    os.close(sub)
                    pumps = [group.create_task(self._pump_pty(main, websocket))]
                else:
                    main = -1
                    assert process.stdout is not None
                    assert process.stderr is not None
                    pumps = [
                        group.create_task(self._pump(process.stdout, attach.STDOUT, websocket)),
                        group.create_task(self._pump(process.stderr, attach.STDERR, websocket)),
                    ]
                reading = group.create_task(self._read(websocket, process, main))
                await asyncio.wait(pumps)
                status = await process.wait()
                status = 128 - status if status < 0 else status
                reading.cancel()
                if not websocket.closed:
                    await websocket.send_bytes(attach.encode(attach.Exit(status)))
        return websocket

    async def _pump(self, reader: asyncio.StreamReader, stream: int, websocket: Any) -> None:
        while data := await reader.read(32768):
            if not websocket.closed:
                await websocket.send_bytes(attach.encode(attach.Data(stream, data)))

    async def _pump_pty(self, main: int, websocket: Any) -> None:
        while True:
            try:
                data = await asyncio.to_thread(os.read, main, 4096)
            except OSError:
                return
            await websocket.send_bytes(attach.encode(attach.Data(attach.STDOUT, data)))

    async def _read(self, websocket: Any, process: asyncio.subprocess.Process, main: int) -> None:
        async for frame in serve.frames(websocket):
            self.frames.append(frame)
            match frame:
                case attach.Data(_, payload) if main >= 0:
                    os.write(main, payload)
                case attach.Data(_, payload):
                    assert process.stdin is not None
                    if payload:
                        process.stdin.write(payload)
                        await process.stdin.drain()
                    else:
                        process.stdin.close()
                case attach.Resize(rows, columns) if main >= 0:
                    fcntl.ioctl(main, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
                case attach.Signal(number):
                    os.killpg(_child_of(process.pid), number)

    async def refuse(self, call: serve.Call) -> Any:
        raise NotFound("no such job", hint="flynn ps")

    async def fail(self, call: serve.Call) -> Any:
        async with serve.open_websocket(call):
            raise Conflict("the job went away")

    async def hang_up(self, call: serve.Call) -> Any:
        async with serve.open_websocket(call) as websocket:
            await websocket.send_bytes(attach.encode(attach.Data(attach.STDOUT, b"half")))
        return websocket

    async def instant(self, call: serve.Call) -> Any:
        async with serve.open_websocket(call) as websocket:
            await websocket.send_bytes(attach.encode(attach.Data(attach.STDOUT, b"x" * 65536)))
            await websocket.send_bytes(attach.encode(attach.Exit(7)))
        return websocket


def _child_of(pid: int) -> int:
    """Return the process group of the program: `setsid -w` either became it or forked it."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(text[0]) if text and os.getpgid(int(text[0])) == int(text[0]) else pid


@contextmanager
def serving(listen: Callable[[web.Application], AbstractAsyncContextManager[Any]]) -> Iterator[Server]:
    """A server in a thread of its own."""
    told = Server()
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        handlers = {
            "run": told.run, "refuse": told.refuse, "fail": told.fail, "hang": told.hang_up, "instant": told.instant,
        }  # fmt: skip
        endpoints = [
            serve.Endpoint(method="GET", path=f"/{name}", handler=handler, summary=name, kind="websocket")
            for name, handler in handlers.items()
        ]
        async with listen(serve.application("test", "1", endpoints)):
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    try:
        assert ready.wait(DEADLINE_S)
        yield told
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(DEADLINE_S)
        loop.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Server, str]]:
    """A server on a unix socket."""
    path = tmp_path / "s.sock"
    with serving(lambda app: serve.listen_unix(app, path)) as told:
        yield told, f"unix://{path}"


def self_signed(folder: Path) -> tuple[ssl.SSLContext, str]:
    """Make a certificate; returns the server's side of it and its pin."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "controller.example.test")])
    start = datetime(2020, 1, 1, tzinfo=UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, start, start + timedelta(days=40000))
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "c.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "k.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "c.pem", folder / "k.pem")
    return context, certificate_pin(certificate.public_bytes(serialization.Encoding.DER))


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A server behind TLS; its URL, with a name that is not in DNS, and its pin."""
    context, pin = self_signed(tmp_path)
    port: list[int] = []

    @asynccontextmanager
    async def listen(app: web.Application) -> AsyncIterator[None]:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        port.append(runner.addresses[0][1])
        yield
        await runner.cleanup()

    with serving(listen):
        yield f"https://controller.example.test:{port[0]}", pin


def client(address: str, path: str, mode: str = "pipe") -> list[str]:
    return [sys.executable, "-c", CLIENT, address, path, mode]


def run_path(script: str, **switches: str) -> str:
    from urllib.parse import urlencode

    return "/run?" + urlencode({"sh": script, **switches})


def piped(address: str, script: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        client(address, run_path(script)), input=stdin, capture_output=True, timeout=DEADLINE_S, check=False
    )


def wait_until(condition: Callable[[], Any], what: str) -> None:
    limit = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.01)


class Terminal:
    """A person at a real terminal, running the client on it."""

    def __init__(self, command: list[str], rows: int = 31, columns: int = 101) -> None:
        self.seen = b""
        self.pid, self.main = pty.fork()
        if self.pid == 0:
            os.execv(command[0], command)
        self.resize(rows, columns)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.main, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.main, text)

    def until(self, wanted: bytes) -> bytes:
        """Read until `wanted` shows up; returns everything since the last call."""
        limit = time.monotonic() + DEADLINE_S
        while wanted not in self.seen:
            assert time.monotonic() < limit, (wanted, self.seen)
            if select.select([self.main], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.main, 65536)
                except OSError:
                    assert wanted in self.seen, (wanted, self.seen)
        before, self.seen = self.seen, b""
        return before

    def mode(self) -> list[Any]:
        return termios.tcgetattr(self.main)

    def wait(self) -> int:
        limit = time.monotonic() + DEADLINE_S
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < limit, self.seen
            if select.select([self.main], [], [], 0.05)[0]:
                try:
                    self.seen += os.read(self.main, 65536)
                except OSError:
                    time.sleep(0.01)

    def close(self) -> None:
        os.close(self.main)
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@pytest.fixture
def sit_at() -> Iterator[Callable[[list[str]], Terminal]]:
    with ExitStack() as stack:

        def sit(command: list[str]) -> Terminal:
            terminal = Terminal(command)
            stack.callback(terminal.close)
            return terminal

        yield sit


def test_exit_status_and_both_streams_arrive(server: tuple[Server, str]) -> None:
    done = piped(server[1], "echo out; echo err >&2; exit 42")
    assert (done.returncode, done.stdout, done.stderr) == (42, b"out\n", b"err\n")
    assert server[0].headers["Authorization"].startswith("Basic ")


def test_stdin_is_sent_whole_and_its_end_too(server: tuple[Server, str]) -> None:
    payload = os.urandom(3_000_000)
    done = piped(server[1], "cat", payload)
    assert done.returncode == 0
    assert done.stdout == payload


def test_over_tls_with_a_pin_and_an_address(tls_server: tuple[str, str]) -> None:
    address, pin = tls_server
    payload = os.urandom(3_000_000)
    command = [*client(address, run_path("cat; exit 4")), pin]
    done = subprocess.run(command, input=payload, capture_output=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stderr) == (4, b"")
    assert done.stdout == payload


def test_another_pin_is_refused(tls_server: tuple[str, str]) -> None:
    command = [*client(tls_server[0], run_path("echo no")), "Hey8twCAAZtTJBc8QO7zyOhh+EOMRU6MHdAv5Sb32og="]
    done = subprocess.run(command, capture_output=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stdout) == (77, b"")


def test_a_signal_death_is_128_plus_number(server: tuple[Server, str]) -> None:
    assert piped(server[1], "kill -9 $$").returncode in (137, 265 & 0xFF)


def test_refusal_before_the_upgrade_keeps_its_class(server: tuple[Server, str]) -> None:
    done = subprocess.run(client(server[1], "/refuse"), capture_output=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stderr) == (NotFound.exit_code, b"NotFound: no such job\n")


def test_error_frame_keeps_its_class(server: tuple[Server, str]) -> None:
    done = subprocess.run(client(server[1], "/fail"), capture_output=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stderr) == (Conflict.exit_code, b"Conflict: the job went away\n")


def test_connection_that_ends_without_status_is_unavailable(server: tuple[Server, str]) -> None:
    done = subprocess.run(client(server[1], "/hang"), capture_output=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 69
    assert done.stdout == b"half"


def test_nobody_there_is_unavailable(tmp_path: Path) -> None:
    done = subprocess.run(client(f"unix://{tmp_path}/no", "/x"), capture_output=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 69


def test_output_that_comes_with_the_handshake_is_not_lost(server: tuple[Server, str]) -> None:
    for _ in range(5):
        done = subprocess.run(client(server[1], "/instant"), capture_output=True, timeout=DEADLINE_S, check=False)
        assert (done.returncode, len(done.stdout)) == (7, 65536)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_passed_on(server: tuple[Server, str], number: signal.Signals) -> None:
    script = f"trap 'echo got; exit 9' {number.value}; echo ready; while :; do sleep 0.05; done"
    process = subprocess.Popen(client(server[1], run_path(script)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == b"got\n"
        assert process.wait(DEADLINE_S) == 9


def test_three_interrupts_leave_a_job_that_ignores_them(server: tuple[Server, str]) -> None:
    script = "trap '' INT; echo ready; while :; do sleep 0.05; done"
    process = subprocess.Popen(client(server[1], run_path(script)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        for count in range(1, 4):
            process.send_signal(signal.SIGINT)
            if count < 3:
                wait_until(lambda: server[0].frames.count(attach.Signal(2)) >= count, "signal frame")  # noqa: B023
        assert process.wait(DEADLINE_S) == 130
    os.killpg(_child_of(server[0].pids[0]), signal.SIGKILL)


def test_a_reader_that_leaves_ends_the_job(server: tuple[Server, str]) -> None:
    process = subprocess.Popen(
        client(server[1], run_path("exec yes")), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    with process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 128 + signal.SIGHUP


def test_watching_leaves_stdin_open(server: tuple[Server, str]) -> None:
    script = "echo ready; read line; echo closed; exit 3"
    process = subprocess.Popen(
        client(server[1], run_path(script), "watch"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert attach.Data(attach.STDIN, b"") not in server[0].frames
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) in (15, 143)


def test_a_terminal_is_usable(server: tuple[Server, str], sit_at: Callable[[list[str]], Terminal]) -> None:
    script = "stty size; trap 'echo interrupted' INT; read line; echo line=$line; exit 5"
    terminal = sit_at(client(server[1], run_path(script, tty="1"), "tty"))
    before = terminal.mode()
    wait_until(lambda: any(isinstance(f, attach.Resize) for f in server[0].frames), "size")
    terminal.type(b"hello\r")
    terminal.until(b"line=hello")
    assert terminal.wait() == 5
    assert terminal.mode() == before


def test_control_c_reaches_the_job_as_a_key(
    server: tuple[Server, str], sit_at: Callable[[list[str]], Terminal]
) -> None:
    script = "trap 'echo interrupted; exit 6' INT; echo ready; while :; do sleep 0.05; done"
    terminal = sit_at(client(server[1], run_path(script, tty="1"), "tty"))
    terminal.until(b"ready\r\n")
    terminal.type(b"\x03")
    terminal.until(b"interrupted")
    assert terminal.wait() == 6
    assert not any(isinstance(frame, attach.Signal) for frame in server[0].frames)


def test_control_c_stops_a_flood(server: tuple[Server, str], sit_at: Callable[[list[str]], Terminal]) -> None:
    terminal = sit_at(client(server[1], run_path("trap 'echo; echo stopped; exit 8' INT; yes; :", tty="1"), "tty"))
    terminal.until(b"y\r\ny")
    terminal.type(b"\x03")
    assert terminal.wait() == 8


def test_resize_reaches_the_job(server: tuple[Server, str], sit_at: Callable[[list[str]], Terminal]) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do read line && exit 0; done"
    terminal = sit_at(client(server[1], run_path(script, tty="1"), "tty"))
    terminal.until(b"ready\r\n")
    terminal.resize(40, 120)
    terminal.until(b"40 120")
    assert attach.Resize(40, 120) in server[0].frames
    terminal.type(b"x\r")
    assert terminal.wait() == 0


def test_a_broken_connection_gives_the_terminal_back(
    server: tuple[Server, str], sit_at: Callable[[list[str]], Terminal]
) -> None:
    terminal = sit_at(client(server[1], "/hang", "tty"))
    before = terminal.mode()
    assert terminal.wait() == 69
    assert terminal.mode() == before


def test_a_terminal_that_closes_hangs_up_the_job(
    server: tuple[Server, str], sit_at: Callable[[list[str]], Terminal]
) -> None:
    terminal = sit_at(client(server[1], run_path("echo ready; while :; do sleep 0.05; done", tty="1"), "tty"))
    terminal.until(b"ready\r\n")
    os.kill(terminal.pid, signal.SIGHUP)
    assert terminal.wait() == 129
    assert attach.Signal(signal.SIGHUP) in server[0].frames
