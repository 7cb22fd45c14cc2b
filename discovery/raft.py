"""One member of the replicated store: proposals in, applied changes out, with our disk, wire and state machine.

`core` decides who leads and what is committed; this drives it, one turn after the other:

    messages that came → core (elections, commit, apply, append) → to the followers what is new
    → sync of the log → to the others what depends on it → wait

The order makes "acknowledged" true: what a turn appended is synced before the next one, only that
next turn commits, applies and answers, and a follower's confirmation leaves after its sync. So all
that is proposed or arrives meanwhile shares the next sync.

A proposal may be made at any member: it goes to whoever leads, again with the same id if the leader
changes (`requests` has it applied once), and is answered when it is applied here. Without a
`Cluster` the member is alone, with no port at all. The api, services, leases and DNS of this
process are the callers.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import random
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from discovery import codec, journal, membership, snapshot
from discovery.core import REGULAR, Contradiction, Core
from discovery.disk import DISK, Disk
from discovery.forming import Forming
from discovery.frames import Damaged
from discovery.journal import Journal
from discovery.listeners import Listeners
from discovery.measures import Times
from discovery.membership import TIMING, Cluster, Identity, MemberStatus, Timing
from discovery.operations import (
    INVALID_ARGUMENT,
    Body,
    Command,
    Event,
    LeaseGrant,
    Outcome,
    RangeRequest,
    RangeResult,
    Refused,
)
from discovery.peerwire import (
    VERSION,
    Answer,
    Ask,
    Change,
    Chunk,
    ChunkReply,
    Done,
    Hello,
    Join,
    KeepAlive,
    Message,
    Nature,
    Numbers,
    Probe,
    Propose,
    ReadIndex,
    Refusal,
    Reply,
    TimeToLive,
)
from discovery.questions import Questions
from discovery.reads import Reads
from discovery.requests import Requests
from discovery.snapshot import Snapshot
from discovery.snapshots import Limits, Snapshots
from discovery.state import State
from discovery.transport import Credentials, Peers
from discovery.wire import clock
from discovery.wire.errors import Conflict, DeadlineExceeded, Internal, NotLeader, ServiceError, Unavailable

log = logging.getLogger(__name__)

COMPACT_ENTRIES = 20_000
COMPACT_BYTES = 32 * 1024 * 1024
KEEP_ENTRIES = 5_000
"""How many entries a snapshot leaves in memory, for followers that are a little behind."""
DISK_RESERVE_BYTES = 32 * 1024 * 1024
"""Below this much free space writes are refused, so that the log never meets a full disk in the middle of a record."""
COMMAND_BYTES_MAX = 2 * 1024 * 1024
_WAITING_MAX = 20_000
_RETRY_S = 0.05
_REGULAR = bytes((REGULAR,))

LeaderAnswer = Callable[[list[int]], Awaitable[list[int]]]


@dataclass(eq=False, slots=True)
class _Proposal:
    """A change on its way; `doubts` counts the times that it was sent and might have entered the log.

    With a `term` it is made by this member as its leader, or not at all.
    """

    payload: bytes
    future: asyncio.Future[Outcome]
    term: int = 0
    doubts: int = 0
    refusal: Refusal | None = None
    asked: list[int] = field(default_factory=list)


class Member:
    """The store as this process has it: propose changes, read, hear of what was applied.

    Raises:
        Damaged: the files in `directory` are not what was written.
        Unreadable: they are of a version that this one cannot read.
        Conflict: another process has them open, or they are another member's, or a cluster's and `cluster` is missing.
    """

    def __init__(
        self,
        directory: Path,
        member_id: str,
        *,
        cluster: Cluster | None = None,
        disk: Disk = DISK,
        timing: Timing = TIMING,
    ) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.member_id = member_id
        self._directory = directory
        self._disk = disk
        self._cluster = cluster
        self._lock = lock_folder(directory)
        try:
            self._open(cluster, timing)
        except BaseException:
            os.close(self._lock)
            raise
        self._reads = Reads(self)
        self._inbox: list[tuple[str, Hello, Message]] = []
        self._hellos: dict[str, Hello] = {}
        self._between_turns: list[Callable[[], None]] = []
        self.questions = Questions(self.post)
        self._answerers: dict[type, LeaderAnswer] = {}
        self.on_applied = Listeners[list[Event]]()
        """Told the changes of every command, before its proposer is answered."""
        self.on_leader = Listeners[MemberStatus]()
        """Told whenever another member leads, or none does, or this one becomes or ceases to be ready."""
        self.on_reset = Listeners[int]()
        """Told the revision until then when a snapshot took the state's place: changes were missed."""
        self.on_grant = Listeners[LeaseGrant]()
        """Told every lease that is made."""
        self._waiting: dict[int, _Proposal] = {}
        self.proposals = 0
        self.leader_changes = 0
        self._dice = random.Random(secrets.randbits(256))  # noqa: S311 — ids must differ, not be secret
        self._applied_waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._seen_leader: tuple[int, str] = (0, "")
        self._seen_membership: object = None
        self._wakeup = asyncio.Event()
        self._ready = asyncio.Event()
        self._failure: str = ""
        self.trouble = ""
        self._tasks: asyncio.TaskGroup | None = None
        self._disk_checked_s = 0.0
        self._has_space = True

    def _open(self, cluster: Cluster | None, timing: Timing) -> None:
        """Read the files, and put the parts together that depend on what they say."""
        directory, disk, member_id = self._directory, self._disk, self.member_id
        stored = snapshot.load(directory, disk)
        meta, image = codec.decode_snapshot(stored.chunks) if stored else (codec.Meta(b"", []), None)
        has_log = journal.is_there(directory, disk)
        if not has_log:
            self._check_others_know(cluster, stored, meta)
        self.identity = Identity(member_id, 0)
        if cluster:
            self.identity = membership.load_identity(directory, member_id, disk, has_log=has_log)
        if not has_log:
            journal.clear(directory, disk)
        self.state = State() if image is None else State.from_image(image)
        self._requests = Requests(meta.requests)
        index, term = (stored.index, stored.term) if stored else (0, 0)
        self._journal = Journal(directory, snapshot_index=index, snapshot_term=term, disk=disk)
        try:
            self._open_rest(cluster, timing, meta, (index, term))
        except BaseException:
            self._journal.close()
            raise

    def _open_rest(self, cluster: Cluster | None, timing: Timing, meta: codec.Meta, place: tuple[int, int]) -> None:
        directory, disk, member_id = self._directory, self._disk, self.member_id
        self.core = Core(
            member_id,
            self._journal,
            self._apply,
            self.post,
            timing,
            applied_index=place[0],
            base=membership.decode(meta.membership) if meta.membership else None,
            incarnation=self.identity.incarnation,
        )
        limits = Limits(COMPACT_ENTRIES, COMPACT_BYTES, KEEP_ENTRIES)
        self.snapshots = Snapshots(self, directory, disk, self._journal, place, limits)
        if cluster is None and self.core.membership is not None:
            raise Conflict(f"{directory} belongs to a cluster", hint="give raft_address, initial_members and tls_*")
        self._peers: Peers | None = None
        if cluster is not None:
            self._peers = Peers(cluster.address, Credentials(cluster.ca, cluster.certificate, cluster.key), self)
        self.forming = Forming(self, cluster) if cluster else None

    def _check_others_know(self, cluster: Cluster | None, stored: Snapshot | None, meta: codec.Meta) -> None:
        """Make sure that a folder without a log never had one, or that others have what was in it.

        Raises:
            Damaged: what was in it was nowhere else.
        """
        directory, disk = self._directory, self._disk
        known = membership.read_identity(directory, disk) if disk.exists(directory / "identity") else None
        was_in_cluster = bool(meta.membership) or (known is not None and bool(known.cluster_id))
        if cluster is not None and (was_in_cluster or known is not None):
            return
        if stored is not None or was_in_cluster or journal.was_there(directory, disk):
            found = f"only {snapshot.path_of(directory, stored.index)} is" if stored else "nothing of it is"
            raise Damaged(
                f"the log in {directory} is gone, {found} left: `hostd discovery snapshot restore FILE"
                " --discard-current` goes on from a snapshot, `python -m discovery.rebuild --even-alone` with nothing"
            )

    # What is

    @property
    def term(self) -> int:
        """Return Raft's current term."""
        return self.core.term

    @property
    def index(self) -> int:
        """Return the log index up to which the state is applied."""
        return self.core.applied

    @property
    def is_leader(self) -> bool:
        """Tell whether this member leads and knows it."""
        return self._ready.is_set() and self.core.is_leader and not self._failure

    @property
    def log_entries(self) -> int:
        """Return how many entries the log holds in memory."""
        return len(self._journal)

    @property
    def cluster_id(self) -> int:
        """Return the number of the cluster that this member is in or wants to be let into (0: none)."""
        current = self.core.membership
        return current.cluster_id if current else self.identity.cluster_id

    def status(self) -> MemberStatus:
        """Say how this member sees the cluster."""
        core, current = self.core, self.core.membership
        leader = current.find(core.leader_id) if current else None
        return MemberStatus(
            member_id=self.member_id,
            is_leader=self.is_leader,
            is_learner=not core.is_voter,
            term=core.term,
            index=core.last_index,
            applied=core.applied,
            leader_id="" if self._failure else core.leader_id,
            leader_address=leader.address if leader else "",
            cluster_id=self.cluster_id,
            members=list(current.peers) if current else [membership.Peer(self.member_id, "", 0, True, True)],
        )

    @property
    def proposals_waiting(self) -> int:
        """Return how many proposals of this process are under way."""
        return len(self._waiting)

    @property
    def sync_times(self) -> Times:
        """Return how long the log's syncs have taken."""
        return self._journal.sync_times

    def disk_bytes(self) -> int:
        """Return how much the log and the snapshots take."""
        return sum(path.stat().st_size for path in self._directory.iterdir() if path.is_file())

    # Being ready

    def answer_with(self, question: type[KeepAlive | TimeToLive], answer: LeaderAnswer) -> None:
        """Have the leader's `leases` answer what other members ask about leases."""
        self._answerers[question] = answer

    async def wait_ready(self) -> None:
        """Wait until the log is replayed and this member can answer (a leader is known, and caught up with)."""
        await self._ready.wait()

    def check_leading(self) -> None:
        """Make sure that this member can speak for the store.

        Raises:
            NotLeader: another does; `detail["leader"]` has its id, `detail["address"]` where it is.
            Unavailable: nobody can now.
        """
        if self.is_leader:
            return
        self.check_usable()
        status = self.status()
        if not self._ready.is_set() or not status.leader_id or self.core.is_leader:
            raise Unavailable(
                "the store is starting" if not self._ready.is_set() else "no member leads the store now",
                hint="try again in a moment",
            )
        raise NotLeader(f"{status.leader_id} leads", leader=status.leader_id, address=status.leader_address)

    def check_ready(self) -> None:
        """Make sure that this member can answer, itself or by asking who leads.

        Raises:
            Unavailable: it cannot now.
        """
        if self._cluster is None:
            self.check_leading()
        self.check_usable()
        if not self._ready.is_set():
            raise Unavailable(self.trouble or "the store is starting", hint="try again in a moment")

    def check_usable(self) -> None:
        """Make sure that this member lives.

        Raises:
            Unavailable: its disk failed, or it has stopped.
        """
        if self._failure:
            raise Unavailable(self._failure, hint="the daemon's log has the cause")

    # Reading and changing

    async def read(self, request: RangeRequest, *, serializable: bool = False, timeout_s: float = 10.0) -> RangeResult:
        """Read what is certainly the newest state, or with `serializable` what this member has.

        Raises:
            Refused: the revision is not to be had.
            Unavailable: this member cannot know.
        """
        if self._cluster is None:
            self.check_leading()
        else:
            self.check_usable()
            if not serializable:
                await self.catch_up(timeout_s)
        return self.state.read(request)

    async def catch_up(self, timeout_s: float = 10.0) -> None:
        """Wait until everything is applied here that was answered anywhere before this call.

        Raises:
            Unavailable: no leader with a majority was found in time.
        """
        if self._cluster is None:
            self.check_leading()
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self.wait_applied(await self._reads.index())
        except TimeoutError as error:
            self.check_usable()
            raise Unavailable("no majority of the members confirmed a leader in time", hint="try again") from error

    async def wait_applied(self, index: int) -> None:
        """Wait until the log is applied up to an index."""
        self.check_usable()
        if self.core.applied >= index:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._applied_waiters.append((index, future))
        await future

    async def confirm_leading(self, timeout_s: float = 5.0) -> None:
        """Wait until a majority has said that this member led when it was called, and it has applied all until then.

        Raises:
            NotLeader, Unavailable: nobody says so.
        """
        if self._cluster is None:
            self.check_leading()
            return
        confirmed: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self.core.ask_read_index(lambda index: None if confirmed.done() else confirmed.set_result(index))
        self.wake()
        try:
            async with asyncio.timeout(timeout_s):
                index = await confirmed
                if index is None:
                    raise NotLeader("this member does not lead any more", hint="try again")
                await self.wait_applied(index)
        except TimeoutError as error:
            raise Unavailable("no majority of the members answers", hint="try again") from error

    async def propose(self, body: Body, timeout_s: float = 10.0, *, as_leader_in: int = 0) -> Outcome:
        """Put a change into the log and return what it did, once it is safe and applied here.

        With a term `as_leader_in` only this member may do it, while it leads in that: the next leader may know better.

        Raises:
            Refused: the store says no; nothing changed.
            Unavailable: it was not taken, nothing changed.
            DeadlineExceeded: it may or may not be done.
        """
        if self._cluster is None:
            self.check_leading()
        else:
            self.check_usable()
        self._check_space()
        command = Command(
            id=self._dice.getrandbits(63), time_ms=int(clock.now_s() * 1000), body=body, after=self.core.applied
        )
        payload = _REGULAR + codec.encode_command(command)
        if len(payload) > COMMAND_BYTES_MAX:
            raise Refused(INVALID_ARGUMENT, "request is too large")
        if len(self._waiting) >= _WAITING_MAX:
            raise Unavailable("too many changes are under way", hint="try again in a moment")
        loop = asyncio.get_running_loop()
        proposal = _Proposal(payload, loop.create_future(), as_leader_in)
        self._waiting[command.id] = proposal
        self.proposals += 1
        self._submit(proposal)
        ending = loop.call_later(timeout_s, _end_late, proposal)
        try:
            return await proposal.future
        except TimeoutError as error:
            self._raise_late(proposal, timeout_s, error)
            raise AssertionError from error
        finally:
            ending.cancel()
            self._waiting.pop(command.id, None)
            for number in proposal.asked:
                self.questions.forget(number)  # only a refusal is answered

    def _raise_late(self, proposal: _Proposal, timeout_s: float, error: TimeoutError) -> None:
        """Say what is known of a proposal whose time is over."""
        if proposal.doubts:
            raise DeadlineExceeded(
                f"the store did not confirm within {timeout_s:g} s", hint="the change may be done: read, then decide"
            ) from error
        if proposal.refusal is not None:
            raise Unavailable(proposal.refusal.message, hint="nothing was changed") from error
        raise NotLeader(f"no leader was found within {timeout_s:g} s", hint="nothing was changed") from error

    def _submit(self, proposal: _Proposal) -> None:
        """Give a proposal to whoever leads; if nobody does, `_settle` tries again when somebody does."""
        leader = self.core.leader_id
        if proposal.term and not (self.core.is_leader and self.core.term == proposal.term):
            if not proposal.future.done():
                proposal.future.set_exception(DeadlineExceeded("the lead was lost", hint="the change may be done"))
        elif self.core.is_leader:
            proposal.doubts += 1
            self.core.proposals.append(proposal.payload)
            self._wakeup.set()
        elif leader and self._peers is not None and self._peers.is_connected(leader):

            def answered(answer: Answer | None) -> None:
                if isinstance(answer, Refusal) and not proposal.future.done():
                    proposal.doubts -= answer.is_certain
                    proposal.refusal = answer
                    asyncio.get_running_loop().call_later(_RETRY_S, self._submit_again, proposal)

            if number := self.questions.ask(leader, Propose(proposal.payload), answered):
                proposal.doubts += 1
                proposal.asked.append(number)

    def _submit_again(self, proposal: _Proposal) -> None:
        if not proposal.future.done() and not self._failure:
            self._submit(proposal)

    # Membership

    async def add_member(self, id: str, address: str, timeout_s: float = 10.0) -> None:
        """Let a new member come: a learner until it has caught up, then a voter.

        Raises:
            ServiceError: it cannot be; says why.
        """
        await self.change(Change("add", id, address), timeout_s)

    async def remove_member(self, id: str, timeout_s: float = 10.0) -> None:
        """Take a member out; a leader hands over first.

        Raises:
            ServiceError: it cannot be; says why.
        """
        await self.change(Change("remove", id), timeout_s)

    async def change(self, change: Change, timeout_s: float = 10.0) -> None:
        """Change the membership, wherever the leader is.

        Raises:
            ServiceError: it cannot be; says why.
        """
        if self.forming is None:
            raise Conflict("this member is alone", hint="start it with raft_address, initial_members and tls_*")
        await self.forming.change(change, timeout_s)

    async def hand_over(self, timeout_s: float = 2.0) -> None:
        """Have another member lead, if there is one that can: for an orderly stop."""
        if not self.core.is_leader or not self.core.membership:
            return
        self.core.is_handing_over = True
        try:
            await self._hand_over(timeout_s)
        finally:
            self.core.is_handing_over = False
            self.wake()

    async def _hand_over(self, timeout_s: float) -> None:
        assert self.core.membership is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.core.is_leader and len(self.core.membership.voters()) > 1 and not self._failure:
                    if chosen := self.core.hand_over_to():
                        log.info("handing over to %s", chosen)
                    await asyncio.sleep(0.1)
                while not self.core.leader_id and not self._failure:
                    await asyncio.sleep(0.01)

    # Life

    async def run(self) -> None:
        """Keep the member alive until cancelled.

        Raises:
            OSError: the disk refuses; all waiting proposals are told that their outcome is unknown.
            Contradiction: some member's disk has forgotten what it promised; this one stops rather than guess.
            Conflict: its data are of another cluster than the other members.
        """
        try:
            async with asyncio.TaskGroup() as self._tasks:
                if self._peers is not None and self.forming is not None:
                    self._want_peers()
                    self._tasks.create_task(self._peers.run())
                    self._tasks.create_task(self.forming.run())
                while True:
                    await self._turn(self._tasks)
        except* OSError as group:
            error = group.exceptions[0]
            self._failure = f"the disk failed: {error}"
            log.critical("the log cannot be written, this member stops: %s", error)
            raise error from None
        except* (Contradiction, Conflict) as group:
            self._failure = str(group.exceptions[0])
            log.critical(
                "this member stops: %s (`python -m discovery.rebuild` makes it anew from its peers)", self._failure
            )
            raise group.exceptions[0] from None
        finally:
            self._stopped()

    def _stopped(self) -> None:
        self._failure = self._failure or "this member has stopped"
        self._ready.clear()
        self.snapshots.send_only_to(set())
        for proposal in list(self._waiting.values()):
            if not proposal.future.done():
                proposal.future.set_exception(DeadlineExceeded(self._failure, hint="the change may be done"))
        for _, future in self._applied_waiters:
            if not future.done():
                future.set_exception(Unavailable(self._failure))
        self._reads.fail(Unavailable(self._failure))

    def save_identity(self) -> None:
        """Store who this member is, and tell the others.

        Raises:
            OSError: the disk refuses.
        """
        membership.save_identity(self._directory, self.identity, self._disk)
        self._want_peers()

    def close(self) -> None:
        """Close the files; call after `run` has ended."""
        self.snapshots.close()
        self.core.destroy()
        os.close(self._lock)

    async def _turn(self, tasks: asyncio.TaskGroup) -> None:
        self._wakeup.clear()
        waiting, self._between_turns = self._between_turns, []
        for act in waiting:
            act()
        inbox, self._inbox = self._inbox, []
        for id, hello, message in inbox:
            self._take(id, hello, message)
        self.core.step()
        self.snapshots.send()
        self._settle()
        was_dirty = self._journal.is_dirty
        if was_dirty:
            if self._peers is not None:
                self._peers.flush()  # the followers sync at the same time
            await self._journal.sync()
        self._send_confirmations()
        if was_dirty and self.core.is_leader and self._is_sole_voter():
            return
        self.snapshots.take_if_due(tasks)
        ending = asyncio.get_running_loop().call_later(self.core.next_s(clock.monotonic_s()), self._wakeup.set)
        try:
            await self._wakeup.wait()
        finally:
            ending.cancel()

    def _is_sole_voter(self) -> bool:
        current = self.core.membership
        return current is None or len(current.voters()) == 1

    def _send_confirmations(self) -> None:
        outbox, self.core.outbox = self.core.outbox, []
        for id, message in outbox:
            self.post(id, message)

    def between_turns(self, act: Callable[[], None]) -> None:
        """Do something with the log when nothing else does."""
        self._between_turns.append(act)
        self._wakeup.set()

    def wake(self) -> None:
        """Have a turn happen soon."""
        self._wakeup.set()

    def _settle(self) -> None:
        """After a step: tell who leads now, carry on what hangs on that, and wake whoever waits for an index."""
        core = self.core
        if core.proposals and not core.is_leader:
            core.proposals.clear()  # `_seen_leader` differs: they are sent to the next leader
        if not self._ready.is_set() and (core.leader_id or self._cluster is None) and core.isReady():
            if self._cluster is None or core.applied >= (core.leader_commit or 0):
                self._ready.set()
                self.on_leader.tell(self.status())
        if (core.term, core.leader_id) != self._seen_leader:
            self._leader_changed()
        if core.membership is not self._seen_membership:
            self._seen_membership = core.membership
            self._want_peers()
        if self._applied_waiters:
            waiters, self._applied_waiters = self._applied_waiters, []
            for index, future in waiters:
                if future.done():
                    continue
                if core.applied >= index:
                    future.set_result(None)
                else:
                    self._applied_waiters.append((index, future))

    def _leader_changed(self) -> None:
        core, before = self.core, self._seen_leader[1]
        self._seen_leader = (core.term, core.leader_id)
        if core.leader_id != before:
            self.leader_changes += 1
            who = "this member" if core.is_leader else core.leader_id
            log.info(
                "%s leads now: term %d, revision %d (%s)" if core.leader_id else "%s leads: term %d, revision %d (%s)",
                who or "nobody", core.term, self.state.revision, core.cause,
            )  # fmt: skip
        for proposal in list(self._waiting.values()):
            if core.leader_id or proposal.term:
                self._submit_again(proposal)
        if core.leader_id:
            self._reads.again()
        self.snapshots.send_only_to(core.needs_snapshot if core.is_leader else set())
        self.on_leader.tell(self.status())

    # Messages

    def own_hello(self) -> Hello:
        """Say who this member is."""
        return Hello(
            VERSION, self.cluster_id, self.identity.incarnation, self._cluster.address if self._cluster else ""
        )

    def peer_connected(self, id: str, hello: Hello) -> None:
        """Take note that messages can be sent."""
        self._hellos[id] = hello
        self._meet(id, hello)
        if id == self.core.leader_id:
            for proposal in list(self._waiting.values()):
                self._submit_again(proposal)
            self._reads.again()
        self.wake()

    def _meet(self, id: str, hello: Hello) -> None:
        if hello.cluster_id == self.cluster_id != 0:
            self.core.connected(id, hello.incarnation)

    def peer_disconnected(self, id: str) -> None:
        """Take note that what was sent may be lost."""
        self._hellos.pop(id, None)
        self.core.disconnected(id)
        self.snapshots.send_only_to(self.core.needs_snapshot - {id})
        self.questions.lost(id)

    def peer_said(self, id: str, hello: Hello, message: Message) -> None:
        """Take a message, for the next turn."""
        self._inbox.append((id, hello, message))
        self._wakeup.set()

    def post(self, id: str, message: Message) -> bool:
        """Send a message; tell whether it could be sent."""
        return self._peers is not None and self._peers.send(id, message)

    def _want_peers(self) -> None:
        if self._peers is None or self._cluster is None:
            return
        current = self.core.membership
        wanted = {peer.id: peer.address for peer in current.peers} if current else dict(self._cluster.initial)
        wanted.pop(self.member_id, None)
        self._peers.want(wanted)
        self._peers.greet_again()
        for id, hello in self._hellos.items():
            self._meet(id, hello)

    def _take(self, id: str, hello: Hello, message: Message) -> None:
        match message:
            case Ask():
                self._take_question(id, message)
            case Reply():
                self.questions.replied(message)
            case _ if hello.cluster_id != self.cluster_id or not self.cluster_id:
                log.debug("%s is of another cluster: ignored", id)
            case Chunk():
                self.snapshots.take_chunk(id, message, self._tasks)
            case ChunkReply():
                if self.core.is_counted(id, hello.incarnation):
                    self.snapshots.confirmed(id, message)
            case _:
                self.core.receive(id, hello.incarnation, message)  # type: ignore[arg-type]

    async def ask_leader(self, question: KeepAlive | TimeToLive, timeout_s: float = 5.0) -> list[int]:
        """Ask whoever leads about leases.

        Raises:
            Unavailable: nobody answered.
        """
        self.check_ready()
        leader = self.core.leader_id
        answer = await self.questions.ask_for(leader, question, timeout_s) if leader else None
        if not isinstance(answer, Numbers):
            reason = answer.message if isinstance(answer, Refusal) else "no answer"
            raise Unavailable(f"the leader could not be asked: {reason}", hint="try again in a moment")
        return answer.values

    def _take_question(self, id: str, ask: Ask) -> None:
        def reply(answer: Answer) -> None:
            self.post(id, Reply(ask.id, answer))

        question = ask.question
        match question:
            case Propose():
                self._take_proposal(question, reply)
            case ReadIndex():
                self.core.ask_read_index(
                    lambda index: reply(_not_leader(self.core.leader_id) if index is None else Done(index))
                )
            case KeepAlive() | TimeToLive():
                if self._tasks is not None:
                    self._tasks.create_task(self._answer_about_leases(question, reply))
            case Probe():
                current = self.core.membership
                has_data = self.core.last_index > 1
                cluster_id, own = current.cluster_id if current else 0, self.identity
                reply(Nature(cluster_id, own.incarnation, has_data, own.lost_cluster_id))
            case Join() | Change():
                if self._tasks is not None and self.forming is not None:
                    self._tasks.create_task(self.forming.answer(id, question, reply))

    async def _answer_about_leases(self, question: KeepAlive | TimeToLive, reply: Callable[[Answer], None]) -> None:
        answer = self._answerers.get(type(question))
        try:
            if answer is None or not self.is_leader:
                raise NotLeader(f"{self.core.leader_id or 'nobody'} leads")
            reply(Numbers(await answer(question.ids)))
        except ServiceError as error:
            reply(Refusal(error.code, error.message))

    def _take_proposal(self, question: Propose, reply: Callable[[Answer], None]) -> None:
        """Take another member's proposal; only a refusal is answered, for it sees by itself when it is applied."""
        try:
            if not self.core.is_leader:
                reply(_not_leader(self.core.leader_id))
                return
            self._check_space()
            if question.command[:1] != _REGULAR or len(question.command) > COMMAND_BYTES_MAX:
                raise Unavailable("this is no command")
            codec.decode_command(question.command[1:])
        except (ServiceError, codec.Unreadable) as error:
            reply(Refusal("unavailable", str(error)))
            return
        self.core.proposals.append(question.command)
        self.core.is_hurried = True

    def requests_done(self) -> list[tuple[int, int]]:
        """Return the requests applied lately, for a snapshot."""
        return self._requests.image()

    def replace_state(self, state: State, done: list[tuple[int, int]]) -> None:
        """Take a snapshot's state for this member's own; tell who missed the changes in between."""
        before = self.state.revision
        self.state.become(state)
        self._requests = Requests(done)
        for request, proposal in list(self._waiting.items()):
            if self._requests.is_done(request):
                _answer(proposal, _answer_lost())
        self.on_reset.tell(before)

    # Applying

    def _apply(self, payload: bytes, index: int) -> None:
        """Apply one committed command; what the state makes of it is an answer, never an exception.

        Raises:
            Unreadable: a newer version wrote it; the member stops rather than go on without it.
        """
        command = codec.decode_command(payload)
        proposal = self._waiting.get(command.id)
        if self._requests.is_done(command.id):
            _answer(proposal, _answer_lost())
            return
        if self._requests.is_void(command.after, index):
            _answer(proposal, Unavailable("the change came too late to be applied", hint="nothing was changed"))
            return
        self._requests.add(command.id, index)
        try:
            outcome: Outcome | Exception = self.state.apply(command.body)
        except Refused as refused:
            outcome = refused
        except Exception:
            log.exception("a committed command could not be applied: %r", payload[:200])
            outcome = Internal("the store could not apply this", hint="the discovery daemon's log has the cause")
        if isinstance(outcome, Outcome) and outcome.events:
            self.on_applied.tell(outcome.events)
        if isinstance(command.body, LeaseGrant) and isinstance(outcome, Outcome):
            self.on_grant.tell(command.body)
        _answer(proposal, outcome)

    # Disk

    def has_space(self) -> bool:
        """Tell whether the disk has room for more writes."""
        try:
            self._check_space()
        except Unavailable:
            return False
        return True

    def _check_space(self) -> None:
        now = clock.monotonic_s()
        if now >= self._disk_checked_s + 1.0:
            self._disk_checked_s = now
            self._has_space = self._disk.free_bytes(self._directory) > DISK_RESERVE_BYTES
            self.core.is_reluctant = not self._has_space
            if self._has_space:
                self._journal.keep_reserve()
        if not self._has_space:
            raise Unavailable(f"the disk of {self._directory} is full", hint="free some space; reads still work")


def _end_late(proposal: _Proposal) -> None:
    if not proposal.future.done():
        proposal.future.set_exception(TimeoutError())


def _answer_lost() -> DeadlineExceeded:
    return DeadlineExceeded("the change is done, but its answer was overtaken by a snapshot", hint="read what is there")


def _not_leader(leader: str) -> Refusal:
    return Refusal("not_leader", f"{leader or 'nobody'} leads")


def _answer(proposal: _Proposal | None, outcome: Outcome | Exception) -> None:
    if proposal is None or proposal.future.done():
        return
    if isinstance(outcome, Outcome):
        proposal.future.set_result(outcome)
    else:
        proposal.future.set_exception(outcome)


def lock_folder(directory: Path) -> int:
    """Keep other daemons out of a folder for as long as the returned file is open.

    Raises:
        Conflict: one is in it.
    """
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise Conflict(f"{directory} is in use by another discovery daemon") from error
    return fd
