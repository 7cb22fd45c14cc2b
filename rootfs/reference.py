"""Reads how people name images elsewhere: `[REGISTRY/]NAME[:TAG][@DIGEST]`.

Pure. Refuses what no registry has; knows no registry by itself, so a short name needs the one that the operator has
set. Called by `rootfs.registry`, `rootfs.intake` and the command.

Source: distribution `reference` grammar; OCI distribution-spec, "Pulling manifests".
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from rootfs.errors import NameInvalid
from rootfs.types import hex_of

_HOST = re.compile(r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]{0,252}[a-zA-Z0-9])?|\[[0-9a-fA-F:.]{2,45}\])(?::[0-9]{1,5})?")
_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_NAME_BYTES_MAX = 255


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An image elsewhere; `is_explicit`: the registry was named, not taken from the settings."""

    registry: str
    name: str
    tag: str = ""
    digest: str = ""
    is_explicit: bool = True

    @property
    def wanted(self) -> str:
        """Return what to ask the registry for: the digest, else the tag."""
        return self.digest or self.tag

    def __str__(self) -> str:
        return (
            f"{self.registry}/{self.name}" + (f":{self.tag}" if self.tag else "") + (self.digest and f"@{self.digest}")
        )


def parse(text: str, default_registry: str = "") -> Reference:
    """Read a reference; without tag and digest the tag is `latest`.

    Raises:
        NameInvalid: no registry could mean it, or it names none and there is no default.
    """
    if len(text) > 1024:
        raise NameInvalid("a reference of more than 1024 characters")
    rest, _, digest = text.partition("@")
    if "@" in text:
        hex_of(digest)
    first, slash, others = rest.partition("/")
    is_explicit = bool(slash) and ("." in first or ":" in first or first == "localhost")
    registry, path = (first, others) if is_explicit else (default_registry, rest)
    if not registry:
        raise NameInvalid(
            f"{text[:100]!r} names no registry", hint="REGISTRY/NAME:TAG, or set default_registry in hostd.toml"
        )
    name, colon, tag = path.partition(":")
    if not _HOST.fullmatch(registry):
        raise NameInvalid(f"registry {registry[:100]!r}", hint="HOST or HOST:PORT")
    if not _NAME.fullmatch(name) or len(name) > _NAME_BYTES_MAX:
        raise NameInvalid(f"image {name[:100]!r}", hint="lowercase letters and digits, parted by / . _ or -")
    if colon and not _TAG.fullmatch(tag):
        raise NameInvalid(f"tag {tag[:100]!r}", hint="letters, digits, dots, dashes and underscores")
    return Reference(
        registry=registry, name=name, tag=tag or ("" if digest else "latest"), digest=digest, is_explicit=is_explicit
    )


def local_name(text: str) -> str:
    """Return what an image of this reference is called here: its last word, and the tag unless it is `latest`."""
    path = text.partition("@")[0].rpartition("/")[2]
    name, _, tag = path.partition(":")
    return name + (f"-{tag.lower()}" if tag not in ("", "latest") else "")


def is_loopback(registry: str) -> bool:
    """Say whether a registry is this machine."""
    host = registry.rpartition(":")[0] if re.search(r":\d+$", registry) else registry
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
