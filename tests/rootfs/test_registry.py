"""Pulling: from a real registry it works, from an odd one nothing worse than a refusal comes."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rootfs import reference as references
from rootfs.credentials import Credentials, CredentialsFile, challenge_of
from rootfs.errors import (
    AccessDenied,
    BlobMismatch,
    FetchFailed,
    ImageExists,
    ImageInvalid,
    ImageMissing,
    NameInvalid,
    RootfsError,
)
from rootfs.registry import Patience, check_login, pull
from rootfs.store import Store
from rootfs.types import Image
from tests.rootfs.ociimages import LAYER_ONE, LAYER_TWO, dump, image, layout, manifest, sha, write
from tests.rootfs.registries import PASSWORD, USER, Handler, Odd, odd, push, real
from tests.rootfs.tars import file, tar_of

HASTY = Patience(stall_timeout_s=1.0, attempts=3, pause_s=0.01, trickle_bytes=1000)
NOISE = os.urandom(3_000_000)
FILES = image("plain")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "images")


@pytest.fixture
def server() -> Iterator[Odd]:
    with odd(FILES) as found:
        yield found


def pulled(store: Store, registry: str, path: str = "app", **more: Any) -> Image:
    more.setdefault("patience", HASTY)
    return pull(store, references.parse(f"{registry}/{path}"), is_insecure=True, **more)


def nothing_half(store: Store) -> bool:
    blobs = list(store.blobs.iterdir()) if store.blobs.is_dir() else []
    return all(path.name == sha(path.read_bytes())[7:] for path in blobs)


# --- the real one

needs_registry = pytest.mark.skipif(
    not (shutil.which("docker-registry") and shutil.which("skopeo")), reason="needs docker-registry and skopeo"
)


@needs_registry
def test_a_real_registry_with_a_password(store: Store, tmp_path: Path) -> None:
    write(tmp_path / "layout", image())
    credentials = Credentials(USER, PASSWORD)
    with real(tmp_path / "registry") as name:
        push(name, tmp_path / "layout", "team/app:1.2")
        push(name, tmp_path / "layout", "team/app:docker", "--format=v2s2")
        found = pulled(store, name, "team/app:1.2", credentials=credentials)
        assert (found.name, found.reference) == ("app-1.2", f"{name}/team/app:1.2")
        assert [layer.diff_id for layer in found.layers] == [sha(LAYER_ONE), sha(LAYER_TWO)]
        assert store.image(found.reference) == found
        assert pulled(store, name, "team/app:1.2", credentials=credentials) == found
        by_digest = pulled(store, name, f"team/app@{found.digest}", credentials=credentials, name="x")
        assert by_digest.digest == found.digest
        docker = pulled(store, name, "team/app:docker", credentials=credentials)
        assert [layer.diff_id for layer in docker.layers] == [sha(LAYER_ONE), sha(LAYER_TWO)]
        assert "docker" in docker.layers[0].media_type
        check_login(store, name, credentials, is_insecure=True)
        with pytest.raises(AccessDenied, match="wants to know who asks"):
            pulled(store, name, "team/app:1.2", name="y")
        for act in (
            lambda: pulled(store, name, "team/app:1.2", name="y", credentials=Credentials(USER, "wrong")),
            lambda: check_login(store, name, Credentials(USER, "wrong"), is_insecure=True),
        ):
            with pytest.raises(AccessDenied) as refused:
                act()
            assert "wrong" not in str(refused.value)
        with pytest.raises(ImageMissing):
            pulled(store, name, "team/app:nosuch", credentials=credentials)
        with pytest.raises(FetchFailed):  # it speaks http, and nobody allowed that
            pull(store, references.parse(f"{name}/team/app:1.2"), name="y", credentials=credentials, patience=HASTY)


@needs_registry
def test_tls_with_an_authority_of_this_host(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = tmp_path / "registry.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        str(certificate) + ".key",
        "-days",
        "2",
    ]
    command += ["-subj", "/CN=registry.test", "-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    both = tmp_path / "both.pem"
    both.write_bytes(certificate.read_bytes() + Path(f"{certificate}.key").read_bytes())
    write(tmp_path / "layout", image())
    with real(tmp_path / "registry", certificate=both) as name:
        push(name, tmp_path / "layout", "app:1")
        reference, credentials = references.parse(f"{name}/app:1"), Credentials(USER, PASSWORD)
        with pytest.raises(FetchFailed, match=r"(?i)certificate"):
            pull(store, reference, credentials=credentials, patience=HASTY)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert pull(store, reference, credentials=credentials, patience=HASTY).name == "app-1"


# --- the odd one


def test_pull_and_again(store: Store, server: Odd) -> None:
    found = pulled(store, server.name)
    assert found.name == "app"
    asked = len(server.requests)
    assert pulled(store, server.name) == found
    assert len(server.requests) == asked + 1  # the manifest; all else is here
    assert not list((store.path / "partial").iterdir())


def test_many_machines(store: Store) -> None:
    from tests.rootfs.ociimages import ARCHITECTURE, OCI, OTHER, Files, put

    files: Files = {}
    own = manifest(files) | {"platform": {"os": "linux", "architecture": ARCHITECTURE}}
    other = manifest(files, (LAYER_ONE,), architecture=OTHER) | {"platform": {"os": "linux", "architecture": OTHER}}
    inner = put(files, dump({"schemaVersion": 2, "manifests": [other, own]}), OCI + "index.v1+json")
    with odd(layout(inner, files=files)) as server:
        assert pulled(store, server.name).digest == own["digest"]


def test_a_newer_image_takes_the_name_only_from_the_same_reference(store: Store, server: Odd) -> None:
    pulled(store, server.name)
    with odd(image("zstd")) as other:
        with pytest.raises(ImageExists):
            pulled(store, other.name)
        assert pulled(store, other.name, is_replacing=True).reference == f"{other.name}/app:latest"


def big() -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    return layout(manifest(files, (tar_of(file("noise", NOISE)),), "plain"), files=files)


def _cut_blobs(after: int, times: int) -> Any:
    cuts: list[int] = []

    def fault(request: Handler) -> bool:
        if "/blobs/" not in request.path or len(cuts) >= times:
            return False
        name = request.path.rpartition("/v2/app/")[2]
        content = request.server.files[name]
        begin = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if len(content) - begin <= after:
            return False
        cuts.append(begin)
        more = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"} if begin else {}
        request.reply(
            206 if begin else 200, content[begin : begin + after], Content_Length=str(len(content) - begin), **more
        )
        return True

    return fault, cuts


def test_what_breaks_off_goes_on_where_it_was(store: Store) -> None:
    with odd(big()) as server:
        fault, cuts = _cut_blobs(1_100_000, 100)
        server.faults.append(fault)
        pulled(store, server.name)
        assert cuts == [0, 1_100_000]
        ranges = [headers["Range"] for headers in server.asked("/blobs/") if "Range" in headers]
        assert ranges == ["bytes=1100000-", "bytes=2200000-"]


def test_a_pull_that_gives_up_is_taken_up_by_the_next(store: Store) -> None:
    with odd(big()) as server:
        fault, _ = _cut_blobs(500_000, 3)
        server.faults.append(fault)
        with pytest.raises(FetchFailed, match="broke off"):
            pulled(store, server.name, patience=Patience(attempts=3, pause_s=0.01))
        assert store.images() == ()
        assert nothing_half(store)
        (partial,) = (store.path / "partial").iterdir()
        assert partial.stat().st_size == 1_500_000
        server.requests.clear()
        pulled(store, server.name)
        assert [headers.get("Range") for headers in server.asked("/blobs/") if "Range" in headers] == ["bytes=1500000-"]


def _forget_range(request: Handler) -> bool:
    del request.headers["Range"]
    return False


@pytest.mark.parametrize("has_ranges", [True, False])
def test_rubbish_that_lay_there_is_thrown_away(store: Store, has_ranges: bool) -> None:
    with odd(big()) as server:
        if not has_ranges:
            server.faults.append(_forget_range)
        digest = sha(tar_of(file("noise", NOISE)))
        store.partial(digest).parent.mkdir(parents=True)
        store.partial(digest).write_bytes(b"rubbish" * 1000)
        pulled(store, server.name)
        assert store.has_blob(digest)


def test_killed_pull_leaves_nothing_half(store: Store, tmp_path: Path) -> None:
    with odd(big()) as server:

        def trickle(request: Handler) -> bool:
            if "/blobs/" not in request.path or "Range" in request.headers:
                return False
            content = request.server.files[request.path.rpartition("/v2/app/")[2]]
            if len(content) < 1_000_000:
                return False
            request.reply(200, content[:1_000_000], Content_Length=str(len(content)))
            time.sleep(20)
            return True

        server.faults.append(trickle)
        script = (
            "import sys; from pathlib import Path; from rootfs.store import Store; from rootfs.registry import pull;"
            " from rootfs.reference import parse; pull(Store(Path(sys.argv[1])), parse(sys.argv[2]), is_insecure=True)"
        )
        puller = subprocess.Popen([sys.executable, "-c", script, str(store.path), f"{server.name}/app"])
        end = time.monotonic() + 20
        partial = store.path / "partial"
        while not (partial.is_dir() and any(path.stat().st_size >= 900_000 for path in partial.iterdir())):
            assert time.monotonic() < end
            time.sleep(0.01)
        puller.kill()
        puller.wait()
        assert store.images() == ()
        assert nothing_half(store)
        assert pulled(store, server.name).name == "app"
        assert any("Range" in headers for headers in server.asked("/blobs/"))


def _reply(part: str, status: int, content: bytes, **headers: str) -> Any:
    def fault(request: Handler) -> bool:
        if part not in request.path:
            return False
        request.reply(status, content, **headers)
        return True

    return fault


def _endless(request: Handler) -> bool:
    if "/blobs/" not in request.path:
        return False
    request.send_response(200)
    request.end_headers()
    try:
        while True:
            request.wfile.write(b"x" * 65536)
    except OSError:
        return True


def _trickle(request: Handler) -> bool:
    if "/blobs/" not in request.path:
        return False
    request.send_response(200)
    request.send_header("Content-Length", "1000000")
    request.end_headers()
    try:
        for _ in range(200):
            request.wfile.write(b"x")
            time.sleep(0.05)
    except OSError:
        pass
    return True


def _silence(request: Handler) -> bool:
    time.sleep(3)
    return True


def _nonsense(request: Handler) -> bool:
    request.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n" * 10)
    return True


ODDITIES: dict[str, tuple[Any, Any]] = {
    "another blob": (_reply("/blobs/", 200, b"something else"), (BlobMismatch, FetchFailed)),
    "endless blob": (_endless, BlobMismatch),
    "longer than promised": (_reply("/blobs/", 200, b"x" * 100_000), BlobMismatch),
    "empty blob": (_reply("/blobs/", 200, b""), FetchFailed),
    "no blob": (_reply("/blobs/", 404, b""), RootfsError),
    "wrong range": (_reply("/blobs/", 206, b"x", **{"Content-Range": "bytes 7-8/9"}), FetchFailed),
    "range not satisfiable": (_reply("/blobs/", 416, b""), FetchFailed),
    "trickle": (_trickle, FetchFailed),
    "silence": (_silence, FetchFailed),
    "nonsense": (_nonsense, FetchFailed),
    "broken server": (_reply("/v2/", 500, b""), FetchFailed),
    "too many requests": (_reply("/v2/", 429, b"", Retry_After="0"), FetchFailed),
    "redirects in circles": (_reply("/v2/", 302, b"", Location="/v2/app/manifests/latest"), FetchFailed),
    "redirect to a file": (_reply("/v2/", 307, b"", Location="file:///etc/passwd"), FetchFailed),
    "redirect to nowhere": (_reply("/v2/", 307, b""), FetchFailed),
    "huge manifest": (_reply("/manifests/", 200, b" " * 5_000_000), ImageInvalid),
    "manifest that is none": (_reply("/manifests/", 200, b"[" * 100_000), ImageInvalid),
    "another digest": (_reply("/manifests/", 200, b"{}", Docker_Content_Digest="sha256:" + "0" * 64), BlobMismatch),
    "first format": (_reply("/manifests/", 200, b'{"schemaVersion":1,"fsLayers":[]}'), ImageInvalid),
    "forbidden": (_reply("/v2/", 403, b""), AccessDenied),
    "a proof nobody knows": (_reply("/v2/", 401, b"", WWW_Authenticate="Negotiate"), AccessDenied),
    "no challenge": (_reply("/v2/", 401, b""), AccessDenied),
    "a token from a file": (
        _reply("/v2/", 401, b"", WWW_Authenticate='Bearer realm="file:///x"'),
        AccessDenied,
    ),
    "a token in clear text": (
        _reply("/v2/", 401, b"", WWW_Authenticate='Bearer realm="http://a.test/"'),
        AccessDenied,
    ),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_an_odd_registry_is_refused_in_time(store: Store, server: Odd, name: str) -> None:
    fault, wanted = ODDITIES[name]
    server.faults.append(fault)
    began = time.monotonic()
    with pytest.raises(wanted):
        pulled(store, server.name)
    assert time.monotonic() - began < 15
    assert store.images() == ()
    assert nothing_half(store)


def test_nobody_there(store: Store) -> None:
    with pytest.raises(FetchFailed, match=r"127\.0\.0\.1:1"):
        pulled(store, "127.0.0.1:1")


def test_a_busy_registry_is_asked_again(store: Store, server: Odd) -> None:
    replies = [503, 429, 500, 502]

    def fault(request: Handler) -> bool:
        if not replies:
            return False
        request.reply(replies.pop(), b"")
        return True

    server.faults.append(fault)
    pulled(store, server.name, patience=Patience(attempts=5, pause_s=0.01))


# --- who we are


def _wants(scheme: str, proof: str) -> Any:
    def fault(request: Handler) -> bool:
        if request.path.startswith("/token") or request.headers.get("Authorization") == proof:
            return False
        request.reply(401, b"", WWW_Authenticate=scheme)
        return True

    return fault


def test_token_is_fetched_with_the_password_and_sent_instead_of_it(store: Store, server: Odd) -> None:
    server.faults.append(_wants(f'Bearer realm="http://{server.name}/token",service="reg"', "Bearer t0ken"))
    server.faults.append(_reply("/token", 200, b'{"token":"t0ken"}'))
    pulled(store, server.name, credentials=Credentials("me", "secret"))
    (asked,) = server.asked("/token")
    assert asked["Authorization"] == Credentials("me", "secret").basic()
    (path,) = [path for path, _ in server.requests if "/token" in path]
    assert path == "/token?service=reg&scope=repository%3Aapp%3Apull"
    proofs = {headers.get("Authorization", "") for path, headers in server.requests if "/token" not in path}
    assert proofs == {"", "Bearer t0ken"}


@pytest.mark.parametrize("answer", [b"", b"{}", b'{"token":7}', b'{"token":"a\\nb"}', b"[" * 5000, b" " * 100_000])
def test_token_that_is_none_is_refused(store: Store, server: Odd, answer: bytes) -> None:
    server.faults.append(_wants(f'Bearer realm="http://{server.name}/token"', "Bearer x"))
    server.faults.append(_reply("/token", 200, answer))
    with pytest.raises((AccessDenied, ImageInvalid)):
        pulled(store, server.name, credentials=Credentials("me", "secret"))


def test_a_redirect_to_another_host_carries_no_proof(store: Store, server: Odd) -> None:
    server.faults.append(_wants('Basic realm="x"', Credentials("me", "secret").basic()))
    with odd(FILES) as other:

        def away(request: Handler) -> bool:
            if "/blobs/" not in request.path:
                return False
            request.reply(307, b"", Location=f"http://{other.name}{request.path}")
            return True

        server.faults.append(away)
        pulled(store, server.name, credentials=Credentials("me", "secret"))
        assert len(other.requests) == 3
        assert not [headers for _, headers in other.requests if "Authorization" in headers]


def test_password_never_travels_in_clear_text(store: Store, server: Odd, monkeypatch: pytest.MonkeyPatch) -> None:
    server.faults.append(_wants('Basic realm="x"', Credentials("me", "secret").basic()))
    monkeypatch.setattr("rootfs.registry.is_loopback", lambda registry: False)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(AccessDenied, match="clear text"):
        pulled(store, server.name, credentials=Credentials("me", "secret"))
    assert not [headers for _, headers in server.requests if "Authorization" in headers]


def test_credentials_are_for_root_alone(tmp_path: Path) -> None:
    path = tmp_path / "registries.json"
    kept = CredentialsFile(path)
    assert kept.get("a.test") is None
    kept.set("a.test", Credentials("me", "s:cret"))
    kept.set("b.test", Credentials("you", ""))
    assert path.stat().st_mode & 0o777 == 0o600
    assert kept.get("a.test") == Credentials("me", "s:cret")
    assert "s:cret" not in repr(kept.get("a.test"))
    assert b"s:cret" not in path.read_bytes()
    assert kept.remove("b.test")
    assert not kept.remove("b.test")
    path.chmod(0o640)
    with pytest.raises(AccessDenied, match="by others"):
        kept.get("a.test")
    path.chmod(0o600)
    for content in (b"[]", b'{"auths":{"a.test":{"auth":"!"}}}', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(AccessDenied, match="broken"):
            kept.get("a.test")
    with pytest.raises(NameInvalid):
        kept.set("a.test", Credentials("a:b", ""))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('Bearer realm="https://a/t",service="s, x"', ("bearer", {"realm": "https://a/t", "service": "s, x"})),
        ("Basic realm=plain", ("basic", {"realm": "plain"})),
        ('bearer Realm="a\\"b"', ("bearer", {"realm": 'a"b'})),
        ("", ("", {})),
        ("Bearer " + "=" * 10000, ("bearer", {})),
    ],
)  # fmt: skip
def test_challenges(text: str, found: tuple[str, dict[str, str]]) -> None:
    assert challenge_of(text) == found


# --- what people call images


@pytest.mark.parametrize(
    ("text", "whole", "local"),
    [
        ("app", "d.test/app:latest", "app"),
        ("team/app:1.2", "d.test/team/app:1.2", "app-1.2"),
        ("r.test/app", "r.test/app:latest", "app"),
        ("r.test:5000/a/b/app:V1", "r.test:5000/a/b/app:V1", "app-v1"),
        ("localhost/app", "localhost/app:latest", "app"),
        ("[::1]:5000/app", "[::1]:5000/app:latest", "app"),
        ("r.test/app@sha256:" + "a" * 64, "r.test/app@sha256:" + "a" * 64, "app"),
    ],
)
def test_references(text: str, whole: str, local: str) -> None:
    assert str(references.parse(text, "d.test")) == whole
    assert references.local_name(text) == local


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "a/",
        "A",
        "a//b",
        "a:",
        "a:" + "x" * 200,
        "a@sha256:1",
        "a@",
        "r.test/../x",
        "a b",
        "-x.test/a",
        "a" * 2000,
    ],
)
def test_references_that_are_none(text: str) -> None:
    with pytest.raises(NameInvalid):
        references.parse(text, "d.test")


def test_a_short_name_needs_a_registry_that_somebody_set() -> None:
    with pytest.raises(NameInvalid) as refused:
        references.parse("app")
    assert "default_registry" in refused.value.hint


@pytest.mark.parametrize(
    ("registry", "is_here"),
    [
        ("127.0.0.1:5000", True),
        ("localhost", True),
        ("[::1]:5000", True),
        ("10.0.0.1", False),
        ("localhost.a", False),
    ],
)
def test_loopback(registry: str, is_here: bool) -> None:
    assert references.is_loopback(registry) == is_here
