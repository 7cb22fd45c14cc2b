"""Agents: a copy that follows members through breaks, restarts and compactions, and misses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import dns.asyncquery
import dns.message
import dns.rcode
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery import asking, etcdjson, mirror, remote, replies
from discovery.agent import Agent
from discovery.client import Services, Store, compare_missing
from discovery.daemon import Daemon
from discovery.errors import LeaseNotFound, ServiceNotFound, TransactionFailed
from discovery.operations import Body, Compact, PutRequest, RangeRequest, Refused
from discovery.state import State
from discovery.types import Delete, Get, Instance, Put, Service, ServiceMeta
from discovery.upstream import Upstream
from discovery.wire import serve
from discovery.wire.contexts import client_context
from discovery.wire.errors import DeadlineExceeded, ServiceError, Unavailable
from hostd.authority import Authority
from tests.discovery.conftest import DEADLINE_S, Process, running
from tests.discovery.test_dns import free_port
from tests.discovery.test_state_model import DELETES, PUTS, TRANSACTIONS, near

EVERYTHING = RangeRequest(key=b"\0", range_end=b"\0")


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "PROBE_S", 0.1)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def following(socket: Path, *addresses: str) -> AsyncIterator[Agent]:
    agent = Agent.make(addresses, "agent-1")
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(agent.run())
        async with serve.listen_unix(agent.application(), socket):
            yield agent
        task.cancel()


@pytest.fixture
async def agent(daemon: Daemon, address: str, tmp_path: Path) -> AsyncIterator[Agent]:
    async with following(tmp_path / "a.sock", address) as agent:
        await until(lambda: agent.mirror.is_connected)
        yield agent


@pytest.fixture
def agent_address(agent: Agent, tmp_path: Path) -> str:
    del agent
    return f"unix://{tmp_path / 'a.sock'}"


async def same(agent: Agent, state: State) -> None:
    await until(lambda: agent.mirror.state.revision == state.revision)
    assert agent.mirror.state.read(EVERYTHING) == state.read(EVERYTHING)


async def test_what_is_asked_of_an_agent_is_as_if_asked_of_a_member(
    agent_address: str, agent: Agent, daemon: Daemon
) -> None:
    async with Store(agent_address) as store, Services(agent_address) as services:
        assert await store.put("a", b"1") == 2
        assert agent.mirror.state.revision == 2, "one sees one's own writes"
        assert await store.create("b", b"\xff\0", lease=await store.lease_grant(30)) == 3
        with pytest.raises(TransactionFailed):
            await store.create("b", b"2")
        with pytest.raises(LeaseNotFound):
            await store.put("c", b"1", lease=12345)
        done = await store.txn([compare_missing("x")], [Put("x", b"1"), Get("x"), Delete("a")])
        assert done.succeeded
        assert [[item.key for item in answer] for answer in done.answers] == [[], ["x"], ["a"]]
        lease = await store.lease_grant(30)
        assert await store.lease_keep_alive(lease) == 30
        one = await services.register(Instance(id="i", service="web", host="10.0.0.1", port=1), lease=lease)
        assert one.created_index > 0
        assert await services.instances("web") == [one] == list(agent.directory.instances("web"))
        meta = await services.set_meta("web", ServiceMeta(data={"a": "1"}))
        assert await services.meta("web") == meta
        await services.create("db", leader_type="manual")
        await store.lease_revoke(lease)
        assert await services.instances("web") == []
        await services.remove("web")
        with pytest.raises(ServiceNotFound):
            await services.remove("web")
        assert await services.all() == [Service(name="db", leader_type="manual")]
    await same(agent, daemon.member.state)
    assert daemon.member.state.read(EVERYTHING).count == 3


async def test_a_new_agent_copies_everything_in_pages(daemon: Daemon, address: str, tmp_path: Path) -> None:
    async with Store(address) as store:
        lease = await store.lease_grant(30)
        for number in range(30):
            await store.txn([], [Put(f"k/{number}/{n}", b"v" * n, lease if n == 3 else 0) for n in range(20)])
        await store.delete_prefix("k/7/")
        async with following(tmp_path / "a.sock", address) as agent:
            await until(lambda: agent.mirror.is_connected)
            await same(agent, daemon.member.state)
            await store.lease_revoke(lease)
            await store.put("k/7/1", b"again")
            await store.put("k/8/1", b"again")
            await same(agent, daemon.member.state)
            assert agent.mirror.resyncs == 1


async def test_without_members_it_reads_and_says_what_it_cannot(process: Process, tmp_path: Path) -> None:
    process.start()
    port = free_port()
    async with Store(process.address) as store, Services(process.address) as services:
        await services.register(Instance(id="i", service="web", host="10.0.0.1", port=1))
        await store.put("a", b"1")
    async with following(tmp_path / "a.sock", process.address) as agent, asyncio.TaskGroup() as tasks:
        await until(lambda: agent.mirror.is_connected)
        task = tasks.create_task(serve_dns(agent, port))
        process.kill()
        await until(lambda: not agent.mirror.is_connected)
        here = f"unix://{tmp_path / 'a.sock'}"
        async with Store(here, timeout_s=1.0) as store, Services(here, timeout_s=1.0) as services:
            assert [one.host for one in await services.instances("web")] == ["10.0.0.1"]
            assert (await ask(port, "web.discoverd")).answer[0][0].to_text() == "10.0.0.1"
            local = await store._caller.request("POST", "/v3/kv/range", body={"key": "YQ==", "serializable": True})
            assert b'"MQ=="' in local
            with pytest.raises(Unavailable):
                await store.get("a")
            with pytest.raises(Unavailable):
                await store.put("a", b"2")
        process.start()
        async with Store(here) as store:
            await store.put("a", b"3")
        await until(lambda: agent.mirror.is_connected)
        assert agent.mirror.resyncs == 1
        task.cancel()


async def serve_dns(agent: Agent, port: int) -> None:
    from discovery.dns import Server
    from discovery.resolvers import Resolvers

    await Server(agent.directory, Resolvers(Path("/nonexistent"), ""), agent.mirror.is_ready).run("127.0.0.1", port)


async def ask(port: int, name: str) -> dns.message.Message:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                return await dns.asyncquery.udp(dns.message.make_query(name, "A"), "127.0.0.1", timeout=1.0, port=port)
            except (dns.exception.Timeout, OSError):
                continue


async def test_before_it_knows_anything_it_says_so(tmp_path: Path) -> None:
    port = free_port()
    async with following(tmp_path / "a.sock", f"unix://{tmp_path / 'nobody'}") as agent, asyncio.TaskGroup() as tasks:
        task = tasks.create_task(serve_dns(agent, port))
        assert (await ask(port, "web.discoverd")).rcode() == dns.rcode.SERVFAIL
        async with Store(f"unix://{tmp_path / 'a.sock'}", timeout_s=0.5) as store:
            with pytest.raises(Unavailable):
                await store.get("a")
            with pytest.raises(Unavailable):
                await store._caller.request("POST", "/v3/kv/range", body={"key": "YQ==", "serializable": True})
        task.cancel()


async def test_a_watch_through_an_agent_misses_nothing_while_members_come_and_go(
    process: Process, tmp_path: Path
) -> None:
    process.start()
    seen: list[bytes] = []
    async with following(tmp_path / "a.sock", process.address) as agent, asyncio.TaskGroup() as tasks:

        async def watch() -> None:
            async with (
                Store(f"unix://{tmp_path / 'a.sock'}") as store,
                aclosing(store.watch("w/", from_revision=2)) as all,
            ):
                async for event in all:
                    if event.value is not None and not event.is_current:
                        seen.append(event.value)

        task = tasks.create_task(watch())
        wanted = []
        for round in range(4):
            async with Store(process.address) as store:
                for number in range(20):
                    wanted.append(b"%d-%d" % (round, number))
                    await store.put(f"w/{number % 3}", wanted[-1])
            process.kill()
            process.start()
        await until(lambda: len(seen) >= len(wanted))
        assert seen == wanted
        assert agent.mirror.resyncs == 1
        task.cancel()


async def test_what_was_compacted_while_it_was_away_comes_as_the_difference(process: Process, tmp_path: Path) -> None:
    process.start()
    heard: list[tuple[str, str]] = []
    caught_up = asyncio.Event()
    async with Services(process.address) as services:
        for id in ("stays", "goes", "changes"):
            await services.register(Instance(id=id, service="web", host="10.0.0.1", port=1))
    async with (
        following(tmp_path / "a.sock", f"unix://{tmp_path / 'link'}") as agent,
        asyncio.TaskGroup() as tasks,
    ):

        async def watch() -> None:
            async with Services(f"unix://{tmp_path / 'a.sock'}") as services, aclosing(services.watch("web")) as events:
                async for event in events:
                    heard.append((event.kind, event.instance.id if event.instance else ""))
                    if event.kind == "current":
                        caught_up.set()

        (tmp_path / "link").symlink_to(tmp_path / "d.sock")
        task = tasks.create_task(watch())
        async with asyncio.timeout(DEADLINE_S):
            await caught_up.wait()
        assert sorted(heard[:3]) == [("up", "changes"), ("up", "goes"), ("up", "stays")]
        del heard[:]
        (tmp_path / "link").unlink()
        process.kill()  # breaks the agent's connections; it cannot find the way back until the link is there
        process.start()
        async with Services(process.address) as services, Store(process.address) as store:
            await services.deregister("web", "goes")
            await services.register(Instance(id="changes", service="web", host="10.0.0.1", port=2))
            await services.register(Instance(id="comes", service="web", host="10.0.0.1", port=1))
            revision = await store.put("x", b"1")
            await store._caller.request("POST", "/v3/kv/compaction", body={"revision": revision})
        (tmp_path / "link").symlink_to(tmp_path / "d.sock")
        await until(lambda: len(heard) >= 3)
        assert sorted(heard) == [("down", "goes"), ("up", "comes"), ("update", "changes")]
        assert agent.mirror.resyncs == 2
        assert [one.id for one in agent.directory.instances("web")] == ["stays", "changes", "comes"]
        task.cancel()


async def test_a_store_that_is_another_now_is_copied_anew(tmp_path: Path) -> None:
    """As after `force-new-cluster` or a restore: what the copy has and members have not any more must go."""
    socket = tmp_path / "d.sock"
    async with following(tmp_path / "a.sock", f"unix://{socket}") as agent:
        async with running(tmp_path / "one", socket):
            async with Store(f"unix://{socket}") as store:
                for number in range(10):
                    await store.put(f"old/{number}", b"1")
            await until(lambda: agent.mirror.state.revision == 11)
        async with running(tmp_path / "two", socket) as daemon:
            async with Store(f"unix://{socket}") as store:
                await store.put("new", b"1")
            await until(lambda: agent.mirror.is_connected and agent.mirror.resyncs == 2)
            await same(agent, daemon.member.state)


async def test_it_turns_to_a_member_that_answers(daemon: Daemon, address: str, tmp_path: Path) -> None:
    dead = [f"unix://{tmp_path / 'dead-1'}", f"unix://{tmp_path / 'dead-2'}"]
    second = tmp_path / "second.sock"
    async with following(tmp_path / "a.sock", *dead, f"unix://{second}", *dead) as agent:
        async with serve.listen_unix(daemon.application(), second):
            await until(lambda: agent.mirror.is_connected)
            async with Store(f"unix://{tmp_path / 'a.sock'}") as store:
                await store.put("a", b"1")
        await until(lambda: not agent.mirror.is_connected)
        del address


async def test_a_member_whose_watch_is_behind_its_reads_is_left(
    agent: Agent, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "LAG_S", 0.2)
    failures = agent.mirror.failures
    monkeypatch.setattr(agent.watches, "on_applied", lambda _: None)
    monkeypatch.setattr(daemon.watches, "on_applied", lambda _: None)
    daemon.member.on_applied.clear()
    async with Store(f"unix://{agent.upstream.address.removeprefix('unix://')}") as store:
        await store.put("a", b"1")
    await until(lambda: agent.mirror.failures > failures)
    await same(agent, daemon.member.state)


async def test_history_of_a_copy_is_bounded(agent: Agent, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "EVENTS_MAX", 10)
    async with Store(agent.upstream.address) as store:
        for number in range(50):
            await store.put("a", b"%d" % number)
    await same(agent, daemon.member.state)
    assert agent.mirror.state.history_events <= 11


@settings(max_examples=300, deadline=None)
@given(st.lists(PUTS | DELETES | TRANSACTIONS, max_size=8))
def test_a_result_survives_the_way_through_json(bodies: list[Body]) -> None:
    """And what a copy makes of the events is what the store is."""
    state, copy = State(), State()
    for body in bodies:
        asked = near(body, state.revision)
        path, json = asking.request(asked)
        kinds: dict[str, Any] = {"put": etcdjson.PutJson, "deleterange": etcdjson.DeleteJson, "txn": etcdjson.TxnJson}
        request: Any = etcdjson.decode(msgspec.json.encode(json), kinds[path.rpartition("/")[2]])
        try:
            outcome = state.apply(request.to_operation())
        except Refused:
            continue
        raw = msgspec.json.encode(etcdjson.outcome(outcome))
        wanted = _without_previous(msgspec.to_builtins(outcome.result))
        got = asking.result(asked, replies.decode(raw, replies.Answer))
        assert _without_previous(msgspec.to_builtins(got)) == wanted
        if outcome.events:
            assert copy.follow([event.record for event in outcome.events]) == outcome.events
    assert copy.read(EVERYTHING) == state.read(EVERYTHING)
    assert copy.events_from(1) == state.events_from(1)
    if state.revision > 2:
        state.apply(Compact(revision=state.revision))


def _without_previous(value: object) -> object:
    """Whether removed keys are to be shown is of the request; an agent always has them shown to itself."""
    if isinstance(value, dict):
        return {key: _without_previous(item) for key, item in value.items() if key != "has_previous"}
    if isinstance(value, list):
        return [_without_previous(item) for item in value]
    return value


async def test_a_change_that_may_be_done_is_never_made_again(tmp_path: Path) -> None:
    """The first member takes the request and dies; the second must not be asked to do it once more."""
    asked: list[str] = []

    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.append("first")
        writer.close()

    async def says(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.append("second")
        body = b'{"header":{"revision":"7"},"kvs":[]}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    first = await asyncio.start_unix_server(dies, tmp_path / "first")
    second = await asyncio.start_unix_server(says, tmp_path / "second")
    upstream = Upstream([f"unix://{tmp_path / name}" for name in ("nobody", "first", "second")])
    while not upstream.address.endswith("nobody"):
        upstream.turn()
    copy = mirror.Mirror(upstream, "agent")
    with pytest.raises(DeadlineExceeded):
        await copy.propose(PutRequest(key=b"a"), timeout_s=2.0)
    assert asked == ["first"]
    assert (await copy.read(RangeRequest(key=b"a"))).count == 0
    assert asked == ["first", "first", "second"], "a read may be asked again"
    await upstream.close()
    first.close()
    second.close()


async def test_a_probe_that_is_overtaken_by_the_watch_loses_nothing(
    agent: Agent, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer may be older than what the watch has told meanwhile."""
    real = agent.upstream.ask_here

    async def late(path: str, body: Any) -> bytes:
        raw = await real(path, body)
        async with Store(agent.upstream.address) as store:
            revision = await store.put("a", b"1")
        assert await agent.mirror.wait_revision(revision, DEADLINE_S)
        return raw

    before = agent.mirror.state.revision
    monkeypatch.setattr(agent.upstream, "ask_here", late)
    assert await agent.mirror._probe() >= before
    monkeypatch.setattr(agent.upstream, "ask_here", real)
    await same(agent, daemon.member.state)
    assert (agent.mirror.resyncs, agent.mirror.failures) == (1, 0)


