"""The escape suite: every attempt fails inside a default job, and gets through where its protection is off.

The second half is what makes the first one worth something: an attempt that could not succeed would prove nothing.
An attempt whose way is barred several times over (seccomp, capabilities, user namespace) is let through by taking
all of these bars away, and no others. A kernel that lacks the thing altogether is the only reason to skip.
"""

from __future__ import annotations

import contextlib
import ctypes  # noqa: TID251 — System V memory and message queues of the host, which Python does not know
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hostd.types import VolumeMount
from tests.hostd.escape.attempts import ATTEMPTS
from tests.hostd.node import Node, sh, snapshot, wait_until
from tests.hostd.node import node as new_node

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the system calls' numbers are those of x86_64"),
]
HERE = Path(__file__).parent
GATEWAY, HOST, OUTSIDE, METADATA = "100.102.0.1", "192.0.2.1", "192.0.2.2", "169.254.169.254"
HOST_PORT = 9999
STORE_PORT, OWN_KEYS, OTHER_KEYS = 1111, "/escape/own/", "/escape/other/"
GRANTED = ["write a key of the store that another job has"]
"""What is tried in a job that is granted some of the store."""
RIGHTS = ("seccomp", "capabilities", "userns")
OWNER = ("capabilities", "userns")

OFF: dict[str, tuple[str, ...]] = {
    "mount a tmpfs": RIGHTS,
    "bind the root elsewhere": RIGHTS,
    "mount a fresh proc": RIGHTS,
    "mount a fresh sysfs": RIGHTS,
    "mount a cgroup hierarchy for its release_agent": RIGHTS,
    "make /proc/sys writable": RIGHTS,
    "make /sys writable": RIGHTS,
    "take the mask off /proc/interrupts": RIGHTS,
    "open_tree of the root": RIGHTS,
    "fsopen and fsmount": RIGHTS,
    "mount_setattr on /proc/sys": RIGHTS,
    "mknod of a disk": OWNER,
    "read a disk through a node of its own": (*OWNER, "nodev"),
    "read a disk through a node in /dev": OWNER,
    "read the kernel's log through a node in /dev": OWNER,
    "find a device of the host in /dev": ("dev",),
    "write core_pattern": ("readonly", "userns"),
    "write vm.overcommit_memory": ("readonly", "userns"),
    "write net.ipv4.ip_forward": ("readonly", *OWNER),
    "write kernel.hostname": ("readonly", "userns"),
    "open sysrq-trigger": ("readonly", "userns"),
    "open an interrupt's affinity": ("readonly", "userns"),
    "read /proc/keys": ("mask", "userns"),
    "read /proc/timer_list": ("mask", *OWNER),
    "read /proc/interrupts": ("mask",),
    "list /sys/firmware": ("mask",),
    "write anything in /sys": ("readonly", "userns"),
    "init_module": RIGHTS,
    "delete_module": RIGHTS,
    "kexec_load": RIGHTS,
    "reboot": RIGHTS,
    "swapon": RIGHTS,
    "acct": RIGHTS,
    "iopl": RIGHTS,
    "ioperm": RIGHTS,
    "read the kernel's log": RIGHTS,
    "sethostname": RIGHTS,
    "setdomainname": RIGHTS,
    "vhangup": RIGHTS,
    "set the clock": RIGHTS,
    "fanotify": RIGHTS,
    "a higher priority": OWNER,
    "a higher priority for the disk": OWNER,
    "take capabilities back": ("capabilities",),
    "bpf": RIGHTS,
    "perf_event_open": RIGHTS,
    "userfaultfd": ("seccomp",),
    "io_uring": ("seccomp",),
    "add_key": ("seccomp",),
    "request_key": ("seccomp",),
    "keyctl": ("seccomp",),
    "personality that makes data run": ("seccomp",),
    "open a file by its handle": RIGHTS,
    "unshare user": ("seccomp",),
    "unshare mount": ("seccomp", "capabilities"),
    "unshare net": ("seccomp", "capabilities"),
    "unshare pid": ("seccomp", *OWNER),
    "unshare ipc": ("seccomp", "capabilities"),
    "unshare uts": ("seccomp", "capabilities"),
    "unshare cgroup": ("seccomp", "capabilities"),
    "clone into a user namespace": ("seccomp",),
    "clone into a mount namespace": ("seccomp", "capabilities"),
    "clone3 into a user namespace": ("seccomp",),
    "user namespaces in user namespaces": ("seccomp",),
    "setns into its own network namespace": RIGHTS,
    "unshare through the 32-bit door": ("seccomp",),
    "see a process of another job": ("pid",),
    "signal a process of another job": ("pid", "userns"),
    "read another job's environment": ("pid", "userns"),
    "enter another job's root": ("pid", *OWNER),
    "ptrace a process of another job": ("pid", *RIGHTS),
    "read another process's memory": ("pid", *OWNER),
    "copy a file descriptor from another job": ("pid", *RIGHTS),
    "join another job's namespaces": ("pid", *RIGHTS),
    "shared memory of the host": ("ipc",),
    "message queues of the host": ("ipc",),
    "see a file of the host": ("root",),
    "leave through ..": ("root",),
    "leave through /proc/self/root": ("root",),
    "leave by chroot and fchdir": ("root",),
    "a file descriptor of the host": ("closed_fds",),
    "a variable of the host": ("closed_env",),
    "write a foreign file system's owner": ("userns",),
    "write through a volume that is read-only": ("readonly_volume",),
    "a set-user-id program makes root of a user": ("no_new_privs", "seccomp"),
    "a program's file capabilities": ("no_new_privs", "seccomp"),
    "raise its memory limit": ("cgroup_view", "userns"),
    "raise its limit of processes": ("cgroup_view", "userns"),
    "open cgroup.procs": ("cgroup_view", "userns"),
    "make a cgroup of its own": ("cgroup_view", "userns"),
    "see where in the host's cgroups it is": ("cgroup",),
    "a raw socket": OWNER,
    "a raw socket of IPv6": OWNER,
    "a packet socket": OWNER,
    "the audit socket": ("seccomp",),
    "a socket out of the virtual machine": ("seccomp",),
    "a socket out of the virtual machine, disguised": ("seccomp",),
    "another's address as the sender's": OWNER,
    "an address of its choice": OWNER,
    "take an interface down": OWNER,
    "an abstract socket of the host": ("net",),
    "connect to a port of the host": ("firewall",),
    "connect to a port of the gateway": ("firewall",),
    "connect to the cloud's metadata": ("firewall",),
    "connect to the store": ("firewall",),
    "write a key of the store that another job has": ("prefix",),
    "connect to another job's unpublished port": ("firewall",),
}
"""The protections that have to be off for an attempt to succeed."""

