"""The crash test: rounds of faults under clients, each with its history checked; `python -m tests.discovery.crash`.

A round: clients work, a story of `faults` happens, all is healed, every member has to come back by itself within
`members.READY_S` and to answer reads. Then nothing may be wrong: the round's history is linearizable, revisions go
with time, every acknowledged write is there with the version that it has to have, nothing refused is there, no member
differs from another, and none ended by itself; every watch saw every change once and in order, and keys stayed for as
long as their leases were kept alive (in every third round: their end is waited for). Whatever is wrong leaves the
history, the members' logs and their files in `out`, and the next round begins with a new cluster.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from tests.discovery.crash import faults as stories
from tests.discovery.crash import history as histories
from tests.discovery.crash.arms import Arm
from tests.discovery.crash.faults import Faults
from tests.discovery.crash.history import Operation, Seen
from tests.discovery.crash.leasing import Holder
from tests.discovery.crash.linearizable import Undecided, check
from tests.discovery.crash.members import Member
from tests.discovery.crash.network import Network, network
from tests.discovery.crash.revisions import check_revisions
from tests.discovery.crash.store import NotAnswered, Store
from tests.discovery.crash.watching import Change, Watcher, all_of, differences
from tests.discovery.crash.workload import Ledger, Workload

T = TypeVar("T")
NAMES = ("a", "b", "c")
KEPT_ROUNDS = 5
"""Keys of older rounds are deleted, so that the state stays small; they may not come back."""
AGREE_S = 20.0
WATCHERS, HOLDERS = 3, 3


@dataclass
class Verdict:
    """What a round, or all of them, came to."""

    violations: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    hands: list[str] = field(default_factory=list)

    @property
    def is_fine(self) -> bool:
        return not (self.violations or self.lost or self.hands)

    def add(self, other: Verdict) -> None:
        self.violations += other.violations
        self.lost += other.lost
        self.hands += other.hands

    def lines(self) -> list[str]:
        return [
            *(f"VIOLATION: {text}" for text in self.violations),
            *(f"LOST: {text} was acknowledged" for text in self.lost),
            *(f"NEEDS A HAND: {text}" for text in self.hands),
        ]


class Cluster:
    """Three members on a network, and what is known of their keys."""

    def __init__(self, arm: Arm, folder: Path, net: Network) -> None:
        self.network = net
        self.folder = folder
        self.has_watches = arm.has_watches
        self.authority = arm.prepare(folder, net)
        self.members = [Member(arm, folder, net, name) for name in net.members]
        self.stores = {member.name: Store(member.socket) for member in self.members}
        self.ledger = Ledger()
        self.deleted: set[str] = set()

    async def wait_ready(self) -> bool:
        """Wait for all; the first that needs a hand ends it."""
        waiting = [asyncio.ensure_future(member.wait_ready()) for member in self.members]
        try:
            for each in asyncio.as_completed(waiting):
                if not await each:
                    return False
            return True
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def forget(self, number: int) -> None:
        """Delete what a round wrote, and remember that it is deleted."""
        prefix = f"w/{number:06}/"
        for text in (prefix, f"r/{number:06}/"):
            await self._until_done(partial(Store.delete_prefix, prefix=text))
        self.deleted |= {key for key in self.ledger.acknowledged if key.startswith(prefix)}
        self.ledger.forget(prefix)

    async def revision(self) -> int:
        """Return the store's revision, read linearizably."""
        return (await self._until_done(lambda store: store.get("nobody's"))).revision

    async def changes(self, first: int, last: int) -> list[Change]:
        """Return the changes of these revisions, as one member tells of them; one that is not ready says so first."""
        return await self._until_done(lambda store: all_of(store, first, last))

    async def agreed(self, prefix: str) -> dict[str, tuple[dict[str, Seen], int]]:
        """Read everything from each member's own copy, once all have applied the same."""
        deadline = time.monotonic() + AGREE_S
        while True:
            found = {name: await self._copy(store, prefix) for name, store in self.stores.items()}
            if len({revision for _, revision in found.values()}) == 1 or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.05)

    async def _copy(self, store: Store, prefix: str) -> tuple[dict[str, Seen], int]:
        return await self._until_done(lambda _: store.names(prefix, is_serializable=True))

    async def _until_done(self, call: Callable[[Store], Awaitable[T]]) -> T:
        for attempt in range(100):
            try:
                return await call(random.choice(list(self.stores.values())))
            except NotAnswered as error:
                if attempt == 99:
                    raise
                await asyncio.sleep(0.1 if error.outcome == "refused" else 0.02)
        raise AssertionError

    async def close(self) -> None:
        for store in self.stores.values():
            await store.close()
        for member in self.members:
            member.kill()


