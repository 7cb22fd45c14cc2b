"""Services and instances: what is kept, who leads, what followers hear."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from discovery.client import Services, Store
from discovery.daemon import Daemon
from discovery.errors import LeaseNotFound, ServiceNotFound
from discovery.services import Directory
from discovery.types import Instance, Service, ServiceMeta
from discovery.wire.errors import Conflict, Invalid, NotFound
from tests.discovery.conftest import DEADLINE_S


def instance(id: str, service: str = "web", port: int = 55000, host: str = "10.0.0.1") -> Instance:
    return Instance(id=id, service=service, host=host, port=port)


async def test_registering_makes_the_service_and_says_the_age(address: str) -> None:
    async with Services(address) as services:
        first = await services.register(instance("h1-55000"))
        second = await services.register(instance("h1-55001", port=55001))
        assert second.created_index > first.created_index > 0
        assert await services.all() == [Service(name="web")]
        assert await services.instances("web") == [first, second]
        assert await services.instances("nosuch") == []


async def test_registering_the_same_again_writes_nothing(address: str, daemon: Daemon) -> None:
    async with Services(address) as services, Store(address) as store:
        lease = await store.lease_grant(30)
        await services.register(instance("a"), lease=lease)
        index = daemon.member.index
        await services.register(instance("a"), lease=lease)
        assert daemon.member.index == index
        other = await store.lease_grant(30)
        await services.register(instance("a"), lease=other)
        assert daemon.member.state.lease_keys(lease) == []


async def test_an_instance_ends_with_its_lease(address: str) -> None:
    async with Services(address) as services, Store(address) as store:
        lease = await store.lease_grant(30)
        await services.register(instance("a"), lease=lease)
        await store.lease_revoke(lease)
        assert await services.instances("web") == []
        assert await services.all() == [Service(name="web")]
        with pytest.raises(LeaseNotFound):
            await services.register(instance("a"), lease=lease)


@pytest.mark.parametrize(
    "bad",
    [
        instance("a", service="We b"),
        instance("a", service="-web"),
        instance("a", service="w" * 64),
        instance("a.b"),
        instance("a", host="example.test"),
        instance("a", port=0),
        instance("a", port=65536),
        Instance(id="a", service="web", host="10.0.0.1", port=1, protocol="sctp"),
    ],
)
async def test_instances_that_nobody_could_reach_are_refused(address: str, daemon: Daemon, bad: Instance) -> None:
    async with Services(address) as services:
        with pytest.raises(Invalid):
            await services.register(bad)
    assert daemon.member.state.revision == 1


async def test_the_oldest_leads_and_the_next_follows(address: str) -> None:
    async with Services(address) as services:
        assert await services.leader("web") is None
        for id in ("c", "a", "b"):
            await services.register(instance(id))
        await services.register(instance("c", port=1234))
        leader = await services.leader("web")
        assert leader is not None
        assert (leader.id, leader.port) == ("c", 1234)
        await services.deregister("web", "c")
        leader = await services.leader("web")
        assert leader is not None
        assert leader.id == "a"
        with pytest.raises(Conflict):
            await services.set_leader("web", "b")


async def test_a_leader_set_by_hand(address: str) -> None:
    async with Services(address) as services:
        await services.create("db", leader_type="manual")
        await services.create("db", leader_type="manual")
        with pytest.raises(Conflict):
            await services.create("db", leader_type="oldest")
        for id in ("a", "b"):
            await services.register(instance(id, service="db"))
        assert await services.leader("db") is None
        await services.set_leader("db", "b")
        leader = await services.leader("db")
        assert leader is not None
        assert leader.id == "b"
        with pytest.raises(NotFound):
            await services.set_leader("db", "nosuch")
        await services.deregister("db", "b")
        assert await services.leader("db") is None


async def test_metadata_by_compare_and_swap(address: str) -> None:
    async with Services(address) as services:
        with pytest.raises(ServiceNotFound):
            await services.meta("db")
        await services.create("db")
        assert await services.meta("db") == ServiceMeta()
        first = await services.set_meta("db", ServiceMeta(data={"a": "1"}))
        assert await services.meta("db") == first
        with pytest.raises(Conflict):
            await services.set_meta("db", ServiceMeta(data={"a": "2"}))
        second = await services.set_meta("db", ServiceMeta(data={"a": "2"}, index=first.index))
        assert second.index > first.index


async def test_removing_a_service_removes_what_belongs_to_it_and_no_more(address: str, daemon: Daemon) -> None:
    async with Services(address) as services:
        await services.register(instance("a"))
        await services.register(instance("a", service="web-2"))
        await services.set_meta("web", ServiceMeta(data={"a": "1"}))
        await services.remove("web")
        assert await services.all() == [Service(name="web-2")]
        assert len(await services.instances("web-2")) == 1
        with pytest.raises(ServiceNotFound):
            await services.remove("web")
        await services.deregister("web", "a")
    assert len(daemon.directory.instances("web")) == 0


async def test_followers_hear_snapshot_current_and_changes(address: str) -> None:
    heard: list[tuple[str, str]] = []
    async with Services(address) as services, Store(address) as store:
        await services.register(instance("a"))
        lease = await store.lease_grant(30)
        async with asyncio.timeout(DEADLINE_S), aclosing(services.watch("web")) as events:
            async for event in events:
                heard.append((event.kind, event.instance.id if event.instance else ""))
                if event.kind == "current":
                    await services.register(instance("b"), lease=lease)
                    await services.register(instance("x", service="other"))
                    await services.register(instance("a", port=2))
                    await store.lease_revoke(lease)
                if event.kind == "down":
                    break
    assert heard == [("up", "a"), ("current", ""), ("up", "b"), ("update", "a"), ("down", "b")]


async def test_following_everything(address: str) -> None:
    heard = []
    async with Services(address) as services:
        await services.register(instance("a", service="one"))
        async with asyncio.timeout(DEADLINE_S), aclosing(services.watch()) as events:
            async for event in events:
                heard.append((event.kind, event.instance.service if event.instance else ""))
                if event.kind == "current":
                    await services.register(instance("a", service="two"))
                if len(heard) == 3:
                    break
        assert heard == [("up", "one"), ("current", ""), ("up", "two")]
        with pytest.raises(Invalid):
            async for _ in services.watch("no such name"):
                pass


async def test_nonsense_under_our_prefix_harms_nobody(address: str, daemon: Daemon) -> None:
    async with Services(address) as services, Store(address) as store:
        await store.put("/discoverd/instances/web/bad", b"\xff not json")
        await store.put("/discoverd/services/odd", b"{")
        await services.register(instance("a"))
        assert [found.id for found in await services.instances("web")] == ["a"]
        async for event in services.watch("web"):
            if event.kind == "current":
                break
    assert len(Directory(daemon.member.state).instances("web")) == 1


async def test_who_follows_the_leader_hears_of_every_other_one(address: str, daemon: Daemon) -> None:
    heard: list[str] = []
    async with Services(address) as services, Store(address) as store:
        await services.create("db", leader_type="manual")
        lease = await store.lease_grant(30)
        for id in ("a", "b"):
            await services.register(instance(id, service="db"), lease=lease)
        async with asyncio.timeout(DEADLINE_S), aclosing(services.watch_leader("db")) as leaders:
            async for leader in leaders:
                heard.append(leader.id if leader else "")
                match len(heard):
                    case 1:
                        await services.set_leader("db", "b")
                    case 2:
                        await services.register(instance("c", service="db"))
                        await services.set_leader("db", "a")
                    case 3:
                        await store.lease_revoke(lease)
                    case 4:
                        break
        assert heard == ["", "b", "a", ""]
        await services.remove("db")
        await services.register(instance("x", service="db"))
        async with asyncio.timeout(DEADLINE_S), aclosing(services.watch_leader("db")) as leaders:
            async for leader in leaders:
                assert leader is not None
                assert leader.id == "x"
                break
    async with asyncio.timeout(DEADLINE_S):
        while daemon.watches.count:
            await asyncio.sleep(0.01)
