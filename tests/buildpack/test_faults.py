"""The daemons as processes of their own: killed in the middle, on disks that become full."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from buildpack.build import COMPILE
from discovery.wire.serve import listen_tcp
from tests.buildpack.conftest import BLOBSTORE_KEY, DEADLINE_S, Server
from tests.buildpack.fakes import REPOSITORY, FakeController

SLOW = [sys.executable, "-c", "import time; print('working', flush=True); time.sleep(99)"]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert isinstance(port, int)
        return port


class Daemons:
    """Starts our daemons against one fake controller; everything ends with the test."""

    def __init__(self, scratch: Path, host_key: str, controller: FakeController, controller_port: int) -> None:
        self.scratch = scratch
        self._controller_port = controller_port
        self._stack = AsyncExitStack()
        self._host_key = host_key
        self.server = Server(
            _free_port(), controller, scratch / "repos", scratch / "blobs", scratch, blobstore_port=_free_port()
        )

    async def start(self, name: str, *, disk_kib: int = 0, **more: str) -> asyncio.subprocess.Process:
        """Start `receive` or `blobstore`; with `disk_kib` its data lies on a tmpfs in its own mount namespace."""
        server = self.server
        port, data = {
            "receive": (server.port, server.data),
            "blobstore": (server.blobstore_port, server.blobs),
        }[name]
        data.mkdir(exist_ok=True)
        command = [sys.executable, "-m", f"buildpack.{name}"]
        if disk_kib:
            mount = f'mount -t tmpfs -o size={disk_kib}k t "$0" && exec "$@"'
            command = ["unshare", "-m", "sh", "-c", mount, str(data), *command]
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "PORT": str(port),
            "SSH_PRIVATE_KEYS": self._host_key,
            "CONTROLLER_URL": f"http://127.0.0.1:{self._controller_port}",
            "CONTROLLER_KEY": "key",
            "BLOBSTORE_URL": f"http://127.0.0.1:{server.blobstore_port}",
            "BLOBSTORE_KEY": BLOBSTORE_KEY,
            "BLOBSTORE_DATA": str(server.blobs),
            "BLOBSTORE_RESERVE_MIB": "0",
            "GIT_DATA": str(server.data),
            "GIT_RESERVE_MIB": "0",
            "BUILD_ARTIFACT": "build",
            "STACK_ARTIFACT": "stack",
            **more,
        }
        process = await asyncio.create_subprocess_exec(*command, env=environment, cwd="/", start_new_session=True)
        self._stack.push_async_callback(_stop, process)
        async with asyncio.timeout(DEADLINE_S):
            while not await _answers(port):
                assert process.returncode is None, f"{name} ended with {process.returncode}"
                await asyncio.sleep(0.05)
        return process

    async def close(self) -> None:
        await self._stack.aclose()


async def _answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    async with asyncio.timeout(DEADLINE_S):
        await process.wait()


@asynccontextmanager
async def _running(scratch: Path, host_key: str) -> AsyncIterator[Daemons]:
    controller = FakeController(scratch / "jobs")
    async with asyncio.TaskGroup() as controller.tasks:
        async with listen_tcp(controller.application(), "127.0.0.1", 0) as port:
            daemons = Daemons(scratch, host_key, controller, port)
            try:
                yield daemons
            finally:
                for id in controller.jobs:
                    controller.kill(id)
                await daemons.close()


@pytest.fixture
async def daemons(tmp_path: Path, host_key: str) -> AsyncIterator[Daemons]:
    async with _running(tmp_path, host_key) as daemons:
        yield daemons


def _noise(size_bytes: int) -> str:
    return random.Random(1).randbytes(size_bytes // 2).hex()


async def test_git_receive_killed_in_the_middle_of_a_build_comes_back(daemons: Daemons) -> None:
    server = daemons.server
    server.controller.add_app("example")
    server.controller.command = lambda new: SLOW
    await daemons.start("blobstore")
    receive = await daemons.start("receive")
    git = server.git()
    await git.commit({"index.html": "x"})
    process = await git.start("push", server.url("example"), "master")
    async with asyncio.timeout(DEADLINE_S):
        while not (server.controller.jobs and server.controller.jobs["job-0"].lines):
            await asyncio.sleep(0.02)
    os.killpg(receive.pid, signal.SIGKILL)
    out, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode != 0, out.decode()
    assert server.controller.jobs["job-0"].job.args == COMPILE

    server.controller.command = lambda new: [sys.executable, *new.args[1:]]
    await daemons.start("receive")
    assert not list(server.data.rglob("*incoming*"))
    pushed = await git("push", server.url("example"), "master")
    assert pushed.status == 0, pushed.text
    assert server.controller.stopped == ["job-0"]


async def test_daemons_end_at_once_when_told(daemons: Daemons) -> None:
    server = daemons.server
    server.controller.add_app("example")
    server.controller.command = lambda new: SLOW
    store = await daemons.start("blobstore")
    receive = await daemons.start("receive")
    git = server.git()
    await git.commit({"index.html": "x"})
    process = await git.start("push", server.url("example"), "master")
    async with asyncio.timeout(DEADLINE_S):
        while not (server.controller.jobs and server.controller.jobs["job-0"].lines):
            await asyncio.sleep(0.02)
    receive.terminate()
    assert await asyncio.wait_for(receive.wait(), 10) == 0
    await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert server.controller.stopped == ["job-0"]
    store.terminate()
    assert await asyncio.wait_for(store.wait(), 10) == 0


@pytest.mark.needs_root
async def test_a_full_blob_store_is_told_to_the_pusher_and_works_again_afterwards(daemons: Daemons) -> None:
    server = daemons.server
    server.controller.add_app("example")
    await daemons.start("blobstore", disk_kib=2048)
    await daemons.start("receive")
    git = server.git()
    await git.commit({"index.html": "x", "noise": _noise(6_000_000)})
    pushed = await git("push", server.url("example"), "master")
    assert pushed.status != 0
    assert "the blob store's disk is full" in pushed.text
    assert "free space on the host, then push again" in pushed.text
    assert (await git("rm", "-q", "noise")).status == 0
    await git.commit({"index.html": "y"})
    pushed = await git("push", server.url("example"), "master")
    assert pushed.status == 0, pushed.text


@pytest.mark.needs_root
async def test_a_full_disk_of_the_git_server_is_told_to_the_pusher(daemons: Daemons) -> None:
    server = daemons.server
    server.controller.add_app("example")
    await daemons.start("blobstore")
    receive = await daemons.start("receive", disk_kib=2048)
    git = server.git()
    await git.commit({"index.html": "x", "noise": _noise(8_000_000)})
    pushed = await git("push", server.url("example"), "master")
    assert pushed.status != 0
    assert "No space left on device" in pushed.text
    assert server.controller.jobs == {}
    receive.terminate()
    await receive.wait()
    await daemons.start("receive", disk_kib=2048, GIT_RESERVE_MIB="256")
    pushed = await git("push", server.url("example"), "master")
    assert pushed.status != 0
    assert "remote error: the disk of the git server is full (" in pushed.text
