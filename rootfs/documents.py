"""Reads the JSON that describes an image: OCI and Docker manifests, indexes, configs, and `docker save`'s list.

Pure: bytes in, checked values out. Refuses documents that are too large, have too many parts or text that no kernel
takes, digests that are none, layers that lie elsewhere (`urls`, "foreign" or "nondistributable" media types),
Docker's first manifest format, and images for another machine. Called by `rootfs.store`, `rootfs.intake` and
`rootfs.registry`.

Source: OCI image-spec `manifest.md`, `image-index.md`, `config.md`; distribution `manifest-v2-2.md`.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import msgspec

from rootfs.errors import ImageInvalid, NameInvalid
from rootfs.types import MEDIA_INDEX, MEDIA_MANIFEST, ImageConfig, Layer, hex_of

_DOCKER = "application/vnd.docker.distribution.manifest."
MANIFEST_TYPES = (MEDIA_MANIFEST, _DOCKER + "v2+json")
INDEX_TYPES = (MEDIA_INDEX, _DOCKER + "list.v2+json")
_OLD_TYPES = (_DOCKER + "v1+json", _DOCKER + "v1+prettyjws")

DOCUMENT_BYTES_MAX = 4 * 1024 * 1024
LAYERS_MAX = 127
_INDEX_ENTRIES_MAX = 1000
_PARTS_MAX = 4096
_TEXT_BYTES_MAX = 128 * 1024
_LAYER_BYTES_MAX = 16 * 1024**3
_CONFIG_BYTES_MAX = DOCUMENT_BYTES_MAX
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64", "ppc64le": "ppc64le", "s390x": "s390x"}

T = TypeVar("T")


class _Loose(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a foreign document; what we do not know in it is left alone."""


class Platform(_Loose, frozen=True, kw_only=True):
    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(_Loose, frozen=True, kw_only=True):
    """Names a blob: its digest, size in bytes and what it is."""

    digest: str
    size: int
    media_type: str = msgspec.field(name="mediaType", default="")
    urls: tuple[str, ...] | None = None
    annotations: dict[str, str] | None = None
    platform: Platform | None = None


class Index(_Loose, frozen=True, kw_only=True):
    manifests: tuple[Descriptor, ...]
    media_type: str = msgspec.field(name="mediaType", default="")


class Manifest(_Loose, frozen=True, kw_only=True):
    config: Descriptor
    layers: tuple[Descriptor, ...] = ()
    media_type: str = msgspec.field(name="mediaType", default="")


class _RootFs(_Loose, frozen=True, kw_only=True):
    diff_ids: tuple[str, ...] = ()


class _Runtime(_Loose, frozen=True, kw_only=True, rename="pascal"):
    entrypoint: tuple[str, ...] | str | None = None
    cmd: tuple[str, ...] | str | None = None
    env: tuple[str, ...] | None = None
    working_dir: str | None = None
    user: str | None = None
    volumes: dict[str, Any] | None = None
    exposed_ports: dict[str, Any] | None = None
    stop_signal: str | None = None
    labels: dict[str, str] | None = None


class Config(_Loose, frozen=True, kw_only=True):
    """The config document: what runs, on which machine, and the digests of the tars inside the layers."""

    architecture: str = ""
    os: str = ""
    rootfs: _RootFs = _RootFs()
    config: _Runtime | None = None


class Saved(_Loose, frozen=True, kw_only=True, rename="pascal"):
    """One image of the `manifest.json` that `docker save` writes."""

    config: str
    layers: tuple[str, ...] | None = None
    repo_tags: tuple[str, ...] | None = None


def decode(content: bytes, kind: type[T], what: str) -> T:
    """Read one document.

    Raises:
        ImageInvalid: too large, not JSON, or not of that shape.
    """
    if len(content) > DOCUMENT_BYTES_MAX:
        raise ImageInvalid(f"{what} has {len(content)} bytes, more than {DOCUMENT_BYTES_MAX}")
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ImageInvalid(f"{what} does not parse: {error}") from error


def media_type_of(content: bytes, said: str = "") -> str:
    """Return what a document is, from what it says itself, what was `said` of it, or its shape.

    Raises:
        ImageInvalid: no manifest and no index, or one of a format that is no longer read.
    """
    found = decode(content, dict[str, msgspec.Raw], "the manifest")
    own = found.get("mediaType")
    kind = decode(bytes(own), str, "mediaType") if own is not None else ""
    if not kind:
        kind = MEDIA_INDEX if "manifests" in found else MEDIA_MANIFEST if "layers" in found else said
    if kind in _OLD_TYPES or "fsLayers" in found:
        raise ImageInvalid("a manifest of Docker's first format", hint="push it again with a tool of this decade")
    if kind not in MANIFEST_TYPES + INDEX_TYPES:
        raise ImageInvalid(f"{kind[:100]!r} is neither a manifest nor an index")
    if "manifests" in found and "layers" in found:
        raise ImageInvalid("a document that would be manifest and index at once")
    if said in MANIFEST_TYPES + INDEX_TYPES and (said in INDEX_TYPES) != (kind in INDEX_TYPES):
        raise ImageInvalid(f"it says {kind}, but {said} was said of it")
    return kind


def index_of(content: bytes) -> Index:
    """Read an index.

    Raises:
        ImageInvalid: it is none, or one of its entries cannot be.
    """
    index = decode(content, Index, "the index")
    if len(index.manifests) > _INDEX_ENTRIES_MAX:
        raise ImageInvalid(f"the index has {len(index.manifests)} entries, more than {_INDEX_ENTRIES_MAX}")
    for entry in index.manifests:
        check(entry, DOCUMENT_BYTES_MAX, "a manifest")
    return index


