"""Checks what people ask of the controller before anything is stored; pure.

Shapes were refused at the edge; here it is meaning: names, counts, environment, keys, and fields
that only the platform's own apps may use. Raises `Invalid` or a leaf of it, and returns the record.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from collections.abc import Mapping

from controller.errors import AppProtected, UnknownProcessType
from controller.types import (
    App,
    Artifact,
    Key,
    NewApp,
    NewArtifact,
    NewJob,
    NewRelease,
    ProcessType,
    Release,
    Scale,
    parse_app_name,
    parse_process_type,
)
from discovery.wire.errors import Invalid

COUNT_MAX = 500
ENV_BYTES_MAX = 128 * 1024  # the kernel's limit of one argument or variable is 128 KiB
PROCESS_TYPES_MAX = 64
META_MAX = 64
_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,62}[a-z0-9])?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,254}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
KEY_TYPES = frozenset(
    {
        "ssh-ed25519",
        "ssh-rsa",
        "ecdsa-sha2-nistp256",
        "ecdsa-sha2-nistp384",
        "ecdsa-sha2-nistp521",
        "sk-ssh-ed25519@openssh.com",
        "sk-ecdsa-sha2-nistp256@openssh.com",
    }
)
_FIRST = ("amber", "bold", "calm", "dusty", "early", "fresh", "green", "hidden", "icy", "late", "mild", "quiet", "wild")
_SECOND = ("brook", "cloud", "dawn", "field", "fog", "lake", "leaf", "meadow", "moon", "pine", "river", "snow", "star")


def is_system(app: App) -> bool:
    """Return whether the app is one of the platform's own."""
    return app.meta.get("system") == "true"


def checked_id(text: str) -> str:
    """Accept an id that a caller chose; empty makes a new one."""
    if text and not _ID.fullmatch(text):
        raise Invalid(f"id {text[:80]!r}", hint="1 to 64 lowercase letters, digits and dashes")
    return text or secrets.token_hex(16)


def made_up_name() -> str:
    return f"{secrets.choice(_FIRST)}-{secrets.choice(_SECOND)}-{secrets.randbelow(9000) + 1000}"


def _check_meta(meta: Mapping[str, str]) -> None:
    if len(meta) > META_MAX or any(len(key) > 256 or len(value) > 4096 for key, value in meta.items()):
        raise Invalid("meta is too large", hint=f"at most {META_MAX} entries of 256 + 4096 letters")


def app(new: NewApp, now_s: float) -> App:
    """Check a new app. Raises `InvalidName`."""
    _check_meta(new.meta)
    name = parse_app_name(new.name) if new.name else made_up_name()
    return App(id=checked_id(new.id), name=name, meta=new.meta, created_at=now_s, updated_at=now_s)


def artifact(new: NewArtifact, now_s: float) -> Artifact:
    _check_meta(new.meta)
    if not new.layers:
        raise Invalid("an artifact needs at least one layer")
    for layer in new.layers:
        if not _DIGEST.fullmatch(layer.digest) or layer.size_bytes < 0:
            raise Invalid(f"layer digest {layer.digest[:80]!r}", hint="sha256: and 64 hex digits, size not negative")
    return Artifact(
        id=checked_id(new.id), kind=new.kind, layers=new.layers, config=new.config, meta=new.meta, created_at=now_s
    )


def check_env(env: Mapping[str, str]) -> None:
    """Refuse variables that a process cannot be given."""
    for name, value in env.items():
        if not _ENV_NAME.fullmatch(name):
            raise Invalid(f"environment variable name {name[:80]!r}", hint="letters, digits and _; no digit first")
        if "\0" in value or len(value.encode("utf-8", "surrogateescape")) >= ENV_BYTES_MAX:
            raise Invalid(f"value of {name} has a zero byte or is over {ENV_BYTES_MAX // 1024} KiB")


def _check_process(owner: App, name: str, process: ProcessType) -> None:
    parse_process_type(name)
    check_env(process.env)
    has_host = process.has_host_network or process.user_namespace == "host"
    is_privileged = process.grants or process.store_prefixes or process.capabilities_add or has_host
    if is_privileged and not is_system(owner):
        raise Invalid(
            f"process type {name}: grants, store prefixes, added capabilities, the host's network and users are for "
            "the platform's own apps"
        )
    if unknown := sorted(set(process.grants) - {"discovery", "hostd"}):
        raise Invalid(f"process type {name}: unknown grant {unknown[0]!r}", hint="discovery, hostd")
    for port in process.ports:
        if not 0 <= port.number <= 65535:
            raise Invalid(f"process type {name}: port {port.number}", hint="0 (any) to 65535")


