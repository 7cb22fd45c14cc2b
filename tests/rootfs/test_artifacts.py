"""Fetching: what arrives is what was promised, or nothing is kept."""

import hashlib
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rootfs.artifacts import Artifacts
from rootfs.errors import BlobMismatch, BlobMissing, FetchFailed, NameInvalid
from rootfs.store import Store

CONTENT = os.urandom(3_000_000)
DIGEST = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """A real HTTP server whose answers a test chooses."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.handler: Handler = self.whole
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/blob"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request.path)
        return await self.handler(request)

    async def whole(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=CONTENT)

    async def broken_off(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(CONTENT))})
        await response.prepare(request)
        await response.write(CONTENT[:100_000])
        assert request.transport is not None
        request.transport.abort()
        return response

    async def failing_once(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=503) if len(self.requests) == 1 else await self.whole(request)

    async def endless(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(100_000))

    async def missing(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=404)

    async def elsewhere(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    found = Server()
    app = web.Application()
    app.router.add_get("/{path:.*}", found.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.port = runner.addresses[0][1]
    yield found
    await runner.cleanup()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "images")


def leftovers(store: Store) -> list[Path]:
    return list(store.blobs.iterdir()) if store.blobs.exists() else []


async def test_blob_is_fetched_once(server: Server, store: Store) -> None:
    artifacts = Artifacts(store)
    for _ in range(2):
        path = await artifacts.fetch(server.url, DIGEST, len(CONTENT))
        assert path.read_bytes() == CONTENT
    assert len(server.requests) == 1


async def test_service_names_are_resolved_and_a_dead_address_passed_over(server: Server, store: Store) -> None:
    async def resolve(service: str) -> list[tuple[str, int]]:
        assert service == "blobstore"
        return [("127.0.0.1", 1), ("127.0.0.1", server.port)]

    await Artifacts(store, resolve=resolve).fetch("http://blobstore.discoverd/sha256/x", DIGEST)
    assert server.requests == ["/sha256/x"]


async def test_connection_that_breaks_is_tried_again_and_then_told(server: Server, store: Store) -> None:
    server.handler = server.broken_off
    with pytest.raises(FetchFailed):
        await Artifacts(store).fetch(server.url, DIGEST, len(CONTENT))
    assert len(server.requests) == 3
    assert leftovers(store) == []


async def test_busy_server_is_asked_again(server: Server, store: Store) -> None:
    server.handler = server.failing_once
    assert (await Artifacts(store).fetch(server.url, DIGEST)).exists()


async def test_other_bytes_are_refused_at_once(server: Server, store: Store) -> None:
    with pytest.raises(BlobMismatch):
        await Artifacts(store).fetch(server.url, "sha256:" + "0" * 64)
    assert len(server.requests) == 1
    assert leftovers(store) == []


async def test_endless_answer_ends_at_the_promised_size(server: Server, store: Store) -> None:
    server.handler = server.endless
    with pytest.raises(BlobMismatch):
        await Artifacts(store).fetch(server.url, DIGEST, 1_000_000)
    assert leftovers(store) == []


async def test_missing_blob_and_redirects_are_not_retried(server: Server, store: Store) -> None:
    for handler in (server.missing, server.elsewhere):
        server.handler = handler
        server.requests.clear()
        with pytest.raises(BlobMissing):
            await Artifacts(store).fetch(server.url, DIGEST)
        assert len(server.requests) == 1


@pytest.mark.parametrize("url", ["", "ftp://x/y", "file:///etc/passwd", "http://", "http://[::1", "blob"])
async def test_odd_urls_are_refused(store: Store, url: str) -> None:
    with pytest.raises(NameInvalid):
        await Artifacts(store).fetch(url, DIGEST)


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """Make a certificate for 127.0.0.1; returns the server's side, and the file of who trusts it."""
    key, start = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([])
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, start, start + timedelta(days=1))
        .add_extension(address, critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "trusted.pem"
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = serialization.PrivateFormat.PKCS8
    (folder / "k.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, folder / "k.pem")
    return context, file


async def test_https_asks_for_a_certificate_that_the_machine_trusts(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, file = certificate(tmp_path)
    found, app = Server(), web.Application()
    app.router.add_get("/{path:.*}", found.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    url = f"https://127.0.0.1:{runner.addresses[0][1]}/blob"
    with pytest.raises(FetchFailed, match="certificate"):
        await Artifacts(store).fetch(url, DIGEST)
    assert found.requests == []
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    assert (await Artifacts(store).fetch(url, DIGEST)).exists()
    await runner.cleanup()
