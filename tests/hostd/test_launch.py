"""The list of steps: what each is told, what is undone when one fails, and the real ones together."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import tomllib
from collections.abc import AsyncIterator, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from discovery.wire.errors import Unavailable
from hostd.errors import InvalidSpec, LaunchFailed, PortTaken, SpawnerUnavailable
from hostd.runtime.cgroup import CgroupState, open_cgroups
from hostd.runtime.files import FilesState, FilesStep
from hostd.runtime.launch import DEFAULT_CAPABILITIES, Launcher, environment
from hostd.runtime.network import NetworkConfig, NetworkState, NetworkStep
from hostd.runtime.process import ProcessStep, Spawned, Spawner, SpawnRequest
from hostd.runtime.seccomp import SeccompCache
from hostd.types import BindMount, JobSpec, Layer, Port, Resources
from netns.errors import KernelError
from rootfs.store import Store
from tests.hostd.isolation import DEADLINE_S, exit_of, gone, read_all, spawner_in
from tests.netns import lab
from tests.rootfs import tars


class Recorder:
    """All four steps in one fake: notes what it is told, fails where a test wants it to."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.requests: list[SpawnRequest] = []
        self.failures: dict[str, BaseException] = {}

    def note(self, text: str) -> None:
        self.told.append(text)
        if text in self.failures:
            raise self.failures[text]


class FakeStep:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder, self._name = recorder, name

    async def undo(self, job_id: str) -> None:
        self._recorder.note(f"undo {self._name}")

    async def discard(self, job_id: str) -> None:
        self._recorder.note(f"discard {self._name}")


class FakeCgroups(FakeStep):
    def procs(self, job_id: str) -> tuple[str, ...]:
        return (f"/cg/{job_id}/cgroup.procs",)

    async def apply(self, job_id: str, resources: Resources) -> CgroupState:
        self._recorder.note("cgroup")
        return CgroupState(procs=("/cg/cgroup.procs",))

    def limit_disk(self, job_id: str, resources: Resources, device: str) -> None:
        self._recorder.note("disk limits")

    def pids(self, job_id: str) -> tuple[int, ...]:
        return ()


class FakeNetwork(FakeStep):
    async def apply(self, job_id: str, ports: tuple[Port, ...], has_host_network: bool, **_: object) -> NetworkState:
        self._recorder.note("network")
        numbers = tuple(55000 + index for index in range(len(ports)))
        return NetworkState(netns_name=None if has_host_network else "n1", ip="100.100.0.5", numbers=numbers)


class FakeFiles(FakeStep):
    async def apply(
        self, spec: JobSpec, *, hostname: str, nameserver: str, ip: str, uid_base: int, cgroups: Mapping[str, str]
    ) -> FilesState:
        self._recorder.note("files")
        assert (hostname, nameserver, ip) == ("job", "100.100.0.1", "100.100.0.5")
        return FilesState(root="/jobs/job/root", plan=(("mkdir", "/x", 0o755),))

    def note(self, job_id: str, content: bytes) -> str:
        self._recorder.note("note")
        return "/jobs/job/launch.json"

    def noted(self, job_id: str) -> bytes:
        return b""


class FakeProcess(FakeStep):
    async def apply(self, request: SpawnRequest) -> Spawned:
        self._recorder.requests.append(request)
        self._recorder.note("process")
        return Spawned(pid=4711)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def launcher(recorder: Recorder, tmp_path: Path) -> Launcher:
    process: Any = FakeProcess(recorder, "process")
    return Launcher(
        cgroups=FakeCgroups(recorder, "cgroup"),
        network=FakeNetwork(recorder, "network"),
        files=FakeFiles(recorder, "files"),
        process=process,
        seccomp=SeccompCache(tmp_path / "seccomp"),
        nameserver="100.100.0.1",
        proxy_env={"http_proxy": "http://192.0.2.9:3128"},
    )


def spec(**fields: Any) -> JobSpec:
    settings: dict[str, Any] = {"id": "job", "layers": (), "args": ("true",)} | fields
    return JobSpec(**settings)


UNDO_ALL = ["undo process", "undo cgroup", "undo files", "undo network"]


async def test_every_step_in_order(launcher: Launcher, recorder: Recorder) -> None:
    launched = await launcher.launch(spec(ports=(Port(), Port())))
    assert recorder.told == ["cgroup", "network", "files", "note", "process"]
    assert (launched.pid, launched.is_waiting, launched.network.numbers) == (4711, False, (55000, 55001))


