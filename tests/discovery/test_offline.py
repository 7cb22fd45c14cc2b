"""Snapshots as files: saved from a running daemon, checked, restored so that no crash leaves less than a store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from discovery import offline
from discovery.client import Store
from discovery.disk import Disk
from discovery.errors import Compacted
from discovery.operations import RangeRequest
from discovery.types import StoreStatus
from discovery.wire.blocking import BlockingCaller
from discovery.wire.errors import Conflict, Invalid, NotFound
from hostd.cli import main as cli
from tests.discovery.conftest import Process
from tests.discovery.test_agent import following, until


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    """A discovery daemon where a node would have it, so that the operator's commands find it."""
    monkeypatch.setenv("HOSTD_STATE_DIR", str(tmp_path / "lib"))
    monkeypatch.setenv("HOSTD_RUN_DIR", str(tmp_path / "run"))
    (tmp_path / "run" / "discovery").mkdir(parents=True)
    (tmp_path / "lib").mkdir()
    process = Process(tmp_path / "run" / "discovery")
    (tmp_path / "run" / "discovery" / "discovery.sock").symlink_to("d.sock")
    process.flags = ["--state-dir", str(tmp_path / "lib" / "discovery"), "--member-id", "host-1"]
    process.start()
    yield process
    if process.child is not None and process.child.poll() is None:
        process.kill()


async def write(process: Process, *keys: str) -> None:
    async with Store(process.address) as store:
        for key in keys:
            await store.put(key, b"v")


async def keys(process: Process) -> list[str]:
    async with Store(process.address) as store:
        return [item.key for item in (await store.range("")).items]


def run(*words: str) -> int:
    return cli.main(["discovery", *words])


async def test_save_and_restore_through_the_command(
    node: Process, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await write(node, "a", "b")
    file = tmp_path / "store.snapshot"
    assert run("snapshot", "save", str(file), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["keys"], told["revision"], told["size_bytes"]) == (2, 3, file.stat().st_size)
    assert file.stat().st_mode & 0o077 == 0
    assert run("snapshot", "save", str(file)) == Conflict.exit_code
    assert "--replace" in capsys.readouterr().err
    await write(node, "c")
    assert run("snapshot", "restore", str(file)) == Conflict.exit_code
    assert "--discard-current" in capsys.readouterr().err
    assert await keys(node) == ["a", "b", "c"]

    node.stop()
    assert run("snapshot", "restore", str(file), "--discard-current") == 0
    assert "restored 2 keys as of revision 3" in capsys.readouterr().out
    node.start()
    assert await keys(node) == ["a", "b"]
    await write(node, "d")
    node.kill()
    node.start()
    assert await keys(node) == ["a", "b", "d"]
    async with Store(node.address) as store:
        assert (await store.range("")).revision == 3 + offline.AHEAD + 1
        with pytest.raises(Compacted):  # noqa: PT012 — who has seen "c" as revision 4 must not go on from there
            async for event in store.watch("", from_revision=5):
                assert event.is_current
    # what was there before is whole, and can be gone back to
    node.stop()
    shutil.rmtree(tmp_path / "lib" / "discovery")
    (tmp_path / "lib" / "discovery.before-1").rename(tmp_path / "lib" / "discovery")
    node.start()
    assert await keys(node) == ["a", "b", "c"]


async def test_a_running_daemon_takes_the_restored_store_when_it_starts(node: Process, tmp_path: Path) -> None:
    """hostd starts it again; here the test does."""
    await write(node, "a")
    file = tmp_path / "store.snapshot"
    assert run("snapshot", "save", str(file)) == 0
    await write(node, "b")
    offline.prepare(file, tmp_path / "lib" / "discovery", may_discard=True)
    with pytest.raises(Conflict):
        offline.adopt_next(tmp_path / "lib" / "discovery")
    assert await keys(node) == ["a", "b"]
    node.kill()
    node.start()
    assert await keys(node) == ["a"]
    assert "another store was put in place" in node.log


async def test_status_and_members(node: Process, capsys: pytest.CaptureFixture[str]) -> None:
    await write(node, "a")
    assert run("status", "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["role"], status["member_id"], status["keys"], status["revision"]) == ("leader", "host-1", 1, 2)
    assert run("status") == 0
    assert "revision:" in capsys.readouterr().out
    assert run("members") == 0
    assert "host-1" in capsys.readouterr().out
    text = BlockingCaller(node.address).request("GET", "/metrics").decode()
    assert "discovery_revision 2\n" in text
    assert "discovery_is_leader 1\n" in text
    assert "discovery_proposals_total 1\n" in text
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert len(samples) == sum(not line.startswith("#") for line in text.splitlines()), "no name twice"
    assert int(samples["discovery_log_sync_seconds_count"]) >= 2
    assert samples['discovery_log_sync_seconds_bucket{le="+Inf"}'] == samples["discovery_log_sync_seconds_count"]
    assert float(samples["discovery_log_sync_seconds_sum"]) > 0
    assert BlockingCaller(node.address).request("GET", "/status", into=StoreStatus).leases == 0


def test_without_a_daemon_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOSTD_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("HOSTD_RUN_DIR", str(tmp_path))
    for words in (("status",), ("members",), ("snapshot", "save", str(tmp_path / "x"))):
        assert run(*words) == 69
        assert "sudo hostd up" in capsys.readouterr().err
    assert run("snapshot", "restore", str(tmp_path / "nothing")) == NotFound.exit_code
    assert list(tmp_path.iterdir()) == []


async def test_a_damaged_snapshot_is_refused_at_every_byte(node: Process, tmp_path: Path) -> None:
    await write(node, "a", "b")
    file, directory = tmp_path / "store.snapshot", tmp_path / "other"
    assert run("snapshot", "save", str(file)) == 0
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at])
        with pytest.raises(Invalid):
            offline.read(file)
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(Invalid):
            offline.prepare(file, directory, may_discard=True)
    assert not directory.exists()
    assert not offline.beside(directory, ".next").exists()


