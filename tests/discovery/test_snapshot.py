from __future__ import annotations

import random
from pathlib import Path

import pytest

from discovery import snapshot
from discovery.frames import Damaged


def test_the_newest_snapshot_replaces_older_ones(tmp_path: Path) -> None:
    snapshot.save(tmp_path, 5, 1, [b"old"])
    snapshot.save(tmp_path, 300, 2, [b"one", b"two"])
    assert snapshot.load(tmp_path) == snapshot.Snapshot(300, 2, [b"one", b"two"])
    assert len(list(tmp_path.iterdir())) == 1


def test_a_draft_left_by_a_crash_is_ignored_and_removed(tmp_path: Path) -> None:
    snapshot.save(tmp_path, 5, 1, [b"old"])
    (tmp_path / "snapshot-0000000000000009.draft").write_bytes(b"half")
    found = snapshot.load(tmp_path)
    assert found is not None
    assert found.index == 5
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_save_leaves_the_previous_one(tmp_path: Path) -> None:
    snapshot.save(tmp_path, 5, 1, [b"old"])

    def chunks() -> list[bytes]:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        snapshot.save(tmp_path, 6, 1, (chunk for chunk in chunks()))
    found = snapshot.load(tmp_path)
    assert found is not None
    assert found.index == 5


def test_no_damage_goes_unseen(tmp_path: Path) -> None:
    snapshot.save(tmp_path, 5, 1, [b"x" * 300, b"y" * 300])
    path = tmp_path / "snapshot-0000000000000005"
    whole = path.read_bytes()
    dice = random.Random(3)
    for _ in range(300):
        raw = bytearray(whole)
        raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
        path.write_bytes(raw)
        with pytest.raises(Damaged):
            snapshot.load(tmp_path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            snapshot.load(tmp_path)
