"""Unpacking: honest layers come out exactly, dishonest ones not at all."""

import hashlib
import os
import stat
import tarfile
from pathlib import Path

import pytest

from rootfs.errors import BlobMismatch, LayerInvalid
from rootfs.layerstream import Limits
from rootfs.unpack import look_through, unpack
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


def with_headers(name: str, **headers: str) -> tuple[tarfile.TarInfo, bytes]:
    member, content = file(name, b"x")
    member.pax_headers = {key.replace("__", "."): value for key, value in headers.items()}
    return member, content


@pytest.mark.parametrize(
    "key", ["SCHILY.xattr.trusted.overlay.redirect", "SCHILY.xattr.trusted.x", "SCHILY.xattr.user.overlay.opaque"]
)
def test_overlay_words_in_attributes_are_refused(tmp_path: Path, into: Path, key: str) -> None:
    member, content = file("d/x", b"x")
    member.pax_headers = {key: "/etc"}
    with pytest.raises(LayerInvalid, match="word to overlayfs"):
        unpack(blob(tmp_path, (member, content)), into)


def test_attributes_of_users_and_file_capabilities_stay(tmp_path: Path, into: Path) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service+ep
    member, content = file("d/x", b"x", uid=7)
    member.pax_headers = {
        "SCHILY.xattr.user.note": "hi",
        "SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape"),
        "SCHILY.xattr.security.selinux": "any",
    }
    unpack(blob(tmp_path, (member, content)), into)
    assert sorted(os.listxattr(into / "d/x")) == ["security.capability", "user.note"]
    assert os.getxattr(into / "d/x", "security.capability") == capability


@pytest.mark.parametrize("value", ["x", "x" * 4000])
def test_attributes_that_no_disk_takes_are_refused(tmp_path: Path, into: Path, value: str) -> None:
    member, content = file("x", b"x")
    member.pax_headers = {"SCHILY.xattr.security.capability": value}
    with pytest.raises(LayerInvalid, match="attribute"):
        unpack(blob(tmp_path, (member, content)), into)


def test_name_that_is_no_utf_8_stays_as_it_is(tmp_path: Path, into: Path) -> None:
    raw = bytearray(tar_of(file("name-?", b"x")))
    raw[raw.index(b"?")] = 0xFF
    raw[148:156] = b"%06o\0 " % (sum(raw[:148]) + sum(raw[156:512]) + 8 * 32)
    unpack(saved(tmp_path, bytes(raw))[0], into)
    assert os.listdir(os.fsencode(into)) == [b"name-\xff"]


def test_sparse_files_are_refused_before_they_are_believed(tmp_path: Path, into: Path) -> None:
    for headers in (
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 18},
        {"GNU.sparse.map": "0,1", "GNU.sparse.size": "5"},
    ):
        member, content = file("x", b"99999999\n")
        member.pax_headers = headers
        with pytest.raises(LayerInvalid, match="sparse"):
            unpack(blob(tmp_path, (member, content)), into)
    old = tarfile.TarInfo("x")
    old.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(LayerInvalid, match="sparse"):
        unpack(saved(tmp_path, old.tobuf(tarfile.GNU_FORMAT) + bytes(1024))[0], into)


def test_a_member_of_negative_size_is_refused(tmp_path: Path, into: Path) -> None:
    raw = bytearray(tar_of(file("a", b"x"), file("b", b"x")))
    raw[1024 + 124 : 1024 + 136] = b"\xff" * 11 + b"\x00"  # base 256: -256
    raw[1024 + 148 : 1024 + 156] = b"%06o\0 " % (sum(raw[1024:1172]) + sum(raw[1180:1536]) + 8 * 32)
    with pytest.raises(LayerInvalid):
        unpack(saved(tmp_path, bytes(raw))[0], into)
    with pytest.raises(LayerInvalid):
        unpack(blob(tmp_path, with_headers("x", size="-512")), into)


def test_many_small_global_headers_are_a_bomb_too(tmp_path: Path, into: Path) -> None:
    def header(index: int) -> bytes:
        record = f"{index}=".encode() + b"x" * 60_000 + b"\n"
        record = f"{len(record) + 6} ".encode() + record
        member = tarfile.TarInfo("g")
        member.type, member.size = tarfile.XGLTYPE, len(record)
        return member.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512)

    with pytest.raises(LayerInvalid, match="too many bytes of names"):
        unpack(saved(tmp_path, b"".join(header(i) for i in range(100, 140)) + bytes(1024))[0], into)


def test_what_lies_behind_the_tar_counts_too(tmp_path: Path, into: Path) -> None:
    path, _ = saved(tmp_path, packed(tar_of(file("x")) + bytes(5_000_000), "zstd"))
    limits = Limits(free_bytes=1_000_000, ratio_max=10)
    with pytest.raises(LayerInvalid, match="more than 1000000 bytes"):
        unpack(path, into, diff_id="sha256:" + "0" * 64, limits=limits)


def test_ratio_counts_only_above_what_is_free(tmp_path: Path, into: Path) -> None:
    path = blob(tmp_path, file("zero", bytes(5_000_000)), how="gzip")
    unpack(path, into, limits=Limits(ratio_max=1))
    (tmp_path / "other").mkdir()
    with pytest.raises(LayerInvalid, match="more than"):
        unpack(path, tmp_path / "other", limits=Limits(ratio_max=10, free_bytes=1_000_000))


def test_bytes_inside_must_be_those_of_the_diff_id(tmp_path: Path, into: Path) -> None:
    raw = tar_of(file("x", b"good"))
    path, _ = saved(tmp_path, packed(raw, "gzip"))
    unpack(path, into, diff_id="sha256:" + hashlib.sha256(raw).hexdigest())
    with pytest.raises(BlobMismatch, match="its image says"):
        look_through(path, diff_id="sha256:" + "0" * 64)


def test_hard_link_keeps_what_it_was_made_of_when_the_name_is_taken_again(tmp_path: Path, into: Path) -> None:
    members = [file("a", b"old"), link("h", "a", is_hard=True), link("a", "/etc/passwd"), file("b", b"b")]
    unpack(blob(tmp_path, *members), into)
    assert (into / "h").read_bytes() == b"old"
    assert (into / "a").is_symlink()


@pytest.mark.parametrize(
    "members",
    [
        [folder("d"), link("d", "/etc")],
        [folder("d"), link("s", "d"), file("d/f"), link("h", "s/f", is_hard=True)],
        [link("h", "h", is_hard=True)],
        [file("a"), link("a", "a", is_hard=True)],
        [link("s", "")],
        [link("s", "x" * 5000)],
        [file("x/" * 1900 + "y")],
        [(tarfile.TarInfo("."), b"")],
    ],
)
def test_looking_through_refuses_what_unpacking_refuses(
    tmp_path: Path, into: Path, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    path = blob(tmp_path, *members)
    with pytest.raises(LayerInvalid):
        look_through(path)
    with pytest.raises(LayerInvalid):
        unpack(path, into)


def test_looking_through_writes_nothing(tmp_path: Path) -> None:
    path = blob(tmp_path, folder("d"), file("d/x", b"12345"), link("l", "d/x"), file(".wh.y"))
    before = sorted(tmp_path.rglob("*"))
    assert look_through(path) == (5, 4)
    assert sorted(tmp_path.rglob("*")) == before


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
