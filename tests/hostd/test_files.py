"""The files step: what a job finds in its root, and that nothing is left of it afterwards."""

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from discovery.wire.errors import Invalid, Unavailable
from hostd.errors import ImageNotFound, InvalidSpec, LaunchFailed
from hostd.runtime.files import FilesState, FilesStep, check_spec
from hostd.types import BindMount, JobSpec, Layer, VolumeMount
from rootfs.types import ImageConfig
from rootfs.types import Layer as ImageLayer
from tests.pace import SLOWNESS
from tests.rootfs.tars import device, file, folder, link, tar_of

pytestmark = pytest.mark.needs_root

# Runs in namespaces of its own: carries out a plan as the spawner's child does, then looks around in the new root.
INSIDE = """
import contextlib, json, os, sys
from pathlib import Path
from hostd.runtime.root import Places, Root
from hostd.runtime.seed import walk
from hostd.runtime.table import WORDS, ZERO, Table
state = json.load(sys.stdin)
os.umask(0)
table, places = Table(), Places(20, 21, 22, 23, 24)
for number in places:
    table.call("dup3", 0, number, os.O_CLOEXEC)
Root(Table(), "/elsewhere", places).carry_out(state["plan"])  # an earlier job: what is alike is worked out once
root = Root(table, state["root"], places)
root.carry_out(state["plan"])
root.enter()
last = table.length
table.set_word(0, 0)
table._words[last * WORDS + ZERO] = 1 << 40  # out of the table: back to here
with contextlib.suppress(IndexError):
    walk(table.write())
def can_write(path):
    try:
        with open(path, "w") as file:
            file.write("x")
        return True
    except OSError:
        return False
def content(path):
    try:
        return Path(path).read_text()
    except OSError:
        return None
print(json.dumps(eval(state["look"])))
"""


@pytest.fixture
async def step(tmp_path: Path) -> AsyncIterator[FilesStep]:
    found = FilesStep(tmp_path / "state")
    await found.open()
    found.disks.refusal = "these tests look twice into the same files, which a disk of the job's own allows once"
    yield found
    await found.close()


def layer(step: FilesStep, *members: Any) -> Layer:
    raw = tar_of(*members)
    return Layer(digest=step.images.add_blob(raw), size_bytes=len(raw))


def base(step: FilesStep) -> Layer:
    return layer(step, folder("./"), folder("etc"), file("etc/passwd", b"root"), folder("data"), link("var", "/data"))


def job(*layers: Layer, **fields: Any) -> JobSpec:
    return JobSpec(id="web-1", layers=layers, args=("true",), **fields)


