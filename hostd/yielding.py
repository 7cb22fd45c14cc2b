"""Who has to yield: a job that storms against its limits, and one above its fair share while others want the CPU.

While the machine is busy, each second's CPU time of all jobs is split by their weights. A job above its part goes to
idle priority: it gets all that nobody else wants, and the others are served at once instead of waiting for its slice to
end. Those that stay are each below their part, so what is left for those that yield is never less than theirs. One
comes back after some calm turns, each time later (`CALM_TURNS`): the machine was not busy, nobody was well below his
part, or it itself was, and not because it is held back (`pump.Output.slow`, or below). On cgroup v1 it yields to the
host's own processes in the same way.

One that yields and has as many processes as it may is held still for most of each turn: a thousand processes of idle
priority that try to fork leave whoever has a lock of the kernel's, which every start and end of a program that shares
a file with them needs, without the CPU for minutes. Refuses nothing; called by `hostd.limits`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from discovery.wire.clock import monotonic_s
from hostd.usage import busy_s

TURN_S = 1.0
BUSY = 0.9
"""The machine is busy when so much of all cores' time was used."""
ACTIVE_S = 0.001
"""A job that ran for less in a turn wants nothing."""
CALM_TURNS, CALM_TURNS_MAX = 4, 64
HELD_S = 0.8 * TURN_S
"""So much of a turn one with all its processes is held still."""

Why = Literal["storm", "share"]


class Weighed(Protocol):
    """`hostd.runtime.cgroup.CgroupStep`, as far as yielding needs it."""

    def cpu_s(self, job_id: str) -> float:
        """Return how long the job's tasks have run."""

    def demote(self, job_id: str) -> None:
        """Have a job run only when nobody else wants to."""

    def promote(self, job_id: str, cpu_millis: int) -> None:
        """Take that back."""

    def is_demoted(self, job_id: str) -> bool:
        """Tell whether it was demoted."""

    def is_at_pids_limit(self, job_id: str) -> bool:
        """Tell whether it has as many processes as it may have."""

    def hold(self, job_id: str) -> None:
        """Hold it still."""

    def let_go(self, job_id: str) -> None:
        """Take that back."""


@dataclass(slots=True)
class _Standing:
    cpu_millis: int
    on_yield: Callable[[bool], None]
    is_held_back: Callable[[], bool]
    cpu_s: float = 0.0
    reasons: set[Why] = field(default_factory=set)
    calm_turns: int = 0
    patience: int = CALM_TURNS
    held: asyncio.TimerHandle | None = None


def parts_of(used_s: Mapping[str, float], cpu_millis: Mapping[str, int]) -> dict[str, float]:
    """Return how much of its fair part of the jobs' CPU time each job used: 1.0 is all of it; pure.

    Jobs that want nothing have no part; without two that want something there is nothing to share.
    """
    active = [job_id for job_id, used in used_s.items() if used >= ACTIVE_S]
    if len(active) < 2:
        return {}
    total_s = sum(used_s[job_id] for job_id in active)
    total_millis = sum(cpu_millis[job_id] for job_id in active)
    return {job_id: used_s[job_id] * total_millis / (total_s * cpu_millis[job_id]) for job_id in active}


