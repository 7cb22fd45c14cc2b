"""The terminal's end of an attach connection: this process's stdin, stdout and stderr become those of a job.

Used by `flynn run`, `hostd run` and whatever else attaches to a job. With a terminal it goes raw, so
that every key (Ctrl-C too) reaches the job, and tells the job about every resize; without one,
stdin is sent until its end and the usual signals are passed on. It blocks until the job has ended and
returns its exit status. It does not start jobs, and it needs the main thread (it owns the signals).

One `poll` loop, no thread, no asyncio: commands must start fast. wsproto is imported only here.
"""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import socket
import ssl
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.utilities import ProtocolError

from discovery.wire import attach as frames
from discovery.wire import clock
from discovery.wire.blocking import BlockingCaller
from discovery.wire.errors import DeadlineExceeded, Invalid, ServiceError, Unavailable, error_of

READ_BYTES = 32 * 1024
"""At least one TLS record (16 KiB), so that nothing stays behind in the TLS layer where `poll` cannot see it."""
READS_IN_A_ROW = 8
"""Then keys and signals get their turn: Ctrl-C must reach a job that floods us."""
OUTGOING_BYTES_MAX = 256 * 1024
"""Above this, stdin is not read: the job's slowness reaches whoever writes into us."""
PING_AFTER_S = 30.0
SILENCE_S = 90.0
HANGUP_GRACE_S = 5.0
SIGNAL_S = 5.0
INTERRUPTS_UNTIL_LEAVING = 3
DETACHED = 256
"""What `attach` returns, no exit status, when the person has left the job running."""
BROKEN_PIPE_STATUS = 128 + signal.SIGPIPE

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_WATCHED = (*_PASSED_ON, signal.SIGWINCH, signal.SIGCONT)


def is_terminal() -> bool:
    """Say whether a person sits there: both stdin and stdout are a terminal."""
    try:
        return os.isatty(0) and os.isatty(1)
    except OSError:
        return False


def size(descriptor: int = 1) -> tuple[int, int]:
    """Return rows and columns of a terminal; 24 x 80 when it does not know."""
    try:
        columns, rows = os.get_terminal_size(descriptor)
    except OSError:
        return 24, 80
    return rows or 24, columns or 80


def attach(
    caller: BlockingCaller,
    path: str,
    *,
    has_tty: bool,
    stdin: int | None = 0,
    stdout: int = 1,
    stderr: int = 2,
    on_open: Callable[[], None] | None = None,
    first: str = "",
    detach_keys: bytes = b"",
    signal_path: str = "",
) -> int:
    """Be the terminal of the job behind the attach endpoint `path`; return its exit status, 0 to 255.

    Args:
        caller: reaches the server (its socket, key and pin are used).
        path: path and query of the endpoint, already quoted.
        has_tty: the job has a pseudo-terminal; `stdin` is put into raw mode if it is a terminal.
        stdin: descriptor to send; `None` only watches and leaves the job's stdin open.
        stdout: where the job's output goes.
        stderr: where the job's standard error goes (nothing when it has a pseudo-terminal).
        first: text that the endpoint wants as its first message.
        detach_keys: what to type, on a terminal in raw mode, to leave the job running: `DETACHED` is returned.
        signal_path: where a signal can be posted to when stdin is stuck on its way: it would wait behind it.
        on_open: called once the server has let us in, before the first byte (to take a spinner away).

    Raises:
        ServiceError: the server's refusal, before or in the middle; `Unavailable` when the connection breaks.
    """
    with ExitStack() as stack:
        link = stack.enter_context(_Link.open(caller, path))
        if on_open is not None:
            on_open()
        if first:
            link.outgoing += link.protocol.send(TextMessage(first))
        session = _Session(link, has_tty, stdin, stdout, stderr)
        session.typed = _Typed(detach_keys)
        if signal_path:
            session.signal_aside = lambda number: _post_signal(caller, signal_path, number)
        session.wake = stack.enter_context(_signals())
        if has_tty and stdin is not None and os.isatty(stdin):
            stack.enter_context(_raw(stdin))
            session.raw = stdin
        return session.run()


