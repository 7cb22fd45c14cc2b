"""Registries for tests: a small one that misbehaves on demand, and the real one of Debian's package."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.rootfs.ociimages import Files

USER, PASSWORD = "reader", "opensesame"
_HTPASSWD = "reader:$2b$05$enJUzz1Lvhv9BqjvVbh0Eu21y6PrCY0WHsXMcQdYfjfmMB.dLQZyS\n"


class Handler(BaseHTTPRequestHandler):
    """Answers from `files`: `manifests/WANTED`, `blobs/sha256:…`; `faults` may answer first."""

    server: Any
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        for fault in self.server.faults:
            if fault(self):
                self.close_connection = True
                return
        name = self.path.rpartition("/v2/app/")[2]
        if name not in self.server.files:
            return self.reply(404, b"{}")
        content = self.server.files[name]
        kind = "application/octet-stream"
        if name.startswith("manifests/"):
            kind = f"application/vnd.oci.image.{'index' if b'manifests' in content else 'manifest'}.v1+json"
        begin = self.headers.get("Range", "").removeprefix("bytes=").removesuffix("-")
        if begin:
            at = int(begin)
            return self.reply(206, content[at:], **{"Content-Range": f"bytes {at}-{len(content) - 1}/{len(content)}"})
        return self.reply(200, content, **{"Content-Type": kind})

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


Fault = Callable[[Handler], bool]


class Odd(ThreadingHTTPServer):
    """A registry with one repository, `app`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, files: Files) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, dict[str, str]]] = []

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def asked(self, part: str) -> list[dict[str, str]]:
        return [headers for path, headers in self.requests if part in path]

    def handle_error(self, *_: Any) -> None: ...


def of_layout(files: Files, tag: str = "latest") -> Files:
    """Return an OCI layout as what a registry answers."""
    import json

    served: Files = {}
    for name, content in files.items():
        if name.startswith("blobs/sha256/"):
            digest = name.removeprefix("blobs/sha256/")
            served[f"blobs/sha256:{digest}"] = served[f"manifests/sha256:{digest}"] = content
    first = json.loads(files["index.json"])["manifests"][0]["digest"]
    served[f"manifests/{tag}"] = served[f"manifests/{first}"]
    return served


@contextlib.contextmanager
def odd(files: Files) -> Iterator[Odd]:
    with Odd(of_layout(files)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def real(folder: Path, *, certificate: Path | None = None) -> Iterator[str]:
    """Start Debian's `docker-registry` with a password; give its name."""
    program = shutil.which("docker-registry")
    assert program
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "htpasswd").write_text(_HTPASSWD)
    tls = f"\n  tls:\n    certificate: {certificate}\n    key: {certificate}" if certificate else ""
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {folder}/data\n"
        f"http:\n  addr: 127.0.0.1:{port}{tls}\n"
        f"auth:\n  htpasswd:\n    realm: test\n    path: {folder}/htpasswd\n"
    )
    with (folder / "log").open("wb") as log:
        registry = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.monotonic() < end, (folder / "log").read_text()
            assert registry.poll() is None, (folder / "log").read_text()
            time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        registry.send_signal(signal.SIGTERM)
        registry.wait(20)


def push(registry: str, layout: Path, name: str, *more: str) -> None:
    """Push with skopeo."""
    command = [
        "skopeo",
        "--insecure-policy",
        "copy",
        "-q",
        "--dest-tls-verify=false",
        f"--dest-creds={USER}:{PASSWORD}",
    ]
    command += [*more, f"oci:{layout}", f"docker://{registry}/{name}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=dict(os.environ) | {"NO_PROXY": "*"})
    assert run.returncode == 0, run.stderr
