"""The fence around pysyncobj: what it loses, hangs on or runs as shipped, ours does not."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pysyncobj.syncobj
import pytest

from discovery import codec, raft, snapshot
from discovery.codec import Unreadable
from discovery.core import MEMBERSHIP
from discovery.disk import Disk
from discovery.frames import Damaged
from discovery.journal import Journal
from discovery.membership import Cluster, Membership, Peer, encode
from discovery.operations import (
    Compact,
    DeleteRequest,
    Event,
    LeaseGrant,
    Outcome,
    PutRequest,
    RangeRequest,
    Refused,
)
from discovery.peerwire import Chunk
from discovery.raft import Member
from discovery.snapshots import Limits
from discovery.state import State
from discovery.wire.errors import Conflict, DeadlineExceeded, Internal, ServiceError, Unavailable
from hostd.authority import Authority
from tests.discovery.conftest import DEADLINE_S, running
from tests.discovery.crash.damage import RefusingDisk
from tests.discovery.members import certify


def put(key: str, value: bytes = b"v") -> PutRequest:
    return PutRequest(key=key.encode(), value=value)


async def value(member: Member, key: str) -> bytes | None:
    records = (await member.read(RangeRequest(key=key.encode()))).records
    return records[0].value if records else None


async def test_what_was_answered_is_there_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        await asyncio.gather(*(daemon.member.propose(put(f"k{n}", b"%d" % n)) for n in range(200)))
        await daemon.member.propose(DeleteRequest(key=b"k7"))
        before = daemon.member.state.image()
    async with running(tmp_path) as daemon:
        assert daemon.member.state.image() == before
        assert await value(daemon.member, "k199") == b"199"
        assert daemon.member.term == 2


async def test_an_answer_comes_after_the_sync_of_what_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is acknowledged could be read from the synced part of the file at that moment."""
    synced = bytearray()
    write = Journal._write_durably

    def remember(journal: Journal, raw: bytes, at: int, *, is_tight: bool = False) -> None:
        write(journal, raw, at, is_tight=is_tight)
        synced.extend(raw)

    async with running(tmp_path) as daemon:
        monkeypatch.setattr(Journal, "_write_durably", remember)
        for number in range(30):
            key = f"key-{number}-end"
            await daemon.member.propose(put(key))
            assert key.encode() in synced


async def test_a_group_of_proposals_shares_its_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as daemon:
        calls = 0
        write = Journal._write_durably

        def count(journal: Journal, raw: bytes, at: int, *, is_tight: bool = False) -> None:
            nonlocal calls
            calls += 1
            write(journal, raw, at, is_tight=is_tight)

        monkeypatch.setattr(Journal, "_write_durably", count)
        await asyncio.gather(*(daemon.member.propose(put(f"k{n}")) for n in range(500)))
        assert calls < 20


async def test_a_failing_disk_stops_the_member_and_answers_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = Member(tmp_path, "test")

    def fail(journal: Journal, raw: bytes, at: int, *, is_tight: bool = False) -> None:
        raise OSError(5, "Input/output error")

    with pytest.RaisesGroup(OSError, flatten_subgroups=True):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(member.run())
            await member.wait_ready()
            monkeypatch.setattr(Journal, "_write_durably", fail)
            with pytest.raises(DeadlineExceeded, match="disk failed"):
                await member.propose(put("a"))
            with pytest.raises(Unavailable, match="disk failed"):
                await member.propose(put("b"))
    member.close()


async def test_a_full_disk_refuses_writes_and_still_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as daemon:
        await daemon.member.propose(put("a"))
        monkeypatch.setattr(raft, "DISK_RESERVE_BYTES", 2**62)
        daemon.member._disk_checked_s = 0.0
        with pytest.raises(Unavailable, match="full"):
            await daemon.member.propose(put("b"))
        assert await value(daemon.member, "a") == b"v"


async def test_refused_commands_are_answered_and_the_next_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        with pytest.raises(Refused, match="lease not found"):
            await daemon.member.propose(PutRequest(key=b"a", lease=99))
        await daemon.member.propose(put("a"))


