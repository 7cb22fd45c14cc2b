"""What a job has printed."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from discovery.wire import clock
from discovery.wire.errors import Invalid, Unavailable
from hostd.cli.command import add
from hostd.cli.connect import caller_of, job_path
from hostd.types import LogLine

if TYPE_CHECKING:
    from hostd.loglines import Piece

_KEPT_BYTES = 16 * 1024 * 1024
AWAY_S = 30.0
"""So long a follower waits for a hostd that is being replaced."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def since(text: str) -> dict[str, str]:
    """Read `--since`: a sequence number, how long ago (`90s`, `15m`, `2h`, `3d`), or a time (UTC unless it says else).

    Raises:
        Invalid: it is none of these.
    """
    if text.isdecimal():
        return {"since": text}
    if text[-1:] in _UNITS and text[:-1].isdecimal():
        at = clock.now_s() - int(text[:-1]) * _UNITS[text[-1]]
    else:
        try:
            found = datetime.fromisoformat(text)
        except ValueError as error:
            raise Invalid(f"--since {text}", hint="a sequence number, 90s, 15m, 2h, 3d, or a time") from error
        at = found.replace(tzinfo=found.tzinfo or UTC).timestamp()
    return {"since_ms": str(max(int(at * 1000), 0))}


def show_log(arguments: argparse.Namespace) -> int:
    query = {"follow": "true"} if arguments.follow else {}
    query |= {"lines": str(arguments.lines)} if arguments.lines is not None else {}
    query |= since(arguments.since) if arguments.since else {}
    if arguments.json:
        _print_json(arguments, query)
        return 0
    query |= {"stream": str(arguments.stream)} if arguments.stream is not None else {}
    _print_text(arguments, query)
    return 0


def _print_json(arguments: argparse.Namespace, query: dict[str, str]) -> None:
    for line in caller_of(arguments).events(job_path(arguments.id) + "/log", LogLine, query):
        if arguments.stream is None or line.stream == arguments.stream:
            print(msgspec.json.encode(line).decode(), flush=arguments.follow)


def _print_text(arguments: argparse.Namespace, query: dict[str, str]) -> None:
    """Print a log as text; a follower survives a restart of hostd without losing or repeating a byte."""
    from hostd.logpieces import decode

    bytes(_KEPT_BYTES)  # freed at once, it tells malloc not to give back, and fault in again, each block's memory
    path, printer, heard = job_path(arguments.id) + "/pieces", _Printer(arguments), clock.monotonic_s()
    while True:
        try:
            printer.begin()
            for piece in decode(caller_of(arguments).stream(path, query)):
                heard = clock.monotonic_s()
                printer.take(piece)
            return
        except Unavailable:
            if not arguments.follow or not printer.position or clock.monotonic_s() - heard > AWAY_S:
                raise
            time.sleep(0.2)
            query = {name: value for name, value in query.items() if name not in ("lines", "since_ms")}
            query["since"] = str(printer.position)


class _Printer:
    """Prints pieces as lines, or raw; `position` is after all that was printed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._stream: int | None = arguments.stream
        self._has_times: bool = arguments.time
        self._is_raw: bool = arguments.raw
        self.position = 0
        self.begin()

    def begin(self) -> None:
        """Begin anew: the server says again what unfinished lines had before."""
        from hostd.loglines import Joiner

        self._joiner = Joiner()

    def take(self, piece: Piece) -> None:
        """Print what a piece completes."""
        from hostd.logtext import text_of
        from hostd.segments import OUTPUT

        if self._is_raw:
            if piece.kind == OUTPUT and self._is_wanted(piece.stream) and (piece.stream or self._stream == 0):
                self._print(piece.stream, piece.end, [piece.data])
            return
        for block in self._joiner.take(piece):
            if self._is_wanted(block.stream):
                self._print(block.stream, block.end, text_of(block, has_times=self._has_times))

    def _is_wanted(self, stream: int) -> bool:
        return self._stream is None or stream == self._stream

    def _print(self, stream: int, end: int, parts: Sequence[bytes | memoryview]) -> None:
        self.position = end
        fd = 2 if stream == 2 else 1
        written, size = os.writev(fd, parts), sum(map(len, parts))
        if written < size:
            rest = memoryview(b"".join(parts))
            while written < size:
                written += os.write(fd, rest[written:])


def declare(commands: Any) -> None:
    log = add(commands, "log", show_log, "print a job's log", "hostd log -f -n 20 run-0123456789ab", has_json=True)
    log.add_argument("id", metavar="ID")
    log.add_argument("-f", "--follow", action="store_true", help="go on with what comes, also over a restart of hostd")
    log.add_argument("-n", "--lines", type=int, metavar="COUNT", help="only the last so many lines")
    log.add_argument("-t", "--time", "--timestamps", action="store_true", help="begin each line with its time (UTC)")
    log.add_argument(
        "--since",
        default="",
        metavar="WHEN",
        help="only what came after a sequence number, since a time (UTC), or in the last 90s, 15m, 2h or 3d",
    )
    log.add_argument("--stream", type=int, choices=(0, 1, 2), help="only stdout (1), stderr (2) or hostd's word (0)")
    log.add_argument("--raw", action="store_true", help="what the job wrote, byte for byte, and nothing of hostd's")