async def test_what_the_spawner_is_told(launcher: Launcher, recorder: Recorder) -> None:
    resources = Resources(open_files_max=77, pids_max=20)
    await launcher.launch(spec(user="12:34", has_tty=True, rows=9, columns=8, resources=resources, ports=(Port(),)))
    (request,) = recorder.requests
    assert request.namespaces == ("mount", "pid", "uts", "ipc", "cgroup")
    assert (request.netns, request.root, request.mounts) == ("n1", "/jobs/job/root", (("mkdir", "/x", 0o755),))
    assert (request.uid, request.gid, request.rlimits) == (12, 34, {"NOFILE": 77, "NPROC": 28})
    assert request.cgroup_procs == ("/cg/cgroup.procs",)
    assert set(request.capabilities or ()) == set(DEFAULT_CAPABILITIES)
    assert request.has_no_new_privs
    assert request.has_init
    assert Path(request.seccomp_path).stat().st_size % 8 == 0
    assert (request.waits, request.rows, request.columns) == (True, 9, 8)


async def test_the_hosts_network_is_no_namespace(launcher: Launcher, recorder: Recorder) -> None:
    await launcher.launch(spec(has_host_network=True))
    assert recorder.requests[0].netns == ""
    assert "net" not in recorder.requests[0].namespaces


@pytest.mark.parametrize(
    ("failing", "undone"),
    [
        ("cgroup", ["undo cgroup"]),
        ("network", ["undo network", "undo cgroup"]),
        ("files", ["undo files", "undo network", "undo cgroup"]),
        ("process", ["discard process", "undo files", "undo network", "undo cgroup"]),
    ],
)
async def test_a_failed_step_undoes_itself_and_all_before_it(
    launcher: Launcher, recorder: Recorder, failing: str, undone: list[str]
) -> None:
    recorder.failures[failing] = KernelError(28, "mkdir", "/somewhere")
    with pytest.raises(LaunchFailed) as caught:
        await launcher.launch(spec())
    assert (caught.value.detail["step"], caught.value.detail["errno"]) == (failing, 28)
    assert "mkdir(/somewhere): No space left" in caught.value.message
    assert isinstance(caught.value.__cause__, KernelError)
    assert recorder.told[-len(undone) :] == undone


async def test_a_refusal_of_the_spec_comes_up_unchanged(launcher: Launcher, recorder: Recorder) -> None:
    recorder.failures["network"] = PortTaken("55000 is taken")
    with pytest.raises(PortTaken):
        await launcher.launch(spec())
    assert recorder.told[-2:] == ["undo network", "undo cgroup"]


async def test_a_child_that_failed_keeps_its_own_words(launcher: Launcher, recorder: Recorder) -> None:
    recorder.failures["process"] = LaunchFailed('exec: "x": nope', step="exec", errno=2, target="x")
    with pytest.raises(LaunchFailed) as caught:
        await launcher.launch(spec())
    assert caught.value.message == 'exec: "x": nope'
    assert caught.value.detail == {"step": "process", "at": "exec", "errno": 2, "target": "x"}


async def test_a_cancelled_launch_is_undone(launcher: Launcher, recorder: Recorder) -> None:
    recorder.failures["process"] = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await launcher.launch(spec())
    assert recorder.told[-4:] == ["discard process", "undo files", "undo network", "undo cgroup"]


async def test_one_failing_undo_does_not_stop_the_others(launcher: Launcher, recorder: Recorder) -> None:
    recorder.failures["undo process"] = SpawnerUnavailable("gone")
    recorder.failures["undo files"] = Unavailable("later")
    with pytest.raises(SpawnerUnavailable):
        await launcher.undo("job")
    assert recorder.told == UNDO_ALL
    recorder.failures.clear()
    recorder.told.clear()
    await launcher.undo("job")
    assert recorder.told == UNDO_ALL


async def test_what_cannot_be_read_is_refused_before_anything_is_done(launcher: Launcher, recorder: Recorder) -> None:
    for bad in ({"user": "root"}, {"user": "1:2:3"}, {"user": "-1"}, {"user": ""}, {"capabilities_add": ("ALL",)}):
        with pytest.raises(InvalidSpec):
            await launcher.launch(spec(**bad))
    assert recorder.told == []


def test_the_environment_is_closed_and_ports_win() -> None:
    found = environment(spec(env={"PORT": "1", "A": "b"}), (55000, 55001), {"http_proxy": "p"})
    assert found == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "HOSTNAME": "job",
        "A": "b",
        "PORT": "55000",
        "PORT_0": "55000",
        "PORT_1": "55001",
    }
    found = environment(spec(env={"PORT": "1"}, inherits_proxy=True, has_tty=True, user="9"), (), {"http_proxy": "p"})
    assert (found["PORT"], found["http_proxy"], found["TERM"], found["HOME"]) == ("1", "p", "xterm", "/")


def test_the_default_capabilities_are_those_of_containers_common() -> None:
    shipped = tomllib.loads(Path("/usr/share/containers/containers.conf").read_text())
    assert sorted(shipped["containers"]["default_capabilities"]) == sorted(DEFAULT_CAPABILITIES)


def picture() -> str:
    """Return what a node could leave behind in the test's own network."""
    rules = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    return rules + lab.ip("-br", "link")


