"""The same requests to our gateway and to a real etcd: status and answer have to be the same.

What cannot be the same is taken out first: ids of cluster, member and leases, the term, sizes, and the words of a
parser about JSON that it does not understand.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from discovery.wire import serve
from tests.discovery.conftest import DEADLINE_S, running

Json = dict[str, Any]
Request = tuple[str, Any]


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [found.getsockname()[1] for found in sockets]
    finally:
        for found in sockets:
            found.close()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An etcd of one member, for the whole module: its address."""
    if not shutil.which("etcd"):
        pytest.skip("needs etcd to compare with: apt-get install etcd-server")
    folder = tmp_path_factory.mktemp("etcd")
    client, peer = (f"http://127.0.0.1:{port}" for port in free_ports(2))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["etcd", "--name", "one", "--data-dir", str(folder / "data"),
             "--listen-client-urls", client, "--advertise-client-urls", client,
             "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"one={peer}"],
            stderr=log,
            stdout=log,
        )  # fmt: skip
    try:
        yield client
    finally:
        process.kill()
        process.wait()


class Side:
    """One of the two servers. Lease ids differ, so requests name them `$0`, `$1`… in the order of their making."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self._session = session
        self.address = address
        self._leases: list[str] = []

    async def ask(self, path: str, body: Any) -> tuple[int, Any]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        for number, id in enumerate(self._leases):
            raw = raw.replace(b"$%d" % number, id.encode())
        async with self._session.post(self.address + path, data=raw) as response:
            text = await response.text()
            lines = [self._comparable(json.loads(line)) for line in text.splitlines() if line.startswith("{")]
            return response.status, lines or text

    def _comparable(self, answer: Any) -> Any:
        if isinstance(answer, list):
            return [self._comparable(item) for item in answer]
        if not isinstance(answer, dict):
            return self._leases.index(answer) if answer in self._leases else answer
        if "TTL" in answer and "ID" in answer and answer["ID"] not in self._leases:
            self._leases.append(answer["ID"])
        skipped = ("cluster_id", "member_id", "raft_term", "hash")
        return {key: self._comparable(value) for key, value in answer.items() if key not in skipped}

    async def wait_ready(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    await self.ask("/v3/kv/range", {"key": "AA=="})
                    return
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.05)

    async def empty(self) -> None:
        """Remove all keys and leases."""
        await self.ask("/v3/kv/deleterange", {"key": "AA==", "range_end": "AA=="})
        async with self._session.post(self.address + "/v3/lease/leases", data=b"{}") as response:
            for lease in (await response.json()).get("leases", []):
                await self.ask("/v3/lease/revoke", lease)

    async def move(self, revisions: int) -> None:
        """Bring an empty store, still empty, some (0, or 2 and more) revisions on."""
        for _ in range(revisions - 1):
            await self.ask("/v3/kv/put", {"key": b64("filler")})
        await self.empty()

    async def revision(self) -> int:
        _, (answer,) = await self.ask("/v3/kv/range", {"key": "AA=="})
        return int(answer["header"]["revision"])

    async def watch(self, messages: list[Any], made: asyncio.Event) -> list[Json]:
        """Open a watch; say when all its watches are made; its lines once the end was told and nothing more comes."""
        lines: list[Json] = []
        has_ended = False
        missing = sum("create_request" in message or "createRequest" in message for message in messages)
        body = b"\n".join(json.dumps(message).encode() for message in messages)
        async with self._session.post(self.address + "/v3/watch", data=body) as response:
            while True:
                try:
                    async with asyncio.timeout(0.5 if has_ended else None):
                        raw = await response.content.readline()
                except TimeoutError:
                    response.close()
                    return lines
                if raw.strip():
                    lines.append(self._comparable(json.loads(raw)["result"]))
                    has_ended |= any(event["kv"]["key"] == b64("zend") for event in lines[-1].get("events", ()))
                    missing -= "created" in lines[-1]
                    if not missing:
                        made.set()


@pytest.fixture
async def sides(etcd: str, tmp_path: Path) -> AsyncIterator[tuple[Side, Side]]:
    """Ours, then etcd, at the same revision: etcd, which lasts longer, is never behind."""
    async with (
        running(tmp_path / "state") as daemon,
        serve.listen_tcp(daemon.application(), "127.0.0.1", 0, daemon.front) as port,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(DEADLINE_S)) as session,
    ):
        ours, theirs = Side(session, f"http://127.0.0.1:{port}"), Side(session, etcd)
        await theirs.wait_ready()
        for side in (ours, theirs):
            await side.empty()
        if await theirs.revision() - await ours.revision() == 1:
            await theirs.move(2)
        await ours.move(await theirs.revision() - await ours.revision())
        yield ours, theirs


def is_about_json(answer: Any) -> bool:
    """Tell whether a refusal is the parser's, whose words are its own."""
    return bool(isinstance(answer, list) and answer[0].get("code") == 3 and "etcdserver: " not in answer[0]["message"])


