"""When leases end: known to the leader's memory only, so that keep-alives never enter the log.

Which leases exist, and what hangs on them, is replicated state; their deadlines are not. A member
that begins to lead (or starts again) gives every lease its full time anew before it ends any;
the others hand renewals on to it. A renewal is answered once a majority has confirmed who leads, so
that no other can end the lease sooner; and a lease is ended by whoever leads when its time is over,
or not at all: what a deposed leader decided is not carried over to the next.
`api` and `services` are the callers; `run` proposes the end of what was not renewed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets

from discovery.membership import MemberStatus
from discovery.operations import NOT_FOUND, Lease, LeaseGrant, LeaseRevoke, Outcome, Refused
from discovery.peerwire import KeepAlive, TimeToLive
from discovery.raft import Member
from discovery.wire import clock
from discovery.wire.errors import ServiceError

log = logging.getLogger(__name__)

_RETRY_S = 1.0


class Leases:
    """Grants, renews and ends leases."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._deadlines: dict[int, float] = {}
        self._ending: set[int] = set()
        self._changed = asyncio.Event()
        self._term = 0
        member.on_leader(self._leader_changed)
        member.on_grant(self._granted)
        member.answer_with(KeepAlive, self._renew_all)
        member.answer_with(TimeToLive, self._all_remaining_s)

    async def grant(self, ttl_s: int, id: int = 0) -> Lease:
        """Make a lease; an id of 0 means any.

        Raises:
            Refused: the id is taken, or the time is nonsense.
        """
        chosen = id or secrets.randbits(62) + 1
        await self._member.propose(LeaseGrant(id=chosen, ttl_s=ttl_s))
        return Lease(chosen, ttl_s)

    async def revoke(self, id: int) -> Outcome:
        """End a lease now.

        Raises:
            Refused: there is none.
        """
        return await self._end(id, 0)

    async def _end(self, id: int, term: int) -> Outcome:
        self._ending.add(id)  # a renewal from here on would be a promise that cannot be kept
        try:
            outcome = await self._member.propose(LeaseRevoke(id=id), as_leader_in=term)
        finally:
            self._ending.discard(id)
        self._deadlines.pop(id, None)
        return outcome

    async def keep_alive(self, id: int) -> int:
        """Renew a lease at the leader; return its time to live in seconds, 0 if it is gone.

        Raises:
            Unavailable: no leader could be asked; the lease may have been renewed.
        """
        if self._member.is_leader:
            return (await self._renew_all([id]))[0]
        return (await self._member.ask_leader(KeepAlive([id])))[0]

    async def remaining_s(self, ids: list[int]) -> list[int]:
        """Return the whole seconds that each of these leases has left, -1 for one that is gone.

        Raises:
            Unavailable: no leader could be asked.
        """
        if self._member.is_leader:
            return await self._all_remaining_s(ids)
        return await self._member.ask_leader(TimeToLive(ids))

    async def _renew_all(self, ids: list[int]) -> list[int]:
        """Renew as the leader: at once, since it takes a moment, and when all that was committed before is applied."""
        for id in ids:
            self._renew(id)
        await self._member.confirm_leading()
        return [self._renew(id) for id in ids]

    async def _all_remaining_s(self, ids: list[int]) -> list[int]:
        await self._member.confirm_leading()
        return [self._remaining_s(id) for id in ids]

    def _renew(self, id: int) -> int:
        lease = self._member.state.lease(id)
        if lease is None or id in self._ending:
            return 0
        self._deadlines[id] = clock.monotonic_s() + lease.ttl_s
        return lease.ttl_s

    def _remaining_s(self, id: int) -> int:
        lease = self._member.state.lease(id)
        if lease is None:
            return -1
        deadline = self._deadlines.get(id)
        return lease.ttl_s if deadline is None else max(0, int(deadline - clock.monotonic_s()))

    def _granted(self, grant: LeaseGrant) -> None:
        if self._member.is_leader:
            self._deadlines[grant.id] = clock.monotonic_s() + grant.ttl_s
            self._changed.set()

    def _leader_changed(self, status: MemberStatus) -> None:
        """Give every lease its full time anew when this member begins to lead."""
        if not status.is_leader:
            self._term = 0
            self._deadlines.clear()
        elif status.term != self._term:
            self._term = status.term
            now = clock.monotonic_s()
            self._deadlines = {lease.id: now + lease.ttl_s for lease in self._member.state.leases()}
        self._changed.set()

    async def run(self) -> None:
        """End leases that were not renewed, while this member leads; until cancelled."""
        await self._member.wait_ready()
        while True:
            self._changed.clear()
            pause_s = await self._end_expired()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._changed.wait()

    async def _end_expired(self) -> float | None:
        """End what is due; return how long nothing else can be due (`None`: nothing at all is waiting)."""
        now = clock.monotonic_s()
        for id in [id for id, deadline in self._deadlines.items() if deadline <= now]:
            if self._deadlines.get(id, math.inf) > now:
                continue  # it was renewed while others were ended
            try:
                await self._end(id, self._member.term)
                log.info("lease %d expired", id)
            except Refused as refused:
                if refused.code != NOT_FOUND:
                    raise
                self._deadlines.pop(id, None)
            except ServiceError as error:
                log.warning("lease %d could not be ended yet: %s", id, error.message)
                return _RETRY_S
        if not self._deadlines:
            return None
        return max(0.05, min(self._deadlines.values()) - clock.monotonic_s())
