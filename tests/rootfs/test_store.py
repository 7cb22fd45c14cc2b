"""The image store: what it keeps is whole, what it refuses leaves nothing."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from rootfs.errors import BlobMismatch, BlobMissing, ImageMissing, NameInvalid, StoreBusy
from rootfs.store import Store
from rootfs.types import MEDIA_TAR, ImageConfig, Layer
from tests.rootfs.tars import file, saved, tar_of


def digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "images")


def add_layer(store: Store, content: bytes) -> Layer:
    return Layer(digest=store.add_blob(content), size_bytes=len(content))


def test_blob_is_kept_under_its_digest(store: Store) -> None:
    assert store.add_blob(b"hello") == digest(b"hello")
    assert store.read_blob(digest(b"hello")) == b"hello"
    assert store.blob(digest(b"hello")).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(("wanted", "size"), [(digest(b"other"), None), ("", 3), ("", 6), (digest(b"hello"), 4)])
def test_wrong_bytes_are_refused_and_gone(store: Store, wanted: str, size: int | None) -> None:
    with pytest.raises(BlobMismatch):
        store.add_blob(b"hello", wanted, size)
    assert list(store.blobs.iterdir()) == []


def test_blob_whose_writer_fails_leaves_nothing(store: Store) -> None:
    def write_half() -> None:
        with store.new_blob() as writer:
            writer.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(store.blobs.iterdir()) == []


def test_file_of_the_same_disk_is_linked(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "layer"
    source.write_bytes(b"layer")
    found = store.add_blob(source, digest(b"layer"), 5)
    assert store.blob(found).stat().st_ino == source.stat().st_ino
    with pytest.raises(BlobMismatch):
        store.add_blob(source, digest(b"other"))


@pytest.mark.parametrize("name", ["", "sha256:", "sha256:../../etc/passwd", "md5:" + "a" * 32, "sha256:" + "A" * 64])
def test_names_that_are_no_digests_are_refused(store: Store, name: str) -> None:
    with pytest.raises(NameInvalid):
        store.blob(name)


def test_image_comes_back_as_it_was_set(store: Store) -> None:
    layers = [add_layer(store, b"base"), add_layer(store, b"top")]
    config = ImageConfig(env={"PATH": "/bin", "A": "b=c"}, working_dir="/app", cmd=("sh",))
    image = store.set_image("web", layers, config)
    found = store.image("web")
    assert found.config == config
    assert found.digest == image.digest
    assert [(each.digest, each.size_bytes, each.media_type) for each in found.layers] == [
        (each.digest, each.size_bytes, MEDIA_TAR) for each in layers
    ]
    assert store.images() == (found,)


def test_same_image_has_the_same_digest(store: Store) -> None:
    layer = add_layer(store, b"base")
    first = store.set_image("web", [layer], ImageConfig())
    assert store.set_image("web", [layer], ImageConfig()).digest == first.digest
    assert len(store.images()) == 1


def test_image_needs_its_layers(store: Store) -> None:
    with pytest.raises(BlobMissing):
        store.set_image("web", [Layer(digest=digest(b"nowhere"), size_bytes=1)], ImageConfig())


def test_unknown_image_and_bad_name(store: Store) -> None:
    with pytest.raises(ImageMissing):
        store.image("nosuch")
    with pytest.raises(NameInvalid):
        store.set_image("../x", [], ImageConfig())


def test_collect_keeps_what_images_and_callers_need(store: Store) -> None:
    layer = add_layer(store, b"base")
    store.set_image("web", [layer], ImageConfig())
    kept, dropped = store.add_blob(b"kept"), store.add_blob(b"dropped")
    (store.blobs / ".left-by-a-crash").write_bytes(b"x")
    with store.new_blob() as writer:
        writer.write(b"at work")
        assert store.collect([kept]) == len(b"dropped") + 1
    assert store.has_blob(kept)
    assert store.has_blob(layer.digest)
    assert not store.has_blob(dropped)
    assert store.has_blob(digest(b"at work"))
    assert store.image("web").layers[0].digest == layer.digest


@pytest.mark.needs_root
def test_full_disk_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    """On a real, small file system, in a mount namespace of its own."""
    script = (
        "import sys; from pathlib import Path\n"
        "from rootfs.errors import DiskFull; from rootfs.store import Store; from rootfs.unpack import unpack\n"
        "root = Path(sys.argv[1]); store = Store(root / 'images')\n"
        "for attempt in ('store', 'unpack'):\n"
        "    try:\n"
        "        if attempt == 'store':\n"
        "            store.add_blob(bytes(3_000_000))\n"
        "        else:\n"
        "            (root / 'into').mkdir(); unpack(Path(sys.argv[2]), root / 'into')\n"
        "    except DiskFull as error:\n"
        "        print(error, error.hint)\n"
        "print(list(store.blobs.iterdir()))\n"
    )
    layer = saved(tmp_path, tar_of(file("big", bytes(3_000_000))))[0]
    (tmp_path / "small").mkdir()
    mount = 'mount -t tmpfs -o size=1m small "$1" && exec "$2" -c "$3" "$1" "$4"'
    said = subprocess.run(
        [
            "unshare",
            "--mount",
            "/bin/sh",
            "-ec",
            mount,
            "sh",
            str(tmp_path / "small"),
            sys.executable,
            script,
            str(layer),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("free some disk space") == 2
    assert said.stdout.endswith("[]\n")


def test_nothing_is_collected_while_an_image_comes_in(store: Store) -> None:
    store.add_blob(b"layer of an image without a name yet")
    with store.busy(), store.busy():  # several may come in at once
        with pytest.raises(StoreBusy):
            store.collect()
    assert store.collect() > 0


def test_what_a_pull_left_is_collected(store: Store) -> None:
    store.create()
    store.partial(digest(b"x")).parent.mkdir()
    store.partial(digest(b"x")).write_bytes(b"half")
    assert store.collect() == 4
