"""Images from the world: every honest form gives the same image, every dishonest one nothing that has a name."""

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rootfs.errors import BlobMismatch, ImageExists, ImageInvalid, ImageMissing, LayerInvalid, NameInvalid, RootfsError
from rootfs.intake import ImageLimits, import_images
from rootfs.layerstream import Limits
from rootfs.store import Store
from rootfs.types import Image
from tests.rootfs.ociimages import (
    ARCHITECTURE,
    LAYER_ONE,
    LAYER_TWO,
    OCI,
    OTHER,
    Files,
    archive,
    bomb,
    config,
    dump,
    image,
    layout,
    manifest,
    put,
    saved,
    sha,
    tar_with_links,
    write,
)
from tests.rootfs.tars import device, file, link, tar_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "images")


def imported(store: Store, tmp_path: Path, content: bytes, **more: Any) -> tuple[Image, ...]:
    path = tmp_path / "app.tar"
    path.write_bytes(content)
    return import_images(store, path, **more)


def _import_as(store: Store, tmp_path: Path, files: Files, *, is_archive: bool) -> None:
    if is_archive:
        imported(store, tmp_path, archive(files))
    else:
        import_images(store, write(tmp_path / "layout", files))


def check_whole(store: Store, found: Image) -> None:
    assert [layer.diff_id for layer in found.layers] == [sha(LAYER_ONE), sha(LAYER_TWO)]
    assert found.config.entrypoint == ("/bin/echo",)
    assert found.config.cmd == ("hello",)
    assert found.config.env == {"A": "1", "PATH": "/bin"}
    assert (found.config.working_dir, found.config.user) == ("/srv", "app")
    assert (found.config.volumes, found.config.exposed_ports) == (("/data",), ("8080/tcp",))
    assert (found.config.stop_signal, found.config.labels) == ("SIGQUIT", {"a": "b"})
    for layer in found.layers:
        assert sha(store.read_blob(layer.digest)) == layer.digest
    assert store.image(found.name) == found


@pytest.mark.parametrize("packing", ["plain", "gzip", "zstd"])
@pytest.mark.parametrize("how", ["plain", "gzip", "zstd"])
def test_oci_archive(store: Store, tmp_path: Path, packing: str, how: str) -> None:
    (found,) = imported(store, tmp_path, archive(image(how), packing))
    assert found.name == "app"
    check_whole(store, found)


def test_oci_directory_keeps_the_digest(store: Store, tmp_path: Path) -> None:
    files = image()
    (found,) = import_images(store, write(tmp_path / "layout", files), name="other")
    check_whole(store, found)
    assert found.digest == msgspec.json.decode(files["index.json"])["manifests"][0]["digest"]


def test_importing_twice_is_once(store: Store, tmp_path: Path) -> None:
    first = imported(store, tmp_path, archive(image()))
    assert imported(store, tmp_path, archive(image())) == first
    assert len(store.images()) == 1


@pytest.mark.parametrize("packing", ["plain", "gzip"])
def test_docker_save(store: Store, tmp_path: Path, packing: str) -> None:
    (found,) = imported(store, tmp_path, archive(saved(), packing))
    assert found.name == "app-1.2"
    check_whole(store, found)


def test_docker_save_with_several_names(store: Store, tmp_path: Path) -> None:
    found = imported(store, tmp_path, archive(saved(("x/one:latest", "two:3"))))
    assert [each.name for each in found] == ["one", "two-3"]
    with pytest.raises(ImageInvalid, match="--name is for one"):
        imported(store, tmp_path, archive(saved(("x/one:latest", "two:3"))), name="three")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_docker_save_with_layers_as_links(store: Store, tmp_path: Path, kind: bytes) -> None:
    files = saved()
    files["blobs/one.tar"] = files.pop("1/layer.tar")
    to = "../blobs/one.tar" if kind == tarfile.SYMTYPE else "blobs/one.tar"
    (found,) = imported(store, tmp_path, tar_with_links(files, {"1/layer.tar": to}, kind))
    check_whole(store, found)


