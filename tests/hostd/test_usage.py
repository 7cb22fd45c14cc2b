"""What jobs use is measured, said in a table, on a screen, as JSON and for Prometheus."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from hostd import metrics
from hostd.cli.stats import rates, screen, size
from hostd.types import MIB, JobStats, NodeStats, Pressure, Stats, Usage
from hostd.usage import busy_s, link_bytes, process
from tests.hostd.node import Node, up_node, wait_until

NODE = NodeStats(
    cpus=2, cpu_s=10.0, memory_bytes=8 << 30, memory_available_bytes=6 << 30, disk_bytes=1 << 40,
    disk_free_bytes=1 << 39, networks_ready=3, networks_wanted=4, hostd_memory_bytes=40 * MIB, hostd_cpu_s=1.0,
    spawner_memory_bytes=8 * MIB, spawner_cpu_s=0.5, pressure={"cpu": Pressure(some_s=1.5, full_s=0.0)},
)  # fmt: skip


def job(job_id: str, cpu_s: float, log_bytes: int = 0) -> JobStats:
    usage = Usage(cpu_s=cpu_s, pids=2)
    return JobStats(id=job_id, usage=usage, memory_limit_bytes=256 * MIB, pids_limit=100, log_bytes=log_bytes)


# the format


SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)')


def parsed(text: str) -> dict[str, float]:
    """Read the text format strictly: every sample below its TYPE, each name with one TYPE, none twice."""
    samples: dict[str, float] = {}
    kinds: dict[str, str] = {}
    current = ""
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            assert line.split(" ", 3)[3]
        elif line.startswith("# TYPE "):
            _, _, current, kind = line.split(" ")
            assert kind in ("gauge", "counter", "histogram")
            assert current not in kinds
            kinds[current] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            family = re.sub("_(bucket|sum|count)$", "", match[1]) if kinds[current] == "histogram" else match[1]
            assert family == current
            key = match[1] + (f"{{{match[2]}}}" if match[2] else "")
            assert key not in samples
            samples[key] = float(match[3])
    return samples


def test_metrics_are_well_formed_and_values_are_escaped() -> None:
    counts = metrics.Counts()
    for took_s in (0.004, 0.02, 99.0):
        counts.launched(took_s)
    counts.ended['a "quoted"\n\\ reason'] += 2
    stats = Stats(at=1.0, node=NODE, jobs=(job("a", 1.25, log_bytes=7), job("b", 2.5)))
    found = parsed(metrics.text(stats, counts))
    assert found['hostd_job_cpu_seconds_total{job="a"}'] == 1.25
    assert found['hostd_job_log_bytes_total{job="a"}'] == 7
    assert found["hostd_node_jobs"] == 2
    assert found['hostd_jobs_ended_total{reason="a \\"quoted\\"\\n\\\\ reason"}'] == 2
    assert found['hostd_node_pressure_waiting_seconds_total{resource="cpu",kind="some"}'] == 1.5
    assert found['hostd_launch_seconds_bucket{le="0.005"}'] == 1
    assert found['hostd_launch_seconds_bucket{le="0.025"}'] == 2
    assert found['hostd_launch_seconds_bucket{le="30.0"}'] == 2
    assert found['hostd_launch_seconds_bucket{le="+Inf"}'] == found["hostd_launch_seconds_count"] == 3


# what the kernel writes


def test_reading_proc() -> None:
    text = (
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs\n"
        "    lo: 100 1 0 0 0 0 0 0 200 1 0 0 0 0 0 0\nhostd0-1:5 1 0 0 0 0 0 0 6 1 0 0 0 0 0 0\n"
    )
    assert link_bytes(text) == {"lo": (100, 200), "hostd0-1": (5, 6)}
    tick = os.sysconf("SC_CLK_TCK")
    assert busy_s("cpu  1 2 3 1000 1000 4 5 6 7 8\ncpu0 1\n") == pytest.approx(21 / tick)
    memory_bytes, cpu_s = process(os.getpid())
    assert memory_bytes > MIB
    assert cpu_s > 0
    assert process(2**22 + 1) == (0, 0.0)


# screens


def test_sizes_fit_a_column() -> None:
    assert [size(n) for n in (0, 999, 1000, 1 << 20, 150 << 20, 1 << 30, 5 << 50)] == [
        "0B", "999B", "1.0K", "1.0M", "150M", "1.0G", "5120T",
    ]  # fmt: skip


def test_the_screen_has_the_busiest_first_and_the_terminals_size() -> None:
    before = Stats(at=10.0, node=NODE, jobs=(job("lazy", 1.0), job("busy", 1.0)))
    node = msgspec.structs.replace(NODE, cpu_s=12.0)
    now = Stats(at=12.0, node=node, jobs=(job("lazy", 1.0), job("new", 5.0), job("busy", 2.0)))
    assert rates(before, now) == {"lazy": 0.0, "busy": 50.0, "new": 0.0, "": 100.0}
    lines = screen(before, now, 200, 50)
    assert [line.split()[0] for line in lines[3:]] == ["JOB", "busy", "lazy", "new"]
    small = screen(before, now, 20, 5)
    assert len(small) == 5
    assert all(len(line) <= 20 for line in small)


# a real node


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with up_node(has_discovery=False) as made:
        yield made


WORK = (
    "import os, sys, time\n"
    "x = bytearray(32 << 20)\n"
    "print('x' * 1000, flush=True)\n"
    "open('/file', 'wb').write(x)\n"
    "end = time.process_time() + 0.3\n"
    "while time.process_time() < end: pass\n"
    "os.system('python3 -m http.server $PORT')\n"
)


@pytest.mark.needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_working_job_is_measured(node: Node) -> None:
    spec = node.web("worker")
    node.start(msgspec.structs.replace(spec, args=("/usr/bin/python3", "-c", WORK)))
    wait_until("its layers are unpacked", lambda: node.job("worker").status == "running", 120)
    started = node.wait_up("worker")
    address = f"http://{started.host_ip}:{started.ports[0]}/"
    for _ in range(3):
        node.curl(address)

    def measured() -> JobStats | None:
        stats = node.caller().request("GET", "/stats", into=Stats)
        found = next(job for job in stats.jobs if job.id == "worker")
        return found if found.usage.cpu_s > 0.3 and found.network_sent_bytes > 600 else None

    found = wait_until("its work shows", measured)
    assert 32 * MIB < found.usage.memory_bytes < found.memory_limit_bytes
    assert found.usage.pids >= 2
    assert found.log_bytes >= 1000
    assert found.network_received_bytes > 100
    assert found.temp_disk_bytes >= 32 * MIB
    text = subprocess.run(
        node.inside("curl", "-sS", "--unix-socket", str(node.run_dir / "api/hostd.sock"), "http://hostd/metrics"),
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    samples = parsed(text)
    assert samples['hostd_job_memory_bytes{job="worker"}'] > 32 * MIB
    assert samples["hostd_launch_seconds_count"] >= 1
    assert samples["hostd_node_network_pool_wanted"] == 4
    assert samples["hostd_node_memory_bytes"] > 0
    node.stop("worker")
    text = node.hostd("stats", "--json").stdout
    assert msgspec.json.decode(text, type=Stats).jobs == ()


@pytest.mark.needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_commands_print_tables(node: Node) -> None:
    node.start(node.spec("sleeper", "/bin/sleep", "600"))
    wait_until("it runs", lambda: node.job("sleeper").status == "running")
    for words in (("stats",), ("stats", "sleeper"), ("top",)):
        done = node.hostd(*words)
        assert done.returncode == 0, done.stderr
        assert any(line.startswith("sleeper ") for line in done.stdout.splitlines()), done.stdout
    assert node.hostd("stats", "nobody").returncode == 66
    assert node.hostd("top", "--interval", "0").returncode == 64
    command = node.inside(sys.executable, "-m", "hostd.cli", "stats", "--follow", "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=node.environment()) as follower:
        assert follower.stdout is not None
        twice = [msgspec.json.decode(follower.stdout.readline(), type=Stats) for _ in range(2)]
        follower.terminate()
    assert twice[0].at < twice[1].at
    node.stop("sleeper")


@pytest.mark.needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_spawner_that_took_anothers_place_is_measured(node: Node) -> None:
    file = node.run_dir / "spawner.pid"
    old = int(file.read_text())
    os.kill(old, signal.SIGKILL)
    wait_until("another spawner is there", lambda: file.read_text().strip() not in ("", str(old)), 60)

    def measured() -> bool:
        return node.caller().request("GET", "/stats", into=Stats).node.spawner_memory_bytes > MIB

    wait_until("its memory shows", measured)
