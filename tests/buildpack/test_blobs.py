from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from buildpack import blobs
from buildpack.errors import BlobExists, BlobNotFound, BlobTooLarge, DigestMismatch, DiskFull
from discovery.wire.errors import Invalid

TEXT = b"content"
HEX = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> blobs.Blobs:
    return blobs.Blobs(tmp_path, reserve_bytes=0)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_blob_is_kept_under_its_hash(store: blobs.Blobs) -> None:
    with store.receive() as incoming:
        incoming.write(TEXT)
        blob = store.keep(incoming, HEX)
    assert (blob.digest, blob.size_bytes) == (f"sha256:{HEX}", len(TEXT))
    assert store.find(HEX).read_bytes() == TEXT
    assert store.list() == [blob]


def test_content_that_is_not_what_its_name_says_leaves_nothing(store: blobs.Blobs) -> None:
    with pytest.raises(DigestMismatch), store.receive() as incoming:  # noqa: PT012
        incoming.write(TEXT + b"!")
        store.keep(incoming, HEX)
    assert _files(store.folder) == []


def test_an_upload_that_breaks_leaves_nothing(store: blobs.Blobs) -> None:
    with pytest.raises(ConnectionResetError), store.receive() as incoming:  # noqa: PT012
        incoming.write(TEXT)
        raise ConnectionResetError
    assert _files(store.folder) == []


def test_a_blob_above_its_limit_is_refused_before_and_while_it_comes(store: blobs.Blobs) -> None:
    with pytest.raises(BlobTooLarge):
        store.receive(size_bytes=10, bytes_max=9)
    with pytest.raises(BlobTooLarge), store.receive(bytes_max=9) as incoming:
        incoming.write(b"x" * 10)
    assert _files(store.folder) == []


def test_a_temporary_blob_is_kept_or_ends(store: blobs.Blobs) -> None:
    for name, ends_at in (("first-name", 100.0), ("second-name", 200.0)):
        with store.receive() as incoming:
            incoming.write(TEXT)
            store.hold(incoming, name, ends_at=ends_at)
    with pytest.raises(BlobExists), store.receive() as incoming:
        store.hold(incoming, "first-name", ends_at=1)
    assert store.sweep(150.0, 3600) == 1
    with pytest.raises(BlobNotFound):
        store.find_held("first-name")
    assert store.keep_held("second-name").digest == f"sha256:{HEX}"
    assert _files(store.folder) == [f"sha256/{HEX[:2]}/{HEX}"]


def test_what_a_crash_left_is_removed_at_start(store: blobs.Blobs) -> None:
    (store.folder / "incoming" / "half").write_bytes(b"x")
    blobs.Blobs(store.folder, reserve_bytes=0)
    assert _files(store.folder) == []


def test_the_reserve_is_not_touched(tmp_path: Path) -> None:
    store = blobs.Blobs(tmp_path, reserve_bytes=2**60)
    with pytest.raises(DiskFull):
        store.receive(size_bytes=1)


@pytest.mark.parametrize("text", ["", "..", HEX.upper(), HEX + "0", "../" + HEX, HEX[:-1] + "\n"])
def test_a_digest_is_64_hexadecimal_digits(text: str) -> None:
    with pytest.raises(Invalid):
        blobs.parse_hex(text)


@pytest.mark.parametrize("text", ["", "..", "short", "A" * 10, "a" * 64, "aaaaaaaa*", "aaaaaaaa/b", "aaaaaaaa.b"])
def test_a_temporary_name_is_plain(text: str) -> None:
    with pytest.raises(Invalid):
        blobs.parse_name(text)


_ON_A_FULL_DISK = """
import sys
from pathlib import Path
from buildpack import blobs
from buildpack.errors import DiskFull
folder = Path(sys.argv[1])
store = blobs.Blobs(folder, reserve_bytes=0)
for attempt in range(2):
    try:
        with store.receive() as incoming:
            for _ in range(64):
                incoming.write(b"x" * 65536)
            incoming.finish(is_lasting=True)
        sys.exit("it fitted")
    except DiskFull as error:
        print(error.message)
print([path.name for path in folder.rglob("*") if path.is_file()])
"""


@pytest.mark.needs_root
def test_a_disk_that_becomes_full_is_said_and_nothing_stays(tmp_path: Path) -> None:
    """On a tmpfs of 1 MiB in a mount namespace of its own."""
    script = tmp_path / "script.py"
    script.write_text(_ON_A_FULL_DISK)
    disk = tmp_path / "disk"
    disk.mkdir()
    repository = Path(__file__).parent.parent.parent
    words = [str(disk), sys.executable, str(script)]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m t "$1" && exec "$2" "$3" "$1"', "sh", *words],
        cwd=repository,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the blob store's disk is full\n" * 2 + "[]\n"
    assert _files(disk) == []
