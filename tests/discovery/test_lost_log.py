"""A member whose log is gone: it begins a new life and gets everything from the others, or says that nobody has it."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from discovery import offline
from discovery.disk import Disk
from discovery.frames import Damaged
from discovery.membership import read_identity
from discovery.operations import PutRequest, RangeRequest
from discovery.raft import Member
from discovery.snapshots import Limits
from discovery.wire.errors import NotFound, Unavailable
from tests.discovery.members import DEADLINE_S, Members, members


def put(key: str, value: bytes = b"v") -> PutRequest:
    return PutRequest(key=key.encode(), value=value)


async def value(member: Member, key: str) -> bytes | None:
    records = (await member.read(RangeRequest(key=key.encode()))).records
    return records[0].value if records else None


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.01)


def remove(directory: Path) -> None:
    for path in directory.glob("journal-*"):
        path.unlink()


def empty(directory: Path) -> None:
    for path in directory.glob("journal-*"):
        os.truncate(path, 0)


def zero(directory: Path) -> None:
    for path in directory.glob("journal-*"):
        path.write_bytes(bytes(path.stat().st_size))


def everything_but_identity(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name != "identity":
            path.unlink()


@pytest.mark.parametrize(
    ("lose", "has_snapshot"), [(remove, False), (empty, True), (zero, True), (everything_but_identity, False)]
)
async def test_a_member_without_its_log_is_another_life(
    tmp_path: Path, lose: Callable[[Path], None], *, has_snapshot: bool
) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        victim = next(member for member in made.live.values() if member is not leader)
        id, before = victim.member_id, victim.identity
        if has_snapshot:
            victim.snapshots.limits = Limits(10, 2**40, 0)
        for n in range(30):
            await leader.propose(put(f"k{n}"))
        await until(lambda: victim.index == leader.index)
        assert bool(list((tmp_path / id).glob("snapshot-*"))) == has_snapshot
        await made.stop(id)
        lose(tmp_path / id)

        victim = made.start(id)
        assert victim.identity.incarnation != before.incarnation, "votes would count for a life that forgot them"
        assert victim.identity.lost_cluster_id == leader.cluster_id
        assert not victim.core.is_voter
        await made.all_voting()
        assert await value(victim, "k29") == b"v"
        await until(lambda: read_identity(tmp_path / id).lost_cluster_id == 0)
        again = victim.identity
        await made.stop(id)
        assert made.start(id).identity == again, "once is enough"
        await made.all_voting()


async def test_what_it_confirmed_is_not_given_up_by_those_who_lack_it(tmp_path: Path) -> None:
    """The only follower that has an acknowledged entry loses its log: it may not elect one who has not got it."""
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        has, lacks = (id for id in made.live if id != leader.member_id)
        await made.stop(lacks)
        await leader.propose(put("acknowledged"))
        await made.stop(leader.member_id)
        await made.stop(has)
        empty(tmp_path / has)
        made.start(has)
        made.start(lacks)
        await asyncio.sleep(6 * made.timing.election_s)
        assert not any(member.core.leader_id for member in made.live.values())
        made.start(leader.member_id)
        await made.all_voting()
        assert await value(made.live[has], "acknowledged") == b"v"


@pytest.mark.parametrize("has_snapshots", [False, True])
async def test_where_all_have_lost_it_nobody_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, has_snapshots: bool
) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        for member in made.live.values():
            member.snapshots.limits = Limits(10 if has_snapshots else 10**6, 2**40, 0)
        for n in range(30):
            await leader.propose(put(f"k{n}"))
        await until(lambda: len({member.index for member in made.live.values()}) == 1)
        for id in "abc":
            await made.stop(id)
            empty(tmp_path / id)
        for _ in range(2):  # the second start finds logs, with nothing in them
            for id in "abc":
                made.start(id)
            await asyncio.sleep(6 * made.timing.election_s)
            assert not any(member.core.leader_id for member in made.live.values())
            if not has_snapshots:
                await until(lambda: all("no other" in each.trouble for each in made.live.values()))
                with pytest.raises(Unavailable, match="a and b and c had a store and lost the log"):
                    made.live["b"].check_ready()
                await until(lambda: "no other member has it: waiting" in caplog.text)
            for id in "abc":
                await made.stop(id)
        with pytest.raises(NotFound, match="was lost"):
            offline.force(tmp_path / "a")
        if has_snapshots:
            file = max((tmp_path / "a").glob("snapshot-*"))
            offline.prepare(file, tmp_path / "a", may_discard=True, address=made.addresses["a"])
            offline.adopt_next(tmp_path / "a")
            assert await value(await _leading(made, "a"), "k5") == b"v"


async def _leading(made: Members, id: str) -> Member:
    member = made.start(id)
    await made.leader()
    await member.wait_ready()
    return member


async def test_new_members_do_not_found_beside_one_that_remembers(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        await (await made.all_voting()).propose(put("k"))
        for id in "abc":
            await made.stop(id)
        empty(tmp_path / "c")
        for id in "ab":
            shutil.rmtree(tmp_path / id)
        for id in "abc":
            made.start(id)
        await until(lambda: all("c had a store" in member.trouble for member in made.live.values()))
        assert all(member.core.membership is None for member in made.live.values())
        # whoever wants to begin with nothing can say so
        await made.stop("c")
        shutil.rmtree(tmp_path / "c")
        made.start("c")
        await (await made.all_voting()).propose(put("new"))
        assert not any(member.trouble for member in made.live.values())


async def test_two_of_five_without_a_log_come_back_though_they_ask_each_other(tmp_path: Path) -> None:
    async with members(tmp_path, 5) as made:
        leader = await made.all_voting()
        victims = [id for id in made.live if id != leader.member_id][:2]
        for id in victims:
            made.live[id].snapshots.limits = Limits(10, 2**40, 0)
        for n in range(30):
            await leader.propose(put(f"k{n}"))
        await until(lambda: all(list((tmp_path / id).glob("snapshot-*[0-9a-f]")) for id in victims))
        for id in victims:
            await made.stop(id)
            remove(tmp_path / id)
        for id in victims:
            made.start(id)
        await made.all_voting()
        assert await value(made.live[victims[0]], "k29") == b"v"


class _Cut(BaseException):
    """The process was killed."""


class _DyingDisk(Disk):
    """The real disk, for so many changes of it."""

    def __init__(self, changes: int) -> None:
        self.left = changes

    def _may_die(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _Cut

    def write(self, fd: int, raw: bytes | memoryview, at: int) -> int:
        self._may_die()
        return super().write(fd, raw, at)

    def fsync(self, fd: int) -> None:
        self._may_die()
        super().fsync(fd)

    def fdatasync(self, fd: int) -> None:
        self._may_die()
        super().fdatasync(fd)

    def rename(self, old: Path, new: Path) -> None:
        self._may_die()
        super().rename(old, new)

    def sync_directory(self, directory: Path) -> None:
        self._may_die()
        super().sync_directory(directory)


async def test_killed_at_every_step_of_its_very_first_start_it_is_still_a_first_one(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        for id in "abc":
            await made.stop(id)
            shutil.rmtree(tmp_path / id)
        steps = 0
        while True:
            disk = _DyingDisk(steps)
            try:
                Member(tmp_path / "a", "a", cluster=made.cluster("a"), disk=disk).close()
                break
            except _Cut:
                steps += 1
        assert steps >= 6
        assert read_identity(tmp_path / "a").lost_cluster_id == 0
        for id in "abc":
            made.start(id)
        await (await made.all_voting()).propose(put("k"))


@pytest.mark.parametrize("has_snapshot", [False, True])
async def test_alone_without_its_log_it_does_not_begin_with_nothing(tmp_path: Path, *, has_snapshot: bool) -> None:
    directory = tmp_path / "m"
    member = Member(directory, "m")
    member.snapshots.limits = Limits(10 if has_snapshot else 10**6, 2**40, 0)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(member.run())
        await member.wait_ready()
        for n in range(30):
            await member.propose(put(f"k{n}"))
        await until(lambda: bool(list(directory.glob("snapshot-*[0-9a-f]"))) == has_snapshot)
        running.cancel()
    member.close()
    empty(directory)
    with pytest.raises(Damaged, match=r"log in .* is gone, (only .*snapshot-|nothing)"):
        Member(directory, "m")
