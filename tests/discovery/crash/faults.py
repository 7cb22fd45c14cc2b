"""What is done to a cluster in one round: each story is a few faults in a row, with the dice's moments between them.

A story leaves the cluster as broken as it likes; `Faults.heal` mends everything, in an order that the dice choose.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable

from tests.discovery.crash.members import Member
from tests.discovery.crash.network import Network
from tests.discovery.crash.store import NotAnswered, Store

LED_S = 6.0
Story = Callable[["Faults"], Awaitable[None]]


class Faults:
    """Does it, and writes down what it did in `said`."""

    def __init__(self, members: list[Member], stores: dict[str, Store], network: Network, dice: random.Random) -> None:
        self.members = members
        self._stores = stores
        self._network = network
        self.dice = dice
        self.said: list[str] = []

    async def wait(self, low_s: float = 0.05, high_s: float = 0.8) -> None:
        await asyncio.sleep(self.dice.uniform(low_s, high_s))

    async def leader(self) -> Member:
        """Return who leads, a random member if nobody says so."""
        for member in self.dice.sample(self.members, len(self.members)):
            if await self._leads(member):
                return member
        return self.dice.choice(self.members)

    async def _leads(self, member: Member) -> bool:
        with contextlib.suppress(NotAnswered, TimeoutError):
            async with asyncio.timeout(0.3):
                raw = await self._stores[member.name].call("maintenance/status", {})
            own = raw.get("header", {}).get("member_id")
            return bool(raw.get("is_leader") or (own is not None and own == raw.get("leader")))
        return False

    async def led_by(self, *members: Member) -> None:
        """Wait until one of these leads, but not for ever: the dice may have left them without what they need."""
        deadline = time.monotonic() + LED_S
        while time.monotonic() < deadline:
            for member in members:
                if await self._leads(member):
                    self.said.append(f"{member.name} leads")
                    return
            await asyncio.sleep(0.05)

    async def one(self) -> Member:
        """Return the leader more often than not."""
        return await self.leader() if self.dice.random() < 0.6 else self.dice.choice(self.members)

    async def kill(self, *members: Member, power: float = 0.5, doom: float = 0.5) -> None:
        """Kill all of them, at the same moment or when they write to their disks; cut the power as often as not.

        `power` and `doom` say how often it is the power, and a write.
        """
        cut = random.Random(self.dice.random()) if self.dice.random() < power else None
        is_total = self.dice.random() < 0.5
        doomed = [member for member in members if self.dice.random() < doom and member.has_power_cuts]
        for member in doomed:
            member.doom()
        if doomed:
            await self.wait(0.0, 0.1)
        for member in members:
            member.pause()
        for member in members:
            member.kill(cut, is_total=is_total)
        names = ",".join(member.name + "!" * (member in doomed) for member in members)
        self.said.append(f"{'power' if cut and members[0].has_power_cuts else 'kill'} {names}")

    async def lose(self, source: Member, target: Member, share: float = 1.0) -> None:
        await self._network.lose(source.name, target.name, share)
        self.said.append(f"{source.name}-{'x' if share >= 1.0 else f'{share:.1f}'}>{target.name}")

    def others(self, member: Member) -> list[Member]:
        return [other for other in self.members if other is not member]

    async def heal(self) -> None:
        await self._network.heal()
        for member in self.members:
            member.go_on()
        for member in self.dice.sample(self.members, len(self.members)):
            if not member.is_up:
                member.start()
                if self.dice.random() < 0.4:  # now and then so late that the others have a leader by then
                    await self.wait(0.0, 1.8)


async def kill_one(faults: Faults) -> None:
    await faults.kill(await faults.one())


async def kill_two(faults: Faults) -> None:
    await faults.kill(*faults.dice.sample(faults.members, 2))


async def kill_all(faults: Faults) -> None:
    await faults.kill(*faults.members)


async def late_leader(faults: Faults) -> None:
    """Cut the power of all while only who leads has a quick disk, and keep that one away until the others have elected.

    They alone have to know all that was acknowledged: whoever confirmed what was not on its disk is found out here.
    """
    first = await faults.leader()
    for member in faults.others(first):
        member.slow()
    await faults.wait(0.2, 0.6)
    await faults.kill(*faults.members, power=0.9, doom=0.2)
    for member in faults.dice.sample(faults.others(first), 2):
        member.start()
    await faults.led_by(*faults.others(first))


async def kill_again_while_it_comes_back(faults: Faults) -> None:
    """Kill whoever is up, again and again, at the moments of replay, of election and of a snapshot's arrival."""
    for _ in range(faults.dice.randint(2, 4)):
        victim = faults.dice.choice(faults.members)
        if victim.is_up:
            await faults.kill(victim)
            await faults.wait(0.0, 0.4)
        for member in faults.members:
            if not member.is_up and faults.dice.random() < 0.7:
                member.start()
        await faults.wait(0.1, 0.9)


