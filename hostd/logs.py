"""All job logs of this host: who writes which, who reads from where, who follows.

Writing is `joblog`'s, reading `logreader`'s, the files are `segments`'. Called by `lifecycle`, `jobs`, `api`, `attach`.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TypeVar

from hostd.joblog import SEGMENT_BYTES, JobLog
from hostd.logreader import Reader, start_at_time, start_of_tail

log = logging.getLogger(__name__)
T = TypeVar("T")


class Logs:
    """All logs of this host."""

    def __init__(self, root: Path, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.root = root
        self.segment_bytes = segment_bytes
        self._open: dict[str, JobLog] = {}
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._drop_old_format()

    def _drop_old_format(self) -> None:
        """Remove the text segments of hostd 0.1, which kept a time in front of each line, and say so."""
        sizes: dict[str, int] = {}
        for path in self.root.glob("*/*.log"):
            sizes[path.parent.name] = sizes.get(path.parent.name, 0) + path.stat().st_size
            path.unlink()
        for job_id, size in sizes.items():
            log.warning("%s: %d bytes of log in the format of an older hostd were dropped", job_id, size)
            self.say(job_id, f"{size} bytes of log from before hostd was upgraded are gone: their format is not read")

    def folder(self, job_id: str) -> Path:
        """Return where the job's log is."""
        return self.root / job_id

    def open(self, job_id: str) -> JobLog:
        """Return the job's log for appending; the same object for everyone."""
        found = self._open.get(job_id)
        if found is None or found.is_ended:
            found = self._open[job_id] = JobLog(self.folder(job_id), segment_bytes=self.segment_bytes)
        return found

    def opened(self, job_id: str) -> JobLog | None:
        """Return a log that is open for appending, as a living job's is."""
        return self._open.get(job_id)

    def position(self, job_id: str) -> int:
        """Return the position of the next byte of a log that is open; beyond all others if it is not."""
        found = self._open.get(job_id)
        return 2**62 if found is None else found.position

    def end(self, job_id: str) -> None:
        """End a job's log; followers finish."""
        if found := self._open.pop(job_id, None):
            found.end()

    def say(self, job_id: str, text: str) -> None:
        """Add a line of hostd's own to a log, open or not."""
        if found := self._open.get(job_id):
            found.say(text)
            return
        self.open(job_id).say(text)
        self.end(job_id)

    def remove(self, job_id: str) -> None:
        """Delete a job's log."""
        self.end(job_id)
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def names(self) -> list[str]:
        """Return the ids that have a log."""
        return sorted(path.name for path in self.root.iterdir() if path.is_dir())

    def close(self) -> None:
        """Close all files; nothing is ended, a later hostd goes on."""
        for found in self._open.values():
            found.close()
        self._open.clear()

    def start(
        self, job_id: str, *, since: int = 0, at: float = 0.0, lines: int | None = None, stream: int | None = None
    ) -> int:
        """Return where to begin for the last `lines` lines (all if `None`) after position `since` and time `at`."""
        folder = self.folder(job_id)
        if at > 0:
            since = max(since, start_at_time(folder, at))
        if lines is not None:
            since = max(since, start_of_tail(folder, lines, stream))
        return since

    def reader(self, job_id: str, labels: Mapping[str, str], *, since: int = 0, at: float = 0.0,
               lines: int | None = None, stream: int | None = None) -> Reader:  # fmt: skip
        """Return a reader that begins at `start`."""
        begin = self.start(job_id, since=since, at=at, lines=lines, stream=stream)
        return Reader(self.folder(job_id), job_id, labels, since=begin)

    async def follow(self, job_id: str, read: Callable[[], T]) -> AsyncIterator[T]:
        """Yield what `read` returns, as long as it is something, until the job's log ends."""
        while True:
            current = self._open.get(job_id)
            changed = None if current is None else current.changed
            while found := read():
                yield found
                await asyncio.sleep(0)  # a job that prints faster than we read must not keep the loop
            if current is None or changed is None or current.is_ended:
                return
            await changed.wait()
