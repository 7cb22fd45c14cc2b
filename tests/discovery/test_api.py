"""etcd's JSON gateway: by its own shapes, and by an unmodified client from PyPI."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from typing import Any

import aiohttp
import pytest

from discovery import client
from discovery.daemon import Daemon
from discovery.types import Put
from discovery.wire import serve
from tests.discovery.conftest import DEADLINE_S


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Raw:
    """POSTs JSON and returns status and JSON, as a client without any library would."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def ask(self, path: str, body: object) -> tuple[int, dict[str, Any]]:
        async with self.session.post("http://unix" + path, data=io.BytesIO(json.dumps(body).encode())) as response:
            return response.status, await response.json()

    async def __call__(self, path: str, body: object) -> dict[str, Any]:
        status, answer = await self.ask(path, body)
        assert status == 200, answer
        return answer


@pytest.fixture
async def raw(address: str) -> Any:
    connector = aiohttp.UnixConnector(address.removeprefix("unix://"))
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(DEADLINE_S)) as session:
        yield Raw(session)


async def test_shapes_are_those_of_the_gateway(raw: Raw) -> None:
    answer = await raw("/v3/kv/put", {"key": b64("a"), "value": b64("1")})
    assert answer["header"]["revision"] == "2"
    assert answer["header"].keys() == {"cluster_id", "member_id", "revision", "raft_term"}
    answer = await raw("/v3/kv/range", {"key": b64("a")})
    wanted = {"key": b64("a"), "create_revision": "2", "mod_revision": "2", "version": "1", "value": b64("1")}
    assert answer["kvs"] == [wanted]
    assert answer["count"] == "1"
    answer = await raw("/v3/kv/range", {"key": b64("nothing")})
    assert answer.keys() == {"header"}
    answer = await raw("/v3/kv/deleterange", {"key": b64("a"), "range_end": b64("b"), "prev_kv": True})
    assert (answer["deleted"], answer["prev_kvs"]) == ("1", [wanted])


async def test_numbers_may_be_strings_and_names_camel_case(raw: Raw) -> None:
    for limit in (1, "1"):
        await raw("/v3/kv/range", {"key": b64("a"), "rangeEnd": b64("b"), "limit": limit, "sortOrder": "DESCEND"})
    txn = {
        "compare": [{"target": "CREATE", "key": b64("a"), "createRevision": "0", "result": 0}],
        "success": [{"requestPut": {"key": b64("a"), "value": b64("1")}}, {"requestRange": {"key": b64("a")}}],
    }
    answer = await raw("/v3/kv/txn", txn)
    assert answer["succeeded"] is True
    assert answer["responses"][0] == {"response_put": {"header": {"revision": "2"}}}
    assert answer["responses"][1]["response_range"]["kvs"][0]["value"] == b64("1")
    assert "succeeded" not in await raw("/v3/kv/txn", txn)


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/v3/kv/put", {"value": "MQ=="}, 400, 3),
        ("/v3/kv/put", {"key": "not base64!"}, 400, 3),
        ("/v3/kv/put", [1], 400, 3),
        ("/v3/kv/range", {"key": "MQ==", "sort_order": "UP"}, 400, 3),
        ("/v3/kv/range", {"key": "MQ==", "revision": "99"}, 400, 11),
        ("/v3/kv/put", {"key": "MQ==", "lease": "77"}, 404, 5),
        ("/v3/lease/revoke", {"ID": "77"}, 404, 5),
        ("/v3/kv/compaction", {"revision": "9"}, 400, 11),
        ("/v3/auth/authenticate", {"name": "a", "password": "b"}, 412, 9),
        ("/v3/auth/user/add", {"name": "a", "password": "b"}, 501, 12),
        ("/v3/kv/txn", {"success": [{}]}, 400, 3),
        ("/v3/watch", {}, 400, 3),
    ],
)
async def test_refusals_have_the_codes_of_grpc(raw: Raw, path: str, body: object, status: int, code: int) -> None:
    got, answer = await raw.ask(path, body)
    assert (got, answer["code"]) == (status, code), answer
    assert answer["error"] == answer["message"]


