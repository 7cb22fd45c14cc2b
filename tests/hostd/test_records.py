"""A change is on disk before anyone hears of it, and every watcher hears all of them, in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hostd.errors import JobNotFound
from hostd.records import Records
from hostd.store import Store
from hostd.types import Job, JobEvent
from tests.hostd.test_store import a_record
from tests.pace import SLOWNESS


@pytest.fixture
async def records(tmp_path: Path) -> AsyncIterator[Records]:
    store = Store(tmp_path / "hostd.db")
    await store.open()
    made = Records(store)
    await made.load()
    yield made
    await store.close()


def a_job(job_id: str, **labels: str) -> Job:
    job = a_record(job_id).job
    import msgspec

    return msgspec.structs.replace(job, spec=msgspec.structs.replace(job.spec, labels=labels))


async def take(events: AsyncIterator[JobEvent], count: int) -> list[JobEvent]:
    async with asyncio.timeout(5 * SLOWNESS):
        return [await anext(events) for _ in range(count)]


async def test_a_watch_is_snapshot_current_changes(records: Records) -> None:
    await records.add(a_job("a"))
    events = records.watch({})
    first = await take(events, 2)
    assert [(event.kind, event.job and event.job.spec.id) for event in first] == [("snapshot", "a"), ("current", None)]
    await records.change("a", "started", status="running")
    await records.add(a_job("b"))
    await records.remove(["a"])
    later = await take(events, 3)
    assert [(event.kind, event.job and event.job.spec.id) for event in later] == [
        ("started", "a"),
        ("created", "b"),
        ("removed", "a"),
    ]
    assert [event.sequence for event in later] == [first[-1].sequence + n for n in (1, 2, 3)]


async def test_a_watch_sees_only_jobs_with_its_labels(records: Records) -> None:
    await records.add(a_job("a", app="x"))
    await records.add(a_job("b", app="y"))
    events = records.watch({"app": "y"})
    assert [event.job and event.job.spec.id for event in await take(events, 2)] == ["b", None]
    await records.change("a", "ended", status="done")
    await records.change("b", "ended", status="done")
    assert [event.job and event.job.spec.id for event in await take(events, 1)] == ["b"]


async def test_the_sequence_goes_on_after_a_restart(tmp_path: Path) -> None:
    before = Store(tmp_path / "hostd.db")
    await before.open()
    records = Records(before)
    await records.add(a_job("a"))
    await records.change("a", "started", status="running")
    await before.close()
    store = Store(tmp_path / "hostd.db")
    await store.open()
    later = Records(store)
    await later.load()
    assert later.get("a").job.status == "running"
    (current,) = [event for event in await take(later.watch({}), 2) if event.kind == "current"]
    assert current.sequence == 2
    await store.close()


async def test_a_caller_that_is_cancelled_takes_no_event_with_it(records: Records) -> None:
    await records.add(a_job("a"))
    events = records.watch({})
    await take(events, 2)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(records.change("a", "ended", status="done"))
        await asyncio.sleep(0)
        task.cancel()
    assert [event.kind for event in await take(events, 1)] == ["ended"]


async def test_a_successor_and_its_predecessor_are_linked_at_once(records: Records) -> None:
    first = await records.add(a_job("a"))
    second = await records.add(a_job("a-1"), predecessor=first, restarts=1)
    assert records.get("a").successor == "a-1"
    assert second.root == "a"


async def test_an_unknown_job_is_not_found(records: Records) -> None:
    with pytest.raises(JobNotFound):
        records.get("nosuch")
