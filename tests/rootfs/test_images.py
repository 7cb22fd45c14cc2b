"""Building images: only with a cache of real ones, which the first run fills (about two minutes)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rootfs import images, layertar
from rootfs.errors import BuildFailed, DiskFull, ImageMissing
from rootfs.images import CACHE_DIR, build_images
from rootfs.pythonlayers import PACKAGES
from rootfs.store import Store
from rootfs.types import Layer
from rootfs.unpack import unpack

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(600)]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """Copy our packages, so that a file saved meanwhile is not taken for a wrong build."""
    for package in PACKAGES:
        source = Path(images.__file__).resolve().parent.parent / package
        shutil.copytree(source, tmp_path / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "code"


def mounts() -> list[str]:
    return sorted(Path("/proc/mounts").read_text().splitlines())


def test_all_images_come_out_and_a_second_build_is_quick_and_the_same(tmp_path: Path, code: Path) -> None:
    before = mounts()
    said: list[str] = []
    built = build_images(tmp_path / "images", CACHE_DIR, code, progress=said.append)
    assert {image.name for image in built} >= {"base", "system", "stack", "build"}
    assert Store(tmp_path / "images").images() == tuple(sorted(built, key=lambda image: image.name))
    by_name = {image.name: image for image in built}
    assert by_name["stack"].layers[0] == by_name["system"].layers[0] == by_name["base"].layers[0]
    assert by_name["build"].layers[:-1] == by_name["stack"].layers
    assert by_name["build"].layers[-1] == by_name["system"].layers[-1]
    again = build_images(tmp_path / "again", CACHE_DIR, code, progress=said.append)
    assert [image.digest for image in again] == [image.digest for image in built]
    assert mounts() == before
    assert not list((CACHE_DIR / "tmp").glob("*"))


def overlaid(layers: list[Path], tmp_path: Path, *script: str, env: dict[str, str]) -> str:
    """Run a script on an overlay of layers, mounted in a namespace of its own."""
    for name in ("upper", "work", "root"):
        (tmp_path / name).mkdir(parents=True)
    lower = ":".join(str(path) for path in reversed(layers))
    root = tmp_path / "root"
    outside = [f"mount -t overlay overlay -o lowerdir={lower},upperdir={tmp_path}/upper,workdir={tmp_path}/work {root}"]
    outside += [f"mount --rbind /dev {root}/dev", f"mount -t proc proc {root}/proc"]
    outside += [f"exec chroot {root} /bin/sh -ec '{' && '.join(script)}'"]
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--ipc", "--net", "/bin/sh", "-ec", " && ".join(outside)],
        capture_output=True,
        text=True,
        check=False,
        env={"HOME": "/root", **env},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def unpacked(store: Store, layers: tuple[Layer, ...], into: Path) -> list[Path]:
    found = []
    for layer in layers:
        path = into / layer.digest[7:19]
        if not path.exists():
            path.mkdir(parents=True)
            unpack(store.blob(layer.digest), path, digest=layer.digest)
        found.append(path)
    return found


def test_programs_of_the_stack_run(tmp_path: Path, code: Path) -> None:
    image = build_images(tmp_path / "images", CACHE_DIR, code, ["stack"], progress=lambda _: None)[-1]
    layers = unpacked(Store(tmp_path / "images"), image.layers, tmp_path / "layers")
    script = ["node --version", "npm --version", "npx --version", "uv --version", "gcc --version | head -1"]
    script += ["python3 -m venv --without-pip /tmp/v", "git --version", "/usr/sbin/nginx -v 2>&1", "id -u nobody"]
    script += ["locale 2>&1 | head -1", "dpkg --audit", "stat -c %a /tmp", "node -p process.arch"]
    said = overlaid(layers, tmp_path / "job", *script, env=image.config.env).splitlines()
    assert said[0] == "v22.20.0"
    assert said[-4:-1] == ["65534", "LANG=C.UTF-8", "1777"]
    assert list((layers[0] / "dev").iterdir()) == []
    assert not list((layers[0] / "usr/share/man").glob("*/*"))


def test_our_daemons_import_in_the_system_image(tmp_path: Path, code: Path) -> None:
    image = build_images(tmp_path / "images", CACHE_DIR, code, ["system"], progress=lambda _: None)[-1]
    layers = unpacked(Store(tmp_path / "images"), image.layers, tmp_path / "layers")
    check = 'python3 -c "import aiohttp, asyncssh, cryptography.x509, discovery.wire.serve, rootfs.images"'
    said = overlaid(
        layers, tmp_path / "job", check, "haproxy -v | head -1", "git --version", env=image.config.env
    ).splitlines()
    assert said[0].startswith("HAProxy version 2.")
    assert list((tmp_path / "job/upper").rglob("*.pyc")) == []


def test_changed_file_changes_only_the_code_layer(tmp_path: Path, code: Path) -> None:
    first = build_images(tmp_path / "images", CACHE_DIR, code, ["system"], progress=lambda _: None)[-1]
    (code / "hostd/new.py").write_text("x = 1\n")
    second = build_images(tmp_path / "images", CACHE_DIR, code, ["system"], progress=lambda _: None)[-1]
    assert first.layers[:-1] == second.layers[:-1]
    assert first.layers[-1] != second.layers[-1]


def test_unknown_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageMissing, match="nosuch"):
        build_images(tmp_path / "images", tmp_path / "cache", names=["nosuch"])


def test_failing_bootstrap_says_why_and_caches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "mmdebstrap").write_text(
        "#!/bin/sh\necho 'I: running apt-get update...'\necho 'E: no archive' >&2\nexit 25\n"
    )
    (broken / "mmdebstrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken}:{os.environ['PATH']}")
    said: list[str] = []
    with pytest.raises(BuildFailed, match="E: no archive"):
        build_images(tmp_path / "images", tmp_path / "cache", names=["base"], progress=said.append)
    assert "base: running apt-get update..." in said
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".lock"]


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_FREE_BYTES_MIN", 2**60)
    with pytest.raises(DiskFull, match="GiB free"):
        build_images(tmp_path / "images", tmp_path / "cache", names=["base"], progress=lambda _: None)


def test_cache_forgets_the_oldest_layers_of_a_kind_but_none_in_use(tmp_path: Path) -> None:
    with images._Cache.opened(tmp_path, lambda _: None) as cache:
        for number in range(12):
            layer = cache.put(f"code-{number}", lambda target: layertar.from_files([], target))
            os.utime(tmp_path / f"code-{number}.json", (number, number))
        cache.put("base-1", lambda target: layertar.from_files([], target))
        cache.prune(["code-0"])
        assert cache.get("code-0") == cache.get("code-11") == cache.get("base-1") == layer
        assert len(list(tmp_path.glob("code-*.json"))) == len(list(tmp_path.glob("code-*.tar.zst"))) == 9
        cache.file("base-1").write_bytes(b"torn")
        assert cache.get("base-1") is None


def test_second_build_waits_for_the_first(tmp_path: Path) -> None:
    script = (
        "import sys; from functools import partial; from pathlib import Path; from rootfs.images import _Cache\n"
        "say = partial(print, flush=True)\n"
        f"with _Cache.opened(Path({str(tmp_path)!r}), say): say('mine'); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as second,
    ):
        streams = [(each, each.stdout) for each in (first, second)]
        assert all(stream is not None for _, stream in streams)
        said = {each.pid: stream.readline() for each, stream in streams if stream is not None}
        assert sorted(said.values()) == ["mine\n", "waiting for another build to end\n"]
        holder, waiter = (first, second) if said[first.pid] == "mine\n" else (second, first)
        holder.communicate("", timeout=20)
        assert waiter.communicate("", timeout=20)[0] == "mine\n"
