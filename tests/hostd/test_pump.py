"""Bytes go from pipes to log and clients, and from clients to stdin, whole and in order."""

from __future__ import annotations

import asyncio
import os
import pty
from pathlib import Path

import pytest

from discovery.wire.clock import monotonic_s
from hostd import pump
from hostd.errors import JobNotRunning
from hostd.joblog import JobLog
from hostd.logreader import Reader
from hostd.pump import Input, Output
from hostd.runtime.process import Spawned
from tests.pace import SLOWNESS

DEADLINE_S = 10.0 * SLOWNESS


def texts(log: JobLog) -> list[tuple[int, str]]:
    reader = Reader(log.folder, "j", {})
    found = [(line.stream, line.text) for line in reader.iterate()]
    reader.close()
    return found


async def test_output_goes_to_the_log_and_ends_with_the_pipes(tmp_path: Path) -> None:
    (out_read, out), (err_read, err) = os.pipe(), os.pipe()
    log = JobLog(tmp_path / "j")
    output = Output(Spawned(1, stdout_fd=out_read, stderr_fd=err_read), log)
    os.write(out, b"one\ntwo")
    os.write(err, b"oops\n")
    os.close(out)
    os.close(err)
    async with asyncio.timeout(DEADLINE_S):
        await output.finished.wait()
    assert sorted(texts(log)) == [(1, "one"), (1, "two"), (2, "oops")]
    log.end()


async def test_a_job_that_yields_is_read_slowly_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "SLOW_BYTES_PER_S", 2_000_000)
    out_read, out = os.pipe()
    log = JobLog(tmp_path / "j")
    output = Output(Spawned(1, stdout_fd=out_read), log)
    line = b"x" * 999 + b"\n"

    def print_all() -> None:
        for _ in range(3000):
            os.write(out, line)
        os.close(out)

    output.slow(True)
    began_s = monotonic_s()
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(print_all))
        while log.position < 1_000_000:
            await log.changed.wait()
        assert monotonic_s() - began_s > 0.2  # two pipes full of it wait before
        assert output.is_held_back()
        assert not output.is_held_back()  # nothing more was read since
        output.slow(False)
        assert not output.is_held_back()
        await output.finished.wait()
    assert texts(log) == [(1, "x" * 999)] * 3000
    log.end()


async def test_a_job_that_says_nothing_has_no_log_on_the_disk(tmp_path: Path) -> None:
    out_read, out = os.pipe()
    log = JobLog(tmp_path / "j")
    output = Output(Spawned(1, stdout_fd=out_read), log)
    os.close(out)
    async with asyncio.timeout(DEADLINE_S):
        await output.finished.wait()
    log.end()
    assert not (tmp_path / "j").exists()


async def test_a_last_word_without_an_end_of_line_is_kept_though_the_pipe_is_closed(tmp_path: Path) -> None:
    out_read, out = os.pipe()
    os.write(out, b"x")
    os.close(out)
    log = JobLog(tmp_path / "j")
    output = Output(Spawned(1, stdout_fd=out_read), log)
    async with asyncio.timeout(DEADLINE_S):
        await output.finished.wait()
    assert texts(log) == [(1, "x")]
    log.end()


async def test_a_slow_client_holds_the_job_back_and_loses_nothing(tmp_path: Path) -> None:
    out_read, out = os.pipe()
    output = Output(Spawned(1, stdout_fd=out_read), None)
    block, count = b"x" * 65536, 200

    def print_all() -> None:
        for _ in range(count):
            os.write(out, block)
        os.close(out)

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        with output.listen() as listener:
            group.create_task(asyncio.to_thread(print_all))
            for _ in range(50):  # we do not read: what waits for us must stay bounded
                await asyncio.sleep(0.002)
            assert listener.bytes_waiting < 6 * 1024 * 1024
            received = 0
            async for _, data in listener:
                received += len(data)
    assert received == count * len(block)


async def test_a_client_that_leaves_lets_the_job_go_on(tmp_path: Path) -> None:
    out_read, out = os.pipe()
    output = Output(Spawned(1, stdout_fd=out_read), None)

    def print_all() -> None:
        for _ in range(200):
            os.write(out, b"x" * 65536)
        os.close(out)

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        with output.listen():
            group.create_task(asyncio.to_thread(print_all))
            await asyncio.sleep(0.05)
        await output.finished.wait()


async def test_an_ended_job_is_logged_whole_though_a_client_is_stuck(tmp_path: Path) -> None:
    out_read, out = os.pipe()
    log = JobLog(tmp_path / "j")
    output = Output(Spawned(1, stdout_fd=out_read), log)
    with output.listen() as listener:
        listener.bytes_waiting = 2**30  # a client that has stopped reading
        os.write(out, b"one\n")
        async with asyncio.timeout(DEADLINE_S):
            while not texts(log):
                await asyncio.sleep(0.01)
        os.write(out, b"two\n")
        os.close(out)
        assert not output.finished.is_set()
        output.finish()
        async with asyncio.timeout(DEADLINE_S):
            await output.finished.wait()
    assert texts(log) == [(1, "one"), (1, "two")]
    log.end()


async def test_closing_leaves_what_is_unread_to_the_next_hostd() -> None:
    out_read, out = os.pipe()
    held = os.dup(out_read)  # as the spawner does
    output = Output(Spawned(1, stdout_fd=out_read), None)
    output.close()
    os.write(out, b"later")
    assert os.read(held, 10) == b"later"
    for fd in (out, held):
        os.close(fd)


async def test_stdin_is_written_whole_even_if_the_job_is_slow() -> None:
    in_read, in_write = os.pipe()
    stdin = Input(Spawned(1, stdin_fd=in_write))
    data = os.urandom(300_000)

    def read_all() -> bytes:
        found = b""
        while chunk := os.read(in_read, 4096):
            found += chunk
        return found

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        reading = group.create_task(asyncio.to_thread(read_all))
        await stdin.write(data)
        assert await stdin.end() is True
    assert reading.result() == data
    with pytest.raises(JobNotRunning):
        await stdin.write(b"more")
    os.close(in_read)


async def test_a_job_that_closed_its_stdin_swallows_the_rest() -> None:
    in_read, in_write = os.pipe()
    stdin = Input(Spawned(1, stdin_fd=in_write))
    os.close(in_read)
    async with asyncio.timeout(DEADLINE_S):
        await stdin.write(b"nobody reads this")
    stdin.close()


async def test_a_terminal_is_both_ways_and_has_a_size() -> None:
    master, slave = pty.openpty()
    fds = Spawned(1, pty_fd=master)
    output, stdin = Output(fds, None), Input(fds)
    stdin.resize(30, 100)
    assert os.get_terminal_size(slave) == (100, 30)
    async with asyncio.timeout(DEADLINE_S):
        with output.listen() as listener:
            await stdin.write(b"hi\n")
            assert os.read(slave, 10) == b"hi\n"
            os.write(slave, b"out\n")
            os.close(slave)
            received = b"".join([data async for _, data in listener])
        await output.finished.wait()
    assert received == b"hi\r\nout\r\n"
    stdin.close()
