"""What was saved is there after the process is gone; what was not is not."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from discovery.wire.errors import Unavailable
from hostd.errors import HostFull
from hostd.runtime.network import NetworkState
from hostd.store import Record, Store
from hostd.types import Job, JobSpec, Layer, Port
from tests.hostd.disk import fill, on_small_disk
from tests.pace import SLOWNESS


def a_record(job_id: str, number: int = 1) -> Record:
    spec = JobSpec(
        id=job_id, layers=(Layer(digest="sha256:" + "0" * 64, size_bytes=1),), args=("true",), ports=(Port(),)
    )
    return Record(job=Job(spec=spec, host_id="h", status="pending"), number=number)


async def reopened(store: Store) -> Store:
    await store.close()
    later = Store(store.path)
    await later.open()
    return later


async def test_records_and_facts_come_back_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path / "state" / "hostd.db")
    await store.open()
    state = NetworkState(netns_name="n", ip="100.100.0.2", numbers=(55000,), ports=(Port(),))
    records = [
        a_record("b", 1),
        Record(job=a_record("a").job, number=2, network=state, root="b", is_stop_asked=True),
    ]
    await store.save(records, {"sequence": "7"})
    later = await reopened(store)
    assert await later.records() == records
    assert await later.fact("sequence") == "7"
    assert await later.fact("nothing", "default") == "default"
    await later.close()


async def test_saving_again_replaces_and_removing_removes(tmp_path: Path) -> None:
    store = Store(tmp_path / "hostd.db")
    await store.open()
    await store.save([a_record("a"), a_record("b", 2)])
    await store.save([Record(job=a_record("a").job, number=1, successor="c")], removed=["b"])
    later = await reopened(store)
    assert [(record.job.spec.id, record.successor) for record in await later.records()] == [("a", "c")]
    await later.close()


async def test_a_record_of_another_version_is_left_out_not_fatal(tmp_path: Path) -> None:
    store = Store(tmp_path / "hostd.db")
    await store.open()
    await store.save([a_record("good")])
    await store.close()
    with sqlite3.connect(store.path) as database:
        database.execute("INSERT INTO jobs VALUES ('odd', 2, x'c0')")
    database.close()
    later = Store(store.path)
    await later.open()
    assert [record.job.spec.id for record in await later.records()] == ["good"]
    await later.close()


async def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "hostd.db"
    path.write_bytes(b"no database" * 1000)
    store = Store(path)
    with pytest.raises(Unavailable, match=r"hostd\.db"):
        await store.open()
    await store.close()


async def test_only_root_can_read_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "hostd.db")
    await store.open()
    assert store.path.stat().st_mode & 0o777 == 0o600
    await store.close()


@pytest.mark.needs_root
async def test_a_full_disk_refuses_new_jobs_and_what_happened_to_old_ones_is_owed(tmp_path: Path) -> None:
    with on_small_disk(tmp_path) as folder:
        await _refuse_and_owe(folder)


async def _refuse_and_owe(small_disk: Path) -> None:
    store = Store(small_disk / "hostd.db")
    await store.open()
    await store.save([a_record("old"), a_record("gone", 2)])
    ballast = fill(small_disk)
    many = [a_record(f"new-{number}", number) for number in range(3, 2000)]
    with pytest.raises(HostFull, match="disk"):
        await store.save(many)
    await store.save([Record(job=a_record("old").job, number=1, successor="next")], removed=["gone"], is_patient=True)
    await store.save(facts={"lease": "7"}, is_patient=True)
    ballast.unlink()
    async with asyncio.timeout(10 * SLOWNESS):
        while await store.fact("lease") != "7":
            await asyncio.sleep(0.05)
    later = await reopened(store)
    assert (await later.records())[0].successor == "next"
    assert "gone" not in {record.job.spec.id for record in await later.records()}
    await later.close()


@pytest.mark.needs_root
async def test_a_store_opens_and_reads_on_a_full_disk(tmp_path: Path) -> None:
    with on_small_disk(tmp_path) as folder:
        await _open_and_read(folder)


async def _open_and_read(small_disk: Path) -> None:
    store = Store(small_disk / "hostd.db")
    await store.open()
    await store.save([a_record("old")])
    await store.close()
    fill(small_disk)
    later = Store(store.path)
    await later.open()
    assert [record.job.spec.id for record in await later.records()] == ["old"]
    await later.save([Record(job=a_record("old").job, number=1, successor="next")], is_patient=True)
    await later.close()


async def test_what_is_saved_while_a_write_is_under_way_is_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "hostd.db")
    await store.open()
    writes, may_go_on, real = [], threading.Event(), store._write

    def slowly(rows: Any) -> None:
        writes.append(sorted(rows.jobs))
        assert may_go_on.wait(30)
        real(rows)

    monkeypatch.setattr(store, "_write", slowly)
    first = store.save([a_record("a")])
    later = [store.save([a_record(name, 2)]) for name in ("b", "c", "b")]
    gone = store.save(removed=["c"])
    may_go_on.set()
    await asyncio.gather(first, *later, gone)
    assert writes in ([["a"], ["b", "c"]], [["a", "b", "c"]])
    assert {record.job.spec.id for record in await store.records()} == {"a", "b"}
    monkeypatch.undo()
    await store.close()


async def test_one_save_that_cannot_be_written_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "hostd.db")
    await store.open()
    real = store._write

    def refuse(rows: Any) -> None:
        if "bad" in rows.jobs:
            raise sqlite3.DatabaseError("malformed")
        real(rows)

    monkeypatch.setattr(store, "_write", refuse)
    saves = [store.save([a_record(name)]) for name in ("a", "bad", "b")]
    done = await asyncio.gather(*saves, return_exceptions=True)
    assert done[0] is None
    assert done[2] is None
    assert isinstance(done[1], Unavailable)
    assert {record.job.spec.id for record in await store.records()} == {"a", "b"}
    monkeypatch.undo()
    await store.close()


async def test_the_log_of_the_store_grows_no_more(tmp_path: Path) -> None:
    """A save into a file that grows waits for the file system's journal."""
    store = Store(tmp_path / "hostd.db")
    await store.open()
    log = tmp_path / "hostd.db-wal"
    size = log.stat().st_size
    for number in range(40):
        await store.save([a_record(f"j{number}", number)], {"sequence": str(number)})
    assert log.stat().st_size == size
    await store.close()
    again = Store(tmp_path / "hostd.db")
    await again.open()
    assert len(await again.records()) == 40
    await again.close()
