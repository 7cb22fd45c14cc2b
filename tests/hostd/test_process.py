"""The spawner's client: many calls at once, deadlines, lost connections, fds that nobody takes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from discovery.wire.errors import DeadlineExceeded, Internal
from hostd.errors import JobExists, JobNotFound, LaunchFailed, SpawnerUnavailable
from hostd.runtime.process import Exited, ProcessStep, Spawner, SpawnRequest
from tests.hostd.isolation import DEADLINE_S, PATH, exit_of, read_all, run, spawner_in

NOBODY = 2**30
"""A pid that no process has."""

needs_root = pytest.mark.needs_root


@pytest.fixture
async def spawner(tmp_path: Path) -> AsyncIterator[Spawner]:
    async with spawner_in(tmp_path / "run") as spawner:
        yield spawner


def plain(job_id: str, *args: str, **fields: object) -> SpawnRequest:
    settings: dict[str, object] = {"env": {"PATH": PATH}} | fields
    return SpawnRequest(id=job_id, args=args, **settings)  # type: ignore[arg-type]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


class FakeSpawner:
    """The other end of a client's socket, played by the test."""

    def __init__(self) -> None:
        near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.far.setblocking(False)
        self.client = Spawner(near)

    async def receive(self) -> dict[str, object]:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE_S):
            size = int.from_bytes(await loop.sock_recv(self.far, 4), "big")
            body = await loop.sock_recv(self.far, size)
        decoded: dict[str, object] = msgspec.json.decode(body)
        return decoded

    def send(self, message: dict[str, object], fds: list[int] | None = None) -> None:
        body = msgspec.json.encode(message)
        socket.send_fds(self.far, [len(body).to_bytes(4, "big") + body], fds or [])

    async def close(self) -> None:
        await self.client.close()
        self.far.close()


@pytest.fixture
async def fake() -> AsyncIterator[FakeSpawner]:
    fake = FakeSpawner()
    yield fake
    await fake.close()


async def test_an_answer_that_does_not_come_in_time(fake: FakeSpawner) -> None:
    with pytest.raises(DeadlineExceeded, match=r"spawn within 0.05 s"):
        await fake.client.spawn(plain("job", "true"), timeout_s=0.05)


async def test_fds_that_nobody_waits_for_any_more_are_closed(fake: FakeSpawner) -> None:
    with pytest.raises(DeadlineExceeded):
        await fake.client.spawn(plain("late", "true"), timeout_s=0.05)
    request = await fake.receive()
    before = open_fds()
    here, there = os.pipe()
    fake.send({"n": request["n"], "pid": NOBODY, "streams": ["stdout"], "fds": 1}, [here])
    os.close(here)
    os.close(there)
    async with asyncio.TaskGroup() as group:  # a later call still gets its own answer and fds
        asked = group.create_task(fake.client.take("other"))
        request = await fake.receive()
        here, there = os.pipe()
        fake.send({"n": request["n"], "pid": NOBODY, "streams": ["stderr"], "fds": 1}, [there])
        os.close(there)
    fds = asked.result()
    assert fds.pid == NOBODY
    os.write(fds.stderr_fd, b"x")
    assert os.read(here, 1) == b"x"
    os.close(here)
    fds.close()
    assert open_fds() == before


async def test_a_cancelled_call_leaks_nothing(fake: FakeSpawner) -> None:
    before = open_fds()
    task: asyncio.Task[object]
    async with asyncio.TaskGroup() as group:
        task = group.create_task(fake.client.take("job"))
        request = await fake.receive()
        here, there = os.pipe()
        fake.send({"n": request["n"], "pid": NOBODY, "streams": ["stdout"], "fds": 1}, [here])
        os.close(here)
        os.close(there)
        asyncio.get_running_loop().call_soon(task.cancel)
    assert task.cancelled() or task.done()
    if not task.cancelled():
        task.result().close()  # type: ignore[attr-defined]
    assert open_fds() == before