async def same(sides: tuple[Side, Side], requests: list[Request]) -> None:
    for path, body in requests:
        ours, theirs = [await side.ask(path, body) for side in sides]
        if is_about_json(theirs[1]):
            assert (ours[0], ours[1][0]["code"]) == (theirs[0], 3), (path, body, ours)
        else:
            assert ours == theirs, (path, body)


A, B, AA, ALL = b64("a"), b64("b"), b64("aa"), "AA=="


async def test_puts_and_deletes(sides: tuple[Side, Side]) -> None:
    await same(sides, [("/v3/kv/put", body) for body in (
        {"key": A, "value": b64("1")}, {"key": A}, {}, b"", b"[1]", b"{", b"nonsense",
        {"key": "not base64!"}, {"key": "YQ"}, {"key": A, "colour": 1}, {"key": A, "colour": {"deep": [1]}},
        {"key": A, "lease": "77"}, {"key": A, "lease": 77.5}, {"key": A, "lease": "x"},
        {"key": A, "lease": "99999999999999999999"},
        {"key": A, "prev_kv": True, "value": b64("2")}, {"key": A, "prevKv": True, "value": b64("3")},
        {"key": A, "ignore_value": True}, {"key": A, "ignore_value": True, "value": b64("x")},
        {"key": B, "ignore_value": True}, {"key": B, "ignore_lease": True},
        {"key": A, "ignore_lease": True, "lease": "5"}, {"key": None, "value": None}, {"key": A, "value": None},
    )])  # fmt: skip
    await same(sides, [("/v3/kv/deleterange", body) for body in (
        {}, {"key": b64("none")}, {"key": b64("none"), "prev_kv": True}, {"key": A, "prev_kv": True},
        {"key": B, "range_end": A}, {"key": ALL, "rangeEnd": ALL},
    )])  # fmt: skip


async def test_ranges(sides: tuple[Side, Side]) -> None:
    for number, name in enumerate(("a", "ab", "abc", "ac", "b", "ä")):
        await same(sides, [("/v3/kv/put", {"key": b64(name), "value": b64(name[::-1] * (6 - number))})])
    await same(sides, [("/v3/kv/put", {"key": b64("ab"), "prev_kv": True}), ("/v3/kv/deleterange", {"key": b64("ac")})])
    revision = await sides[0].revision()
    span = {"key": A, "range_end": B}
    await same(sides, [("/v3/kv/range", body) for body in (
        {}, {"key": A}, {"key": b64("none")}, {"range_end": A}, span, {"key": A, "range_end": A},
        {"key": B, "range_end": A}, {"key": A, "range_end": ALL}, {"key": ALL, "range_end": ALL},
        {"key": ALL, "rangeEnd": ALL, "keysOnly": True}, {"key": ALL, "range_end": ALL, "count_only": True},
        span | {"limit": 1}, span | {"limit": "2"}, span | {"limit": 9}, span | {"limit": -1},
        span | {"sort_order": "DESCEND"}, span | {"sort_order": "ASCEND", "sort_target": "KEY"},
        span | {"sort_order": 2, "limit": 2}, span | {"sort_order": "UP"},
        span | {"sort_target": "MOD", "sort_order": "DESCEND"}, span | {"sort_target": "CREATE"},
        span | {"sort_target": "VALUE"}, span | {"sort_target": 4, "sort_order": "DESCEND", "limit": 1},
        span | {"sort_target": "MOD", "sort_order": "ASCEND", "keys_only": True},
        span | {"min_mod_revision": str(revision - 2)}, span | {"max_mod_revision": str(revision - 3)},
        span | {"min_create_revision": str(revision - 4), "limit": 1}, span | {"max_create_revision": 1},
        span | {"max_create_revision": str(revision - 4), "count_only": True},
        span | {"revision": str(revision - 1)}, span | {"revision": revision - 2, "sort_order": "DESCEND"},
        span | {"revision": "99999"}, span | {"revision": "-1"}, span | {"serializable": True},
    )])  # fmt: skip
    for prefix in ("/v3beta",):
        await same(sides, [(prefix + "/kv/range", span)])


