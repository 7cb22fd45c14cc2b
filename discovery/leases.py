"""When leases end: known to the leader's memory only, so that keep-alives never enter the log.

Which leases exist, and what hangs on them, is replicated state; their deadlines are not. A member
that begins to lead (or starts again) gives every lease its full time anew before it ends any.
`api` and `services` are the callers; `run` proposes the end of what was not renewed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets

from discovery.operations import NOT_FOUND, Lease, LeaseGrant, LeaseRevoke, Outcome, Refused
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

    async def grant(self, ttl_s: int, id: int = 0) -> Lease:
        """Make a lease; an id of 0 means any.

        Raises:
            Refused: the id is taken, or the time is nonsense.
        """
        chosen = id or secrets.randbits(62) + 1
        await self._member.propose(LeaseGrant(id=chosen, ttl_s=ttl_s))
        self._deadlines[chosen] = clock.monotonic_s() + ttl_s
        self._changed.set()
        return Lease(chosen, ttl_s)

    async def revoke(self, id: int) -> Outcome:
        """End a lease now.

        Raises:
            Refused: there is none.
        """
        self._ending.add(id)  # a renewal from here on would be a promise that cannot be kept
        try:
            outcome = await self._member.propose(LeaseRevoke(id=id))
        finally:
            self._ending.discard(id)
        self._deadlines.pop(id, None)
        return outcome

    def keep_alive(self, id: int) -> int:
        """Renew a lease; return its time to live in seconds, 0 if it is gone."""
        lease = self._member.state.lease(id)
        if lease is None or id in self._ending:
            return 0
        self._deadlines[id] = clock.monotonic_s() + lease.ttl_s
        return lease.ttl_s

    def remaining_s(self, id: int) -> int:
        """Return the whole seconds that a lease has left, -1 if it is gone."""
        lease = self._member.state.lease(id)
        if lease is None:
            return -1
        deadline = self._deadlines.get(id)
        return lease.ttl_s if deadline is None else max(0, int(deadline - clock.monotonic_s()))

    async def run(self) -> None:
        """End leases that were not renewed, until cancelled."""
        await self._member.wait_ready()
        now = clock.monotonic_s()
        for lease in self._member.state.leases():
            self._deadlines[lease.id] = now + lease.ttl_s
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
            try:
                await self.revoke(id)
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
