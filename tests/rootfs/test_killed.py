"""kill -9 at any step of an import and of an unpacking: what is there afterwards is whole, and trying again works."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rootfs.intake import import_images
from rootfs.layers import Layers
from rootfs.store import Store
from tests.rootfs.ociimages import LAYER_ONE, LAYER_TWO, archive, image, sha
from tests.rootfs.tars import file, folder, link, packed, saved, tar_of

pytestmark = pytest.mark.needs_root

# Every call that changes the disk counts down to the end of the process, before or after it is done.
_DYING = """
import asyncio, os, pathlib, signal, sys
left, is_before = int(sys.argv[1]) // 2, int(sys.argv[1]) % 2
def dying(act):
    def wrapped(*arguments, **more):
        global left
        left -= 1
        if left < 0 and is_before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = act(*arguments, **more)
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped
NAMES = "mkdir chmod chown setxattr mknod symlink mkfifo link unlink open write fsync rename replace utime fchmod rmdir"
def arm():
    for name in NAMES.split():
        setattr(os, name, dying(getattr(os, name)))
"""
_IMPORT = """
from rootfs.intake import import_images
from rootfs.store import Store
arm()
import_images(Store(pathlib.Path(sys.argv[2])), pathlib.Path(sys.argv[3]))
print("done")
"""
_UNPACK = """
from rootfs.layers import Layers
layers = Layers(pathlib.Path(sys.argv[2]), boot_id="this-boot")
layers.open()
async def get():
    return pathlib.Path(sys.argv[3])
arm()
asyncio.run(layers.ensure(sys.argv[4], get))
print("done")
os._exit(0)
"""


def dies(script: str, point: int, *arguments: str) -> bool:
    """Run it until the point; False if it came to its end before."""
    run = subprocess.run(
        [sys.executable, "-c", _DYING + script, str(point), *arguments], capture_output=True, text=True, timeout=60
    )
    assert run.returncode in (0, -signal.SIGKILL), run.stderr
    return run.returncode != 0


def test_import(tmp_path: Path) -> None:
    path = tmp_path / "app.tar"
    path.write_bytes(archive(image()))
    points = 0
    for point in range(0, 400, 3):
        store = Store(tmp_path / f"images{point}")
        if not dies(_IMPORT, point, str(store.path), str(path)):
            break
        points += 1
        for blob in store.blobs.iterdir() if store.blobs.is_dir() else ():
            assert blob.name.startswith(".") or blob.name == sha(blob.read_bytes())[7:]
        for found in store.images():
            assert all(store.has_blob(layer.digest) for layer in found.layers)
        (found,) = import_images(store, path)
        assert [layer.diff_id for layer in found.layers] == [sha(LAYER_ONE), sha(LAYER_TWO)]
        store.collect()
        assert not [each for each in store.blobs.iterdir() if each.name.startswith(".")]
    assert points > 10


async def test_unpack(tmp_path: Path) -> None:
    members = [folder("a", mode=0o750), file("a/b", os.urandom(2_500_000), uid=7), link("l", "a/b"), file("a/.wh.c")]
    members += [link("a/h", "a/b", is_hard=True), file("a/d/.wh..wh..opq"), file("z", b"last")]
    blob, digest = saved(tmp_path, packed(tar_of(*members), "gzip"))
    points = whole = 0
    for point in range(400):
        path = tmp_path / f"layers{point}"
        if not dies(_UNPACK, point, str(path), str(blob), digest):
            break
        points += 1
        layers = Layers(path, boot_id="this-boot")
        layers.open()
        if layers.has(digest):
            whole += 1
        else:
            assert list(path.iterdir()) == []  # what was half done is gone

        async def get() -> Path:
            return blob

        found = await layers.ensure(digest, get)
        assert (found / "z").read_bytes() == b"last"
        assert (found / "a/b").stat().st_size == 2_500_000
        assert (found / "a/h").stat().st_ino == (found / "a/b").stat().st_ino
        await asyncio.to_thread(layers.close)
    assert points > 30
    assert whole > 0
