"""Notice that a job met a limit: memory ran out and a process was killed, or a fork was refused.

The kernel tells: inotify on `*.events` (v2), an eventfd tied to memory.oom_control (v1). Only refused forks on v1 have
to be asked for: one small file a job every `POLL_S`, 0.1 % of a core for 500 jobs. A job that meets its limit all the
time is looked at once in `QUIET_S`; one that storms against it yields (`hostd.yielding`) until it is calm. A job is
only watched when it has lived for `WATCH_AFTER_S`; what happened before, or to one that ends sooner, is counted by its
cgroup all the same. Called by `hostd.lifecycle`, which says it in the job's log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hostd.runtime.cgroup import Incidents
from hostd.yielding import Weighed, Yielding
from netns import syscalls
from netns.errors import KernelError

log = logging.getLogger(__name__)

WATCH_AFTER_S = 0.25
QUIET_S = 5.0
POLL_S = 5.0
STORM_FORKS, STORM_KILLS = 500, 3
"""So many refused forks, or kills, between two looks are a storm."""
SETTLE_S = 0.05
"""The kernel tells of memory that ran out just before it kills."""
_EVENT = struct.Struct("iIII")
_READ_BYTES = 64 * 1024

OnMet = Callable[[Incidents], None]


class Watched(Weighed, Protocol):
    """`hostd.runtime.cgroup.CgroupStep`, as far as watching needs it."""

    has_fork_events: bool

    def incidents(self, job_id: str) -> Incidents:
        """Count how often the job met its limits."""

    def forks_refused(self, job_id: str) -> int:
        """Count what the kernel does not tell of."""

    def watched(self, job_id: str) -> tuple[str, ...]:
        """Name the files to watch."""

    def oom_control(self, job_id: str) -> tuple[str, str] | None:
        """Name v1's files for an eventfd."""


@dataclass(slots=True)
class _Watch:
    on_met: OnMet
    cpu_millis: int
    on_yield: Callable[[bool], None]
    is_held_back: Callable[[], bool]
    last: Incidents = field(default_factory=Incidents)
    timer: asyncio.TimerHandle | None = None
    eventfd: int = -1
    watches: set[int] = field(default_factory=set)


class LimitWatch:
    """One inotify descriptor for all jobs of the host."""

    def __init__(self, cgroups: Watched) -> None:
        self._cgroups = cgroups
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[str, _Watch] = {}
        self.yielding = Yielding(cgroups)
        self._owners: dict[int, str] = {}
        self._fd = syscalls.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._loop.add_reader(self._fd, self._on_inotify)
        self._poll_timer = None if cgroups.has_fork_events else self._loop.call_later(POLL_S, self._poll)

    def add(
        self,
        job_id: str,
        on_met: OnMet,
        cpu_millis: int = 1000,
        on_yield: Callable[[bool], None] = lambda _: None,
        is_held_back: Callable[[], bool] = lambda: False,
    ) -> None:
        """Call `on_met` with the counts whenever they have grown, and `on_yield` when it has to, until `remove`."""
        watch = self._jobs[job_id] = _Watch(on_met, cpu_millis, on_yield, is_held_back)
        watch.timer = self._loop.call_later(WATCH_AFTER_S, self._begin, job_id)

    def remove(self, job_id: str) -> None:
        """Watch a job no longer; an unknown one is fine."""
        if (watch := self._jobs.pop(job_id, None)) is None:
            return
        self.yielding.remove(job_id)
        if watch.timer is not None:
            watch.timer.cancel()
        self._disarm(watch)

    def met(self, job_id: str) -> Incidents:
        """Return the last counts of a job, without looking."""
        watch = self._jobs.get(job_id)
        return Incidents() if watch is None else watch.last

    def close(self) -> None:
        """Watch nothing any more."""
        if self._poll_timer is not None:
            self._poll_timer.cancel()
        self.yielding.close()
        for job_id in list(self._jobs):
            self.remove(job_id)
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _begin(self, job_id: str) -> None:
        watch = self._jobs[job_id]
        self.yielding.add(job_id, watch.cpu_millis, watch.on_yield, watch.is_held_back)
        self._look(job_id)

    def _look(self, job_id: str) -> None:
        """Compare the counts with the last ones, then wait for the kernel's word."""
        watch = self._jobs[job_id]
        watch.timer = None
        try:
            self._arm(job_id, watch)  # first: what happens after the look below is told
        except OSError as error:  # the job is on its way out, or the host has no watches left
            if not isinstance(error, FileNotFoundError):
                log.warning("the limits of job %s are not watched: %s", job_id, error)
        self._compare(job_id, watch)

    def _compare(self, job_id: str, watch: _Watch) -> None:
        """Tell what has grown; a fork bomb or a memory hog that goes on and on has to yield until it is calm."""
        found, last = self._cgroups.incidents(job_id), watch.last
        forks, kills = found.forks_refused - last.forks_refused, found.oom_kills - last.oom_kills
        if forks >= STORM_FORKS or kills >= STORM_KILLS:
            self.yielding.begin(job_id, "storm")
        elif found == last:
            self.yielding.end(job_id, "storm")
        if found != last:
            watch.last = found
            watch.on_met(found)

    def _poll(self) -> None:
        for job_id, watch in self._jobs.items():
            if watch.timer is None and self._cgroups.forks_refused(job_id) != watch.last.forks_refused:
                self._told(job_id)
        self._poll_timer = self._loop.call_later(POLL_S, self._poll)

    def _arm(self, job_id: str, watch: _Watch) -> None:
        for file in self._cgroups.watched(job_id):
            number = syscalls.inotify_add_watch(self._fd, file, syscalls.IN_MODIFY | syscalls.IN_ONESHOT)
            self._owners[number] = job_id
            watch.watches.add(number)
        if watch.eventfd < 0 and (files := self._cgroups.oom_control(job_id)):
            watch.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            control, event_control = files
            with Path(control).open("rb") as opened:
                Path(event_control).write_text(f"{watch.eventfd} {opened.fileno()}")
        if watch.eventfd >= 0:
            self._loop.add_reader(watch.eventfd, self._on_oom, job_id)

    def _disarm(self, watch: _Watch) -> None:
        for number in watch.watches:
            self._owners.pop(number, None)
            with suppress(KernelError):  # it has told already, or the cgroup is gone
                syscalls.inotify_rm_watch(self._fd, number)
        watch.watches.clear()
        if watch.eventfd >= 0:
            self._loop.remove_reader(watch.eventfd)
            os.close(watch.eventfd)
            watch.eventfd = -1

    def _on_inotify(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        at = 0
        while at < len(data):
            number, mask, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size + length
            job_id = self._owners.pop(number, "")
            if job_id and mask & syscalls.IN_MODIFY:
                self._jobs[job_id].watches.discard(number)
                self._told(job_id)

    def _on_oom(self, job_id: str) -> None:
        self._told(job_id)

    def _told(self, job_id: str) -> None:
        """Look in a moment, and be deaf for a while if that finds something: these events come in storms."""
        watch = self._jobs[job_id]
        if watch.timer is not None:
            return
        if watch.eventfd >= 0:
            self._loop.remove_reader(watch.eventfd)
            with suppress(BlockingIOError):
                os.eventfd_read(watch.eventfd)
        watch.timer = self._loop.call_later(SETTLE_S, self._report, job_id)

    def _report(self, job_id: str) -> None:
        watch = self._jobs[job_id]
        self._compare(job_id, watch)
        watch.timer = self._loop.call_later(QUIET_S, self._look, job_id)
