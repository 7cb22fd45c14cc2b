"""Processes that outlive their spawner: a new one takes them over, with all they said and how they ended."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import pytest

from discovery.wire.errors import ServiceError
from hostd.errors import JobNotFound, SpawnerUnavailable
from hostd.runtime import adoption, process
from hostd.runtime.process import SCRIPT, Belongings, Spawner, SpawnRequest
from tests.hostd.isolation import DEADLINE_S, HAS_EXIT_INFO, PATH, Isolation, exit_of, gone, read_all, spawner_in

pytestmark = pytest.mark.needs_root


def is_told(status: int | None, wanted: int) -> bool:
    """Tell whether that is how a process ended that the spawner had adopted; before Linux 6.15 it may not know."""
    return status == wanted or (not HAS_EXIT_INFO and status is None)


@pytest.fixture
def isolation(tmp_path: Path) -> Isolation:
    return Isolation(tmp_path / "jobs")


@pytest.fixture
async def spawner(tmp_path: Path) -> AsyncIterator[Spawner]:
    async with spawner_in(tmp_path / "run") as spawner:
        spawner.has_keeper = True
        yield spawner
    assert (tmp_path / "run" / "spawner.log").read_text() == ""


def plain(job_id: str, command: str, **fields: object) -> SpawnRequest:
    settings: dict[str, object] = {"env": {"PATH": PATH}} | fields
    return SpawnRequest(id=job_id, args=("sh", "-c", command), **settings)  # type: ignore[arg-type]


async def kill_spawner(spawner: Spawner) -> int:
    """Kill -9; return when the client has noticed."""
    old = spawner.pid
    os.kill(old, signal.SIGKILL)
    await gone(old)
    async with asyncio.timeout(DEADLINE_S):
        while spawner.is_connected:
            await asyncio.sleep(0.001)
    return old


async def lines_of(fd: int, count: int) -> list[str]:
    def read() -> bytes:
        found = b""
        while found.count(b"\n") < count and (chunk := os.read(fd, 4096)):
            found += chunk
        return found

    return (await asyncio.wait_for(asyncio.to_thread(read), DEADLINE_S)).decode().splitlines()


async def test_a_new_spawner_goes_on_where_the_old_one_was_killed(spawner: Spawner, isolation: Isolation) -> None:
    script = "echo one; read word; echo $word; echo oops >&2; exit 7"
    for fd in await spawner.create_netns("net-1"):
        os.close(fd)
    fds = await spawner.spawn(isolation.request("job", "sh", "-c", script, has_stdin=True, netns="net-1"))
    silent = await spawner.spawn(plain("plain", "exec sleep 60"))
    assert await lines_of(fds.stdout_fd, 1) == ["one"]
    old = await kill_spawner(spawner)
    assert spawner.is_alive("job")
    assert spawner.is_alive("plain")
    held = fds.by_name()
    await spawner.reopen(lambda id: Belongings("net-1", 0, 5.0, held) if id == "job" else Belongings())
    assert spawner.pid != old
    listing = await spawner.listing()
    assert {child.id: (child.pid, child.state) for child in listing.children} == {
        "job": (fds.pid, "running"),
        "plain": (silent.pid, "running"),
    }
    assert listing.netns == ("net-1",)
    for fd in await spawner.open_netns("net-1"):
        os.close(fd)
    await spawner.drop_netns("net-1")
    # another hostd finds it there, stdin and all
    second = await Spawner.open(Path(held_dir(spawner)), may_start=False)
    taken = await second.take("job")
    fds.close()
    os.write(taken.stdin_fd, b"two\n")
    assert await read_all(taken.stdout_fd) == "two\n"
    assert await read_all(taken.stderr_fd) == "oops\n"
    os.close(taken.stdin_fd)
    assert is_told((await exit_of(spawner, "job")).status, 7)
    await second.close()
    assert is_told((await spawner.kill("plain")).status, 137)
    for job_id in ("job", "plain"):
        await spawner.ack(job_id)
    assert (await spawner.listing()).children == ()
    silent.close()


def held_dir(spawner: Spawner) -> str:
    return (Path(f"/proc/{spawner.pid}/cmdline").read_bytes().split(b"\0")[-2]).decode()


@pytest.mark.parametrize(("command", "status"), [("exit 3", 3), ("kill -9 $$", 137)])
async def test_what_ends_while_there_is_no_spawner(spawner: Spawner, command: str, status: int) -> None:
    here, there = os.pipe()
    fds = await spawner.spawn(plain("job", f"read word; {command}", has_stdin=True))
    await kill_spawner(spawner)
    os.write(fds.stdin_fd, b"go\n")
    await gone(fds.pid)
    await spawner.reopen(lambda id: Belongings("", 0, 0, fds.by_name()))
    exited = await exit_of(spawner, "job")
    assert is_told(exited.status, status)
    fds.close()
    os.close(here)
    os.close(there)


async def test_calls_under_way_wait_for_the_new_one_but_nothing_starts_twice(spawner: Spawner) -> None:
    fds = await spawner.spawn(plain("job", "trap 'exit 4' USR1; echo on; while :; do sleep 0.05; done"))
    assert await lines_of(fds.stdout_fd, 1) == ["on"]
    os.kill(spawner.pid, signal.SIGSTOP)
    async with asyncio.TaskGroup() as group:
        signalled = group.create_task(spawner.signal("job", signal.SIGUSR1))
        killed = group.create_task(outcome(spawner.kill("none")))
        spawned = group.create_task(outcome(spawner.spawn(plain("new", "sleep 60"))))
        await asyncio.sleep(0)
        await kill_spawner(spawner)
        await asyncio.sleep(0)
        late = group.create_task(spawner.listing())
        await spawner.reopen(lambda id: Belongings("", 0, 0, fds.by_name()))
        assert isinstance(await killed, JobNotFound)
        assert isinstance(await spawned, SpawnerUnavailable)
        assert [child.id for child in (await late).children] == ["job"]
        await signalled
    assert is_told((await exit_of(spawner, "job")).status, 4)
    fds.close()


async def outcome(call: Awaitable[object]) -> object:
    try:
        return await call
    except ServiceError as error:
        return error


async def test_a_held_back_child_does_not_outlive_the_spawner(spawner: Spawner) -> None:
    fds = await spawner.spawn(plain("held", "exec sleep 60", waits=True))
    await kill_spawner(spawner)
    assert not spawner.is_alive("held")
    await spawner.reopen(lambda id: None)
    assert (await spawner.listing()).children == ()
    fds.close()


async def test_what_has_not_become_its_program_is_known_as_such(spawner: Spawner, isolation: Isolation) -> None:
    run_dir = Path(held_dir(spawner))
    held = await spawner.spawn(isolation.request("held", "sleep", "60", waits=True))
    job = await spawner.spawn(isolation.request("job", "sleep", "60"))
    spawner.has_keeper = False
    adoption.kill_stragglers(Path(f"{run_dir}-of-another-node"))
    assert spawner.is_alive("held")
    os.kill(spawner.pid, signal.SIGSTOP)  # nobody tells the child that it is not needed
    adoption.kill_stragglers(run_dir)
    assert not spawner.is_alive("held")
    assert spawner.is_alive("job")
    await gone(spawner.pid)
    await spawner.close()
    new = await Spawner.open(run_dir)
    os.kill(job.pid, signal.SIGKILL)
    for fds in (held, job):
        fds.close()
    await new.close()


async def test_a_job_is_not_disturbed_while_nobody_reads(spawner: Spawner, isolation: Isolation) -> None:
    """Both are gone: what the job prints waits in its pipes, and whoever comes next finds them."""
    script = "read x; for i in 1 2 3; do echo line $i; echo err $i >&2; done; sleep 0.05; echo last; read y; exit 6"
    fds = await spawner.spawn(isolation.request("job", "sh", "-c", script, has_stdin=True))
    run_dir = Path(held_dir(spawner))
    os.write(fds.stdin_fd, b"x\n")
    os.kill(spawner.pid, signal.SIGKILL)
    await spawner.close()
    keeps_stdin_open = os.dup(fds.stdin_fd)
    fds.close()
    found = adoption.find_job([fds.pid])
    assert found is not None
    assert found.pid == fds.pid
    new = await Spawner.open(run_dir)
    streams = adoption.open_streams(found.pid, ("stdin", "stdout", "stderr"))
    await new.adopt(found, "job", Belongings("", 0, 0, streams))
    taken = await new.take("job")
    for fd in (taken.stdout_fd, taken.stderr_fd):
        os.set_blocking(fd, True)
    assert await lines_of(taken.stdout_fd, 4) == ["line 1", "line 2", "line 3", "last"]
    assert await lines_of(taken.stderr_fd, 3) == ["err 1", "err 2", "err 3"]
    os.close(keeps_stdin_open)
    os.write(taken.stdin_fd, b"y\n")
    status = (await exit_of(new, "job")).status
    assert is_told(status, 6)
    taken.close()
    for fd in streams.values():
        os.close(fd)
    await new.close()


async def test_a_terminal_keeps_its_job_when_the_spawner_is_killed(spawner: Spawner, isolation: Isolation) -> None:
    script = "trap 'echo hangup' HUP; echo ready; read word; echo got $word; exit 5"
    fds = await spawner.spawn(isolation.request("job", "sh", "-c", script, has_tty=True))
    assert "ready" in (await lines_of(fds.pty_fd, 1))[0]
    await kill_spawner(spawner)
    await spawner.reopen(lambda id: Belongings("", 0, 0, fds.by_name()))
    taken = await spawner.take("job")
    fds.close()
    os.write(taken.pty_fd, b"on\n")
    said = await read_all(taken.pty_fd)
    assert "got on" in said
    assert "hangup" not in said
    assert is_told((await exit_of(spawner, "job")).status, 5)


async def test_a_spawner_of_another_version_hands_everything_over(
    tmp_path: Path, isolation: Isolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    for folder in ("hostd/runtime", "netns"):
        shutil.copytree(SCRIPT.parents[2] / folder, other / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "hostd" / "__init__.py").touch()
    script = other / "hostd" / "runtime" / "spawner.py"
    text = script.read_text()
    assert f"\nPROTOCOL = {process.PROTOCOL}\n" in text
    script.write_text(text.replace(f"\nPROTOCOL = {process.PROTOCOL}\n", "\nPROTOCOL = 97\n"))
    with monkeypatch.context() as patch:
        patch.setattr(process, "SCRIPT", script)
        patch.setattr(process, "PROTOCOL", 97)
        old = await Spawner.open(tmp_path / "run")
        ended = await old.spawn(isolation.request("ended", "sh", "-c", "echo last words; exit 3"))
        asks = await old.spawn(isolation.request("asks", "sh", "-c", "read x; echo $x; exit 4", has_stdin=True))
        assert (await exit_of(old, "ended")).status == 3
        await old.close()
    for fds in (ended, asks):
        fds.close()
    async with spawner_in(tmp_path / "run") as new:
        assert new.pid != old.pid
        await gone(old.pid)
        assert {child.id: child.state for child in (await new.listing()).children} == {
            "ended": "exited",
            "asks": "running",
        }
        exited = await exit_of(new, "ended")
        assert (exited.pid, exited.status, exited.at > 0) == (ended.pid, 3, True)
        taken = await new.take("ended")
        assert await read_all(taken.stdout_fd) == "last words\n"
        os.close(taken.stderr_fd)
        taken = await new.take("asks")
        os.write(taken.stdin_fd, b"still here\n")
        assert await read_all(taken.stdout_fd) == "still here\n"
        status = (await exit_of(new, "asks")).status
        assert is_told(status, 4)
        for fd in (taken.stdin_fd, taken.stderr_fd):
            os.close(fd)


def test_only_the_first_process_of_a_namespace_is_a_job() -> None:
    assert adoption.find_job([os.getpid(), 1, 2**30]) is None
    me = Path("/proc/self/cmdline").read_bytes().decode().split("\0")[:-1]
    found = adoption.find_command(me)
    assert found is not None
    assert found.pid == os.getpid()
    os.close(found.pidfd)
    beginning = adoption.find_command(me[:-1])
    assert beginning is not None
    os.close(beginning.pidfd)
    assert adoption.has_command(os.getpid(), me)
    assert not adoption.has_command(os.getpid(), me[:-1])
    assert adoption.find_command([sys.executable, "no such"]) is None