def compare(**clause: Any) -> Json:
    return {"compare": [{"key": A} | clause], "failure": [{"request_range": {"key": A}}]}


async def test_transactions(sides: tuple[Side, Side]) -> None:
    put, get, gone = {"request_put": {"key": A}}, {"request_range": {"key": A}}, {"request_delete_range": {"key": A}}
    inner = {"request_txn": {"success": [get, {"request_put": {"key": AA}}, {"request_txn": compare(version="9")}]}}
    bodies: tuple[Json, ...] = (
        {}, {"success": [{}]}, {"compare": [{}]}, compare(), compare(target="VALUE", value=""), compare(target="VALUE"),
        compare(target="CREATE", create_revision="0", result="EQUAL"),
        {"success": [put, get, gone]}, {"success": [put, put]}, {"success": [gone, put]},
        {"success": [{"request_put": {"key": A, "value": A, "prev_kv": True}}, get,
                     {"request_delete_range": {"key": B}}]},
        {"success": [gone, gone, {"request_delete_range": {"key": AA}}]},
        {"success": [put, inner]}, {"success": [inner, put]},
        {"success": [{"request_txn": {"success": [put], "failure": [put]}}]},
        {"success": [{"request_txn": {"success": [put]}}, {"request_txn": {"success": [put]}}]},
        compare(target="VERSION", version="2", result="GREATER"), compare(target="VERSION", version=1, result="LESS"),
        compare(target="VERSION", version=1, result="NOT_EQUAL"), compare(target="VERSION", mod_revision="0"),
        compare(target="MOD", modRevision="0", result=3), compare(target=4, lease="0"), compare(target="UP"),
        compare(target="VALUE", value=A, result="GREATER"), compare(range_end=B, target="CREATE", result="GREATER"),
        compare(range_end=B, target="VERSION", version=1, result="EQUAL"),
        {"success": [{"request_put": {}}]}, {"success": [{"request_range": {"key": A, "revision": "99999"}}]},
        {"success": [{"request_put": {"key": A, "lease": "9"}}, get]},
        {"failure": [{"request_put": {"key": A, "lease": "9"}}]},
        {"success": [{"request_put": {"key": b64(f"k{n}")}} for n in range(128)]},
        {"success": [{"request_put": {"key": b64(f"k{n}")}} for n in range(129)]},
        {"success": [{"requestPut": {"key": A, "prevKv": True}},
                     {"requestDeleteRange": {"key": b64("k"), "rangeEnd": b64("l")}}]},
        {"success": [{"request_put": {"key": A, "ignore_value": True}}]},
    )  # fmt: skip
    await same(sides, [("/v3/kv/txn", body) for body in bodies])


async def test_compaction(sides: tuple[Side, Side]) -> None:
    for _ in range(6):
        await same(sides, [("/v3/kv/put", {"key": A})])
    revision = await sides[0].revision()
    await same(sides, [
        ("/v3/kv/compaction", {"revision": revision - 4}), ("/v3/kv/compaction", {"revision": str(revision - 4)}),
        ("/v3/kv/compaction", {"revision": revision - 3, "physical": True}),
        ("/v3/kv/compaction", {"revision": revision + 1}), ("/v3/kv/compaction", {}),
        ("/v3/kv/range", {"key": A, "revision": revision - 4}), ("/v3/kv/range", {"key": A, "revision": revision - 3}),
        ("/v3/kv/txn", {"success": [{"request_range": {"key": A, "revision": 1}}]}),
    ])  # fmt: skip