async def test_a_command_that_trips_over_a_bug_does_not_hang_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As shipped, one raising command wedges the library for ever."""
    async with running(tmp_path) as daemon:
        with monkeypatch.context() as patch:
            patch.setattr(State, "_grant", lambda *_: 1 // 0)
            with pytest.raises(Internal):
                await daemon.member.propose(LeaseGrant(id=1, ttl_s=1))
        await daemon.member.propose(put("a"))


async def test_a_listener_that_raises_harms_nobody(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        told: list[Event] = []

        def fail(_: list[Event]) -> None:
            raise ValueError

        daemon.member.on_applied(fail)
        daemon.member.on_applied(told.extend)
        await daemon.member.propose(put("a"))
        assert [event.record.key for event in told] == [b"a"]


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/hostd-discovery-was-unpickled",)


@pytest.mark.parametrize("kind", [0, 2, 3])
async def test_pickles_in_the_log_are_not_run(tmp_path: Path, kind: int) -> None:
    """As shipped, an entry of any of these kinds is unpickled; ours stops or ignores it."""
    journal = Journal(tmp_path)
    journal.add(b"\x01", 1, 0)
    journal.add(bytes((kind,)) + pickle.dumps(Bomb()), 2, 1)
    journal.sync_now()
    journal.close()
    if kind == 2:
        with pytest.raises(Unreadable):
            Member(tmp_path, "test")
    else:
        member = Member(tmp_path, "test")
        if kind == 0:
            with pytest.raises(Unreadable):
                member.core.step()
        else:
            member.core.step()
            assert member.state.revision == 1
        member.close()
    assert not Path("/tmp/hostd-discovery-was-unpickled").exists()


def test_the_library_has_no_pickle_left() -> None:
    for name in ("loads", "dumps", "load", "dump"):
        with pytest.raises(AssertionError, match="pickle"):
            getattr(pysyncobj.syncobj.pickle, name)(b"")


async def test_no_port_is_opened(tmp_path: Path) -> None:
    def listening() -> set[str]:
        lines = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
        inodes = {line.split()[9] for line in lines if line.split()[3] == "0A"}
        mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd.isdigit() and
                os.path.exists(f"/proc/self/fd/{fd}")}  # fmt: skip
        return {inode for inode in inodes if f"socket:[{inode}]" in mine}

    before = listening()
    async with running(tmp_path):
        assert listening() == before


async def compacted(member: Member) -> None:
    """Wait until a compaction has ended."""
    async with asyncio.timeout(DEADLINE_S):
        while member.snapshots.taking is None:
            await member.propose(put("poke"))
        await member.snapshots.taking


async def test_the_log_is_compacted_and_nothing_is_lost(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        member = daemon.member
        member.snapshots.limits = Limits(50, 2**40, 0)
        for round in range(6):
            await asyncio.gather(*(member.propose(put(f"k{round}-{n}", b"%d" % n)) for n in range(100)))
            await compacted(member)
        assert member.log_entries < 400
        assert len(list(tmp_path.glob("snapshot-*"))) == 1
        assert len(list(tmp_path.glob("journal-*"))) <= 3
        before = member.state.image()
    async with running(tmp_path) as daemon:
        assert daemon.member.state.image() == before
        await daemon.member.propose(put("after"))
    async with running(tmp_path) as daemon:
        assert await value(daemon.member, "after") == b"v"


async def test_a_crash_between_snapshot_and_cutting_the_log_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As shipped this is where all acknowledged writes after the dump are thrown away."""
    monkeypatch.setattr(Journal, "forget_to", lambda self, index, *, keep: None)
    async with running(tmp_path) as daemon:
        daemon.member.snapshots.limits.entries = 20
        await asyncio.gather(*(daemon.member.propose(put(f"k{n}")) for n in range(50)))
        await compacted(daemon.member)
        await asyncio.gather(*(daemon.member.propose(put(f"later{n}")) for n in range(50)))
        before = daemon.member.state.image()
    monkeypatch.undo()
    assert list(tmp_path.glob("snapshot-*"))
    async with running(tmp_path) as daemon:
        assert daemon.member.state.image() == before


async def test_a_failed_snapshot_leaves_the_log_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    async with running(tmp_path) as daemon:
        with monkeypatch.context() as patch:
            patch.setattr(snapshot, "save", fail)
            daemon.member.snapshots.limits.entries = 20
            await asyncio.gather(*(daemon.member.propose(put(f"k{n}")) for n in range(50)))
            await compacted(daemon.member)
        before = daemon.member.state.image()
    async with running(tmp_path) as daemon:
        assert daemon.member.state.image() == before


