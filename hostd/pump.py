"""Move bytes between a job's pipes (or terminal) and its log and attached clients.

`Output` has the log take what the job prints (the bytes of a pipe go straight to the disk, see `joblog`) and hands it
to whoever is attached; a client that cannot keep up holds the job back rather than losing bytes. Each pipe has its
turn, and no more than a MiB in it, so that a flood keeps nobody else waiting. A job that yields (`hostd.yielding`) also
does so with what hostd does for it: it is read more slowly, its pipe fills, and it waits. `Input` writes to the job's
stdin. Both own their file descriptors. Made by `lifecycle`, used by `attach`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from discovery.wire.attach import STDERR, STDIN, STDOUT
from discovery.wire.errors import Conflict
from hostd.errors import JobNotRunning
from hostd.joblog import JobLog
from hostd.runtime.process import Spawned

_READ_BYTES = 256 * 1024
_LISTENER_BYTES_MAX = 4 * 1024 * 1024
_PIPE_BYTES = 256 * 1024
"""What a job can print while nobody reads, as when hostd is being replaced; and a larger chunk is a cheaper one."""
SLOW_BYTES_PER_S = 16 * 1024 * 1024
"""So much of a job that yields is read: some 3 % of a core, and a disk that keeps up."""
HELD_BACK = 0.25
"""Who prints so much of that, with what is left of the CPU, would print more."""
_TTY_END_OF_FILE = b"\x04"


class Listener:
    """What one attached client has yet to get."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._queue: asyncio.Queue[tuple[int, bytes] | None] = asyncio.Queue()
        self.bytes_waiting = 0

    def put(self, stream: int, data: bytes) -> None:
        """Add what a stream brought; no bytes mean that the stream has ended."""
        self.bytes_waiting += len(data)
        self._queue.put_nowait((stream, data))

    def end(self) -> None:
        """Say that nothing more will come."""
        self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[tuple[int, bytes]]:
        while (item := await self._queue.get()) is not None:
            self.bytes_waiting -= len(item[1])
            self._output.resume()
            yield item


