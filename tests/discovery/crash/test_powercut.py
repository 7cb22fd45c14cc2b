"""The disk that loses its power keeps what was synced, loses some of the rest, and finds out who forgot to sync."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.discovery.crash.powercut import Platter
from tests.discovery.crash.taping import TapingDisk

CREATE = os.O_WRONLY | os.O_CREAT


class Rig:
    """A directory, its tape and its platter."""

    def __init__(self, folder: Path) -> None:
        self.directory = folder / "state"
        self.directory.mkdir()
        self.tape = folder / "tape"
        self.platter = Platter(self.directory)
        self.disk = TapingDisk(self.tape)

    def write(self, name: str, raw: bytes, at: int = 0, *, is_synced: bool = True) -> None:
        fd = self.disk.open(self.directory / name, CREATE)
        self.disk.write_all(fd, raw, at)
        if is_synced:
            self.disk.fdatasync(fd)
        self.disk.close(fd)

    def cut(self, seed: int) -> dict[str, bytes]:
        self.platter.follow(self.tape)
        self.platter.cut(random.Random(seed))
        return self.found()

    def found(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.directory.iterdir()}


def after_cuts(folder: Path, work: Callable[[Rig], None], count: int = 60) -> list[dict[str, bytes]]:
    """Do the same work again and again and lose power after it, each time with other dice."""
    found = []
    for seed in range(count):
        (folder / str(seed)).mkdir()
        rig = Rig(folder / str(seed))
        work(rig)
        found.append(rig.cut(seed))
    return found


def test_what_was_synced_stays(tmp_path: Path) -> None:
    def work(rig: Rig) -> None:
        rig.write("a", b"x" * 3000)
        rig.disk.sync_directory(rig.directory)

    assert all(found == {"a": b"x" * 3000} for found in after_cuts(tmp_path, work))


def test_what_was_not_synced_is_there_or_not_or_torn_at_a_sector(tmp_path: Path) -> None:
    def work(rig: Rig) -> None:
        rig.write("a", b"x" * 1024)
        rig.disk.sync_directory(rig.directory)
        rig.write("a", b"y" * 1024, 512, is_synced=False)

    contents = {found["a"] for found in after_cuts(tmp_path, work)}
    assert b"x" * 1024 in contents
    assert b"x" * 512 + b"y" * 1024 in contents
    assert b"x" * 1024 + b"y" * 512 in contents, "the later sector alone"
    assert all(content.startswith(b"x" * 512) for content in contents)


def test_later_writes_may_be_there_without_earlier_ones(tmp_path: Path) -> None:
    def work(rig: Rig) -> None:
        rig.write("a", b"")
        rig.disk.sync_directory(rig.directory)
        rig.write("a", b"1" * 512, 0, is_synced=False)
        rig.write("a", b"2" * 512, 512, is_synced=False)

    assert bytes(512) + b"2" * 512 in {found["a"] for found in after_cuts(tmp_path, work)}


def test_a_name_is_not_there_before_its_directory_is_synced(tmp_path: Path) -> None:
    def work(rig: Rig) -> None:
        rig.write("a", b"x")

    found = after_cuts(tmp_path, work)
    assert {} in found
    assert {"a": b"x"} in found


def test_a_rename_is_whole_but_only_sure_after_the_sync_of_the_directory(tmp_path: Path) -> None:
    def work(rig: Rig) -> None:
        rig.write("a", b"old")
        rig.disk.sync_directory(rig.directory)
        rig.write("a.draft", b"new")
        rig.disk.rename(rig.directory / "a.draft", rig.directory / "a")

    contents = {found["a"] for found in after_cuts(tmp_path, work)}
    assert contents == {b"old", b"new"}


def test_a_rename_before_the_sync_of_the_content_can_leave_an_empty_file(tmp_path: Path) -> None:
    """The classic mistake is found."""

    def work(rig: Rig) -> None:
        rig.write("a", b"old")
        rig.disk.sync_directory(rig.directory)
        rig.write("a.draft", b"new", is_synced=False)
        rig.disk.rename(rig.directory / "a.draft", rig.directory / "a")
        rig.disk.sync_directory(rig.directory)

    assert b"" in {found["a"] for found in after_cuts(tmp_path, work)}


def test_an_unlink_may_come_back(tmp_path: Path) -> None:
    def work(rig: Rig) -> None:
        rig.write("a", b"x")
        rig.disk.sync_directory(rig.directory)
        rig.disk.unlink(rig.directory / "a")

    assert {"a": b"x"} in after_cuts(tmp_path, work)


def test_a_kill_without_a_power_cut_keeps_everything_and_forgets_no_debt(tmp_path: Path) -> None:
    def work(rig: Rig) -> None:
        rig.write("a", b"x" * 100)
        rig.disk.sync_directory(rig.directory)
        rig.write("a", b"y" * 100, 100, is_synced=False)
        rig.platter.follow(rig.tape)
        assert rig.platter.reconcile() == []
        assert rig.found() == {"a": b"x" * 100 + b"y" * 100}
        rig.disk = TapingDisk(rig.tape)  # the next process syncs nothing of it either

    assert {found["a"] for found in after_cuts(tmp_path, work)} >= {b"x" * 100, b"x" * 100 + b"y" * 100}


@pytest.mark.parametrize("torn", ["write", "create", "rename", "unlink", "truncate"])
def test_a_step_that_never_got_to_the_tape_is_made_up_for(tmp_path: Path, torn: str) -> None:
    """The process was killed after the step and before the note of it."""
    rig = Rig(tmp_path)
    rig.write("a", b"x" * 100)
    rig.disk.sync_directory(rig.directory)
    path = rig.directory / "a"
    if torn == "write":
        path.write_bytes(b"x" * 100 + b"y")
    elif torn == "create":
        (rig.directory / "b").touch()
    elif torn == "rename":
        path.rename(rig.directory / "b")
    elif torn == "unlink":
        path.unlink()
    else:
        os.truncate(path, 50)
    expected = rig.found()
    rig.platter.follow(rig.tape)
    assert rig.platter.reconcile() != []
    assert rig.platter.reconcile() == []
    rig.disk = TapingDisk(rig.tape)
    for name in expected:
        fd = rig.disk.open(rig.directory / name, os.O_RDWR)
        rig.disk.fsync(fd)
    rig.disk.sync_directory(rig.directory)
    assert rig.cut(1) == expected


def test_a_tape_that_ends_in_the_middle_of_a_word_is_read_up_to_there(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.write("a", b"x" * 100)
    rig.disk.sync_directory(rig.directory)
    with rig.tape.open("ab") as file:
        file.write(rig.tape.read_bytes()[:30])
    assert rig.cut(1) == {"a": b"x" * 100}
