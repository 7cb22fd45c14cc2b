"""Layer tars: same in, same out; base plus difference is the whole."""

import tarfile
from pathlib import Path

from rootfs import layertar
from rootfs.types import Layer
from rootfs.unpack import unpack
from tests.rootfs.tars import device, file, folder, link, saved, tar_of

BELOW = [
    folder("./"),
    folder("./etc"),
    file("./etc/same", b"same"),
    file("./etc/changed", b"old"),
    file("./etc/moded", b"x"),
    folder("./gone"),
    file("./gone/a", b"a"),
    file("./gone/b", b"b"),
    folder("./bin", mode=0o711),
    file("./bin/perl", b"perl" * 1000),
    link("./bin/perl5", "./bin/perl", is_hard=True),
]


def names(path: Path) -> list[str]:
    with layertar.open_layer(path) as tar:
        return [member.name for member in tar]


def difference(tmp_path: Path, above: list[tuple[tarfile.TarInfo, bytes]]) -> tuple[Path, Layer]:
    below = tmp_path / "below.tar.zst"
    layertar.from_tree(saved(tmp_path, tar_of(*BELOW))[0], below)
    out = tmp_path / "difference.tar.zst"
    return out, layertar.from_difference(below, saved(tmp_path, tar_of(*above))[0], out)


def test_tree_leaves_out_devices_logs_and_what_belongs_to_one_machine(tmp_path: Path) -> None:
    members = [folder("./"), folder("./dev"), device("./dev/null"), folder("./etc"), file("./etc/hostname", b"me")]
    members += [file("./etc/apt/apt.conf.d/99mmdebstrap", b"proxy"), file("./var/log/dpkg.log", b"x"), folder("./tmp")]
    layertar.from_tree(saved(tmp_path, tar_of(*members))[0], tmp_path / "out")
    assert names(tmp_path / "out") == [".", "dev", "etc", "tmp"]


def test_layer_says_what_it_is(tmp_path: Path) -> None:
    layer = layertar.from_files([("a/b", b"x", 0o644)], tmp_path / "out")
    assert layer.size_bytes == (tmp_path / "out").stat().st_size
    (tmp_path / "into").mkdir()
    unpack(tmp_path / "out", tmp_path / "into", digest=layer.digest)
    assert (tmp_path / "into/a/b").read_bytes() == b"x"


def test_same_files_in_any_order_give_the_same_digest(tmp_path: Path) -> None:
    files: list[tuple[str, bytes | str, int]] = [("a", b"1", 0o644), ("b/c", b"2", 0o755), ("b/l", "c", 0o777)]
    first = layertar.from_files(files, tmp_path / "1")
    assert layertar.from_files(reversed(files), tmp_path / "2") == first
    assert layertar.from_files([("a", b"1", 0o755), *files[1:]], tmp_path / "3").digest != first.digest


def test_difference_has_only_what_differs_and_the_folders_on_the_way(tmp_path: Path) -> None:
    above = [
        *[each for each in BELOW if not each[0].name.startswith(("./gone", "./etc/changed", "./etc/moded"))],
        file("./etc/changed", b"new"),
        file("./etc/moded", b"x", mode=0o600),
        file("./etc/new", b"n"),
    ]
    out, _ = difference(tmp_path, above)
    assert sorted(names(out)) == [".", ".wh.gone", "etc", "etc/changed", "etc/moded", "etc/new"]


def test_times_alone_make_no_difference(tmp_path: Path) -> None:
    above = []
    for member, content in (file("./etc/same", b"same"), file("./etc/changed", b"old")):
        member.mtime += 1000
        above.append((member, content))
    kept = [each for each in BELOW if each[0].name not in ("./etc/same", "./etc/changed")]
    out, _ = difference(tmp_path, [*kept, *above])
    assert names(out) == []


def test_folder_of_a_new_file_keeps_its_mode(tmp_path: Path) -> None:
    out, _ = difference(tmp_path, [*BELOW, file("./bin/new", b"n")])
    with layertar.open_layer(out) as tar:
        assert {member.name: member.mode for member in tar} == {".": 0o755, "bin": 0o711, "bin/new": 0o644}


def test_new_hard_link_to_a_file_below_becomes_a_file(tmp_path: Path) -> None:
    out, _ = difference(tmp_path, [*BELOW, link("./bin/perl6", "./bin/perl", is_hard=True)])
    (tmp_path / "into").mkdir()
    unpack(out, tmp_path / "into")
    assert (tmp_path / "into/bin/perl6").read_bytes() == b"perl" * 1000
    assert not (tmp_path / "into/bin/perl").exists()


def test_new_hard_links_stay_linked(tmp_path: Path) -> None:
    out, _ = difference(tmp_path, [*BELOW, file("./bin/x", b"x"), link("./bin/y", "./bin/x", is_hard=True)])
    (tmp_path / "into").mkdir()
    unpack(out, tmp_path / "into")
    assert (tmp_path / "into/bin/x").stat().st_ino == (tmp_path / "into/bin/y").stat().st_ino


def test_file_that_becomes_a_folder_and_back(tmp_path: Path) -> None:
    kept = [each for each in BELOW if each[0].name not in ("./etc/same", "./gone", "./gone/a", "./gone/b")]
    out, _ = difference(tmp_path, [*kept, folder("./etc/same"), file("./etc/same/x", b"x"), file("./gone", b"file")])
    assert sorted(names(out)) == [".", "etc", "etc/same", "etc/same/x", "gone"]
