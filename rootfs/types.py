"""The nouns of rootfs: what an image is made of.

Digests are always `sha256:` and 64 hex digits; `hex_of` is the only way from text to a path part.
"""

from __future__ import annotations

import re

import msgspec

from rootfs.errors import NameInvalid

MEDIA_TAR = "application/vnd.oci.image.layer.v1.tar"
MEDIA_TAR_GZIP = MEDIA_TAR + "+gzip"
MEDIA_TAR_ZSTD = MEDIA_TAR + "+zstd"
MEDIA_CONFIG = "application/vnd.oci.image.config.v1+json"
MEDIA_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MEDIA_INDEX = "application/vnd.oci.image.index.v1+json"

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One layer blob. `diff_id` is the digest of the tar inside, `""` when nobody computed it."""

    digest: str
    size_bytes: int
    media_type: str = MEDIA_TAR
    diff_id: str = ""


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an image asks of whoever runs it."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = {}
    working_dir: str = "/"
    user: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    stop_signal: str = ""
    labels: dict[str, str] = {}


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An image of the store, bottom layer first. `digest` is its manifest's, `reference` where it was pulled from."""

    name: str
    digest: str
    layers: tuple[Layer, ...]
    config: ImageConfig = ImageConfig()
    reference: str = ""


def hex_of(digest: str) -> str:
    """Return the 64 hex digits of a digest.

    Raises:
        NameInvalid: it is not `sha256:` and 64 lowercase hex digits.
    """
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise NameInvalid(f"digest {digest[:100]!r}", hint="sha256: and 64 lowercase hex digits")
    return match[1]


def parse_image_name(text: str) -> str:
    """Accept an image name: 1 to 63 of `a-z 0-9 . _ -`, starting with a letter or digit.

    Raises:
        NameInvalid: it is anything else.
    """
    if not _IMAGE_NAME.fullmatch(text):
        raise NameInvalid(f"image name {text[:80]!r}", hint="lowercase letters, digits, dots, dashes, underscores")
    return text
