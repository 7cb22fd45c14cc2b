"""Hostile jobs side by side: a service beside them answers every request, and each of them is told its true reason."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from hostd.types import MIB, Job, LogLine, Resources
from tests.hostd import neighbours
from tests.hostd.node import Node, up_node, wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

SECONDS = 5.0
PATIENCE_S = 120.0


@pytest.fixture
def node() -> Iterator[Node]:
    with up_node(has_discovery=False) as made:
        yield made


def said(node: Node, job_id: str, words: str, stream: str) -> bool:
    lines = node.caller().events(f"/jobs/{job_id}/log", LogLine, {"stream": stream, "lines": "50"})
    return any(words in line.text for line in lines)


def ended(node: Node, job_id: str) -> Job | None:
    job = node.job(job_id)
    return job if job.ended_at else None


def test_a_service_answers_beside_hostile_neighbours_and_each_hears_its_reason(node: Node) -> None:
    service = neighbours.start_service(node)
    small = Resources(memory_bytes=256 * MIB, temp_disk_bytes=256 * MIB, pids_max=256)
    for spec in neighbours.hostile(node, SECONDS, small):
        node.start(spec)
    measured = neighbours.measure(node, service, SECONDS)
    assert measured.failed == 0
    assert len(measured.took_ms) == SECONDS * 100
    assert neighbours.measure_outside(node, service, SECONDS).failed == 0
    wait_until("the hog ends", lambda: ended(node, "hog"), PATIENCE_S)
    wait_until("the filler ends", lambda: ended(node, "filler"), PATIENCE_S)
    wait_until("the opener ends", lambda: ended(node, "opener"), PATIENCE_S)
    assert node.job("hog").end_reason == "oom"
    assert said(node, "hog", "for the memory limit of 256 MiB", "0")
    assert node.job("filler").end_reason == "disk-full"
    # from outside nobody sees a refused open: what is known is how it ended, and what the program itself says
    assert (node.job("opener").end_reason, node.job("opener").exit_status) == ("exited", 1)
    assert said(node, "opener", "Too many open files", "2")
    wait_until("the bomb is told", lambda: said(node, "bomb", "pids limit of 256 reached", "0"), PATIENCE_S)
    wait_until("the bomb yields", lambda: _is_demoted(node, "bomb"), PATIENCE_S)
    assert node.job("service").is_up
    assert neighbours.measure(node, service, 1.0).failed == 0
    for job_id in ("bomb", "flooder", "service"):
        assert node.stop(job_id).end_reason == "stopped"


def _is_demoted(node: Node, job_id: str) -> bool:
    from hostd.runtime.cgroup import find_mounts

    mounts = find_mounts()
    if root := mounts.v1.get("cpu"):
        return (root / f"{node.name}~{job_id}" / "cpu.idle").read_text().strip() == "1"
    return mounts.v2 is not None and (mounts.v2 / node.name / job_id / "cpu.idle").read_text().strip() == "1"
