"""hostd as systemd's service on a real machine, and what a cut of the power leaves: two boots of one story.

Runs in the virtual machine of `make test-vm` only, where process 1 is systemd and the machine may be reset.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostd.types import Job, VolumeMount
from tests.hostd.node import CACHE, Node, sh, wait_until

BOOT = os.environ.get("VM_TESTS_BOOT", "")
ROOT = Path(__file__).parents[2]
STATE = Path("/payload/state")
UNIT = Path("/etc/systemd/system/hostd.service")
pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not BOOT, reason="needs a machine that may be reset: make test-vm"),
]
first_boot = pytest.mark.skipif(BOOT != "1", reason="happens before the power is cut")
second_boot = pytest.mark.skipif(BOOT != "2", reason="happens after the power was cut")


@dataclass
class Machine(Node):
    """The virtual machine itself as a node."""

    @property
    def run_dir(self) -> Path:
        return Path("/run/hostd")

    @property
    def state_dir(self) -> Path:
        return STATE

    def environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"]}

    def inside(self, *command: str) -> list[str]:
        return list(command)

    def systemctl(self, *words: str) -> str:
        return sh("systemctl", *words)

    @property
    def main_pid(self) -> int:
        return int(self.systemctl("show", "-P", "MainPID", "hostd"))

    def is_serving(self) -> bool:
        try:
            return bool(self.status().host_id)
        except Exception:  # noqa: BLE001 — it is not there yet
            return False

    def wait_serving(self) -> None:
        wait_until("hostd serves", self.is_serving)

    def running(self) -> list[Job]:
        return [job for job in self.jobs(active="") if job.status == "running"]


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    made = Machine("vm", STATE, True)
    yield made
    print(sh("journalctl", "-u", "hostd", "--no-pager", "-n", "80"))


def append_script(name: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", f"echo {name} >> /data/order; sync; exec sleep 1000000")


def is_running(machine: Machine, name: str) -> bool:
    job = machine.job(name)
    assert job.status in ("pending", "starting", "running"), (job.status, job.error, machine.log(name))
    return job.status == "running"


@first_boot
def test_the_unit_starts_hostd_and_says_when_it_serves(machine: Machine) -> None:
    from rootfs.images import build_images

    STATE.mkdir(mode=0o700)
    build_images(STATE / "images", CACHE, names=["base", "system"], progress=lambda text: None)
    UNIT.write_text((ROOT / "vagrant/hostd.service").read_text().replace("@VENV@", str(ROOT / ".venv")))
    Path("/etc/hostd").mkdir()
    Path("/etc/hostd/hostd.toml").write_text(f'state_dir = "{STATE}"\nhost_ip = "192.0.2.1"\nhost_id = "testvm"\n')
    link = UNIT.with_name("hostd.service.d")
    link.mkdir()
    # the virtual machine has no network card: this one leads nowhere
    (link / "net.conf").write_text(
        "[Service]\nExecStartPre=-ip link add up0 type veth peer name out0\n"
        "ExecStartPre=-ip addr add 192.0.2.1/24 dev up0\nExecStartPre=-ip link set up0 up\n"
        "ExecStartPre=-ip link set out0 up\nExecStartPre=-ip route add default via 192.0.2.2\n"
        f"[Unit]\nRequiresMountsFor={STATE}\n"
    )
    machine.systemctl("daemon-reload")
    machine.systemctl("enable", "--now", "hostd")
    assert machine.is_serving()  # `systemctl start` returns when it does, not before
    status = machine.status()
    assert status.cgroup_version == 2
    assert status.features["user namespaces"] == "one for each job"
    assert status.features["cgroup controllers missing"] == "none"


@first_boot
def test_what_an_operator_types_first_works_and_says_what_it_should(machine: Machine) -> None:
    def said(*words: str) -> str:
        done = machine.hostd(*words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    print(said("up"), said("status"))
    assert said("run", "--image", "base", "--", "/bin/echo", "hi") == "hi\n"
    machine.start(machine.spec("typed", "/bin/sleep", "1000000"))
    wait_until("it runs", lambda: is_running(machine, "typed"))
    assert said("exec", "typed", "--", "/usr/bin/id", "-u") == "0\n"
    for words in (("ps",), ("stats",), ("df",), ("log", "typed"), ("inspect", "typed")):
        print(said(*words))
    assert "typed" in said("stats")
    said("stop", "typed")


@first_boot
def test_it_comes_back_however_often_it_dies(machine: Machine) -> None:
    for _ in range(7):  # systemd gives a unit up after five starts in ten seconds, unless told otherwise
        pid = wait_until("systemd starts it", lambda: machine.main_pid)
        os.kill(pid, 9)
        wait_until("it is dead", lambda pid=pid: machine.main_pid != pid)  # type: ignore[misc]
    wait_until("it serves again", machine.is_serving)


@first_boot
def test_systemd_restarts_a_killed_hostd_and_no_job_notices(machine: Machine) -> None:
    volume = (VolumeMount(name="order", path="/data"),)
    for name in ("first", "second", "third"):
        volume = (VolumeMount(name=f"order-{name}", path="/data"),)
        machine.start(machine.spec(name, *append_script(name), restart="always", volumes=volume))
        wait_until(f"{name} runs", lambda name=name: is_running(machine, name))  # type: ignore[misc]
    before = {job.spec.id: job.pid for job in machine.running()}
    assert len(before) == 3
    pid = machine.main_pid
    os.kill(pid, 9)
    wait_until("systemd starts it again", lambda: machine.main_pid not in (0, pid))
    machine.wait_serving()
    assert {job.spec.id: job.pid for job in machine.running()} == before


@first_boot
def test_a_restart_and_a_stop_of_the_service_leave_the_jobs_alone(machine: Machine) -> None:
    before = {job.spec.id: job.pid for job in machine.running()}
    machine.systemctl("restart", "hostd")
    machine.wait_serving()
    assert {job.spec.id: job.pid for job in machine.running()} == before
    machine.systemctl("stop", "hostd")
    assert all(Path(f"/proc/{pid}").exists() for pid in before.values())
    machine.systemctl("start", "hostd")
    machine.wait_serving()
    assert {job.spec.id: job.pid for job in machine.running()} == before


@first_boot
def test_down_ends_all_and_systemd_does_not_bring_it_back(machine: Machine) -> None:
    done = machine.hostd("down")
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until("the service rests", lambda: machine.systemctl("show", "-P", "ActiveState", "hostd") == "inactive\n")
    assert not [path for path in Path("/sys/fs/cgroup").iterdir() if path.name == "hostd"]
    machine.systemctl("start", "hostd")
    machine.wait_serving()
    wait_until("what always restarts is back", lambda: len(machine.running()) == 3)
    machine.start(machine.spec("once", "sleep", "1000000"))
    wait_until("it runs", lambda: machine.job("once").status == "running")
    # whatever was acknowledged is on the disk: nothing is synced here before the power is cut


@second_boot
def test_all_comes_back_by_itself_after_a_power_cut(machine: Machine) -> None:
    machine.wait_serving()
    wait_until("what always restarts is back", lambda: len(machine.running()) == 3)
    running = sorted(machine.running(), key=lambda job: job.started_at)
    assert [job.spec.id.split("-")[0] for job in running] == ["first", "second", "third"]


@second_boot
def test_a_job_that_must_not_restart_is_reported_as_lost(machine: Machine) -> None:
    job = machine.job("once")
    assert job.status == "crashed"
    assert job.exit_status is None
    assert job.end_reason in ("lost", "unknown")


@second_boot
def test_nothing_is_left_of_jobs_that_are_gone(machine: Machine) -> None:
    ids = {job.spec.id for job in machine.running()}
    wait_until("only what runs has directories", lambda: {path.name for path in (STATE / "jobs").iterdir()} <= ids)
    cgroups = Path("/sys/fs/cgroup/hostd")
    assert {path.name for path in cgroups.iterdir() if path.is_dir()} == ids
    assert shutil.which("hostd")
    done = subprocess.run(["hostd", "down"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not cgroups.exists()