def look(state: FilesState, what: str) -> Any:
    # A volatile overlay is mounted once in its life; a test may look twice at what lies in the same one.
    shutil.rmtree(Path(state.writable) / "work/work", ignore_errors=True)
    command = ["unshare", "--mount", "--pid", "--fork", "--ipc", "--uts", "--net", "--propagation", "private"]
    said = subprocess.run(
        [*command, sys.executable, "-c", INSIDE],
        input=json.dumps({"root": state.root, "plan": state.plan, "look": what}),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def tree(path: Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


async def test_upper_layers_win_and_the_job_has_its_own_names(step: FilesStep) -> None:
    top = layer(step, file("app/run", b"new"), file("etc/.wh.passwd"))
    spec = job(base(step), layer(step, file("app/run", b"old")), top, working_dir="/srv/app")
    state = await step.apply(spec, hostname="web-1", nameserver="100.100.0.1", ip="100.100.0.7")
    what = "[content('/app/run'), os.path.exists('/etc/passwd'), os.path.isdir('/srv/app')]"
    assert look(state, what) == ["new", False, True]
    etc = "[content('/etc/' + name) for name in ('hostname', 'resolv.conf', 'hosts')]"
    hostname, resolv_conf, hosts = look(state, etc)
    assert (hostname, resolv_conf) == ("web-1\n", "nameserver 100.100.0.1\n")
    assert hosts.splitlines()[-1] == "100.100.0.7\tweb-1"


async def test_host_network_job_asks_the_hosts_nameservers(step: FilesStep) -> None:
    state = await step.apply(job(base(step)), hostname="web-1")
    assert look(state, "content('/etc/resolv.conf')") == Path("/etc/resolv.conf").read_text()


async def test_root_is_minimal_and_closed(step: FilesStep) -> None:
    state = await step.apply(job(base(step)), hostname="web-1", nameserver="100.100.0.1")
    devices = look(state, "sorted(os.listdir('/dev'))")
    assert set(devices) - {"mqueue"} == {
        ".hostd-init", "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
        "urandom", "zero",
    }  # fmt: skip
    assert look(state, "[can_write('/dev/null'), can_write('/dev/shm/x'), can_write('/x')]") == [True, True, True]
    closed = [
        "/proc/sys/kernel/hostname",
        "/proc/sysrq-trigger",
        "/sys/kernel/mm/ksm/run",
        "/proc/irq/default_smp_affinity",
    ]
    assert look(state, f"[can_write(path) for path in {closed}]") == [False] * len(closed)
    assert look(state, "[len(content('/proc/kcore') or ''), content('/proc/timer_list') or '']") == [0, ""]
    assert look(state, "[os.listdir('/sys/firmware'), os.path.exists('/sys/fs/cgroup/memory')]") == [[], False]
    assert look(state, "oct(os.stat('/dev/null').st_mode)") == oct(0o20666)
    assert look(state, "os.stat('/').st_mode & 0o777") == 0o755


async def test_init_and_certificates_of_the_host_are_there(step: FilesStep) -> None:
    state = await step.apply(job(base(step)), hostname="web-1")
    said = look(state, "[os.access('/dev/.hostd-init', os.X_OK), content('/etc/ssl/certs/ca-certificates.crt')[:9999]]")
    assert said == [True, Path("/etc/ssl/certs/ca-certificates.crt").read_text()[:9999]]


async def test_what_a_job_writes_stays_its_own_and_goes_with_it(step: FilesStep, tmp_path: Path) -> None:
    lower = base(step)
    state = await step.apply(job(lower), hostname="web-1")
    assert look(state, "[can_write('/etc/passwd'), can_write('/etc/ssl/certs/ca-certificates.crt')]") == [True, True]
    assert (step.layers.path_of(lower.digest) / "etc/passwd").read_text() == "root"
    await step.undo("web-1")
    await step.close()
    assert tree(tmp_path / "state/jobs") == []


async def test_volumes_are_kept_and_read_only_is_read_only(step: FilesStep, tmp_path: Path) -> None:
    volumes = (VolumeMount(name="data", path="/data"), VolumeMount(name="ro", path="/data/ro", is_read_only=True))
    spec = job(base(step), volumes=volumes)
    state = await step.apply(spec, hostname="web-1")
    assert look(state, "[can_write('/data/x'), can_write('/data/ro/x')]") == [True, False]
    await step.undo("web-1")
    assert step.volumes.names() == ("data", "ro")
    assert (tmp_path / "state/volumes/data/x").read_text() == "x"
    assert step.volumes.users("data") == ()


async def test_binds_of_files_and_folders(step: FilesStep, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/file").write_text("hello")
    mounts = (
        BindMount(source=str(tmp_path / "run"), path="/run/hostd"),
        BindMount(source=str(tmp_path / "run/file"), path="/opt/deep/file", is_read_only=False),
    )
    state = await step.apply(job(base(step), mounts=mounts), hostname="web-1")
    assert look(state, "[content('/run/hostd/file'), content('/opt/deep/file')]") == ["hello", "hello"]
    assert look(state, "[can_write('/run/hostd/x'), can_write('/opt/deep/file')]") == [False, True]


async def test_link_in_an_image_cannot_lead_a_mount_out(step: FilesStep, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    up = "../../../../../../../.." + str(outside)
    evil = layer(step, folder("./"), folder(str(outside)[1:]), link("data", str(outside)), link("up", up))
    volumes = (VolumeMount(name="a", path="/data/x"), VolumeMount(name="b", path="/up/y"))
    state = await step.apply(job(evil, volumes=volumes), hostname="web-1")
    assert look(state, "[can_write('/data/x/f'), can_write('/up/y/f')]") == [True, True]
    assert tree(outside) == []


async def test_undo_works_twice_and_without_apply(step: FilesStep, tmp_path: Path) -> None:
    await step.undo("never-was")
    await step.apply(job(base(step)), hostname="web-1")
    await step.undo("web-1")
    assert not (tmp_path / "state/jobs/web-1").exists()
    await step.undo("web-1")
    await step.close()
    assert tree(tmp_path / "state/jobs") == []


async def test_orphans_are_found_by_name_and_apply_replaces_one(step: FilesStep, tmp_path: Path) -> None:
    (tmp_path / "state/jobs/lost/upper").mkdir(parents=True)
    (tmp_path / "state/jobs/web-1/upper").mkdir(parents=True)
    (tmp_path / "state/jobs/web-1/upper/old").write_text("x")
    assert step.orphans(["web-1"]) == ("lost",)
    state = await step.apply(job(base(step)), hostname="web-1")
    assert not (Path(state.root).parent / "upper/old").exists()


async def test_restart_cleans_what_a_crash_left_and_finds_its_layers(step: FilesStep, tmp_path: Path) -> None:
    lower = base(step)
    await step.apply(job(lower), hostname="web-1")
    (tmp_path / "state/jobs/.gone-abc/upper").mkdir(parents=True)
    (tmp_path / "state/downloads/blobs").mkdir(parents=True)
    again = FilesStep(tmp_path / "state")
    await again.open()
    assert [path.name for path in (tmp_path / "state/jobs").iterdir()] == ["web-1"]
    assert not (tmp_path / "state/downloads").exists()
    assert again.layers.has(lower.digest)
    assert len(list((tmp_path / "state/host").iterdir())) == 1
    await again.close()


async def test_layer_that_is_nowhere_is_told(step: FilesStep, tmp_path: Path) -> None:
    with pytest.raises(ImageNotFound, match="not on this host"):
        await step.apply(job(Layer(digest="sha256:" + "0" * 64, size_bytes=1)), hostname="web-1")
    assert tree(tmp_path / "state/jobs") == []


async def test_layer_with_a_device_does_not_start(step: FilesStep, tmp_path: Path) -> None:
    with pytest.raises(LaunchFailed) as caught:
        await step.apply(job(layer(step, device("sda"))), hostname="web-1")
    assert caught.value.detail["step"] == "files"
    assert tree(tmp_path / "state/jobs") == []


async def test_layer_is_fetched_once_and_its_download_thrown_away(step: FilesStep, tmp_path: Path) -> None:
    raw = tar_of(folder("./"), file("app", b"x"))
    digest = "sha256:" + hashlib.sha256(raw).hexdigest()
    asked: list[None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.append(None)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(raw) + raw)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    remote = Layer(digest=digest, size_bytes=len(raw), url=f"http://127.0.0.1:{port}/x")
    async with server:
        for number in range(3):
            await step.apply(JobSpec(id=f"web-{number}", layers=(remote,), args=("true",)), hostname="web")
    assert len(asked) == 1
    assert list((tmp_path / "state/downloads/blobs/sha256").iterdir()) == []
    gone = Layer(digest="sha256:" + "0" * 64, size_bytes=1, url=f"http://127.0.0.1:{port}/x")
    with pytest.raises(Unavailable):
        await step.apply(job(gone), hostname="web-1")


async def test_layers_are_in_use_from_the_first_step_of_a_start_to_its_undo(step: FilesStep) -> None:
    digests = []
    for number in range(4):
        one = layer(step, file(f"f{number}"))
        digests.append(one.digest)
        await step.apply(JobSpec(id=f"web-{number}", layers=(one,), args=("true",)), hostname="web")
    await step.undo("web-2")
    await step.undo("web-3")
    assert step.in_use() == set(digests[:2])
    assert await step.collect([digests[2]]) == 1
    assert set(step.layers.digests()) == set(digests[:3])


async def test_concurrent_starts_do_not_disturb_each_other(step: FilesStep) -> None:
    lower = base(step)
    specs = [JobSpec(id=f"web-{number}", layers=(lower,), args=("true",)) for number in range(20)]
    states = await asyncio.gather(*(step.apply(spec, hostname=spec.id) for spec in specs))
    assert len({state.root for state in states}) == 20
    await asyncio.gather(*(step.undo(spec.id) for spec in specs))
    assert step.orphans([]) == ()


async def test_nothing_is_mounted_on_the_host(step: FilesStep, tmp_path: Path) -> None:
    state = await step.apply(job(base(step)), hostname="web-1")
    look(state, "1")
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


async def test_daemon_with_a_strict_umask_makes_roots_that_others_can_read(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        step = FilesStep(tmp_path / "state")
        await step.open()
        spec = job(layer(step, file("a/b")), volumes=(VolumeMount(name="data", path="/data"),))
        state = await step.apply(spec, hostname="web-1")
    finally:
        os.umask(before)
    paths = ["/", "/etc", "/etc/ssl/certs", "/a", "/data", "/.hostd/init", "/etc/hosts"]
    assert look(state, f"[os.stat(path).st_mode & 0o777 for path in {paths}]") == [0o755] * (len(paths) - 1) + [0o644]
    await step.close()


async def test_missing_init_says_what_to_install(tmp_path: Path) -> None:
    step = FilesStep(tmp_path / "state", init_path=tmp_path / "nosuch")
    with pytest.raises(Unavailable) as caught:
        await step.open()
    assert "tini" in caught.value.hint
    await step.close()


ZERO = Layer(digest="sha256:" + "0" * 64, size_bytes=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": ()},
        {"layers": (Layer(digest="sha256:../../x", size_bytes=1),)},
        {"volumes": (VolumeMount(name="..", path="/data"),)},
        {"volumes": (VolumeMount(name="a/b", path="/data"),)},
        {"volumes": (VolumeMount(name="A b", path="/data"),)},
        {"volumes": (VolumeMount(name="a", path="/data/../etc"),)},
        {"volumes": (VolumeMount(name="a", path="/proc/1"),)},
        {"volumes": (VolumeMount(name="a", path="/x"), VolumeMount(name="b", path="/x"))},
        {"mounts": (BindMount(source="etc", path="/x"),)},
        {"mounts": (BindMount(source="/etc", path="x"),)},
        {"working_dir": "app"},
        {"working_dir": "/../etc"},
        {"id": "../x"},
    ],
)
def test_names_that_lead_out_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        check_spec(JobSpec(**{"id": "web-1", "layers": (ZERO,), "args": ("true",), **fields}))


async def test_mount_of_what_is_not_there_is_refused_and_leaves_nothing(step: FilesStep, tmp_path: Path) -> None:
    spec = job(base(step), mounts=(BindMount(source=str(tmp_path / "nosuch"), path="/x"),))
    with pytest.raises(InvalidSpec, match="nosuch"):
        await step.apply(spec, hostname="web-1")
    with pytest.raises(InvalidSpec, match="hostname"):
        await step.apply(job(base(step)), hostname="a\nb")
    assert tree(tmp_path / "state/jobs") == []


async def test_layers_unpacked_by_a_killed_process_do_not_count(tmp_path: Path) -> None:
    script = (
        "import asyncio, os, sys; from pathlib import Path; from hostd.runtime.files import FilesStep\n"
        "from hostd.types import JobSpec, Layer\n"
        "async def main():\n"
        f"    step = FilesStep(Path({str(tmp_path / 'state')!r}))\n"
        "    await step.open()\n"
        "    print('ready', flush=True)\n"
        "    layer = Layer(digest=sys.argv[1], size_bytes=1)\n"
        "    await step.apply(JobSpec(id='web-1', layers=(layer,), args=('true',)), hostname='web-1')\n"
        "asyncio.run(main())\n"
    )
    raw = tar_of(folder("./"), *(file(f"f{number}", b"x" * 100) for number in range(4_000)))
    setup = FilesStep(tmp_path / "state")
    digest = setup.images.add_blob(raw)
    layers = tmp_path / "state/layers"
    with subprocess.Popen([sys.executable, "-c", script, digest], stdout=subprocess.PIPE) as process:  # noqa: ASYNC220
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        async with asyncio.timeout(20 * SLOWNESS):
            while not list(layers.glob("new-*/f10")):
                await asyncio.sleep(0.002)
        process.kill()
    assert not (layers / digest[7:]).exists()
    await setup.open()
    assert tree(layers) == []
    await setup.apply(job(Layer(digest=digest, size_bytes=len(raw))), hostname="web-1")
    assert len(list((layers / digest[7:]).iterdir())) == 4_000
    await setup.close()
    shutil.rmtree(tmp_path / "state")


async def test_warming_unpacks_what_stored_images_have(step: FilesStep) -> None:
    kept = base(step)
    stored = ImageLayer(digest=kept.digest, size_bytes=kept.size_bytes, media_type=kept.media_type, diff_id=kept.digest)
    step.images.set_image("base", [stored], ImageConfig())
    await step.warm()
    assert step.layers.has(kept.digest)
    await step.warm()
