"""Say in Prometheus' text format what `hostd.usage` measures, and count what has happened since hostd began.

A counter begins anew with hostd, as Prometheus expects of restarts; what the kernel counts (CPU time, bytes) goes on.
Refuses nothing: label values are escaped, whatever they hold. Called by `hostd.api`; `Counts.follow` is a task of
`hostd.daemon`.

Source: Prometheus exposition formats, text format 0.0.4.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from discovery.wire.errors import Unavailable
from hostd.errors import JobNotFound
from hostd.records import Records
from hostd.types import JobEvent, JobStats, NodeStats, Pressure, Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LAUNCH_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

_JOB: dict[str, tuple[str, str, Callable[[JobStats], float]]] = {
    "memory_bytes": ("gauge", "Memory without page cache that can be dropped.", lambda s: s.usage.memory_bytes),
    "memory_limit_bytes": ("gauge", "Memory limit.", lambda s: s.memory_limit_bytes),
    "cpu_seconds_total": ("counter", "CPU time used.", lambda s: s.usage.cpu_s),
    "cpu_throttled_seconds_total": ("counter", "Time held back by the quota.", lambda s: s.usage.cpu_throttled_s),
    "pids": ("gauge", "Processes and threads.", lambda s: s.usage.pids),
    "pids_limit": ("gauge", "Limit of processes and threads.", lambda s: s.pids_limit),
    "forks_refused_total": ("counter", "Processes and threads refused for the limit.", lambda s: s.usage.forks_refused),
    "oom_kills_total": ("counter", "Processes killed because memory ran out.", lambda s: s.usage.oom_kills),
    "io_read_bytes_total": ("counter", "Bytes read from disks.", lambda s: s.usage.io_read_bytes),
    "io_write_bytes_total": ("counter", "Bytes written to disks.", lambda s: s.usage.io_write_bytes),
    "io_reads_total": ("counter", "Reads from disks.", lambda s: s.usage.io_read_ops),
    "io_writes_total": ("counter", "Writes to disks.", lambda s: s.usage.io_write_ops),
    "network_receive_bytes_total": ("counter", "Bytes that reached the job.", lambda s: s.network_received_bytes),
    "network_transmit_bytes_total": ("counter", "Bytes that the job sent.", lambda s: s.network_sent_bytes),
    "log_bytes_total": ("counter", "Bytes of log.", lambda s: s.log_bytes),
    "log_dropped_bytes_total": ("counter", "Bytes of log that found no room.", lambda s: s.log_dropped_bytes),
    "temp_disk_bytes": ("gauge", "Written outside of volumes.", lambda s: s.temp_disk_bytes),
    "temp_disk_limit_bytes": (
        "gauge",
        "Limit of what is written outside of volumes.",
        lambda s: s.temp_disk_limit_bytes,
    ),
    "restarts": ("gauge", "Quick restarts that led to this job.", lambda s: s.restarts),
    "start_time_seconds": ("gauge", "When it began, since the epoch.", lambda s: s.started_at),
}
_NODE: dict[str, tuple[str, str, Callable[[NodeStats], float]]] = {
    "cpus": ("gauge", "Cores.", lambda n: n.cpus),
    "cpu_seconds_total": ("counter", "Time that all cores were busy since boot.", lambda n: n.cpu_s),
    "memory_bytes": ("gauge", "Memory of the machine.", lambda n: n.memory_bytes),
    "memory_available_bytes": ("gauge", "Memory that can be had without swapping.", lambda n: n.memory_available_bytes),
    "disk_bytes": ("gauge", "Size of the state directory's file system.", lambda n: n.disk_bytes),
    "disk_free_bytes": ("gauge", "Free on the state directory's file system.", lambda n: n.disk_free_bytes),
    "network_pool": ("gauge", "Network namespaces that wait for a job.", lambda n: n.networks_ready),
    "network_pool_wanted": ("gauge", "How many should.", lambda n: n.networks_wanted),
}


class Counts:
    """What has happened since hostd began."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.restarts = 0
        self.launch_s_sum = 0.0
        self._launches = [0] * (len(_LAUNCH_BUCKETS_S) + 1)

    def launched(self, took_s: float) -> None:
        """Count a job that runs, and how long that took since it was asked for."""
        self._launches[bisect_left(_LAUNCH_BUCKETS_S, took_s)] += 1
        self.launch_s_sum += took_s

    def note(self, event: JobEvent, *, is_restart: bool = False) -> None:
        """Count what an event tells."""
        if event.job is None:
            return
        if event.kind == "created":
            self.restarts += is_restart
        elif event.kind == "started":
            self.launched(max(0.0, event.at - event.job.created_at))
        elif event.kind == "ended":
            self.ended[event.job.end_reason or "unknown"] += 1

    async def follow(self, records: Records) -> None:
        """Count what happens to jobs, for ever."""
        while True:
            try:
                async for event in records.watch({}):
                    self.note(event, is_restart=_is_restart(records, event))
            except Unavailable:  # so far behind that events were dropped: they are not counted
                continue

    def lines(self) -> Iterator[str]:
        """Yield the lines of these counters."""
        yield from _head("hostd_launch_seconds", "histogram", "From the request to the running job.")
        total = 0
        for bound, count in zip([*map(str, _LAUNCH_BUCKETS_S), "+Inf"], self._launches, strict=True):
            total += count
            yield f'hostd_launch_seconds_bucket{{le="{bound}"}} {total}'
        yield f"hostd_launch_seconds_sum {self.launch_s_sum:.6f}"
        yield f"hostd_launch_seconds_count {total}"
        yield from _head("hostd_jobs_ended_total", "counter", "Jobs that ended, by reason.")
        for reason, count in sorted(self.ended.items()):
            yield f'hostd_jobs_ended_total{{reason="{escape(reason)}"}} {count}'
        yield from _head("hostd_restarts_total", "counter", "Successors of jobs that always restart.")
        yield f"hostd_restarts_total {self.restarts}"