def release(new: NewRelease, owner: App, now_s: float) -> Release:
    """Check a new release; that its artifacts exist is for the caller to check."""
    _check_meta(new.meta)
    check_env(new.env)
    if len(new.processes) > PROCESS_TYPES_MAX:
        raise Invalid(f"{len(new.processes)} process types", hint=f"at most {PROCESS_TYPES_MAX}")
    for name, process in new.processes.items():
        _check_process(owner, name, process)
    return Release(
        id=checked_id(new.id),
        app_id=owner.id,
        number=0,
        artifact_ids=new.artifact_ids,
        env=new.env,
        processes=new.processes,
        meta=new.meta,
        created_at=now_s,
    )


def counts(scale: Scale, of: Release, owner: App, before: Mapping[str, int]) -> dict[str, int]:
    """Return the counts after scaling; types not named keep theirs.

    Raises:
        UnknownProcessType: the release has no such type.
        Invalid: a count is negative or absurd.
        AppProtected: the platform would lose one of its own apps.
    """
    for name, count in scale.processes.items():
        if not 0 <= count <= COUNT_MAX:
            raise Invalid(f"{name[:40]}={count} is not a count", hint=f"0 to {COUNT_MAX}")
        if name not in of.processes:
            known = ", ".join(sorted(of.processes)) or "none"
            raise UnknownProcessType(
                f"release v{of.number} has no process type {name[:40]!r}", hint=f"it has: {known}; see the Procfile"
            )
    after = {**before, **scale.processes}
    if is_system(owner) and any(before.values()) and not any(after.values()):
        raise AppProtected(f"{owner.name} is part of the platform", hint="it cannot be scaled to nothing")
    return after


def job(new: NewJob) -> None:
    """Check a one-off job."""
    check_env(new.env)
    if not new.args and not new.artifact_ids:
        raise Invalid("a one-off job needs a command")
    if any("\0" in arg for arg in new.args):
        raise Invalid("an argument has a zero byte")
    if not (1 <= new.rows <= 65535 and 1 <= new.columns <= 65535):
        raise Invalid(f"terminal of {new.rows} x {new.columns}")


def ssh_key(text: str, now_s: float) -> Key:
    """Read a line as in `id_ed25519.pub`: type, base64, comment.

    Raises:
        Invalid: it is no public key that OpenSSH would accept; says if it looks like a private one.
    """
    if "PRIVATE KEY" in text:
        raise Invalid("this is a private key", hint="register the .pub file beside it, and keep this one to yourself")
    fields = text.strip().split(None, 2)
    if len(fields) < 2 or "\n" in text.strip():
        raise Invalid("not an SSH public key", hint="one line: TYPE BASE64 [COMMENT], as in ~/.ssh/id_ed25519.pub")
    kind, encoded = fields[0], fields[1]
    if kind not in KEY_TYPES:
        raise Invalid(f"SSH key type {kind[:60]!r}", hint="ssh-keygen -t ed25519 makes a good one")
    try:
        blob = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise Invalid("the SSH key is not base64", hint="was it cut when it was copied?") from error
    parts = _strings(blob)
    if len(parts) < 2 or parts[0] != kind.encode():
        raise Invalid("the SSH key is damaged", hint="was it cut when it was copied?")
    digest = hashlib.md5(blob, usedforsecurity=False).hexdigest()
    return Key(
        fingerprint=":".join(digest[at : at + 2] for at in range(0, 32, 2)),
        sha256="SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("="),
        public_key=f"{kind} {encoded}",
        comment=fields[2][:200] if len(fields) > 2 else "",
        created_at=now_s,
    )


def _strings(blob: bytes) -> list[bytes]:
    """Split the length-prefixed strings of an SSH blob (RFC 4253, 6.6); empty if it does not add up."""
    found: list[bytes] = []
    while blob:
        size = int.from_bytes(blob[:4], "big")
        if len(blob) < 4 + size:
            return []
        found.append(blob[4 : 4 + size])
        blob = blob[4 + size :]
    return found
