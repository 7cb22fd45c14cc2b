"""What 500 idle jobs cost beside themselves: hostd, the spawner, and each job's own init, on a node with discovery.

Every job is `sleep` with a network of its own and all protections. Memory is PSS, CPU time is what hostd and spawner
spent within a minute, as a share of one core. The peer is the limit that was set, and for `job_memory_*` what podman's
conmon and docker's shim take for each of 20 idle containers. It also says what one look of `hostd stats` costs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.idle import Process, wait
from bench.job_start import unpacked
from bench.job_start_network import open_peers
from bench.measure import Row, check_stop, row
from hostd.types import Job
from tests.hostd import node as nodes

JOBS = 500
LIMIT_PSS_MIB = 100.0
LIMIT_CPU_PERCENT = 1.0
LIMIT_JOB_PSS_MIB = 0.3
LIMIT_LOOK_MS = 50.0
SETTLE_S = 15.0
WATCH_S = 60.0
START_S = 300.0
PEER_JOBS = 20


@dataclass
class Parts:
    """The node's own processes."""

    hostd: Process
    spawner: Process

    def pss_mib(self) -> float:
        return self.hostd.pss_mib() + self.spawner.pss_mib()

    def cpu_s(self) -> float:
        return self.hostd.cpu_s() + self.spawner.cpu_s()


def parts_of(node: nodes.Node) -> Parts:
    pid = int((node.run_dir / "spawner.pid").read_text())
    return Parts(Process(node.pid, "hostd"), Process(pid, "spawner"))


@contextlib.contextmanager
def five_hundred(count: int = JOBS) -> Iterator[tuple[nodes.Node, list[Job]]]:
    """Bring up a node and its jobs."""
    with nodes.node() as node:
        node.subnet = "100.102.0.0/21"
        node.up()
        spec = node.spec("idle", "/bin/sleep", "86400")
        for number in range(count):
            check_stop()
            node.start(msgspec.structs.replace(spec, id=f"idle-{number}"))
        nodes.wait_until("all run", lambda: all(job.status == "running" for job in node.jobs(active="")), START_S)
        yield node, node.jobs(active="")


def inits_pss_mib(jobs: list[Job]) -> float:
    """Return the memory of all jobs' own first processes, which are not theirs but ours."""
    return sum(Process(job.pid, "init").pss_mib() for job in jobs)


def look_ms(node: nodes.Node, hostd: Process, looks: int = 10) -> float:
    """Return hostd's CPU time for one `GET /stats` over all jobs."""
    began = hostd.cpu_s()
    for _ in range(looks):
        node.caller().request("GET", "/stats")
    return (hostd.cpu_s() - began) / looks * 1000


def beside_peers(ours_mib: float, root: Path) -> list[Row]:
    """Return the rows `job_memory_*`: ours beside the one process that a peer needs for each idle container."""
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix=f"hostd-bench-{os.getpid()}-") as name,
        open_peers(Path(name), root) as peers,
    ):
        for each, peer in peers.items():
            for _ in range(PEER_JOBS):
                check_stop()
                peer.run_idle()
            helpers = peer.helper_pss_mib()
            rows.append(row(f"job_memory_{each}", [ours_mib], [helpers], f"{each}'s {peer.helper}", "MiB/job"))
    return rows


def measure(count: int = JOBS) -> list[Row]:
    """Return the rows."""
    with five_hundred(count) as (node, jobs):
        parts = parts_of(node)
        wait(SETTLE_S)
        cpu_s, began = parts.cpu_s(), time.monotonic()
        own_cpu = (parts.hostd.cpu_s(), parts.spawner.cpu_s())
        wait(WATCH_S)
        took_s = time.monotonic() - began
        cpu_percent = (parts.cpu_s() - cpu_s) / took_s * 100
        pss_mib, inits = parts.pss_mib(), inits_pss_mib(jobs)
        look = look_ms(node, parts.hostd)
        report = {
            "hostd_pss_mib": parts.hostd.pss_mib(),
            "spawner_pss_mib": parts.spawner.pss_mib(),
            "init_pss_mib_each": inits / len(jobs),
            "hostd_cpu_percent": (parts.hostd.cpu_s() - own_cpu[0]) / took_s * 100,
            "spawner_cpu_percent": (parts.spawner.cpu_s() - own_cpu[1]) / took_s * 100,
            "hostd_fds": sum(1 for _ in Path(f"/proc/{parts.hostd.pid}/fd").iterdir()),
            "spawner_fds": sum(1 for _ in Path(f"/proc/{parts.spawner.pid}/fd").iterdir()),
        }
        print("idle_500:", json.dumps({name: round(value, 3) for name, value in report.items()}), file=sys.stderr)
        return [
            row("idle_500_pss", [pss_mib], [LIMIT_PSS_MIB], "the limit", "MiB"),
            row("idle_500_cpu", [cpu_percent], [LIMIT_CPU_PERCENT], "the limit", "% core"),
            row("idle_job_pss", [(pss_mib + inits) / len(jobs)], [LIMIT_JOB_PSS_MIB], "the limit", "MiB/job"),
            *beside_peers((pss_mib + inits) / len(jobs), unpacked(node)),
            row("stats_500", [look], [LIMIT_LOOK_MS], "the limit", "ms CPU"),
        ]
