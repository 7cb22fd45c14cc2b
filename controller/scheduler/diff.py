"""Compares wanted with seen: which processes to start, which jobs to stop; pure (no clock, no dice, no I/O).

A job belongs to a group: one process type of one release of one app. Left alone are one-offs (until
their app is deleted), and what bootstrap started before its app was added, until the app has a formation.
Called by `loop`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from controller.types import JobState

LIVING: frozenset[str] = frozenset({"pending", "starting", "up"})
"""States that count towards what is wanted; a job that is stopping does not."""


class Group(NamedTuple):
    """One process type of one release of one app; `type` is empty for one-offs."""

    app_id: str
    release_id: str
    type: str


@dataclass(frozen=True)
class SeenJob:
    """A job that has not ended. `is_adoptable`: bootstrap started it before its app was known."""

    id: str
    group: Group
    host_id: str
    state: JobState
    created_at: float = 0
    is_adoptable: bool = False


@dataclass(frozen=True)
class Start:
    group: Group
    count: int


@dataclass(frozen=True)
class Stop:
    job_id: str
    host_id: str
    reason: Literal["surplus", "unwanted", "app deleted"]


@dataclass(frozen=True)
class Plan:
    """What to do now. `missing` are counts before anything was held back."""

    starts: tuple[Start, ...]
    stops: tuple[Stop, ...]
    missing: Mapping[Group, int]


def diff(
    wanted: Mapping[Group, int],
    seen: Iterable[SeenJob],
    *,
    deleted_apps: Collection[str] = (),
    held: Collection[Group] = (),
) -> Plan:
    """Return the actions that turn `seen` into `wanted`; groups in `held` get no new job yet.

    Surplus goes in this order: not yet up first, then the newest, so that what serves longest stays.
    """
    living: defaultdict[Group, list[SeenJob]] = defaultdict(list)
    for job in seen:
        if job.state in LIVING:
            living[job.group].append(job)
    formed = {group.app_id for group in wanted}
    starts: list[Start] = []
    stops: list[Stop] = []
    missing: dict[Group, int] = {}
    for group in sorted(wanted.keys() | living.keys()):
        jobs = living[group]
        if group.app_id in deleted_apps:
            stops.extend(Stop(job.id, job.host_id, "app deleted") for job in _expendable_first(jobs))
        elif group.type:
            count = wanted.get(group, 0)
            if len(jobs) < count:
                missing[group] = count - len(jobs)
                if group not in held:
                    starts.append(Start(group, count - len(jobs)))
            stops.extend(_surplus(jobs, count, has_formation=group.app_id in formed))
    return Plan(tuple(starts), tuple(stops), missing)


def _surplus(jobs: list[SeenJob], count: int, *, has_formation: bool) -> list[Stop]:
    reason: Literal["surplus", "unwanted"] = "surplus" if count else "unwanted"
    candidates = _expendable_first(jobs)[: max(0, len(jobs) - count)]
    return [Stop(job.id, job.host_id, reason) for job in candidates if has_formation or not job.is_adoptable]


def _expendable_first(jobs: Iterable[SeenJob]) -> list[SeenJob]:
    order = {"pending": 0, "starting": 1, "up": 2}
    return sorted(jobs, key=lambda job: (order[job.state], -job.created_at, job.id))
