"""The README's table and plot, made from results.json alone: `bench/run --readme`; a test compares them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bench.measure import RESULTS, Row
from bench.plot import Bar, draw

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PLOT = ROOT / "docs" / "bench.svg"
BEGIN, END = "<!-- bench: written by bench/run --readme -->\n", "<!-- bench ends -->\n"


@dataclass(frozen=True)
class About:
    """What a reader must know of a row. `aim` bounds the ratio, or our own figure if `is_absolute`."""

    text: str
    aim: float | None = None
    is_more_better: bool = False
    is_absolute: bool = False

    def is_met(self, row: Row) -> bool:
        value = row.ours if self.is_absolute else row.ratio
        return self.aim is None or (value >= self.aim if self.is_more_better else value <= self.aim)

    def aim_text(self, row: Row) -> str:
        if self.aim is None:
            return ""
        sign = "≥" if self.is_more_better else "≤"
        unit = f" {row.unit}" if self.is_absolute else ""
        return f"{sign} {self.aim:g}{unit}, {'met' if self.is_met(row) else 'missed'}"


PARTS: dict[str, dict[str, About]] = {
    "Start": {
        "job_start_docker": About("`true`, start to exit, full isolation, network and NAT, through hostd's API", 0.05),
        "job_start_podman": About("the same beside podman", 0.05),
        "job_start": About("`true` through hostd's API, with network, beside crun without", 0.25),
        "job_start_spawner": About("`true` at the spawner, no network on either side", 0.25),
        "job_start_floor": About("the spawner beside a C program with the same system calls", 1.5),
        "jobs_per_s_4": About("four at a time, at the spawner", 4.0, is_more_better=True),
        "exec": About("`true` inside a running job", 0.3),
    },
    "Logs": {
        "log_write": About("one job's output to the disk, a time for each line", 400.0, True, True),
        "log_read": About("read back with the times", 100.0, True, True),
    },
    "Idle and beside others": {
        "idle_job_pss": About("memory of all but the job, each of 500 idle ones", 1.0),
        "job_memory_podman": About("memory of all but the job, each of 500 idle ones of ours"),
        "job_memory_docker": About("the same; the peer without dockerd and containerd"),
        "idle_500_pss": About("memory of hostd and spawner with 500 idle jobs", 1.0),
        "idle_500_cpu": About("CPU time of hostd and spawner then", 1.0),
        "stats_500": About("one look at the usage of 500 jobs", 1.0),
        "neighbours_p99": About("a service's p99 beside five hostile jobs", 2.0),
        "neighbours_host_p99": About("the same, asked by a process of the host", 2.0),
        "idle_pss": About("the whole platform's memory, no app", 1.0),
        "idle_cpu": About("the whole platform's CPU time, no app", 1.0),
    },
    "Store": {
        "store_put_1": About("puts a second, 1 client, 3 members, JSON over HTTP", 0.5, is_more_better=True),
        "store_put_1_p50": About("their median", 2.0),
        "store_put_1_p99": About("their p99", 2.0),
        "store_put_16": About("16 clients", 1.0, is_more_better=True),
        "store_put_16_p50": About("their median", 2.0),
        "store_put_16_p99": About("their p99", 1.0),
        "store_put_64": About("64 clients", 0.5, is_more_better=True),
        "store_put_64_p50": About("their median", 2.0),
        "store_put_64_p99": About("their p99", 2.0),
        "store_read_16": About("linearizable reads of one key, 16 clients", 0.5, is_more_better=True),
        "store_read_16_p50": About("their median", 2.0),
        "store_read_16_p99": About("their p99", 2.0),
        "store_watch_1000": About("a change until the last of 1,000 watchers has it", 2.0),
        "store_restart": About("all members killed and started again, 100,000 keys", 2.0),
        "store_memory": About("memory of one member with 100,000 keys", 2.0),
    },
    "Platform": {
        "router_rps": About("64 connections, 100 routes", is_more_better=True),
        "router_p99": About("64 connections, 100 routes"),
        "dns_rps": About("DNS over UDP, 1,000 services with 10 instances", 5000.0, True, True),
        "dns_p99": About("DNS at 5,000 questions a second", 5.0, is_absolute=True),
        "push_to_200": About("`git push` of a change until the first 200"),
    },
}


def load() -> list[Row]:
    return [Row(**(each | {"spread": tuple(each["spread"])})) for each in json.loads(RESULTS.read_text())]


def number(value: float) -> str:
    """Write three figures."""
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def ratio_text(value: float) -> str:
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def parts_of(rows: list[Row]) -> list[tuple[str, list[tuple[Row, About]]]]:
    """Bring the rows into the order of the table; every row has its line in `PARTS`."""
    by_name = {row.name: row for row in rows}
    known = {name for part in PARTS.values() for name in part}
    if unknown := by_name.keys() - known:
        raise ValueError(f"say in bench/report.py what {min(unknown)} is")
    found = []
    for title, part in PARTS.items():
        if lines := [(by_name[name], about) for name, about in part.items() if name in by_name]:
            found.append((title, lines))
    return found


def table(rows: list[Row]) -> str:
    """Write the README's part between the marks."""
    lines = ["| row | ours | peer | ratio | aim |", "|---|---|---|---|---|"]
    for _, part in parts_of(rows):
        for row, about in part:
            ours, peer = (f"{number(value)} {row.unit}" for value in (row.ours, row.peer))
            ratio = ratio_text(row.ratio) + (" (more is better)" if about.is_more_better else "")
            cells = (f"`{row.name}`: {about.text}", ours, f"{peer}, {row.peer_name}", ratio, about.aim_text(row))
            lines.append(f"| {' | '.join(cells)} |")
    picture = f"![Each row's ratio to its peer on a logarithmic axis, with its aim]({PLOT.relative_to(ROOT)})"
    return "\n".join([*lines, "", picture, ""])


def picture(rows: list[Row]) -> str:
    """Draw the plot: how often ours fits into the peer's cost, so that better is always to the left."""
    parts = []
    for title, part in parts_of(rows):
        bars = []
        for row, about in part:
            aim = about.aim and (about.aim / row.peer if about.is_absolute else about.aim)
            power = -1 if about.is_more_better else 1
            is_good = about.is_met(row) if about.aim else row.ratio**power <= 1
            text = f"{ratio_text(row.ratio)} × {row.peer_name}"
            bars.append(Bar(row.name, text, row.ratio**power, aim**power if aim else None, is_good))
        parts.append((title, bars))
    return draw(parts)


def readme(rows: list[Row]) -> str:
    """Return the README with its table as it must be."""
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has lost {BEGIN.strip()} or {END.strip()}")
    return before + begin + table(rows) + end + after


def main() -> None:
    rows = load()
    README.write_text(readme(rows))
    PLOT.write_text(picture(rows))
    print(f"{len(rows)} rows in README.md and {PLOT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