class Output:
    """Reads a job's stdout and stderr (or terminal) until they end."""

    def __init__(self, fds: Spawned, job_log: JobLog | None) -> None:
        self._log = job_log
        self._listeners: set[Listener] = set()
        self._is_paused = False
        self._may_pause = True
        self._is_slow = False
        self._slow_bytes, self._slow_from_s = 0, 0.0
        self._resting: dict[int, asyncio.TimerHandle] = {}
        self._open: dict[int, int] = {}
        self._has_tty = fds.pty_fd >= 0
        self.finished = asyncio.Event()
        for fd, stream in ((fds.stdout_fd, STDOUT), (fds.stderr_fd, STDERR), (fds.pty_fd, STDOUT)):
            if fd >= 0:
                # the terminal's fd is Input's too: each closes its own
                own = os.dup(fd) if fd == fds.pty_fd else fd
                os.set_blocking(own, False)
                with contextlib.suppress(OSError):  # a terminal; or too many large pipes, then it stays as it is
                    fcntl.fcntl(own, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
                self._open[own] = stream
        self._loop = asyncio.get_running_loop()
        self._watch()

    def _watch(self) -> None:
        for fd in self._open:
            self._loop.add_reader(fd, self._read, fd)
        if not self._open:
            self.finished.set()

    def _read(self, fd: int) -> None:
        stream = self._open[fd]
        try:
            count, data = self._take(stream, fd)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: the last process left the terminal
                raise
            count, data = 0, b""
        if not count:
            self._end(fd, stream)
            return
        if self._listeners:
            for listener in self._listeners:
                listener.put(stream, data)
            self._pause_if_behind()
        if self._is_slow:
            self._slow_bytes += count
            self._loop.remove_reader(fd)
            self._resting[fd] = self._loop.call_later(count / SLOW_BYTES_PER_S, self._rested, fd)

    def _rested(self, fd: int) -> None:
        self._resting.pop(fd).cancel()
        if not self._is_paused:
            self._loop.add_reader(fd, self._read, fd)

    def slow(self, is_slow: bool) -> None:
        """Read no more than `SLOW_BYTES_PER_S` from each pipe, or as fast as it comes again; not after `finish`."""
        self._is_slow = is_slow and self._may_pause
        self._slow_bytes, self._slow_from_s = 0, self._loop.time()
        if not self._is_slow:
            for fd in list(self._resting):
                self._rested(fd)

    def is_held_back(self) -> bool:
        """Say whether it prints as fast as a slow one is read, or nearly, since this was last asked."""
        if not self._is_slow:
            return False
        now_s = self._loop.time()
        is_held = self._slow_bytes >= HELD_BACK * SLOW_BYTES_PER_S * (now_s - self._slow_from_s)
        self._slow_bytes, self._slow_from_s = 0, now_s
        return is_held

    def _take(self, stream: int, fd: int) -> tuple[int, bytes]:
        if self._log is not None:
            return self._log.take(stream, fd, is_wanted=bool(self._listeners))
        data = os.read(fd, _READ_BYTES)
        return len(data), data

    def _end(self, fd: int, stream: int) -> None:
        self._loop.remove_reader(fd)
        os.close(fd)
        del self._open[fd]
        if self._log is not None:
            self._log.end_stream(stream)
        for listener in self._listeners:
            listener.put(stream, b"")
        if not self._open:
            for listener in self._listeners:
                listener.end()
            self.finished.set()

    def _pause_if_behind(self) -> None:
        if self._may_pause and any(listener.bytes_waiting > _LISTENER_BYTES_MAX for listener in self._listeners):
            self._is_paused = True
            for fd in self._open:
                self._loop.remove_reader(fd)

    def resume(self) -> None:
        """Read on if every client has caught up."""
        if not self._is_paused:
            return
        if not self._may_pause or all(
            listener.bytes_waiting <= _LISTENER_BYTES_MAX // 2 for listener in self._listeners
        ):
            self._is_paused = False
            for fd in self._open.keys() - self._resting.keys():
                self._loop.add_reader(fd, self._read, fd)

    def fds(self) -> dict[str, int]:
        """Return what is open by the spawner's names; a terminal is `Input`'s to name."""
        names = {STDOUT: "stdout", STDERR: "stderr"}
        return {} if self._has_tty else {names[stream]: fd for fd, stream in self._open.items()}

    def finish(self) -> None:
        """Read what is left without regard to slow clients: the job has ended, so it is at most what its pipes hold."""
        self._may_pause = False
        self.resume()
        self.slow(False)

    @contextmanager
    def listen(self) -> Iterator[Listener]:
        """Hand everything that is read from now on to a listener."""
        listener = Listener(self)
        if self.finished.is_set():
            listener.end()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            self.resume()

    def close(self) -> None:
        """Stop reading; what is unread stays in the pipes for the next hostd."""
        for timer in self._resting.values():
            timer.cancel()
        self._resting.clear()
        for fd in self._open:
            self._loop.remove_reader(fd)
            os.close(fd)
        self._open.clear()
        for listener in self._listeners:
            listener.end()
        self.finished.set()


class Input:
    """Writes a job's stdin: a pipe, or its terminal."""

    def __init__(self, fds: Spawned) -> None:
        self._has_tty = fds.pty_fd >= 0
        self._fd = fds.pty_fd if self._has_tty else fds.stdin_fd
        self._turn = asyncio.Lock()
        if self._fd >= 0:
            os.set_blocking(self._fd, False)

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def fds(self) -> dict[str, int]:
        """Return what is open by the spawner's names."""
        return {"pty" if self._has_tty else "stdin": self._fd} if self.is_open else {}

    async def write(self, data: bytes) -> None:
        """Write all of it, waiting for the job to read; a job that has closed its stdin swallows the rest.

        Raises:
            JobNotRunning: the job has no stdin, or it was ended.
        """
        async with self._turn:
            rest = memoryview(data)
            while rest:
                if self._fd < 0:
                    raise JobNotRunning("the job has no open stdin", hint="start it with stdin kept open")
                try:
                    rest = rest[os.write(self._fd, rest) :]
                except BlockingIOError:
                    await self._writable()
                except OSError as error:
                    if error.errno in (errno.EPIPE, errno.EIO):
                        return
                    raise

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        fd = self._fd

        def go_on() -> None:
            if not ready.done():
                ready.set_result(None)

        loop.add_writer(fd, go_on)
        try:
            await ready
        finally:
            loop.remove_writer(fd)

    async def end(self) -> bool:
        """End the job's stdin; return whether a pipe was closed (a terminal gets its end-of-file character)."""
        if self._has_tty:
            with contextlib.suppress(Conflict):
                await self.write(_TTY_END_OF_FILE)
            return False
        async with self._turn:
            was_open = self._fd >= 0
            self.close()
        return was_open

    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal its size; a job without one does not care."""
        if self._has_tty and self._fd >= 0:
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetwinsize(self._fd, (rows, columns))

    def close(self) -> None:
        """Close our end."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


__all__ = ["STDERR", "STDIN", "STDOUT", "Input", "Listener", "Output"]