async def test_leases(sides: tuple[Side, Side]) -> None:
    await same(sides, [
        ("/v3/lease/grant", {"TTL": "600"}), ("/v3/lease/grant", {"TTL": 6000, "ID": "77"}),
        ("/v3/lease/grant", {"TTL": "60", "ID": 77}), ("/v3/lease/grant", {"TTL": "9000000001"}),
        ("/v3/lease/grant", {"TTL": "60000", "ID": "-7"}),
        ("/v3/kv/put", {"key": A, "lease": "$0"}), ("/v3/kv/put", {"key": A, "ignore_lease": True, "prev_kv": True}),
        ("/v3/kv/put", {"key": B, "lease": "77"}), ("/v3/kv/range", {"key": A, "range_end": ALL}),
        ("/v3/lease/keepalive", {"ID": "77"}), ("/v3/lease/keepalive", {"ID": "777"}), ("/v3/lease/keepalive", {}),
        ("/v3/lease/keepalive", b'{"ID":"77"}{"ID":"777"}\n {"ID":-7}'),
        ("/v3/lease/keepalive", b'{"ID":"77"}\n{"ID":"x"}'), ("/v3/lease/keepalive", b""),
        ("/v3/lease/timetolive", {"ID": "777"}), ("/v3/lease/timetolive", {}),
        ("/v3/lease/leases", {}), ("/v3/kv/lease/leases", {}),
        ("/v3/lease/revoke", {"ID": "777"}), ("/v3/lease/revoke", {"ID": "$0"}), ("/v3/kv/lease/revoke", {"ID": "-7"}),
        ("/v3/kv/lease/revoke", {"ID": "77"}), ("/v3/kv/range", {"key": A, "range_end": ALL}), ("/v3/lease/leases", {}),
        ("/v3/lease/grant", {"TTL": "-5", "ID": "5"}), ("/v3/lease/grant", {"ID": "6"}),
        ("/v3/lease/revoke", {"ID": 5}),
    ])  # fmt: skip


async def test_time_to_live(sides: tuple[Side, Side]) -> None:
    """The seconds left may fall between the two questions, so they are looked at by themselves."""
    lease = {"ID": "78", "keys": True}
    for side in sides:
        await side.ask("/v3/lease/grant", {"TTL": "600", "ID": "78"})
        await side.ask("/v3/kv/txn", {"success": [{"request_put": {"key": key, "lease": "78"}} for key in (B, A)]})
    for path in ("/v3/lease/timetolive", "/v3/kv/lease/timetolive"):
        answers = [(await side.ask(path, lease))[1][0] for side in sides]
        assert all(590 <= int(answer.pop("TTL")) <= 600 for answer in answers)
        for answer in answers:
            answer["keys"].sort()  # etcd's are in no order
        assert answers[0] == answers[1]


async def test_the_cluster(sides: tuple[Side, Side]) -> None:
    await same(sides, [
        ("/v3/cluster/member/add", {}), ("/v3/cluster/member/add", {"peerURLs": ["bad"]}),
        ("/v3/cluster/member/remove", {"ID": "4"}), ("/v3/cluster/member/promote", {"ID": "4"}),
        ("/v3/cluster/member/update", {"ID": "4", "peerURLs": ["http://127.0.0.1:1"]}),
        ("/v3/maintenance/alarm", {}), ("/v3/maintenance/defragment", {}), ("/v3/maintenance/hash", {}),
        ("/v3/auth/enable", {}), ("/v3/auth/disable", {}), ("/v3/auth/authenticate", {"name": "a", "password": "b"}),
        ("/v3/auth/user/list", {}), ("/v3/auth/role/list", {}), ("/v3/auth/user/get", {"name": "x"}),
        ("/v3/auth/user/delete", {"name": "x"}), ("/v3/auth/role/get", {"role": "x"}),
        ("/v3/auth/role/delete", {"role": "x"}),
    ])  # fmt: skip
    found = []
    for side in sides:
        assert (await side.ask("/v3/nothing", {}))[0] == 404
        _, (status,) = await side.ask("/v3/maintenance/status", {})
        _, (members,) = await side.ask("/v3/cluster/member/list", {})
        assert members["members"][0]["ID"] == status["leader"]
        found.append((status.keys(), members["header"]))
    assert found[0] == found[1]


