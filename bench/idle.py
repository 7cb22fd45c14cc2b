"""What the whole platform uses when nothing happens: memory and CPU time of every process after `make up`, no app.

Memory is PSS (a page that n processes share counts 1/n for each); CPU is the time that the processes spent within a
minute, as a share of one core. There is no peer that does the same, so the peer is the limit that was set.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Row, check_stop, row
from tests.e2e.lab import Lab

LIMIT_PSS_MIB = 300.0
LIMIT_CPU_PERCENT = 2.0
SETTLE_S = 10.0
WATCH_S = 60.0
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """One process of the platform; `name` is the part of the platform that it belongs to."""

    pid: int
    name: str

    def pss_mib(self) -> float:
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024

    def cpu_s(self) -> float:
        """Return what it and its ended children used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(field) for field in fields[11:15]) * _TICK_S


def below(pid: int) -> Iterator[int]:
    """Yield the children of a process, and theirs."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from below(int(child))


def processes(lab: Lab) -> list[Process]:
    """Find them: hostd, the spawner, and everything that the spawner started."""
    hostd, spawner = (int((lab.run_dir / f"{name}.pid").read_text()) for name in ("hostd", "spawner"))
    found = [Process(hostd, "hostd"), *(Process(pid, "hostd") for pid in below(hostd)), Process(spawner, "spawner")]
    jobs = {job["pid"]: job["spec"]["labels"] for job in json.loads(lab.run("hostd", "ps", "--json").out)}
    for child in Path(f"/proc/{spawner}/task/{spawner}/children").read_text().split():
        job = jobs.get(int(child))
        name = "discovery" if job is None else job.get("app_name", "job")
        for pid in (int(child), *below(int(child))):
            comm = Path(f"/proc/{pid}/comm").read_text().strip()
            found.append(Process(pid, "haproxy" if comm == "haproxy" else name))
    return found


def wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check_stop()
        time.sleep(min(1.0, max(0.0, end - time.monotonic())))


def measure(lab: Lab) -> list[Row]:
    """Return the rows `idle_pss` and `idle_cpu` of a lab after `make up`; print the table by part."""
    wait(SETTLE_S)
    found = processes(lab)
    cpu, begin = {each: each.cpu_s() for each in found}, time.monotonic()
    wait(WATCH_S)
    took_s = time.monotonic() - begin
    pss_mib: dict[str, float] = defaultdict(float)
    cpu_percent: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for each in found:
        pss_mib[each.name] += each.pss_mib()
        cpu_percent[each.name] += (each.cpu_s() - cpu[each]) / took_s * 100
        count[each.name] += 1
    if {each.pid for each in processes(lab)} != {each.pid for each in found}:
        print("idle: some process ended or began meanwhile: the platform was not idle", file=sys.stderr)
    print(f"{'idle: part':<16} {'processes':>9} {'PSS MiB':>8} {'% core':>7}")
    for name in sorted(pss_mib, key=lambda name: -pss_mib[name]):
        print(f"{name:<16} {count[name]:>9} {pss_mib[name]:>8.1f} {cpu_percent[name]:>7.2f}")
    print(f"{'all':<16} {len(found):>9} {sum(pss_mib.values()):>8.1f} {sum(cpu_percent.values()):>7.2f}\n", flush=True)
    return [
        row("idle_pss", [sum(pss_mib.values())], [LIMIT_PSS_MIB], "the limit", "MiB"),
        row("idle_cpu", [sum(cpu_percent.values())], [LIMIT_CPU_PERCENT], "the limit", "% core"),
    ]
