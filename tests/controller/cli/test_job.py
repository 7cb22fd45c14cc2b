from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from discovery.wire import attach
from tests.controller.cli.conftest import Shell
from tests.controller.cli.fake import Controller


@pytest.fixture
def app(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> str:
    controller.add_app("example")
    controller.add_release("example")
    monkeypatch.setenv("FLYNN_APP", "example")
    return "example"


def flynn_process(*words: str) -> list[str]:
    return [sys.executable, "-m", "controller.cli.main", *words]


def test_ps_is_a_table(flynn: Shell, controller: Controller, app: str) -> None:
    assert flynn.ok("ps") == "ID  TYPE  STATE  CREATED  RELEASE\n"
    controller.add_job(app)
    controller.add_job(app, "")
    controller.add_job(app, "web", "crashed", exit_status=137, args=("node", "a b.js"))
    lines = flynn.ok("ps").splitlines()
    assert lines[0].split() == ["ID", "TYPE", "STATE", "CREATED", "RELEASE"]
    assert lines[1] == "job0004  run   up     2 minutes ago  v1"
    assert lines[2] == "job0003  web   up     2 minutes ago  v1"
    assert len(lines) == 3
    everything = flynn.ok("ps", "-a", "-c").splitlines()
    assert everything[0].split()[-2:] == ["EXIT", "COMMAND"]
    assert everything[-1].endswith("crashed  2 minutes ago  v1       137   node 'a b.js'")
    assert flynn.ok("ps", "-q", "-t", "run") == "job0004\n"
    assert [job["type"] for job in json.loads(flynn.ok("ps", "--json"))] == ["web", ""]
    assert flynn("ps", "--app", "nosuch").code == 66


def test_kill_stops_jobs(flynn: Shell, controller: Controller, app: str) -> None:
    first, second = controller.add_job(app), controller.add_job(app)
    assert flynn.ok("kill", first.id, second.id) == f"Job {first.id} killed\nJob {second.id} killed\n"
    assert {job.state for job in controller.jobs.values()} == {"down"}
    assert flynn("kill", "nosuch").code == 66
    assert flynn("kill", "../x").code == 64


def test_run_gives_the_exit_code_and_both_streams(flynn: Shell, app: str) -> None:
    done = subprocess.run(
        flynn_process("run", "--", sys.executable, "-c", "import sys; print('out'); sys.stderr.write('err'); exit(42)"),
        capture_output=True, stdin=subprocess.DEVNULL, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (42, b"out\n", b"err")


def test_run_pipes_stdin(flynn: Shell, controller: Controller, app: str) -> None:
    done = subprocess.run(
        flynn_process("run", "-e", "A=b", "sh", "-c", "cat; exit 3"),
        input=b"hello",
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, b"hello")
    new = controller.new_jobs[0]
    assert (new.args, new.env, new.has_tty, new.has_log) == (("sh", "-c", "cat; exit 3"), {"A": "b"}, False, False)


def test_run_works_without_any_stdin(flynn: Shell, app: str) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "-", *flynn_process("run", "echo", "hi")],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"hi\n")


def test_run_at_a_terminal_asks_for_one(flynn: Shell, controller: Controller, app: str) -> None:
    pid, main = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-test"
        command = flynn_process("run", "echo", "hi")
        os.execv(command[0], command)
    seen, limit = b"", time.monotonic() + 30
    while time.monotonic() < limit:
        if select.select([main], [], [], 0.2)[0]:
            try:
                seen += os.read(main, 4096)
            except OSError:
                break
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(main)
    assert b"hi" in seen
    new = controller.new_jobs[0]
    assert (new.has_tty, new.env) == (True, {"TERM": "xterm-test"})
    assert any(isinstance(frame, attach.Resize) for frame in controller.frames)


def test_run_detached_prints_the_id(flynn: Shell, controller: Controller, app: str) -> None:
    assert flynn.ok("run", "-d", "sleep", "1") == "job0003\n"
    assert (controller.new_jobs[0].is_detached, controller.new_jobs[0].has_log) == (True, True)


def test_run_takes_the_options_of_the_command_for_the_command(flynn: Shell, controller: Controller, app: str) -> None:
    flynn.ok("run", "-d", "-r", "v1", "ls", "-d", "--", "-x")
    assert controller.new_jobs[0].args == ("ls", "-d", "--", "-x")
    assert controller.new_jobs[0].release_id == "release0002"


@pytest.mark.parametrize("words", [[], ["--"], ["-e", "nope", "x"], ["-e", "1=2", "x"]])
def test_run_refuses_nonsense(flynn: Shell, controller: Controller, app: str, words: list[str]) -> None:
    assert flynn("run", *words).code == 64
    assert controller.new_jobs == []