NSDELEGATE = {"raise its memory limit": ("cgroup",), "raise its limit of processes": ("cgroup",)}
"""What bars the way besides where cgroup v2 is mounted with `nsdelegate`: who sits in a cgroup namespace may not write
the limits of its root. Source: cgroups(7), "Cgroups delegation: mounting with nsdelegate"."""

LACKING = {
    "open sysrq-trigger": Path("/proc/sysrq-trigger"),
    "init_module": Path("/proc/modules"),
    "delete_module": Path("/proc/modules"),
    "kexec_load": Path("/sys/kernel/kexec_loaded"),
    "list /sys/firmware": Path("/sys/firmware/acpi"),
    "open an interrupt's affinity": Path("/proc/irq/default_smp_affinity"),
}
"""What a kernel shows that has the thing at all."""
ABSENT = {"ENOSYS", "EAFNOSUPPORT", "EPROTONOSUPPORT", "EOPNOTSUPP"}


@dataclass
class Suite:
    """The machine, and what was tried on it."""

    machine: Node
    daemon: int
    env: dict[str, str]
    held: dict[str, str] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def run(self, names: list[str], off: tuple[str, ...]) -> dict[str, str]:
        """Run attempts in one job with these protections off, and return what became of each."""
        job_id = f"escape-{next(self.numbers)}"
        env = {**self.env, "WEAKEN": ",".join(off), "HOSTNAME": job_id}
        script = ("sh", "-c", 'while [ ! -e /readonly/go ]; do sleep 0.05; done; exec "$@"', "sh")
        attempts = ("python3", "-c", (HERE / "attempts.py").read_text(), *names)
        has_firewall = "firewall" not in off
        granted = (OWN_KEYS, *([OTHER_KEYS] if "prefix" in off else [])) if set(names) <= set(GRANTED) else ()
        spec = self.machine.spec(
            job_id, *(() if has_firewall else script), *attempts, image="system", env=env, store_prefixes=granted,
            volumes=(VolumeMount(name=f"v-{job_id}", path="/readonly", is_read_only=True),),
        )  # fmt: skip
        self.machine.start(spec)
        if not has_firewall:
            wait_until("it waits", lambda: is_running(self.machine, job_id))
            self.without_firewall(job_id)
        ended = self.machine.wait_ended(job_id)
        log = self.machine.log(job_id)
        assert ended.exit_status == 0, (ended, log)
        found: dict[str, str] = json.loads(next(line for line in reversed(log) if line.startswith("{")))
        return found

    def without_firewall(self, job_id: str) -> None:
        """Have the job go on without hostd's rules, which a living hostd would put back; return when it has ended."""
        pid = self.machine.job(job_id).pid
        os.kill(self.daemon, signal.SIGSTOP)
        try:
            tear_down_the_firewall(self.machine)
            (self.machine.state_dir / "volumes" / f"v-{job_id}" / "go").touch()
            wait_until("it has ended", lambda: has_ended(pid))
        finally:
            os.kill(self.daemon, signal.SIGCONT)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextlib.contextmanager
