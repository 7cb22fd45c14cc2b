"""The daemon as a process: killed at any moment, it comes back with everything that it had acknowledged."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from discovery.client import Store
from discovery.wire.blocking import BlockingCaller
from discovery.wire.errors import Internal, ServiceError
from tests.discovery.conftest import DEADLINE_S, Process


class Writers:
    """Clients that write unique values for as long as they may, and note what was acknowledged."""

    def __init__(self, address: str, count: int) -> None:
        self.address = address
        self.count = count
        self.acknowledged: dict[str, bytes] = {}
        self.attempted: dict[str, bytes] = {}
        self.enough = asyncio.Event()

    async def write(self, store: Store, writer: int, round: int) -> None:
        number = 0
        while True:
            number += 1
            key, value = f"w/{writer}/{number % 50}", f"{round}-{writer}-{number}".encode()
            self.attempted[key] = value
            try:
                await store.put(key, value + b"x" * random.randrange(2000))
            except ServiceError:
                return
            self.acknowledged[key] = value
            if len(self.acknowledged) > self.count:
                self.enough.set()

    async def run(self, writers: int, round: int) -> None:
        async with Store(self.address) as store, asyncio.TaskGroup() as tasks:
            for writer in range(writers):
                tasks.create_task(self.write(store, writer, round))


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_kill_nine_under_writes_loses_nothing_acknowledged(process: Process, seed: int) -> None:
    dice = random.Random(seed)
    process.start()
    for round in range(5):
        writers = Writers(process.address, dice.randrange(50, 300))
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
            tasks.create_task(writers.run(8, round))
            await writers.enough.wait()
            await asyncio.sleep(dice.random() * 0.05)
            process.kill()
        process.start()
        async with Store(process.address) as store:
            stored = {item.key: item.value.rstrip(b"x") for item in (await store.range("w/")).items}
        for key, value in writers.acknowledged.items():
            # the one write that was under way may be done or not; nothing older may come back
            assert stored[key] in (value, writers.attempted[key]), key
    assert "CRITICAL" not in process.log


async def test_kill_nine_during_compaction_loses_nothing_acknowledged(process: Process) -> None:
    """Large values make the log long at once, so that snapshots are written all the time."""
    process.start()
    acknowledged: dict[str, bytes] = {}

    async def write(store: Store, writer: int) -> None:
        number = 0
        while True:
            number += 1
            value = b"%d" % number + b"x" * 900_000
            try:
                await store.put(f"w/{writer}", value)
            except ServiceError:
                return
            acknowledged[f"w/{writer}"] = value

    for _ in range(3):
        async with asyncio.timeout(60), Store(process.address) as store, asyncio.TaskGroup() as tasks:
            for writer in range(3):
                tasks.create_task(write(store, writer))
            while not list((process.directory / "state").glob("snapshot-*.draft")):
                await asyncio.sleep(0.001)
            process.kill()
        process.start()
        async with Store(process.address) as store:
            for key, value in acknowledged.items():
                found = await store.get(key)
                assert found is not None
                assert int(found.value.split(b"x")[0]) >= int(value.split(b"x")[0])


async def test_a_torn_tail_is_cut_and_said(process: Process) -> None:
    process.start()
    async with Store(process.address) as store:
        for n in range(5):
            await store.put(f"k{n}", b"v")
    process.kill()
    journal = next((process.directory / "state").glob("journal-*"))
    with journal.open("ab") as file:
        file.write(b"\xd5HR\x1e half a record")
    process.start()
    async with Store(process.address) as store:
        assert len((await store.range("k")).items) == 5
    assert "torn tail" in process.log


async def test_damage_is_refused_with_a_clear_message(process: Process) -> None:
    process.start()
    async with Store(process.address) as store:
        for n in range(5):
            await store.put(f"key-{n}", b"v")
    process.kill()
    journal = next((process.directory / "state").glob("journal-*"))
    raw = bytearray(journal.read_bytes())
    raw[raw.find(b"key-1")] ^= 0xFF
    journal.write_bytes(raw)
    process.start(is_expected_up=False)
    assert process.child is not None
    assert process.child.wait(DEADLINE_S) == Internal.exit_code
    assert "is damaged at byte" in process.log
    assert "Traceback" not in process.log


async def test_leases_survive_a_restart_and_then_expire(process: Process) -> None:
    process.start()
    async with Store(process.address) as store:
        lease = await store.lease_grant(2)
        await store.put("a", b"1", lease=lease)
        process.kill()
        process.start()
        assert await store.lease_keep_alive(lease) == 2
        async with asyncio.timeout(DEADLINE_S):
            async for event in store.watch("a"):
                if event.value is None and not event.is_current:
                    break


def test_a_signal_stops_it_at_once_even_with_watchers(process: Process) -> None:
    process.start()
    seen = threading.Event()

    def follow() -> None:
        try:
            for _ in BlockingCaller(process.address).events("/instances", dict, {"follow": "1"}):
                seen.set()
        except ServiceError:
            pass

    follower = threading.Thread(target=follow)
    follower.start()
    assert seen.wait(DEADLINE_S)
    assert process.child is not None
    process.child.send_signal(signal.SIGTERM)
    assert process.child.wait(1.5) == 0
    follower.join(DEADLINE_S)
    assert not (process.directory / "d.sock").exists()


def test_the_state_is_private(process: Process) -> None:
    process.start()
    state = process.directory / "state"
    assert state.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in state.iterdir())
    assert (process.directory / "d.sock").stat().st_mode & 0o077 == 0


def test_a_second_daemon_on_the_same_state_says_why_not(process: Process, tmp_path: Path) -> None:
    process.start()
    other = subprocess.run(
        [sys.executable, "-m", "discovery.daemon",
         "--state-dir", str(tmp_path / "state"), "--socket", str(tmp_path / "o")],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert other.returncode == 75
    assert "in use" in other.stderr


def test_at_rest_it_uses_next_to_no_time(process: Process) -> None:
    def ticks() -> int:
        assert process.child is not None
        fields = Path(f"/proc/{process.child.pid}/stat").read_text().rsplit(")")[1].split()
        return int(fields[11]) + int(fields[12])

    process.flags = ["--dns-address", "127.0.0.1:0"]
    process.start()
    threading.Event().wait(0.5)
    before = ticks()
    threading.Event().wait(3.0)
    assert ticks() - before <= 1  # 0.33 % of a core