async def test_answers_in_pieces_and_out_of_order(fake: FakeSpawner) -> None:
    async with asyncio.TaskGroup() as group:
        first = group.create_task(fake.client.kill("a"))
        one = await fake.receive()
        second = group.create_task(fake.client.kill("b"))
        two = await fake.receive()
        body = b""
        for request in (two, one):
            text = msgspec.json.encode({"n": request["n"], "id": request["id"], "pid": 1, "status": 0, "at": 1.5})
            body += len(text).to_bytes(4, "big") + text
        for index in range(len(body)):
            fake.far.send(body[index : index + 1])
            await asyncio.sleep(0)
    assert (first.result().id, second.result().id) == ("a", "b")


async def test_a_lost_spawner_ends_every_call_and_watch(fake: FakeSpawner) -> None:
    async def watch() -> None:
        async for _ in fake.client.exits():
            pass

    async with asyncio.TaskGroup() as group:
        call = group.create_task(asyncio.wait_for(_refused(fake.client.listing()), DEADLINE_S))
        watching = group.create_task(asyncio.wait_for(_refused(watch()), DEADLINE_S))
        await fake.receive()
        await fake.receive()
        fake.far.close()
    assert call.result() == watching.result() == "SpawnerUnavailable"
    assert not fake.client.is_connected
    assert await _refused(fake.client.ack("x")) == "SpawnerUnavailable"


async def _refused(call: object) -> str:
    try:
        await call  # type: ignore[misc]
    except SpawnerUnavailable as error:
        return type(error).__name__
    return "nothing"


async def test_refusals_become_our_errors(fake: FakeSpawner) -> None:
    cases: list[tuple[dict[str, object], type[Exception]]] = [
        ({"code": "not_found", "message": "m"}, JobNotFound),
        ({"code": "exists", "message": "m"}, JobExists),
        ({"code": "step", "message": "m", "step": "exec", "errno": 2}, LaunchFailed),
        ({"code": "kernel", "message": "m", "errno": 24, "syscall": "clone3"}, LaunchFailed),
        ({"code": "news", "message": "m"}, Internal),
    ]
    for error, expected in cases:
        call = asyncio.ensure_future(fake.client.take("x"))
        request = await fake.receive()
        fake.send({"n": request["n"], "error": error})
        with pytest.raises(expected):
            await asyncio.wait_for(call, DEADLINE_S)


async def test_no_spawner_and_no_leave_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(SpawnerUnavailable):
        await Spawner.open(tmp_path, may_start=False)


@needs_root
async def test_a_spawner_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "spawner.log").mkdir()
    with pytest.raises(SpawnerUnavailable, match=r"did not start[\s\S]*spawner\.log"):
        await Spawner.open(tmp_path)