def outside_of(machine: Node) -> Iterator[str]:
    """Make somebody out there who also answers for the cloud's metadata, and knows the way back to the jobs."""
    outside = f"{machine.name}_out"
    sh("ip", "netns", "add", outside)
    try:
        sh(*machine.inside("ip", "link", "set", "out0", "netns", outside))
        for address in (f"{OUTSIDE}/24", f"{METADATA}/32"):
            sh("ip", "-n", outside, "addr", "add", address, "dev", "out0")
        sh("ip", "-n", outside, "link", "set", "out0", "up")
        sh("ip", "-n", outside, "route", "add", "100.102.0.0/24", "via", machine.host_ip)
        yield outside
    finally:
        sh("ip", "netns", "del", outside)


def is_running(machine: Node, job_id: str) -> bool:
    job = machine.job(job_id)
    if job.status not in ("pending", "starting", "running"):
        pytest.fail(f"{job_id} is {job.status}: {job.error} {machine.log(job_id)}")
    return job.status == "running"


def start_weak_daemon(machine: Node) -> subprocess.Popen[bytes]:
    log = (machine.state_dir / "hostd.log").open("ab")
    environment = machine.environment() | {"HOST_SECRET": "of the host", "PYTHONPATH": str(HERE.parents[2])}
    daemon = subprocess.Popen(
        machine.inside(sys.executable, str(HERE / "weak_daemon.py")), env=environment, stdout=log, stderr=log
    )
    log.close()
    wait_until("hostd serves", lambda: bool(machine.status().host_id))
    return daemon


@contextlib.contextmanager
def shared_memory() -> Iterator[tuple[int, str]]:
    """Make System V memory and a message queue of the host that everybody may open."""
    libc = ctypes.CDLL(None, use_errno=True)
    key, queue = 0x5E000000 + os.getpid(), f"/escape-{os.getpid()}"
    libc.mq_open.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    segment = libc.shmget(key, 4096, 0o1666)
    mask = os.umask(0)
    try:
        assert libc.mq_open(queue.encode(), os.O_CREAT | os.O_RDWR, 0o666, None) >= 0
        assert segment >= 0
        yield key, queue
    finally:
        os.umask(mask)
        libc.shmctl(segment, 0, None)
        libc.mq_unlink(queue.encode())


@contextlib.contextmanager
def listening(machine: Node, netns: str, where: str) -> Iterator[None]:
    """Accept on an address of a namespace: `HOST:PORT`, or an abstract name."""
    script = (
        "import socket, sys\n"
        "host, _, port = sys.argv[1].rpartition(':')\n"
        "s = socket.create_server((host, int(port))) if host else socket.socket(socket.AF_UNIX)\n"
        "host or (s.bind('\\0' + port), s.listen())\n"
        "print('ready', flush=True)\n"
        "while True: s.accept()[0].close()\n"
    )
    command = ["nsenter", f"--net=/run/netns/{netns}", "--", sys.executable, "-c", script, where]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield
        finally:
            server.kill()


