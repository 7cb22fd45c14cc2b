"""Temp disks and volumes on a whole node."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from discovery.wire.errors import Invalid
from hostd.errors import HostFull
from hostd.types import MIB, Resources, SignalRequest, VolumeMount
from tests.hostd.disk import fill
from tests.hostd.node import Node, sh, snapshot, wait_until
from tests.hostd.node import node as a_node
from tests.hostd.test_disks import loops_of

pytestmark = pytest.mark.needs_root

SMALL = Resources(memory_bytes=128 * MIB, temp_disk_bytes=64 * MIB, shm_bytes=MIB)


@pytest.fixture(scope="module")
def module_node() -> Iterator[Node]:
    with a_node(7, has_discovery=False) as made:
        before = snapshot(made)
        made.up()
        yield made
        made.down()
        assert snapshot(made) == before
        wait_until("no loop device is left", lambda: not loops_of(made.state_dir))


@pytest.fixture
def node(module_node: Node) -> Iterator[Node]:
    if "ext4" not in module_node.status().features["temp disks"]:
        pytest.skip(module_node.status().features["temp disks"])
    yield module_node
    for job in module_node.jobs(active=""):
        module_node.stop(job.spec.id)


def test_a_disk_filler_meets_enospc_and_the_log_says_why(node: Node) -> None:
    script = "for to in '80M > /tmp/big' '1M > /root/x' '2M > /dev/shm/y'; do eval head /dev/zero -c $to; done; exit 3"
    node.start(node.spec("filler", "/bin/sh", "-c", script, resources=SMALL))
    job = node.wait_ended("filler")
    log = node.log("filler")
    assert (job.status, job.end_reason) == ("crashed", "disk-full")
    assert sum("No space left on device" in line for line in log) == 3, log
    assert sum("its temp disk of 64 MiB is full" in line for line in log) == 1, log
    used = sum(path.lstat().st_blocks for path in (node.state_dir / "jobs").rglob("*")) * 512
    assert used < MIB


def test_a_full_disk_is_told_while_the_job_runs_and_stops_nobody_else(node: Node) -> None:
    node.start(node.spec("full", "/bin/sh", "-c", "cat /dev/zero > /big; sleep 600", resources=SMALL))
    wait_until("it is told", lambda: any("64 MiB is full" in line for line in node.log("full")))
    node.start(node.spec("other", "/bin/sh", "-c", "head -c 20M /dev/zero > /x && rm /x && echo fine", resources=SMALL))
    assert node.wait_ended("other").exit_status == 0
    assert node.job("full").status == "running"
    node.stop("full")


def test_a_job_keeps_its_disk_when_hostd_is_killed(node: Node) -> None:
    on_signal = "cat /file; head -c 80M /dev/zero > /big; exit 9"
    script = f"echo kept > /file; trap '{on_signal}' USR1; touch /ready; sleep 1000 & wait"
    job = node.start(node.spec("keeper", "/bin/sh", "-c", script, resources=SMALL))
    wait_until("it has written", lambda: Path(f"/proc/{node.job('keeper').pid}/root/ready").exists())
    node.start(node.spec("later", "/bin/true"))  # recorded after it: the store writes in order
    node.wait_ended("later")
    node.kill_daemon()
    wait_until("the pool of the killed one is gone", lambda: len(loops_of(node.state_dir)) == 1)
    node.up()
    node.caller().request("POST", "/jobs/keeper/signal", body=SignalRequest(number=signal.SIGUSR1))
    job = node.wait_ended("keeper")
    log = node.log("keeper")
    assert job.status == "crashed"
    assert "kept" in log
    assert any("64 MiB is full" in line for line in log), log


def test_a_disk_that_is_written_much_goes_direct_also_after_a_restart_of_hostd(node: Node) -> None:
    if "direct when written much" not in node.status().features["temp disks"]:
        pytest.skip(node.status().features["temp disks"])

    def direct() -> int:
        loops = [Path(f"/sys/block/{loop}/loop/dio") for loop in loops_of(node.state_dir)]
        return sum(dio.read_text().strip() == "1" for dio in loops)

    large = Resources(memory_bytes=128 * MIB, temp_disk_bytes=256 * MIB)
    script = (
        "until [ -e /tmp/go ]; do sleep 0.1; done; while :; do dd if=/dev/zero of=/x bs=1M count=64 conv=fsync; done"
    )
    node.start(node.spec("heavy", "/bin/sh", "-c", script, resources=large))
    node.start(node.spec("quiet", "/bin/sh", "-c", "echo little > /x; sleep 600", resources=large))
    node.kill_daemon()
    node.up()
    assert direct() == 0
    assert node.hostd("exec", "heavy", "--", "/bin/sh", "-c", "> /tmp/go").returncode == 0
    wait_until("the writer's disk is direct", lambda: direct() == 1)
    assert node.job("heavy").status == "running"
    for job_id in ("heavy", "quiet"):
        node.stop(job_id)
    wait_until("its files are gone", lambda: not list((node.state_dir / "jobs").iterdir()))


def test_ended_jobs_give_their_loop_devices_back(node: Node) -> None:
    pool = wait_until("the pool is full", lambda: len(loops_of(node.state_dir)) or None)
    for number in range(20):
        node.start(node.spec(f"short-{number}", "/bin/true"))
    for number in range(20):
        assert node.wait_ended(f"short-{number}").exit_status == 0
    wait_until("only the pool is left", lambda: len(loops_of(node.state_dir)) <= max(pool, 4))
    assert list((node.state_dir / "jobs").iterdir()) == []


def test_on_a_full_disk_jobs_come_back_and_hostd_lives() -> None:
    with a_node(8, has_discovery=False) as made, on_small_disk_of(made):
        made.up()
        pid = made.pid
        made.start(made.spec("phoenix", "/bin/sleep", "600", restart="always"))
        wait_until("it runs", lambda: made.job("phoenix").status == "running")
        with kept_full(made.state_dir):
            for size in (100_000, 10_000, 1_000, 10):
                start_until_refused(made, size)
            made.caller().request("POST", "/jobs/phoenix/signal", body=SignalRequest(number=signal.SIGKILL))
            wait_until("it has a successor", lambda: [job for job in made.jobs() if job.spec.id.startswith("phoenix-")])
        wait_until("it runs", lambda: [job for job in made.jobs(active="") if job.status == "running"])
        assert made.pid == pid
        made.start(made.spec("after", "/bin/true"))
        assert made.wait_ended("after").exit_status == 0
        made.down()


@contextlib.contextmanager
def kept_full(folder: Path) -> Iterator[None]:
    """Take all the space of a disk, and what somebody gives back at once."""
    is_over = threading.Event()

    def take() -> None:
        while not is_over.wait(0.0002):
            fill(folder, is_fresh=False)

    with ThreadPoolExecutor(1) as threads:
        ballast = fill(folder)
        taking = threads.submit(take)
        try:
            yield
        finally:
            is_over.set()
            taking.result()
            ballast.unlink()


def start_until_refused(node: Node, env_bytes: int) -> None:
    """Start jobs until there is no room for the record of one more: the store has some of its own."""
    number = 0
    with contextlib.suppress(HostFull):
        while number < 2000:
            number += 1
            node.start(node.spec(f"n-{env_bytes}-{number}", "/bin/true", env={"BIG": "x" * env_bytes}))
    assert number < 2000


@contextlib.contextmanager
def on_small_disk_of(node: Node) -> Iterator[None]:
    """Give a node that is not up a file system of its own for its state."""
    content = node.folder / "content"
    node.state_dir.rename(content)
    node.state_dir.mkdir(mode=0o700)
    sh("mount", "-t", "tmpfs", "-o", "size=1g,mode=700", "none", str(node.state_dir))
    try:
        sh("cp", "-a", f"{content}/.", str(node.state_dir))
        shutil.rmtree(content)
        yield
    finally:
        node.hostd("down")  # what it left there would not be found later
        sh("umount", "-l", str(node.state_dir))


@pytest.mark.parametrize(
    "wrong", [Resources(temp_disk_bytes=4096), Resources(temp_disk_bytes=2**60), Resources(shm_bytes=-1)]
)
def test_sizes_that_cannot_be_are_refused(node: Node, wrong: Resources) -> None:
    with pytest.raises(Invalid, match="resources"):
        node.start(node.spec("bad", "/bin/true", resources=wrong))


def test_an_exclusive_volume_serves_one_job_also_after_a_restart_of_hostd(node: Node) -> None:
    alone = (VolumeMount(name="db", path="/data", is_exclusive=True),)
    node.start(node.spec("first", "/bin/sleep", "600", volumes=alone))
    wait_until("it runs", lambda: node.job("first").status == "running")
    node.start(node.spec("second", "/bin/true", volumes=(VolumeMount(name="db", path="/data"),)))
    job = node.wait_ended("second")
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, "first" in job.error.message) == ("volume_in_use", True)
    node.kill_daemon()
    node.up()
    node.start(node.spec("third", "/bin/true", volumes=alone))
    assert node.wait_ended("third").status == "failed"
    node.stop("first")
    node.start(node.spec("fourth", "/bin/true", volumes=alone))
    assert node.wait_ended("fourth").status == "done"


def test_a_snapshot_of_a_volume_in_use_is_of_one_moment(node: Node) -> None:
    # two files that are only equal between two turns; whoever copies them while it runs sees them differ
    script = "i=0; while :; do i=$((i+1)); echo $i > /data/a; echo $i > /data/b; [ $i = 50 ] && touch /data/on; done"
    node.start(node.spec("writer", "/bin/sh", "-c", script, volumes=(VolumeMount(name="pair", path="/data"),)))
    wait_until("it writes", lambda: (node.state_dir / "volumes/pair/on").exists())
    refused = node.hostd("volume", "snapshot", "pair", "one")
    assert (refused.returncode, "--freeze" in refused.stderr) == (75, True), refused.stderr
    done = node.hostd("volume", "snapshot", "--freeze", "pair", "one")
    assert done.returncode == 0, done.stderr
    assert "writer held still" in done.stdout
    copy = node.state_dir / "snapshots/pair/one/data"
    first, second = ((copy / name).read_text() for name in ("a", "b"))
    if first and second:  # one may have been caught between its emptying and its writing
        assert int(first) - int(second) in (0, 1)
    before = (node.state_dir / "volumes/pair/b").read_text()
    wait_until("it goes on", lambda: (node.state_dir / "volumes/pair/b").read_text() != before)
    assert node.hostd("volume", "restore", "pair", "one").returncode == 75
    node.stop("writer")
    assert node.hostd("volume", "restore", "pair", "one").returncode == 0
    assert (node.state_dir / "volumes/pair/a").read_bytes() == (copy / "a").read_bytes()
    assert "one" in node.hostd("volume", "snapshots", "pair").stdout
    assert node.hostd("volume", "remove-snapshot", "pair", "one").returncode == 0
    assert node.hostd("volume", "rm", "pair").returncode == 0
