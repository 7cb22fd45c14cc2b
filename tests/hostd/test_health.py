"""A port is announced when it serves and taken back when it has failed often enough, by real connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from discovery.types import Instance
from discovery.wire import serve
from hostd.health import PortWatch, probe
from hostd.types import HealthCheck
from tests.pace import SLOWNESS

QUICK = HealthCheck(interval_s=0.1, timeout_s=0.5, start_timeout_s=0.2)


class Announced:
    """A registry in memory."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def want(self, instance: Instance) -> None:
        self.found.add(instance.id)

    async def register(self, instance: Instance) -> None:
        self.found.add(instance.id)

    async def deregister(self, service: str, instance_id: str, *, timeout_s: float = 2.0) -> None:
        self.found.discard(instance_id)


@asynccontextmanager
async def server(port: int = 0, status: Callable[[], int] = lambda: 200) -> AsyncIterator[int]:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status())

    app = web.Application()
    app.router.add_get("/health", answer)
    async with serve.listen_tcp(app, "127.0.0.1", port) as bound:
        yield bound


@pytest.mark.parametrize(("status", "is_fine"), [(200, True), (204, True), (302, True), (404, False), (500, False)])
async def test_http_wants_a_status_below_400(status: int, is_fine: bool) -> None:
    async with server(status=lambda: status) as port:
        problem = await probe("127.0.0.1", port, HealthCheck(kind="http", path="/health"))
    assert (problem == "") is is_fine
    assert is_fine or str(status) in problem


async def test_a_closed_port_is_a_problem_with_a_reason() -> None:
    async with server() as port:
        assert await probe("127.0.0.1", port, QUICK) == ""
    assert await probe("127.0.0.1", port, QUICK) != ""


async def test_a_server_that_never_answers_is_a_problem_after_the_timeout() -> None:
    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)
        writer.close()

    silent_server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = silent_server.sockets[0].getsockname()[1]
    check = HealthCheck(kind="http", timeout_s=0.2)
    assert await probe("127.0.0.1", port, check) == "no answer in 0.2 s"
    silent_server.close()


async def test_a_port_comes_up_goes_down_and_comes_up_again() -> None:
    registry = Announced()
    changes: asyncio.Queue[tuple[bool, str]] = asyncio.Queue()
    async with server() as port:
        pass  # now the number is free, and known
    watch = PortWatch(
        host="127.0.0.1",
        port=port,
        check=QUICK,
        instance=Instance(id="h-1", service="s", host="127.0.0.1", port=port),
        registry=registry,
        on_change=lambda is_up, why: changes.put_nowait((is_up, why)),
    )
    async with asyncio.timeout(15 * SLOWNESS), asyncio.TaskGroup() as group:
        watching = group.create_task(watch.run())
        is_up, why = await changes.get()
        assert not is_up
        assert "not up after 0.2 s" in why
        for _ in range(2):
            async with server(port):
                assert await changes.get() == (True, "")
                assert registry.found == {"h-1"}
            is_up, why = await changes.get()
            assert not is_up
            assert why
            assert registry.found == set()
        watching.cancel()


async def test_a_port_without_a_check_is_announced_at_once() -> None:
    registry = Announced()
    changes: list[bool] = []
    watch = PortWatch(
        host="127.0.0.1",
        port=9,
        check=HealthCheck(kind="none"),
        instance=Instance(id="h-9", service="s", host="127.0.0.1", port=9),
        registry=registry,
        on_change=lambda is_up, _: changes.append(is_up),
    )
    await watch.run()
    assert (registry.found, changes) == ({"h-9"}, [True])
