"""Roles: by what a certificate says, over the real listener."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from discovery import remote
from discovery.access import CONTROLLER, NOBODY, READ_ONLY, role_of
from discovery.daemon import Daemon
from discovery.operations import CompareClause, DeleteRequest, PutRequest, RangeRequest, Refused, Step, TxnRequest
from discovery.wire.contexts import client_context
from discovery.wire.errors import Unavailable
from hostd.authority import Authority
from tests.discovery.conftest import DEADLINE_S, running


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class Remote:
    """The daemon's API over TLS, and clients with certificates of any kind."""

    def __init__(self, folder: Path, authority: Authority, port: int, daemon: Daemon) -> None:
        self.folder = folder
        self.authority = authority
        self.port = port
        self.daemon = daemon
        self.sessions: list[aiohttp.ClientSession] = []

    def context(self, **what: Any) -> ssl.SSLContext:
        made = what.pop("authority", self.authority)
        bundle = self.folder / f"client{len(self.sessions)}.pem"
        bundle.write_bytes(made.client("somebody", **what))
        return client_context(str(bundle), str(bundle), (self.folder / "ca.pem").read_text())

    def client(self, **what: Any) -> Client:
        connector = aiohttp.TCPConnector(ssl=self.context(**what))
        self.sessions.append(
            aiohttp.ClientSession(
                f"https://127.0.0.1:{self.port}", connector=connector, timeout=aiohttp.ClientTimeout(DEADLINE_S)
            )
        )
        return Client(self.sessions[-1])


class Client:
    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def __call__(self, path: str, body: object, *, is_slow: bool = False) -> tuple[int, Any]:
        """Ask; `is_slow`: in a way that the fast lane leaves to aiohttp."""
        headers = {"Expect": "100-continue"} if is_slow else {}
        async with self.session.post(path, data=json.dumps(body).encode(), headers=headers) as response:
            return response.status, await response.json()

    async def status(self, path: str, body: object) -> int:
        found = [(await self(path, body, is_slow=is_slow))[0] for is_slow in (False, True)]
        assert found[0] == found[1], "there are two ways in, and they disagree"
        return found[0]


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Remote]:
    authority = Authority.ensure(tmp_path)
    (tmp_path / "server.pem").write_bytes(authority.server(["127.0.0.1"]))
    where = remote.Listening("127.0.0.1", 0, tmp_path / "ca.pem", tmp_path / "server.pem")
    async with running(tmp_path / "state") as daemon:
        async with remote.listen(where, daemon.application, daemon.front) as port:
            made = Remote(tmp_path, authority, port, daemon)
            yield made
            for session in made.sessions:
                await session.close()


RANGE, PUT = "/v3/kv/range", "/v3/kv/put"
LOOK = [(RANGE, {"key": b64("app/a")}), ("/v3/lease/leases", {}), ("/v3/maintenance/status", {}),
        (RANGE, {"key": "AA==", "range_end": "AA=="})]  # fmt: skip
CHANGE = [
    (PUT, {"key": b64("app/a")}), ("/v3/kv/deleterange", {"key": b64("app/a")}), ("/v3/lease/grant", {"TTL": 60}),
    ("/v3/kv/txn", {"success": [{"request_put": {"key": b64("app/a")}}]}),
    ("/v3/kv/txn", {"failure": [{"request_txn": {"failure": [{"request_put": {"key": b64("app/a")}}]}}]}),
]  # fmt: skip
OPERATE = [("/v3/kv/compaction", {"revision": 1}), ("/v3/maintenance/defragment", {}), ("/v3/auth/disable", {}),
           ("/v3/cluster/member/add", {"peerURLs": ["http://127.0.0.1:1"]})]  # fmt: skip
OWN = [(PUT, {"key": b64("/discoverd/x")}), ("/v3/lease/keepalive", {"ID": 5})]


@pytest.mark.parametrize(
    ("what", "allowed", "denied"),
    [
        ({"role": "controller"}, [*LOOK, *CHANGE, *OWN], []),
        ({"role": "host"}, [*LOOK, *OWN], [CHANGE[0], CHANGE[1], *CHANGE[3:], *OPERATE]),
        ({"role": "read-only"}, LOOK, [*CHANGE, *OWN, *OPERATE]),
        ({}, [LOOK[2]], [*LOOK[:2], LOOK[3], *CHANGE, *OWN, *OPERATE]),
        ({"role": "job", "prefixes": ["app/"]}, [LOOK[0], LOOK[2], *CHANGE], [LOOK[1], LOOK[3], OWN[0], *OPERATE]),
        ({"role": "job", "prefixes": ["other/"]}, [LOOK[2], OWN[1]], [LOOK[0], CHANGE[0], CHANGE[3], *OPERATE]),
    ],
)
async def test_each_role_may_do_what_it_may_and_nothing_else(
    api: Remote, what: Any, allowed: list[Any], denied: list[Any]
) -> None:
    client = api.client(**what)
    before = api.daemon.member.state.revision
    for path, body in denied:
        assert await client.status(path, body) == 403, (path, body)
    assert api.daemon.member.state.revision == before
    for path, body in allowed:
        assert await client.status(path, body) == 200, (path, body)