class Crash(BaseException):
    """The power went."""


@pytest.mark.parametrize("step", range(12))
async def test_a_crash_between_any_two_steps_leaves_the_old_store_or_the_new_one(
    node: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    await write(node, "a")
    file, directory = tmp_path / "store.snapshot", tmp_path / "lib" / "discovery"
    assert run("snapshot", "save", str(file)) == 0
    await write(node, "b")
    node.stop()
    left = step

    def counted(real: object) -> object:
        def call(*words: object, **named: object) -> object:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            return real(*words, **named)  # type: ignore[operator]

        return call

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", counted(Path.rename))
        patched.setattr(Disk, "rename", counted(Disk.rename))
        patched.setattr(Path, "mkdir", counted(Path.mkdir))
        patched.setattr(Disk, "sync_directory", counted(Disk.sync_directory))
        patched.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            offline.prepare(file, directory, may_discard=True)
            offline.adopt_next(directory)
        except Crash:
            pass
    node.start()
    assert await keys(node) in (["a"], ["a", "b"])
    if left:
        assert await keys(node) == ["a"], "there was no crash after all"


async def test_an_agent_that_has_seen_what_is_lost_looks_anew(node: Process, tmp_path: Path) -> None:
    file, directory = tmp_path / "store.snapshot", tmp_path / "lib" / "discovery"
    await write(node, "a")
    assert run("snapshot", "save", str(file)) == 0
    async with following(tmp_path / "a.sock", node.address) as agent:
        await write(node, "lost-1", "lost-2")
        await until(lambda: agent.mirror.state.revision == 4)
        node.stop()
        offline.prepare(file, directory, may_discard=True)
        node.start()
        await write(node, "b", "c", "d")
        await until(lambda: agent.mirror.is_connected and agent.mirror.state.key_count == 4)
        found = agent.mirror.state.read(RangeRequest(key=b"\0", range_end=b"\0", keys_only=True))
        assert [record.key for record in found.records] == [b"a", b"b", b"c", b"d"]
