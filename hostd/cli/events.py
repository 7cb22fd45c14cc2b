"""What happens to the jobs of this host, as it happens."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from typing import Any

import msgspec

from hostd.cli.command import add
from hostd.cli.connect import caller_of, labels_query
from hostd.types import JobEvent

_OF_THE_PAST = ("snapshot", "current")


def show_events(arguments: argparse.Namespace) -> int:
    query = labels_query(arguments.label)
    for event in caller_of(arguments).events("/events" + (f"?{query}" if query else ""), JobEvent):
        if event.kind in _OF_THE_PAST and not arguments.snapshot:
            continue
        if arguments.json:
            print(msgspec.json.encode(event).decode(), flush=True)
            continue
        at = datetime.fromtimestamp(event.at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        print(" ".join([at, event.kind, *_about(event)]), flush=True)
    return 0


def _about(event: JobEvent) -> list[str]:
    job = event.job
    if job is None:
        return []
    said = [job.spec.id, job.status]
    if job.exit_status is not None:
        said.append(f"exit={job.exit_status}")
    if job.error is not None:
        said.append(f"error={job.error.code}")
    return said


def declare(commands: Any) -> None:
    """Add this command."""
    events = add(
        commands,
        "events",
        show_events,
        "print what happens to jobs, until interrupted",
        "hostd events --label app=example",
        has_json=True,
    )
    events.add_argument("-l", "--label", action="append", default=[], metavar="KEY=VALUE", help="only with this label")
    events.add_argument("--snapshot", action="store_true", help="first what there is, then `current`")
