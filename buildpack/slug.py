"""Packs a built app as one image layer: a tar of `app/…`, compressed by zstd, named by its SHA-256.

Everything in it belongs to root and is readable by all; sockets and devices stay out. Times are kept
(they are the commit's), because web servers derive ETags from them. Called by `compile`; standard
library and the `zstd` program only.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from buildpack.refusals import BuildRefused

MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+zstd"
_SUFFIXES = "BKMGT"


@dataclass(frozen=True)
class Slug:
    """A packed slug; `digest` is `sha256:HEX` of the compressed file."""

    path: Path
    digest: str
    size_bytes: int


def pack(app: Path, destination: Path) -> Slug:
    """Write the layer to `destination`.

    Raises:
        OSError: the disk is full or a file cannot be read.
        BuildRefused: the compressor failed.
    """
    with destination.open("wb") as file:
        with subprocess.Popen(["zstd", "-q", "-T0", "-3", "-c"], stdin=subprocess.PIPE, stdout=file) as compressor:
            assert compressor.stdin is not None
            try:
                with tarfile.open(fileobj=compressor.stdin, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                    _fill(tar, app)
                compressor.stdin.close()
            except BrokenPipeError as error:
                raise BuildRefused("the slug cannot be written: is the builder's disk full?") from error
        if compressor.returncode != 0:
            raise BuildRefused(f"the slug cannot be compressed (zstd: exit status {compressor.returncode})")
    with destination.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Slug(destination, f"sha256:{digest}", destination.stat().st_size)


def _fill(tar: tarfile.TarFile, app: Path) -> None:
    for path in [app, *_below(app)]:
        name = "app" if path == app else f"app/{path.relative_to(app)}"
        entry = tar.gettarinfo(path, name)
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        if entry.isdir():
            entry.mode = 0o755
        elif entry.isreg() or entry.islnk():
            entry.mode = 0o755 if entry.mode & stat.S_IXUSR else 0o644
        elif not entry.issym():
            continue
        if entry.isreg():
            with path.open("rb") as file:
                tar.addfile(entry, file)
        else:
            tar.addfile(entry)


def _below(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if path.is_socket():
            continue
        yield path
        if entry.is_dir(follow_symlinks=False):
            yield from _below(path)


def human_size(size_bytes: int) -> str:
    """Say a size as the article does: `5.2M`."""
    size = float(size_bytes)
    for suffix in _SUFFIXES:
        if size < 1024 or suffix == _SUFFIXES[-1]:
            break
        size /= 1024
    return f"{size:.0f}{suffix}" if suffix == "B" else f"{size:.1f}{suffix}"
