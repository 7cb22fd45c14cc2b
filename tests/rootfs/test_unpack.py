"""Unpacking: honest layers come out exactly, dishonest ones not at all."""

import os
import stat
import tarfile
from pathlib import Path

import pytest

from rootfs.errors import BlobMismatch, LayerInvalid
from rootfs.unpack import Limits, unpack
from tests.rootfs.tars import device, file, folder, link, packed, saved, tar_of

pytestmark = pytest.mark.needs_root  # owners and whiteouts


@pytest.fixture
def into(tmp_path: Path) -> Path:
    path = tmp_path / "into"
    path.mkdir()
    return path


def blob(tmp_path: Path, *members: tuple[tarfile.TarInfo, bytes], how: str = "plain") -> Path:
    return saved(tmp_path, packed(tar_of(*members), how))[0]


@pytest.mark.parametrize("how", ["plain", "gzip", "zstd"])
def test_files_come_out_with_owner_mode_and_time(tmp_path: Path, into: Path, how: str) -> None:
    big = os.urandom(3_000_000)
    members = [folder("./"), folder("a", mode=0o1777, uid=7), file("a/x", big, mode=0o4750, uid=1234), link("l", "a/x")]
    members.append(link("a/h", "a/x", is_hard=True))
    assert unpack(blob(tmp_path, *members, how=how), into) == len(big)
    found = (into / "a/x").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 1234, 0o4750)
    assert found.st_mtime == (into / "a").stat().st_mtime == 1_600_000_000
    assert stat.S_IMODE((into / "a").stat().st_mode) == 0o1777
    assert (into / "l").readlink() == Path("a/x")
    assert (into / "a/h").stat().st_ino == found.st_ino
    assert (into / "a/x").read_bytes() == big


def test_missing_parents_are_made_readable_whatever_the_umask(tmp_path: Path, into: Path) -> None:
    before = os.umask(0o077)
    try:
        unpack(blob(tmp_path, file("deep/er/x")), into)
    finally:
        os.umask(before)
    assert stat.S_IMODE((into / "deep").stat().st_mode) == 0o755


def test_whiteouts_become_what_overlayfs_reads(tmp_path: Path, into: Path) -> None:
    members = [file("etc/.wh.gone"), folder("opaque"), file("opaque/.wh..wh..opq"), file("opaque/new", b"x")]
    members += [file(".wh.both"), folder("both"), file("x/.wh..wh.plnk")]
    unpack(blob(tmp_path, *members), into)
    gone = (into / "etc/gone").stat()
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0
    assert os.getxattr(into / "opaque", "trusted.overlay.opaque") == b"y"
    assert os.getxattr(into / "both", "trusted.overlay.opaque") == b"y"
    assert [path.name for path in (into / "x").iterdir()] == []


def test_later_member_of_the_same_name_wins(tmp_path: Path, into: Path) -> None:
    unpack(blob(tmp_path, file("x", b"1"), file("x", b"2"), folder("d"), folder("d", mode=0o700)), into)
    assert (into / "x").read_bytes() == b"2"
    assert stat.S_IMODE((into / "d").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "members",
    [
        [file("../x")],
        [file("a/../../x")],
        [file("/etc/x")],
        [link("a", "/etc"), file("a/x")],
        [link("a", ".."), file("a/x")],
        [file("a"), file("a/x")],
        [link("h", "/etc/passwd", is_hard=True)],
        [link("h", "../x", is_hard=True)],
        [link("h", "nosuch", is_hard=True)],
        [link("s", "/etc/passwd"), link("s/h", "s", is_hard=True)],
        [device("null")],
        [device("sda", tarfile.BLKTYPE)],
        [file(".wh..")],
        [file("a/.wh...")],
        [file("a/.wh.")],
        [folder("d"), file("d")],
        [file("x" * 300)],
    ],
)
def test_what_no_honest_tool_makes_is_refused(
    tmp_path: Path, into: Path, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    with pytest.raises(LayerInvalid):
        unpack(blob(tmp_path, *members), into)
    assert not (tmp_path / "x").exists()
    assert all(not path.is_block_device() and not path.is_char_device() for path in into.rglob("*"))


def test_hard_link_to_a_symlink_does_not_follow_it(tmp_path: Path, into: Path) -> None:
    unpack(blob(tmp_path, link("s", "/etc/passwd"), link("h", "s", is_hard=True)), into)
    assert (into / "h").is_symlink()


def test_bombs_end_at_the_limit(tmp_path: Path, into: Path) -> None:
    path = blob(tmp_path, file("zero", bytes(5_000_000)), how="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(LayerInvalid, match="more than 1000000 bytes"):
        unpack(path, into, limits=Limits(bytes_max=1_000_000))
    with pytest.raises(LayerInvalid, match="entries"):
        unpack(blob(tmp_path, *(file(f"f{i}") for i in range(9))), into, limits=Limits(entries_max=8))


def test_huge_name_header_is_refused_before_it_is_read(tmp_path: Path, into: Path) -> None:
    member = tarfile.TarInfo("pax")
    member.type, member.size = tarfile.XHDTYPE, 2**40
    header = member.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(LayerInvalid, match="header of"):
        unpack(saved(tmp_path, header + bytes(1024))[0], into)


def test_overlay_words_in_attributes_are_not_obeyed(tmp_path: Path, into: Path) -> None:
    member, content = file("d/x", b"x")
    member.pax_headers = {"SCHILY.xattr.trusted.overlay.redirect": "/etc", "SCHILY.xattr.user.note": "hi"}
    unpack(blob(tmp_path, (member, content)), into)
    assert os.listxattr(into / "d/x") == ["user.note"]


@pytest.mark.parametrize("cut", [10, 600, 1500])
@pytest.mark.parametrize("how", ["plain", "gzip", "zstd"])
def test_torn_layer_is_refused(tmp_path: Path, into: Path, how: str, cut: int) -> None:
    content = packed(tar_of(file("x", os.urandom(4000))), how)[:cut]
    with pytest.raises(LayerInvalid):
        unpack(saved(tmp_path, content)[0], into)


def test_bytes_must_be_those_of_the_digest(tmp_path: Path, into: Path) -> None:
    path, digest = saved(tmp_path, tar_of(file("x", b"good")))
    unpack(path, into, digest=digest)
    (tmp_path / "other").mkdir()
    path.write_bytes(tar_of(file("x", b"evil")))
    with pytest.raises(BlobMismatch):
        unpack(path, tmp_path / "other", digest=digest)


@pytest.mark.parametrize("header", [{"uid": "99999999999"}, {"mtime": "1e400"}, {"mtime": "nan"}, {"gid": "-7"}])
def test_numbers_that_no_kernel_knows_are_refused(tmp_path: Path, into: Path, header: dict[str, str]) -> None:
    member, content = file("x", b"x")
    member.pax_headers = header
    with pytest.raises(LayerInvalid):
        unpack(blob(tmp_path, (member, content)), into)


def test_a_path_without_an_end_is_refused(tmp_path: Path, into: Path) -> None:
    with pytest.raises(LayerInvalid):
        unpack(blob(tmp_path, file("d/" * 20_000 + "x")), into)