class _Link:
    """One WebSocket over one socket: frames in, frames out, never blocking after the handshake."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.sock = sock
        self.address = address
        self.protocol = WSConnection(ConnectionType.CLIENT)
        self.outgoing = bytearray()
        self.heard_at = clock.monotonic_s()
        self.is_closed = False
        self._partial = bytearray()

    @classmethod
    @contextmanager
    def open(cls, caller: BlockingCaller, path: str) -> Iterator[_Link]:
        """Connect and upgrade.

        Raises:
            ServiceError: what the server answered instead of the upgrade.
        """
        with caller.connect() as sock:
            link = cls(sock, caller.address)
            link._handshake(caller, path)
            sock.setblocking(False)
            yield link

    def _handshake(self, caller: BlockingCaller, path: str) -> None:
        headers = [(name.encode(), value.encode()) for name, value in caller.headers().items()]
        try:
            request = Request(host=caller.host(), target=caller.prefix + path, extra_headers=headers)
            self.sock.sendall(self.protocol.send(request))
            refusal: RejectConnection | None = None
            body = b""
            while True:
                data = self.sock.recv(READ_BYTES)
                self.protocol.receive_data(data or None)
                for event in self.protocol.events():
                    match event:
                        case AcceptConnection():
                            return
                        case RejectConnection():
                            refusal = event
                        case RejectData():
                            body += event.data
                    if refusal and (not refusal.has_body or (isinstance(event, RejectData) and event.body_finished)):
                        raise error_of(refusal.status_code, body, self.address)
                if not data:
                    raise Unavailable(f"{self.address}: the connection ended while attaching")
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.address}: no answer to attach in {caller.timeout_s:g} s") from error
        except (OSError, ProtocolError) as error:
            raise Unavailable(f"{self.address}: cannot attach: {error}") from error

    def send(self, frame: frames.Frame) -> None:
        """Queue one frame."""
        if not self.is_closed:
            self.outgoing += self.protocol.send(BytesMessage(data=frames.encode(frame)))

    def ping(self) -> None:
        """Queue a ping: its answer proves that the other side is alive."""
        if not self.is_closed:
            self.outgoing += self.protocol.send(Ping())

    def flush(self) -> None:
        """Send what the socket takes now.

        Raises:
            OSError: the connection broke.
        """
        try:
            while self.outgoing:
                # Never sliced: TLS insists that a retried write is at least as long as the first try.
                sent = self.sock.send(self.outgoing)
                del self.outgoing[:sent]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass

    def receive(self) -> Iterator[frames.Frame]:
        """Yield the frames that have arrived.

        Raises:
            OSError: the connection broke.
            Invalid: the other side does not speak our frames.
        """
        try:
            yield from self._frames()  # what came together with the handshake
            for _ in range(READS_IN_A_ROW):
                data = self.sock.recv(READ_BYTES)
                self.heard_at = clock.monotonic_s()
                self.protocol.receive_data(data or None)
                yield from self._frames()
                if not data:
                    self.is_closed = True
                if self.is_closed:
                    return
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except ProtocolError as error:
            raise OSError(f"not a WebSocket any more: {error}") from error

    def _frames(self) -> Iterator[frames.Frame]:
        for event in self.protocol.events():
            match event:
                case BytesMessage():
                    self._partial += event.data
                    if event.message_finished or len(self._partial) > frames.FRAME_BYTES_MAX:
                        message, self._partial = bytes(self._partial), bytearray()
                        yield frames.decode(message)
                case Ping():
                    self.outgoing += self.protocol.send(event.response())
                case CloseConnection():
                    self.outgoing += self.protocol.send(event.response())
                    self.is_closed = True
                    return
                case TextMessage():
                    raise ProtocolError("a text message")
                case Pong():
                    pass


def detach_keys_of(text: str) -> bytes:
    r"""Read what to type to detach, such as `ctrl-p,ctrl-q`; nothing means never.

    Raises:
        Invalid: a key is neither one character nor `ctrl-` and one of a-z @ [ \ ] ^ _.
    """
    found = bytearray()
    for key in text.split(",") if text else ():
        if re.fullmatch(r"ctrl-[a-z@\[\\\]^_]", key):
            found.append(ord(key[-1].upper()) & 0x1F)
        elif len(key) == 1 and key.isascii():
            found.append(ord(key))
        else:
            raise Invalid(f"detach key {key!r}", hint="such as ctrl-p,ctrl-q")
    return bytes(found)


class _Typed:
    """Looks for the detach keys in what is typed, and holds back what may be their beginning."""

    def __init__(self, keys: bytes) -> None:
        self.is_detached = False
        self._keys = keys
        self._held = b""

    def take(self, data: bytes) -> bytes:
        """Return what the job gets of `data`."""
        if not self._keys:
            return data
        passed = bytearray()
        for byte in data:
            self._held += bytes((byte,))
            while not self._keys.startswith(self._held):
                passed.append(self._held[0])
                self._held = self._held[1:]
            if self._held == self._keys:
                self.is_detached = True
                break
        return bytes(passed)


class _Session:
    """The loop between three descriptors, the signals and the link."""

    def __init__(self, link: _Link, has_tty: bool, stdin: int | None, stdout: int, stderr: int) -> None:
        self.link = link
        self.has_tty = has_tty
        self.stdin = stdin
        self.outputs = {frames.STDOUT: stdout, frames.STDERR: stderr}
        self.screen = stdout if os.isatty(stdout) else (stdin if stdin is not None else stdout)
        self.typed = _Typed(b"")
        self.signal_aside: Callable[[int], None] | None = None
        self.told_size: tuple[int, int] | None = None
        self.wake = -1
        self.raw: int | None = None
        self.interrupts = 0
        self.hung_up_at: float | None = None
        self.is_pinged = False

    def run(self) -> int:
        """Carry bytes until the job's exit status arrives."""
        if self.has_tty:
            self._resize()
        try:
            while True:
                status = self._turn()
                if status is not None:
                    return status
        except OSError as error:
            raise Unavailable(
                f"{self.link.address}: the connection broke: {error}", hint="the job may still be running"
            ) from error

    def _turn(self) -> int | None:
        for frame in self.link.receive():
            status = self._on_frame(frame)
            if status is not None:
                return status
        if self.link.is_closed:
            raise OSError("closed before the job's exit status came")
        self.link.flush()
        ready = self._wait()
        if self.wake in ready:
            for number in os.read(self.wake, 512):
                self._on_signal(number)
            if self.interrupts >= INTERRUPTS_UNTIL_LEAVING:
                return 128 + signal.SIGINT
        if self.stdin is not None and self.stdin in ready:
            self._read_stdin(self.stdin)
            if self.typed.is_detached:
                self.link.flush()
                return DETACHED
        return self._check_time()

    def _wait(self) -> set[int]:
        poll = select.poll()
        link = self.link.sock.fileno()
        poll.register(link, select.POLLIN | (select.POLLOUT if self.link.outgoing else 0))
        poll.register(self.wake, select.POLLIN)
        if self.stdin is not None and len(self.link.outgoing) < OUTGOING_BYTES_MAX:
            poll.register(self.stdin, select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(1000 if self.hung_up_at is not None else 5000)}

    def _check_time(self) -> int | None:
        now = clock.monotonic_s()
        if self.hung_up_at is not None and now - self.hung_up_at > HANGUP_GRACE_S:
            return BROKEN_PIPE_STATUS
        silence_s = now - self.link.heard_at
        if silence_s > SILENCE_S:
            raise OSError(f"not a word from the other side for {silence_s:.0f} s")
        if silence_s > PING_AFTER_S and not self.is_pinged:
            self.link.ping()
        self.is_pinged = silence_s > PING_AFTER_S
        return None

    def _read_stdin(self, stdin: int) -> None:
        try:
            data = os.read(stdin, READ_BYTES)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EINTR):
                return
            data = b""  # EIO: the terminal is gone; EBADF: there never was a stdin
        if not data:
            self.stdin = None
            if self.raw is not None:  # our terminal is gone; what is piped into a job's terminal just ends
                self.link.send(frames.Signal(signal.SIGHUP))
                return
        elif self.raw is not None:
            data = self.typed.take(data)
            if not data:
                return
        self.link.send(frames.Data(frames.STDIN, data))

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self._resize()
        elif number == signal.SIGCONT:
            if self.raw is not None:
                tty.setraw(self.raw, termios.TCSADRAIN)
            self._resize()
        else:
            if number == signal.SIGINT:
                self.interrupts += 1
            if self.link.outgoing and self.signal_aside is not None:
                self.signal_aside(number)
            else:
                self.link.send(frames.Signal(number))

    def _resize(self) -> None:
        if self.has_tty:
            now = size(self.screen)
            if now != self.told_size:  # a window that is dragged sends hundreds of signals
                self.told_size = now
                self.link.send(frames.Resize(*now))

    def _on_frame(self, frame: frames.Frame) -> int | None:
        match frame:
            case frames.Data(stream, payload) if stream in self.outputs and payload:
                self._write(self.outputs[stream], payload)
            case frames.Exit(status):
                return status & 0xFF
            case frames.Error(body):
                raise ServiceError.from_body(body)
        return None

    def _write(self, descriptor: int, payload: bytes) -> None:
        if self.hung_up_at is not None:
            return
        try:
            _write_all(descriptor, payload)
        except OSError:
            # Nobody reads us any more (`flynn run yes | head -1`): tell the job as a terminal would, then leave.
            self.hung_up_at = clock.monotonic_s()
            self.link.send(frames.Signal(signal.SIGHUP))


def _post_signal(caller: BlockingCaller, path: str, number: int) -> None:
    with suppress(ServiceError):  # it may have ended just now
        caller.request("POST", path, body={"number": number}, timeout_s=SIGNAL_S)


def _write_all(descriptor: int, payload: bytes) -> None:
    view = memoryview(payload)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # somebody made our stdout non-blocking
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()


@contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor, termios.TCSADRAIN)  # DRAIN, not FLUSH: what was typed ahead is for the job
    try:
        yield
    finally:
        with suppress(termios.error):  # it is gone. NOW: a terminal that takes no output must not keep us here
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


@contextmanager
def _signals() -> Iterator[int]:
    """Turn the watched signals into bytes (their numbers) on the descriptor that is yielded."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _WATCHED}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        for number in _WATCHED:
            if before[number] is not signal.SIG_IGN:  # nohup and friends asked for that
                signal.signal(number, lambda *_: None)
        yield reader
    finally:
        for watched, handler in before.items():
            signal.signal(watched, handler if handler is not None else signal.SIG_DFL)
        signal.set_wakeup_fd(wakeup)
        os.close(reader)
        os.close(writer)
