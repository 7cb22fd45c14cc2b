"""What damaged files and refusing disks may do to one of three members: nothing that anybody could take for the truth.

`python -m tests.discovery.crash.damage --flips 1000 --tears 0 --refusals 0 --seed 1` (`make damage`; 0: all). Two
members live on while the third gets its files back in some damaged form and starts. It has to be what the others are,
by itself or after `discovery.rebuild`; where its disk refuses in the middle of work, what it answered has to be true,
and with a healthy disk it has to be back by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from discovery import frames, membership, rebuild
from discovery.codec import Unreadable
from discovery.disk import DISK, Disk
from discovery.frames import Damaged
from discovery.operations import PutRequest, Refused
from discovery.snapshots import Limits
from discovery.wire.errors import DeadlineExceeded, ServiceError
from tests.discovery.members import DEADLINE_S, Members, members

VICTIM = "c"
REFUSED_WRITES = 8


class Wrong(AssertionError):
    """A member holds or answers what is not so."""


class RefusingDisk(Disk):
    """The real disk up to a certain change of it, which it refuses, and from then on all if it `stays` so."""

    def __init__(self, at: int, error: int, *, stays: bool) -> None:
        self._left = at
        self._error = error
        self._stays = stays
        self.has_refused = False

    def _may(self) -> None:
        self._left -= 1
        if self._left == 0 or (self._left < 0 and self._stays):
            self.has_refused = True
            raise OSError(self._error, os.strerror(self._error))

    def open(self, path: Path, flags: int) -> int:
        if flags & os.O_CREAT:
            self._may()
        return super().open(path, flags)

    def write(self, fd: int, raw: bytes | memoryview, at: int) -> int:
        if self._left == 1 and len(raw) > 1:
            super().write(fd, raw[: len(raw) // 2], at)  # a full disk takes what it can
        self._may()
        return super().write(fd, raw, at)

    def allocate(self, fd: int, size: int) -> None:
        self._may()
        super().allocate(fd, size)

    def rename(self, old: Path, new: Path) -> None:
        self._may()
        super().rename(old, new)

    def fsync(self, fd: int) -> None:
        self._may()
        super().fsync(fd)

    def fdatasync(self, fd: int) -> None:
        self._may()
        super().fdatasync(fd)


class ForbiddenDisk(Disk):
    """A disk where one file may not be opened; root, who runs us, is above permission bits."""

    def __init__(self, name: str) -> None:
        self._name = name

    def open(self, path: Path, flags: int) -> int:
        self._check(path)
        return super().open(path, flags)

    def read_file(self, path: Path) -> bytes:
        self._check(path)
        return super().read_file(path)

    def _check(self, path: Path) -> None:
        if path.name == self._name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


class Ward:
    """Three members, one of them the victim, and a copy of its healthy files."""

    def __init__(self, made: Members, dice: random.Random) -> None:
        self.made = made
        self.dice = dice
        self.directory = made.folder / VICTIM
        self._copy = made.folder / "copy"
        self.counts: Counter[str] = Counter()
        self._written = 0

    async def write(self, count: int) -> None:
        leader = await self.made.all_voting()
        for _ in range(count):
            self._written += 1
            await leader.propose(PutRequest(key=b"k%d" % (self._written % 25), value=b"v%d" % self._written * 5))

    async def fill(self) -> None:
        """Give the victim a snapshot, and a log after it, and keep a copy of its files."""
        self.made.live[VICTIM].snapshots.limits = Limits(10, 2**30, 5)
        await self.write(30)
        await self.same()
        self.made.live[VICTIM].snapshots.limits = Limits(10**6, 2**30, 5)
        await self.write(12)
        await self.same()
        await self.made.stop(VICTIM)
        self.keep()

    def keep(self) -> None:
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self.directory, self._copy)

    def restore(self) -> None:
        shutil.rmtree(self.directory)
        shutil.copytree(self._copy, self.directory)

    def files(self) -> list[str]:
        return sorted(path.name for path in self._copy.iterdir() if path.name not in ("lock", "reserve"))

    async def same(self) -> None:
        """Wait until all members hold the same.

        Raises:
            Wrong: they do not.
        """
        others = [member for id, member in self.made.live.items() if id != VICTIM]
        victim = self.made.live[VICTIM]
        async with asyncio.timeout(DEADLINE_S):
            while victim.index < max(member.index for member in others) or len({m.index for m in others}) > 1:
                if VICTIM in self.made.ends:
                    raise self.made.ends[VICTIM]
                await asyncio.sleep(0.005)
            await victim.wait_ready()
        images = [member.state.image() for member in (*others, victim)]
        if any(image != images[0] for image in images):
            raise Wrong(f"members differ: {images}")

    async def survive(self, what: str, damage: Callable[[Path], None], disk: Disk = DISK) -> None:
        """Start the victim on its damaged files; it has to be right, by itself or rebuilt from its peers."""
        self.restore()
        damage(self.directory)
        if await self._starts(disk):
            self.counts["by itself"] += 1
            if self.made.live[VICTIM].identity.incarnation == membership.read_identity(self._copy).incarnation:
                await self.made.stop(VICTIM)
                return
            self.counts["as another life"] += 1
        else:
            rebuild.set_aside(self.directory, is_alone_fine=True)
            for aside in self.made.folder.glob(f"{VICTIM}.damaged-*"):
                shutil.rmtree(aside)
            if not await self._starts(DISK):
                raise Wrong(f"{what}: not even a rebuilt member comes back: {self.made.ends}")
            self.counts["rebuilt"] += 1
        await self.made.all_voting()
        await self.write(5)
        await self.same()
        await self.made.stop(VICTIM)
        self.keep()

    async def _starts(self, disk: Disk) -> bool:
        self.made.ends.pop(VICTIM, None)
        try:
            self.made.start(VICTIM, disk=disk)
        except (Damaged, Unreadable, ServiceError, OSError):
            return False
        try:
            await self.same()
        except Wrong:
            raise
        except Exception:  # noqa: BLE001 — whatever it ended from
            await self.made.stop(VICTIM)
            return False
        return True

    async def refuse(self, at: int, error: int, *, stays: bool) -> bool:
        """Work on a disk that refuses its change number `at`; return whether it came to that."""
        self.restore()
        disk = RefusingDisk(10**9, error, stays=stays)
        self.made.ends.pop(VICTIM, None)
        victim = self.made.start(VICTIM, disk=disk)
        await self.same()
        victim.snapshots.limits = Limits(4, 2**30, 5)
        disk._left = at
        done, refused = [], []
        for number in range(REFUSED_WRITES):
            key = b"refuse/%d" % number
            value = b"%d/%d/%d" % (at, error, self.dice.getrandbits(60))
            try:
                await victim.propose(PutRequest(key=key, value=value), 1.0)
                done.append((key, value))
            except DeadlineExceeded:
                pass
            except (ServiceError, Refused):
                refused.append((key, value))
        await self.made.stop(VICTIM)
        leader = await self.made.leader()
        await leader.catch_up()
        held = {record.key: record.value for record in leader.state.image().base}
        held |= {record.key: record.value for record in leader.state.image().events if record.version}
        if missing := [key for key, value in done if held.get(key) != value]:
            raise Wrong(f"change {at} refused with {error}: {missing} were acknowledged")
        if there := [key for key, value in refused if held.get(key) == value]:
            raise Wrong(f"change {at} refused with {error}: {there} were said to be not done")
        if not await self._starts(DISK):
            raise Wrong(f"change {at} refused with {error}: it is not back by itself: {self.made.ends}")
        await self.made.stop(VICTIM)
        self.keep()
        return disk.has_refused


def _last_segment(directory: Path) -> Path:
    return max(directory.glob("journal-*"))


def tears(directory: Path) -> list[int]:
    """Return every length at which the last three records of the log are torn."""
    raw = _last_segment(directory).read_bytes()
    ends = [frames.HEADER_BYTES, *(record.end for record in frames.decode_all(raw, "log", may_be_torn=True))]
    return list(range(ends[-4], ends[-1]))


def tear(at: int) -> Callable[[Path], None]:
    return lambda directory: os.truncate(_last_segment(directory), at)


def flip(name: str, bit: int) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        raw = bytearray((directory / name).read_bytes())
        raw[bit // 8] ^= 1 << bit % 8
        (directory / name).write_bytes(raw)

    return damage


def _some(all_of: list[int], count: int, dice: random.Random) -> list[int]:
    return all_of if not count or count >= len(all_of) else sorted(dice.sample(all_of, count))


async def run(folder: Path, seed: int, *, flips: int, tears_count: int, refusals: int) -> Counter[str]:
    """Do all of it; 0 means every one.

    Raises:
        Wrong: something is not as it has to be; says which damage did it.
    """
    dice = random.Random(seed)
    async with members(folder) as made:
        ward = Ward(made, dice)
        await ward.fill()
        for at in _some(tears(ward.directory), tears_count, dice):
            await ward.survive(f"torn at {at}", tear(at))
        for name in ward.files():
            if (ward._copy / name).exists():
                await ward.survive(f"empty {name}", lambda directory, name=name: os.truncate(directory / name, 0))  # type: ignore[misc]
            if (ward._copy / name).exists():
                await ward.survive(f"no {name}", lambda directory, name=name: (directory / name).unlink())  # type: ignore[misc]
            if (ward._copy / name).exists():
                await ward.survive(f"forbidden {name}", lambda directory: None, ForbiddenDisk(name))
        for _ in range(flips):
            name = dice.choice(ward.files())
            size = len((ward._copy / name).read_bytes().rstrip(b"\0")) + 64
            bit = dice.randrange(8 * min(size, (ward._copy / name).stat().st_size))
            await ward.survive(f"bit {bit} of {name}", flip(name, bit))
        for error, stays in ((errno.ENOSPC, True), (errno.ENOSPC, False), (errno.EIO, True), (errno.EIO, False)):
            for at in _some(list(range(1, 41)), refusals, dice):
                ward.counts["refused"] += await ward.refuse(at, error, stays=stays)
        made.start(VICTIM)
        await ward.same()
        return ward.counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.discovery.crash.damage")
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--tears", type=int, default=0, help="0: at every byte of the last three records")
    parser.add_argument("--refusals", type=int, default=0, help="0: at every change of the disk")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="damage-") as folder:
        counts = asyncio.run(
            run(Path(folder), asked.seed, flips=asked.flips, tears_count=asked.tears, refusals=asked.refusals)
        )
    print(f"nothing wrong: {dict(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