async def test_over_tls_it_shows_its_certificate_and_may_what_a_host_may(tmp_path: Path) -> None:
    authority = Authority.ensure(tmp_path)
    ca, server, host = (tmp_path / name for name in ("ca.pem", "server.pem", "host.pem"))
    server.write_bytes(authority.server(["127.0.0.1"]))
    host.write_bytes(authority.client("host-9", role="host"))
    where = remote.Listening("127.0.0.1", 0, ca, server)
    async with running(tmp_path / "state") as daemon, remote.listen(where, daemon.application, daemon.front) as port:
        tls = client_context(str(host), str(host), ca.read_text())
        agent = Agent.make([f"https://127.0.0.1:{port}"], "host-9", tls)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(agent.run())
            async with serve.listen_unix(agent.application(), tmp_path / "a.sock"):
                await until(lambda: agent.mirror.is_connected)
                here = f"unix://{tmp_path / 'a.sock'}"
                async with Store(here) as store, Services(here) as services:
                    lease = await store.lease_grant(30)
                    one = await services.register(Instance(id="i", service="web", host="10.0.0.1", port=1), lease=lease)
                    assert await services.instances("web") == [one]
                    assert await store.lease_keep_alive(lease) == 30
                    with pytest.raises(ServiceError, match="permission denied"):
                        await store.put("/of/others", b"1")
                await same(agent, daemon.member.state)
            task.cancel()
