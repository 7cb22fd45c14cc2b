from __future__ import annotations

import hashlib
import io
import os
import socket
import tarfile
from pathlib import Path

import pytest
import zstandard

from buildpack import slug


def _members(path: Path) -> dict[str, tarfile.TarInfo]:
    raw = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        return {member.name: member for member in tar.getmembers()}


def test_a_slug_is_the_app_below_app_and_belongs_to_root(tmp_path: Path) -> None:
    app = tmp_path / "x"
    (app / "bin").mkdir(parents=True)
    (app / "bin" / "run").write_text("#!/bin/sh")
    (app / "bin" / "run").chmod(0o4711)
    (app / "data").write_text("x")
    (app / "data").chmod(0o600)
    os.utime(app / "data", (1000, 1000))
    (app / "link").symlink_to("/etc/passwd")
    (app / "Ünïcode").mkdir(mode=0o700)
    packed = slug.pack(app, tmp_path / "slug")
    members = _members(packed.path)
    assert list(members) == ["app", "app/bin", "app/bin/run", "app/data", "app/link", "app/Ünïcode"]
    assert {(member.uid, member.gid, member.uname) for member in members.values()} == {(0, 0, "")}
    modes = {name: oct(member.mode) for name, member in members.items() if not member.issym()}
    assert modes["app"] == modes["app/bin"] == modes["app/bin/run"] == modes["app/Ünïcode"] == "0o755"
    assert modes["app/data"] == "0o644"
    assert members["app/link"].linkname == "/etc/passwd"
    assert members["app/data"].mtime == 1000
    assert packed.digest == "sha256:" + hashlib.sha256(packed.path.read_bytes()).hexdigest()
    assert packed.size_bytes == packed.path.stat().st_size


def test_pipes_and_sockets_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = tmp_path / "x"
    app.mkdir()
    os.mkfifo(app / "pipe")
    monkeypatch.chdir(app)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        packed = slug.pack(app, tmp_path / "slug")
    assert list(_members(packed.path)) == ["app"]


def test_the_same_app_packs_to_the_same_slug(tmp_path: Path) -> None:
    app = tmp_path / "x"
    app.mkdir()
    for name in ("b", "a", "c"):
        (app / name).write_text(name)
    assert slug.pack(app, tmp_path / "1").digest == slug.pack(app, tmp_path / "2").digest


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0B"), (1023, "1023B"), (1536, "1.5K"), (5_452_595, "5.2M"), (3 * 1024**3, "3.0G")]
)
def test_sizes_are_said_as_in_the_article(size: int, shown: str) -> None:
    assert slug.human_size(size) == shown
