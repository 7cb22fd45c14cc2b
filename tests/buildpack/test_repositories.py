from __future__ import annotations

from pathlib import Path

import pytest

from buildpack.errors import DiskFull
from buildpack.repositories import Repositories
from discovery.wire.errors import Invalid


def _repositories(folder: Path, reserve_bytes: int = 0) -> Repositories:
    repositories = Repositories(folder / "repos", folder / "hooks", reserve_bytes=reserve_bytes)
    repositories.open()
    return repositories


async def test_a_repository_is_made_once_and_survives_a_restart(tmp_path: Path) -> None:
    made = await _repositories(tmp_path).prepare("some-id")
    (made / "mark").touch()
    again = await _repositories(tmp_path).prepare("some-id")
    assert again == made
    assert (made / "mark").exists()
    assert (made / "HEAD").read_text() == "ref: refs/heads/master\n"
    assert not (made / "hooks").exists()


async def test_what_a_crash_left_is_removed_at_start(tmp_path: Path) -> None:
    repository = await _repositories(tmp_path).prepare("some-id")
    (repository / "objects" / "tmp_objdir-incoming-x").mkdir()
    (repository / "objects" / "tmp_objdir-incoming-x" / "pack").touch()
    (repository / "refs" / "heads" / "main.lock").touch()
    (tmp_path / "repos" / "new-0123").mkdir()
    repositories = _repositories(tmp_path)
    assert repositories.ids() == ["some-id"]
    assert not list(repository.rglob("*incoming*"))
    assert not list(repository.rglob("*.lock"))
    assert not (tmp_path / "repos" / "new-0123").exists()


@pytest.mark.parametrize("id", ["", "..", "../x", "a/b", "-x", "x" * 64, "x\n"])
async def test_an_id_that_is_no_folder_name_is_refused(tmp_path: Path, id: str) -> None:
    with pytest.raises(Invalid):
        await _repositories(tmp_path).prepare(id)


async def test_a_removed_repository_is_gone(tmp_path: Path) -> None:
    repositories = _repositories(tmp_path)
    await repositories.prepare("some-id")
    await repositories.remove("some-id")
    assert list((tmp_path / "repos").iterdir()) == []


def test_a_disk_that_is_almost_full_takes_no_push(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="the disk of the git server is full"):
        _repositories(tmp_path, reserve_bytes=2**60).check_space()