def test_of_many_machines_it_takes_this_one(store: Store, tmp_path: Path) -> None:
    files: Files = {}
    own = manifest(files) | {"platform": {"os": "linux", "architecture": ARCHITECTURE}}
    other = manifest(files, (LAYER_ONE,), architecture=OTHER) | {"platform": {"os": "linux", "architecture": OTHER}}
    proof = manifest(files, (LAYER_TWO,)) | {"platform": {"os": "unknown", "architecture": "unknown"}}
    inner = put(files, dump({"schemaVersion": 2, "manifests": [proof, other, own]}), OCI + "index.v1+json")
    (found,) = imported(store, tmp_path, archive(layout(inner, files=files)))
    check_whole(store, found)
    with pytest.raises(ImageInvalid, match=f"no image for linux/{ARCHITECTURE}, only linux/{OTHER}"):
        imported(store, tmp_path, archive(layout(other, other, files=files)))


def test_a_layer_may_be_there_twice_and_empty(store: Store, tmp_path: Path) -> None:
    files: Files = {}
    empty = bytes(1024)
    (found,) = imported(store, tmp_path, archive(layout(manifest(files, (LAYER_ONE, empty, empty)), files=files)))
    assert [layer.diff_id for layer in found.layers] == [sha(LAYER_ONE), sha(empty), sha(empty)]


def test_a_name_is_not_taken_over(store: Store, tmp_path: Path) -> None:
    imported(store, tmp_path, archive(image()))
    files: Files = {}
    other = archive(layout(manifest(files, (LAYER_ONE,)), files=files))
    with pytest.raises(ImageExists):
        imported(store, tmp_path, other)
    (found,) = imported(store, tmp_path, other, is_replacing=True)
    assert store.images() == (found,)


def test_removed_image_leaves_its_blobs_to_collect(store: Store, tmp_path: Path) -> None:
    (found,) = imported(store, tmp_path, archive(image()))
    store.remove_image(found.name)
    with pytest.raises(ImageMissing):
        store.remove_image(found.name)
    assert store.collect(keep=[found.layers[0].digest]) > 0
    assert [path.name for path in store.blobs.iterdir()] == [found.layers[0].digest[7:]]


Change = Callable[[Files], None]


def _edit(name: str, **changes: Any) -> Change:
    def change(files: Files) -> None:
        files[name] = dump(msgspec.json.decode(files[name]) | changes)

    return change


def _replace(text: str, by: str) -> Change:
    def change(files: Files) -> None:
        for name in [name for name, content in files.items() if text.encode() in content]:
            files[name] = files[name].replace(text.encode(), by.encode())

    return change


def _cut(files: Files) -> None:
    name = max(files, key=lambda name: len(files[name]))
    files[name] = files[name][:-7]


