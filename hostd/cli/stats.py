"""What jobs use: stats once or again and again, top as a screen that refreshes."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec

from discovery.wire.errors import Invalid, NotFound
from hostd.cli.command import add
from hostd.cli.connect import caller_of
from hostd.cli.output import age, print_json, print_table
from hostd.types import MIB, JobStats, NodeStats, Stats

HEADER = ("JOB", "CPU %", "MEMORY", "LIMIT", "PIDS", "DISK R/W", "NET IN/OUT", "TEMP DISK", "LOG", "OOM", "AGE")
_CLEAR, _HOME, _CLEAR_LINE, _CLEAR_REST = "\x1b[2J", "\x1b[H", "\x1b[K", "\x1b[J"


def size(count: float) -> str:
    """Write bytes for a column."""
    for unit in ("B", "K", "M", "G", "T"):
        if count < 1000 or unit == "T":
            return f"{count:.0f}{unit}" if unit == "B" or count >= 100 else f"{count:.1f}{unit}"
        count /= 1024
    raise AssertionError


def rates(before: Stats, now: Stats) -> dict[str, float]:
    """Return each job's CPU use between two measurements, in percent of one core; "" is the machine's."""
    took_s = max(0.001, now.at - before.at)
    old = {job.id: job.usage.cpu_s for job in before.jobs}
    found = {job.id: (job.usage.cpu_s - old.get(job.id, job.usage.cpu_s)) / took_s * 100 for job in now.jobs}
    found[""] = (now.node.cpu_s - before.node.cpu_s) / took_s * 100
    return found


def row(job: JobStats, cpu_percent: float) -> tuple[str, ...]:
    """Write one job's line."""
    usage = job.usage
    return (
        job.id,
        f"{cpu_percent:.1f}",
        size(usage.memory_bytes),
        size(job.memory_limit_bytes),
        f"{usage.pids}/{job.pids_limit}",
        f"{size(usage.io_read_bytes)}/{size(usage.io_write_bytes)}",
        f"{size(job.network_received_bytes)}/{size(job.network_sent_bytes)}",
        size(job.temp_disk_bytes),
        size(job.log_bytes),
        str(usage.oom_kills),
        age(job.started_at),
    )


def node_lines(node: NodeStats, jobs: int, cpu_percent: float) -> list[str]:
    """Write the machine's lines."""
    used = node.memory_bytes - node.memory_available_bytes
    waits = ", ".join(f"{name} {wait.some_s:.0f} s" for name, wait in node.pressure.items())
    ours = f"hostd {node.hostd_memory_bytes // MIB} MiB, spawner {node.spawner_memory_bytes // MIB} MiB"
    return [
        f"{jobs} jobs   cpu {cpu_percent:.0f} % of {node.cpus * 100} %"
        f"   memory {size(used)} of {size(node.memory_bytes)}"
        f"   disk free {size(node.disk_free_bytes)} of {size(node.disk_bytes)}",
        f"{ours}   networks ready {node.networks_ready} of {node.networks_wanted}"
        + (f"   waited since boot: {waits}" if waits else ""),
    ]


def _chosen(stats: Stats, ids: Sequence[str]) -> list[JobStats]:
    jobs = {job.id: job for job in stats.jobs}
    for job_id in ids:
        if job_id not in jobs:
            raise NotFound(f"no job {job_id!r} is running")
    return [jobs[job_id] for job_id in ids] if ids else list(stats.jobs)


def _measured(arguments: argparse.Namespace) -> Iterator[Stats]:
    if not 1 <= arguments.interval <= 60:
        raise Invalid(f"interval {arguments.interval}", hint="1 to 60 seconds")
    query = {"follow": "true", "interval_s": str(arguments.interval)}
    return caller_of(arguments).events("/stats", Stats, query)


def _pairs(measured: Iterable[Stats]) -> Iterator[tuple[Stats, Stats]]:
    before: Stats | None = None
    for now in measured:
        if before is not None:
            yield before, now
        before = now


def show_stats(arguments: argparse.Namespace) -> int:
    if arguments.json and not arguments.follow:
        stats = caller_of(arguments).request("GET", "/stats", into=Stats)
        print_json(msgspec.structs.replace(stats, jobs=tuple(_chosen(stats, arguments.job))))
        return 0
    if arguments.json:
        for stats in _measured(arguments):
            chosen = msgspec.structs.replace(stats, jobs=tuple(_chosen(stats, arguments.job)))
            print(msgspec.json.encode(chosen).decode(), flush=True)
        return 0
    for before, now in _pairs(_measured(arguments)):
        cpu = rates(before, now)
        print_table(HEADER, [row(job, cpu[job.id]) for job in _chosen(now, arguments.job)])
        if not arguments.follow:
            break
        print(flush=True)
    return 0


def screen(before: Stats, now: Stats, columns: int, lines: int) -> list[str]:
    """Write a screen of this size: the machine, then the busiest jobs."""
    cpu = rates(before, now)
    top = [*node_lines(now.node, len(now.jobs), cpu[""]), ""]
    jobs = sorted(now.jobs, key=lambda job: (-cpu[job.id], -job.usage.memory_bytes, job.id))
    table = [HEADER, *(row(job, cpu[job.id]) for job in jobs[: max(0, lines - len(top) - 1)])]
    widths = [max(len(words[column]) for words in table) for column in range(len(HEADER))]
    for words in table:
        left = words[0].ljust(widths[0])
        rest = "  ".join(word.rjust(width) for word, width in zip(words[1:], widths[1:], strict=True))
        top.append(f"{left}  {rest}")
    return [line[:columns] for line in top[:lines]]


def show_top(arguments: argparse.Namespace) -> int:
    is_terminal = sys.stdout.isatty()
    if is_terminal:
        sys.stdout.write(_CLEAR)
    for before, now in _pairs(_measured(arguments)):
        if not is_terminal:
            print("\n".join(screen(before, now, 1000, len(now.jobs) + 10)))
            return 0
        shape = shutil.get_terminal_size()
        lines = screen(before, now, shape.columns, shape.lines - 1)
        sys.stdout.write(_HOME + "".join(f"{line}{_CLEAR_LINE}\n" for line in lines) + _CLEAR_REST)
        sys.stdout.flush()
    return 0


def declare(commands: Any) -> None:
    stats = add(
        commands, "stats", show_stats, "show what running jobs use", "hostd stats --follow web-1", has_json=True
    )
    stats.add_argument("job", nargs="*", metavar="JOB", help="only these")
    stats.add_argument("-f", "--follow", action="store_true", help="again and again")
    top = add(commands, "top", show_top, "show the busiest jobs and the machine, again and again", "hostd top")
    for parser in (stats, top):
        parser.add_argument("--interval", type=int, default=1, metavar="SECONDS", help="between two looks, 1 to 60")
