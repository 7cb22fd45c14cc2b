"""Draining waits for open connections, not for ever, and gives watchers a moment."""

from __future__ import annotations

import asyncio
import os
import socket
import time

from hostd import drain
from tests.pace import SLOWNESS


def listener() -> socket.socket:
    made = socket.create_server(("127.0.0.1", 0))
    return made


def test_only_established_connections_to_the_port_count() -> None:
    with listener() as server, listener() as other:
        port = server.getsockname()[1]
        assert drain.connections(os.getpid(), [port]) == 0
        with socket.create_connection(("127.0.0.1", port)), socket.create_connection(other.getsockname()):
            accepted, _ = server.accept()
            assert drain.connections(os.getpid(), [port]) == 1
            accepted.close()


def test_a_process_that_is_gone_has_no_connections() -> None:
    assert drain.connections(2**22 + 1, [80]) == 0


def test_only_the_process_that_holds_the_listener_listens() -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as server:
        port = server.getsockname()[1]
        assert drain.listens([os.getpid()], port)
        assert not drain.listens([os.getppid()], port)
        assert not drain.listens([], port)
    assert not drain.listens([os.getpid()], port)


async def test_an_idle_job_still_gets_the_least_time() -> None:
    began = time.monotonic()
    assert await drain.drain(os.getpid(), [1], 5.0) == 0
    assert drain.LEAST_S <= time.monotonic() - began < 2.0 * SLOWNESS


async def test_it_returns_when_the_last_connection_ends() -> None:
    with listener() as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        async with asyncio.timeout(10 * SLOWNESS), asyncio.TaskGroup() as group:
            draining = group.create_task(drain.drain(os.getpid(), [port], 8.0))
            await asyncio.sleep(drain.LEAST_S + 0.2)
            assert not draining.done()
            client.close()
            accepted.close()
        assert draining.result() == 0


async def test_it_gives_up_and_says_how_many_are_left() -> None:
    with listener() as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = server.accept()
            assert await drain.drain(os.getpid(), [port], 0.4) == 1
            accepted.close()
