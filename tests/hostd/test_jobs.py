"""Who follows whom, after how long, and who is forgotten: the rules, without a host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from hostd.jobs import Jobs, has_to_restart, restart_delay_s, restarts_after, successor_id, to_forget
from hostd.runtime.adoption import Living
from hostd.runtime.network import NetworkState
from hostd.runtime.process import Spawned
from hostd.store import Record
from hostd.types import parse_job_id
from tests.hostd.test_store import a_record

ALWAYS = "always"


def ended(job_id: str, at: float, *, lived_s: float = 1.0, restart: str = "never", **record: object) -> Record:
    base = a_record(job_id)
    spec = msgspec.structs.replace(base.job.spec, restart=restart)
    job = msgspec.structs.replace(base.job, spec=spec, status="crashed", started_at=at - lived_s, ended_at=at)
    return msgspec.structs.replace(base, job=job, **record)


def well(job_id: str, end_reason: str, *, restart: str = "never") -> Record:
    """A job that ended with 0, or because it was told to."""
    record = ended(job_id, 1.0, restart=restart)
    return msgspec.structs.replace(
        record, job=msgspec.structs.replace(record.job, status="done", end_reason=end_reason)
    )


def test_restart_delays_double_from_a_tenth_of_a_second_to_five() -> None:
    assert [restart_delay_s(n) for n in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert restart_delay_s(10**6) == 5.0


@pytest.mark.parametrize(("lived_s", "expected"), [(0.0, 4), (59.9, 4), (60.0, 0), (3600.0, 0)])
def test_a_job_that_was_up_for_long_starts_counting_anew(lived_s: float, expected: int) -> None:
    assert restarts_after(ended("a", 1e9, lived_s=lived_s, restarts=3)) == expected


def test_a_job_that_never_ran_counts_as_quick() -> None:
    record = a_record("a")
    failed = msgspec.structs.replace(record.job, status="failed", ended_at=1e9)
    assert restarts_after(msgspec.structs.replace(record, job=failed, restarts=1)) == 2


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (ended("a", 1.0), False),
        (ended("a", 1.0, restart=ALWAYS), True),
        (ended("a", 1.0, restart=ALWAYS, is_stop_asked=True), False),
        (ended("a", 1.0, restart=ALWAYS, successor="a-1"), False),
        (a_record("a"), False),
        (ended("a", 1.0, restart="on-failure"), True),
        (ended("a", 1.0, restart="on-failure", is_stop_asked=True), False),
        (well("a", "exited", restart="on-failure"), False),
        (well("a", "stopped", restart="on-failure"), True),  # by a host that went down
        (well("a", "stopped"), False),
    ],
)
def test_only_what_ended_unasked_and_has_no_successor_restarts(record: Record, expected: bool) -> None:
    assert has_to_restart(record) is expected


def test_successors_keep_the_first_id_and_stay_valid() -> None:
    first = ended("web", 1.0)
    assert successor_id(first, "0a1b2c3d") == "web-0a1b2c3d"
    assert successor_id(ended("web-0a1b2c3d", 1.0, root="web"), "11111111") == "web-11111111"
    parse_job_id(successor_id(ended("x" * 63, 1.0), "0a1b2c3d"))


def test_only_old_ended_jobs_beyond_the_newest_are_forgotten() -> None:
    now = 1e9
    old = [ended(f"old-{n}", now - 5000 - n) for n in range(5)]
    fresh = [ended(f"fresh-{n}", now - n) for n in range(5)]
    needed = ended("needed", now - 9000, restart=ALWAYS)
    records = [*old, *fresh, needed, a_record("active")]
    assert to_forget(records, now=now, keep_count=7, keep_s=3600) == ["old-2", "old-3", "old-4"]
    assert to_forget(records, now=now, keep_count=0, keep_s=3600) == [f"old-{n}" for n in range(5)]
    assert to_forget(records, now=now, keep_count=100, keep_s=0) == []


@pytest.mark.parametrize(("stdout_fd", "lost"), [(-1, True), (10_000, False)])
async def test_a_job_that_ends_as_it_is_found_again_has_its_lost_output_said(stdout_fd: int, lost: bool) -> None:
    record = msgspec.structs.replace(a_record("a"), network=NetworkState(netns_name="n", ip="100.100.0.9", numbers=()))
    said: list[str] = []

    async def adopt(*_: object) -> Any:
        return SimpleNamespace(stdout_fd=stdout_fd, close=lambda: None)

    assert Spawned(pid=1).stdout_fd == -1  # what a spawner answers for a stream that it was not given
    launcher = SimpleNamespace(find=lambda _: Living(1, -1), adopt=adopt)
    parts: Any = SimpleNamespace(
        records=SimpleNamespace(active=lambda: [record]),
        logs=SimpleNamespace(say=lambda _, text: said.append(text)),
        launcher=launcher,
    )
    nobody: Any = None
    await Jobs(parts, nobody, nobody).find_living(())
    assert [("is lost" in text) for text in said] == [True] * lost