async def test_history_is_compacted_through_the_log(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        for n in range(10):
            await daemon.member.propose(put("a", b"%d" % n))
        await daemon.member.propose(Compact(revision=9))
    async with running(tmp_path) as daemon:
        assert daemon.member.state.compacted == 9
        assert await value(daemon.member, "a") == b"9"


async def test_two_daemons_do_not_share_a_folder(tmp_path: Path) -> None:
    async with running(tmp_path):
        with pytest.raises(Conflict, match="in use"):
            Member(tmp_path, "other")


async def test_damage_stops_the_start(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        for n in range(5):
            await daemon.member.propose(put(f"k{n}"))
    path = next(tmp_path.glob("journal-*"))
    raw = bytearray(path.read_bytes())
    raw[raw.find(b"k1")] ^= 1
    path.write_bytes(raw)
    with pytest.raises(Damaged):
        Member(tmp_path, "test")


async def test_before_it_is_ready_it_says_so(tmp_path: Path) -> None:
    member = Member(tmp_path, "test")
    with pytest.raises(Unavailable, match="starting") as caught:
        await member.propose(put("a"))
    assert isinstance(caught.value, ServiceError)
    assert caught.value.retry
    member.close()


async def test_an_idle_member_writes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        outcome = await daemon.member.propose(put("a"))
        assert isinstance(outcome, Outcome)
        size = daemon.member.disk_bytes()
        await asyncio.sleep(2.2)
        assert daemon.member.disk_bytes() == size


def _open_files(directory: Path) -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(link.readlink()))
    return [name for name in found if name.startswith(str(directory))]


@pytest.mark.parametrize("trouble", ["log", "snapshot", "identity", "another's", "certificate", "cluster", "disk"])
def test_a_member_that_cannot_be_made_holds_nothing(tmp_path: Path, trouble: str) -> None:
    """What a failed attempt would keep (the lock, the log) another attempt in the same process could not have."""
    ca, own = certify(Authority.make(), tmp_path / "tls", "a")
    cluster = Cluster("127.0.0.1:1", {"a": "127.0.0.1:1", "b": "127.0.0.1:2"}, ca, own, own)
    directory = tmp_path / "a"
    Member(directory, "a", cluster=cluster).close()
    healthy = tmp_path / "healthy"
    shutil.copytree(directory, healthy)
    given: dict[str, Any] = {"cluster": cluster}
    if trouble == "log":
        next(directory.glob("journal-*")).write_bytes(b"nonsense")
        next(directory.glob("journal-*")).open("ab").write(next(healthy.glob("journal-*")).read_bytes())
    elif trouble == "snapshot":
        snapshot.path_of(directory, 5).write_bytes(b"nonsense")
    elif trouble == "identity":
        (directory / "identity").write_bytes(b"nonsense")
    elif trouble == "certificate":
        own.write_bytes(b"nonsense")
    elif trouble == "cluster":
        journal = Journal(directory)
        journal.add(bytes((MEMBERSHIP,)) + encode(Membership(7, (Peer("a", "127.0.0.1:1", 1, True),))), 1, 1)
        journal.sync_now()
        journal.close()
        given = {}
    elif trouble == "disk":
        given["disk"] = RefusingDisk(1, errno.EIO, stays=True)
    threads = threading.active_count()
    with pytest.raises((Damaged, Conflict, OSError)) as caught:
        Member(directory, "b" if trouble == "another's" else "a", **given)
    assert caught.value is not None
    assert _open_files(directory) == []
    assert threading.active_count() == threads
    shutil.rmtree(directory)
    healthy.rename(directory)
    own.write_bytes(certify(Authority.make(), tmp_path / "again", "a")[1].read_bytes())
    Member(directory, "a", cluster=cluster).close()


class SlowDisk(Disk):
    """A disk whose syncs can be held up; `overlaps` are the changes of the log that came while one was under way."""

    def __init__(self) -> None:
        self._logs: set[int] = set()
        self._is_syncing = False
        self.overlaps: list[str] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_held_up = threading.Event()

    def _changes(self, what: str) -> None:
        if self._is_syncing:
            self.overlaps.append(what)

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        if path.name.startswith("journal-"):
            self._changes(f"open {path.name}")
            self._logs.add(fd)
        return fd

    def write(self, fd: int, raw: bytes | memoryview, at: int) -> int:
        if fd in self._logs:
            self._changes("write")
        return super().write(fd, raw, at)

    def fdatasync(self, fd: int) -> None:
        self._changes("sync")
        self._is_syncing = True
        if not self.may_go_on.is_set():
            self.is_held_up.set()
            assert self.may_go_on.wait(DEADLINE_S)
        time.sleep(0.005)
        super().fdatasync(fd)
        self._is_syncing = False


async def test_a_snapshot_takes_the_place_of_the_log_between_two_syncs(tmp_path: Path) -> None:
    """A slow disk syncs in a thread: the log does not begin anew under its hands."""
    disk = SlowDisk()
    member = Member(tmp_path, "test", disk=disk)
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(member.run())
        await member.wait_ready()
        for n in range(3):
            await member.propose(put(f"k{n}"))
        image, index, term = member.state.image(), member.index + 1000, member.term
        raw = b"".join(snapshot.written(index, term, codec.encode_snapshot(codec.Meta(b"", []), image)))

        disk.may_go_on.clear()
        writing = tasks.create_task(_refused(member))
        await asyncio.to_thread(disk.is_held_up.wait, DEADLINE_S)
        read = asyncio.Event()
        finish = member.between_turns

        def noticed(act: Callable[[], None]) -> None:
            read.set()
            finish(act)

        member.between_turns = noticed  # type: ignore[method-assign]
        member.snapshots.take_chunk("leader", Chunk(term, index, term, 0, len(raw), raw), tasks)
        await read.wait()
        assert member.index < index
        disk.may_go_on.set()
        while member.index < index:
            await asyncio.sleep(0.005)
        assert disk.overlaps == []
        running.cancel()
        await writing
    member.close()
    member = Member(tmp_path, "test")
    assert (member.index, member.state.image()) == (index, image)
    member.close()


async def _refused(member: Member) -> None:
    with contextlib.suppress(ServiceError):
        await member.propose(put("overtaken"))