def _flip(files: Files) -> None:
    name = max(files, key=lambda name: len(files[name]))
    content = bytearray(files[name])
    content[len(content) // 2] ^= 1
    files[name] = bytes(content)


def _drop(files: Files) -> None:
    del files[max(files, key=lambda name: len(files[name]))]


@pytest.mark.parametrize(
    "change",
    [
        _cut,
        _flip,
        _drop,
        _edit("index.json", manifests=[]),
        _edit("index.json", manifests=[{"digest": "sha256:../../../etc/passwd", "size": 1}]),
        _edit("index.json", manifests=[{"digest": "sha512:" + "0" * 128, "size": 1}]),
        _edit("index.json", manifests=[{"digest": "sha256:" + "0" * 64, "size": -1}]),
        _edit("index.json", manifests=[{"digest": "sha256:" + "0" * 64, "size": 2**70}]),
        _edit("index.json", manifests=[{"digest": "sha256:" + "0" * 64, "size": 10, "mediaType": "x"}]),
        _edit("index.json", manifests="x"),
        _replace('"size": ', '"size": 1'),
        _replace('{"imageLayoutVersion":"1.0.0"}', ""),
    ],
)
def test_broken_layout_is_refused(store: Store, tmp_path: Path, change: Change) -> None:
    files = image()
    change(files)
    if files.get("oci-layout") == b"":
        del files["oci-layout"]
    for is_archive in (True, False):
        with pytest.raises((ImageInvalid, BlobMismatch)):
            _import_as(store, tmp_path, files, is_archive=is_archive)
    assert store.images() == ()


def _with(layers: tuple[bytes, ...] = (LAYER_ONE,), media_type: str = "", **more: Any) -> Files:
    """Return a layout whose manifest is not made by `manifest`."""
    files: Files = {}
    parts = [put(files, layer, media_type or OCI + "layer.v1.tar", **more) for layer in layers]
    of = {"schemaVersion": 2, "layers": parts, "config": put(files, dump(config(*layers)), OCI + "config.v1+json")}
    return layout(put(files, dump(of), OCI + "manifest.v1+json"), files=files)


def _cycle() -> Files:
    files: Files = {}
    inner = put(files, dump({"manifests": [manifest(files)]}), OCI + "index.v1+json")
    for _ in range(6):
        inner = put(files, dump({"manifests": [inner]}), OCI + "index.v1+json")
    return layout(inner, files=files)


def _config(content: bytes) -> Files:
    files: Files = {}
    part = put(files, LAYER_ONE, OCI + "layer.v1.tar")
    of = {"schemaVersion": 2, "layers": [part], "config": put(files, content, OCI + "config.v1+json")}
    return layout(put(files, dump(of), OCI + "manifest.v1+json"), files=files)


def _of_schema_1() -> Files:
    files: Files = {}
    return layout(put(files, dump({"schemaVersion": 1, "fsLayers": []}), ""), files=files)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (_with(media_type=OCI + "layer.nondistributable.v1.tar"), "foreign"),
        (_with(media_type="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), "foreign"),
        (_with(urls=["https://elsewhere.test/layer"]), "foreign"),
        (_with(media_type="application/octet-stream"), "no tar"),
        (_with(()), "without layers"),
        (_with((LAYER_ONE,) * 128), "128 layers"),
        (_with((b"no tar at all" * 100,)), "cannot be read"),
        (_cycle(), "deep"),
        (_of_schema_1(), "first format"),
        (_config(b"[" * 1_000_000), "does not parse"),
        (_config(b"{" + b" " * 5_000_000 + b"}"), "not 0 to"),
        (_config(dump(config(LAYER_TWO))), "its image says"),
        (_config(dump(config(LAYER_ONE, LAYER_ONE))), "lists 2 layers"),
        (_config(dump(config(LAYER_ONE, architecture=OTHER))), "an image for"),
        (_config(dump(config(LAYER_ONE, config={"Env": ["A=" + "x" * 200_000]}))), "more words"),
        (_config(dump(config(LAYER_ONE, config={"Cmd": ["a\0b"]}))), "zero byte"),
        (_config(dump(config(LAYER_ONE, config={"Cmd": 7}))), "does not parse"),
    ],
)
def test_what_no_honest_tool_writes_is_refused(store: Store, tmp_path: Path, files: Files, why: str) -> None:
    with pytest.raises(RootfsError, match=why):
        imported(store, tmp_path, archive(files))
    assert store.images() == ()


@pytest.mark.parametrize(
    "layer",
    [
        tar_of(file("../x")),
        tar_of(device("sda", tarfile.BLKTYPE)),
        tar_of(link("a", "/etc"), file("a/passwd")),
        tar_of(link("h", "/etc/passwd", is_hard=True)),
    ],
)
def test_hostile_layer_does_not_even_become_a_blob(store: Store, tmp_path: Path, layer: bytes) -> None:
    with pytest.raises(LayerInvalid):
        imported(store, tmp_path, archive(_with((layer,))))
    assert not store.has_blob(sha(layer))
    assert [path.name for path in store.blobs.iterdir() if path.name.startswith(".")] == []


def test_limits_of_a_layer_and_of_an_image(store: Store, tmp_path: Path) -> None:
    files: Files = {}
    big = [tar_of(file(f"zero{i}", bytes(600_000))) for i in range(2)]
    content = archive(layout(manifest(files, tuple(big)), files=files))
    limits = ImageLimits(layer=Limits(free_bytes=500_000, ratio_max=2))
    with pytest.raises(LayerInvalid, match="more than 500000 bytes"):
        imported(store, tmp_path, content, limits=limits)
    with pytest.raises(ImageInvalid, match="more than one image"):
        imported(store, tmp_path, content, limits=ImageLimits(bytes_max=1_000_000))
    with pytest.raises(ImageInvalid, match="more than one image"):
        imported(store, tmp_path, content, limits=ImageLimits(entries_max=1))
    assert store.images() == ()
    imported(store, tmp_path, content)


def test_bomb_of_an_archive_ends_at_the_limit(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rootfs.archive._LIMITS", Limits(free_bytes=1_000_000, ratio_max=10))
    with pytest.raises(ImageInvalid, match="more than 1000000 bytes"):
        imported(store, tmp_path, bomb(5_000_000))
    assert sorted(path.name for path in store.path.iterdir() if path.name != ".busy") == ["blobs", "oci-layout"]


def test_links_out_of_an_archive_or_a_directory_lead_nowhere(store: Store, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(LAYER_ONE)
    files = saved()
    del files["1/layer.tar"]
    for to in ("../../secret", str(tmp_path / "secret")):
        with pytest.raises(ImageInvalid, match="has no"):
            imported(store, tmp_path, tar_with_links(files, {"1/layer.tar": to}))
        place = write(tmp_path / "saved", files)
        (place / "1").mkdir(exist_ok=True)
        (place / "1/layer.tar").symlink_to(to)
        with pytest.raises(ImageInvalid, match="has no"):
            import_images(store, place)
        shutil.rmtree(place)
    loop = tar_with_links(files, {"1/layer.tar": "../2/loop", "2/loop": "../1/layer.tar"})
    with pytest.raises(ImageInvalid, match="has no"):
        imported(store, tmp_path, loop)


def test_layers_named_out_of_the_directory_are_refused(store: Store, tmp_path: Path) -> None:
    files = saved()
    files["manifest.json"] = files["manifest.json"].replace(b"1/layer.tar", b"../../etc/passwd")
    for is_archive in (True, False):
        with pytest.raises(ImageInvalid, match="has no"):
            _import_as(store, tmp_path, files, is_archive=is_archive)


def test_a_fifo_does_not_keep_it_waiting(store: Store, tmp_path: Path) -> None:
    place = write(tmp_path / "layout", image())
    (place / "index.json").unlink()
    os.mkfifo(place / "index.json")
    with pytest.raises(ImageInvalid):
        import_images(store, place)


def test_one_name_for_two_files_is_refused(store: Store, tmp_path: Path) -> None:
    members = [file(name, content) for name, content in image().items()]
    with pytest.raises(ImageInvalid, match="twice"):
        imported(store, tmp_path, tar_of(*members, file("./index.json", b"{}")))


@pytest.mark.parametrize("content", [b"", b"\0" * 2048, b"\x1f\x8b\x08", b"PK\x03\x04" * 500, os.urandom(4096)])
def test_no_archive_is_refused(store: Store, tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ImageInvalid):
        imported(store, tmp_path, content)


def test_a_name_that_cannot_be_one_wants_another(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "My App!.tar"
    path.write_bytes(archive(image()))
    with pytest.raises(NameInvalid) as refused:
        import_images(store, path)
    assert "--name" in refused.value.hint
    with pytest.raises(ImageInvalid, match="not there"):
        import_images(store, tmp_path / "nosuch")


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="needs skopeo")
@pytest.mark.parametrize(
    "form", ["oci-archive:{}/x.tar:team/app:7", "docker-archive:{}/x.tar:team/app:7", "oci:{}/x.tar:7"]
)
def test_what_skopeo_writes(store: Store, tmp_path: Path, form: str) -> None:
    write(tmp_path / "layout", image())
    command = ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{tmp_path}/layout", form.format(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    (found,) = import_images(store, tmp_path / "x.tar")
    assert found.name == ("x" if form.startswith("oci:") else "app-7")
    check_whole(store, found)
