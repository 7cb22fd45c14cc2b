"""`hostd exec` on a real node: a program beside a job's own, with all that a terminal needs, and nothing left."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from discovery.wire.errors import NotFound
from hostd.errors import JobNotRunning
from hostd.types import ExecSpec, ExecStarted, HealthCheck, Port
from tests.hostd.node import Node, wait_until
from tests.hostd.node import node as new_node
from tests.pace import SLOWNESS

pytestmark = [pytest.mark.needs_root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with new_node(has_discovery=False) as made:
        made.up()
        spec = made.spec("host", "/bin/sh", "-c", "sleep 100000 & wait", env={"OF_JOB": "yes"})
        made.start(spec)
        wait_until("the job runs", lambda: any(line.startswith("sleep 100000") for line in processes(made)))
        yield made
        made.down()


@pytest.fixture(autouse=True)
def nothing_is_left(node: Node) -> Iterator[None]:
    before = processes(node)
    yield
    wait_until("only the job's own processes are left", lambda: processes(node) == before)


def processes(node: Node) -> list[str]:
    """Return the command lines of all processes in the job's cgroup."""
    found = set()
    for file in Path("/sys/fs/cgroup").glob(f"**/{node.name}/host/cgroup.procs"):
        with contextlib.suppress(OSError):
            for pid in file.read_text().split():
                with contextlib.suppress(OSError):
                    found.add((pid, Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()))
    return sorted(line for _, line in found)


def run(node: Node, *words: str, stdin: str = "") -> tuple[int, str, str]:
    done = node.hostd("exec", *words, stdin=stdin)
    return done.returncode, done.stdout, done.stderr


def popen(node: Node, *words: str, **streams: object) -> subprocess.Popen[bytes]:
    command = node.inside(sys.executable, "-m", "hostd.cli", "exec", *words)
    return subprocess.Popen(command, env=node.environment(), **streams)  # type: ignore[call-overload,no-any-return]


def test_it_runs_beside_the_jobs_own_program_and_its_status_is_ours(node: Node) -> None:
    assert run(node, "host", "--", "/bin/sh", "-c", "echo out; echo err >&2; exit 7") == (7, "out\n", "err\n")
    assert run(node, "host", "--", "/bin/sh", "-c", "kill -9 $$")[0] == 137
    code, out, _ = run(node, "host", "--", "/bin/sh", "-c", "cat /proc/1/cmdline; hostname")
    assert code == 0
    assert out.endswith("host\n")
    assert "init" in out


def test_it_has_the_jobs_environment_user_and_limits_unless_told(node: Node) -> None:
    script = 'echo "$OF_JOB $EXTRA $(id -u):$(id -g) $(pwd) $(ulimit -n)"'
    assert run(node, "host", "--", "/bin/sh", "-c", script)[1] == "yes  0:0 / 10000\n"
    told = run(node, "-e", "EXTRA=more", "-u", "1000:1001", "--cwd", "/tmp", "host", "--", "/bin/sh", "-c", script)
    assert told[1] == "yes more 1000:1001 /tmp 10000\n"


def test_it_is_in_the_jobs_cage(node: Node) -> None:
    script = "grep -E 'CapBnd|NoNewPrivs|Seccomp:' /proc/self/status; cat /proc/self/uid_map; ls /proc/self/ns -l"
    inside = run(node, "host", "--", "/bin/sh", "-c", script)[1]
    assert "NoNewPrivs:\t1" in inside
    assert "Seccomp:\t2" in inside
    assert run(node, "host", "--", "/bin/sh", "-c", "mount -t tmpfs none /mnt")[0] != 0


def test_what_is_not_there_says_so(node: Node) -> None:
    code, _, err = run(node, "host", "--", "/no/such/program")
    assert code == 70
    assert "/no/such/program" in err
    assert "Traceback" not in err
    assert run(node, "nosuchjob", "--", "/bin/true")[0] == 66
    assert run(node, "host", "--")[0] == 64
    assert run(node, "-u", "root", "host", "--", "/bin/true")[0] == 64


def test_a_job_that_has_ended_refuses(node: Node) -> None:
    node.start(node.spec("over", "/bin/true"))
    node.wait_ended("over")
    assert run(node, "over", "--", "/bin/true")[0] == 75
    for path, refusal in (("/jobs/over/exec", JobNotRunning), ("/jobs/nosuch/exec", NotFound)):
        with pytest.raises(refusal):
            node.caller().request("POST", path, body=ExecSpec(args=("/bin/true",)), into=ExecStarted)


