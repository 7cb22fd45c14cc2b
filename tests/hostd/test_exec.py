"""A process inside a running job: in everything that is the job's, with no more rights, and not looked into."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from discovery.wire.errors import Conflict
from hostd.errors import JobExists, JobNotFound, LaunchFailed
from hostd.runtime.process import ExecRequest, Spawned, Spawner
from hostd.runtime.seccomp import SeccompCache
from tests.hostd.isolation import PATH, Isolation, exit_of, read_all, run, spawner_in
from tests.hostd.test_spawner import line_of, plain, removed

pytestmark = pytest.mark.needs_root
CAPABILITIES = ("CHOWN", "KILL", "SETUID", "SETGID")


@pytest.fixture
def isolation(tmp_path: Path) -> Isolation:
    return Isolation(tmp_path / "jobs")


@pytest.fixture(params=[True, False], ids=["seed", "copies"])
async def spawner(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Spawner]:
    async with spawner_in(tmp_path / "run", may_have_seed=request.param) as spawner:
        yield spawner
    assert (tmp_path / "run" / "spawner.log").read_text() == ""


@pytest.fixture
async def job(spawner: Spawner, isolation: Isolation) -> AsyncIterator[Spawned]:
    """A job that waits to be killed."""
    fds = await spawner.spawn(isolation.request("job", "sh", "-c", "echo mine > /tmp/mine; echo on; exec sleep 600"))
    assert await line_of(fds.stdout_fd) == "on\n"
    yield fds
    fds.close()


def inside(*args: str, **fields: object) -> ExecRequest:
    settings: dict[str, object] = {"id": "job.exec-1", "job_id": "job", "env": {"PATH": PATH}}
    settings |= {"capabilities": CAPABILITIES} | fields
    return ExecRequest(args=args, **settings)  # type: ignore[arg-type]


async def run_inside(spawner: Spawner, request: ExecRequest) -> tuple[int | None, str, str]:
    fds = await spawner.exec(request)
    out, err = await read_all(fds.stdout_fd), await read_all(fds.stderr_fd)
    status = (await exit_of(spawner, request.id)).status
    await spawner.ack(request.id)
    return status, out, err


async def test_it_is_in_all_namespaces_and_in_the_root_of_the_job(spawner: Spawner, job: Spawned) -> None:
    names = ("mnt", "pid", "net", "uts", "ipc", "cgroup", "user")
    script = f"cd /proc/self/ns; readlink {' '.join(names)}; hostname; cat /tmp/mine; pwd; ps -e -o comm="
    status, out, err = await run_inside(spawner, inside("sh", "-c", script, working_dir="/tmp"))
    assert (status, err) == (0, "")
    theirs = [os.readlink(f"/proc/{job.pid}/ns/{name}") for name in names]
    assert out.split("\n")[:7] == theirs
    words = out.split()[7:]
    assert words[:2] == ["job", "mine"]
    assert {".hostd-init", "sleep", "ps"} <= set(words)


async def test_it_starts_where_it_was_told_and_with_nothing_of_ours_open(spawner: Spawner, job: Spawned) -> None:
    assert (await run_inside(spawner, inside("pwd", working_dir="/tmp")))[1] == "/tmp\n"
    _, out, _ = await run_inside(spawner, inside("ls", "/proc/self/fd"))
    assert out.split() == ["0", "1", "2", "3"]  # the last is ls's own
    _, out, _ = await run_inside(spawner, inside("env"))
    assert out == f"PATH={PATH}\n"


async def test_its_rights_are_as_limited_as_the_jobs(spawner: Spawner, job: Spawned, tmp_path: Path) -> None:
    seccomp = str(SeccompCache(tmp_path / "seccomp").path_for(CAPABILITIES))
    request = inside("cat", "/proc/self/status", "/proc/self/limits", seccomp_path=seccomp, rlimits={"NOFILE": 123})
    _, out, _ = await run_inside(spawner, request)
    facts = dict(line.split(":\t", 1) for line in out.splitlines() if ":\t" in line)
    allowed = f"{1 << 0 | 1 << 5 | 1 << 6 | 1 << 7:016x}"
    assert [facts[name] for name in ("CapPrm", "CapEff", "CapBnd")] == [allowed] * 3
    assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
    assert facts["SigIgn"] == facts["SigBlk"] == "0" * 16
    assert [line.split()[3:5] for line in out.splitlines() if line.startswith("Max open files")] == [["123", "123"]]
    _, out, _ = await run_inside(spawner, inside("id", uid=12, gid=34))
    assert out == "uid=12 gid=34 groups=34\n"


async def test_it_may_have_a_terminal_and_stdin(spawner: Spawner, job: Spawned) -> None:
    fds = await spawner.exec(inside("sh", "-c", "tty; stty size; read x; echo got $x", has_tty=True, rows=7, columns=9))
    first = await line_of(fds.pty_fd)
    os.write(fds.pty_fd, b"word\n")
    out = first + await read_all(fds.pty_fd)
    assert "/dev/pts/0" in out
    assert "7 9" in out
    assert "got word" in out
    assert (await exit_of(spawner, "job.exec-1")).status == 0
    await spawner.ack("job.exec-1")
    fds = await spawner.exec(inside("cat", has_stdin=True))
    os.write(fds.stdin_fd, b"through\n")
    assert await line_of(fds.stdout_fd) == "through\n"
    await spawner.close_stdin("job.exec-1")
    os.close(fds.stdin_fd)
    assert (await exit_of(spawner, "job.exec-1")).status == 0
    Spawned(0, fds.stdout_fd, fds.stderr_fd).close()


async def test_it_ends_by_itself_by_a_signal_or_with_the_job(spawner: Spawner, job: Spawned) -> None:
    assert (await run_inside(spawner, inside("sh", "-c", "exit 3")))[0] == 3
    first = await spawner.exec(inside("sleep", "600"))
    await spawner.signal("job.exec-1", signal.SIGTERM)
    assert (await exit_of(spawner, "job.exec-1")).status == 128 + signal.SIGTERM
    second = await spawner.exec(inside("sleep", "600", id="job.exec-2"))
    listed = {child.id: child.job_id for child in (await spawner.listing()).children}
    assert listed == {"job": "", "job.exec-1": "job", "job.exec-2": "job"}
    await spawner.kill("job")
    assert (await exit_of(spawner, "job.exec-2")).status == 128 + signal.SIGKILL
    first.close()
    second.close()


async def test_it_is_counted_in_the_cgroup_that_it_is_given(spawner: Spawner, job: Spawned) -> None:
    root = Path("/sys/fs/cgroup/pids")
    group = (root if root.is_dir() else root.parent) / f"hostd-test-exec-{os.getpid()}"
    group.mkdir()
    try:
        fds = await spawner.exec(inside("sleep", "600", cgroup_procs=(str(group / "cgroup.procs"),)))
        assert (group / "cgroup.procs").read_text().split() == [str(fds.pid)]
        await spawner.kill("job.exec-1")
        fds.close()
    finally:
        await removed(group)


async def test_what_cannot_be_is_refused(spawner: Spawner, job: Spawned, isolation: Isolation) -> None:
    with pytest.raises(JobNotFound):
        await spawner.exec(inside("true", job_id="nobody"))
    with pytest.raises(JobExists):
        await spawner.exec(inside("true", id="job"))
    with pytest.raises(LaunchFailed) as caught:
        await spawner.exec(inside("no-such-thing"))
    assert caught.value.message == 'exec: "no-such-thing": executable file not found in $PATH'
    held = await spawner.spawn(isolation.request("held", "true", waits=True))
    with pytest.raises(Conflict):
        await spawner.exec(inside("true", job_id="held"))
    await spawner.kill("held")
    with pytest.raises(Conflict):
        await spawner.exec(inside("true", job_id="held"))
    held.close()
    # and the spawner is where it was
    assert os.readlink(f"/proc/{spawner.pid}/ns/pid_for_children") == os.readlink("/proc/self/ns/pid")
    assert (await run(spawner, plain("after", "echo $$")))[1].strip() != "2"


async def test_a_jobs_root_cannot_look_into_what_enters(spawner: Spawner, job: Spawned) -> None:
    """The one that enters is a copy of the spawner until its program runs: here it is held back at that point."""
    held = await spawner.exec(inside("true", waits=True))
    pids = f"/proc/{held.pid}/status"
    inner = next(line for line in Path(pids).read_text().splitlines() if line.startswith("NSpid")).split()[-1]
    script = """
