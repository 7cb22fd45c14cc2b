"""The log on disk under every kind of damage that a crash or a bad disk can do to it."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from pathlib import Path

import pytest

from discovery import journal as journals
from discovery.frames import Damaged
from discovery.journal import Entry, Journal


@pytest.fixture(autouse=True)
def nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the files end where the records do, so that tests can cut and flip bytes of records."""
    monkeypatch.setattr(journals, "_AHEAD_BYTES", 0)


def fill(directory: Path, count: int, *, synced: bool = True) -> list[Entry]:
    journal = Journal(directory)
    journal.setCurrentTerm(1, "me")
    entries = []
    for index in range(1, count + 1):
        entry = (b"command %d" % index, index, 1)
        journal.add(*entry)
        entries.append(entry)
        if synced:
            journal.sync_now()
    journal.sync_now()
    journal.close()
    return entries


def read(directory: Path, snapshot_index: int = 0, snapshot_term: int = 0) -> list[Entry]:
    journal = Journal(directory, snapshot_index=snapshot_index, snapshot_term=snapshot_term)
    try:
        return journal[:]
    finally:
        journal.close()


def segment(directory: Path) -> Path:
    return sorted(directory.glob("journal-*"))[-1]


def test_comes_back_as_written(tmp_path: Path) -> None:
    entries = fill(tmp_path, 50)
    journal = Journal(tmp_path)
    assert journal[:] == entries
    assert (journal.getCurrentTerm(), journal.getVotedForNodeId()) == (1, "me")
    journal.close()


def test_a_tail_torn_at_any_byte_is_cut_and_can_be_written_on(tmp_path: Path) -> None:
    entries = fill(tmp_path, 6)
    whole = segment(tmp_path).read_bytes()
    ends = [whole.find(b"command %d" % n) + len(b"command %d" % n) for n in range(1, 7)]
    for length in range(ends[2], len(whole)):
        segment(tmp_path).write_bytes(whole[:length])
        kept = sum(end <= length for end in ends)
        journal = Journal(tmp_path)
        assert journal[:] == entries[:kept], length
        journal.add(b"after", kept + 1, 1)
        journal.sync_now()
        journal.close()
        assert read(tmp_path) == [*entries[:kept], (b"after", kept + 1, 1)]


def test_zeros_ahead_of_the_writing_are_no_torn_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journals, "_AHEAD_BYTES", 5000)
    entries = fill(tmp_path, 3)
    assert segment(tmp_path).stat().st_size > 5000
    journal = Journal(tmp_path)
    journal.add(b"after", 4, 1)
    journal.sync_now()
    journal.rotate()
    journal.close()
    assert read(tmp_path) == [*entries, (b"after", 4, 1)]
    assert "torn" not in caplog.text
    assert min(tmp_path.glob("journal-*")).stat().st_size < 5000