async def test_the_value_limit_is_a_mebibyte(raw: Raw) -> None:
    value = base64.b64encode(bytes(1024 * 1024)).decode()
    await raw("/v3/kv/put", {"key": b64("a"), "value": value})
    status, answer = await raw.ask(
        "/v3/kv/put", {"key": b64("a"), "value": base64.b64encode(bytes(1024 * 1024 + 1)).decode()}
    )
    assert (status, answer["message"]) == (400, "etcdserver: request is too large")
    status, answer = await raw.ask("/v3/kv/put", {"key": b64("a"), "value": value * 6})
    assert status in (400, 413), answer


async def test_leases_live_by_keep_alive_and_end_with_their_keys(raw: Raw, daemon: Daemon) -> None:
    lease = (await raw("/v3/lease/grant", {"TTL": "1"}))["ID"]  # less than two seconds are two
    await raw("/v3/kv/put", {"key": b64("a"), "lease": lease})
    log_index = daemon.member.index
    for _ in range(4):
        await asyncio.sleep(0.7)
        answer = await raw("/v3/lease/keepalive", {"ID": lease})
        assert answer["result"]["TTL"] == "2"
    assert daemon.member.index == log_index, "a renewal was written to the log"
    assert (await raw("/v3/lease/leases", {}))["leases"] == [{"ID": lease}]
    info = await raw("/v3/kv/lease/timetolive", {"ID": lease, "keys": True})
    assert (info["grantedTTL"], info["keys"]) == ("2", [b64("a")])
    async with asyncio.timeout(DEADLINE_S):
        while "kvs" in await raw("/v3/kv/range", {"key": b64("a")}):
            await asyncio.sleep(0.05)
    assert "TTL" not in (await raw("/v3/lease/keepalive", {"ID": lease}))["result"]
    assert (await raw("/v3/lease/timetolive", {"ID": lease}))["TTL"] == "-1"


async def test_a_watch_tells_what_happened_from_a_revision_on(raw: Raw) -> None:
    for value in "123":
        await raw("/v3/kv/put", {"key": b64("w/a"), "value": b64(value)})
    await raw("/v3/kv/deleterange", {"key": b64("w/a")})
    create = {"key": b64("w/"), "range_end": b64("w0"), "start_revision": "3", "prev_kv": True}
    async with raw.session.post("http://unix/v3/watch", data=json.dumps({"create_request": create})) as response:
        lines = [json.loads(await response.content.readline())["result"] for _ in range(2)]
        assert lines[0]["created"] is True
        events = lines[1]["events"]
        assert [event.get("type", "PUT") for event in events] == ["PUT", "PUT", "DELETE"]
        assert [event["kv"]["mod_revision"] for event in events] == ["3", "4", "5"]
        assert events[2]["prev_kv"]["value"] == b64("3")
        await raw("/v3/kv/put", {"key": b64("elsewhere")})
        await raw("/v3/kv/put", {"key": b64("w/b")})
        line = json.loads(await response.content.readline())["result"]
        assert [event["kv"]["key"] for event in line["events"]] == [b64("w/b")]


async def test_a_watch_from_before_the_compaction_is_cancelled(raw: Raw) -> None:
    for _ in range(5):
        await raw("/v3/kv/put", {"key": b64("a")})
    await raw("/v3/kv/compaction", {"revision": "5"})
    body = json.dumps({"create_request": {"key": b64("a"), "start_revision": 2}})
    async with raw.session.post("http://unix/v3/watch", data=body) as response:
        lines = [json.loads(await response.content.readline())["result"] for _ in range(2)]
    last = lines[-1]
    assert (last["canceled"], last["compact_revision"]) == (True, "5")


async def test_watch_filters(raw: Raw) -> None:
    body = json.dumps({"create_request": {"key": b64("a"), "filters": ["NOPUT"]}})
    async with raw.session.post("http://unix/v3/watch", data=body) as response:
        await response.content.readline()
        await raw("/v3/kv/put", {"key": b64("a")})
        await raw("/v3/kv/deleterange", {"key": b64("a")})
        (event,) = json.loads(await response.content.readline())["result"]["events"]
    assert event["type"] == "DELETE"


