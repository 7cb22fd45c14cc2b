"""Clients of one round: they write unique values, compare and swap, delete and read, and write down what they saw.

Each goes to one member until that fails it. Besides the registers that all of them fight over, each client writes keys
that nobody writes again: `Ledger` remembers for ever which of those were acknowledged.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from tests.discovery.crash import values
from tests.discovery.crash.history import Kind, Operation, Outcome, Seen
from tests.discovery.crash.store import Answer, NotAnswered, Store

REGISTERS = 5
BIG_BYTES = 24 * 1024


@dataclass
class Ledger:
    """Keys that were written once: which have to be there, which must not, and which may."""

    acknowledged: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)

    def note(self, key: str, outcome: Outcome) -> None:
        {"ok": self.acknowledged, "unknown": self.unknown, "refused": self.refused}[outcome].add(key)

    def forget(self, prefix: str) -> None:
        for keys in (self.acknowledged, self.unknown, self.refused):
            keys.difference_update({key for key in keys if key.startswith(prefix)})

    def lost(self, found: dict[str, Seen]) -> list[str]:
        return sorted(self.acknowledged - found.keys())

    def wrong(self, found: dict[str, Seen]) -> list[str]:
        """Return what was said to be not done and is, was done twice, or is not what was written."""
        wrong = [f"{key} was refused and is there" for key in sorted(self.refused & found.keys())]
        wrong += [
            f"{key} was written once and has version {seen.version}" for key, seen in found.items() if seen.version != 1
        ]
        return wrong + [f"{key} holds {seen.value}" for key, seen in found.items() if seen.value != key]


class Workload:
    """The clients of round number `number`; `history` is complete once `run` has returned."""

    def __init__(
        self, stores: dict[str, Store], ledger: Ledger, number: int, dice: random.Random, clients: int
    ) -> None:
        self._stores = stores
        self._ledger = ledger
        self._number = number
        self._dice = dice
        self._clients = clients
        self._last: dict[str, str | None] = {}
        self._stopping = asyncio.Event()
        self.history: list[Operation] = []
        self.strange: list[str] = []

    def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for client in range(self._clients):
                tasks.create_task(self._client(client, random.Random(self._dice.random())))

    def keys(self) -> list[str]:
        return [f"r/{self._number:06}/{register}" for register in range(REGISTERS)]

    async def final_reads(self) -> None:
        """Read everything through every member, when all is healed; a read that is refused is asked again."""
        async with asyncio.TaskGroup() as tasks:
            for name in self._stores:
                for key in self.keys():
                    tasks.create_task(self._final_read(name, key))

    async def _final_read(self, name: str, key: str) -> None:
        for _ in range(50):
            if (await self._one(-1, name, "get", key, "")) == "ok":
                return
            await asyncio.sleep(0.1)
        self.strange.append(f"{name} does not read {key} though all is healed")

    async def _client(self, client: int, dice: random.Random) -> None:
        name = dice.choice(list(self._stores))
        count = 0
        while not self._stopping.is_set():
            count += 1
            if dice.random() < 0.2:  # so that somebody asks a member that is stopped, or cut off
                name = dice.choice(list(self._stores))
            mark = f"{self._number}.{client}.{count}"
            if dice.random() < 0.3:
                outcome = await self._write_once(name, f"w/{self._number:06}/{client}-{count}", dice)
            else:
                kind = dice.choices(["get", "put", "cas", "delete"], [40, 30, 27, 3])[0]
                outcome = await self._one(client, name, kind, dice.choice(self.keys()), mark, dice)  # type: ignore[arg-type]
            if outcome != "ok":
                name = dice.choice(list(self._stores))
                await asyncio.sleep(dice.uniform(0.02, 0.12))
            else:
                await asyncio.sleep(dice.expovariate(1 / 0.002))

    async def _write_once(self, name: str, key: str, dice: random.Random) -> Outcome:
        size = BIG_BYTES if dice.random() < 0.03 else 0
        outcome: Outcome = "ok"
        try:
            await self._stores[name].put(key, values.encode(key, size), wants_previous=False)
        except NotAnswered as error:
            outcome = error.outcome
        self._ledger.note(key, outcome)
        return outcome

    async def _one(
        self, client: int, name: str, kind: Kind, key: str, mark: str, dice: random.Random | None = None
    ) -> Outcome:
        """Do one operation and write it down."""
        store = self._stores[name]
        chance = dice.random() if dice is not None else 0.0
        value = mark if kind in ("put", "cas") else None
        expected = (self._last.get(key) if chance < 0.8 else "nobody's") if kind == "cas" else None
        raw = values.encode(mark)
        calls: dict[Kind, Callable[[], Coroutine[Any, Any, Answer]]] = {
            "get": lambda: store.get(key),
            "put": lambda: store.put(key, raw, wants_previous=chance < 0.5),
            "delete": lambda: store.delete(key),
            "cas": lambda: store.swap(key, None if expected is None else values.encode(expected), raw),
        }
        start_s = time.monotonic()
        outcome: Outcome = "ok"
        answer = Answer(None, False)
        try:
            answer = await calls[kind]()
        except NotAnswered as error:
            outcome = error.outcome
            if error.is_strange:
                self.strange.append(f"{name} answered {kind} {key}: {error}")
        except ValueError as error:
            self.strange.append(f"{name} answered {kind} {key}: {error}")
        if outcome == "ok":
            done = value if answer.succeeded else None
            self._last[key] = (
                done if done is not None else (answer.seen.value if answer.seen and kind != "put" else None)
            )
        self.history.append(
            Operation(
                client=client,
                kind=kind,
                key=key,
                start_s=start_s,
                end_s=time.monotonic(),
                outcome=outcome,
                value=value,
                expected=expected,
                succeeded=answer.succeeded,
                seen=answer.seen,
                revision=answer.revision,
                asked=name,
            )
        )
        return outcome