@needs_root
async def test_a_spawner_of_before_jobs_outlived_it_is_refused(
    spawner: Spawner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("hostd.runtime.process.PROTOCOL", 99)
    monkeypatch.setattr("hostd.runtime.process._OUTLIVED_SINCE", 98)
    with pytest.raises(SpawnerUnavailable, match=r"speaks protocol \d+, we speak 99"):
        await Spawner.open(tmp_path / "run")


@needs_root
async def test_it_is_not_our_child_and_not_of_our_session(spawner: Spawner) -> None:
    stat = Path(f"/proc/{spawner.pid}/stat").read_text().rsplit(")", 1)[1].split()
    parent, session = int(stat[1]), int(stat[3])
    assert parent != os.getpid()
    assert session == spawner.pid
    assert Path(f"/proc/{spawner.pid}/cwd").readlink() == Path("/")


@needs_root
async def test_many_at_once_each_get_their_own_answer(spawner: Spawner) -> None:
    async def one(number: int) -> None:
        fds = await spawner.spawn(plain(f"job{number}", "sh", "-c", f"echo {number}; exit {number}"))
        assert await read_all(fds.stdout_fd) == f"{number}\n"
        os.close(fds.stderr_fd)
        assert (await exit_of(spawner, f"job{number}")).status == number
        await spawner.ack(f"job{number}")

    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(one(number))
    assert (await spawner.listing()).children == ()


@needs_root
async def test_a_large_request_gets_through(spawner: Spawner) -> None:
    env = {"PATH": PATH} | {f"V{number}": "x" * 100_000 for number in range(15)}
    status, out, _ = await run(spawner, plain("big", "sh", "-c", "echo ${#V14}", env=env))
    assert (status, out) == (0, "100000\n")


@needs_root
async def test_ends_are_told_until_they_are_acked_and_once_to_each_watcher(spawner: Spawner) -> None:
    async def collect(count: int) -> list[str]:
        found: list[Exited] = []
        async for exited in spawner.exits():
            found.append(exited)
            if len(found) == count:
                break
        return sorted(exited.id for exited in found)

    for name in ("a", "b"):
        (await spawner.spawn(plain(name, "true"))).close()
        await exit_of(spawner, name)
    assert await asyncio.wait_for(collect(2), DEADLINE_S) == ["a", "b"]
    await spawner.ack("a")
    async with asyncio.TaskGroup() as group:
        watchers = [group.create_task(asyncio.wait_for(collect(2), DEADLINE_S)) for _ in range(3)]
        (await spawner.spawn(plain("c", "sleep", "0.1"))).close()
    assert [watcher.result() for watcher in watchers] == [["b", "c"]] * 3


@needs_root
async def test_an_id_is_taken_until_it_is_acked(spawner: Spawner) -> None:
    (await spawner.spawn(plain("job", "true"))).close()
    await exit_of(spawner, "job")
    with pytest.raises(JobExists):
        await spawner.spawn(plain("job", "true"))
    await spawner.ack("job")
    await spawner.ack("job")
    assert (await run(spawner, plain("job", "true")))[0] == 0
    with pytest.raises(JobNotFound):
        await spawner.take("job")


@needs_root
async def test_a_client_that_does_not_read_does_not_stop_the_others(spawner: Spawner, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as lazy:
        lazy.connect(str(tmp_path / "run" / "spawner.sock"))
        body = b'{"n":1,"op":"list"}'
        lazy.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                lazy.send((len(body).to_bytes(4, "big") + body) * 1000)
        assert (await run(spawner, plain("job", "echo", "fine")))[1] == "fine\n"


@needs_root
async def test_the_step_undone_twice_or_never_done(spawner: Spawner) -> None:
    step = ProcessStep(spawner)
    await step.undo("never")
    await step.discard("never")
    fds = await step.apply(plain("job", "sleep", "60"))
    await step.undo("job")
    await step.undo("job")
    assert [child.status for child in (await spawner.listing()).children] == [137]
    await step.discard("job")
    assert (await spawner.listing()).children == ()
    fds.close()


@needs_root
async def test_an_end_that_was_told_is_known_until_it_is_acked(spawner: Spawner) -> None:
    (await spawner.spawn(plain("job", "true"))).close()
    assert (await exit_of(spawner, "job")).status == 0
    (await spawner.spawn(plain("other", "sleep", "60"))).close()
    async with asyncio.timeout(DEADLINE_S), contextlib.aclosing(spawner.exits()) as exits:  # type: ignore[type-var]
        await spawner.kill("other")
        async for exited in exits:
            if exited.id == "other":
                break
    step = ProcessStep(spawner)
    await step.undo("other")
    await spawner.ack("other")
    assert not spawner.has_ended("other")
    again = await spawner.spawn(plain("other", "sleep", "60"))
    assert not spawner.has_ended("other")
    await step.discard("other")  # a new process of the same id is killed, not taken for the old one
    assert [child.id for child in (await spawner.listing()).children] == ["job"]
    again.close()