import ctypes, os, sys
pid = int(sys.argv[1])
os.kill(pid, 0)  # it is there
def attempt(name, act):
    try:
        act()
    except OSError as error:
        print(name, error.errno)
    else:
        print(name, "OK")
for name in ("mem", "environ", "maps", "auxv", "map_files", "fdinfo"):
    path = f"/proc/{pid}/{name}"
    attempt(name, lambda: os.listdir(path) if name in ("map_files", "fdinfo") else open(path, "rb").read(1))
for name in ("exe", "cwd", "root", "fd/0", "ns/mnt"):
    attempt(name, lambda: os.open(f"/proc/{pid}/{name}", os.O_PATH))
    attempt(name, lambda: os.readlink(f"/proc/{pid}/{name}"))
libc = ctypes.CDLL(None, use_errno=True)
def attach():
    if libc.ptrace(0x4206, pid, 0, 0):
        raise OSError(ctypes.get_errno(), "seize")
attempt("ptrace", attach)
def pidfd_getfd():
    if libc.syscall(438, os.pidfd_open(pid), 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "getfd")
attempt("pidfd_getfd", pidfd_getfd)
"""
    request = inside("/usr/bin/python3", "-Ic", script, inner, id="job.exec-2")
    status, out, err = await run_inside(spawner, request)
    assert (status, err) == (0, "")
    found = [line.split() for line in out.splitlines()]
    assert len(found) >= 18
    assert [name for name, result in found if result == "OK"] == []
    await spawner.kill("job.exec-1")
    held.close()