class Yielding:
    """All jobs of the host: who yields, and why."""

    def __init__(self, cgroups: Weighed) -> None:
        self._cgroups = cgroups
        self._jobs: dict[str, _Standing] = {}
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(TURN_S, self._turn)
        self._at_s, self._busy_s = monotonic_s(), _busy_now_s()
        self._was_busy = False

    def add(
        self,
        job_id: str,
        cpu_millis: int,
        on_yield: Callable[[bool], None] = lambda _: None,
        is_held_back: Callable[[], bool] = lambda: False,
    ) -> None:
        """Watch a job's part, and say when it begins and ends to yield; an earlier hostd may have had it yield.

        `is_held_back` says, while it yields, whether it would use more CPU if it were not for what `on_yield` did.
        """
        self._jobs[job_id] = _Standing(cpu_millis, on_yield, is_held_back, cpu_s=self._cgroups.cpu_s(job_id))
        if self._cgroups.is_demoted(job_id):
            self._cgroups.promote(job_id, cpu_millis)

    def remove(self, job_id: str) -> None:
        """Watch a job no longer; an unknown one is fine."""
        if job := self._jobs.pop(job_id, None):
            self._let_go(job_id, job)

    def close(self) -> None:
        """Change nothing any more; nobody is held."""
        self._timer.cancel()
        for job_id, job in self._jobs.items():
            self._let_go(job_id, job)

    def begin(self, job_id: str, why: Why) -> None:
        """Have a job yield for one more reason."""
        job = self._jobs[job_id]
        if not job.reasons:
            self._cgroups.demote(job_id)
            job.on_yield(True)
        job.reasons.add(why)

    def end(self, job_id: str, why: Why) -> None:
        """Take one reason back; without any the job has its weight again."""
        job = self._jobs[job_id]
        if why in job.reasons:
            job.calm_turns = 0
            job.reasons.discard(why)
            if not job.reasons:
                self._let_go(job_id, job)
                self._cgroups.promote(job_id, job.cpu_millis)
                job.on_yield(False)

    def _turn(self) -> None:
        self._timer = self._loop.call_later(TURN_S, self._turn)
        at_s, now_busy_s = monotonic_s(), _busy_now_s()
        cores = os.cpu_count() or 1
        is_busy = now_busy_s - self._busy_s >= BUSY * cores * (at_s - self._at_s)
        self._at_s, self._busy_s = at_s, now_busy_s
        if is_busy:
            used_s = self._used_s()
            if self._was_busy:  # else it is not the use of one turn
                self.judge(parts_of(used_s, {job_id: job.cpu_millis for job_id, job in self._jobs.items()}))
        else:
            self.judge({})
        self._was_busy = is_busy
        self.hold_crowds()

    def hold_crowds(self) -> None:
        """Hold those that yield and have all the processes that they may have still for most of the turn."""
        for job_id, job in self._jobs.items():
            if job.reasons and self._cgroups.is_at_pids_limit(job_id):
                self._let_go(job_id, job)
                self._cgroups.hold(job_id)
                job.held = self._loop.call_later(HELD_S, self._let_go, job_id, job)

    def _let_go(self, job_id: str, job: _Standing) -> None:
        if job.held is not None:
            job.held.cancel()
            job.held = None
            self._cgroups.let_go(job_id)

    def _used_s(self) -> dict[str, float]:
        used_s = {}
        for job_id, job in self._jobs.items():
            cpu_s = self._cgroups.cpu_s(job_id)
            used_s[job_id], job.cpu_s = cpu_s - job.cpu_s, cpu_s
        return used_s

    def judge(self, parts: Mapping[str, float]) -> None:
        """Have jobs yield and come back, by how much of its part each used in a turn; nothing says: nobody waits."""
        is_anyone_modest = any(part < 0.5 for part in parts.values())
        for job_id, job in self._jobs.items():
            part = parts.get(job_id, 0.0)
            if "share" in job.reasons:
                is_held = job.is_held_back() or self._cgroups.is_at_pids_limit(job_id)
                is_low = not is_held and part < 0.5
                self._wait_for_calm(job_id, job, is_calm=is_low or not is_anyone_modest)
            elif part > 1.0 and is_anyone_modest:
                self.begin(job_id, "share")

    def _wait_for_calm(self, job_id: str, job: _Standing, *, is_calm: bool) -> None:
        job.calm_turns = job.calm_turns + 1 if is_calm else 0
        if job.calm_turns >= job.patience:
            job.patience = min(job.patience * 2, CALM_TURNS_MAX)
            self.end(job_id, "share")


def _busy_now_s() -> float:
    return busy_s(Path("/proc/stat").read_text())
