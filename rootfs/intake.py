"""Takes images from the world into the store: checked to the last byte first, named only when all of it is here.

Reads OCI archives, OCI layout directories and what `docker save` writes; `rootfs.registry` brings the parts of others
through the same door (`take`). Size and digest of every part are compared, every layer is unpacked for a look
(`rootfs.unpack.look_through`) and compared with its diff_id, and an image as a whole is bounded. What is refused
half-way has no name; whole layers that came with it stay for another try until `Store.collect`. Blocking.

Source: OCI image-spec `image-layout.md`; docker's `image/tarexport`.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from rootfs import archive, documents
from rootfs.archive import Source
from rootfs.documents import Descriptor, Manifest, Saved
from rootfs.errors import BlobMismatch, ImageInvalid, NameInvalid
from rootfs.layerstream import Limits
from rootfs.reference import local_name
from rootfs.store import CHUNK_BYTES, Store
from rootfs.types import (
    MEDIA_CONFIG,
    MEDIA_MANIFEST,
    MEDIA_TAR,
    MEDIA_TAR_GZIP,
    MEDIA_TAR_ZSTD,
    Image,
    hex_of,
    parse_image_name,
)
from rootfs.unpack import look_through

_NAME_NOTES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_INDEX_DEPTH_MAX = 4
_HEX = re.compile("[0-9a-f]{64}")
Progress = Callable[[str], None]
FetchBlob = Callable[[Descriptor, Callable[[Path], None]], None]
"""Puts a blob into the store; the function is given the file's path and refuses what it does not like."""
ForEach = Callable[[Callable[[Descriptor], None], list[Descriptor]], None]


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What one image may be, all layers together."""

    layer: Limits = field(default_factory=Limits)
    bytes_max: int = 64 * 1024**3
    entries_max: int = 4_000_000


def import_images(
    store: Store,
    path: Path,
    *,
    name: str = "",
    is_replacing: bool = False,
    limits: ImageLimits | None = None,
    progress: Progress = lambda text: None,
) -> tuple[Image, ...]:
    """Import every image of an archive or directory (of an index only the one for this machine).

    `name` is for an archive with one image; otherwise they are called as the archive says.

    Raises:
        ImageInvalid, LayerInvalid, BlobMismatch: refused, and why.
        ImageExists: the name is taken. NameInvalid: no name can be made of what the archive says.
        DiskFull: no room.
    """
    if name:
        parse_image_name(name)
    store.create()
    with store.busy(), archive.opened(path, store.path) as source:
        found = _find(source)
        if not found:
            raise ImageInvalid(f"{path} has no image")
        if name and len(found) != 1:
            raise ImageInvalid(f"{path} has {len(found)} images, --name is for one")
        names = [_name_for(name or local_name(each.said) or _stem(path)) for each in found]
        if len(set(names)) != len(names):
            raise NameInvalid(f"{path} has several images that would be called the same", hint=", ".join(names)[:200])
        intake = Intake(store, limits=limits, progress=progress)
        images = []
        for chosen, each in zip(names, found, strict=True):
            intake.take(each.manifest, each.fetch_from(store, source))
            images.append(store.add_image(chosen, each.manifest, is_replacing=is_replacing))
    return tuple(images)


def _name_for(text: str) -> str:
    try:
        return parse_image_name(text)
    except NameInvalid as error:
        raise NameInvalid(str(error), hint="say with --name what it is to be called here") from error


def one_by_one(act: Callable[[Descriptor], None], parts: list[Descriptor]) -> None:
    """Do it for each part."""
    for part in parts:
        act(part)


class Intake:
    """Checks the parts of images while they come into one store."""

    def __init__(
        self, store: Store, *, limits: ImageLimits | None = None, progress: Progress = lambda text: None
    ) -> None:
        self._store = store
        self._limits = limits or ImageLimits()
        self._progress = progress
        self._looked: dict[tuple[str, str], tuple[int, int]] = {}

    def take(self, content: bytes, fetch: FetchBlob, for_each: ForEach = one_by_one) -> Manifest:
        """Bring all parts of a manifest into the store; `for_each` may do it for several layers at a time.

        Raises:
            ImageInvalid, LayerInvalid, BlobMismatch, DiskFull: refused, and why; whatever `fetch` raises.
        """
        manifest = documents.manifest_of(content)
        if documents.media_type_of(content) not in documents.MANIFEST_TYPES:
            raise ImageInvalid("an index where a manifest belongs")
        if not manifest.layers:
            raise ImageInvalid("an image without layers", hint="nothing of it could run")
        self._have(manifest.config, fetch, lambda path: None)
        config = documents.config_of(self._store.read_blob(manifest.config.digest), len(manifest.layers))
        diff_ids: dict[str, str] = {}
        for layer, diff_id in zip(manifest.layers, config.rootfs.diff_ids, strict=True):
            if diff_ids.setdefault(layer.digest, diff_id) != diff_id:
                raise ImageInvalid(f"layer {layer.digest} with two diff_ids")
        unique = {layer.digest: layer for layer in manifest.layers}

        def bring(layer: Descriptor) -> None:
            self._layer(layer, diff_ids[layer.digest], fetch)

        for_each(bring, list(unique.values()))
        looked = [self._looked[layer.digest, diff_ids[layer.digest]] for layer in manifest.layers]
        bytes_all, entries_all = (sum(column) for column in zip(*looked, strict=True))
        if bytes_all > self._limits.bytes_max or entries_all > self._limits.entries_max:
            raise ImageInvalid(f"{bytes_all} bytes in {entries_all} files are more than one image may have")
        return manifest

    def _layer(self, layer: Descriptor, diff_id: str, fetch: FetchBlob) -> None:
        def inspect(path: Path) -> None:
            if (layer.digest, diff_id) in self._looked:
                return
            self._looked[layer.digest, diff_id] = look_through(
                path, digest=layer.digest, diff_id=diff_id, limits=self._limits.layer
            )

        self._progress(f"layer {layer.digest[7:19]}: {layer.size / 2**20:.1f} MiB")
        self._have(layer, fetch, inspect)

    def _have(self, part: Descriptor, fetch: FetchBlob, inspect: Callable[[Path], None]) -> None:
        path = self._store.blob(part.digest)
        if not path.is_file():
            fetch(part, inspect)
            return
        if path.stat().st_size != part.size:
            raise BlobMismatch(f"blob {part.digest} has {path.stat().st_size} bytes, not {part.size}")
        inspect(path)


def resolve(content: bytes, read: Callable[[Descriptor], bytes], said: str = "") -> bytes:
    """Return the manifest for this machine that a document is, or leads to.

    Raises:
        ImageInvalid: there is none, or indexes without an end; whatever `read` raises.
    """
    for _ in range(_INDEX_DEPTH_MAX):
        kind = documents.media_type_of(content, said)
        if kind in documents.MANIFEST_TYPES:
            return content
        entry = documents.choose(documents.index_of(content))
        content, said = read(entry), entry.media_type
    raise ImageInvalid(f"indexes in indexes, more than {_INDEX_DEPTH_MAX} deep")


def checked(content: bytes, part: Descriptor) -> bytes:
    """Return the bytes if they are what the descriptor says.

    Raises:
        BlobMismatch: they are not.
    """
    digest = _digest(content)
    if digest != part.digest or len(content) != part.size:
        raise BlobMismatch(f"{part.digest} of {part.size} bytes is {digest} of {len(content)} bytes")
    return content


@dataclass(frozen=True, kw_only=True)
class _Found:
    """One image of an archive: what it is called there, its manifest, and where else than by digest its blobs lie."""

    said: str
    manifest: bytes
    places: dict[str, str] = field(default_factory=dict)

    def fetch_from(self, store: Store, source: Source) -> FetchBlob:
        def fetch(part: Descriptor, inspect: Callable[[Path], None]) -> None:
            with (
                source.open(self.places.get(part.digest) or _blob_name(part.digest)) as file,
                store.new_blob(part.digest, part.size, inspect=inspect) as writer,
            ):
                while chunk := file.read(CHUNK_BYTES):
                    writer.write(chunk)

        return fetch


def _find(source: Source) -> list[_Found]:
    if source.has("oci-layout") and source.has("index.json"):
        return _of_layout(source)
    if source.has("manifest.json"):
        saved = documents.decode(archive.read(source, "manifest.json"), tuple[Saved, ...], "manifest.json")
        return [_Found(said=said, **_of_saved(source, each)) for each in saved for said in each.repo_tags or ("",)]
    raise ImageInvalid("no image", hint="an OCI archive, an OCI layout directory, or what `docker save` wrote")


def _of_layout(source: Source) -> list[_Found]:
    index = documents.index_of(archive.read(source, "index.json"))

    def read(part: Descriptor) -> bytes:
        return checked(archive.read(source, _blob_name(part.digest)), part)

    groups: dict[str, list[Descriptor]] = {}
    for entry in index.manifests:
        groups.setdefault(_said_of(entry.annotations or {}), []).append(entry)
    found = []
    for said, entries in groups.items():
        one = entries[0] if len(entries) == 1 else documents.choose(documents.Index(manifests=tuple(entries)))
        # A mere tag says little about a lone image: its file's name says more.
        is_name = "/" in said or ":" in said or len(groups) > 1
        found.append(_Found(said=said if is_name else "", manifest=resolve(read(one), read, one.media_type)))
    return found


def _said_of(notes: dict[str, str]) -> str:
    texts = [notes.get(key, "") for key in _NAME_NOTES]
    return next((text for text in texts if "/" in text or ":" in text), texts[1])


def _of_saved(source: Source, saved: Saved) -> dict[str, Any]:
    """Make the manifest that `docker save` does not write; the config stays as it is."""
    config = archive.read(source, saved.config)
    stem = posixpath.basename(saved.config).removesuffix(".json")
    digest = _digest(config)
    if _HEX.fullmatch(stem) and digest != f"sha256:{stem}":
        raise BlobMismatch(f"config {saved.config[:200]} has digest {digest}")
    if len(saved.layers or ()) > documents.LAYERS_MAX:
        raise ImageInvalid(f"{len(saved.layers or ())} layers, more than {documents.LAYERS_MAX}")
    layers, places = [], {digest: saved.config}
    for name in saved.layers or ():
        layer = _measure(source, name)
        layers.append(layer)
        places[layer["digest"]] = name
    document = {
        "schemaVersion": 2,
        "mediaType": MEDIA_MANIFEST,
        "config": {"mediaType": MEDIA_CONFIG, "digest": digest, "size": len(config)},
        "layers": layers,
    }
    return {"manifest": msgspec.json.encode(document, order="deterministic"), "places": places}


def _measure(source: Source, name: str) -> dict[str, Any]:
    hashing, size, media_type = hashlib.sha256(), 0, MEDIA_TAR
    with source.open(name) as file:
        while chunk := file.read(CHUNK_BYTES):
            if not size:
                media_type = MEDIA_TAR_GZIP if chunk[:2] == b"\x1f\x8b" else media_type
                media_type = MEDIA_TAR_ZSTD if chunk[:4] == b"\x28\xb5\x2f\xfd" else media_type
            hashing.update(chunk)
            size += len(chunk)
    stem = posixpath.basename(name)
    if _HEX.fullmatch(stem) and stem != hashing.hexdigest():
        raise BlobMismatch(f"layer {name[:200]} has digest sha256:{hashing.hexdigest()}")
    return {"mediaType": media_type, "digest": f"sha256:{hashing.hexdigest()}", "size": size}


def _blob_name(digest: str) -> str:
    return f"blobs/sha256/{hex_of(digest)}"


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _stem(path: Path) -> str:
    name = path.absolute().name.lower()
    for ending in (".gz", ".tgz", ".zst", ".tar", ".oci"):
        name = name.removesuffix(ending)
    return name