def check(part: Descriptor, bytes_max: int, what: str) -> None:
    """Refuse a descriptor whose digest or size cannot be.

    Raises:
        ImageInvalid: says which.
    """
    try:
        hex_of(part.digest)
    except NameInvalid as error:
        raise ImageInvalid(f"{what}: {error}", hint="only sha256 digests are understood") from error
    if not 0 <= part.size <= bytes_max:
        raise ImageInvalid(f"{what} {part.digest} of {part.size} bytes, not 0 to {bytes_max}")


def choose(index: Index, machine: str = "") -> Descriptor:
    """Return the entry for this machine (or `machine`, as `uname -m` says it).

    Raises:
        ImageInvalid: there is none; says which there are.
    """
    wanted = machine or os.uname().machine
    architecture = ARCHITECTURES.get(wanted, wanted)
    fitting = [
        entry
        for entry in index.manifests
        if entry.platform is not None
        and (entry.platform.os, entry.platform.architecture) == ("linux", architecture)
        and (entry.media_type in MANIFEST_TYPES + INDEX_TYPES or not entry.media_type)
    ]
    if not fitting and len(index.manifests) == 1 and index.manifests[0].platform is None:
        return index.manifests[0]
    if not fitting:
        found = sorted({f"{e.platform.os}/{e.platform.architecture}" for e in index.manifests if e.platform})
        raise ImageInvalid(f"no image for linux/{architecture}, only {', '.join(found)[:200] or 'nameless ones'}")
    # The plainest variant: one for newer processors would not start on an older one.
    return min(fitting, key=lambda entry: entry.platform.variant if entry.platform else "")


def manifest_of(content: bytes) -> Manifest:
    """Read a manifest.

    Raises:
        ImageInvalid: it is none, or one of its parts cannot be or lies elsewhere.
    """
    manifest = decode(content, Manifest, "the manifest")
    check(manifest.config, _CONFIG_BYTES_MAX, "the config")
    if len(manifest.layers) > LAYERS_MAX:
        raise ImageInvalid(f"{len(manifest.layers)} layers, more than {LAYERS_MAX}")
    for layer in manifest.layers:
        check(layer, _LAYER_BYTES_MAX, "layer")
        if layer.urls or "foreign" in layer.media_type or "nondistributable" in layer.media_type:
            raise ImageInvalid(
                f"layer {layer.digest} is foreign ({layer.media_type}): it lies elsewhere and may not be passed on",
                hint="use an image whose layers are all its own",
            )
        if "tar" not in layer.media_type or "encrypted" in layer.media_type:
            raise ImageInvalid(f"layer {layer.digest} is {layer.media_type[:100]!r}, no tar")
    return manifest


def config_of(content: bytes, layers: int, machine: str = "") -> Config:
    """Read a config for a manifest with so many layers.

    Raises:
        ImageInvalid: it is none, for another machine, or lists another number of layers.
    """
    config = decode(content, Config, "the config")
    wanted = machine or os.uname().machine
    architecture = ARCHITECTURES.get(wanted, wanted)
    if (config.os or "linux", config.architecture or architecture) != ("linux", architecture):
        raise ImageInvalid(
            f"an image for {config.os[:40]}/{config.architecture[:40]}, this host is linux/{architecture}"
        )
    if len(config.rootfs.diff_ids) != layers:
        raise ImageInvalid(f"the config lists {len(config.rootfs.diff_ids)} layers, the manifest {layers}")
    for diff_id in config.rootfs.diff_ids:
        check(Descriptor(digest=diff_id, size=0), 0, "a diff_id")
    runtime_of(config)
    return config


def layers_of(manifest: Manifest, config: Config) -> tuple[Layer, ...]:
    """Return the layers, bottom first."""
    pairs = zip(manifest.layers, config.rootfs.diff_ids, strict=True)
    return tuple(
        Layer(digest=part.digest, size_bytes=part.size, media_type=part.media_type, diff_id=diff_id)
        for part, diff_id in pairs
    )


def runtime_of(config: Config) -> ImageConfig:
    """Return what the image asks of whoever runs it.

    Raises:
        ImageInvalid: too many words, or some that no program can be given.
    """
    found = config.config or _Runtime()
    env = {}
    for text in found.env or ():
        name, _, value = text.partition("=")
        if name:
            env[name] = value
    made = ImageConfig(
        entrypoint=_words(found.entrypoint),
        cmd=_words(found.cmd),
        env=env,
        working_dir=found.working_dir or "/",
        user=found.user or "",
        volumes=tuple(sorted(found.volumes or ())),
        exposed_ports=tuple(sorted(found.exposed_ports or ())),
        stop_signal=found.stop_signal or "",
        labels=found.labels or {},
    )
    texts = [*made.entrypoint, *made.cmd, *made.volumes, *made.exposed_ports, made.working_dir, made.user]
    texts += [text for pair in (*made.env.items(), *made.labels.items()) for text in pair]
    if len(texts) > _PARTS_MAX or sum(map(len, texts)) > _TEXT_BYTES_MAX * 8 or max(map(len, texts)) > _TEXT_BYTES_MAX:
        raise ImageInvalid("the config has more words than a program can be given")
    if any("\0" in text for text in texts):
        raise ImageInvalid("the config has a text with a zero byte")
    return made


def _words(found: tuple[str, ...] | str | None) -> tuple[str, ...]:
    """Docker's oldest images have one text where a list belongs; it is for the shell."""
    if isinstance(found, str):
        return ("/bin/sh", "-c", found) if found else ()
    return found or ()
