"""Volumes: who may have one, and snapshots that are whole or not there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from discovery.wire.errors import AlreadyExists, NotFound
from hostd import volumes as volumes_module
from hostd.errors import HostFull, InvalidSpec, VolumeInUse
from hostd.types import VolumeMount
from hostd.volumes import Volumes


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    found = Volumes(tmp_path)
    found.open()
    return found


def content(path: Path) -> dict[str, str]:
    return {str(each.relative_to(path)): each.read_text() for each in path.rglob("*") if each.is_file()}


def mount(name: str = "data", *, is_exclusive: bool = False) -> VolumeMount:
    return VolumeMount(name=name, path="/data", is_exclusive=is_exclusive)


def test_shared_by_default_and_exclusive_when_asked(volumes: Volumes) -> None:
    volumes.hold("a", [mount()])
    volumes.hold("b", [mount()])
    with pytest.raises(VolumeInUse, match="a, b"):
        volumes.hold("c", [mount(is_exclusive=True)])
    assert volumes.users("data") == ("a", "b")
    volumes.let_go("a")
    volumes.let_go("b")
    volumes.let_go("b")
    volumes.hold("c", [mount(is_exclusive=True)])
    volumes.hold("c", [mount(is_exclusive=True)])  # a second attempt of the same job
    with pytest.raises(VolumeInUse, match="in use by c"):
        volumes.hold("d", [mount("other"), mount()])
    assert volumes.users("other") == ()


def test_a_snapshot_keeps_everything_and_a_restore_brings_it_back(volumes: Volumes) -> None:
    path = volumes.ensure("data")
    (path / "deep").mkdir(mode=0o750)
    (path / "deep/file").write_text("one")
    os.link(path / "deep/file", path / "hard")
    (path / "soft").symlink_to("deep/file")
    with (path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    os.setxattr(path / "hard", "user.mark", b"x")
    made = volumes.snapshot("data", "first")
    (path / "deep/file").write_text("two")
    (path / "new").write_text("new")
    volumes.restore("data", "first")
    restored = volumes.place("data")
    assert (restored / "deep/file").read_text() == "one"
    assert not (restored / "new").exists()
    assert (restored / "deep/file").stat().st_ino == (restored / "hard").stat().st_ino
    assert (restored / "soft").readlink() == Path("deep/file")
    assert (restored / "sparse").stat().st_blocks < 100
    assert os.getxattr(restored / "deep/file", "user.mark") == b"x"
    assert (restored / "deep").stat().st_mode & 0o777 == 0o750
    assert volumes.snapshots("data") == (made,)
    volumes.remove("data")
    assert volumes.names() == ()
    volumes.restore("data", "first")  # also of a volume that is gone
    assert volumes.names() == ("data",)
    volumes.remove_snapshot("data", "first")
    assert volumes.snapshots() == ()
    assert [path.name for path in volumes.place("data").parent.parent.rglob(".*")] == []


def test_refusals(volumes: Volumes) -> None:
    for act in (lambda: volumes.snapshot("no", "x"), lambda: volumes.restore("no", "x"), lambda: volumes.remove("no")):
        with pytest.raises(NotFound):
            act()
    volumes.ensure("data")
    volumes.snapshot("data", "x")
    with pytest.raises(AlreadyExists):
        volumes.snapshot("data", "x")
    for name in ("..", "a/b", ".new-x", ""):
        with pytest.raises(InvalidSpec):
            volumes.snapshot("data", name)
    volumes.hold("job", [mount()])
    for act in (lambda: volumes.restore("data", "x"), lambda: volumes.remove("data")):
        with pytest.raises(VolumeInUse, match="job"):
            act()


def test_no_job_comes_in_while_a_volume_is_copied(volumes: Volumes, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes.ensure("data")
    began, may_end = threading.Event(), threading.Event()

    def slow(source: Path, target: Path) -> None:
        began.set()
        assert may_end.wait(10)
        shutil.copytree(source, target)

    monkeypatch.setattr(volumes_module, "_copy", slow)
    copying = threading.Thread(target=volumes.snapshot, args=("data", "x"))
    copying.start()
    assert began.wait(10)
    with pytest.raises(VolumeInUse, match="being copied"):
        volumes.hold("job", [mount()])
    may_end.set()
    copying.join()
    volumes.hold("job", [mount()])


@pytest.mark.needs_root
def test_a_full_disk_leaves_no_snapshot_and_the_volume_as_it_was(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(tmp_path)], check=True)
    try:
        volumes = Volumes(tmp_path)
        volumes.open()
        (volumes.ensure("data") / "file").write_bytes(b"x" * (2 << 20))
        with pytest.raises(HostFull):
            volumes.snapshot("data", "x")
        assert volumes.snapshots() == ()
        assert list((tmp_path / "snapshots/data").iterdir()) == []
        assert volumes.place("data", "").joinpath("file").stat().st_size == 2 << 20
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("act", ["snapshot", "restore"])
def test_kill_9_in_the_middle_is_as_if_it_never_was(tmp_path: Path, act: str) -> None:
    volumes = Volumes(tmp_path)
    volumes.open()
    path = volumes.ensure("data")
    for number in range(3000):
        (path / f"f{number}").write_text("old")
    volumes.snapshot("data", "old")
    (path / "f0").write_text("new")
    before = content(path)
    program = (
        "import sys; from pathlib import Path; from hostd.volumes import Volumes\n"
        f"v = Volumes(Path({str(tmp_path)!r})); print('go', flush=True)\n"
        + ("v.snapshot('data', 'second')" if act == "snapshot" else "v.restore('data', 'old')")
    )
    for delay_s in (0.0, 0.02, 0.05):
        running = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        assert running.stdout is not None
        assert running.stdout.readline() == "go\n"
        time.sleep(delay_s)  # where it is hit does not matter: every place has to be fine
        running.send_signal(signal.SIGKILL)
        running.wait()
        running.stdout.close()
        again = Volumes(tmp_path)
        again.open()
        assert [each.name for each in (*tmp_path.glob("*/.*"), *tmp_path.glob("snapshots/*/.*"))] == []
        now = content(again.place("data"))
        if act == "snapshot":
            assert now == before
            for snapshot in again.snapshots("data"):
                if snapshot.name == "second":
                    assert content(again.place("data", "second")) == before
                    again.remove_snapshot("data", "second")
        else:
            assert now in (before, content(again.place("data", "old")))


def test_open_puts_back_what_a_restore_had_set_aside(volumes: Volumes) -> None:
    (volumes.ensure("data") / "file").write_text("old")
    volumes.place("data").rename(volumes.path / ".old-data")
    (volumes.path / ".new-abc").mkdir()
    volumes.open()
    assert content(volumes.place("data")) == {"file": "old"}
    assert volumes.names() == ("data",)
