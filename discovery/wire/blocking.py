"""How commands ask over HTTP: the same protocol as `wire.call`, on `http.client`, which imports in 30 ms.

Reaches a unix socket, plain HTTP, or HTTPS whose certificate is checked by pin (base64 SHA-256 of
the certificate, as the ancestor's `cluster add -p`), by the context `tls`, which may also show a certificate of our
own, or else by the system's CAs. `connect_to` is an address to dial instead of the URL's host, for clusters whose
domain is not in DNS. `prefix` comes before every path (`/v1`).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, overload
from urllib.parse import urlencode, urlsplit

import msgspec

from discovery.wire.errors import DeadlineExceeded, Unauthorized, Unavailable, error_of

T = TypeVar("T")
_STREAM_BYTES = 256 * 1024
_TLS_HINT = "is the certificate one of that host's own authority, and still valid?"


def certificate_pin(der: bytes) -> str:
    """Return the pin of a certificate: base64 of the SHA-256 of its DER form."""
    return base64.b64encode(hashlib.sha256(der).digest()).decode()


class BlockingCaller:
    """Speaks to one server, one request at a time."""

    def __init__(
        self,
        address: str,
        *,
        key: str = "",
        pin: str = "",
        connect_to: str = "",
        timeout_s: float = 30.0,
        tls: ssl.SSLContext | None = None,
        prefix: str = "",
    ) -> None:
        self.address = address.rstrip("/")
        self.key = key
        self.pin = pin
        self.connect_to = connect_to
        self.timeout_s = timeout_s
        self.tls = tls
        self.prefix = prefix

    def connect(self) -> socket.socket:
        """Open a connection, checked.

        Raises:
            Unavailable: nobody answers there.
            Unauthorized: the certificate does not have the pin, or is not trusted.
        """
        parts = urlsplit(self.address)
        try:
            if parts.scheme == "unix":
                plain = socket.socket(socket.AF_UNIX)
                plain.settimeout(self.timeout_s)
                plain.connect(parts.path)
                return plain
            port = parts.port or (443 if parts.scheme == "https" else 80)
            plain = socket.create_connection((self.connect_to or parts.hostname or "", port), self.timeout_s)
        except OSError as error:
            raise Unavailable(f"{self.address} cannot be reached: {error}", hint="is the cluster up?") from error
        if parts.scheme != "https":
            return plain
        context = self.tls or ssl.create_default_context()
        if self.pin:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE  # the pin below is the whole check, and a stronger one
        try:
            secure = context.wrap_socket(plain, server_hostname=parts.hostname)
        except (ssl.SSLError, OSError) as error:
            plain.close()
            raise Unauthorized(
                f"{self.address}: TLS: {error}",
                hint=_TLS_HINT if self.tls else "add the cluster with its pin: flynn cluster add -p PIN …",
            ) from error
        certificate = secure.getpeercert(binary_form=True) or b""
        if self.pin and not hmac.compare_digest(certificate_pin(certificate), self.pin):
            secure.close()
            raise Unauthorized(
                f"{self.address}: the certificate is not the pinned one",
                hint="if the cluster was rebuilt, add it again with the line that bootstrap printed",
            )
        return secure

    def headers(self) -> dict[str, str]:
        """Return the headers that every request carries."""
        if not self.key:
            return {}
        return {"Authorization": "Basic " + base64.b64encode(f":{self.key}".encode()).decode()}

    def host(self) -> str:
        """Return the Host header's value."""
        return urlsplit(self.address).netloc or "unix"

    @contextmanager
    def _response(
        self, method: str, path: str, body: Any, query: dict[str, str] | None, timeout_s: float | None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.host())
        connection.sock = self.connect()
        connection.sock.settimeout(timeout_s)
        payload = None if body is None else msgspec.json.encode(body)
        headers = self.headers() | ({} if payload is None else {"Content-Type": "application/json"})
        try:
            target = self.prefix + path + ("?" + urlencode(query) if query else "")
            connection.request(method, target, payload, headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise error_of(response.status, response.read(), self.address)
            yield response
        except TimeoutError as error:
            raise DeadlineExceeded(f"{method} {self.address}{path}: no answer in {timeout_s:g} s") from error
        except ssl.SSLError as error:
            raise Unauthorized(f"{self.address}: TLS: {error}", hint=_TLS_HINT) from error
        except (OSError, http.client.HTTPException) as error:
            # without a word: with TLS 1.3 that is how a server refuses a certificate
            is_silent = self.tls is not None and isinstance(error, http.client.RemoteDisconnected | ConnectionError)
            message = f"{self.address}: the connection broke: {error or type(error).__name__}"
            raise Unavailable(message, hint=_TLS_HINT if is_silent else "") from error
        finally:
            connection.close()

    @overload
    def request(self, method: str, path: str, *, into: type[T], body: Any = ..., query: dict[str, str] | None = ..., timeout_s: float | None = ...) -> T: ...  # fmt: skip  # noqa: E501
    @overload
    def request(self, method: str, path: str, *, into: None = ..., body: Any = ..., query: dict[str, str] | None = ..., timeout_s: float | None = ...) -> bytes: ...  # fmt: skip  # noqa: E501

    def request(
        self,
        method: str,
        path: str,
        *,
        into: Any = None,
        body: Any = None,
        query: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Send one request and decode the answer as `into` (raw bytes if `None`); raises like `wire.call`."""
        with self._response(method, path, body, query, timeout_s or self.timeout_s) as response:
            raw = response.read()
        return raw if into is None else msgspec.json.decode(raw, type=into)

    def events(
        self, path: str, into: type[T], query: dict[str, str] | None = None, silence_s: float = 60.0
    ) -> Iterator[T]:
        """Follow a Server-Sent Events endpoint; `silence_s` without even a keep-alive is a broken connection."""
        with self._response("GET", path, None, query, silence_s) as response:
            is_error = False
            for line in response:
                if line.startswith(b"event: error"):
                    is_error = True
                elif line.startswith(b"data: "):
                    if is_error:
                        raise error_of(500, line[6:], self.address)
                    yield msgspec.json.decode(line[6:], type=into)

    def stream(self, path: str, query: dict[str, str] | None = None, silence_s: float = 60.0) -> Iterator[bytes]:
        """Read a streaming answer as it comes; `silence_s` without a byte is a broken connection."""
        with self._response("GET", path, None, query, silence_s) as response:
            while part := response.read1(_STREAM_BYTES):
                yield part