def test_stdin_goes_through_whole_and_ends(node: Node) -> None:
    data = bytes(range(256)) * 8192  # 2 MiB
    with popen(node, "-i", "host", "--", "/bin/cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        out, _ = process.communicate(data, timeout=60 * SLOWNESS)
    assert process.returncode == 0
    assert out == data


def test_without_i_stdin_is_empty(node: Node) -> None:
    assert run(node, "host", "--", "/bin/cat", stdin="not for you")[:2] == (0, "")


def test_much_output_arrives_whole_in_order(node: Node) -> None:
    code, out, _ = run(node, "host", "--", "/usr/bin/seq", "300000")
    assert code == 0
    assert out == "".join(f"{number}\n" for number in range(1, 300001))


def test_a_background_child_does_not_keep_us(node: Node) -> None:
    began = time.monotonic()
    assert run(node, "host", "--", "/bin/sh", "-c", f"sleep {6 * SLOWNESS} & echo done")[:2] == (0, "done\n")
    assert time.monotonic() - began < 5.5 * SLOWNESS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_passed_on_without_a_terminal(node: Node, number: signal.Signals) -> None:
    script = f"trap 'echo got; exit 9' {number.value}; echo ready; while :; do sleep 0.05; done"
    with popen(node, "host", "--", "/bin/sh", "-c", script, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == b"got\n"
        assert process.wait(20) == 9


def test_a_client_that_is_killed_takes_its_program_along(node: Node) -> None:
    script = "trap '' HUP; sleep 1000 & echo ready; wait; sleep 1000"
    with popen(node, "host", "--", "/bin/sh", "-c", script, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()


def test_stopping_the_job_ends_it_with_a_status(node: Node) -> None:
    node.start(node.spec("short", "/bin/sleep", "1000"))
    wait_until("it runs", lambda: node.job("short").status == "running")
    with popen(node, "short", "--", "/bin/sh", "-c", "echo ready; sleep 1000", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        node.stop("short")
        assert process.wait(20) == 137


def test_a_detached_one_runs_on_and_a_restarted_hostd_ends_it(node: Node) -> None:
    done = node.hostd("exec", "-d", "host", "--", "/bin/sh", "-c", "while :; do echo much; sleep 0.01; done")
    assert done.stdout.startswith("host.exec-")
    wait_until("it runs", lambda: any("echo much" in line for line in processes(node)))
    with popen(node, "host", "--", "/bin/sh", "-c", "echo ready; sleep 1000", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        node.kill_daemon()
        assert process.wait(20) == 69
    node.up()
    assert node.job("host").status == "running"
    assert run(node, "host", "--", "/bin/true")[0] == 0


def test_many_at_once(node: Node) -> None:
    started = [popen(node, "host", "--", "/bin/sh", "-c", f"exit {number}") for number in range(8)]
    assert [process.wait(60) for process in started] == list(range(8))


def is_idle(pid: int) -> bool:
    def ticks() -> list[str]:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]

    before = ticks()
    time.sleep(0.5)
    return ticks() == before


def test_a_signal_overtakes_stdin_that_nobody_reads(node: Node) -> None:
    script = "trap 'exit 7' INT; echo ready; while :; do sleep 0.05; done"
    command = node.inside(
        sys.executable, "-m", "hostd.cli", "run", "-i", "--name", "deaf", "--", "/bin/sh", "-c", script
    )
    with (
        Path("/dev/zero").open("rb") as zeros,
        subprocess.Popen(command, env=node.environment(), stdin=zeros, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        wait_until("it is stuck", lambda: is_idle(process.pid))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 7


def checked(node: Node, job_id: str, script: str, **more: float) -> None:
    check = HealthCheck(kind="command", command=("/bin/sh", "-c", script), interval_s=0.2, **more)  # type: ignore[arg-type]
    node.start(node.spec(job_id, "/bin/sleep", "1000", ports=(Port(service=job_id, check=check),)))


def test_a_check_by_command_says_when_a_job_is_up_and_why_not(node: Node) -> None:
    script = "test -e /tmp/well || { echo noise; echo not yet; exit 3; }"
    checked(node, "checked", script, start_timeout_s=0.1, failures_until_down=1, timeout_s=20)
    wait_until("it complains", lambda: any("exit status 3: not yet" in line for line in node.log("checked")))
    assert not node.job("checked").is_up
    run(node, "checked", "--", "/bin/touch", "/tmp/well")
    wait_until("it is up", lambda: node.job("checked").is_up)
    run(node, "checked", "--", "/bin/rm", "/tmp/well")
    wait_until("it is down", lambda: not node.job("checked").is_up)
    node.stop("checked")


def test_a_check_that_hangs_is_killed_and_none_pile_up(node: Node) -> None:
    checked(node, "hanging", "echo $$ >> /tmp/looks; sleep 1000 & sleep 1000", start_timeout_s=0.1, timeout_s=0.5)
    wait_until("it complains", lambda: any("killed after 0.5 s" in line for line in node.log("hanging")))

    def looks() -> int:
        return len(run(node, "hanging", "--", "/bin/cat", "/tmp/looks")[1].split())

    wait_until("there were several", lambda: looks() >= 4)
    script = "grep -l '^sleep' /proc/[0-9]*/cmdline | wc -l"
    assert int(run(node, "hanging", "--", "/bin/sh", "-c", script)[1]) <= 3  # the job's own and those of one look
    node.stop("hanging")


# at a terminal


class Sitting:
    """A person at a terminal with `hostd` in it."""

    def __init__(self, node: Node, *words: str) -> None:
        self.main, sub = pty.openpty()
        termios.tcsetwinsize(self.main, (33, 111))
        self.sub = sub
        self.before = termios.tcgetattr(sub)
        self.process = subprocess.Popen(
            node.inside("setsid", "-c", "-w", sys.executable, "-m", "hostd.cli", *words),
            env=node.environment() | {"TERM": "vt100"}, stdin=sub, stdout=sub, stderr=sub,
        )  # fmt: skip
        self.text = b""

    def type(self, data: bytes) -> None:
        os.write(self.main, data)

    def until(self, wanted: bytes, deadline_s: float = 20.0 * SLOWNESS) -> None:
        end = time.monotonic() + deadline_s
        while wanted not in self.text:
            assert time.monotonic() < end, self.text
            if select.select([self.main], [], [], 0.2)[0]:
                self.text += os.read(self.main, 65536)

    def is_restored(self) -> bool:
        return termios.tcgetattr(self.sub) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.main)
        os.close(self.sub)


@contextlib.contextmanager
def sitting(node: Node, *words: str) -> Iterator[Sitting]:
    made = Sitting(node, *words)
    try:
        yield made
    finally:
        made.close()


def test_a_shell_at_a_terminal(node: Node) -> None:
    with sitting(node, "exec", "-t", "host", "--", "/bin/sh", "-c", "stty size; echo $TERM; exec sh") as here:
        here.until(b"33 111\r\nvt100\r\n")
        here.type(b"sleep 1234\n")
        wait_until("it sleeps", lambda: any(line.startswith("sleep 1234") for line in processes(node)))
        here.type(b"\x03")
        here.type(b"exit 5\n")
        assert here.process.wait(20) == 5
        assert here.is_restored()
        assert b"job control" not in here.text


def test_a_storm_of_resizes_ends_with_the_last_size(node: Node) -> None:
    with sitting(node, "exec", "-t", "host", "--", "/bin/sh", "-c", "echo ready; read line; stty size") as here:
        here.until(b"ready")
        for count in range(300):
            termios.tcsetwinsize(here.main, (20 + count % 50, 60 + count % 90))
        termios.tcsetwinsize(here.main, (44, 155))
        here.type(b"\n")
        here.until(b"44 155")
        assert here.process.wait(20) == 0


def test_control_d_is_end_of_file_and_a_pipe_into_a_terminal_ends_too(node: Node) -> None:
    with sitting(node, "exec", "-t", "host", "--", "/bin/cat") as here:
        here.type(b"typed\n")
        here.until(b"typed\r\ntyped\r\n")
        here.type(b"\x04")
        assert here.process.wait(20) == 0
    code, out, _ = run(node, "-t", "host", "--", "/bin/sh", "-c", "cat; echo after", stdin="piped\n")
    assert (code, "after" in out) == (0, True)


def test_the_terminal_is_given_back_when_hostd_goes(node: Node) -> None:
    with sitting(node, "exec", "-t", "host", "--", "/bin/sh", "-c", "echo ready; sleep 1000") as here:
        here.until(b"ready")
        assert not here.is_restored()
        node.kill_daemon()
        assert here.process.wait(20) == 69
        assert here.is_restored()
    node.up()


def test_a_terminal_that_is_closed_hangs_up(node: Node) -> None:
    with sitting(node, "exec", "-t", "host", "--", "/bin/sh", "-c", "echo ready; sleep 1000") as here:
        here.until(b"ready")


def test_detaching_from_a_job_leaves_it_running(node: Node) -> None:
    with sitting(node, "run", "-t", "--name", "shell", "--", "/bin/sh") as here:
        here.type(b"echo $((6*7))\n")
        here.until(b"42")
        here.type(b"\x10")
        here.type(b"\x11")
        here.until(b"detached")
        assert here.process.wait(20) == 0
        assert here.is_restored()
    assert node.job("shell").status == "running"
    with sitting(node, "attach", "--detach-keys", "ctrl-x", "shell") as here:
        here.type(b"echo $((7*7))\n")
        here.until(b"49")
        here.type(b"\x18")
        assert here.process.wait(20) == 0
    assert node.job("shell").status == "running"
    node.stop("shell")
