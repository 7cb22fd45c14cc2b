"""Moves files between the build job and the blob store, on `http.client`: standard library only.

The URLs are tickets: they carry their own permission and end soon, so the job knows no key.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO
from urllib.parse import urlsplit

from buildpack.refusals import BuildRefused

TIMEOUT_S = 60.0
CHUNK_BYTES = 256 * 1024


@contextmanager
def fetch(url: str, what: str) -> Iterator[IO[bytes]]:
    """Open `url` and yield its content as a stream.

    Raises:
        BuildRefused: the server refuses it, or cannot be reached; `what` names the thing for the pusher.
    """
    with _answer("GET", url, what, None, {}) as response:
        yield response


def store(url: str, what: str, content: IO[bytes], size_bytes: int) -> None:
    """Send `content` to `url`.

    Raises:
        BuildRefused: the server refuses it (its disk is full, it is too large), or cannot be reached.
    """
    headers = {"Content-Length": str(size_bytes), "Content-Type": "application/octet-stream"}
    with _answer("PUT", url, what, content, headers) as response:
        response.read()


@contextmanager
def _answer(
    method: str, url: str, what: str, content: IO[bytes] | None, headers: dict[str, str]
) -> Iterator[http.client.HTTPResponse]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=TIMEOUT_S)
    connection.blocksize = CHUNK_BYTES
    try:
        try:
            connection.request(method, f"{parts.path}?{parts.query}", content, headers)
        except (BrokenPipeError, ConnectionResetError):
            pass  # a server that refuses in the middle has answered before it hung up
        response = connection.getresponse()
        if response.status >= 400:
            raise _refusal(what, response.status, response.read(64 * 1024))
        yield response
    except (OSError, http.client.HTTPException) as error:
        raise BuildRefused(
            f"{what}: the blob store cannot be reached: {error or type(error).__name__}", "push again"
        ) from error
    finally:
        connection.close()


def _refusal(what: str, status: int, raw: bytes) -> BuildRefused:
    try:
        body = json.loads(raw)
        return BuildRefused(f"{what}: {body['message']}", str(body.get("hint", "")))
    except (ValueError, KeyError, TypeError):
        return BuildRefused(f"{what}: the blob store answered {status}")
