"""Looking after a store of three members: who has a vote, going on alone, and agents while leaders come and go."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from discovery import mirror, offline
from discovery.client import Services, Store
from discovery.daemon import Daemon
from discovery.disk import DISK, Disk
from discovery.operations import RangeRequest
from discovery.raft import Member
from discovery.types import Instance, StoreStatus
from discovery.wire import serve
from discovery.wire.call import Caller
from discovery.wire.errors import Conflict, NotFound, ServiceError, Unavailable
from tests.discovery.members import TIMING, Members, started
from tests.discovery.test_agent import following, until

DEADLINE_S = 60.0


@dataclass
class Nodes(Members):
    """Members with everything that a daemon has around them, their API on `ID.sock`."""

    daemons: dict[str, Daemon] = field(default_factory=dict)

    def address(self, id: str) -> str:
        return f"unix://{self.folder / id}.sock"

    def start(self, id: str, *, disk: Disk = DISK) -> Member:
        daemon = self.daemons[id] = Daemon.make(self.folder / id, id, self.cluster(id), TIMING)
        self.live[id] = daemon.member
        self.running[id] = self.tasks.create_task(self._serve(id, daemon))
        return daemon.member

    async def _serve(self, id: str, daemon: Daemon) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(daemon.member.run())
                tasks.create_task(daemon.leases.run())
                async with serve.listen_unix(daemon.application(), Path(f"{self.folder / id}.sock")):
                    await asyncio.Event().wait()
        except* (ServiceError, OSError) as group:
            self.ends[id] = group

    async def status(self, id: str) -> StoreStatus:
        async with Caller(self.address(id)) as caller:
            return await caller.request("GET", "/status", into=StoreStatus)

    async def ask(self, id: str, member: str, verb: str, **query: str) -> None:
        async with Caller(self.address(id)) as caller:
            await caller.request("POST", f"/members/{member}/{verb}", query=query)


def nodes(folder: Path, count: int = 3) -> contextlib.AbstractAsyncContextManager[Nodes]:
    return started(Nodes, folder, count)


async def voters(made: Nodes, id: str) -> list[str]:
    return [member.id for member in (await made.status(id)).members if member.is_voter]


async def until_voters(made: Nodes, id: str, wanted: list[str]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(Unavailable):  # it has just been started
                if await voters(made, id) == wanted:
                    return
            await asyncio.sleep(0.05)


async def test_votes_are_taken_and_given_through_any_member(tmp_path: Path) -> None:
    async with nodes(tmp_path) as made:
        leader = (await made.leader()).member_id
        follower, other = (id for id in made.live if id != leader)
        seen = await made.status(follower)
        assert (seen.role, seen.leader_id) == ("follower", leader)
        assert [member.id for member in seen.members if member.is_leader] == [leader]
        await made.ask(follower, other, "demote")
        await until_voters(made, follower, sorted([leader, follower]))
        await until(lambda: made.daemons[other].status().role == "learner")
        async with Store(made.address(other)) as store:
            await store.put("a", b"1")  # it goes on following, and passing on
        await made.ask(follower, other, "promote")
        await until_voters(made, follower, sorted(made.live))
        await made.ask(follower, leader, "demote")  # hands over first
        await until_voters(made, follower, sorted([follower, other]))
        with pytest.raises(NotFound):
            await made.ask(follower, "nobody", "promote")
        await made.ask(follower, leader, "remove")
        async with asyncio.timeout(DEADLINE_S):
            while leader in [member.id for member in (await made.status(follower)).members]:
                await asyncio.sleep(0.05)


async def test_the_last_one_goes_on_alone_with_all_it_has(tmp_path: Path) -> None:
    async with nodes(tmp_path) as made:
        async with Store(made.address("a")) as store:
            lease = await store.lease_grant(60)
            for number in range(20):
                await store.put(f"k/{number}", b"v", lease=lease if number == 3 else 0)
        await until(lambda: made.live["a"].state.revision == 21)
        with pytest.raises(Conflict):
            offline.force(made.folder / "a")
        for id in ("b", "c", "a"):
            await made.stop(id)
        before = made.folder / "a"
        assert offline.force(before) == {"revision": 21, "keys": 20, "leases": 1}
        assert offline.adopt_next(before) == made.folder / "a.before-1"
        made.start("a")
        await until_voters(made, "a", ["a"])
        async with Store(made.address("a")) as store:
            assert len((await store.range("k/")).items) == 20
            assert await store.lease_keep_alive(lease) == 60
            await store.put("new", b"1")
        # a member of the old cluster is not let in with what it has
        made.start("b")
        await asyncio.sleep(1.0)
        assert await voters(made, "a") == ["a"]
        assert made.live["b"].state.read(RangeRequest(key=b"new")).count == 0
        await made.stop("b")
        # wiped and promoted, it is
        shutil.rmtree(made.folder / "b")
        await made.ask("a", "b", "promote", address=made.addresses["b"])
        made.start("b")
        await until_voters(made, "a", ["a", "b"])
        await until(lambda: made.live["b"].state.revision == made.live["a"].state.revision)
        assert made.live["b"].state.image() == made.live["a"].state.image()


async def test_a_wish_to_go_on_alone_is_carried_out_at_the_next_start(tmp_path: Path) -> None:
    async with nodes(tmp_path) as made:
        async with Store(made.address("a")) as store:
            await store.put("a", b"1")
        await until(lambda: made.live["a"].state.revision == 2)
        offline.wish(made.folder / "a")
        for id in list(made.live):
            await made.stop(id)
        assert "goes on alone" in offline.carry_out(made.folder / "a")
        assert offline.carry_out(made.folder / "a") == ""
        made.start("a")
        await until_voters(made, "a", ["a"])


async def test_an_agent_follows_through_changes_of_leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "PROBE_S", 0.2)
    async with nodes(tmp_path) as made, following(tmp_path / "agent.sock", *map(made.address, made.live)) as agent:
        await until(lambda: agent.mirror.is_connected)
        here = f"unix://{tmp_path / 'agent.sock'}"
        async with Services(here) as services, Store(here) as store:
            lease = await store.lease_grant(60)
            for round in range(3):
                leader = (await made.leader()).member_id
                await made.stop(leader)
                async with asyncio.timeout(DEADLINE_S):
                    while True:
                        try:
                            await store.put(f"round/{round}", b"1")
                            one = Instance(id=f"i{round}", service="web", host="10.0.0.1", port=round + 1)
                            await services.register(one, lease=lease)
                            break
                        except ServiceError:
                            await asyncio.sleep(0.1)
                assert len(agent.directory.instances("web")) == round + 1
                made.start(leader)
                await made.all_voting()
            state = (await made.leader()).state
            await until(lambda: agent.mirror.state.revision == state.revision)
            everything = RangeRequest(key=b"\0", range_end=b"\0")
            assert agent.mirror.state.read(everything) == state.read(everything)
            assert agent.mirror.resyncs == 1
            assert await store.lease_keep_alive(lease) == 60
            await store.lease_revoke(lease)
            await until(lambda: not agent.directory.instances("web"))