def _is_restart(records: Records, event: JobEvent) -> bool:
    if event.kind != "created" or event.job is None:
        return False
    try:
        return bool(records.get(event.job.spec.id).root)
    except JobNotFound:
        return False


def text(stats: Stats, counts: Counts) -> str:
    """Write everything."""
    return "\n".join([*_node_lines(stats.node, len(stats.jobs)), *counts.lines(), *_job_lines(stats.jobs)]) + "\n"


def escape(value: str) -> str:
    """Escape a label's value."""
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}"


def _node_lines(node: NodeStats, jobs: int) -> Iterator[str]:
    for name, (kind, what, of) in _NODE.items():
        yield from _head(f"hostd_node_{name}", kind, what)
        yield f"hostd_node_{name} {_number(of(node))}"
    yield from _head("hostd_node_jobs", "gauge", "Jobs that have not ended.")
    yield f"hostd_node_jobs {jobs}"
    daemons = {
        "hostd": (node.hostd_memory_bytes, node.hostd_cpu_s),
        "spawner": (node.spawner_memory_bytes, node.spawner_cpu_s),
    }
    yield from _head("hostd_process_resident_memory_bytes", "gauge", "Memory of our own processes.")
    for name, (memory, _) in daemons.items():
        yield f'hostd_process_resident_memory_bytes{{process="{name}"}} {memory}'
    yield from _head("hostd_process_cpu_seconds_total", "counter", "CPU time of our own processes.")
    for name, (_, cpu_s) in daemons.items():
        yield f'hostd_process_cpu_seconds_total{{process="{name}"}} {_number(cpu_s)}'
    yield from _head("hostd_node_pressure_waiting_seconds_total", "counter", "PSI: time in which tasks waited.")
    yield from _pressure_lines("hostd_node_pressure_waiting_seconds_total", "", node.pressure)


def _job_lines(jobs: tuple[JobStats, ...]) -> Iterator[str]:
    labels = [f'job="{escape(job.id)}"' for job in jobs]
    for name, (kind, what, of) in _JOB.items():
        yield from _head(f"hostd_job_{name}", kind, what)
        for label, job in zip(labels, jobs, strict=True):
            yield f"hostd_job_{name}{{{label}}} {_number(of(job))}"
    yield from _head("hostd_job_pressure_waiting_seconds_total", "counter", "PSI: time in which its tasks waited.")
    for label, job in zip(labels, jobs, strict=True):
        yield from _pressure_lines("hostd_job_pressure_waiting_seconds_total", f"{label},", job.pressure)


def _pressure_lines(name: str, label: str, pressure: Mapping[str, Pressure]) -> Iterator[str]:
    for resource, waited in pressure.items():
        yield f'{name}{{{label}resource="{resource}",kind="some"}} {waited.some_s:.6f}'
        yield f'{name}{{{label}resource="{resource}",kind="full"}} {waited.full_s:.6f}'
