"""What a person sees: tables, ages, JSON, questions, and a sign of life when something takes longer than 2 s.

Results go to stdout, everything about the way there to stderr, so that pipes stay clean.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from discovery.wire import clock
from discovery.wire.errors import Invalid

QUIET_S = 2.0
FRAMES = "|/-\\"
_UNITS = ((86400 * 365, "year"), (86400 * 30, "month"), (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns, two spaces apart, nothing trailing."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def age(at: float) -> str:
    """Say how long ago `at` was: `3 minutes ago`; empty for 0 (never)."""
    if not at:
        return ""
    passed_s = max(0, int(clock.now_s() - at))
    for unit_s, name in _UNITS:
        if passed_s >= unit_s:
            count = passed_s // unit_s
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"


def time_of_day(at: float) -> str:
    """Say when something happened today: `08:18:38.123`, local time."""
    moment = datetime.fromtimestamp(at, UTC).astimezone()
    return f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}"


def utc(at: float) -> str:
    """Say when something happened, exactly: `2026-11-23T08:18:38.123Z`."""
    moment = datetime.fromtimestamp(at, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


def note(text: str) -> None:
    """Say something beside the result."""
    print(text, file=sys.stderr)


def is_asked(question: str, *, flag: str) -> bool:
    """Ask a yes-or-no question.

    Raises:
        Invalid: nobody is there to answer; `flag` says yes beforehand.
    """
    if not sys.stdin.isatty():
        raise Invalid(f"{question} Nobody is at the terminal to say so", hint=f"give {flag} to say yes")
    print(f"{question} (yes/no): ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class Waiting:
    """Shows that we still wait for `what`: after 2 silent seconds a spinner on a terminal, else a line now and then."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._is_drawn = False
        self._quiet_since = 0.0
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Self:
        self._quiet_since = clock.monotonic_s()
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the sign away, for good; may be called twice."""
        self._stop.set()
        self._thread.join()
        self._clear()

    def line(self, text: str) -> None:
        """Print a line of the result, past the spinner."""
        with self._lock:
            self._clear()
            print(text, flush=True)
            self._quiet_since = clock.monotonic_s()

    def _clear(self) -> None:
        if self._is_drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._is_drawn = False

    def _show(self) -> None:
        has_terminal = sys.stderr.isatty()
        started, turn, next_s = clock.monotonic_s(), 0, QUIET_S
        while not self._stop.wait(0.1 if has_terminal else 0.25):
            now = clock.monotonic_s()
            with self._lock:
                if now - self._quiet_since < QUIET_S:
                    continue
                if has_terminal:
                    turn += 1
                    text = f"\r{FRAMES[turn % 4]} waiting for {self.what} ({now - started:.0f} s)\x1b[K"
                    print(text, end="", file=sys.stderr, flush=True)
                    self._is_drawn = True
                elif now - started >= next_s:
                    note(f"... waiting for {self.what} ({now - started:.0f} s)")
                    next_s = max(10.0, next_s * 2)
