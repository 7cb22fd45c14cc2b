"""A whole node for tests: a real hostd in a network namespace of its own, every path and name its own."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from discovery.wire.blocking import BlockingCaller
from discovery.wire.errors import ServiceError
from hostd.types import HostStatus, Image, Job, JobSpec, LogLine, Port, Resources
from tests.pace import SLOWNESS

PATIENCE_S = 90.0  # a busy machine unpacks its images for half a minute
DEADLINE_S = PATIENCE_S * SLOWNESS
T = TypeVar("T")
CACHE = Path("/var/cache/hostd/images")


def sh(*command: str, timeout_s: float = 60.0) -> str:
    run = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s * SLOWNESS)
    assert run.returncode == 0, f"{' '.join(command)}: {run.returncode}\n{run.stdout}{run.stderr}"
    return run.stdout


def wait_until(what: str, probe: Callable[[], T | None], patience_s: float = PATIENCE_S) -> T:
    """Wait until `probe` returns something true and return it; on a slow machine as much longer as that is slower."""
    deadline_s = patience_s * SLOWNESS
    end = time.monotonic() + deadline_s
    last: object = None
    while (began := time.monotonic()) < end:
        try:
            last = found = probe()
            if found:
                return found
        except (ServiceError, AssertionError, OSError) as error:
            last = error
        # on a slow machine of one processor, what is waited for would have to share it with the looking
        time.sleep(max(0.02, 2 * (time.monotonic() - began)))
    raise AssertionError(f"not within {deadline_s:g} s: {what}; last: {last!r}")


@dataclass
class Node:
    """One node; `up` and `down` are the operator's commands."""

    name: str
    folder: Path
    has_discovery: bool = True
    is_kept: bool = False
    """Whether hostd comes back by itself when a test kills it."""
    host_ip: str = "192.0.2.1"
    api_listen: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    subnet: str = "100.102.0.0/24"
    is_down: bool = False
    """Whether `down` has been run since the last `up`."""

    @property
    def run_dir(self) -> Path:
        return Path(f"/run/{self.name}")

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    def environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOSTD_CONFIG": str(self.folder / "none.toml"),
            "HOSTD_STATE_DIR": str(self.state_dir),
            "HOSTD_RUN_DIR": str(self.run_dir),
            "HOSTD_HOST_ID": "testhost",
            "HOSTD_BRIDGE": "hstest0",
            "HOSTD_SUBNET": self.subnet,
            "HOSTD_NAT_NAME": f"t{os.getpid()}",
            "HOSTD_CGROUP_PARENT": self.name,
            "HOSTD_IS_KEPT": str(self.is_kept).lower(),
            "HOSTD_HAS_DISCOVERY": str(self.has_discovery).lower(),
            "HOSTD_API_LISTEN": self.api_listen,
            "HOSTD_RAFT_ADDRESS": "127.0.0.1:4001",
        } | self.settings

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.name}", "--", *command]

    def hostd(self, *words: str, timeout_s: float = 120.0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return self.python("-m", "hostd.cli", *words, timeout_s=timeout_s, stdin=stdin)

    def python(self, *words: str, timeout_s: float = 120.0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.inside(sys.executable, *words),
            capture_output=True, text=True, env=self.environment(), timeout=timeout_s * SLOWNESS, input=stdin,
        )  # fmt: skip

    def up(self) -> None:
        self.is_down = False
        done = self.hostd("up")
        assert done.returncode == 0, done.stdout + done.stderr

    def down(self) -> None:
        done = self.hostd("down")
        assert done.returncode == 0, done.stdout + done.stderr
        self.is_down = True

    @property
    def pid(self) -> int:
        file = self.run_dir / "hostd.pid"
        return int(wait_until("hostd.pid is written", file.read_text))  # a daemon that is just starting has emptied it

    def kill_daemon(self) -> None:
        """Kill -9 of hostd alone."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        wait_until("hostd is dead", lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid))

    def caller(self) -> BlockingCaller:
        return BlockingCaller(f"unix://{self.run_dir}/api/hostd.sock", timeout_s=DEADLINE_S)

    def status(self) -> HostStatus:
        return self.caller().request("GET", "/status", into=HostStatus)

    def image(self, name: str = "base") -> Image:
        return self.caller().request("GET", f"/images/{name}", into=Image)

    def spec(self, job_id: str, *args: str, image: str = "base", **more: object) -> JobSpec:
        more.setdefault("stop_grace_s", 5.0)
        more.setdefault("resources", Resources(memory_bytes=256 * 2**20))
        return JobSpec(id=job_id, layers=self.image(image).layers, args=args, **more)  # type: ignore[arg-type]

    def web(self, job_id: str, service: str = "web", **more: object) -> JobSpec:
        """A small web server that answers with its job id."""
        script = f"mkdir -p /srv; echo {job_id} > /srv/index.html; exec python3 -m http.server $PORT --directory /srv"
        return self.spec(job_id, "/bin/sh", "-c", script, image="system", ports=(Port(service=service),), **more)

    def start(self, spec: JobSpec) -> Job:
        return self.caller().request("PUT", f"/jobs/{spec.id}", into=Job, body=spec)

    def job(self, job_id: str) -> Job:
        return self.caller().request("GET", f"/jobs/{job_id}", into=Job)

    def wait_ended(self, job_id: str) -> Job:
        return self.caller().request("GET", f"/jobs/{job_id}", into=Job, query={"wait": ""})

    def stop(self, job_id: str) -> Job:
        return self.caller().request("POST", f"/jobs/{job_id}/stop", into=Job, query={"wait": ""})

    def jobs(self, **query: str) -> list[Job]:
        return self.caller().request("GET", "/jobs", into=list[Job], query=query)

    def wait_up(self, job_id: str) -> Job:
        def probe() -> Job | None:
            job = self.job(job_id)
            assert job.status in ("pending", "starting", "running"), job
            return job if job.is_up else None

        return wait_until(f"{job_id} is up", probe)

    def log(self, job_id: str) -> list[str]:
        return [line.text for line in self.caller().events(f"/jobs/{job_id}/log", LogLine)]

    def curl(self, url: str) -> str:
        return sh(*self.inside("curl", "-sS", "-m", "5", url))


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def snapshot(node: Node) -> dict[str, object]:
    """Return all that the kernel holds of this node."""
    in_netns = {
        "links": sh(*node.inside("ip", "-br", "link")),
        "nft": sh(*node.inside("nft", "list", "ruleset")),
        "legacy": sh(*node.inside("iptables-legacy-save")),
        "listening": sh(*node.inside("ss", "-Hltun")) if shutil.which("ss") else "",
    }
    # not deeper: other tests' cgroups come and go below
    cgroups = [
        str(path)
        for pattern in (node.name, f"*/{node.name}", f"*/{node.name}~*")
        for path in Path("/sys/fs/cgroup").glob(pattern)
    ]
    processes = [
        entry.name
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and node.name.encode() in _command_line(entry)
    ]
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(node.folder) in line]
    return in_netns | {"cgroups": cgroups, "processes": processes, "mounts": mounts, "run": node.run_dir.exists()}


def _command_line(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def _copy_images(node: Node) -> None:
    from rootfs.images import build_images

    build_images(node.state_dir / "images", CACHE, names=["base", "system"], progress=lambda text: None)
    _link_layers(node.state_dir)


def _link_layers(state_dir: Path) -> None:
    """Give a node its layers unpacked, as hostd would: links to what took seconds for the first node of this run."""
    unpacked = _unpacked(state_dir / "images")
    if unpacked.stat().st_dev != state_dir.stat().st_dev:
        return
    sh("cp", "-al", str(unpacked), str(state_dir / "layers"))
    for ready in unpacked.glob("*.ready"):  # a node notes there when it last used the layer
        (state_dir / "layers" / ready.name).unlink()
        shutil.copy2(ready, state_dir / "layers")


_unpacked_layers: list[Path] = []


def _unpacked(images: Path) -> Path:
    """Unpack all layers of a store, once in a run; they go with this process."""
    from rootfs.layers import Layers
    from rootfs.store import Store

    async def unpack(into: Path) -> None:
        store, layers = Store(images), Layers(into)
        layers.open()
        for digest in {layer.digest for image in store.images() for layer in image.layers}:

            async def blob(digest: str = digest) -> Path:
                return store.blob(digest)

            await layers.ensure(digest, blob)
        layers.close()

    if not _unpacked_layers:
        folder = Path(tempfile.mkdtemp(prefix="hostd-test-layers-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        # a test may be running a loop of its own
        with ThreadPoolExecutor(1) as threads:
            threads.submit(lambda: asyncio.run(unpack(folder / "layers"))).result()
        _unpacked_layers.append(folder / "layers")
    return _unpacked_layers[0]


@contextlib.contextmanager
def node(index: int = 0, *, has_discovery: bool = True) -> Iterator[Node]:
    """Make the machine (not yet up), and prove at the end that nothing of it is left."""
    made = Node(f"hostd_test_{os.getpid()}_{index}", Path(tempfile.mkdtemp(prefix="hostd-test-")), has_discovery)
    sh("ip", "netns", "add", made.name)
    try:
        for command in (
            "ip link set lo up",
            "ip link add up0 type veth peer name out0",
            f"ip addr add {made.host_ip}/24 dev up0",
            "ip link set up0 up",
            "ip link set out0 up",
            "ip route add default via 192.0.2.2",
        ):
            sh(*made.inside(*command.split()))
        made.state_dir.mkdir(mode=0o700)
        _copy_images(made)
        yield made
    finally:
        said = ""
        if not made.is_down or made.run_dir.exists():
            down = made.hostd("down")
            said = down.stdout + down.stderr
        for log in ("hostd.log", "discovery.log"):
            path = made.state_dir / log
            sys.stderr.write(f"--- {log}\n{path.read_text()[-6000:] if path.exists() else ''}\n")
        sys.stderr.write(said)
        sh("ip", "netns", "del", made.name)
        shutil.rmtree(made.folder, ignore_errors=True)


@contextlib.contextmanager
def up_node(index: int = 0, *, has_discovery: bool = True) -> Iterator[Node]:
    """Make a node that is up, and prove at the end that `down` leaves the kernel as it was."""
    with node(index, has_discovery=has_discovery) as made:
        before = snapshot(made)
        made.up()
        yield made
        made.down()
        assert snapshot(made) == before
