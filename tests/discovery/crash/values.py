"""Values that nobody else writes and that show whether they came back whole: a name, and padding made from it."""

from __future__ import annotations

import hashlib


def encode(name: str, size: int = 0) -> bytes:
    """Return the value of a name, of about this size."""
    head = f"{name}:{size}:".encode()
    missing = size - len(head)
    if missing <= 0:
        return head
    block = hashlib.sha256(head).digest() * 8
    return head + (block * (missing // len(block) + 1))[:missing]


def decode(raw: bytes) -> str:
    """Return the name of a value.

    Raises:
        ValueError: it is not as it was written.
    """
    name, size, _ = raw.split(b":", 2)
    if encode(name.decode(), int(size)) != raw:
        raise ValueError(f"a value is not what was written: {raw[:80]!r}, {len(raw)} bytes")
    return name.decode()