class Real:
    """A launcher of real steps, in a network and a cgroup subtree of its own."""

    def __init__(self, directory: Path, spawner: Spawner) -> None:
        self.spawner = spawner
        self.cgroups = open_cgroups(f"hostd-test-{os.getpid()}")
        self.files = FilesStep(directory / "state")
        config = NetworkConfig(
            bridge="tlaunch0",
            subnet=IPv4Network("100.100.0.0/24"),
            host_ip=IPv4Address(lab.NODE),
            nat_name="testlaunch",
            nat_backend="nft",
            state_file=directory / "network.json",
            pool_size=1,
        )
        self.network = NetworkStep(config, spawner)
        self.launcher = Launcher(
            cgroups=self.cgroups,
            network=self.network,
            files=self.files,
            process=ProcessStep(spawner),
            seccomp=SeccompCache(directory / "state" / "seccomp"),
        )
        links = [tars.link(name, f"usr/{name}") for name in ("bin", "sbin", "lib", "lib64")]
        folders = [tars.folder(name) for name in ("proc", "sys", "dev", "etc", "tmp", "usr")]
        self.blob = tars.tar_of(*links, *folders)

    async def open(self) -> None:
        await self.files.open()
        Store(self.files.images.path).add_blob(self.blob)
        await self.network.prepare()
        await self.network.reconcile({})

    async def close(self) -> None:
        await self.network.teardown()
        await self.files.close()
        await self.cgroups.teardown()

    def spec(self, job_id: str, *args: str, **fields: Any) -> JobSpec:
        layer = Layer(digest="sha256:" + hashlib.sha256(self.blob).hexdigest(), size_bytes=len(self.blob))
        return JobSpec(id=job_id, layers=(layer,), args=args, mounts=(BindMount(source="/usr", path="/usr"),), **fields)


@pytest.fixture
def outside() -> Iterator[lab.Outside]:
    with lab.node() as outside:
        yield outside


@pytest.fixture
async def real(tmp_path: Path, outside: lab.Outside) -> AsyncIterator[Real]:
    before = picture()
    async with spawner_in(tmp_path / "run") as spawner:
        real = Real(tmp_path, spawner)
        await real.open()
        yield real
        await real.close()
        assert real.cgroups.list() == ()
        assert real.files.orphans(()) == ()
        assert (await spawner.listing()).netns == ()
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert picture() == before


@pytest.mark.needs_root
async def test_a_real_job_serves_on_its_published_port_and_leaves_nothing(real: Real) -> None:
    server = (
        "import os, socket; s = socket.create_server(('', int(os.environ['PORT']))); print('up', flush=True)\n"
        "c, _ = s.accept(); c.sendall(os.uname().nodename.encode()); c.close()"
    )
    launched = await real.launcher.launch(real.spec("web", "/usr/bin/python3", "-Ic", server, ports=(Port(),)))
    assert real.cgroups.pids("web") != ()
    assert await asyncio.to_thread(os.read, launched.fds.stdout_fd, 100) == b"up\n"
    with socket.create_connection((lab.NODE, launched.network.numbers[0]), DEADLINE_S) as connection:
        connection.settimeout(DEADLINE_S)
        assert connection.recv(100) == b"web"
    assert (await exit_of(real.spawner, "web")).status == 0
    launched.fds.close()
    await real.launcher.undo("web")
    await real.launcher.undo("web")
    await real.spawner.ack("web")


@pytest.mark.needs_root
async def test_undo_of_a_running_job_ends_all_of_it(real: Real) -> None:
    script = "setsid sh -c 'trap \"\" TERM; exec sleep 60' & echo ready; wait"
    launched = await real.launcher.launch(real.spec("job", "sh", "-c", script))
    assert await asyncio.to_thread(os.read, launched.fds.stdout_fd, 100) == b"ready\n"
    pids = real.cgroups.pids("job")
    assert len(pids) >= 3
    await real.launcher.undo("job")
    for pid in pids:
        await gone(pid)
    assert (await exit_of(real.spawner, "job")).status == 137  # still told: nobody has acked it
    await real.spawner.ack("job")
    launched.fds.close()


@pytest.mark.needs_root
async def test_a_real_failure_leaves_nothing(real: Real) -> None:
    with pytest.raises(LaunchFailed) as caught:
        await real.launcher.launch(real.spec("job", "no-such-command", ports=(Port(),)))
    assert caught.value.message == 'exec: "no-such-command": executable file not found in $PATH'
    assert caught.value.detail["step"] == "process"
    assert (await real.spawner.listing()).children == ()
    again = await real.launcher.launch(real.spec("job", "echo", "fine", ports=(Port(),)))
    assert again.network.numbers == (55000,)
    assert await read_all(again.fds.stdout_fd) == "fine\n"
    os.close(again.fds.stderr_fd)
    await exit_of(real.spawner, "job")
    await real.launcher.undo("job")