def test_a_restart_voids_what_was_before(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    journal = Journal(tmp_path)
    journal.restart(100, 7)
    journal.add(b"after", 101, 8)
    journal.sync_now()
    journal.close()
    assert len(list(tmp_path.glob("journal-*"))) == 1
    assert read(tmp_path, snapshot_index=100, snapshot_term=7)[1:] == [(b"after", 101, 8)]


def test_a_power_cut_between_a_snapshot_from_the_leader_and_its_record_voids_another_history(tmp_path: Path) -> None:
    fill(tmp_path, 8)
    assert read(tmp_path, snapshot_index=5, snapshot_term=9)[1:] == []
    assert read(tmp_path, snapshot_index=5, snapshot_term=9)[1:] == []


def test_garbage_after_the_end_is_cut(tmp_path: Path) -> None:
    entries = fill(tmp_path, 3)
    with segment(tmp_path).open("ab") as file:
        file.write(random.Random(1).randbytes(5000))
    assert read(tmp_path) == entries


def test_a_flipped_bit_is_never_believed(tmp_path: Path) -> None:
    """Wherever it is: refused as damage, or in the last record, which holds nothing, cut."""
    entries = fill(tmp_path, 20)
    whole = segment(tmp_path).read_bytes()
    dice = random.Random(7)
    refused = 0
    for _ in range(1000):
        raw = bytearray(whole)
        at = dice.randrange(len(raw))
        raw[at] ^= 1 << dice.randrange(8)
        segment(tmp_path).write_bytes(raw)
        try:
            assert read(tmp_path) == entries, at
        except Damaged:
            refused += 1
    assert refused > 900


def test_what_was_never_synced_may_be_torn_in_the_middle(tmp_path: Path) -> None:
    """A power cut may keep the later sectors of a group and lose the earlier: nobody was promised any of it."""
    fill(tmp_path, 20, synced=False)
    raw = bytearray(segment(tmp_path).read_bytes()[: -journals._SYNCED_BYTES])
    at = raw.find(b"command 5")
    raw[at : at + 5] = bytes(5)
    segment(tmp_path).write_bytes(raw)
    assert len(read(tmp_path)) == 4


def test_a_missing_segment_is_damage(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for index in range(1, 4):
        journal.add(b"x", index, 0)
        journal.sync_now()
        journal.rotate()
    journal.close()
    sorted(tmp_path.glob("journal-*"))[1].unlink()
    with pytest.raises(Damaged, match="missing"):
        Journal(tmp_path)


def test_a_tear_in_an_older_segment_is_damage(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    journal = Journal(tmp_path)
    journal.rotate()
    journal.close()
    first = min(tmp_path.glob("journal-*"))
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(Damaged):
        Journal(tmp_path)


@pytest.mark.parametrize("length", range(0, 40, 3))
def test_a_segment_that_was_not_born_is_removed(tmp_path: Path, length: int) -> None:
    entries = fill(tmp_path, 3)
    journal = Journal(tmp_path)
    journal.rotate()
    journal.close()
    newest = segment(tmp_path)
    newest.write_bytes(newest.read_bytes()[:length])
    open_again(tmp_path)
    assert read(tmp_path) == entries


def open_again(directory: Path) -> None:
    """Undo the last step of a rotation, as a power cut does that comes before it."""
    for path in directory.glob("journal-*.closed"):
        path.rename(path.with_suffix(""))


def test_a_missing_snapshot_is_seen_though_nothing_has_come_after_it(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    journal = Journal(tmp_path)
    last = journal[-1][1]
    journal.rotate()
    journal.forget_to(last)
    journal.close()
    assert len(list(tmp_path.glob("journal-*"))) == 1
    assert read(tmp_path, last, 1)[1:] == []
    with pytest.raises(Damaged, match="a snapshot or a part is missing"):
        Journal(tmp_path)


def test_a_missing_segment_is_seen_though_none_of_its_entries_is_followed_by_another(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    journal = Journal(tmp_path)
    journal.rotate()
    journal.close()
    min(tmp_path.glob("journal-*")).unlink()
    with pytest.raises(Damaged, match="missing"):
        Journal(tmp_path)


@pytest.mark.parametrize("is_emptied", [False, True])
def test_the_loss_of_the_newest_segment_is_seen(tmp_path: Path, *, is_emptied: bool) -> None:
    """It has what was promised last; without it the log would look whole."""
    fill(tmp_path, 3)
    journal = Journal(tmp_path)
    journal.rotate()
    journal.setCurrentTerm(7, "them")
    journal.add(b"acknowledged", 4, 7)
    journal.sync_now()
    journal.close()
    if is_emptied:
        os.truncate(segment(tmp_path), 0)
    else:
        segment(tmp_path).unlink()
    with pytest.raises(Damaged, match="gone"):
        Journal(tmp_path)


def test_a_rotation_that_was_cut_short_is_finished_by_the_next_start(tmp_path: Path) -> None:
    entries = fill(tmp_path, 3)
    journal = Journal(tmp_path)
    journal.rotate()
    journal.close()
    open_again(tmp_path)
    assert read(tmp_path) == entries
    segment(tmp_path).unlink()
    with pytest.raises(Damaged, match="gone"):
        Journal(tmp_path)


def test_the_very_first_segment_may_be_unborn_too(tmp_path: Path) -> None:
    (tmp_path / "journal-0000000000000001").write_bytes(b"HOST")
    assert read(tmp_path) == []


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    raw = bytearray(segment(tmp_path).read_bytes())
    raw[11] = 9
    segment(tmp_path).write_bytes(raw)
    with pytest.raises(Damaged, match="format 9"):
        Journal(tmp_path)


def test_truncation_is_remembered(tmp_path: Path) -> None:
    entries = fill(tmp_path, 5)
    journal = Journal(tmp_path)
    journal.deleteEntriesFrom(3)
    journal.add(b"other", 4, 2)
    journal.sync_now()
    journal.close()
    assert read(tmp_path) == [*entries[:3], (b"other", 4, 2)]


def test_a_snapshot_newer_than_the_log_head_loses_nothing_after_it(tmp_path: Path) -> None:
    """The library's own journal forgets everything here; that was 50 of 50 acknowledged writes."""
    entries = fill(tmp_path, 10)
    assert read(tmp_path, snapshot_index=6, snapshot_term=1)[1:] == entries[6:]
    assert read(tmp_path, snapshot_index=10, snapshot_term=1)[1:] == []


def test_forgetting_deletes_only_covered_segments(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for index in range(1, 10):
        journal.add(b"%d" % index, index, 1)
        journal.sync_now()
        if index % 3 == 0:
            journal.rotate()
    journal.forget_to(5)
    assert [entry[1] for entry in journal[:]] == [5, 6, 7, 8, 9]
    assert len(list(tmp_path.glob("journal-*"))) == 3
    journal.close()
    assert [entry[1] for entry in read(tmp_path, snapshot_index=5, snapshot_term=1)] == [5, 6, 7, 8, 9]


def test_term_and_vote_survive_rotation_and_forgetting(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.setCurrentTerm(7, "them")
    journal.add(b"x", 1, 7)
    journal.sync_now()
    journal.rotate()
    journal.forget_to(1)
    journal.close()
    again = Journal(tmp_path, snapshot_index=1, snapshot_term=7)
    assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (7, "them")
    again.close()


@pytest.mark.needs_root
def test_a_disk_that_fills_up_at_once_takes_what_is_under_way_from_the_reserve(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: it mounts a file system")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)], check=True)
    try:
        entries = fill(tmp_path, 3)
        journal = Journal(tmp_path)
        with (tmp_path / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        entries += [(b"x" * 8000, index, 1) for index in range(4, 9)]
        for entry in entries[3:]:
            journal.add(*entry)
            journal.sync_now()
        journal.close()
        assert read(tmp_path) == entries
        (tmp_path / "ballast").unlink()
        Journal(tmp_path).close()
        assert (tmp_path / "reserve").exists()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