async def test_a_thousand_watchers_of_one_prefix_are_all_told(raw: Raw, daemon: Daemon, address: str) -> None:
    told = 0
    everybody = asyncio.Event()

    async def follow(store: client.Store) -> None:
        nonlocal told
        async for event in store.watch("w/"):
            if event.key == "w/a":
                told += 1
                if told == 1000:
                    everybody.set()
                return

    async with client.Store(address) as store, asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        for _ in range(1000):
            tasks.create_task(follow(store))
        while len(daemon.watches._ranges) < 1000:
            await asyncio.sleep(0.05)
        await store.put("w/a", b"1")
        await everybody.wait()
    assert told == 1000


async def test_watches_end_with_their_clients(raw: Raw, daemon: Daemon) -> None:
    body = json.dumps({"create_request": {"key": b64("a")}})
    async with raw.session.post("http://unix/v3/watch", data=body) as response:
        await response.content.readline()
        assert len(daemon.watches._by_key) == 1
        response.close()
    async with asyncio.timeout(DEADLINE_S):
        while daemon.watches._by_key:
            await asyncio.sleep(0.02)


async def test_status_version_and_members(raw: Raw) -> None:
    status = await raw("/v3/maintenance/status", {})
    assert status["leader"] == status["header"]["member_id"]
    assert int(status["raftTerm"]) >= 1
    assert (await raw("/v3/cluster/member/list", {}))["members"][0]["name"] == "test"
    async with raw.session.get("http://unix/version") as response:
        assert (await response.json())["etcdserver"] == "3.4.23"
    async with raw.session.get("http://unix/health") as response:
        assert (await response.json()) == {"health": "true"}


async def test_etcd3gw_unmodified(daemon: Daemon) -> None:
    etcd3gw = pytest.importorskip("etcd3gw", reason="the client under test: pip install etcd3gw")
    async with serve.listen_tcp(daemon.application(), "127.0.0.1", 0, daemon.front) as port:
        await asyncio.to_thread(use_etcd3gw, etcd3gw.client(host="127.0.0.1", port=port))


def use_etcd3gw(etcd: Any) -> None:
    """Make the client's main calls, as its own documentation shows them."""
    assert etcd.status()["version"]
    assert etcd.members()[0]["name"] == "test"
    assert etcd.put("foo", "bar") is True
    assert etcd.get("foo") == [b"bar"]
    assert etcd.get("foo", metadata=True)[0][1]["version"] == "1"
    etcd.put("foo2", "baz")
    assert [value for value, _ in etcd.get_prefix("foo")] == [b"bar", b"baz"]
    assert len(etcd.get_all()) == 2
    assert etcd.create("foo", "other") is False
    assert etcd.create("new", "value") is True
    assert etcd.replace("foo", "bar", "bar2") is True
    assert etcd.replace("foo", "bar", "bar3") is False
    assert etcd.delete("foo") is True
    assert etcd.delete("foo") is False
    assert etcd.delete_prefix("foo") is True

    lease = etcd.lease(ttl=30)
    assert lease.ttl() <= 30
    etcd.put("leased", "x", lease=lease)
    assert lease.keys() == [b"leased"]
    assert lease.refresh() == 30
    assert lease.revoke() is True
    assert etcd.get("leased") == []

    with etcd.lock("my-lock", ttl=10) as lock:
        assert lock.is_acquired()
    events, cancel = etcd.watch("watched")
    timer = threading.Timer(0.2, lambda: etcd.put("watched", "seen"))
    timer.start()
    assert next(events)["kv"]["value"] == b"seen"
    timer.join()
    cancel()


async def test_transactions_of_our_client_reach_the_same_keys(address: str, raw: Raw) -> None:
    async with client.Store(address) as store:
        await store.txn([client.compare_missing("ä")], [Put("ä", b"\x00\xff")])
    (found,) = (await raw("/v3/kv/range", {"key": b64("ä")}))["kvs"]
    assert base64.b64decode(found["value"]) == b"\x00\xff"
