"""A discovery daemon inside the test's own loop, and one as a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from discovery.daemon import Daemon
from discovery.wire import serve
from discovery.wire.blocking import BlockingCaller
from discovery.wire.errors import ServiceError

DEADLINE_S = 20.0


@asynccontextmanager
async def running(directory: Path, socket: Path | None = None) -> AsyncIterator[Daemon]:
    """Run the daemon's parts in this loop, with its API on a unix socket if one is given."""
    daemon = Daemon.make(directory, "test")
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(daemon.member.run()), tasks.create_task(daemon.leases.run())]
            async with asyncio.timeout(DEADLINE_S):
                await daemon.member.wait_ready()
            try:
                if socket is None:
                    yield daemon
                else:
                    async with serve.listen_unix(daemon.application(), socket, front=daemon.front):
                        yield daemon
            finally:
                for task in running:
                    task.cancel()
    finally:
        daemon.member.close()


Running = Callable[..., AbstractAsyncContextManager[Daemon]]


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    """A daemon whose API answers at `tmp_path/d.sock`."""
    async with running(tmp_path / "state", tmp_path / "d.sock") as daemon:
        yield daemon


@pytest.fixture
def address(daemon: Daemon, tmp_path: Path) -> str:
    del daemon
    return f"unix://{tmp_path / 'd.sock'}"


@dataclass
class Process:
    """`python -m discovery.daemon` over one state folder, to be killed and started at will."""

    directory: Path
    flags: list[str] = field(default_factory=list)
    child: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"unix://{self.directory / 'd.sock'}"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def start(self, *, is_expected_up: bool = True) -> None:
        (self.directory / "d.sock").unlink(missing_ok=True)
        with (self.directory / "log").open("ab") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "discovery.daemon", "--state-dir", str(self.directory / "state"),
                 "--socket", str(self.directory / "d.sock"), *self.flags],
                stderr=log,
                cwd=Path(__file__).parents[2],
                env={**os.environ, "PYTHONWARNINGS": "error"},
            )  # fmt: skip
        if is_expected_up:
            self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                BlockingCaller(self.address, timeout_s=2.0).request("GET", "/ping")
                return
            except ServiceError:
                assert self.child is not None
                assert self.child.poll() is None, self.log
                assert time.monotonic() < deadline, self.log
                time.sleep(0.02)

    def kill(self) -> None:
        assert self.child is not None
        self.child.send_signal(signal.SIGKILL)
        self.child.wait()

    def stop(self) -> int:
        assert self.child is not None
        self.child.terminate()
        return self.child.wait(DEADLINE_S)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path)
    yield process
    if process.child is not None and process.child.poll() is None:
        process.kill()
