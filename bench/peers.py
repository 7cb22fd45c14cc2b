"""docker and podman beside hostd: each in namespaces of its own, so that all that they make goes when those go.

A `Room` is a process in a mount, network and process namespace of its own: bridges, iptables chains, mounts and
left-over processes (dockerd, containerd, shims, conmon) end with it, and what they write to `/etc`, `/run` and
`/var/lib` goes to a temporary directory. Only cgroups have a life of their own: they are below a directory of ours, and
removed. Network, limits and logs are as they come: a bridge with NAT, `json-file` and `k8s-file`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

START_S = 60.0
COMMAND_S = 120.0
IMAGE = "bench:1"
LIMITS = ("-m", "256m", "--cpus", "1", "--pids-limit", "100")
_ROOM = """set -e
umount /sys/fs/cgroup/unified 2>/dev/null || true  # crun refuses hybrid cgroups
mount -t tmpfs bench /run
for each in etc var/lib; do
    mkdir -p "$1/over/$each/upper" "$1/over/$each/work"
    mount -t overlay bench -o "lowerdir=/$each,upperdir=$1/over/$each/upper,workdir=$1/over/$each/work" "/$each"
done
ip link set lo up
shift
exec "$@"
"""
_CONTAINERS_CONF = """[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "crun"
"""


class NoPeer(Exception):
    """A peer does not run on this machine; the text says why."""


class Room:
    """The namespaces of one peer, alive as long as `command` is.

    Raises:
        NoPeer: the kernel or the machine refuses.
    """

    def __init__(self, folder: Path, *command: str) -> None:
        self._folder = folder
        folder.mkdir()
        self.log = folder / "log"
        own = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--mount-proc", "--fork"]
        own += ["--kill-child", "--propagation", "private", "sh", "-c", _ROOM, "sh", str(folder)]
        with self.log.open("wb") as log:
            self._outer = subprocess.Popen(
                [*own, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        """Return its first process."""
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
        if not children:
            raise NoPeer(self.last_words())
        return int(children[0])

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else "it said nothing"

    def wait(self, probe: Sequence[str]) -> None:
        """Wait until a command succeeds."""
        if shutil.which(probe[0]) is None:
            raise NoPeer(f"there is no {probe[0]}")
        deadline = time.monotonic() + START_S
        while subprocess.run(probe, capture_output=True, check=False).returncode:
            if self._outer.poll() is not None or time.monotonic() > deadline:
                raise NoPeer(self.last_words())
            time.sleep(0.1)

    def pss_mib(self, name: str) -> tuple[float, int]:
        """Return the memory of all its processes with this name, and how many they are."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may end meanwhile
                if os.readlink(entry / "ns/pid") == space and (entry / "comm").read_text().strip() == name:
                    text = (entry / "smaps_rollup").read_text()
                    found.append(next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")))
        return sum(found) / 1024, len(found)

    def close(self) -> None:
        """End it and all in it."""
        if self._outer.poll() is None:
            self._outer.kill()  # --kill-child takes the first process along, and that one all others
        self._outer.wait(COMMAND_S)


def remove_cgroups(name: str) -> None:
    """Remove a peer's directory in every hierarchy; its processes are dead or dying."""
    deadline = time.monotonic() + 20
    while tops := [path for pattern in (name, f"*/{name}") for path in Path("/sys/fs/cgroup").glob(pattern)]:
        for top in tops:
            for path, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):  # the kernel has not let go of its last process yet
                    Path(path).rmdir()
        if time.monotonic() > deadline:
            return  # the runner sees it and says so
        time.sleep(0.02)


class Peer:
    """What both have in common; `command` begins every command line.

    Raises:
        NoPeer: it does not start.
    """

    network: str
    helper: str
    """The process that each container needs beside itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cgroup = f"hostd-bench-{os.getpid()}-{type(self).__name__.lower()}"
        self.cgroup_option = f"--cgroup-parent=/{self._cgroup}"
        self.room = Room(folder, *self._first_command())
        self.command: list[str] = []
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _first_command(self) -> list[str]:
        """Return what keeps the room alive."""
        raise NotImplementedError

    def _wait(self) -> None:
        """Wait until it takes commands, and set `command`."""
        raise NotImplementedError

    def run(self, *words: str) -> str:
        """Run one of its commands.

        Raises:
            NoPeer: it failed.
        """
        try:
            done = subprocess.run(
                [*self.command, *words], check=True, capture_output=True, text=True, timeout=COMMAND_S
            )
        except subprocess.CalledProcessError as error:
            raise NoPeer((error.stderr.strip().splitlines() or ["no word"])[-1][-300:]) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoPeer(str(error)[-300:]) from error
        return done.stdout.strip()

    def open(self, root: Path) -> None:
        """Give it the root as an image."""
        archive = self._folder.with_suffix(".tar")
        subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
        self.run("import", str(archive), IMAGE)
        archive.unlink()

    def run_true(self) -> None:
        self.run("run", "--rm", "--network", self.network, self.cgroup_option, *LIMITS, IMAGE, "/bin/true")

    def run_idle(self) -> None:
        """Start a container that sleeps."""
        self.run("run", "-d", "--network", self.network, self.cgroup_option, *LIMITS, IMAGE, "/bin/sleep", "86400")

    def helper_pss_mib(self) -> float:
        """Return the memory of one container's helper."""
        total, count = self.room.pss_mib(self.helper)
        return total / count

    def close(self) -> None:
        self.room.close()
        remove_cgroups(self._cgroup)
        shutil.rmtree(self._folder, ignore_errors=True)


class Podman(Peer):
    """podman with crun, conmon and CNI's bridge."""

    network = "podman"
    helper = "conmon"

    def _first_command(self) -> list[str]:
        (self._folder.with_suffix(".conf")).write_text(_CONTAINERS_CONF)
        return ["sh", "-c", "echo ready >&2; exec sleep infinity"]

    def _wait(self) -> None:
        self.room.wait(["grep", "-qx", "ready", str(self.room.log)])
        store = ["--root", f"{self._folder}/store", "--runroot", f"{self._folder}/run", "--storage-driver", "overlay"]
        enter = ["nsenter", "-t", str(self.room.pid), "-m", "-n", "-p"]
        self.command = [*enter, "env", f"CONTAINERS_CONF={self._folder}.conf", "podman", *store]


class Docker(Peer):
    """dockerd with containerd, runc and the docker0 bridge."""

    network = "bridge"
    helper = "containerd-shim"

    def _first_command(self) -> list[str]:
        return [
            "dockerd", "-H", f"unix://{self._folder}/docker.sock", "--data-root", f"{self._folder}/data",
            "--exec-root", f"{self._folder}/exec", "-p", f"{self._folder}/docker.pid", "--bip", "10.189.0.1/16",
            "--storage-driver", "overlay2", "--default-ulimit", "nofile=20000:20000",
        ]  # fmt: skip

    def _wait(self) -> None:
        self.command = ["/usr/bin/docker", "-H", f"unix://{self._folder}/docker.sock"]
        self.room.wait([*self.command, "version"])
