"""The store's client: compare-and-swap, and watches that survive everything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from discovery import client
from discovery.client import Services, Store
from discovery.daemon import Daemon
from discovery.errors import Compacted, LeaseNotFound, TransactionFailed
from discovery.operations import Compact
from discovery.types import Delete, Get, Instance, Put, WatchEvent
from discovery.wire.errors import Invalid, Unavailable
from tests.discovery.conftest import DEADLINE_S, running


async def collect(events: AsyncIterator[WatchEvent], into: list[WatchEvent], woken: asyncio.Event) -> None:
    async for event in events:
        into.append(event)
        woken.set()


async def until(into: list[WatchEvent], woken: asyncio.Event, key: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not any(event.key == key for event in into):
            woken.clear()
            await woken.wait()


async def test_keys_come_and_go(address: str) -> None:
    async with Store(address) as store:
        assert await store.get("a") is None
        revision = await store.put("a", b"\x00")
        found = await store.get("a")
        assert found is not None
        assert (found.value, found.mod_revision, found.version) == (b"\x00", revision, 1)
        await store.put("a/1", b"x")
        await store.put("b", b"y")
        listed = await store.range("a")
        assert ([item.key for item in listed.items], listed.revision) == (["a", "a/1"], revision + 2)
        assert len((await store.range("")).items) == 3
        assert len((await store.range("", limit=2)).items) == 2
        assert await store.delete("a") is True
        assert await store.delete("a") is False
        assert await store.delete_prefix("a") == 1
        assert await store.delete_prefix("") == 1


async def test_compare_and_swap(address: str) -> None:
    async with Store(address) as store:
        first = await store.create("a", b"1")
        with pytest.raises(TransactionFailed):
            await store.create("a", b"2")
        second = await store.replace("a", b"2", mod_revision=first)
        with pytest.raises(TransactionFailed):
            await store.replace("a", b"3", mod_revision=first)
        with pytest.raises(TransactionFailed):
            await store.remove("a", mod_revision=first)
        await store.remove("a", mod_revision=second)
        assert await store.get("a") is None


async def test_transactions_answer_with_what_they_read(address: str) -> None:
    async with Store(address) as store:
        await store.put("a/1", b"1")
        done = await store.txn(
            [client.compare_exists("a/1"), client.compare_value("a/1", b"1")],
            [Get("a/", is_prefix=True), Put("b", b"2"), Delete("a/1")],
        )
        assert done.succeeded
        assert [[item.value for item in answer] for answer in done.answers] == [[b"1"], [], [b"1"]]
        done = await store.txn([client.compare_missing("b")], [Put("b", b"3")], [Get("b")])
        assert (done.succeeded, done.answers[0][0].value) == (False, b"2")


async def test_only_one_of_many_racers_wins(address: str) -> None:
    async with Store(address) as store:
        attempts = await asyncio.gather(*(store.create("a", b"%d" % n) for n in range(50)), return_exceptions=True)
        assert sum(isinstance(attempt, int) for attempt in attempts) == 1
        assert sum(isinstance(attempt, TransactionFailed) for attempt in attempts) == 49


async def test_counting_under_contention_loses_no_step(address: str) -> None:
    async def step(store: Store) -> None:
        while True:
            found = await store.get("n")
            assert found is not None
            try:
                await store.replace("n", b"%d" % (int(found.value) + 1), mod_revision=found.mod_revision)
                return
            except TransactionFailed:
                continue

    async with Store(address) as store:
        await store.create("n", b"0")
        await asyncio.gather(*(step(store) for _ in range(20)))
        found = await store.get("n")
        assert found is not None
        assert found.value == b"20"


async def test_leases(address: str) -> None:
    async with Store(address) as store:
        lease = await store.lease_grant(30)
        assert await store.lease_keep_alive(lease) == 30
        await store.put("a", b"1", lease=lease)
        await store.lease_revoke(lease)
        assert await store.get("a") is None
        for attempt in (store.lease_keep_alive(lease), store.lease_revoke(lease), store.put("a", b"", lease=lease)):
            with pytest.raises(LeaseNotFound):
                await attempt


async def test_values_above_the_limit_are_refused_by_name(address: str) -> None:
    async with Store(address) as store:
        await store.put("a", bytes(client.VALUE_BYTES_MAX))
        with pytest.raises(Invalid, match="the value of b"):
            await store.put("b", bytes(client.VALUE_BYTES_MAX + 1))


async def test_a_watch_is_snapshot_current_changes(address: str) -> None:
    seen: list[WatchEvent] = []
    woken = asyncio.Event()
    async with Store(address) as store, asyncio.TaskGroup() as tasks:
        await store.put("w/a", b"1")
        watching = tasks.create_task(collect(store.watch("w/"), seen, woken))
        async with asyncio.timeout(DEADLINE_S):
            while not any(event.is_current for event in seen):
                woken.clear()
                await woken.wait()
        await store.put("w/a", b"2")
        await store.delete("w/a")
        await store.put("other", b"")
        await store.put("w/end", b"")
        await until(seen, woken, "w/end")
        watching.cancel()
    assert [(event.key, event.value) for event in seen] == [
        ("w/a", b"1"), ("", None), ("w/a", b"2"), ("w/a", None), ("w/end", b"")
    ]  # fmt: skip
    assert seen[1].is_current
    assert [event.revision for event in seen] == [2, 2, 3, 4, 6]


async def test_a_watch_from_a_revision_has_no_snapshot(address: str, daemon: Daemon) -> None:
    async with Store(address) as store:
        for number in range(4):
            await store.put("a", b"%d" % number)
        values = []
        async for event in store.watch("a", from_revision=4):
            values.append(event.value)
            if event.value == b"3":
                break
        assert values == [None, b"2", b"3"]
        await daemon.member.propose(Compact(revision=5))
        with pytest.raises(Compacted):
            async for _ in store.watch("a", from_revision=4):
                pass


@pytest.mark.parametrize("is_compacted", [False, True])
async def test_a_watch_survives_a_restart_of_the_daemon_without_a_gap(tmp_path: Path, is_compacted: bool) -> None:
    """Also where the history that it missed is compacted: then it hears the difference."""
    socket, seen, woken = tmp_path / "d.sock", list[WatchEvent](), asyncio.Event()
    async with Store(f"unix://{socket}") as store, asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(collect(store.watch("w/"), seen, woken))
        async with running(tmp_path / "state", socket):
            for key in ("w/gone", "w/kept", "w/changed"):
                await store.put(key, b"1")
            await until(seen, woken, "w/changed")
        async with running(tmp_path / "state") as daemon:
            from discovery.operations import DeleteRequest, PutRequest

            await daemon.member.propose(DeleteRequest(key=b"w/gone"))
            await daemon.member.propose(PutRequest(key=b"w/changed", value=b"2"))
            await daemon.member.propose(PutRequest(key=b"w/new", value=b"3"))
            if is_compacted:
                await daemon.member.propose(Compact(revision=daemon.member.state.revision))
        del seen[:]
        async with running(tmp_path / "state", socket):
            await until(seen, woken, "w/new")
            await store.put("w/last", b"")
            await until(seen, woken, "w/last")
        watching.cancel()
    assert sorted((event.key, event.value) for event in seen) == [
        ("w/changed", b"2"), ("w/gone", None), ("w/last", b""), ("w/new", b"3")
    ]  # fmt: skip
    assert not any(event.is_current for event in seen)


async def test_followers_of_services_survive_a_restart(tmp_path: Path) -> None:
    socket, heard = tmp_path / "d.sock", asyncio.Queue[tuple[str, str]]()

    async def follow(services: Services) -> None:
        async for event in services.watch("web"):
            heard.put_nowait((event.kind, event.instance.id if event.instance else ""))

    def one(id: str, port: int = 1) -> Instance:
        return Instance(id=id, service="web", host="10.0.0.1", port=port)

    address = f"unix://{socket}"
    async with Services(address) as services, asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(follow(services))
        async with running(tmp_path / "state", socket):
            for id in ("a", "b"):
                await services.register(one(id))
            assert sorted([await heard.get() for _ in range(3)]) == [("current", ""), ("up", "a"), ("up", "b")]
        async with running(tmp_path / "state") as daemon:
            await daemon.services.deregister("web", "a")
            await daemon.services.register(one("b", 2), 0)
            await daemon.services.register(one("c"), 0)
        async with running(tmp_path / "state", socket):
            assert sorted([await heard.get() for _ in range(3)]) == [("down", "a"), ("up", "c"), ("update", "b")]
        watching.cancel()


async def test_reads_wait_for_a_restart_and_writes_do_not(tmp_path: Path) -> None:
    socket = tmp_path / "d.sock"
    async with Store(f"unix://{socket}", timeout_s=DEADLINE_S) as store:
        with pytest.raises(Unavailable):
            await store.put("a", b"1")
        reading = asyncio.ensure_future(store.get("a"))
        async with running(tmp_path / "state", socket):
            assert await reading is None
    async with Store(f"unix://{socket}", timeout_s=0.3) as store:
        with pytest.raises(Unavailable):
            await store.get("a")
