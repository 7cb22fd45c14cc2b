"""Pulls images from a registry into the store.

Speaks the OCI distribution API and Docker's: manifests and indexes, blobs a few at a time, tokens and passwords. TLS
with the authorities that this host trusts; plain http only where the caller says so. What breaks off goes on where it
was, also in another process: bytes wait in `partial/` of the store until their digest is right. Refuses answers that
are longer than promised or endless, a server that trickles, redirects in circles or from https to http, and never
sends credentials to another host than the one that they are for, or in clear text over a network. Blocking, with a
few threads of its own; called by the command.

Source: OCI distribution-spec, "Pull"; distribution `token.md`.
"""

from __future__ import annotations

import errno
import fcntl
import http.client
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener

from rootfs import documents
from rootfs.credentials import Credentials, challenge_of
from rootfs.documents import DOCUMENT_BYTES_MAX, INDEX_TYPES, MANIFEST_TYPES, Descriptor
from rootfs.errors import AccessDenied, BlobMismatch, BlobMissing, DiskFull, FetchFailed, ImageInvalid, ImageMissing
from rootfs.intake import ImageLimits, Intake, Progress, checked, resolve
from rootfs.reference import Reference, is_loopback, local_name
from rootfs.store import Store
from rootfs.types import Image, parse_image_name

