"""etcd's gateway over three members: whichever is asked, the answer is the same."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from discovery.daemon import Daemon
from discovery.membership import Cluster
from discovery.wire import serve
from hostd.authority import Authority
from tests.discovery.members import certify, free_ports

DEADLINE_S = 60.0
NAMES = ("a", "b", "c")


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@dataclass
class Asked:
    """One member, through its gateway."""

    daemon: Daemon
    session: aiohttp.ClientSession
    address: str
    task: asyncio.Task[None]

    async def ask(self, path: str, body: object) -> tuple[int, Any]:
        async with self.session.post(self.address + path, data=json.dumps(body).encode()) as response:
            return response.status, await response.json()

    async def __call__(self, path: str, body: object) -> Any:
        status, answer = await self.ask(path, body)
        assert status == 200, answer
        return answer


@asynccontextmanager
async def answering(daemon: Daemon, session: aiohttp.ClientSession, tasks: asyncio.TaskGroup) -> AsyncIterator[Asked]:
    member, leases = tasks.create_task(daemon.member.run()), tasks.create_task(daemon.leases.run())
    async with serve.listen_tcp(daemon.application(), "127.0.0.1", 0, daemon.front) as port:
        yield Asked(daemon, session, f"http://127.0.0.1:{port}", member)
    for task in (member, leases):
        task.cancel()
    await asyncio.gather(member, leases, return_exceptions=True)
    daemon.member.close()


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[list[Asked]]:
    authority = Authority.make()
    addresses = {name: f"127.0.0.1:{port}" for name, port in zip(NAMES, free_ports(3), strict=True)}
    async with asyncio.TaskGroup() as tasks, AsyncExitStack() as stack:
        timeout = aiohttp.ClientTimeout(DEADLINE_S)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        made = []
        for name in NAMES:
            ca, bundle = certify(authority, tmp_path / "tls", name)
            cluster = Cluster(addresses[name], addresses, ca, bundle, bundle)
            daemon = Daemon.make(tmp_path / name, name, cluster)
            made.append(await stack.enter_async_context(answering(daemon, session, tasks)))
        async with asyncio.timeout(DEADLINE_S):
            for member in made:
                await member.daemon.member.wait_ready()
            while any(member.daemon.member.status().is_learner for member in made):
                await asyncio.sleep(0.05)
        yield made


async def test_all_members_say_the_same(three: list[Asked]) -> None:
    for number, member in enumerate(three):
        await member("/v3/kv/put", {"key": b64(f"k{number}"), "value": b64("x")})
        for other in three:
            assert (await other("/v3/kv/range", {"key": b64(f"k{number}")}))["kvs"][0]["value"] == b64("x")
        mine = await member("/v3/kv/range", {"key": b64(f"k{number}"), "serializable": True})
        assert mine["count"] == "1", "what a member has answered, it has itself"
    statuses = [await member("/v3/maintenance/status", {}) for member in three]
    assert len({status["leader"] for status in statuses}) == 1
    assert statuses[0]["leader"] in {status["header"]["member_id"] for status in statuses}
    assert len({(status["header"]["cluster_id"], status["header"]["raft_term"]) for status in statuses}) == 1
    lists = [(await member("/v3/cluster/member/list", {}))["members"] for member in three]
    assert lists[0] == lists[1] == lists[2]
    assert {found["name"]: found["ID"] for found in lists[0]} == {
        name: status["header"]["member_id"] for name, status in zip(NAMES, statuses, strict=True)
    }
    assert all(found["peerURLs"][0].startswith("https://127.0.0.1:") for found in lists[0])
    assert not any("isLearner" in found for found in lists[0])


async def test_leases_and_watches_work_anywhere(three: list[Asked]) -> None:
    one, two, other = three
    lease = (await one("/v3/lease/grant", {"TTL": 600}))["ID"]
    await two("/v3/kv/put", {"key": b64("w/a"), "lease": lease})
    for member in three:
        assert (await member("/v3/lease/keepalive", {"ID": lease}))["result"]["TTL"] == "600"
        found = await member("/v3/lease/timetolive", {"ID": lease, "keys": True})
        assert (found["grantedTTL"], found["keys"]) == ("600", [b64("w/a")])
        assert (await member("/v3/lease/leases", {}))["leases"] == [{"ID": lease}]
    create = json.dumps({"create_request": {"key": b64("w/"), "range_end": b64("w0")}})
    streams = [await member.session.post(member.address + "/v3/watch", data=create) for member in three]
    for stream in streams:
        assert json.loads(await stream.content.readline())["result"]["created"]
    await other("/v3/lease/revoke", {"ID": lease})
    for stream in streams:
        (event,) = json.loads(await stream.content.readline())["result"]["events"]
        assert (event["type"], event["kv"]["key"]) == ("DELETE", b64("w/a"))
        stream.close()


async def test_members_come_and_go(three: list[Asked]) -> None:
    one, two, _ = three
    url = f"https://127.0.0.1:{free_ports(1)[0]}"
    added = await two("/v3/cluster/member/add", {"peerURLs": [url], "isLearner": True})
    assert (added["member"]["peerURLs"], added["member"]["isLearner"]) == ([url], True)
    assert len(added["members"]) == 4
    assert "revision" not in added["header"]
    id = added["member"]["ID"]
    status, answer = await one.ask("/v3/cluster/member/add", {"peerURLs": [url]})
    assert (status, answer["message"]) == (412, "etcdserver: Peer URLs already exists")
    removed = await one("/v3/cluster/member/remove", {"ID": id})
    assert id not in {member["ID"] for member in removed["members"]}
    assert (await one.ask("/v3/cluster/member/remove", {"ID": id}))[0] == 404
    voter = removed["members"][0]["ID"]
    status, answer = await two.ask("/v3/cluster/member/promote", {"ID": voter})
    assert (status, answer["message"]) == (412, "etcdserver: can only promote a learner member")
    assert (await two.ask("/v3/cluster/member/update", {"ID": voter, "peerURLs": [url]}))[0] == 501


async def test_the_others_go_on_without_the_leader(three: list[Asked]) -> None:
    await three[0]("/v3/kv/put", {"key": b64("a"), "value": b64("1")})
    leader = next(member for member in three if member.daemon.member.is_leader)
    leader.task.cancel()
    async with asyncio.timeout(DEADLINE_S):
        for member in three:
            if member is not leader:
                await member("/v3/kv/put", {"key": b64("a"), "value": b64("2")})
                assert (await member("/v3/kv/range", {"key": b64("a")}))["kvs"][0]["value"] == b64("2")
    status, answer = await leader.ask("/v3/kv/put", {"key": b64("a")})
    assert (status, answer["code"]) == (503, 14)
    async with leader.session.get(leader.address + "/health") as response:
        assert (await response.json()) == {"health": "false"}
