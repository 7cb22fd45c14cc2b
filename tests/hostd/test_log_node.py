"""Logs of a real node: kill -9 of hostd under full output, a flood beside others, followers that sleep, the command."""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.logtext import decode
from hostd.types import Job
from tests.hostd.node import Node, node, wait_until
from tests.pace import SLOWNESS

pytestmark = pytest.mark.needs_root
SEGMENT_BYTES = 4 * 2**20


@pytest.fixture(scope="module")
def small() -> Iterator[Node]:
    """A node whose jobs keep 8 MiB of log."""
    with node(1, has_discovery=False) as made:
        made.settings["HOSTD_LOG_SEGMENT_BYTES"] = str(SEGMENT_BYTES)
        made.up()
        yield made


def python(lab: Node, job_id: str, script: str) -> Job:
    return lab.start(lab.spec(job_id, "/usr/bin/python3", "-c", script, image="system"))


def is_alive(lab: Node, job_id: str) -> bool:
    return lab.job(job_id).status in ("pending", "starting", "running")


def ended(lab: Node, job_id: str) -> None:
    wait_until(f"{job_id} has ended", lambda: not is_alive(lab, job_id), 120.0)
    assert lab.job(job_id).status == "done"


def raw(lab: Node, job_id: str) -> dict[int, bytes]:
    found: dict[int, list[bytes]] = {1: [], 2: []}
    for stream, _, text in decode(lab.caller().stream(f"/jobs/{job_id}/output", {"raw": ""})):
        found[stream].append(text)
    return {stream: b"".join(texts) for stream, texts in found.items()}


CHUNKS, LINES = int(1000 / SLOWNESS), 4000  # enough for the kills to come in the midst of it
PRINT_NUMBERS = f"""
import os, time
def put(fd, data):
    while data:
        data = data[os.write(fd, data):]
for chunk in range({CHUNKS}):
    put(1, b"".join(b"%d\\n" % n for n in range(chunk * {LINES}, (chunk + 1) * {LINES})))
    put(2, b"%d\\n" % chunk)
    if chunk % 100 == 0:
        time.sleep(0.05)
"""


def test_hostd_killed_again_and_again_under_full_output_keeps_every_line_once() -> None:
    with node(2, has_discovery=False) as lab:
        lab.settings["HOSTD_LOG_SEGMENT_BYTES"] = str(2**30)
        lab.up()
        python(lab, "numbers", PRINT_NUMBERS)
        kills = 0
        while is_alive(lab, "numbers") and kills < 4:
            time.sleep(random.uniform(0.0, 0.3))
            lab.kill_daemon()
            kills += 1
            lab.up()
        ended(lab, "numbers")
        found = raw(lab, "numbers")
        assert found[1] == b"".join(b"%d\n" % number for number in range(CHUNKS * LINES))
        assert found[2] == b"".join(b"%d\n" % number for number in range(CHUNKS))
        assert kills >= 2
        lab.down()


def disk_bytes(folder: Path) -> int:
    found = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # dropped while we look
            found += path.stat().st_blocks * 512
    return found


def test_a_flood_stays_in_its_bounds_and_neither_others_nor_the_api_suffer(small: Node) -> None:
    flood = "yes this is a line of a flood that nobody will ever read | head -c 1000000000"
    python(small, "quiet", "import time\nfor n in range(200): print(n, flush=True); time.sleep(0.01)")
    small.start(small.spec("flood", "/bin/sh", "-c", flood))
    follower = small.caller().stream("/jobs/flood/output", {"follow": ""})
    begin = next(follower)  # and then it sleeps
    folder, took_s, largest = small.state_dir / "logs" / "flood", list[float](), 0
    while is_alive(small, "flood"):
        at = time.monotonic()
        small.job("quiet")
        took_s.append(time.monotonic() - at)
        largest = max(largest, disk_bytes(folder))
    assert small.job("flood").status == "done"
    assert largest <= 2 * SEGMENT_BYTES + 2**20
    assert sorted(took_s)[len(took_s) // 2] < 0.25 * SLOWNESS, took_s
    assert max(took_s) < 3.0 * SLOWNESS, took_s
    ended(small, "quiet")
    assert small.log("quiet") == [str(number) for number in range(200)]
    told = small.hostd("log", "--stream", "0", "flood").stdout
    assert re.search(r"hostd: \d+ bytes dropped by rotation", told)
    rest = b"".join(text for stream, _, text in decode([begin, *follower]) if stream == 0)
    assert re.search(rb"hostd: \d+ bytes dropped by rotation", rest)


@pytest.fixture(scope="module")
def talk(small: Node) -> str:
    script = (
        "import sys, time\nfor n in range(5):\n print('out', n, flush=True)\n time.sleep(0.01)\n"
        " print('err', n, file=sys.stderr, flush=True)\n time.sleep(0.01)\nprint('end', end='', flush=True)"
    )
    python(small, "talk", script)
    assert small.wait_ended("talk").status == "done"
    return "talk"


def test_the_command_shows_streams_times_tails_and_raw_bytes(small: Node, talk: str) -> None:
    everything = small.hostd("log", talk)
    assert everything.stdout.splitlines() == [*(f"out {number}" for number in range(5)), "end"]
    assert everything.stderr.splitlines() == [f"err {number}" for number in range(5)]
    assert small.hostd("log", "--stream", "2", "-n", "2", talk).stderr.splitlines() == ["err 3", "err 4"]
    assert small.hostd("log", "--raw", talk).stdout.endswith("out 4\nend")
    timed = small.hostd("log", "--timestamps", "-n", "1", talk).stdout
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z end\n", timed)
    assert small.hostd("log", "--since", timed.split()[0], talk).stdout == "end\n"
    assert small.hostd("log", "--since", "5m", talk).stdout == everything.stdout
    assert small.hostd("log", "--since", "6", "--stream", "1", talk).stdout.splitlines()[0] == "out 1"
    refused = small.hostd("log", "--since", "tomorrow", talk)
    assert (refused.returncode, refused.stdout) == (64, "")


def test_a_follower_outlives_hostd_and_gets_every_line_once(small: Node) -> None:
    python(small, "long", "import time\nfor n in range(300): print(n, flush=True); time.sleep(0.02)")
    command = small.inside(sys.executable, "-m", "hostd.cli", "log", "-f", "long")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=small.environment()) as following:
        assert following.stdout is not None
        lines = [following.stdout.readline() for _ in range(20)]
        small.kill_daemon()
        small.up()
        lines += following.stdout.readlines()
        assert following.wait(30) == 0
    assert lines == [f"{number}\n" for number in range(300)]


def test_a_job_that_ends_by_itself_leaves_no_open_log(small: Node) -> None:
    small.start(small.spec("brief", "/bin/echo", "hello"))
    small.wait_ended("brief")

    def held() -> list[str]:
        targets = []
        for entry in Path(f"/proc/{small.pid}/fd").iterdir():
            try:
                targets.append(str(entry.readlink()))
            except FileNotFoundError:
                continue
        return [target for target in targets if "/logs/brief/" in target]

    wait_until("the log is closed", lambda: not held())