async def fall_behind(faults: Faults) -> None:
    """Keep one away until the others have compacted, and disturb the snapshot that it then gets."""
    lagging = faults.dice.choice(faults.members)
    await faults.kill(lagging)
    await faults.wait(0.8, 1.6)
    lagging.start()
    await faults.wait(0.3, 1.0)
    how = faults.dice.choice(["receiver", "sender", "link", "nothing"])
    if how == "receiver":
        await faults.kill(lagging)
    elif how == "sender":
        await faults.kill(await faults.leader())
    elif how == "link":
        await faults.lose(await faults.leader(), lagging)
        await faults.wait(0.2, 0.8)


async def pause_one(faults: Faults) -> None:
    victim = await faults.one()
    victim.pause()
    faults.said.append(f"stop {victim.name}")
    await faults.wait(0.4, 2.2)
    victim.go_on()
    await faults.wait(0.0, 0.3)


async def pause_two(faults: Faults) -> None:
    for victim in faults.dice.sample(faults.members, 2):
        victim.pause()
        faults.said.append(f"stop {victim.name}")
        await faults.wait(0.0, 0.3)
    await faults.wait(0.2, 1.0)


async def island(faults: Faults) -> None:
    """Cut one off, both ways."""
    victim = await faults.one()
    for other in faults.others(victim):
        await faults.lose(victim, other)
        await faults.lose(other, victim)
    await faults.wait(0.5, 2.4)


async def deaf_or_mute(faults: Faults) -> None:
    """One hears nobody, or nobody hears it."""
    victim = await faults.one()
    is_deaf = faults.dice.random() < 0.5
    for other in faults.others(victim):
        await (faults.lose(other, victim) if is_deaf else faults.lose(victim, other))
    await faults.wait(0.5, 2.4)


async def one_link(faults: Faults) -> None:
    """Two do not hear each other, or one of them does not; the third hears both."""
    one, other = faults.dice.sample(faults.members, 2)
    await faults.lose(one, other)
    if faults.dice.random() < 0.5:
        await faults.lose(other, one)
    await faults.wait(0.5, 2.4)


async def bad_line(faults: Faults) -> None:
    """Lose a part of all packets in some directions."""
    for one in faults.members:
        for other in faults.others(one):
            if faults.dice.random() < 0.6:
                await faults.lose(one, other, faults.dice.uniform(0.1, 0.7))
    await faults.wait(0.5, 2.4)


async def kill_in_a_split(faults: Faults) -> None:
    """Cut one off, and kill it, or the others, or all, while it is."""
    victim = await faults.one()
    for other in faults.others(victim):
        await faults.lose(victim, other)
        if faults.dice.random() < 0.7:
            await faults.lose(other, victim)
    await faults.wait(0.2, 1.0)
    await faults.kill(*faults.dice.choice([[victim], faults.others(victim), faults.members]))
    await faults.wait(0.0, 0.4)


async def pause_and_kill(faults: Faults) -> None:
    """Stop the leader until another leads, kill that one, and let the first go on."""
    first = await faults.leader()
    first.pause()
    faults.said.append(f"stop {first.name}")
    await faults.wait(0.6, 1.8)
    await faults.kill(faults.dice.choice(faults.others(first)))
    first.go_on()
    await faults.wait(0.0, 0.5)


STORIES: dict[str, tuple[Story, int]] = {
    "kill one": (kill_one, 10),
    "kill two": (kill_two, 8),
    "kill all": (kill_all, 22),
    "late leader": (late_leader, 10),
    "kill again": (kill_again_while_it_comes_back, 10),
    "fall behind": (fall_behind, 12),
    "stop one": (pause_one, 8),
    "stop two": (pause_two, 4),
    "stop and kill": (pause_and_kill, 6),
    "island": (island, 8),
    "deaf or mute": (deaf_or_mute, 8),
    "one link": (one_link, 6),
    "bad line": (bad_line, 6),
    "kill in a split": (kill_in_a_split, 10),
}
"""Each story and how often it is told, of about a hundred times."""


def choose(dice: random.Random) -> str:
    return dice.choices(list(STORIES), [weight for _, weight in STORIES.values()])[0]
