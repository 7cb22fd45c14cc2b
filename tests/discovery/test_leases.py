"""Who may say that a lease stands, and who may end it: only a leader that a majority has just confirmed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from discovery.leases import Leases
from discovery.operations import Lease, LeaseRevoke, Outcome, PutRequest
from discovery.raft import Member
from discovery.wire.errors import ServiceError
from tests.discovery.conftest import DEADLINE_S, running
from tests.discovery.members import Members, members


@asynccontextmanager
async def leased(folder: Path) -> AsyncIterator[tuple[Members, dict[str, Leases]]]:
    async with members(folder) as made:
        leases = {id: Leases(member) for id, member in made.live.items()}
        tasks = [made.tasks.create_task(each.run()) for each in leases.values()]
        try:
            yield made, leases
        finally:
            for task in tasks:
                task.cancel()


async def test_a_leader_that_is_cut_off_renews_nothing(tmp_path: Path) -> None:
    """The next one gives the lease its time from when it began, and would end it sooner than was answered here."""
    async with leased(tmp_path) as (made, leases):
        leader = await made.all_voting()
        lease = await leases[leader.member_id].grant(5)
        assert await leases[leader.member_id].keep_alive(lease.id) == 5
        made.cut(leader.member_id)
        assert leader.is_leader, "it cannot know yet"
        for ask in (leases[leader.member_id].keep_alive(lease.id), leases[leader.member_id].remaining_s([lease.id])):
            with pytest.raises(ServiceError):
                await ask


async def test_what_a_deposed_leader_wanted_to_end_stays(tmp_path: Path) -> None:
    """Its clients had gone to the next leader long since, which answers them."""
    async with leased(tmp_path) as (made, leases):
        old = await made.all_voting()
        lease = await leases[old.member_id].grant(5)
        await old.propose(PutRequest(key=b"held", lease=lease.id))
        made.cut(old.member_id)
        leases[old.member_id]._deadlines[lease.id] = 0.0
        leases[old.member_id]._changed.set()
        new = await made.leader(not_among=(old.member_id,))
        assert not old.is_leader
        assert await leases[new.member_id].keep_alive(lease.id) == 5
        made.cut()
        await made.all_voting()
        await old.propose(PutRequest(key=b"later"))  # goes the same way as what waits to be proposed again
        await asyncio.sleep(0.2)
        assert await leases[new.member_id].keep_alive(lease.id) == 5
        assert new.state.lease_keys(lease.id)


class _Behind:
    """A member that leads since a moment ago, and has yet to apply what its predecessor had answered."""

    def __init__(self, member: Member) -> None:
        self._member = member

    async def confirm_leading(self) -> None:
        await self._member.propose(PutRequest(key=b"nothing"))
        self.is_applied = True

    is_applied = False

    class _State:
        def __init__(self, owner: _Behind) -> None:
            self._owner = owner

        def lease(self, id: int) -> Lease | None:
            return Lease(id, 7) if self._owner.is_applied else None

    def __getattr__(self, name: str) -> object:
        return _Behind._State(self) if name == "state" else getattr(self._member, name)


async def test_a_lease_that_is_not_applied_yet_is_not_said_to_be_gone(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        for asked in (0, 1):
            leases = Leases(_Behind(daemon.member))  # type: ignore[arg-type]
            if asked:
                assert await leases.remaining_s([3]) == [7]
            else:
                assert await leases.keep_alive(3) == 7


@contextmanager
def held_up(member: Member) -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Hold up the end of leases; yield what is set when one is due, and what lets it go on."""
    is_due, may_go_on = asyncio.Event(), asyncio.Event()
    real = member.propose

    async def propose(body: object, *words: float, **named: int) -> Outcome:
        if isinstance(body, LeaseRevoke):
            is_due.set()
            await may_go_on.wait()
        return await real(body, *words, **named)  # type: ignore[arg-type]

    member.propose = propose  # type: ignore[method-assign,assignment]
    yield is_due, may_go_on
    member.propose = real  # type: ignore[method-assign]


async def test_a_lease_that_is_renewed_while_another_is_ended_stays(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        leases = daemon.leases
        first, second = await leases.grant(60), await leases.grant(60)
        with held_up(daemon.member) as (is_due, may_go_on):
            leases._deadlines.update({first.id: 0.0, second.id: 0.0})
            leases._changed.set()
            async with asyncio.timeout(DEADLINE_S):
                await is_due.wait()
            assert await leases.keep_alive(second.id) == 60
            may_go_on.set()
            async with asyncio.timeout(DEADLINE_S):
                while daemon.member.state.lease(first.id) is not None:
                    await asyncio.sleep(0.01)
            await daemon.member.propose(PutRequest(key=b"after"))
            await asyncio.sleep(0.1)
        assert daemon.member.state.lease(second.id) is not None
