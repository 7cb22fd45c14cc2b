"""Ways to break one promise of the daemon's, each as a real mistake would: the crash test has to find every one.

`wrapped --broken WAY` calls one of them in a member's process before it starts; nothing else does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from discovery import library, raft
from discovery.core import Core
from discovery.journal import Journal
from discovery.leases import Leases
from discovery.raft import Member
from discovery.requests import Requests
from discovery.state import State
from discovery.watches import Watch
from discovery.wire.errors import Unavailable
from tests.discovery.crash.taping import TapingDisk


def no_sync() -> None:
    """Say that the log is on disk when it is not."""

    def forget(self: TapingDisk, fd: int) -> None:
        pass

    TapingDisk.fdatasync = forget  # type: ignore[method-assign]


def early_confirmation() -> None:
    """Confirm entries before they are on disk: what waits for the sync leaves before it."""
    turn = Journal.sync

    async def sync(self: Journal, **how: bool) -> None:
        _send_early()
        await turn(self, **how)

    members: list[Member] = []
    begin = Member.__init__

    def remember(self: Member, *args: object, **kwargs: object) -> None:
        begin(self, *args, **kwargs)  # type: ignore[arg-type]
        members.append(self)

    def _send_early() -> None:
        for member in members:
            member._send_confirmations()
            assert member._peers is not None
            member._peers.flush()

    Member.__init__ = remember  # type: ignore[method-assign]
    Journal.sync = sync  # type: ignore[method-assign]


def local_reads() -> None:
    """Read what is here without asking anybody."""

    async def nothing(self: Member, timeout_s: float = 10.0) -> None:
        pass

    Member.catch_up = nothing  # type: ignore[method-assign]


def leader_reads() -> None:
    """Read what the leader has without asking whether it still leads, which it believes for 30 s, as pysyncobj does."""

    def ask(self: Core, tell: Callable[[int | None], None]) -> None:
        tell(self.commit if self.is_leader else None)

    Core.ask_read_index = ask  # type: ignore[method-assign]
    make = library.SyncObjConf.__init__

    def patient(self: library.SyncObjConf, **kwargs: object) -> None:
        make(self, **kwargs | {"leaderFallbackTimeout": 30.0})

    library.SyncObjConf.__init__ = patient


def forgotten_ids() -> None:
    """Apply a command again that is in the log twice, and send each proposal again as a careless client would."""
    Requests.is_done = lambda self, id: False  # type: ignore[method-assign]


def certain_refusals() -> None:
    """Say "not done" where the truth is "unknown"."""

    def late(self: Member, proposal: raft._Proposal, timeout_s: float, error: TimeoutError) -> None:
        raise Unavailable("not done") from error

    Member._raise_late = late  # type: ignore[method-assign]


def early_watches() -> None:
    """Tell a watch from a later revision on of whatever comes, as a member that lags would be tempted to."""
    make = Watch.__init__

    def at_once(self: Watch, state: State, key: bytes, end: bytes, first: int, *rest: asyncio.Event | None) -> None:
        make(self, state, key, end, min(first, state.revision + 1), *rest)

    Watch.__init__ = at_once  # type: ignore[method-assign,assignment]


def short_leases() -> None:
    """End leases in half of the time that was promised."""
    renew = Leases._renew

    def half(self: Leases, id: int) -> int:
        ttl_s = renew(self, id)
        if ttl_s:
            self._deadlines[id] -= ttl_s / 2
        return ttl_s

    Leases._renew = half  # type: ignore[method-assign]


WAYS: dict[str, Callable[[], None]] = {
    "no-sync": no_sync,
    "early-confirmation": early_confirmation,
    "local-reads": local_reads,
    "leader-reads": leader_reads,
    "forgotten-ids": forgotten_ids,
    "certain-refusals": certain_refusals,
    "early-watches": early_watches,
    "short-leases": short_leases,
}
