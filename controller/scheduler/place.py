"""Picks the host for a job; pure. Called by `loop` and for one-off jobs.

A volume binds its job to the host that has it, a fixed port to a host where it is free; among what
is left the host with the fewest jobs of that kind wins, then the fewest jobs, then the lowest id.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from controller.scheduler.diff import Group

Kind = tuple[str, str]
"""An app and a process type: releases of one type share hosts evenly, too."""


def kind_of(group: Group) -> Kind:
    return (group.app_id, group.type)


@dataclass(frozen=True)
class HostLoad:
    """What a host runs: jobs a kind, jobs in all, and the fixed port numbers in use."""

    id: str
    by_kind: Mapping[Kind, int] = field(default_factory=dict)
    total: int = 0
    numbers: frozenset[int] = frozenset()


def place(
    kind: Kind,
    hosts: Sequence[HostLoad],
    *,
    volumes: Collection[str] = (),
    numbers: Collection[int] = (),
    pins: Mapping[str, str] | None = None,
) -> str | None:
    """Return the id of the host to use, or `None` when none will do."""
    bound = {pins[volume] for volume in volumes if pins and volume in pins}
    fitting = [host for host in hosts if (not bound or bound == {host.id}) and not host.numbers.intersection(numbers)]
    if not fitting:
        return None
    return min(fitting, key=lambda host: (host.by_kind.get(kind, 0), host.total, host.id)).id


def with_job(host: HostLoad, kind: Kind, numbers: Collection[int] = ()) -> HostLoad:
    """Return the load after one more job, so that a batch spreads."""
    return HostLoad(
        host.id,
        {**host.by_kind, kind: host.by_kind.get(kind, 0) + 1},
        host.total + 1,
        host.numbers.union(numbers),
    )
