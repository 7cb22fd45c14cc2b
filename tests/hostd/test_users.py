"""Whose ids a job has: ranges as values, and what a real job on a real node sees and leaves behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from discovery.wire.errors import DeadlineExceeded
from hostd.errors import InvalidSpec, LaunchFailed
from hostd.runtime.files import FilesState
from hostd.runtime.process import Spawned, SpawnRequest
from hostd.runtime.users import HIGH, LOW, RANGE_IDS, Ranges, Support, Users, probe
from hostd.types import BindMount, JobSpec, Port, Resources, VolumeMount
from tests.hostd.node import Node, sh, up_node, wait_until


def spec(job_id: str = "job", **fields: object) -> JobSpec:
    return JobSpec(id=job_id, layers=(), args=("true",), **fields)  # type: ignore[arg-type]


def test_every_job_has_a_range_of_its_own_inside_the_containers_part() -> None:
    ranges = Ranges(start=2**32 - 1)
    bases = [ranges.take(f"job-{number}") for number in range(300)]
    assert len(set(bases)) == 300
    assert all(base % RANGE_IDS == 0 and LOW <= base and base + RANGE_IDS - 1 <= HIGH for base in bases)


def test_a_range_is_free_again_when_it_was_given_back_and_not_before() -> None:
    ranges = Ranges()
    first = ranges.take("a")
    assert ranges.take("a") == first
    assert ranges.take("b") != first
    ranges.give_back("a")
    ranges.give_back("a")
    assert ranges.take("c") == first


def test_ranges_from_before_a_restart_are_not_given_away() -> None:
    ranges = Ranges()
    ranges.hold("old", LOW)
    ranges.hold("none", 0)
    assert ranges.take("new") == LOW + RANGE_IDS
    ranges.give_back("old")
    assert ranges.take("newer") == LOW


def test_who_asks_by_name_or_cannot_be_mapped_has_the_hosts_ids(tmp_path: Path) -> None:
    users = Users(run_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/linked").symlink_to(tmp_path)
    granted, linked = (
        spec(name, mounts=(BindMount(source=str(tmp_path / "run" / name), path="/run/hostd/api"),))
        for name in ("granted", "linked")
    )
    assert users.take(spec()) == 0  # nothing was tried yet
    users.support = Support(is_on=True, why="mount_setattr /run/hostd: Invalid argument")
    assert users.take(granted) == 0
    assert users.take(linked) == LOW  # where it lies counts
    users.ranges.give_back("linked")
    assert users.take(spec("named", user_namespace="host")) == 0
    assert users.take(spec()) == LOW
    users.support = Support(is_on=True, has_run_dir=True)
    assert users.take(granted) == LOW + RANGE_IDS


def test_status_says_what_is_not_protected_and_why() -> None:
    assert str(Support(is_on=True, has_run_dir=True)) == "one for each job"
    assert str(Support(why="no")) == "not used: no"
    assert "run" in str(Support(is_on=True, why="mount_setattr"))


class Trial:
    """Files and process in one: refuses what it is told to refuse, by the directory of the host it is tried with."""

    def __init__(self, **failures: Exception) -> None:
        self._failures = failures
        self._bind = ""
        self.discarded = 0

    async def trial(self, job_id: str, *, uid_base: int, bind: str) -> FilesState:
        self._bind = bind
        return FilesState(root="/root", plan=())

    async def undo(self, job_id: str) -> None:
        return

    async def apply(self, request: SpawnRequest) -> Spawned:
        assert request.uid_base == LOW
        if failure := self._failures.get("run" if self._bind else "plain"):
            raise failure
        return Spawned(1)

    async def discard(self, job_id: str) -> None:
        self.discarded += 1


def no(syscall: str, number: int) -> LaunchFailed:
    return LaunchFailed(f"{syscall}: {os.strerror(number)}", step="mount", errno=number, syscall=syscall, target="/x")


async def tried(**failures: Exception) -> Support:
    trial = Trial(**failures)
    found = await probe(trial, trial, "/run/hostd")  # type: ignore[arg-type]
    assert trial.discarded >= 2
    return found


async def test_only_the_kernels_refusal_turns_them_off() -> None:
    assert await tried() == Support(is_on=True, has_run_dir=True, why="")
    tmpfs = no("mount_setattr", errno.EINVAL)
    assert (await tried(run=tmpfs)) == Support(is_on=True, why=str(tmpfs))
    assert not (await tried(run=tmpfs, plain=no("mount", errno.EINVAL))).is_on
    for none in (no("clone3", errno.ENOSPC), no("clone3", errno.EINVAL), no("mount_setattr", errno.ENOSYS)):
        assert not (await tried(run=none, plain=none)).is_on
    for passing in (OSError(errno.ENOSPC, "full"), no("mkdir", errno.ENOSPC), DeadlineExceeded("busy")):
        assert (await tried(run=passing, plain=passing)).is_on
        assert (await tried(run=tmpfs, plain=passing)).is_on


def test_a_user_that_the_namespace_does_not_have_is_refused() -> None:
    from hostd.admission import check
    from hostd.types import Layer

    layers = (Layer(digest="sha256:" + "0" * 64, size_bytes=1),)
    for user in ("65536", "0:65536"):
        with pytest.raises(InvalidSpec):
            check(JobSpec(id="a", layers=layers, args=("true",), user=user))
    check(JobSpec(id="a", layers=layers, args=("true",), user="65535:65535"))
    check(JobSpec(id="a", layers=layers, args=("true",), user="70000", user_namespace="host"))


@pytest.fixture(scope="module")
def machine() -> Iterator[Node]:
    with up_node() as made:
        yield made


def said(machine: Node, job_id: str, script: str, **fields: object) -> list[str]:
    """Run a shell script in a job and return its lines."""
    machine.start(machine.spec(job_id, "/bin/sh", "-ec", script, image="system", **fields))
    ended = machine.wait_ended(job_id)
    assert ended.exit_status == 0, (machine.log(job_id), ended.error)
    return machine.log(job_id)


def uid_map(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/uid_map").read_text().split()]


@pytest.mark.needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
class TestOnANode:
    """What jobs of one real node see."""

    def test_status_says_that_it_is_on(self, machine: Node) -> None:
        assert machine.status().features["user namespaces"] == "one for each job"

    def test_a_job_that_is_granted_the_api_has_one_too_and_can_speak_to_it(self, machine: Node) -> None:
        place = str(machine.run_dir / "api")
        script = (
            f"python3 -c \"import socket; s = socket.socket(socket.AF_UNIX); s.connect('{place}/hostd.sock'); "
            "s.send(b'GET /status HTTP/1.0\\r\\n\\r\\n'); print(s.recv(99).decode().split()[1])\"; "
            "cat /proc/self/uid_map"
        )
        status, ids = said(machine, "granted", script, mounts=(BindMount(source=place, path=place),))
        assert status == "200"
        assert int(ids.split()[1]) >= LOW

    def test_root_inside_is_nobody_outside_and_two_jobs_share_no_id(self, machine: Node) -> None:
        for job_id in ("one", "two"):
            machine.start(machine.spec(job_id, "sleep", "600"))
        pids = [wait_until("it runs", lambda job_id=job_id: machine.job(job_id).pid) for job_id in ("one", "two")]  # type: ignore[misc]
        maps = [uid_map(pid) for pid in pids]
        assert all(first == 0 and LOW <= base and count == RANGE_IDS for first, base, count in maps)
        assert maps[0][1] != maps[1][1]
        assert Path(f"/proc/{pids[0]}").stat().st_uid == maps[0][1]
        for job_id in ("one", "two"):
            machine.stop(job_id)

    def test_root_inside_owns_its_files_and_they_are_roots_on_the_disk(self, machine: Node) -> None:
        script = (
            "stat -c %u:%g / /etc/passwd /etc/hosts /usr/bin/env; touch /new; chown 33:33 /new; stat -c %u:%g /new; "
            "echo more >> /etc/passwd; rm /etc/hosts; mkdir /data/dir; chown 7:8 /data/dir; touch /data/file"
        )
        lines = said(machine, "files", script, volumes=(VolumeMount(name="owned", path="/data"),))
        assert lines == ["0:0", "0:0", "0:0", "0:0", "33:33"]
        on_disk = machine.state_dir / "volumes/owned"
        assert [(path.stat().st_uid, path.stat().st_gid) for path in (on_disk / "dir", on_disk / "file")] == [
            (7, 8),
            (0, 0),
        ]
        again = "stat -c %u:%g /data/dir /data/file"
        assert said(machine, "files-2", again, volumes=(VolumeMount(name="owned", path="/data"),)) == ["7:8", "0:0"]

    def test_other_users_have_home_terminal_and_streams(self, machine: Node) -> None:
        script = "id -u; id -g; pwd; echo words > /dev/stdout; touch /tmp/mine; stat -c %u:%g /tmp/mine"
        assert said(machine, "user", script, user="1000:1001", working_dir="/made/here") == [
            "1000", "1001", "/made/here", "words", "1000:1001",
        ]  # fmt: skip
        script = "tty; stat -c %u:%g $(tty); stat -c %u /dev/pts/ptmx"
        lines = said(machine, "tty", script, user="1000", has_tty=True, attach_timeout_s=0.1)
        assert [line.strip() for line in lines] == ["/dev/pts/0", "1000:5", "0"]

    def test_a_file_capability_works_and_can_be_set(self, machine: Node) -> None:
        script = (
            'python3 -c "import os, struct; '
            "os.setxattr('/usr/bin/env', 'security.capability', struct.pack('<5I', 0x2000001, 1 << 10, 0, 0, 0))\"; "
            "python3 -c \"import os; print(len(os.getxattr('/usr/bin/env', 'security.capability')))\""
        )
        assert said(machine, "filecaps", script)[0] in ("20", "24")

    def test_low_ports_are_everybodys_in_a_network_of_its_own(self, machine: Node) -> None:
        script = "python3 -c \"import socket; s = socket.socket(); s.bind(('', 80)); print(s.getsockname()[1])\""
        assert said(machine, "low", script, user="1000") == ["80"]

    def test_it_finds_its_own_limits_and_nobody_elses(self, machine: Node) -> None:
        script = (
            "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max; "
            "cut -d: -f3 /proc/self/cgroup | sort -u; "
            "grep -c . /sys/fs/cgroup/memory/cgroup.procs 2>/dev/null || grep -c . /sys/fs/cgroup/cgroup.procs; "
            "(echo 0 > /sys/fs/cgroup/memory/cgroup.procs) 2>/dev/null && echo writable; "
            "mkdir /sys/fs/cgroup/memory/x 2>/dev/null && echo made; true"
        )
        limit = 300 * 2**20
        lines = said(machine, "cgroup", script, resources=Resources(memory_bytes=limit))
        assert lines[:2] == [str(limit), "/"]
        assert 2 <= int(lines[2]) <= 8
        assert lines[3:] == []

    def test_the_host_by_name(self, machine: Node) -> None:
        assert said(machine, "named", "cat /proc/self/uid_map", user_namespace="host")[0].split()[2] == "4294967295"

    def test_added_capabilities_reach_only_what_is_the_jobs_own(self, machine: Node) -> None:
        script = (
            "mount -t tmpfs none /mnt && echo mounted; hostname other && hostname; "
            "umount /proc/sys 2>/dev/null && echo unmasked; "
            "mount -o remount,rw /proc/sys 2>/dev/null && echo writable; "
            "mount -t proc proc /mnt 2>/dev/null && echo proc; "
            "mount -t sysfs sys /mnt 2>/dev/null && echo sysfs; true"
        )
        lines = said(machine, "admin", script, capabilities_add=("SYS_ADMIN",))
        assert lines == ["mounted", "other"]

    def test_added_capabilities_over_its_network_and_no_other(self, machine: Node) -> None:
        machine.start(machine.spec("victim", "sleep", "600"))
        victim = wait_until("it has an address", lambda: machine.job("victim").ip)
        script = f"""
