"""Limits that bite, and what a job is told it ended from: on a real node, the same on cgroup v1 and v2."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hostd.types import MIB, Resources
from tests.hostd.node import Node, up_node, wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

HOG = "exec python3 -c \"x = bytearray(512 << 20); print('not reached')\""
BOMB = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with up_node(has_discovery=False) as made:
        yield made


@pytest.mark.parametrize(
    ("job_id", "script", "reason", "exit_status"),
    [
        ("fine", "exit 0", "exited", 0),
        ("fails", "exit 3", "exited", 3),
        ("signaled", "kill -9 $$", "signaled", 137),
        ("hog", HOG, "oom", 137),
    ],
)
def test_a_job_says_what_it_ended_from(node: Node, job_id: str, script: str, reason: str, exit_status: int) -> None:
    node.start(node.spec(job_id, "/bin/sh", "-c", script, image="system"))
    job = node.wait_ended(job_id)
    assert (job.end_reason, job.exit_status) == (reason, exit_status)
    if reason == "oom":
        assert "hostd: the job was killed because its memory ran out" in node.log(job_id)
        assert "hostd: 1 process was killed for the memory limit of 256 MiB" in node.log(job_id)


def test_a_stopped_job_was_stopped_and_one_that_never_ran_says_so(node: Node) -> None:
    node.start(node.spec("sleeper", "/bin/sleep", "600"))
    assert node.stop("sleeper").end_reason == "stopped"
    node.start(node.spec("nothing", "/bin/not-there"))
    job = node.wait_ended("nothing")
    assert (job.status, job.end_reason) == ("failed", "start-failed")


def test_a_child_killed_for_memory_is_said_and_the_job_lives(node: Node) -> None:
    script = f"sleep 0.5; ({HOG}); echo went on; sleep 600"
    node.start(node.spec("parent", "/bin/sh", "-c", script, image="system"))
    wait_until("it went on", lambda: "went on" in node.log("parent"))
    wait_until("the log says it", lambda: any("memory limit of 256 MiB" in line for line in node.log("parent")))
    assert node.job("parent").status == "running"
    assert node.stop("parent").end_reason == "stopped"


def test_a_fork_bomb_is_told_its_limit_while_it_runs(node: Node) -> None:
    resources = Resources(memory_bytes=256 * MIB, pids_max=50)
    script = "import time\ntime.sleep(1)\n" + BOMB  # so that it has to be heard of, not found at the first look
    node.start(node.spec("bomb", "/usr/bin/python3", "-c", script, image="system", resources=resources))
    wait_until("the log says it", lambda: any("pids limit of 50 reached" in line for line in node.log("bomb")), 60)
    assert node.job("bomb").status == "running"
    assert node.stop("bomb").end_reason == "stopped"


def test_io_limits_hold_in_a_job(node: Node) -> None:
    script = (
        "import mmap, os, time\n"
        "fd = os.open('/file', os.O_RDWR | os.O_CREAT | os.O_DIRECT)\n"
        "page = mmap.mmap(-1, 1 << 20)\n"
        "began = time.monotonic()\n"
        "for _ in range(8): os.write(fd, page)\n"
        "print(time.monotonic() - began)\n"
    )
    resources = Resources(memory_bytes=256 * MIB, io_write_bytes_per_s=4 * MIB)
    node.start(node.spec("writer", "/usr/bin/python3", "-c", script, image="system", resources=resources))
    assert node.wait_ended("writer").exit_status == 0
    assert float(node.log("writer")[-1]) > 1.4


def test_a_limit_that_this_machine_cannot_enforce_is_said(node: Node) -> None:
    if node.status().cgroup_version == 2:
        pytest.skip("cgroup v2 throttles buffered writes, too")
    resources = Resources(io_write_bytes_per_s=64 * MIB)
    node.start(node.spec("said", "/bin/sleep", "600", resources=resources))
    wait_until("the log says it", lambda: any("not enforced" in line for line in node.log("said")))
    node.stop("said")