async def test_services_go_by_the_same_roles(api: Remote) -> None:
    for what, get, put in (
        ({"role": "controller"}, 200, 200), ({"role": "host"}, 200, 200), ({"role": "read-only"}, 200, 401),
        ({}, 401, 401), ({"role": "job", "prefixes": ["/"]}, 401, 401),
    ):  # fmt: skip
        session = api.client(**what).session
        async with session.get("/services") as response:
            assert response.status == get, what
        async with session.put("/services/web", json={}) as response:
            assert response.status == put, what


async def test_a_job_cannot_watch_or_end_what_is_not_its_own(api: Remote) -> None:
    root, job = api.client(role="controller"), api.client(role="job", prefixes=["app/"])
    _, mine = await root("/v3/lease/grant", {"TTL": 600})
    _, other = await root("/v3/lease/grant", {"TTL": 600})
    await root(PUT, {"key": b64("app/mine"), "lease": mine["ID"]})
    await root(PUT, {"key": b64("secret"), "lease": other["ID"]})
    assert await job.status("/v3/lease/timetolive", {"ID": mine["ID"], "keys": True}) == 200
    assert await job.status("/v3/lease/timetolive", {"ID": other["ID"], "keys": True}) == 403
    assert await job.status("/v3/lease/revoke", {"ID": other["ID"]}) == 403
    assert (await job("/v3/lease/revoke", {"ID": mine["ID"]}))[0] == 200
    messages = [{"create_request": {"key": b64("secret")}}, {"create_request": {"key": "AA==", "range_end": "AA=="}},
                {"create_request": {"key": b64("app/"), "range_end": b64("app0")}}]  # fmt: skip
    body = "".join(map(json.dumps, messages)).encode()
    async with job.session.post("/v3/watch", data=body) as response:
        lines = [json.loads(await response.content.readline())["result"] for _ in messages]
        assert [line.get("canceled", False) for line in lines] == [True, True, False]
        assert lines[0]["cancel_reason"] == "etcdserver: permission denied"
        await root(PUT, {"key": b64("secret")})
        await root(PUT, {"key": b64("app/b")})
        line = json.loads(await response.content.readline())["result"]
        assert [event["kv"]["key"] for event in line["events"]] == [b64("app/b")]
        response.close()


async def test_a_certificate_of_a_grant_counts_as_long_as_the_store_has_it(api: Remote) -> None:
    root, serial = api.client(role="controller"), 1 << 158
    bundle = api.folder / "granted.pem"
    bundle.write_bytes(api.authority.job("me", "one", serial, ["app/"]))
    connector = aiohttp.TCPConnector(ssl=client_context(str(bundle), str(bundle), (api.folder / "ca.pem").read_text()))
    api.sessions.append(aiohttp.ClientSession(f"https://127.0.0.1:{api.port}", connector=connector))
    job = Client(api.sessions[-1])
    watch = json.dumps({"create_request": {"key": b64("app/a")}}).encode()
    grant = {"key": b64("/discoverd/grants/me/one"), "value": b64(f"{serial:X}")}
    for body in (None, {**grant, "value": b64("1")}, {**grant, "key": b64("/discoverd/grants/me/other")}):
        if body is not None:
            await root(PUT, body)
        assert await job.status(PUT, {"key": b64("app/a")}) == 403
        assert await job.status("/v3/lease/grant", {"TTL": 60}) == 403
        async with job.session.post("/v3/watch", data=watch) as response:
            assert json.loads(await response.content.readline())["result"]["canceled"]
    await root(PUT, grant)
    assert await job.status(PUT, {"key": b64("app/a")}) == 200
    assert await job.status(PUT, {"key": b64("secret")}) == 403
    async with job.session.post("/v3/watch", data=watch) as response:
        assert "canceled" not in json.loads(await response.content.readline())["result"]
        await root("/v3/kv/deleterange", {"key": grant["key"]})
        await root(PUT, {"key": b64("app/a"), "value": b64("not for it")})
        assert await response.content.readline() == b""
    assert await job.status(PUT, {"key": b64("app/a")}) == 403


async def test_a_port_that_is_taken_does_not_keep_the_store_away(api: Remote) -> None:
    member, where = api.daemon.member, remote.Listening("127.0.0.1", api.port, api.folder / "no", api.folder / "no")
    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(remote.keep_listening(where, api.daemon.application, api.daemon.front, member))
        assert await api.client(role="controller").status(PUT, {"key": b64("a")}) == 200
        with pytest.raises(Unavailable):
            async with remote.listen(replace(where, port=0), api.daemon.application, api.daemon.front):
                pass
        taken = remote.Listening("127.0.0.1", api.port, api.folder / "ca.pem", api.folder / "server.pem")
        with pytest.raises(Unavailable, match="cannot listen"):
            async with remote.listen(taken, api.daemon.application, api.daemon.front):
                pass
        assert not keeping.done()
        keeping.cancel()


