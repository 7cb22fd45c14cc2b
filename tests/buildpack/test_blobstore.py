from __future__ import annotations

import hashlib
import io
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from buildpack import blobstore
from buildpack.errors import BlobExists, BlobNotFound, BlobTooLarge, DigestMismatch, DiskFull, TicketRefused
from buildpack.shelf import Shelf
from buildpack.types import Blob
from discovery.wire.call import Caller
from discovery.wire.errors import Invalid, Unauthorized

TEXT = b"x" * 3_000_000
HEX = hashlib.sha256(TEXT).hexdigest()


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[str]:
    environment = {"BLOBSTORE_KEY": "new,old", "BLOBSTORE_DATA": str(tmp_path), "BLOBSTORE_RESERVE_MIB": "0"}
    async with blobstore.running(environment, "127.0.0.1") as port:
        yield f"http://127.0.0.1:{port}"


async def _body(raw: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(raw), 100_000):
        yield raw[start : start + 100_000]


async def test_who_knows_the_hash_reads_and_who_has_a_key_stores(place: str) -> None:
    async with Caller(place, key="old") as keyed, Caller(place) as stranger:
        with pytest.raises(Unauthorized):
            await stranger.request("PUT", f"/sha256/{HEX}", data=_body(TEXT))
        with pytest.raises(BlobNotFound):
            await stranger.request("GET", f"/sha256/{HEX}")
        blob = await keyed.request("PUT", f"/sha256/{HEX}", into=Blob, data=_body(TEXT))
        assert blob == Blob(digest=f"sha256:{HEX}", size_bytes=len(TEXT))
        assert await stranger.request("GET", f"/sha256/{HEX}") == TEXT
        with pytest.raises(Unauthorized):
            await stranger.request("GET", "/sha256")
        with pytest.raises(Unauthorized):
            await stranger.request("DELETE", f"/sha256/{HEX}")
        assert await keyed.request("GET", "/sha256", into=list[Blob]) == [blob]
        await keyed.request("DELETE", f"/sha256/{HEX}")
        assert await keyed.request("GET", "/sha256", into=list[Blob]) == []


async def test_head_ranges_and_bearer_keys_work(place: str) -> None:
    async with aiohttp.ClientSession() as session:
        url = f"{place}/sha256/{HEX}"
        async with session.put(url, data=io.BytesIO(TEXT), headers={"Authorization": "Bearer new"}) as answer:
            assert answer.status == 200
        async with session.head(url) as answer:
            assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(TEXT)))
            assert "immutable" in answer.headers["Cache-Control"]
        async with session.get(url, headers={"Range": "bytes=10-19"}) as answer:
            assert (answer.status, len(await answer.read())) == (206, 10)
        async with session.get(f"{place}/openapi.json") as answer:
            assert "/temp/{name}" in await answer.text()


async def test_content_that_is_not_its_hash_is_refused(place: str) -> None:
    async with Caller(place, key="new") as keyed:
        with pytest.raises(DigestMismatch):
            await keyed.request("PUT", f"/sha256/{HEX}", data=_body(TEXT[:-1]))
        with pytest.raises(Invalid):
            await keyed.request("PUT", "/sha256/xyz", data=_body(TEXT))
        assert await keyed.request("GET", "/sha256", into=list[Blob]) == []


async def _by_ticket(method: str, url: str, data: bytes | None = None) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, data=data and io.BytesIO(data)) as answer,
    ):
        return answer.status, await answer.read()


async def test_a_ticket_reads_once(place: str) -> None:
    shelf = Shelf(place, "new,old")
    await shelf.put(place, "some-source", _body(TEXT))
    url = shelf.ticket(place, "GET", "some-source", for_s=60)
    assert await _by_ticket("GET", url) == (200, TEXT)
    status, body = await _by_ticket("GET", url)
    assert status == BlobNotFound.http_status
    assert b"it was read already" in body


async def test_a_ticket_stores_once_within_its_limit_and_the_slug_is_kept(place: str) -> None:
    shelf = Shelf(place, "new,old")
    url = shelf.ticket(place, "PUT", "some-slug", for_s=60, bytes_max=len(TEXT))
    assert (await _by_ticket("PUT", url, TEXT + b"x"))[0] == BlobTooLarge.http_status
    assert (await _by_ticket("PUT", url, TEXT))[0] == 200
    assert (await _by_ticket("PUT", url, TEXT))[0] == BlobExists.http_status
    assert (await _by_ticket("GET", url))[0] == TicketRefused.http_status
    assert (await _by_ticket("PUT", url.replace("some-slug", "other-slug"), TEXT))[0] == TicketRefused.http_status
    assert (await _by_ticket("DELETE", url))[0] == TicketRefused.http_status
    assert (await shelf.keep(place, "some-slug")).digest == f"sha256:{HEX}"
    assert shelf.layer_url(f"sha256:{HEX}") == f"{place}/sha256/{HEX}"
    async with Caller(place) as stranger:
        assert await stranger.request("GET", f"/sha256/{HEX}") == TEXT
    await shelf.drop(place, "some-slug")
    with pytest.raises(BlobNotFound):
        await shelf.keep(place, "some-slug")


async def test_a_full_disk_is_said_with_its_own_error(tmp_path: Path) -> None:
    environment = {"BLOBSTORE_KEY": "k", "BLOBSTORE_DATA": str(tmp_path), "BLOBSTORE_RESERVE_MIB": str(2**30)}
    async with blobstore.running(environment, "127.0.0.1") as port:
        shelf = Shelf(f"http://127.0.0.1:{port}", "k")
        with pytest.raises(DiskFull) as caught:
            await shelf.put(shelf.address, "some-source", _body(TEXT))
        assert not caught.value.retry
        assert list((tmp_path / "incoming").iterdir()) == []


async def test_a_store_without_a_key_does_not_start() -> None:
    with pytest.raises(Invalid, match="BLOBSTORE_KEY"):
        async with blobstore.running({}):
            pass
