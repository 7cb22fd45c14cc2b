"""kill -9 of hostd, of the spawner and of both before and after every step of a launch, of a failure and of a stop."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from discovery.wire.errors import ServiceError
from hostd.types import ENDED, Job, JobSpec, Port, VolumeMount
from tests.hostd import faulty_daemon
from tests.hostd.faulty_daemon import LAUNCH_POINTS, STOP_POINTS, UNDO_POINTS
from tests.hostd.node import node, snapshot, wait_until
from tests.hostd.rounds import Rounds

pytestmark = [pytest.mark.needs_root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]
VICTIMS = ("hostd", "spawner", "both")
_ONCE = "echo run >> /runs/$NAME; for i in 1 2 3 4 5; do echo o $i; echo e $i >&2; done; sleep 0.2; exit 3"
_LASTING = "trap '$ON_TERM' TERM; echo run >> /runs/$NAME; echo ready; while :; do sleep 0.05; done"


class Machine(Rounds):
    """A node whose hostd has faults."""

    count = 0

    @property
    def fault_file(self) -> Path:
        return self.node.folder / "fault"

    def start_daemon(self) -> None:
        with (self.node.state_dir / "hostd.log").open("ab") as output:
            self.daemon = subprocess.Popen(
                self.node.inside(sys.executable, faulty_daemon.__file__),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env=self.node.environment() | {"FAULT_FILE": str(self.fault_file)},
            )  # fmt: skip

    def arm(self, point: str, victim: str, job_id: str) -> None:
        self.fault_file.write_text(f"{point} {victim} {job_id}")

    def revive(self, victim: str) -> None:
        """Wait until the fault has struck; then there is a hostd again."""
        wait_until("the fault strikes", lambda: not self.fault_file.exists())
        if victim != "spawner":
            assert self.daemon is not None
            self.daemon.wait(30)
            self.start_daemon()
        self.wait_ready()

    def new_id(self) -> str:
        self.count += 1
        return f"r{self.count}-0"

    def runs_of(self, job_id: str) -> int:
        file = self.node.state_dir / "volumes" / "runs" / job_id
        return len(file.read_text().splitlines()) if file.exists() else 0

    def ended(self, job_id: str) -> Job:
        def probe() -> Job | None:
            job = self.node.job(job_id)
            return job if job.status in ENDED else None

        return wait_until(f"{job_id} has ended", probe)

    def in_background(self, method: str, path: str, body: object = None) -> threading.Thread:
        """Ask, and do not mind when there is no answer."""

        def ask() -> None:
            try:
                self.node.caller().request(method, path, body=body)
            except ServiceError:
                pass

        thread = threading.Thread(target=ask)
        thread.start()
        return thread

    def job(self, script: str, *, is_deaf: bool = False) -> JobSpec:
        job_id = self.new_id()
        return self.node.spec(
            job_id, "/bin/sh", "-c", script,
            env={"NAME": job_id},
            stop_grace_s=0.2 if is_deaf else 5.0, volumes=(VolumeMount(name="runs", path="/runs"),), ports=(Port(),),
        )  # fmt: skip


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with node(8, has_discovery=False) as made:
        before = snapshot(made)
        found = Machine(made, 1)
        found.start_daemon()
        found.wait_ready()
        yield found
        made.down()
        assert found.daemon is not None
        found.daemon.wait(30)
        assert snapshot(made) == before


def check_nothing_left(machine: Machine) -> None:
    before = {"hostd": 10**6, "spawner": 10**6}
    machine.check_nothing_left(before)
    failures, machine.failures = machine.failures, []
    assert failures == []


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("point", LAUNCH_POINTS)
def test_a_launch_comes_up_once_or_is_done_again(machine: Machine, point: str, victim: str) -> None:
    spec = machine.job(_ONCE)
    machine.arm(point, victim, spec.id)
    asked = machine.in_background("PUT", f"/jobs/{spec.id}", spec)
    machine.revive(victim)
    asked.join()
    machine.node.start(spec)
    job = machine.ended(spec.id)
    lines = [line for line in machine.node.log(job.spec.id) if not line.startswith("hostd:")]
    assert machine.runs_of(job.spec.id) == 1
    if victim == "both" and job.end_reason == "unknown":
        assert job.exit_status is None
    else:
        assert (job.exit_status, job.end_reason) == (3, "exited")
        assert sorted(lines) == [f"{letter} {number}" for letter in "eo" for number in range(1, 6)]
    check_nothing_left(machine)


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_job_that_ends_before_the_disk_has_that_it_runs_is_not_run_again(machine: Machine, victim: str) -> None:
    spec = machine.job('echo run >> /runs/"$NAME"')
    slow = machine.fault_file.with_name(machine.fault_file.name + ".slow")
    slow.touch()
    machine.arm("files.undo after", victim, spec.id)
    asked = machine.in_background("PUT", f"/jobs/{spec.id}", spec)
    machine.revive(victim)
    slow.unlink()
    asked.join()
    job = machine.ended(spec.id)
    assert machine.runs_of(spec.id) == 1
    assert (job.exit_status, job.end_reason) == (0, "exited") or (victim, job.end_reason) == ("both", "unknown")
    check_nothing_left(machine)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("point", UNDO_POINTS)
def test_a_launch_that_fails_is_undone(machine: Machine, point: str, victim: str) -> None:
    spec = machine.node.spec(machine.new_id(), "/no/such/program", ports=(Port(),))
    machine.arm(point, victim, spec.id)
    asked = machine.in_background("PUT", f"/jobs/{spec.id}", spec)
    machine.revive(victim)
    asked.join()
    machine.node.start(spec)
    job = machine.ended(spec.id)
    assert (job.status, job.exit_status, job.end_reason) == ("failed", None, "start-failed")
    check_nothing_left(machine)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("point", STOP_POINTS)
def test_a_stop_ends_the_job(machine: Machine, point: str, victim: str) -> None:
    is_deaf = point.startswith("stop.kill")  # others are not killed
    spec = machine.job(_LASTING.replace("$ON_TERM", "" if is_deaf else "echo told; exit 0"), is_deaf=is_deaf)
    machine.node.start(spec)
    job_id = spec.id
    wait_until("it runs", lambda: "ready" in machine.node.log(job_id))
    machine.arm(point, victim, job_id)
    asked = machine.in_background("POST", f"/jobs/{job_id}/stop")
    machine.revive(victim)
    asked.join()
    job = machine.node.stop(job_id)
    assert job.status in ENDED, job
    assert machine.runs_of(job_id) == 1
    assert (job.status, job.end_reason) == ("done", "stopped"), job
    status = 137 if is_deaf else 0
    assert job.exit_status in ((status, None) if victim == "both" else (status,)), job
    assert [job.spec.id for job in machine.node.jobs(active="")] == []
    check_nothing_left(machine)
