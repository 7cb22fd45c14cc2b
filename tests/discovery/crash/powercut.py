"""A disk that can lose its power: whatever was not synced is lost, in part, and in no order.

Two halves. In the member's process `taping.TapingDisk` stands in for `discovery.disk.Disk`: it does everything for
real and writes each step to a tape outside the state directory; a sync is on the tape before its caller hears of it.
In the driver's process `Platter` follows the tape and knows at any moment what a disk had to keep: of each file what
its last sync covered, of each directory the names that its last sync covered. `cut` throws the dice about everything
else: each write since then is there or not or torn at a sector, each name made, moved or removed is there or not,
whatever came before or after it. It is stricter than ext4, as POSIX is.

A process that is killed without a power cut leaves the page cache: `Platter.reconcile` then takes the directory as it
is, but goes on knowing what of it was never synced.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.discovery.crash.tape import OPEN, RENAME, SYNC, SYNC_NAMES, TRUNCATE, UNLINK, WRITE, steps_of

T = TypeVar("T")
SECTOR_BYTES = 512
IGNORED = frozenset({"lock"})
"""Files that hold nothing: `flock` on them is all."""


@dataclass
class _Change:
    """Bytes written at an offset, or a new size."""

    step: int
    at: int
    raw: bytes | None

    def apply(self, content: bytearray) -> None:
        if self.raw is None:
            del content[self.at :]
        if len(content) < self.at:
            content.extend(bytes(self.at - len(content)))
        if self.raw is not None:
            content[self.at : self.at + len(self.raw)] = self.raw


@dataclass
class _File:
    """A file: what is certain, and what has been done to it since."""

    durable: bytearray = field(default_factory=bytearray)
    pending: list[_Change] = field(default_factory=list)

    def now(self) -> bytearray:
        content = bytearray(self.durable)
        for change in self.pending:
            change.apply(content)
        return content

    def sync(self, began: int) -> None:
        for change in self.pending:
            if change.step < began:
                change.apply(self.durable)
        self.pending = [change for change in self.pending if change.step >= began]


@dataclass(frozen=True)
class _Move:
    """One change of names, done as a whole or not at all."""

    step: int
    gone: str
    made: str
    file: _File | None


class Platter:
    """What is on one member's disk; steps are counted through all tapes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._names: dict[str, _File] = {}
        self._pending: list[_Move] = []
        self._step = 0
        self.lost_steps = 0
        """How many steps power cuts have undone so far; a test that loses nothing shows nothing."""

    def follow(self, tape: Path) -> None:
        """Take in what a dead process did, and remove its tape."""
        base = self._step
        handles: dict[int, _File] = {}
        for kind, handle, number, raw in steps_of(tape):
            self._do(kind, handle, number, raw, handles, base)
            self._step += 1
        tape.unlink(missing_ok=True)

    def reconcile(self) -> list[str]:
        """Take the directory as it is where the process died between a step and its note; return what differed."""
        self._step += 1
        names = self._view()
        found = {path.name: path.read_bytes() for path in self._directory.iterdir() if path.is_file()}
        found = {name: raw for name, raw in found.items() if name not in IGNORED}
        files = [*names.values(), *self._names.values()]
        moved = {name: file for name in found.keys() - names.keys() for file in files if file.now() == found[name]}
        gone = {id(file): name for name, file in names.items() if name not in found}
        differing = []
        for name, raw in found.items():
            file = names.get(name)
            if file is None:
                file = moved.get(name, _File())
                self._pending.append(_Move(self._step, gone.pop(id(file), ""), name, file))
                differing.append(name)
            if file.now() != raw:
                file.pending += _difference(self._step, bytes(file.now()), raw)
                differing.append(name)
        for name in gone.values():
            self._pending.append(_Move(self._step, name, "", None))
            differing.append(name)
        self._step += 1
        return differing

    def cut(self, dice: random.Random, *, is_total: bool = False) -> None:
        """Lose power now: decide what was kept, and make the directory so; `is_total`: nothing but what was synced."""
        kept_names = dict(self._names)
        moves = [] if is_total else _chosen(self._pending, dice)
        for move in moves:
            _move(kept_names, move)
        contents = {name: self._torn(file, dice, is_total=is_total) for name, file in kept_names.items()}
        self.lost_steps += len(self._pending) - len(moves)
        for path in list(self._directory.iterdir()):
            if path.name not in IGNORED:
                path.unlink()
        for name, content in contents.items():
            (self._directory / name).write_bytes(content)
            (self._directory / name).chmod(0o600)
        self._names = {name: _File(content) for name, content in contents.items()}
        self._pending = []

    def _torn(self, file: _File, dice: random.Random, *, is_total: bool) -> bytearray:
        content = bytearray(file.durable)
        chosen = [] if is_total else _chosen(file.pending, dice)
        self.lost_steps += len(file.pending) - len(chosen)
        is_torn = dice.random() < 0.5
        for change in chosen:
            for piece in _sectors(change) if is_torn and change.raw is not None else [change]:
                if piece is change or dice.random() < 0.7:
                    piece.apply(content)
        return content

    def _view(self) -> dict[str, _File]:
        names = dict(self._names)
        for move in self._pending:
            _move(names, move)
        return names

    def _do(self, kind: int, handle: int, number: int, raw: bytes, handles: dict[int, _File], base: int) -> None:
        if kind == OPEN:
            handles[handle] = self._open(os.fsdecode(raw), is_emptied=bool(number))
        elif kind in (WRITE, TRUNCATE):
            handles[handle].pending.append(_Change(self._step, number, raw if kind == WRITE else None))
        elif kind == SYNC:
            handles[handle].sync(base + number)
        elif kind == RENAME:
            old, new = (Path(os.fsdecode(path)).name for path in raw.split(b"\0"))
            self._pending.append(_Move(self._step, old, new, self._view()[old]))
        elif kind == UNLINK:
            self._pending.append(_Move(self._step, Path(os.fsdecode(raw)).name, "", None))
        elif kind == SYNC_NAMES:
            for move in self._pending:
                if move.step < base + number:
                    _move(self._names, move)
            self._pending = [move for move in self._pending if move.step >= base + number]

    def _open(self, path: str, *, is_emptied: bool) -> _File:
        name = Path(path).name
        file = self._view().get(name)
        if file is None:
            file = _File()
            self._pending.append(_Move(self._step, "", name, file))
        if is_emptied:
            file.pending.append(_Change(self._step, 0, None))
        return file


