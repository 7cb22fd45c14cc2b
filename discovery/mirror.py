"""An agent's copy of the store: everything that members have, followed change by change, read here, written there.

    snapshot at revision R → watch from R+1 → (break: another member, watch from where we are)
                           → (what we need is compacted, or the cluster is another: snapshot again)

A watch tells every change in order, so a copy is always the store as it was at one revision; how far it is
behind is asked of the member every `PROBE_S` by a read that only a member in touch with the majority
answers. One that does not answer, or whose watch lags behind its own reads, is left for the next.
While no member answers, the copy stays and is read: DNS, services, serializable reads and watches of what
is known. A new snapshot ends local watches as a compaction would, since changes between were not seen.

`Mirror` is to `api`, `services` and `dns` what `raft.Member` is; `agent` makes it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random

from discovery import asking, replies
from discovery.history import BYTES_MAX, EVENTS_MAX
from discovery.listeners import Listeners
from discovery.membership import MemberStatus
from discovery.operations import (
    OUT_OF_RANGE,
    Body,
    Compact,
    Event,
    Image,
    Outcome,
    RangeRequest,
    RangeResult,
    Record,
    Refused,
)
from discovery.peerwire import Change
from discovery.replies import Answer, Header, WatchAnswer
from discovery.state import State
from discovery.upstream import Upstream
from discovery.wire.errors import Internal, Invalid, ServiceError, Unavailable

log = logging.getLogger(__name__)

PROBE_S = 5.0
LAG_S = 5.0
"""How long the copy may stay behind what the same member answered."""
PAGE_S = 30.0
PAGE_KEYS_FIRST, PAGE_KEYS_MAX, PAGE_BYTES = 100, 5000, 2 * 1024 * 1024
"""A page of a snapshot has as many keys as make about so many bytes, judged by the page before it."""
OWN_WRITES_S = 2.0
"""How long a write waits for the copy to show it."""
RETRY_FIRST_S, RETRY_MAX_S = 0.1, 5.0
_EVERYTHING = b"\0"


class Lost(Exception):
    """What we have cannot be brought up to date change by change."""


class Mirror:
    """The copy; `run` keeps it up to date."""

    def __init__(self, upstream: Upstream, name: str) -> None:
        self.state = State()
        self.member_id = name
        self.resyncs = 0
        self.failures = 0
        self._upstream = upstream
        self._head = Header()
        self._is_connected = False
        self._ready = asyncio.Event()
        self._moved = asyncio.Event()
        self.on_applied = Listeners[list[Event]]()
        """Told the changes of every revision."""
        self.on_reset = Listeners[int]()
        """Told the last revision that was seen, after the copy was made anew."""

    @property
    def term(self) -> int:
        """Return the term of the members' last word."""
        return self._head.raft_term

    @property
    def index(self) -> int:
        """Return how far the copy is; an agent has no log, so it is the revision."""
        return self.state.revision

    @property
    def is_leader(self) -> bool:
        """An agent never leads."""
        return False

    @property
    def cluster_id(self) -> int:
        """Return the number of the cluster, as its members show it."""
        return self._head.cluster_id

    def status(self) -> MemberStatus:
        """Say how this looks to a client; the member that is followed stands for the leader, who need not be known."""
        at = self.state.revision
        leads = self._upstream.address if self._is_connected else ""
        return MemberStatus(self.member_id, False, True, self.term, at, at, leads, leads, self.cluster_id)

    async def change(self, change: Change) -> None:
        """Refuse: an agent has no members.

        Raises:
            Invalid: always.
        """
        raise Invalid(f"this is an agent: it cannot {change.verb} members", hint="ask on the host of a member")

    @property
    def is_connected(self) -> bool:
        """Tell whether the copy follows a member now."""
        return self._is_connected

    @property
    def upstream_address(self) -> str:
        """Return the member that is followed, or tried next."""
        return self._upstream.address

    def disk_bytes(self) -> int:
        """Return what it takes on disk: nothing."""
        return 0

    async def wait_ready(self) -> None:
        """Wait until there is a copy."""
        await self._ready.wait()

    def is_ready(self) -> bool:
        """Tell whether there is a copy."""
        return self._ready.is_set()

    def check_ready(self) -> None:
        """Make sure that there is a copy to read.

        Raises:
            Unavailable: there was none yet.
        """
        if not self._ready.is_set():
            raise Unavailable("no member of the store has answered yet", hint="try again in a moment")

    async def read(self, request: RangeRequest, *, serializable: bool = False) -> RangeResult:
        """Read what is certainly the newest state, from the members; or from the copy.

        Raises:
            Refused: the revision is not to be had.
            Unavailable: no member can know now.
        """
        if serializable:
            self.check_ready()
            return self.state.read(request)
        path, body = asking.request(request)
        answer = replies.decode(await self._upstream.ask(path, body, is_change=False), Answer)
        found = asking.result(request, answer)
        if not isinstance(found, RangeResult):
            raise Internal("a read was answered with something else")
        return found

    async def propose(self, body: Body, timeout_s: float = 10.0) -> Outcome:
        """Have a member make a change; return when the copy shows it, if that is soon. The outcome has no events.

        Raises:
            Refused: the store says no; nothing changed.
            Unavailable: no member took it, nothing changed.
            DeadlineExceeded: it may or may not be done.
        """
        path, asked = asking.request(body)
        answer = replies.decode(await self._upstream.ask(path, asked, is_change=True, timeout_s=timeout_s), Answer)
        revision = answer.header.revision
        await self.wait_revision(revision, OWN_WRITES_S)
        return Outcome(asking.result(body, answer), revision or self.state.revision, [])

    async def wait_revision(self, revision: int, timeout_s: float) -> bool:
        """Wait until the copy has a revision; tell whether it has."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.state.revision < revision:
                    await self._moved.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Follow the members, until cancelled."""
        pause_s, is_lost = RETRY_FIRST_S, True
        while True:
            try:
                if is_lost:
                    await self._resync()
                    is_lost = False
                await self._follow()
            except Lost as lost:
                log.warning("the copy has to be made anew: %s", lost)
                is_lost, pause_s = True, self._next_pause(pause_s)
            except (ServiceError, Refused) as error:
                if self._is_connected or not self.failures:
                    log.warning("member %s is lost: %s; trying the others", self._upstream.address, error)
                pause_s = self._next_pause(pause_s)
                self.failures += 1
                self._upstream.turn()
            self._is_connected = False
            await asyncio.sleep(pause_s * (0.5 + random.SystemRandom().random()))

    def _next_pause(self, pause_s: float) -> float:
        return RETRY_FIRST_S if self._is_connected else min(pause_s * 2, RETRY_MAX_S)

    # Following

    async def _follow(self) -> None:
        """Apply what one member's watch tells, until that breaks.

        Raises:
            Lost: a snapshot is needed.
            ServiceError: the member cannot be followed any more.
        """
        await self._probe()
        create = {"key": _EVERYTHING, "range_end": _EVERYTHING, "start_revision": self.state.revision + 1}
        body = {"create_request": create | {"progress_notify": True}}
        failure: Exception = Unavailable("its watch has ended")
        try:
            async with asyncio.timeout(None) as scope, asyncio.TaskGroup() as tasks:
                probing = tasks.create_task(self._keep_probing(scope))
                try:
                    async with self._upstream.stream("/v3/watch", body) as reader:
                        async for answer in replies.watch_answers(reader.iter_any()):
                            self._take(answer)
                except (Lost, ServiceError) as error:
                    failure = error
                finally:
                    probing.cancel()
        except TimeoutError:
            failure = probing.result()
        raise failure

    def _take(self, answer: WatchAnswer) -> None:
        if answer.canceled and not answer.compact_revision:
            raise Unavailable(f"it refuses to be watched: {answer.cancel_reason}")
        if answer.canceled:
            raise Lost(f"revision {self.state.revision + 1} is compacted, members have from {answer.compact_revision}")
        if answer.header.cluster_id != self._head.cluster_id:
            raise Lost("the members are of another cluster")
        self._head = answer.header
        if answer.created and not self._is_connected:
            log.info("following member %s from revision %d", self._upstream.address, self.state.revision)
            self._is_connected = True
        for _, group in itertools.groupby(answer.events, key=lambda event: event.kv.mod_revision):
            self._apply([asking.record_of(event.kv) for event in group])

    def _apply(self, records: list[Record]) -> None:
        if records[0].mod_revision <= self.state.revision:
            return  # a watch that begins early tells nothing new
        try:
            events = self.state.follow(records)
        except ValueError as error:
            raise Lost(str(error)) from error
        self._tell(events)
        if self.state.history_events > EVENTS_MAX or self.state.history_bytes > BYTES_MAX:
            self.state.apply(Compact(revision=self.state.revision_keeping(EVENTS_MAX // 2, BYTES_MAX // 2)))

    def _tell(self, events: list[Event]) -> None:
        self.on_applied.tell(events)
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def _keep_probing(self, scope: asyncio.Timeout) -> Exception:
        """Wait until the member cannot answer or its watch does not keep up; then end `scope` and say why."""
        while True:
            await asyncio.sleep(PROBE_S)
            try:
                revision = await self._probe()
                if await self.wait_revision(revision, LAG_S):
                    continue
                reason: Exception = Unavailable(f"its watch is behind revision {revision}")
            except (Lost, ServiceError, Refused) as error:
                reason = error
            scope.reschedule(asyncio.get_running_loop().time())
            return reason

    async def _probe(self) -> int:
        """Ask the member for the newest revision; it must be in touch with the majority to answer.

        Raises:
            Lost: it is of a store that is not ours, or not any more.
        """
        body = {"key": _EVERYTHING, "range_end": _EVERYTHING, "count_only": True}
        known = self.state.revision  # before asking: the watch may be ahead of the answer
        head = replies.decode(await self._upstream.ask_here("/v3/kv/range", body), Answer).header
        if head.cluster_id != self._head.cluster_id:
            raise Lost("the members are of another cluster")
        if head.revision < known:
            raise Lost(f"the members are at revision {head.revision}, the copy was at {known}")
        return head.revision

    # Beginning anew

    async def _resync(self) -> None:
        """Take everything as of one revision; from a member without a majority only if there is nothing yet."""
        try:
            image, head = await self._snapshot(is_serializable=False)
        except Unavailable:
            if self._ready.is_set():
                raise
            image, head = await self._snapshot(is_serializable=True)
        before = self.state.revision
        self.state.become(State.from_image(image))
        self._head = head
        self.resyncs += 1
        self._ready.set()
        self.on_reset.tell(min(before, image.revision))
        self._tell([])
        log.info("copied %d keys at revision %d from %s", len(image.base), image.revision, self._upstream.address)

    async def _snapshot(self, *, is_serializable: bool) -> tuple[Image, Header]:
        records: list[Record] = []
        head: Header | None = None
        key, limit = _EVERYTHING, PAGE_KEYS_FIRST
        while True:
            at = head.revision if head else 0
            path, body = asking.request(RangeRequest(key=key, range_end=_EVERYTHING, limit=limit, revision=at))
            try:
                body["serializable"] = is_serializable or head is not None
                raw = await self._upstream.ask_here(path, body, PAGE_S)
            except Refused as refused:
                if refused.code != OUT_OF_RANGE:
                    raise
                raise Unavailable(f"the snapshot took too long: {refused.message}") from refused
            answer = replies.decode(raw, Answer)
            head = head or answer.header
            records += [asking.record_of(kv) for kv in answer.kvs]
            if not answer.more:
                # Changes at the revision itself are not all known (removals leave no key): it counts as compacted.
                return Image(head.revision, head.revision + 1, [], records, []), head
            key = records[-1].key + b"\0"
            limit = min(max(limit * PAGE_BYTES // len(raw), 1), PAGE_KEYS_MAX, limit * 10)