@asynccontextmanager
async def cluster(arm: Arm) -> AsyncIterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="crash-") as folder, network(NAMES) as net:
        made = Cluster(arm, Path(folder), net)
        try:
            for member in made.members:
                member.start()
            assert await made.wait_ready(), [member.problems for member in made.members]
            yield made
        finally:
            await made.close()


class Round:
    """One round on a cluster."""

    def __init__(self, made: Cluster, number: int, dice: random.Random, clients: int, story: str = "") -> None:
        self._cluster = made
        self.number = number
        self._dice = dice
        self.story = story or stories.choose(dice)
        self.work = Workload(made.stores, made.ledger, number, dice, clients)
        self.faults = Faults(made.members, made.stores, made.network, dice)
        self.back_s = 0.0
        self.watchers: list[Watcher] = []
        self.holders: list[Holder] = []

    async def _watch(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Have watchers follow this round, and now and then holders have leases in it."""
        if not self._cluster.has_watches:
            return []
        stores = self._cluster.stores
        first = await self._cluster.revision() + 1
        self.watchers = [Watcher(stores, first, random.Random(self._dice.random())) for _ in range(WATCHERS)]
        if self._dice.random() < 1 / 3:
            prefixes = [f"l/{self.number:06}/{holder}-" for holder in range(HOLDERS)]
            self.holders = [Holder(stores, prefix, random.Random(self._dice.random())) for prefix in prefixes]
        for holder in self.holders:
            tasks.create_task(holder.run())
        return [tasks.create_task(watcher.run()) for watcher in self.watchers]

    async def run(self) -> Verdict:
        for member in self._cluster.members:
            member.problems.clear()
        async with asyncio.TaskGroup() as tasks:
            watching = await self._watch(tasks)
            verdict = await self._run(tasks)
            for task in watching:
                task.cancel()
        verdict.violations += [f"lease: {text}" for holder in self.holders for text in holder.wrong]
        return verdict

    async def _run(self, around: asyncio.TaskGroup) -> Verdict:
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(self.work.run())
            await self.faults.wait(0.1, 0.5)
            await stories.STORIES[self.story][0](self.faults)
            await self.faults.wait(0.1, 0.5)
            began = time.monotonic()
            await self.faults.heal()
            is_ready = await self._cluster.wait_ready()
            self.back_s = time.monotonic() - began
            await asyncio.sleep(0.2)
            for holder in self.holders:
                holder.stop()
                around.create_task(holder.see_it_go())
            self.work.stop()
            await working
        verdict = Verdict(hands=[problem for member in self._cluster.members for problem in member.problems])
        verdict.violations += [alarm for member in self._cluster.members for alarm in member.read_log()]
        if is_ready:
            await self._look(verdict)
        return verdict

    async def _look(self, verdict: Verdict) -> None:
        await self.work.final_reads()
        verdict.violations += self.work.strange
        try:
            verdict.violations += [str(violation) for violation in check(self.work.history)]
        except Undecided as error:
            verdict.violations.append(f"undecided, which is not good enough: {error}")
        verdict.violations += check_revisions(self.work.history)
        verdict.violations += await self._compare_watches()
        copies = await self._cluster.agreed("w/")
        for name, (found, _) in copies.items():
            verdict.lost += [f"{key} (not on {name})" for key in self._cluster.ledger.lost(found)]
            verdict.violations += [f"on {name}: {text}" for text in self._cluster.ledger.wrong(found)]
            back = sorted(found.keys() & self._cluster.deleted)
            verdict.violations += [f"on {name}: {key} was deleted and is back" for key in back]
        if len({repr(sorted(found.items())) for found, _ in copies.values()}) > 1:
            verdict.violations.append(f"members differ: {_differences(copies)}")
        if self.number >= KEPT_ROUNDS:
            await self._cluster.forget(self.number - KEPT_ROUNDS)

    async def _compare_watches(self) -> list[str]:
        if not self.watchers:
            return []
        first, last = self.watchers[0].first, await self._cluster.revision()
        for watcher in self.watchers:
            await watcher.reach(last)
        truth = await self._cluster.changes(first, last)
        return differences(self.watchers, truth, self.work.history)


@dataclass
class Report:
    """All rounds so far."""

    verdict: Verdict = field(default_factory=Verdict)
    counts: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    failed: list[int] = field(default_factory=list)
    slowest_s: float = 0.0

    def summary(self) -> str:
        count = self.counts
        return (
            f"{count['rounds']} rounds: {count['ok']} operations answered, {count['unknown']} unknown, "
            f"{count['refused']} refused; {count['starts']} starts, {count['cuts']} power cuts of a member that undid "
            f"{count['undone']} steps; slowest return {self.slowest_s:.1f} s\n"
            f"{count['watched']} changes watched, leases kept alive {count['kept alive']} times\n"
            + "".join(f"{number} {what}, " for what, number in self.told.items()).rstrip(", ")
            + "\n"
            f"violations {len(self.verdict.violations)}, acknowledged writes lost {len(self.verdict.lost)}, "
            f"members that needed a hand {len(self.verdict.hands)}"
            + (f"; rounds that failed: {self.failed}" if self.failed else "")
        )


async def run(
    arm: Arm,
    rounds: int,
    seed: int,
    out: Path,
    report: Report,
    *,
    first: int = 0,
    clients: int = 12,
    stop_at: int = 10**9,
    story: str = "",
) -> Report:
    """Run rounds `first`…; a new cluster begins after each that failed; end after `stop_at` of those.

    With a `story` every round tells that one. `report` is filled as it goes, and returned.
    """
    number = first
    while number < first + rounds and len(report.failed) < stop_at:
        async with cluster(arm) as made:
            try:
                is_fine = True
                while is_fine and number < first + rounds:
                    one = Round(made, number, random.Random(f"{seed}/{number}"), clients, story)
                    is_fine = await _take(made, one, report, out / f"seed-{seed}-round-{number}")
                    number += 1
            finally:
                _count(made, report)
    return report


async def _take(made: Cluster, one: Round, report: Report, out: Path) -> bool:
    began = time.monotonic()
    verdict = await one.run()
    outcomes = Counter[str](operation.outcome for operation in one.work.history)
    report.counts.update(outcomes)
    report.counts["rounds"] += 1
    report.counts["watched"] += sum(len(watcher.seen) for watcher in one.watchers)
    report.counts["kept alive"] += sum(holder.answered for holder in one.holders)
    report.slowest_s = max(report.slowest_s, one.back_s)
    report.verdict.add(verdict)
    print(
        f"round {one.number:4} {one.story:<16} {outcomes['ok']:5} ok {outcomes['unknown']:3} unknown "
        f"{outcomes['refused']:4} refused, back in {one.back_s:4.1f} s, {time.monotonic() - began:4.1f} s in all: "
        f"{'fine' if verdict.is_fine else 'WRONG'} [{'; '.join(one.faults.said)}]",
        flush=True,
    )
    if not verdict.is_fine:
        report.failed.append(one.number)
        kept = _keep(made, one.work.history, verdict, out)
        print("\n".join(["  " + line for line in verdict.lines()[:12]] + [f"  all of it in {kept}"]), flush=True)
    return verdict.is_fine


def _keep(made: Cluster, history: list[Operation], verdict: Verdict, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made.folder, folder, ignore=lambda _, names: [name for name in names if name.endswith(".sock")])
    histories.save(folder / "history.jsonl", history)
    (folder / "verdict").write_text("\n".join(verdict.lines()) + "\n")
    return folder


def _count(made: Cluster, report: Report) -> None:
    for member in made.members:
        report.counts.update(starts=member.starts, cuts=member.cuts, undone=member.platter.lost_steps)
        report.told.update(member.log_lines)


def _differences(copies: dict[str, tuple[dict[str, Seen], int]]) -> str:
    everything = set.union(*({*found.items()} for found, _ in copies.values()))
    shown = {
        name: (revision, sorted(everything - {*found.items()}, key=repr)[:5])
        for name, (found, revision) in copies.items()
    }
    return f"revision and what is not there: {shown}"