def _difference(step: int, old: bytes, new: bytes) -> list[_Change]:
    """Return the changes that make one content the other and touch no more of it than that."""
    same = next((at for at in range(min(len(old), len(new))) if old[at] != new[at]), min(len(old), len(new)))
    changes = [_Change(step, same, new[same:])] if len(new) > same else []
    return changes if len(new) >= len(old) else [_Change(step, len(new), None), *changes]


def _move(names: dict[str, _File], move: _Move) -> None:
    names.pop(move.gone, None)
    if move.file is not None:
        names[move.made] = move.file


def _chosen(pending: list[T], dice: random.Random) -> list[T]:
    """Choose what of the unsynced was kept: nothing, all, a beginning, an end or anything."""
    how = dice.choice(["none", "all", "beginning", "end", "any", "any"])
    at = dice.randint(0, len(pending))
    if how == "any":
        return [one for one in pending if dice.random() < 0.5]
    return {"none": [], "all": pending, "beginning": pending[:at], "end": pending[at:]}[how]


def _sectors(change: _Change) -> list[_Change]:
    assert change.raw is not None
    pieces, at = [], 0
    while at < len(change.raw):
        end = at + SECTOR_BYTES - (change.at + at) % SECTOR_BYTES
        pieces.append(_Change(change.step, change.at + at, change.raw[at:end]))
        at = end
    return pieces
