"""Keeps images on disk as an OCI image layout: `oci-layout`, `index.json`, `blobs/sha256/<hex>`.

A blob appears under its name only when its size and digest have been checked and its bytes are on the disk,
so whoever finds one may believe it. `index.json` changes by rename, under a lock of the directory.
Refuses names that are not digests. Blocking; called by `rootfs.images`, `rootfs.artifacts` (through threads)
and `hostd.runtime.files`.

Source: OCI image-spec, `image-layout.md`, `manifest.md`, `annotations.md`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from rootfs import documents
from rootfs.errors import BlobMismatch, BlobMissing, DiskFull, ImageExists, ImageMissing, StoreBusy
from rootfs.types import (
    MEDIA_CONFIG,
    MEDIA_INDEX,
    MEDIA_MANIFEST,
    Image,
    ImageConfig,
    Layer,
    hex_of,
    parse_image_name,
)

_REF_NAME = "org.opencontainers.image.ref.name"
_REFERENCE = "io.hostd.reference"
CHUNK_BYTES = 1024 * 1024


class Store:
    """One image layout. Any number of processes may use it at the same time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blobs = path / "blobs" / "sha256"

    def create(self) -> None:
        """Make the layout's directories and files where they are missing."""
        self.blobs.mkdir(parents=True, exist_ok=True)
        if not (self.path / "oci-layout").exists():
            write_durably(self.path / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')

    # --- blobs

    def blob(self, digest: str) -> Path:
        """Return where the blob lies or would lie.

        Raises:
            NameInvalid: not a digest.
        """
        return self.blobs / hex_of(digest)

    def has_blob(self, digest: str) -> bool:
        """Say whether the blob is here, whole; who asks is about to use it, so `collect` leaves it for a while."""
        try:
            os.utime(self.blob(digest))
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def new_blob(
        self, digest: str = "", size_bytes: int | None = None, *, inspect: Callable[[Path], None] | None = None
    ) -> Iterator[BlobWriter]:
        """Write a blob in pieces; it is kept at the end of the block, unless that or `inspect` of its file raises.

        Raises:
            BlobMismatch: it is not what `digest` and `size_bytes` promised.
            DiskFull: no room; nothing is left behind.
        """
        self.create()
        with self._temporary_file() as file:
            writer = BlobWriter(file, digest, size_bytes)
            yield writer
            writer.check()
            file.flush()
            if inspect is not None:
                inspect(Path(file.name))
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            self._keep(Path(file.name), self.blob(writer.digest))

    def add_blob(self, source: Path | bytes, digest: str = "", size_bytes: int | None = None) -> str:
        """Copy bytes or a file in, and return the digest. A file of the same disk is linked, not copied.

        Raises:
            BlobMismatch: it is not what `digest` and `size_bytes` promised.
        """
        if isinstance(source, Path) and digest and self.has_blob(digest):
            return digest
        if isinstance(source, bytes):
            with self.new_blob(digest, size_bytes) as writer:
                writer.write(source)
            return writer.digest
        found = digest_of(source)
        size = source.stat().st_size
        if (digest and found != digest) or (size_bytes is not None and size != size_bytes):
            raise BlobMismatch(f"{source} is {found} of {size} bytes, not {digest} of {size_bytes}")
        self.create()
        target = self.blob(found)
        if not target.exists():
            self._link_or_copy(source, target, found)
        return found

    def _link_or_copy(self, source: Path, target: Path, digest: str) -> None:
        try:
            os.link(source, target)
            sync_dir(self.blobs)
        except OSError as error:
            if error.errno == errno.EEXIST:
                return
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                raise
            with self.new_blob(digest) as writer, source.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    writer.write(chunk)

    def partial(self, digest: str) -> Path:
        """Return where the first bytes of a blob wait for the others."""
        return self.path / "partial" / hex_of(digest)

    def keep_file(
        self, source: Path, digest: str, size_bytes: int, *, inspect: Callable[[Path], None] | None = None
    ) -> None:
        """Make a file of this directory a blob, if it is the right one and `inspect` does not refuse it.

        Raises:
            BlobMismatch: it is another one.
        """
        self.create()
        found, size = digest_of(source), source.stat().st_size
        if found != digest or size != size_bytes:
            raise BlobMismatch(f"blob {digest} of {size_bytes} bytes came as {found} of {size} bytes")
        if inspect is not None:
            inspect(source)
        with source.open("rb") as file:
            os.fsync(file.fileno())
        source.chmod(0o644)
        self._keep(source, self.blob(digest))

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Keep `collect` away while parts of an image come that has no name yet."""
        self.create()
        with (self.path / ".busy").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def remove_blob(self, digest: str) -> None:
        """Remove a blob if it is here."""
        self.blob(digest).unlink(missing_ok=True)

    def read_blob(self, digest: str) -> bytes:
        """Return a small blob's bytes.

        Raises:
            BlobMissing: it is not here.
        """
        try:
            return self.blob(digest).read_bytes()
        except FileNotFoundError as error:
            raise BlobMissing(f"no blob {digest} in {self.path}") from error

    # --- images

    def images(self) -> tuple[Image, ...]:
        """Return all images by name."""
        found = []
        for entry in self._index():
            if name := entry.get("annotations", {}).get(_REF_NAME):
                found.append(self._read_image(name, entry))
        return tuple(sorted(found, key=lambda image: image.name))

    def image(self, name: str) -> Image:
        """Return one image, by its name or by the reference that it was pulled by.

        Raises:
            ImageMissing: there is none of that name.
        """
        for key in (_REF_NAME, _REFERENCE):
            for entry in self._index():
                if name and entry.get("annotations", {}).get(key) == name:
                    return self._read_image(entry["annotations"][_REF_NAME], entry)
        raise ImageMissing(f"no image {name!r} on this host", hint="`hostd image list` shows what there is")

    def set_image(self, name: str, layers: Iterable[Layer], config: ImageConfig) -> Image:
        """Make `name` stand for these layers (bottom first), whose blobs must be here. Same input, same digest.

        Raises:
            BlobMissing: a layer is not here.
        """
        parse_image_name(name)
        kept = tuple(layers)
        for layer in kept:
            if not self.has_blob(layer.digest):
                raise BlobMissing(f"layer {layer.digest} of image {name} is not in {self.path}")
        config_bytes = _encode(_config_document(kept, config))
        manifest = _encode(_manifest_document(kept, self.add_blob(config_bytes), len(config_bytes)))
        digest = self.add_blob(manifest)
        self._enter(name, digest, len(manifest), MEDIA_MANIFEST, "", is_replacing=True)
        return Image(name=name, digest=digest, layers=kept, config=config)

    def add_image(self, name: str, manifest: bytes, *, reference: str = "", is_replacing: bool = False) -> Image:
        """Make `name` stand for a manifest from elsewhere, byte for byte; all its blobs must be here and checked.

        Raises:
            BlobMissing: a part is not here.
            ImageExists: the name stands for something else, which was not pulled by the same reference.
            ImageInvalid: the manifest cannot be read.
        """
        parse_image_name(name)
        found = documents.manifest_of(manifest)
        for part in (found.config, *found.layers):
            if not self.has_blob(part.digest):
                raise BlobMissing(f"blob {part.digest} of image {name} is not in {self.path}")
        digest = self.add_blob(manifest)
        self._enter(name, digest, len(manifest), documents.media_type_of(manifest), reference, is_replacing)
        return self.image(name)

    def _enter(
        self, name: str, digest: str, size_bytes: int, media_type: str, reference: str, is_replacing: bool
    ) -> None:
        annotations = {_REF_NAME: name} | ({_REFERENCE: reference} if reference else {})
        entry = {"mediaType": media_type, "digest": digest, "size": size_bytes, "annotations": annotations}
        with self._locked():
            others = []
            for each in self._index():
                notes = each.get("annotations", {})
                if notes.get(_REF_NAME) != name:
                    others.append(each)
                elif not (
                    is_replacing or each["digest"] == digest or (reference and notes.get(_REFERENCE) == reference)
                ):
                    raise ImageExists(
                        f"the name {name!r} stands for another image", hint="--name another, or --replace this one"
                    )
            self._write_index([*others, entry])

    def remove_image(self, name: str) -> None:
        """Forget a name; its blobs stay until `collect`.

        Raises:
            ImageMissing: there is none of that name.
        """
        with self._locked():
            index = self._index()
            kept = [each for each in index if each.get("annotations", {}).get(_REF_NAME) != name]
            if len(kept) == len(index):
                raise ImageMissing(f"no image {name!r} on this host", hint="`hostd image list` shows what there is")
            self._write_index(kept)

    def collect(self, keep: Iterable[str] = (), *, unused_for_s: float = 0.0, is_dry_run: bool = False) -> int:
        """Remove every blob that no image and nobody in `keep` needs, and what pulls left; return the bytes freed.

        A blob that somebody wrote or asked for in the last `unused_for_s` stays; `is_dry_run` only counts.

        Raises:
            StoreBusy: an image is coming in, or being built: its parts would look unneeded until it has a name.
        """
        newest = time.time() - unused_for_s  # noqa: TID251 — compared with the file system's own times
        needed = {hex_of(digest) for digest in keep}
        freed = 0
        with self._locked(), self._idle():
            for entry in self._index():
                manifest = documents.decode(self.read_blob(entry["digest"]), documents.Manifest, "the manifest")
                needed.add(hex_of(entry["digest"]))
                needed.update(hex_of(part.digest) for part in (manifest.config, *manifest.layers))
            partial = self.path / "partial"
            for path in [*self.blobs.iterdir(), *(partial.iterdir() if partial.is_dir() else ())]:
                if path.parent != partial and path.name in needed:
                    continue
                if _is_being_written(path) or path.stat().st_ctime > newest:
                    continue
                freed += path.stat().st_size
                if not is_dry_run:
                    path.unlink()
        return freed

    @contextmanager
    def _idle(self) -> Iterator[None]:
        with (self.path / ".busy").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreBusy("an image is coming in", hint="try again when that is done") from None
            yield

    # --- the files

    def _index(self) -> list[dict[str, Any]]:
        try:
            document = msgspec.json.decode((self.path / "index.json").read_bytes())
        except FileNotFoundError:
            return []
        manifests: list[dict[str, Any]] = document["manifests"]
        return manifests

    def _write_index(self, manifests: list[dict[str, Any]]) -> None:
        document = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": manifests}
        write_durably(self.path / "index.json", _encode(document))

    def _read_image(self, name: str, entry: dict[str, Any]) -> Image:
        manifest = documents.decode(self.read_blob(entry["digest"]), documents.Manifest, f"the manifest of {name}")
        config = documents.decode(self.read_blob(manifest.config.digest), documents.Config, f"the config of {name}")
        return Image(
            name=name,
            digest=entry["digest"],
            layers=documents.layers_of(manifest, config),
            config=documents.runtime_of(config),
            reference=entry.get("annotations", {}).get(_REFERENCE, ""),
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.create()
        with (self.path / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _temporary_file(self) -> Iterator[IO[bytes]]:
        try:
            with tempfile.NamedTemporaryFile(dir=self.blobs, prefix=".", delete=False) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    yield file
                finally:
                    Path(file.name).unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"no room in {self.path}", hint="free some disk space, then try again") from error
            raise

    def _keep(self, temporary: Path, target: Path) -> None:
        temporary.replace(target)
        sync_dir(self.blobs)


class BlobWriter:
    """Writes a blob's bytes and counts and hashes them on the way."""

    def __init__(self, file: IO[bytes], digest: str, size_bytes: int | None) -> None:
        if digest:
            hex_of(digest)
        self._file = file
        self._wanted = digest
        self._size_wanted = size_bytes
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    @property
    def digest(self) -> str:
        """Return the digest of what was written until now."""
        return "sha256:" + self._hash.hexdigest()

    def write(self, chunk: bytes | memoryview) -> None:
        """Write the next piece.

        Raises:
            BlobMismatch: it is already longer than promised.
        """
        self.size_bytes += len(chunk)
        if self._size_wanted is not None and self.size_bytes > self._size_wanted:
            raise BlobMismatch(f"blob {self._wanted} is longer than the {self._size_wanted} bytes promised")
        self._hash.update(chunk)
        self._file.write(chunk)

    def check(self) -> None:
        """Compare with what was promised.

        Raises:
            BlobMismatch: size or digest differ.
        """
        if self._size_wanted is not None and self.size_bytes != self._size_wanted:
            raise BlobMismatch(f"blob {self._wanted} has {self.size_bytes} bytes, not {self._size_wanted}")
        if self._wanted and self.digest != self._wanted:
            raise BlobMismatch(f"blob has digest {self.digest}, not {self._wanted}")


def digest_of(path: Path) -> str:
    """Return a file's digest."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Replace a small file: after a power cut it is the old or the new one, never a part."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    sync_dir(path.parent)


def sync_dir(path: Path) -> None:
    """Make the names of a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_being_written(path: Path) -> bool:
    """Tell a temporary file at work, which its writer has locked, from one that a crash left."""
    if not path.name.startswith("."):
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _encode(document: object) -> bytes:
    return msgspec.json.encode(document, order="deterministic")


def _config_document(layers: tuple[Layer, ...], config: ImageConfig) -> dict[str, Any]:
    machine = os.uname().machine
    return {
        "architecture": documents.ARCHITECTURES.get(machine, machine),
        "os": "linux",
        "config": {
            "Entrypoint": list(config.entrypoint),
            "Cmd": list(config.cmd),
            "Env": [f"{name}={value}" for name, value in sorted(config.env.items())],
            "WorkingDir": config.working_dir,
            "User": config.user,
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id or layer.digest for layer in layers]},
    }


def _manifest_document(layers: tuple[Layer, ...], config_digest: str, config_size: int) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": MEDIA_MANIFEST,
        "config": {"mediaType": MEDIA_CONFIG, "digest": config_digest, "size": config_size},
        "layers": [
            {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size_bytes} for layer in layers
        ],
    }