import socket, struct, fcntl, time
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
raw.bind(("eth0", 0))
print("packets", flush=True)
probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
request = struct.pack("16sH14s", b"eth0", socket.AF_INET, b"\\0\\0" + socket.inet_aton("{victim}") + bytes(8))
fcntl.ioctl(probe, 0x8916, request)  # SIOCSIFADDR: the neighbour's address
print("another address", flush=True)
probe.settimeout(1)
probe.connect(("100.102.0.1", 53))
probe.send(bytes.fromhex("123401000001000000000000") + b"\\0\\0\\2\\0\\1")
try:
    probe.recv(512)
    print("an answer")
except TimeoutError:
    print("silence")
"""

        def ask(job_id: str, *capabilities: str) -> list[str]:
            command = f"cat > /tmp/x.py <<'END'\n{script}\nEND\nexec python3 /tmp/x.py 2>&1"
            machine.start(machine.spec(job_id, "/bin/sh", "-c", command, image="system", capabilities_add=capabilities))
            machine.wait_ended(job_id)
            return machine.log(job_id)

        assert ask("netadmin", "NET_ADMIN", "NET_RAW") == ["packets", "another address", "silence"]
        assert "PermissionError" in "".join(ask("no-netadmin"))
        low = "import socket; s = socket.socket(); s.bind(('', 80)); print(s.getsockname()[1])"
        ports = said(machine, "low-own", f'python3 -c "{low}"', user="1000", capabilities_add=("NET_ADMIN",))
        assert ports == ["80"]
        neighbours = sh(*machine.inside("ip", "neigh", "show", victim))
        assert "PERMANENT" in neighbours
        machine.stop("victim")

    def test_a_restarted_hostd_keeps_the_ranges_of_living_jobs(self, machine: Node) -> None:
        machine.start(machine.spec("stays", "sleep", "600", ports=(Port(),)))
        base = uid_map(wait_until("it runs", lambda: machine.job("stays").pid))[1]
        machine.kill_daemon()
        machine.up()
        machine.start(machine.spec("next", "sleep", "600"))
        assert uid_map(wait_until("it runs", lambda: machine.job("next").pid))[1] != base
        for job_id in ("stays", "next"):
            machine.stop(job_id)
