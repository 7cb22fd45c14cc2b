"""What clients did and saw, one operation a line, as the checker reads it and a failing round leaves it behind.

A key holds a value and a version: the number of writes since it was made (0: there is no such key), as etcd
counts. Values are unique, so that whoever reads one says which write it saw; the version tells a write that was
applied twice. Times are of one monotonic clock, in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

Kind = Literal["get", "put", "cas", "delete"]
Outcome = Literal["ok", "unknown", "refused"]


class Seen(msgspec.Struct, frozen=True):
    """A key as an answer shows it; `version` is -1 where the answer does not tell."""

    value: str | None
    version: int = -1


class Operation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One call of one client.

    `ok`: answered. `unknown`: it may have happened, at any time after `start_s`, even after everything else.
    `refused`: the answer says that it certainly did not happen.
    `seen` is what the answer shows of the key just before the operation (for `get`: what it read; for a `cas` that
    succeeded: nothing beyond `expected`). `succeeded` is the answer of a `cas`.
    """

    client: int
    kind: Kind
    key: str
    start_s: float
    end_s: float = 0.0
    outcome: Outcome = "ok"
    value: str | None = None
    expected: str | None = None
    succeeded: bool = True
    seen: Seen | None = None
    revision: int = 0
    """The store's revision as the answer gives it; 0: it gives none."""
    asked: str = ""
    """Which member was asked; for whoever reads a failing history."""

    @property
    def is_write(self) -> bool:
        return self.kind != "get"


def save(path: Path, history: Iterable[Operation]) -> None:
    encoder = msgspec.json.Encoder()
    path.write_bytes(b"".join(encoder.encode(operation) + b"\n" for operation in history))


def load(path: Path) -> list[Operation]:
    decoder = msgspec.json.Decoder(Operation)
    return [decoder.decode(line) for line in path.read_bytes().splitlines()]