async def test_another_authority_counts_once_its_file_is_there(api: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RENEWAL_CHECK_S", 0.05)
    where = remote.Listening("127.0.0.1", 0, api.folder / "ca.pem", api.folder / "server.pem")
    async with remote.listen(where, api.daemon.application, api.daemon.front) as api.port:
        old = api.context(role="host")
        api.authority = Authority.ensure(api.folder, is_fresh=True)
        (api.folder / "server.pem").write_bytes(api.authority.server(["127.0.0.1"]))
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with contextlib.suppress(OSError):
                    await _serial(api.port, api.context(role="host"))
                    break
                await asyncio.sleep(0.05)
        with pytest.raises(OSError):
            await _serial(api.port, old)


async def test_a_stranger_is_not_let_in(api: Remote) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session:
        with pytest.raises(aiohttp.ClientError):
            async with session.get(f"https://127.0.0.1:{api.port}/version"):
                pass
    foreign = api.client(role="controller", authority=Authority.make())
    with pytest.raises(aiohttp.ClientError):
        await foreign(RANGE, {"key": "AA=="})


async def test_a_renewed_certificate_counts_from_the_next_handshake_on(
    api: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RENEWAL_CHECK_S", 0.05)
    where = remote.Listening("127.0.0.1", 0, api.folder / "ca.pem", api.folder / "server.pem")
    async with remote.listen(where, api.daemon.application, api.daemon.front) as port:
        first = await _serial(port, api.context(role="host"))
        (api.folder / "server.pem").write_bytes(api.authority.server(["127.0.0.1"]))
        async with asyncio.timeout(DEADLINE_S):
            while await _serial(port, api.context(role="host")) == first:
                await asyncio.sleep(0.05)


async def _serial(port: int, context: ssl.SSLContext) -> str:
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        return str(writer.get_extra_info("peercert")["serialNumber"])
    finally:
        writer.transport.abort()


async def test_a_member_tells_clients_where_it_answers(api: Remote) -> None:
    await remote.announce(api.daemon.member, "https://127.0.0.1:1")
    _, answer = await api.client(role="read-only")("/v3/cluster/member/list", {})
    assert answer["members"][0]["clientURLs"] == ["https://127.0.0.1:1"]
    revision = api.daemon.member.state.revision
    await remote.announce(api.daemon.member, "https://127.0.0.1:1")
    assert api.daemon.member.state.revision == revision


def certificate(unit: str, *uris: str) -> dict[str, Any]:
    return {"subject": ((("organizationalUnitName", unit),), (("commonName", "x"),)),
            "subjectAltName": tuple(("URI", uri) for uri in uris)}  # fmt: skip


JOB = role_of(certificate("job", "hostd:prefix:/a/", "hostd:prefix:b%FF", "https://elsewhere"))


@pytest.mark.parametrize(
    ("key", "end", "is_allowed"),
    [
        (b"/a/", b"", True), (b"/a/x", b"", True), (b"/a", b"", False), (b"/b", b"", False), (b"", b"", False),
        (b"/a/", b"/a0", True), (b"/a/x", b"/a/y", True), (b"/a/", b"/a1", False), (b"/a/", b"\0", False),
        (b"\0", b"\0", False), (b"/", b"/a0", False), (b"b\xff", b"", True), (b"b\xff", b"c", True),
        (b"b", b"c", False), (b"b\xff\x01", b"c\0", False), (b"/a/z", b"/a/b", True),
    ],
)  # fmt: skip
def test_a_range_has_to_lie_below_a_prefix(key: bytes, end: bytes, is_allowed: bool) -> None:
    steps: list[Step] = [
        RangeRequest(key=key, range_end=end), DeleteRequest(key=key, range_end=end),
        TxnRequest(compare=(CompareClause(key=key, range_end=end, target="MOD", result="LESS"),)),
        TxnRequest(failure=(TxnRequest(success=(DeleteRequest(key=key, range_end=end),)),)),
        *([] if end else [PutRequest(key=key)]),
    ]  # fmt: skip
    for step in steps:
        if is_allowed:
            JOB.check_step(step)
        else:
            with pytest.raises(Refused):
                JOB.check_step(step)


def test_roles_of_certificates() -> None:
    assert role_of(None) is CONTROLLER
    assert role_of({}) is NOBODY
    assert role_of(certificate("root")) is NOBODY
    assert role_of(certificate("discovery-member")) is NOBODY
    assert role_of(certificate("read-only", "hostd:prefix:/a/")) is READ_ONLY
    two = {"subject": ((("organizationalUnitName", "job"),), (("organizationalUnitName", "controller"),))}
    assert role_of(two) is NOBODY
    assert role_of(certificate("job", "hostd:prefix:")).reads == ()