WATCHED = [
    ("/v3/kv/put", {"key": b64("w"), "value": b64("1")}), ("/v3/kv/put", {"key": b64("v"), "value": b64("2")}),
    ("/v3/kv/deleterange", {"key": b64("w")}),
    ("/v3/kv/txn", {"success": [{"request_put": {"key": b64("w2")}}, {"request_put": {"key": b64("w1")}}]}),
    ("/v3/kv/put", {"key": b64("w1"), "value": b64("3")}),
]  # fmt: skip


def create(key: str, **more: Any) -> Json:
    return {"create_request": {"key": b64(key)} | more}


PREFIX = {"range_end": b64("x")}
ENDING = create("zend", watch_id="99")
STREAMS: list[list[Any]] = [
    [create("w")],
    [create("w", **PREFIX, prev_kv=True)],
    [create("w", **PREFIX), create("v", watch_id="7"), create("z")],
    [create("w", watch_id="7"), create("v", watch_id="7")],
    [create("w"), create("v"), {"cancel_request": {"watch_id": "0"}}],
    [create("w"), {"cancel_request": {"watch_id": "44"}}],
    [create("nothing"), {"progress_request": {}}],
    [create("w", **PREFIX, filters=["NOPUT"]), create("w", **PREFIX, filters=["NODELETE"], prevKv=True)],
    [create("w", **PREFIX, filters=[1])],
    [create("w", watch_id="-3")],
    [{"create_request": {"key": ALL, "range_end": ALL}}],
    [{"create_request": {"range_end": ALL}}, {"create_request": {}}],
    [create("z", range_end=b64("a"))],
    [create("w", **PREFIX, fragment=True, progress_notify=True)],
    [{"createRequest": {"key": b64("w"), "rangeEnd": b64("x"), "watchId": "4"}}],
    [create("w", start_revision="99999")],
]


async def follow(side: Side, streams: list[list[Any]], changes: list[Request]) -> list[dict[str, list[Json]]]:
    """Open streams, then make the changes; return what each stream told, watch by watch."""
    made = [asyncio.Event() for _ in streams]
    async with asyncio.timeout(2 * DEADLINE_S), asyncio.TaskGroup() as tasks:
        watching = [
            tasks.create_task(side.watch([*stream, ENDING], event)) for stream, event in zip(streams, made, strict=True)
        ]
        for event in made:
            await event.wait()
        for path, body in [*changes, ("/v3/kv/put", {"key": b64("zend")})]:
            assert (await side.ask(path, body))[0] == 200
    return [by_watch(task.result()) for task in watching]


async def test_watches(sides: tuple[Side, Side]) -> None:
    """Lines are compared watch by watch; how many events come in one line is the server's business."""
    ours, theirs = await asyncio.gather(*(follow(side, STREAMS, WATCHED) for side in sides))
    for messages, mine, other in zip(STREAMS, ours, theirs, strict=True):
        assert mine == other, messages


async def test_watches_of_the_past(sides: tuple[Side, Side]) -> None:
    start = await sides[0].revision() + 1
    await same(sides, [*WATCHED, ("/v3/kv/compaction", {"revision": start + 1})])
    streams: list[list[Any]] = [
        [
            create("w", **PREFIX, start_revision=start),
            create("w", **PREFIX, start_revision=start + 1),
            create("w", **PREFIX, start_revision=start + 3, prev_kv=True),
            create("v", start_revision="1"),
        ]
    ]
    ours, theirs = await asyncio.gather(*(follow(side, streams, []) for side in sides))
    assert ours == theirs


def by_watch(lines: list[Json]) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = {}
    for line in lines:
        mine = found.setdefault(line.pop("watch_id", "0"), [])
        if events := line.pop("events", None):
            line.pop("header")  # at which revision of the whole store it is told depends on the moment
            mine += [{"event": event} for event in events]
        if line:
            mine.append(line)
    return found
