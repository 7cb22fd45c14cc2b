"""Three members over real TLS and real disks: what was acknowledged is there, whoever goes and comes."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from discovery import rebuild
from discovery.disk import Disk
from discovery.frames import Damaged
from discovery.leases import Leases
from discovery.operations import PutRequest, RangeRequest, Refused
from discovery.raft import Member
from discovery.snapshots import Limits
from discovery.wire.errors import Conflict, DeadlineExceeded, NotLeader, Unavailable
from tests.discovery.members import DEADLINE_S, Members, free_ports, members


def put(key: str, value: bytes = b"v") -> PutRequest:
    return PutRequest(key=key.encode(), value=value)


async def value(member: Member, key: str, *, serializable: bool = False) -> bytes | None:
    records = (await member.read(RangeRequest(key=key.encode()), serializable=serializable)).records
    return records[0].value if records else None


def followers(made: Members) -> list[Member]:
    return [member for member in made.live.values() if not member.core.is_leader]


async def same_everywhere(made: Members) -> None:
    """Wait until all have applied the same."""
    async with asyncio.timeout(DEADLINE_S):
        while len({member.index for member in made.live.values()}) > 1:
            await asyncio.sleep(0.01)
    images = [member.state.image() for member in made.live.values()]
    assert all(image == images[0] for image in images)


async def test_any_member_writes_and_every_member_reads_it_at_once(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        for number, writer in enumerate(made.live.values()):
            await writer.propose(put("key", b"%d" % number))
            for reader in made.live.values():
                assert await value(reader, "key") == b"%d" % number
        assert not any(len(member.questions) for member in made.live.values()), "no question is kept for ever"
        with pytest.raises(Refused, match="lease not found"):
            await followers(made)[0].propose(PutRequest(key=b"a", lease=99))
        await same_everywhere(made)


async def test_all_restarted_know_everything(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        await asyncio.gather(*(made.live["b"].propose(put(f"k{n}", b"%d" % n)) for n in range(300)))
        for id in "abc":
            await made.stop(id)
        for id in "abc":
            made.start(id)
        await made.all_voting()
        assert await value(made.live["c"], "k299") == b"299"
        await same_everywhere(made)


async def test_the_leader_goes_and_a_new_one_serves(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        await leader.propose(put("before"))
        await made.stop(leader.member_id)
        other = await made.leader()
        await other.propose(put("after"))
        assert await value(followers(made)[0], "before") == b"v"
        made.start(leader.member_id)
        await made.all_voting()
        assert await value(made.live[leader.member_id], "after") == b"v"
        await same_everywhere(made)


async def test_without_a_majority_nothing_is_promised(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        await leader.propose(put("before"))
        for other in followers(made):
            await made.stop(other.member_id)
        async with asyncio.timeout(DEADLINE_S):
            while leader.is_leader:
                await asyncio.sleep(0.01)
        with pytest.raises(NotLeader, match="no leader"):
            await leader.propose(put("lonely"), timeout_s=0.5)
        with pytest.raises(Unavailable, match="majority"):
            await leader.read(RangeRequest(key=b"before"), timeout_s=0.5)
        assert await value(leader, "before", serializable=True) == b"v"


async def test_what_a_cut_off_leader_took_is_unknown_and_done_at_most_once(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        others = followers(made)
        for other in others:
            await made.stop(other.member_id)
        with pytest.raises(DeadlineExceeded):
            await leader.propose(put("unknown"), timeout_s=0.2)
        for other in others:
            made.start(other.member_id)
        await made.all_voting()
        found = (await made.live[others[0].member_id].read(RangeRequest(key=b"unknown"))).records
        assert not found or found[0].version == 1


async def test_a_change_survives_its_leader(tmp_path: Path) -> None:
    """Proposed at a follower, its leader dies under it: sent again with its id, it is done once."""
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        follower = followers(made)[0]
        writing = asyncio.gather(*(follower.propose(put(f"k{n}")) for n in range(50)))
        await asyncio.sleep(0)
        await made.stop(leader.member_id)
        async with asyncio.timeout(DEADLINE_S):
            await writing
        await made.leader()
        for n in range(50):
            found = (await follower.read(RangeRequest(key=b"k%d" % n))).records
            assert found[0].version == 1


async def test_a_repeated_entry_is_applied_once(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        taken = leader.core.proposals
        await leader.propose(put("a"))
        payloads = [entry[0] for entry in leader._journal[:] if entry[0][:1] == b"\x00"]
        taken += payloads * 3
        await leader.propose(put("b"))
        assert (await leader.read(RangeRequest(key=b"a"))).records[0].version == 1
        await same_everywhere(made)


async def test_an_orderly_stop_hands_over_before(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        await leader.propose(put("a"))
        term = leader.term
        await leader.hand_over()
        assert not leader.is_leader
        other = await made.leader()
        assert other.term == term + 1
        assert "handed over" in other.core.cause


async def test_a_wiped_member_comes_back_as_another_life_and_catches_up(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        await asyncio.gather(*(leader.propose(put(f"k{n}")) for n in range(100)))
        wiped = followers(made)[0].member_id
        before = made.live[wiped].identity.incarnation
        await made.stop(wiped)
        shutil.rmtree(tmp_path / wiped)
        made.start(wiped)
        assert made.live[wiped].identity.incarnation != before
        await made.all_voting()
        assert await value(made.live[wiped], "k99") == b"v"
        await same_everywhere(made)


async def test_a_wiped_founder_does_not_found_again(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        await leader.propose(put("a"))
        cluster_id = leader.cluster_id
        await made.stop("a")
        shutil.rmtree(tmp_path / "a")
        made.start("a")
        await made.all_voting()
        assert made.live["a"].cluster_id == cluster_id
        assert await value(made.live["a"], "a") == b"v"


async def test_a_follower_that_is_too_far_behind_gets_the_snapshot(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        behind = followers(made)[0].member_id
        await made.stop(behind)
        for member in made.live.values():
            member.snapshots.limits = Limits(100, 2**40, 0)
        big = b"x" * 5000
        for round in range(5):
            await asyncio.gather(*(leader.propose(put(f"k{round}-{n}", big)) for n in range(100)))
        async with asyncio.timeout(DEADLINE_S):
            while leader._journal[0][1] < 300:
                await leader.propose(put("poke"))
        member = made.start(behind)
        told: list[int] = []
        member.on_reset(told.append)
        await made.all_voting()
        assert await value(member, "k4-99") == big
        assert len(told) == 1
        await same_everywhere(made)
        await made.stop(behind)
        member = made.start(behind)
        await member.wait_ready()
        assert await value(member, "k4-99") == big


async def test_members_are_added_and_removed_one_at_a_time(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        await leader.propose(put("a"))
        made.addresses["d"] = f"127.0.0.1:{free_ports(1)[0]}"
        await followers(made)[0].add_member("d", made.addresses["d"])
        made.start("d")
        await made.all_voting()
        assert await value(made.live["d"], "a") == b"v"
        await made.live["d"].remove_member(leader.member_id)
        assert leader.member_id not in {peer.id for peer in (await made.leader()).status().members}
        await made.stop(leader.member_id)
        await (await made.leader()).propose(put("b"))
        await made.all_voting()


async def test_a_damaged_member_stops_and_one_command_brings_it_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        for n in range(20):
            await leader.propose(put(f"k{n}", b"%d" % n))
        damaged = followers(made)[0].member_id
        await made.stop(damaged)
        path = min((tmp_path / damaged).glob("journal-*"))
        raw = bytearray(path.read_bytes())
        raw[raw.find(b"k7")] ^= 1
        path.write_bytes(raw)
        with pytest.raises(Damaged, match="damaged at byte"):
            made.start(damaged)
        assert rebuild.main(["--state-dir", str(tmp_path / damaged)]) == 0
        assert "comes back" in capsys.readouterr().out
        made.start(damaged)
        await made.all_voting()
        assert await value(made.live[damaged], "k7") == b"7"
        await same_everywhere(made)
        assert rebuild.main(["--state-dir", str(tmp_path / damaged)]) == Conflict.exit_code, "it is running"


def test_a_member_that_is_alone_is_not_forgotten_by_mistake(tmp_path: Path) -> None:
    Member(tmp_path / "m", "m").close()
    with pytest.raises(Conflict, match="alone"):
        rebuild.set_aside(tmp_path / "m")
    assert (rebuild.set_aside(tmp_path / "m", is_alone_fine=True) / "reserve").exists()


async def test_a_member_that_has_moved_is_found_again(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        moved = followers(made)[0].member_id
        await made.stop(moved)
        made.addresses[moved] = f"127.0.0.1:{free_ports(1)[0]}"
        member = made.start(moved)
        await leader.propose(put("a"))
        async with asyncio.timeout(DEADLINE_S):
            while await value(member, "a", serializable=True) is None:
                await asyncio.sleep(0.01)
        await made.all_voting()
        assert {peer.id: peer.address for peer in leader.status().members} == made.addresses


async def test_a_leader_without_room_hands_over(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        id = leader.member_id
        await leader.propose(put("a"))
        full = Full()
        leader._disk = full
        leader._disk_checked_s = 0.0
        other = await made.leader(not_among=(id,))
        with pytest.raises(Unavailable, match="full"):
            await leader.propose(put("b"))
        assert await value(leader, "a") == b"v"
        await other.propose(put("c"))
        await same_everywhere(made)


async def test_a_member_of_a_cluster_does_not_start_alone(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        await made.stop("a")
        with pytest.raises(Conflict, match="belongs to a cluster"):
            Member(tmp_path / "a", "a")


async def test_a_leader_that_is_cut_off_stops_serving_and_its_return_disturbs_nobody(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        old = await made.all_voting()
        await old.propose(put("a", b"1"))
        made.cut(old.member_id)
        reading = asyncio.ensure_future(old.read(RangeRequest(key=b"a"), timeout_s=DEADLINE_S))
        new = await made.leader(not_among=(old.member_id,))
        await new.propose(put("a", b"2"))
        async with asyncio.timeout(DEADLINE_S):
            while old.is_leader:
                await asyncio.sleep(0.01)
        assert not reading.done(), "what it has is old: it must not say so"
        term = new.term
        await asyncio.sleep(3 * made.timing.election_s)
        assert old.term <= term, "it asks before it stands, and nobody answers"
        made.cut()
        assert (await reading).records[0].value == b"2"
        assert new.is_leader
        assert new.term == term
        await same_everywhere(made)


async def test_a_follower_that_is_cut_off_comes_back_without_an_election(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        behind = followers(made)[0]
        made.cut(behind.member_id)
        term = leader.term
        for n in range(50):
            await leader.propose(put(f"k{n}"))
        await asyncio.sleep(3 * made.timing.election_s)
        made.cut()
        assert await value(behind, "k49") == b"v"
        assert (leader.is_leader, leader.term) == (True, term)
        await same_everywhere(made)


async def test_leases_live_at_the_leader_and_start_anew_with_the_next(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leases = {id: Leases(member) for id, member in made.live.items()}
        running = [made.tasks.create_task(each.run()) for each in leases.values()]
        leader = await made.all_voting()
        follower = followers(made)[0].member_id
        short, long = await leases[follower].grant(1), await leases[follower].grant(3600)
        await made.live[follower].propose(PutRequest(key=b"short", lease=short.id))
        await made.live[follower].propose(PutRequest(key=b"long", lease=long.id))
        for _ in range(4):
            assert await leases[follower].keep_alive(short.id) == 1
            await asyncio.sleep(0.4)
        assert await value(leader, "short") == b""
        assert (await leases[follower].remaining_s([long.id, 5]))[1] == -1
        async with asyncio.timeout(DEADLINE_S):
            while await value(leader, "short") is not None:
                await asyncio.sleep(0.05)
        assert await leases[follower].keep_alive(short.id) == 0
        await made.stop(leader.member_id)
        new = await made.leader()
        assert (await leases[new.member_id].remaining_s([long.id]))[0] > 3500
        assert await value(new, "long") == b""
        for each in running:
            each.cancel()


class Full(Disk):
    """A disk without room."""

    def free_bytes(self, directory: Path) -> int:
        return 1000


class Failing(Disk):
    """A disk that refuses to sync once it is told to."""

    is_broken = False

    def fdatasync(self, fd: int) -> None:
        if self.is_broken:
            raise OSError(5, "Input/output error")
        super().fdatasync(fd)


async def test_a_leader_whose_disk_fails_makes_room_for_another(tmp_path: Path) -> None:
    async with members(tmp_path) as made:
        leader = await made.all_voting()
        id = leader.member_id
        await made.stop(id)
        await made.leader()
        disk = Failing()
        made.start(id, disk=disk)
        current = await made.all_voting()
        while current.member_id != id:
            await current.hand_over()
            current = await made.leader()
        await current.propose(put("a"))
        disk.is_broken = True
        with pytest.raises(DeadlineExceeded, match="disk failed"):
            await current.propose(put("b"))
        with pytest.raises(Unavailable, match="disk failed"):
            await current.propose(put("c"))
        other = await made.leader(not_among=(id,))
        assert await value(other, "a") == b"v"
        await other.propose(put("d"))
        ended = made.ends[id]
        assert isinstance(ended, ExceptionGroup)
        assert ended.subgroup(OSError)
