"""The real HAProxy under a table that changes: routing, hitless changes, its death, taken ports."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from discovery.types import Instance
from discovery.wire.errors import Unavailable
from discovery.wire.serve import listen_tcp
from router.config import Settings
from router.haproxy import Haproxy
from router.table import build
from router.types import Route

pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy (Debian package)")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(directory=tmp_path, http_port=free_port(), https_port=free_port(), bind_address="127.0.0.1")


@pytest.fixture
async def haproxy(settings: Settings) -> AsyncIterator[Haproxy]:
    proxy = Haproxy(settings)
    yield proxy
    await proxy.stop()


@asynccontextmanager
async def backend(answer: str, gate: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[Instance]:
    async def handler(request: web.Request) -> web.Response:
        if gate is not None:
            await gate()
        if request.path == "/headers":
            return web.json_response([[name.lower(), value] for name, value in request.headers.items()])
        return web.Response(text=f"{answer} {request.headers.get('X-Forwarded-Proto')}")

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handler)
    async with listen_tcp(app, "127.0.0.1", 0) as port:
        yield Instance(id=str(port), service=answer, host="127.0.0.1", port=port)


def route(service: str, domain: str, path: str = "/", **more: object) -> Route:
    return Route(id=domain + path, kind="http", service=service, domain=domain, path=path, **more)  # type: ignore[arg-type]


async def get(settings: Settings, host: str, path: str = "/") -> tuple[int, str]:
    url = f"http://127.0.0.1:{settings.http_port}{path}"
    async with aiohttp.ClientSession() as session, session.get(url, headers={"Host": host}) as response:
        return response.status, await response.text()


async def test_requests_go_by_host_then_longest_path_then_wildcard(haproxy: Haproxy, settings: Settings) -> None:
    async with backend("root") as root, backend("api") as api, backend("wild") as wild:
        routes = [
            route("root", "a.test"),
            route("api", "a.test", "/api/"),
            route("wild", "*.b.test"),
        ]
        await haproxy.apply(build(routes, {"root": [root], "api": [api], "wild": [wild]}))
        assert (await get(settings, "a.test"))[1] == "root http"
        assert (await get(settings, "A.TEST:80", "/apix"))[1] == "root http"
        assert (await get(settings, "a.test", "/api"))[1] == "api http"
        assert (await get(settings, "a.test", "/api/v1?x=/"))[1] == "api http"
        assert (await get(settings, "x.b.test"))[1] == "wild http"
        assert (await get(settings, "y.x.b.test", "/deep"))[1] == "wild http"
        assert (await get(settings, "b.test"))[0] == 404
        assert (await get(settings, "a.test.evil"))[0] == 404


async def test_an_unknown_host_and_an_app_without_instances_say_what_to_do(
    haproxy: Haproxy, settings: Settings
) -> None:
    await haproxy.apply(build([route("none", "a.test")], {}))
    status, text = await get(settings, "nobody.test")
    assert (status, "flynn route add http" in text) == (404, True)
    status, text = await get(settings, "a.test")
    assert (status, "flynn ps" in text) == (503, True)


async def test_instances_change_without_a_reload_and_without_a_failed_request(
    haproxy: Haproxy, settings: Settings
) -> None:
    async with backend("one") as first, backend("two") as second:
        web_route = [route("web", "a.test")]
        await haproxy.apply(build(web_route, {"web": [first]}))
        pid = haproxy.pid
        statuses: list[int] = []
        stop = asyncio.Event()

        async def client() -> None:
            while not stop.is_set():
                statuses.append((await get(settings, "a.test"))[0])

        async with asyncio.TaskGroup() as group:
            group.create_task(client())
            for turn in range(10):
                await haproxy.apply(build(web_route, {"web": [second if turn % 2 else first]}))
            await haproxy.apply(build(web_route, {"web": [second]}))
            stop.set()
        assert haproxy.pid == pid
        assert set(statuses) == {200}
        assert {(await get(settings, "a.test"))[1] for _ in range(4)} == {"two http"}
        await haproxy.forget_removed()


async def test_a_reload_under_load_loses_no_request(haproxy: Haproxy, settings: Settings) -> None:
    async with backend("web") as instance:
        await haproxy.apply(build([route("web", "a.test")], {"web": [instance]}))
        statuses: list[int] = []
        stop = asyncio.Event()

        async def client() -> None:
            while not stop.is_set():
                statuses.append((await get(settings, "a.test"))[0])

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(client())
            for number in range(4):
                pid = haproxy.pid
                routes = [route("web", "a.test"), route(f"other{number}", f"n{number}.test")]
                await haproxy.apply(build(routes, {"web": [instance]}))
                assert haproxy.pid != pid
            stop.set()
        assert len(statuses) > 10
        assert set(statuses) == {200}


async def test_rules_for_known_services_come_and_go_without_a_reload(haproxy: Haproxy, settings: Settings) -> None:
    async with backend("one") as one, backend("two") as two:
        instances = {"one": [one], "two": [two]}
        first = [route("one", "a.test"), route("two", "b.test")]
        await haproxy.apply(build(first, instances))
        pid = haproxy.pid
        await haproxy.apply(build([*first, route("two", "a.test", "/api/"), route("one", "c.test")], instances))
        assert [(await get(settings, host, path))[1] for host, path in (("a.test", "/"), ("a.test", "/api/x"))] == [
            "one http",
            "two http",
        ]
        assert (await get(settings, "c.test"))[1] == "one http"
        await haproxy.apply(build([route("two", "a.test"), route("one", "b.test")], instances))
        assert [(await get(settings, host))[1] for host in ("a.test", "b.test")] == ["two http", "one http"]
        assert (await get(settings, "c.test"))[0] == 404
        assert (await get(settings, "a.test", "/api/x"))[1] == "two http"
        assert haproxy.pid == pid
        odd = [route("two", "a.test"), route("one", "b.test"), route("one", "a.test", "/x;set server/")]
        await haproxy.apply(build(odd, instances))
        assert haproxy.pid != pid


async def test_a_request_in_flight_ends_after_its_server_was_removed(haproxy: Haproxy, settings: Settings) -> None:
    arrived, release = asyncio.Event(), asyncio.Event()

    async def gate() -> None:
        arrived.set()
        await release.wait()

    async with backend("slow", gate) as slow:
        await haproxy.apply(build([route("web", "a.test")], {"web": [slow]}))
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(get(settings, "a.test"))
            await asyncio.wait_for(arrived.wait(), 5)
            await haproxy.apply(build([route("web", "a.test")], {}))
            assert (await get(settings, "a.test"))[0] == 503
            release.set()
        assert answer.result()[0] == 200


async def test_after_a_kill_the_next_apply_serves_again(haproxy: Haproxy, settings: Settings) -> None:
    async with backend("web") as instance:
        table = build([route("web", "a.test")], {"web": [instance]})
        await haproxy.apply(table)
        os.kill(haproxy.pid, signal.SIGKILL)
        assert await asyncio.wait_for(haproxy.wait_ended(), 5) == -signal.SIGKILL
        await haproxy.apply(table)
        assert (await get(settings, "a.test"))[0] == 200


async def test_a_taken_port_is_named_and_taken_once_it_is_free(haproxy: Haproxy, settings: Settings) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", settings.http_port))
        holder.listen()
        with pytest.raises(Unavailable, match=str(settings.http_port)):
            await haproxy.apply(build([], {}))
    await haproxy.apply(build([], {}))
    assert (await get(settings, "a.test"))[0] == 404


async def test_tls_shows_the_certificate_of_the_route_by_sni(
    haproxy: Haproxy, settings: Settings, tmp_path: Path
) -> None:
    from router.certs import make_self_signed

    pem_file = tmp_path / "mine.pem"
    make_self_signed(pem_file)
    pem = pem_file.read_text()
    certificate, key = pem.split("-----BEGIN PRIVATE KEY-----")
    async with backend("web") as instance:
        secure = route("web", "a.test", certificate=certificate, private_key="-----BEGIN PRIVATE KEY-----" + key)
        await haproxy.apply(build([secure], {"web": [instance]}))

        def shown(name: str) -> str:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            with socket.create_connection(("127.0.0.1", settings.https_port), 5) as plain:
                with context.wrap_socket(plain, server_hostname=name) as wrapped:
                    return ssl.DER_cert_to_PEM_cert(wrapped.getpeercert(binary_form=True) or b"")

        assert await asyncio.to_thread(shown, "a.test") == certificate
        assert await asyncio.to_thread(shown, "other.test") != certificate
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "certs").iterdir())


async def test_a_certificate_that_no_server_could_use_harms_nobody_else(haproxy: Haproxy, settings: Settings) -> None:
    from router.certs import make_self_signed

    other = settings.directory / "other.pem"
    make_self_signed(other)
    certificate, key = other.read_text().split("-----BEGIN PRIVATE KEY-----")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    broken = [(f"{begin}\nAAAA\n{end}", "x"), ("", "x"), (certificate, "-----BEGIN PRIVATE KEY-----" + key[:60])]
    async with backend("web") as instance:
        routes = [
            route("web", f"n{number}.test", certificate=one or "x", private_key=two)
            for number, (one, two) in enumerate(broken)
        ]
        await haproxy.apply(build([*routes, route("web", "a.test")], {"web": [instance]}))
        assert (await get(settings, "a.test"))[0] == (await get(settings, "n0.test"))[0] == 200


async def test_an_app_learns_of_its_client_from_the_edge_alone(haproxy: Haproxy, settings: Settings) -> None:
    forged = {
        **{"X-Forwarded-For": "6.6.6.6", "X-FORWARDED-HOST": "evil.test", "x-forwarded-proto": "https"},
        **{"X-Forwarded-Prefix": "/evil", "Forwarded": "for=6.6.6.6", "X-Real-IP": "6.6.6.6", "Proxy": "evil.test"},
        **{"X_Forwarded_For": "6.6.6.6", "x_real_ip": "6.6.6.6", "X-Forwarded-Port": "1", "True-Client-IP": "6.6.6.6"},
    }
    async with backend("web") as instance:
        await haproxy.apply(build([route("web", "a.test")], {"web": [instance]}))
        url = f"http://127.0.0.1:{settings.http_port}/headers"
        async with aiohttp.ClientSession() as session:
            async with session.get(url, headers={"Host": "a.test", "X_Mine": "kept", **forged}) as response:
                seen = await response.json()
    assert not [pair for pair in seen if "6.6.6.6" in pair[1] or "evil" in pair[1]]
    told = {name: value for name, value in seen if name.startswith("x-forwarded") or name == "x_mine"}
    assert told == {
        **{"x-forwarded-for": "127.0.0.1", "x-forwarded-host": "a.test", "x-forwarded-proto": "http"},
        **{"x-forwarded-port": str(settings.http_port), "x_mine": "kept"},
    }
    assert len([name for name, _ in seen if name == "x-forwarded-for"]) == 1


@pytest.mark.parametrize(
    "request_text",
    [
        "GET / HTTP/1.1\r\nHost: a.test\r\nHost: b.test\r\n\r\n",
        "GET http://b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked, x\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\n: x\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nX: a\0b\r\n\r\n",
    ],
)
async def test_a_request_that_two_servers_could_read_differently_is_refused(
    haproxy: Haproxy, settings: Settings, request_text: str
) -> None:
    async with backend("web") as instance:
        await haproxy.apply(build([route("web", "a.test"), route("web", "b.test")], {"web": [instance]}))
        reader, writer = await asyncio.open_connection("127.0.0.1", settings.http_port)
        writer.write(request_text.encode())
        assert (await asyncio.wait_for(reader.readline(), 5)).split()[1] in (b"400", b"422", b"501")
        writer.close()


async def test_a_tcp_route_passes_bytes(haproxy: Haproxy, settings: Settings) -> None:
    async with backend("raw") as instance:
        port = free_port()
        await haproxy.apply(build([Route(id="t", kind="tcp", service="raw", port=port)], {"raw": [instance]}))
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/") as response:
            assert await response.text() == "raw None"


async def test_a_sticky_client_stays_with_its_server(haproxy: Haproxy, settings: Settings) -> None:
    async with backend("one") as first, backend("two") as second:
        await haproxy.apply(build([route("web", "a.test", is_sticky=True)], {"web": [first, second]}))
        jar = aiohttp.CookieJar(unsafe=True)
        async with aiohttp.ClientSession(cookie_jar=jar) as session:
            seen = set()
            for _ in range(6):
                url = f"http://127.0.0.1:{settings.http_port}/"
                async with session.get(url, headers={"Host": "a.test"}) as response:
                    seen.add(await response.text())
        assert len(seen) == 1
