"""pysyncobj as it is shipped, beside our fenced one, and both driven message by message with a clock of the test's."""

from __future__ import annotations

import importlib
import pickle
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from discovery import membership
from discovery.core import Core
from discovery.journal import Journal
from discovery.membership import Membership, Peer, Timing
from discovery.peerwire import Append, AppendReply, VoteReply, VoteRequest

TIMING = Timing(heartbeat_s=0.1, election_s=0.5)
CLUSTER = 7


def _load() -> ModuleType:
    """Import a second copy of the library, which our fence has not touched."""
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "pysyncobj"}
    inet = socket.inet_pton, socket.inet_ntop
    for name in ours:
        del sys.modules[name]
    try:
        return importlib.import_module("pysyncobj.syncobj")
    finally:
        socket.inet_pton, socket.inet_ntop = inet
        for name in [name for name in sys.modules if name.split(".")[0] == "pysyncobj"]:
            del sys.modules[name]
        sys.modules.update(ours)


library: Any = _load()


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Shipped:
    """One member as shipped, with a transport that only writes down what would be sent."""

    id: str
    others: list[str]
    clock: Clock
    sent: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    applied: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        library.monotonicTime = self.clock
        library.SyncObj.__doc__ = None
        member = self

        class Wire(library.Transport):  # type: ignore[misc]  # the copy has no types
            def send(self, node: Any, message: Any) -> bool:
                member.sent.append((node.id, message))
                return True

        class Store(library.SyncObj):  # type: ignore[misc]
            @library.replicated  # type: ignore[untyped-decorator]
            def put(self, value: Any) -> None:
                if value == "raise":
                    raise ValueError(value)
                member.applied.append(value)

        self.nodes = {id: library.Node(id) for id in self.others}
        conf = library.SyncObjConf(autoTick=False, dynamicMembershipChange=True)
        self.core = Store(
            library.Node(self.id),
            list(self.nodes.values()),
            conf,
            transport=Wire(None, None, []),
            nodeClass=library.Node,
        )
        for node in self.nodes.values():
            self.core._SyncObj__onNodeConnected(node)

    def get(self, name: str) -> Any:
        return getattr(self.core, f"_SyncObj__{name}")

    def receive(self, sender: str, **message: Any) -> None:
        self.core._SyncObj__onMessageReceived(self.nodes[sender], message)

    def tick(self) -> None:
        self.core._onTick(0.0)

    def stand(self) -> None:
        """Let the election timeout pass."""
        self.clock.now_s += 2.0
        self.tick()

    def lead(self) -> None:
        self.stand()
        for id in self.others:
            self.receive(id, type="response_vote", term=self.core.raftCurrentTerm)
        assert self.core._isLeader()

    def put(self, value: Any) -> None:
        self.core.put(value)
        self.tick()

    def command(self, value: Any) -> bytes:
        return b"\x00" + pickle.dumps((self.core._methodToID["put_v0"], (value,)))

    def took(self, kind: str) -> list[dict[str, Any]]:
        found = [message for _, message in self.sent if message["type"] == kind]
        self.sent.clear()
        return found


@dataclass
class Ours:
    """One member of ours, its messages written down, its disk real."""

    folder: Path
    id: str
    others: list[str]
    clock: Clock
    sent: list[tuple[str, Any]] = field(default_factory=list)
    applied: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.journal = Journal(self.folder)
        peers = tuple(Peer(id, f"{id}:1", 1, True, True) for id in sorted([self.id, *self.others]))
        self.core = Core(
            self.id,
            self.journal,
            lambda payload, _: self.applied.append(payload),
            lambda id, message: self.sent.append((id, message)),
            TIMING,
            base=Membership(CLUSTER, peers),
            incarnation=1,
        )
        for id in self.others:
            self.core.connected(id, 1)

    def receive(self, sender: str, message: Any, *, incarnation: int = 1) -> None:
        self.core.receive(sender, incarnation, message)

    def step(self) -> None:
        """Do what `Member` does in a turn."""
        self.core.step()
        self.journal.sync_now()
        self.sent += self.core.outbox
        self.core.outbox.clear()

    def stand(self) -> None:
        """Let the election timeout pass, and win the trial."""
        self.clock.now_s += 2.0
        self.step()
        for id in self.others[: (len(self.others) + 1) // 2]:
            self.receive(id, VoteReply(self.core.term + 1, True, True))
        self.step()

    def lead(self) -> None:
        self.stand()
        for id in self.others:
            self.receive(id, VoteReply(self.core.term, True))
        assert self.core.is_leader
        self.step()

    def append(self, sender: str, term: int, previous: tuple[int, int], *commands: bytes, commit: int = 0) -> None:
        entries = [(term, b"\x00" + command) for command in commands]
        self.receive(sender, Append(term, *previous, commit, entries))

    def took(self, kind: type) -> list[Any]:
        found = [message for _, message in self.sent if isinstance(message, kind)]
        self.sent.clear()
        return found

    @property
    def log(self) -> list[tuple[int, bytes]]:
        return [(term, command[1:]) for command, _, term in self.journal[1:] if command[0] != 1]


__all__ = ["Append", "AppendReply", "Clock", "Ours", "Shipped", "VoteReply", "VoteRequest", "membership"]
