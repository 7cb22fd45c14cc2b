"""Whom a user's name means in an image: as overlayfs would show it, and nothing of the host."""

import os
from pathlib import Path

import pytest

from rootfs.errors import NameInvalid
from rootfs.passwd import User, find_user, read
from rootfs.unpack import unpack
from tests.rootfs.tars import file, folder, link, saved, tar_of

pytestmark = pytest.mark.needs_root

PASSWD = b"root:x:0:0::/root:/bin/sh\nbroken\napp:x:1001:1002::/srv:/bin/sh\n-:x:x:1::/:/\nrel:x:7:7::home:/\n"
GROUP = b"staff:x:50:app\nbroken\n"


def layers(tmp_path: Path, *contents: bytes) -> list[Path]:
    found = []
    for index, content in enumerate(contents):
        path = tmp_path / f"layer{index}"
        path.mkdir()
        unpack(saved(tmp_path, content)[0], path)
        found.append(path)
    return found


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("app", User(uid=1001, gid=1002, home="/srv")),
        ("1001", User(uid=1001, gid=1002, home="/srv")),
        ("app:staff", User(uid=1001, gid=50, home="/srv")),
        ("app:7", User(uid=1001, gid=7, home="/srv")),
        ("2000", User(uid=2000, gid=0)),
        ("2000:staff", User(uid=2000, gid=50)),
        ("rel", User(uid=7, gid=7)),
        ("root", User(uid=0, gid=0, home="/root")),
    ],
)
def test_names_and_numbers(tmp_path: Path, text: str, user: User) -> None:
    found = layers(tmp_path, tar_of(file("etc/passwd", PASSWD), file("etc/group", GROUP)))
    assert find_user(found, text) == user


@pytest.mark.parametrize(
    "text", ["nobody", "app:nogroup", "", ":", "app:", "a/b", "a b", "app:staff:x", "x" * 300, "-"]
)
def test_nobody_of_that_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(NameInvalid):
        find_user(layers(tmp_path, tar_of(file("etc/passwd", PASSWD), file("etc/group", GROUP))), text)


def test_upper_layers_win_and_whiteouts_hide(tmp_path: Path) -> None:
    low = tar_of(file("etc/passwd", PASSWD), file("etc/group", GROUP), file("opt/x", b"low"), file("d/f", b"low"))
    changed = tar_of(file("etc/passwd", b"app:x:5:6::/:\n"))
    gone = tar_of(file("etc/.wh.group"), file("opt/.wh..wh..opq"), file("d", b"now a file"))
    assert find_user(layers(tmp_path, low, changed), "app") == User(uid=5, gid=6, home="/")
    (tmp_path / "again").mkdir()
    found = layers(tmp_path / "again", low, gone)
    assert read(found, "etc/passwd") == PASSWD
    assert (read(found, "etc/group"), read(found, "opt/x"), read(found, "d/f")) == (b"", b"", b"")
    assert read(found, "d") == b"now a file"


@pytest.mark.parametrize(
    ("members", "content"),
    [
        ([link("etc/passwd", "/usr/lib/passwd"), file("usr/lib/passwd", PASSWD)], PASSWD),
        ([link("etc", "usr/etc"), file("usr/etc/passwd", PASSWD)], PASSWD),
        ([link("etc/passwd", "../../../../usr/passwd"), file("usr/passwd", PASSWD)], PASSWD),
        ([link("etc/passwd", "/etc/shadow")], b""),
        ([link("etc/passwd", "../../../../../../../../etc/passwd"), folder("x")], None),
        ([link("etc/passwd", "passwd")], None),
        ([link("etc", "/proc/self/root/etc")], b""),
        ([folder("etc/passwd")], b""),
        ([file("etc", b"x")], b""),
        ([file("etc/passwd", b"x" * 2_000_000)], None),
    ],
)
def test_symlinks_stay_inside(tmp_path: Path, members: list[tuple], content: bytes | None) -> None:  # type: ignore[type-arg]
    found = layers(tmp_path, tar_of(*members))
    if content is None:
        with pytest.raises(NameInvalid):
            read(found, "etc/passwd")
    else:
        assert read(found, "etc/passwd") == content


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    (found,) = layers(tmp_path, tar_of(folder("etc")))
    os.mkfifo(found / "etc/passwd")
    assert read([found], "etc/passwd") == b""
