"""The controller as a job of a real hostd: bootstrapped, killed, updated, stopped and back again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.bootstrap import MANIFEST
from hostd.types import Job
from tests.hostd.node import Node, node, wait_until

pytestmark = [pytest.mark.needs_root, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def real() -> Iterator[Node]:
    with node(6) as made:
        made.up()
        yield made


def bootstrap(real: Node, folder: Path, version: str = "1") -> str:
    """Run the command with the controller's own steps and one app."""
    steps = json.loads(MANIFEST.read_text())["steps"]
    steps = [s for s in steps if s["id"] in ("controller-key", "controller", "controller-wait", "controller-inception")]
    command = 'mkdir -p /srv && cd /srv && echo $VERSION >index.html && exec python3 -m http.server "$PORT"'
    web = {"args": ["/bin/sh", "-c", command], "stop_grace_s": 1}
    app = {"name": "probe", "image": "system", "env": {"VERSION": version}, "processes": {"web": web}}
    probe = {"action": "deploy-app", "id": "probe", "app": {**app, "scale": {"web": 2}}}
    file = folder / "manifest.json"
    file.write_text(json.dumps({"steps": [*steps, probe]}))
    run = subprocess.run(
        real.inside(sys.executable, "-m", "controller.bootstrap", "--domain", "lab.test", "--manifest", str(file)),
        capture_output=True,
        text=True,
        env=real.environment(),
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def jobs_of(real: Node, app: str) -> list[Job]:
    return [job for job in real.jobs(active="1") if job.spec.labels.get("app_name") == app and job.is_up]


def ids(real: Node, app: str) -> set[str]:
    return {job.spec.id for job in jobs_of(real, app)}


def test_a_bare_host_is_bootstrapped_and_again_changes_nothing(real: Node, tmp_path: Path) -> None:
    printed = bootstrap(real, tmp_path)
    assert re.search(r"^\d\d:\d\d:\d\d\.\d{6} run-app controller$", printed, re.MULTILINE)
    before = ids(real, "controller") | ids(real, "probe")
    assert len(before) == 3
    bootstrap(real, tmp_path)
    assert ids(real, "controller") | ids(real, "probe") == before


@pytest.mark.parametrize("app", ["probe", "controller"])
def test_what_is_killed_is_back_within_5_s(real: Node, app: str) -> None:
    before = jobs_of(real, app)
    os.kill(before[0].pid, signal.SIGKILL)
    count = len(before)
    wait_until(
        f"{app} is back",
        lambda: len(now := ids(real, app)) == count and before[0].spec.id not in now,
        5.0,
    )


def test_a_new_release_replaces_every_job_and_serves(real: Node, tmp_path: Path) -> None:
    before = ids(real, "probe")
    bootstrap(real, tmp_path, "2")
    wait_until("the old ones are gone", lambda: len(ids(real, "probe")) == 2)
    assert not ids(real, "probe") & before
    for job in jobs_of(real, "probe"):
        assert real.curl(f"http://{job.host_ip}:{job.ports[0]}/") == "2\n"


def test_hostd_killed_and_back_keeps_every_job(real: Node) -> None:
    before = ids(real, "controller") | ids(real, "probe")
    real.kill_daemon()
    real.up()
    wait_until("hostd knows", lambda: ids(real, "controller") | ids(real, "probe") == before)


def test_after_down_and_up_everything_is_back(real: Node, tmp_path: Path) -> None:
    real.down()
    real.up()
    bootstrap(real, tmp_path, "2")
    wait_until("all is back", lambda: len(ids(real, "probe")) == 2 and len(ids(real, "controller")) == 1)
    for job in jobs_of(real, "probe"):
        assert real.curl(f"http://{job.host_ip}:{job.ports[0]}/") == "2\n"
