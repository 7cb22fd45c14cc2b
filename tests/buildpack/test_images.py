"""The examples, pushed and run in the real `build` and `stack` images: chroots in mount namespaces of their own."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from controller.types import NewJob, Release
from rootfs.images import build_images
from rootfs.store import Store
from rootfs.unpack import unpack
from tests.buildpack.conftest import DEADLINE_S, Server
from tests.buildpack.fakes import REPOSITORY

IMAGE_CACHE = Path(os.environ.get("HOSTD_IMAGE_CACHE", "/var/cache/hostd/images"))
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(600)]

# What hostd does for a job, as little of it as these tests need. $1 lower layers, $2 scratch, $3 cache, $4 code.
_JOB = """
set -e
lower=$1 scratch=$2 cache=$3 code=$4; shift 4
mount --make-rprivate /
mount -t tmpfs t "$scratch"
mkdir "$scratch/upper" "$scratch/work" "$scratch/root"
mount -t overlay o -o "lowerdir=$lower,upperdir=$scratch/upper,workdir=$scratch/work" "$scratch/root"
cd "$scratch/root"
mount -t proc proc proc
mount --bind /dev dev
mkdir -p cache opt/hostd/code
mount --bind "$cache" cache
mount --bind -o ro "$code" opt/hostd/code
cp /etc/resolv.conf /etc/hosts etc
[ ! -f "$CA_BUNDLE" ] || { touch "./$CA_BUNDLE"; mount --bind "$CA_BUNDLE" "./$CA_BUNDLE"; }
unset CA_BUNDLE
exec chroot . "$@"
"""


@dataclass(frozen=True)
class Machine:
    """Unpacked layers, top first, and a folder for what jobs need."""

    layers: tuple[Path, ...]
    scratch: Path

    def command(self, arguments: list[str], environment: Mapping[str, str], slug: Path | None = None) -> list[str]:
        lower = ":".join(map(str, (*([slug] if slug else []), *self.layers)))
        (self.scratch / "root").mkdir(exist_ok=True)
        (self.scratch / "cache").mkdir(exist_ok=True)
        words = [lower, str(self.scratch / "root"), str(self.scratch / "cache"), str(REPOSITORY)]
        inner = ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), *arguments]
        isolated = ["unshare", "-m", "-p", "-f", "--kill-child", "sh", "-c", _JOB, "job", *words, *inner]
        return ["env", f"CA_BUNDLE={CA_BUNDLE}", *isolated]


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    if os.getuid() != 0:
        pytest.skip("needs root: it mounts")
    if not list(IMAGE_CACHE.glob("stack-*.tar.zst")):
        pytest.skip("needs the images: hostd image build")
    folder = tmp_path_factory.mktemp("machine")
    build_images(folder / "store", IMAGE_CACHE, REPOSITORY, names=["stack"], progress=lambda text: None)
    store = Store(folder / "store")
    layers: list[Path] = []
    for number, layer in enumerate(store.image("stack").layers):
        into = folder / f"layer-{number}"
        into.mkdir()
        unpack(store.blob(layer.digest), into, digest=layer.digest)
        layers.insert(0, into)
    return Machine(tuple(layers), folder)


@pytest.fixture
def built(server: Server, machine: Machine) -> Server:
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": "/opt/hostd/code", "LANG": "C.UTF-8"}

    def command(new: NewJob) -> list[str]:
        return machine.command(list(new.args), {**environment, **new.env})

    server.controller.command = command
    return server


async def _push(server: Server, files: Mapping[str, str], name: str = "example") -> tuple[int, str]:
    server.controller.add_app(name)
    git = server.git(name)
    await git.commit(dict(files))
    pushed = await git("push", server.url(name), "master")
    return pushed.status, pushed.text


def _example(name: str) -> dict[str, str]:
    folder = REPOSITORY / "examples" / name
    skipped = {"node_modules", "__pycache__"}
    paths = [path for path in folder.rglob("*") if path.is_file() and not skipped & set(path.parts)]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def _slug(server: Server, into: Path) -> Path:
    layer = server.controller.artifacts[server.controller.releases[-1].artifact_ids[1]].layers[0]
    into.mkdir()
    unpack(server.blobs / "sha256" / layer.digest[7:9] / layer.digest[7:], into, digest=layer.digest)
    return into


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert isinstance(port, int)
        return port


async def _answers(machine: Machine, slug: Path, paths: list[str]) -> dict[str, tuple[int, str]]:
    """Start the web process of a slug, ask it, and stop it by SIGTERM to its group."""
    port = _free_port()
    command = machine.command(
        ["/bin/sh", "/app/.hostd/start", "web"], {"PATH": "/usr/local/bin:/usr/bin:/bin", "PORT": str(port)}, slug
    )
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True
    )
    found: dict[str, tuple[int, str]] = {}
    try:
        async with asyncio.timeout(DEADLINE_S), aiohttp.ClientSession() as session:
            while True:
                assert process.returncode is None, await process.communicate()
                try:
                    for path in paths:
                        async with session.get(f"http://127.0.0.1:{port}{path}") as answer:
                            text = (await answer.text()).replace(str(port), "PORT")
                            found[path] = (answer.status, text)
                    return found
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.05)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.communicate()


async def _run(machine: Machine, slug: Path, *arguments: str) -> tuple[int | None, str]:
    command = machine.command(
        ["/bin/sh", "/app/.hostd/start", "--", *arguments], {"PATH": "/usr/local/bin:/usr/bin:/bin"}, slug
    )
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    return process.returncode, out.decode()


async def test_the_express_example_is_built_and_says_hello(built: Server, machine: Machine, tmp_path: Path) -> None:
    status, text = await _push(built, _example("nodejs"))
    assert status == 0, text
    for line in (
        "-----> Node.js app detected",
        "-----> Requested node range: >=18",
        "-----> Resolved node version: 22.",
        "-----> Installing dependencies",
        "-----> Building runtime environment",
        "       Procfile declares types -> web",
    ):
        assert line in text
    slug = _slug(built, tmp_path / "slug")
    assert await _answers(machine, slug, ["/"]) == {"/": (200, "Hello from Flynn on port PORT\n")}
    assert await _run(machine, slug, "node", "-e", "process.exit(42)") == (42, "")


async def test_the_flask_example_is_built_and_says_hello(built: Server, machine: Machine, tmp_path: Path) -> None:
    status, text = await _push(built, _example("flask"))
    assert status == 0, text
    assert "-----> Python app detected" in text
    assert "-----> Installing requirements from requirements.txt" in text
    slug = _slug(built, tmp_path / "slug")
    answers = await _answers(machine, slug, ["/"])
    assert answers["/"][0] == 200
    assert "Hello from Flynn on port PORT" in answers["/"][1]
    assert await _run(machine, slug, "python", "-c", "import sys, flask; sys.exit(42)") == (42, "")


async def test_the_static_example_is_served_without_its_innards(
    built: Server, machine: Machine, tmp_path: Path
) -> None:
    status, text = await _push(built, _example("static") | {"Procfile": "", "404.html": "lost", "sub/index.html": "s"})
    assert status == 0, text
    assert "Default types for Static -> web" in text
    slug = _slug(built, tmp_path / "slug")
    paths = ["/", "/style.css", "/.hostd/start", "/Procfile", "/nosuch", "/sub"]
    answers = await _answers(machine, slug, paths)
    assert "Hello from Flynn" in answers["/"][1]
    assert "font-family" in answers["/style.css"][1]
    assert [answers[path][0] for path in paths] == [200, 200, 404, 404, 404, 200]
    assert answers["/nosuch"][1] == "lost"


async def test_another_node_comes_from_npm_and_the_second_push_takes_it_from_the_cache(
    built: Server, machine: Machine, tmp_path: Path
) -> None:
    app = {
        "package.json": json.dumps({"engines": {"node": "20.x"}, "scripts": {"start": "node s.js"}}),
        "s.js": "require('http').createServer((q,r)=>r.end(process.version)).listen(process.env.PORT)",
    }
    status, text = await _push(built, app)
    assert status == 0, text
    assert "-----> Resolved node version: 20." in text
    assert "-----> Downloading and installing node" in text
    assert "-----> No dependencies to install" in text
    assert "Default types for Node.js -> web" in text
    status, text = await _push(built, app)
    assert "from the build cache" in text
    answers = await _answers(machine, _slug(built, tmp_path / "slug"), ["/"])
    assert answers["/"][1].startswith("v20.")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"package.json": '{"engines": {"node": "999.x"}}'},
            ["no Node.js version satisfies '999.x'", "22.20.0 (the stack's own)"],
        ),
        ({"package.json": '{"engines": {"node": "so new"}}'}, ["'so new' is no version range"]),
        ({"package.json": "{"}, ["package.json does not parse"]),
        ({"requirements.txt": "", ".python-version": "3.99"}, ["Python 3.99 cannot be had here", "(the stack's own)"]),
        ({"requirements.txt": "", "runtime.txt": "ruby-1"}, ["runtime.txt: 'ruby-1' is no Python version"]),
        ({"requirements.txt": "no-such-package-of-hostd==99"}, ["the requirements in requirements.txt cannot be"]),
        ({"Pipfile": ""}, ["Pipfile alone is not understood"]),
        ({"index.html": "", "Staticfile": "root: ../.."}, ["root '../..' is no folder of this repository"]),
    ],
)
async def test_what_cannot_be_built_is_said_with_what_can_be_done(
    built: Server, files: dict[str, str], words: list[str]
) -> None:
    status, text = await _push(built, files)
    assert status != 0
    for word in words:
        assert word in text, text
    assert built.controller.releases == []


async def test_a_python_version_that_the_stack_has_is_taken(built: Server) -> None:
    status, text = await _push(built, {"requirements.txt": "", ".python-version": "3.11", "Procfile": "web: true"})
    assert status == 0, text
    assert "-----> Python 3.11 specified in .python-version" in text
    assert "-----> Using Python 3.11." in text


async def test_a_buildpack_of_the_repository_runs_by_herokus_contract(
    built: Server, machine: Machine, tmp_path: Path
) -> None:
    pack = {
        "pack/bin/detect": "#!/bin/sh\necho Custom\n",
        "pack/bin/compile": '#!/bin/bash\nset -e\necho "-----> compile $# $(cat "$3/GREETING")"\n'
        'mkdir -p "$1/.profile.d"\necho "export X=$(cat "$3/GREETING")" > "$1/.profile.d/x.sh"\n'
        'test ! -e "$3/PATH"\necho kept >> "$2/kept"; wc -l < "$2/kept"\n',
        "pack/bin/release": "#!/bin/sh\nprintf '%s\\n' --- addons: '  - db' default_process_types:\n"
        "printf '%s\\n' '  web: \"echo \\\"hi\\\"\"' '  worker: sleep 1'\n",
        "Procfile": "web: echo $X\n",
    }
    app = built.controller.add_app("example")
    git = built.git("example")
    await git.commit(pack)
    await git("push", built.url("example"), "master")
    environment = {"BUILDPACK_URL": "./pack", "GREETING": "hello", "PATH": "/nonsense"}
    built.controller.current[app.id] = Release(id="r", app_id=app.id, number=1, artifact_ids=(), env=environment)
    pushed = await git("push", built.url("example"), "master")
    assert pushed.status == 0, pushed.text
    assert "-----> Custom app detected" in pushed.text
    assert "-----> compile 3 hello" in pushed.text
    assert "Procfile declares types -> web" in pushed.text
    assert "Default types for Custom -> worker" in pushed.text
    assert set(built.controller.releases[-1].processes) == {"web", "worker"}
    assert await _run(machine, _slug(built, tmp_path / "slug"), "sh", "-c", "echo $X") == (0, "hello\n")


async def test_an_app_cannot_shadow_the_builders_own_modules(built: Server) -> None:
    trap = "raise SystemExit('trapped')"
    files = {"index.html": "x", "json.py": trap, "buildpack/__init__.py": trap, "tarfile.py": trap, "platform.py": trap}
    status, text = await _push(built, files)
    assert status == 0, text
    assert "trapped" not in text


async def test_a_full_disk_of_the_builder_is_said(built: Server, machine: Machine) -> None:
    def command(new: NewJob) -> list[str]:
        words = shlex.join(list(new.args))
        tiny = f"mount -t tmpfs -o size=64k t /app && exec {words}"
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": "/opt/hostd/code", **new.env}
        return machine.command(["sh", "-c", f"mkdir -p /app && {tiny}"], environment)

    built.controller.command = command
    status, text = await _push(built, {"index.html": "x" * 200_000})
    assert status != 0
    assert "the builder's disk is full" in text