_PARALLEL = 4
_REDIRECTS_MAX = 5
_CHUNK_BYTES = 256 * 1024
_PROGRESS_BYTES = 1024 * 1024  # an attempt that brought so much was worth it
_TOKEN_BYTES_MAX = 64 * 1024
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_WRONG_RANGE, _PARTIAL = 416, 206


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait for a registry, and how often to ask again."""

    stall_timeout_s: float = 30.0
    attempts: int = 5
    pause_s: float = 1.0
    pause_max_s: float = 30.0
    trickle_bytes: int = 32 * 1024
    """What has to come in `stall_timeout_s`, or the server is taken for dead."""


def pull(
    store: Store,
    reference: Reference,
    *,
    name: str = "",
    credentials: Credentials | None = None,
    is_insecure: bool = False,
    is_replacing: bool = False,
    patience: Patience | None = None,
    limits: ImageLimits | None = None,
    progress: Progress = lambda text: None,
) -> Image:
    """Bring an image here, and call it `name` (default: its own last word and tag).

    Raises:
        AccessDenied: the registry wants other credentials. ImageMissing: it has no such image.
        FetchFailed: it cannot be reached, or broke off too often; what came stays for the next try.
        ImageInvalid, LayerInvalid, BlobMismatch: what came is not what it should be.
        ImageExists: the name is taken. NameInvalid: no name of ours can be made of it. DiskFull: no room.
    """
    chosen = parse_image_name(name or local_name(str(reference)))
    with store.busy(), _Registry(store, reference, credentials, is_insecure, patience or Patience()) as registry:
        progress(f"{reference}: asking {registry.base}")
        first = registry.manifest(reference.wanted)

        def read(entry: Descriptor) -> bytes:
            return checked(registry.manifest(entry.digest)[0], entry)

        manifest = resolve(first[0], read, first[1])
        intake = Intake(store, limits=limits, progress=progress)
        intake.take(manifest, registry.fetch, registry.for_each)
        return store.add_image(chosen, manifest, reference=str(reference), is_replacing=is_replacing)


def check_login(
    store: Store, registry: str, credentials: Credentials, *, is_insecure: bool, patience: Patience | None = None
) -> None:
    """Ask a registry whether it knows us.

    Raises:
        AccessDenied: it does not. FetchFailed: it cannot be reached.
    """
    reference = Reference(registry=registry, name="")
    with _Registry(store, reference, credentials, is_insecure, patience or Patience(attempts=2)) as asked:
        asked.ping()


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class _Broken(Exception):
    """An attempt that came to nothing; another may help."""


class _Registry:
    """One registry and one repository there."""

    def __init__(
        self, store: Store, reference: Reference, credentials: Credentials | None, is_insecure: bool, patience: Patience
    ) -> None:
        self._store = store
        self._reference = reference
        self._credentials = credentials
        self._is_insecure = is_insecure
        self._patience = patience
        self._authorization = ""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._is_loopback = is_loopback(reference.registry)
        self.base = f"{'http' if is_insecure else 'https'}://{reference.registry}"
        # A proxy is for the world, not for this machine.
        proxies = [ProxyHandler({})] if self._is_loopback else []
        self._open = build_opener(*proxies, _NoRedirects(), HTTPSHandler(context=_trust())).open

    def __enter__(self) -> _Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def ping(self) -> None:
        def act() -> None:
            with self._answer(f"{self.base}/v2/", {}) as response:
                if response.status != 200:
                    raise FetchFailed(f"{self.base} answers {response.status}, is it a registry?")

        self._patiently(act)

    def manifest(self, wanted: str) -> tuple[bytes, str]:
        """Return a manifest's or index's bytes, and what the registry says it is."""
        url = f"{self.base}/v2/{self._reference.name}/manifests/{wanted}"
        found: list[tuple[bytes, str]] = []

        def act() -> None:
            with self._answer(url, {"Accept": ", ".join((*MANIFEST_TYPES, *INDEX_TYPES))}) as response:
                if response.status != 200:
                    raise ImageMissing(f"{self._reference.registry} has no {self._reference.name} {wanted}")
                content = self._read_all(response, DOCUMENT_BYTES_MAX)
                said = response.headers.get("Docker-Content-Digest", "")
                found.append((content, response.headers.get_content_type()))
            expected = wanted if wanted.startswith("sha256:") else said if said.startswith("sha256:") else ""
            if expected:
                checked(content, Descriptor(digest=expected, size=len(content)))

        self._patiently(act)
        return found[-1]

    def for_each(self, act: Callable[[Descriptor], None], parts: list[Descriptor]) -> None:
        """Do it for a few parts at a time; the first failure ends all."""
        pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="pull")
        futures = [pool.submit(act, part) for part in parts]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = [error for future in done if (error := future.exception())]
            if failed:
                raise failed[0]
        finally:
            self._stop.set()  # nobody needs what is still under way
            pool.shutdown(cancel_futures=True)
            self._stop.clear()

    def fetch(self, part: Descriptor, inspect: Callable[[Path], None]) -> None:
        """Bring a blob into the store, going on with what is there of it."""
        with _partial(self._store, part) as (file, path):
            begun = os.fstat(file.fileno()).st_size
            try:
                self._complete(file, part)
                self._store.keep_file(path, part.digest, part.size, inspect=inspect)
            except BlobMismatch:
                file.truncate(0)
                if not begun:
                    path.unlink(missing_ok=True)
                    raise
                try:  # what lay here may have been the wrong part
                    self._complete(file, part)
                    self._store.keep_file(path, part.digest, part.size, inspect=inspect)
                except BlobMismatch:
                    path.unlink(missing_ok=True)
                    raise

    def _complete(self, file: Any, part: Descriptor) -> None:
        url = f"{self.base}/v2/{self._reference.name}/blobs/{part.digest}"

        def act() -> bool:
            before = os.fstat(file.fileno()).st_size
            if before > part.size:
                file.truncate(0)
                before = 0
            if before == part.size:
                return True
            try:
                self._continue(url, file, part, before)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DiskFull(f"no room in {self._store.path}", hint="free some disk space") from error
                raise
            finally:
                file.flush()
                gained[0] = os.fstat(file.fileno()).st_size - before
            return True

        gained = [0]
        self._patiently(act, is_worth_it=lambda: gained[0] >= _PROGRESS_BYTES)

    def _continue(self, url: str, file: Any, part: Descriptor, begun: int) -> None:
        with self._answer(url, {"Range": f"bytes={begun}-"} if begun else {}) as response:
            if response.status == _WRONG_RANGE:
                file.truncate(0)
                raise _Broken("it does not have the rest")
            if response.status not in (200, _PARTIAL):
                raise BlobMissing(f"{self._reference.registry} has no blob {part.digest}: {response.status}")
            if response.status == 200:
                file.truncate(0)
                begun = 0
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {begun}-"):
                file.truncate(0)
                raise _Broken("it sends another part than the one asked for")
            file.seek(begun)
            for chunk in self._chunks(response):
                begun += len(chunk)
                if begun > part.size:
                    raise BlobMismatch(f"blob {part.digest} is longer than the {part.size} bytes promised")
                file.write(chunk)
            if begun < part.size:
                raise _Broken(f"it broke off after {begun} of {part.size} bytes")

    # one request

    @contextmanager
    def _answer(self, url: str, headers: dict[str, str]) -> Iterator[Any]:
        """Ask, prove who we are if that is wanted, follow redirects; give the last answer."""
        proofs = 0
        for _ in range(_REDIRECTS_MAX + 3):
            response = self._ask(url, headers)
            try:
                if response.status in _RETRIED:
                    raise _Later(f"{response.status}", response.headers.get("Retry-After", ""))
                if response.status == 401 and self._is_ours(url) and proofs < 2:
                    proofs += 1
                    self._prove(response.headers.get("WWW-Authenticate", ""))
                    continue
                if response.status in (401, 403):
                    raise AccessDenied(
                        f"{urlsplit(url).netloc} refuses: {response.status}", hint="hostd image login REGISTRY"
                    )
                if response.status in (301, 302, 303, 307, 308):
                    url = self._next(url, response.headers.get("Location", ""))
                    continue
                yield response
                return
            finally:
                response.close()
        raise FetchFailed(f"{self.base} redirects without an end")

    def _ask(self, url: str, headers: dict[str, str]) -> Any:
        request = Request(url, headers={"User-Agent": "hostd", **headers})  # noqa: S310 — `_next` and `base` know the scheme
        with self._lock:
            if self._authorization and self._is_ours(url):
                request.add_unredirected_header("Authorization", self._authorization)
        try:
            return self._open(request, timeout=self._patience.stall_timeout_s)
        except HTTPError as answer:
            return answer
        except (URLError, OSError, http.client.HTTPException, ValueError) as error:
            raise _Broken(str(getattr(error, "reason", error))) from error

    def _is_ours(self, url: str) -> bool:
        return url.startswith(self.base + "/")

    def _next(self, url: str, location: str) -> str:
        found = urljoin(url, location)
        scheme = urlsplit(found).scheme
        if not location or scheme not in ("https", "http") or (scheme == "http" and not url.startswith("http:")):
            raise FetchFailed(f"{urlsplit(url).netloc} redirects to {found[:200]!r}, where nobody should go")
        return found

    def _prove(self, header: str) -> None:
        scheme, challenge = challenge_of(header)
        if self._credentials is not None and self._is_insecure and not self._is_loopback:
            raise AccessDenied("credentials are not sent in clear text over a network", hint="without --insecure")
        if scheme == "basic":
            if self._credentials is None:
                raise AccessDenied(
                    f"{self._reference.registry} wants to know who asks", hint="hostd image login REGISTRY"
                )
            authorization = self._credentials.basic()
        elif scheme == "bearer":
            authorization = "Bearer " + self._token(challenge)
        else:
            raise AccessDenied(f"{self._reference.registry} wants a proof that we do not know: {scheme[:40]!r}")
        with self._lock:
            self._authorization = authorization

    def _token(self, challenge: dict[str, str]) -> str:
        realm = challenge.get("realm", "")
        parts = urlsplit(realm)
        is_clear = parts.scheme == "http"
        if parts.scheme not in ("http", "https") or (
            is_clear and not (self._is_insecure and is_loopback(parts.netloc))
        ):
            raise AccessDenied(f"{self._reference.registry} sends us to {realm[:200]!r} for a token")
        scope = f"repository:{self._reference.name}:pull" if self._reference.name else ""
        query = {key: value for key, value in (("service", challenge.get("service")), ("scope", scope)) if value}
        request = Request(realm + ("&" if parts.query else "?") + urlencode(query), headers={"User-Agent": "hostd"})  # noqa: S310
        if self._credentials is not None:
            request.add_unredirected_header("Authorization", self._credentials.basic())
        try:
            with self._open(request, timeout=self._patience.stall_timeout_s) as response:
                content = self._read_all(response, _TOKEN_BYTES_MAX)
        except HTTPError as answer:
            answer.close()
            if answer.status in _RETRIED:
                raise _Broken(f"{parts.netloc} answers {answer.status}") from None
            raise AccessDenied(f"{parts.netloc} gives no token: {answer.status}", hint="hostd image login") from None
        except (URLError, OSError, http.client.HTTPException, ValueError) as error:
            raise _Broken(str(getattr(error, "reason", error))) from error
        found = documents.decode(content, dict[str, Any], "the token")
        token = found.get("token") or found.get("access_token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable() or " " in token:
            raise AccessDenied(f"{parts.netloc} gives no token")
        return token

    def _chunks(self, response: Any) -> Iterator[bytes]:
        """Read a body; one that trickles is taken for broken."""
        window_s, at, came = self._patience.stall_timeout_s, time.monotonic(), 0
        while not self._stop.is_set():
            try:
                chunk = response.read1(_CHUNK_BYTES)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _Broken(f"it broke off: {error}") from error
            if not chunk:
                return
            yield chunk
            came += len(chunk)
            if time.monotonic() - at > window_s:
                if came < self._patience.trickle_bytes:
                    raise _Broken(f"{came} bytes in {window_s:g} s")
                at, came = time.monotonic(), 0
        raise FetchFailed("given up, since another part failed")

    def _read_all(self, response: Any, bytes_max: int) -> bytes:
        content = b""
        for chunk in self._chunks(response):
            content += chunk
            if len(content) > bytes_max:
                raise ImageInvalid(f"{self.base} answers with more than {bytes_max} bytes")
        promised = response.headers.get("Content-Length", "")
        if promised.isdigit() and int(promised) != len(content):
            raise _Broken(f"it broke off after {len(content)} of {promised} bytes")
        return content

    def _patiently(self, act: Callable[[], object], is_worth_it: Callable[[], bool] = lambda: False) -> None:
        """Try again with growing pauses; an attempt that brought something does not count."""
        left, pause_s = self._patience.attempts, self._patience.pause_s
        while True:
            try:
                act()
                return
            except _Broken as error:
                left = self._patience.attempts if is_worth_it() else left - 1
                if left <= 0 or self._stop.is_set():
                    raise FetchFailed(f"{self.base}: {error}", hint="try again: what came until now stays") from error
                asked_s = float(error.args[1]) if isinstance(error, _Later) and error.args[1].isdigit() else 0.0
                self._stop.wait(min(max(pause_s, asked_s), self._patience.pause_max_s))
                pause_s *= 2


class _Later(_Broken):
    """The registry says: not now."""

    def __str__(self) -> str:
        return f"it answers {self.args[0]}"


@contextmanager
def _partial(store: Store, part: Descriptor) -> Iterator[tuple[Any, Path]]:
    """Open what there is of a blob, for ourselves alone."""
    path = store.partial(part.digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if os.fstat(fd).st_ino != path.stat().st_ino:
                    continue
            except FileNotFoundError:  # another pull has just finished it
                continue
            yield file, path
            return


def _trust() -> Any:
    import ssl

    return ssl.create_default_context()
