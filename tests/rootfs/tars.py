"""Makes small tars for tests."""

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import zstandard


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def file(name: str, content: bytes = b"", *, mode: int = 0o644, uid: int = 0) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.mode, member.uid, member.gid, member.mtime = mode, uid, uid, 1_600_000_000
    return member, content


def folder(name: str, *, mode: int = 0o755, uid: int = 0) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.uid, member.gid, member.mtime = tarfile.DIRTYPE, mode, uid, uid, 1_600_000_000
    return member, b""


def link(name: str, to: str, *, is_hard: bool = False) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.LNKTYPE if is_hard else tarfile.SYMTYPE, to
    return member, b""


def device(name: str, kind: bytes = tarfile.CHRTYPE) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.devmajor, member.devminor = kind, 1, 3
    return member, b""


def packed(raw: bytes, how: str) -> bytes:
    if how == "gzip":
        return gzip.compress(raw, mtime=0)
    return zstandard.ZstdCompressor().compress(raw) if how == "zstd" else raw


def saved(folder: Path, content: bytes) -> tuple[Path, str]:
    """Write a blob and return its path and digest."""
    digest = hashlib.sha256(content).hexdigest()
    path = folder / f"{digest}.blob"
    path.write_bytes(content)
    return path, f"sha256:{digest}"