@pytest.fixture(scope="module")
def suite() -> Iterator[Suite]:
    with contextlib.ExitStack() as stack:
        marker = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hostd-test-marker-"))) / "marker"
        marker.write_text("of the host")
        made = stack.enter_context(new_node())
        outside = stack.enter_context(outside_of(made))
        key, queue = stack.enter_context(shared_memory())
        before = snapshot(made)
        daemon = start_weak_daemon(made)
        try:
            abstract = f"escape-{os.getpid()}"
            with contextlib.ExitStack() as servers:
                for netns, where in (
                    (made.name, f"0.0.0.0:{HOST_PORT}"), (outside, f"{METADATA}:80"), (made.name, f":{abstract}"),
                ):  # fmt: skip
                    servers.enter_context(listening(made, netns, where))
                other = ("python3", "-m", "http.server", "9000")
                made.start(made.spec("other", *other, image="system"))
                made.start(made.spec("foreign", "sleep", f"{10**6 + os.getpid()}"))
                for job_id in ("other", "foreign"):
                    wait_until(f"{job_id} runs", lambda job_id=job_id: is_running(made, job_id))  # type: ignore[misc]
                env = {
                    "FOREIGN": str(10**6 + os.getpid()),
                    "SHM_KEY": str(key),
                    "QUEUE": queue,
                    "MARKER": str(marker),
                    "ABSTRACT": abstract,
                    "HOST_IP": HOST,
                    "GATEWAY": GATEWAY,
                    "HOST_PORT": str(HOST_PORT),
                    "STORE_PORT": str(STORE_PORT),
                    "OTHER_IP": made.job("other").ip,
                }
                suite = Suite(made, made.pid, env)
                suite.held = suite.run([name for name in OFF if name not in GRANTED], ()) | suite.run(GRANTED, ())
                yield suite
        finally:
            made.hostd("down")
            daemon.wait(60)
        assert snapshot(made) == before


@pytest.mark.parametrize("name", OFF)
def test_held(suite: Suite, name: str) -> None:
    assert suite.held[name] != "ESCAPED"
    assert not suite.held[name].startswith(("NameError", "TypeError", "AttributeError", "KeyError")), suite.held[name]


@pytest.mark.parametrize("name", OFF)
def test_would_get_through(suite: Suite, name: str) -> None:
    """Run the same attempt without what holds it."""
    if name in LACKING and not LACKING[name].exists():
        pytest.skip(f"this kernel has no such thing: {LACKING[name]} is not there")
    result = suite.run([name], (*OFF[name], *(NSDELEGATE.get(name, ()) if has_nsdelegate() else ())))[name]
    if result in ABSENT:
        pytest.skip(f"this kernel has no such thing: {result}")
    assert result == "ESCAPED"


def has_nsdelegate() -> bool:
    """Tell whether the cgroups that jobs are in are v2's, mounted as systemd does."""
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    return any(
        kind == "cgroup2" and at == "/sys/fs/cgroup" and "nsdelegate" in options.split(",")
        for _, at, kind, options, *_ in mounts
    )


def tear_down_the_firewall(machine: Node) -> None:
    """Take away hostd's rules and the isolation of the bridge's ports."""
    tables = sh(*machine.inside("nft", "list", "tables")).splitlines()
    for table in tables:
        if machine.environment()["HOSTD_NAT_NAME"] in table.split():
            sh(*machine.inside("nft", "delete", *table.split()))
    for line in sh(*machine.inside("bridge", "link")).splitlines():
        name = line.split()[1].split("@")[0].rstrip(":")
        sh(*machine.inside("bridge", "link", "set", "dev", name, "isolated", "off", "flood", "on", "bcast_flood", "on"))


def test_every_attempt_has_its_control() -> None:
    assert set(ATTEMPTS) == set(OFF)
    assert len(OFF) >= 60
