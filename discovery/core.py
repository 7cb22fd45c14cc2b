"""pysyncobj with its unsafe parts replaced: who leads, what is committed, who confirmed what.

The library keeps what it is sound at: the state of a member, becoming a candidate and a leader, the
leader's count of confirmations, its look for a majority, and applying in order. Everything that
comes from or goes to another member is ours, since nearly each branch there has a measured defect;
every override says which. No I/O but the journal's: messages go to `post` (at once) or `outbox`
(once what they promise is on disk), and `raft.Member` is the only caller, from one task.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from discovery import membership, peerwire
from discovery.journal import Journal
from discovery.library import Node, SyncObj, SyncObjConf, Transport
from discovery.membership import Membership, Timing
from discovery.peerwire import (
    Append,
    AppendReply,
    Chunk,
    ChunkReply,
    Raft,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)
from discovery.wire import clock

log = logging.getLogger(__name__)

REGULAR, NO_OP, MEMBERSHIP = 0, 1, 2
_FOLLOWER, _CANDIDATE, _LEADER = 0, 1, 2
_AHEAD_BYTES_MAX = 4 * 1024 * 1024
"""How much may be under way to a follower unconfirmed."""
_COMMIT_DELAY_S = 0.002
"""How long news of a commit may wait for an entry to travel with."""
_APPLY_S, _APPLY_ENTRIES = 0.02, 16
"""How long one turn applies, and how many entries it applies between two looks at the clock."""
ReadAt = Callable[[int | None], None]


class Contradiction(Exception):
    """A leader wants something gone that was committed: some disk has forgotten what it promised."""


class _Peer(Node):  # type: ignore[misc]  # untyped library
    """The one object for a life of another member: equal to itself only, which is quicker than by name."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__
    __ne__ = object.__ne__


class _Letterbox(Transport):  # type: ignore[misc]  # untyped library
    """The library's way out: of all that it would send, only the call for votes is left."""

    ready = True

    def __init__(self, post: Callable[[str, Raft], object]) -> None:
        super().__init__(None, None, [])
        self._post = post

    def tryGetReady(self) -> None: ...

    def waitReady(self) -> None: ...

    def destroy(self) -> None: ...

    def send(self, node: Node, message: dict[str, Any]) -> bool:
        assert message["type"] == "request_vote", message["type"]
        self._post(node.id, VoteRequest(message["term"], message["last_log_index"], message["last_log_term"]))
        return True

    def addNode(self, node: Node) -> None:
        raise AssertionError("pysyncobj wants to change the membership")

    dropNode = addNode


class Core(SyncObj):  # type: ignore[misc]  # untyped library
    """One member's part in the consensus."""

    _SyncObj__raftElectionDeadline: float
    _SyncObj__raftLeader: Node | None
    _SyncObj__connectedNodes: set[Node]

    def __init__(
        self,
        member_id: str,
        journal: Journal,
        apply: Callable[[bytes, int], object],
        post: Callable[[str, Raft], object],
        timing: Timing,
        *,
        applied_index: int = 0,
        base: Membership | None = None,
        incarnation: int = 0,
    ) -> None:
        self.member_id = member_id
        self.incarnation = incarnation
        self.journal = journal
        self.outbox: list[tuple[str, Raft]] = []
        self.proposals: list[bytes] = []
        self.cause = "start"
        self.needs_snapshot: set[str] = set()
        self._apply_payload = apply
        self._post = post
        self._timing = timing
        self._may_stand = False
        self._is_voter = True
        self._is_sole_voter = True
        self._votes: set[str] = set()
        self._trial_votes: set[str] = set()
        self._trial_term = 0
        self._heard_s = 0.0
        self._lives: dict[str, int] = {}
        self._by_id: dict[str, Node] = {}
        self._under_way: dict[Node, deque[tuple[int, int]]] = {}
        self._probing: set[Node] = set()
        self._told_commit: dict[Node, int] = {}
        self._commit_due_s = 0.0
        self._round = 0
        self._round_index: int | None = None
        self._round_acks: set[Node] = set()
        self._round_reads: list[ReadAt] = []
        self._reads: list[ReadAt] = []
        self._is_round_new = False
        self.is_hurried = False
        self.is_handing_over = False
        self.is_reluctant = False
        self._memberships: list[tuple[int, Membership]] = []
        configuration = SyncObjConf(
            autoTick=False,
            journalFile=journal,
            # entries are sent once a turn by `step`; the library's other mode is a message for every command
            appendEntriesUseBatch=True,
            dynamicMembershipChange=False,
            appendEntriesPeriod=timing.heartbeat_s,
            raftMinTimeout=timing.election_s,
            raftMaxTimeout=2 * timing.election_s,
            connectionTimeout=10 * timing.election_s,
            leaderFallbackTimeout=timing.election_s,
            onStateChanged=self._state_changed,
        )
        super().__init__(Node(member_id), [], configuration, transport=_Letterbox(post))
        # The journal begins at our snapshot, which is applied already; the library assumes 1.
        self._SyncObj__raftLastApplied = max(applied_index, 1)
        if base is not None:
            self._memberships.append((0, base))
        for command, index, _ in journal[:]:
            if command[0] == MEMBERSHIP and index > applied_index:
                self._memberships.append((index, membership.decode(command[1:])))
        self._adopt()

    # What is

    @property
    def is_leader(self) -> bool:
        return bool(self._SyncObj__raftState == _LEADER)

    @property
    def leader_id(self) -> str:
        """Return who leads, as far as is known; empty: nobody."""
        leader = self._SyncObj__raftLeader
        return "" if leader is None else str(leader.id)

    @property
    def term(self) -> int:
        return int(self._SyncObj__raftCurrentTerm)

    @property
    def commit(self) -> int:
        return int(self._SyncObj__raftCommitIndex)

    @property
    def applied(self) -> int:
        return int(self._SyncObj__raftLastApplied)

    @property
    def last_index(self) -> int:
        return self.journal[-1][1]

    @property
    def leader_commit(self) -> int | None:
        """Return up to where the leader said that the log is committed; `None`: it has not yet."""
        return None if self._SyncObj__leaderCommitIndex is None else int(self._SyncObj__leaderCommitIndex)

    @property
    def membership(self) -> Membership | None:
        """Return the newest membership in the log; `None`: this member is alone, or has not been let in yet."""
        return self._memberships[-1][1] if self._memberships else None

    @property
    def is_membership_settled(self) -> bool:
        """Tell whether the next change may begin: the last one, and an entry of this term, are committed."""
        return self.is_leader and self.commit >= max(self._memberships[-1][0], self._SyncObj__noopIDx)

    def membership_at(self, index: int) -> Membership | None:
        """Return the membership as of a log index."""
        return next((found for at, found in reversed(self._memberships) if at <= index), None)

    @property
    def is_voter(self) -> bool:
        return self._is_voter

    def term_at(self, index: int) -> int:
        """Return the term of an entry that the log still has."""
        return self.journal[index - self.journal[0][1]][2]

    def next_s(self, now: float) -> float:
        """Return how long nothing has to be done unless something comes, in seconds."""
        if self.applied < self.commit:
            return 0.0
        if self.is_leader:
            if self._is_sole_voter and not self._by_id:
                return 1.0
            until = float(self._SyncObj__newAppendEntriesTime)
            if self._commit_due_s:
                until = min(until, self._commit_due_s)
            return max(0.0, until - now)
        return min(1.0, max(0.0, float(self._SyncObj__raftElectionDeadline) - now)) if self._is_voter else 1.0

    def match_of(self, id: str) -> int:
        """Return up to where a member has confirmed the log to this leader."""
        return int(self._SyncObj__raftMatchIndex.get(self._by_id.get(id), 0))

    def is_heard(self, id: str) -> bool:
        """Tell whether a member answered within the last election timeout."""
        heard = self._SyncObj__lastResponseTime.get(self._by_id.get(id), 0.0)
        return bool(heard > clock.monotonic_s() - self._timing.election_s)

    # Turns

    def step(self) -> None:
        """Do what is due: stand for election, commit, apply, append what was proposed, send what is new."""
        commit = self.commit
        self._gate_election()
        self.doTick(0.0)
        if not self.is_leader:
            return
        if self.commit > commit and self._by_id:
            self._commit_due_s = self._commit_due_s or clock.monotonic_s() + _COMMIT_DELAY_S
        self._go_on_reading()
        is_round_new, self._is_round_new = self._is_round_new, False
        is_due = bool(self._commit_due_s) and (self.is_hurried or clock.monotonic_s() >= self._commit_due_s)
        for node in self._fed():
            self._feed(node, must=is_round_new or (is_due and self._told_commit[node] < self.commit))
        if is_due:
            self._commit_due_s, self.is_hurried = 0.0, False

    def _gate_election(self) -> None:
        """Let the library's tick begin an election only after a trial was won.

        As shipped a member whose leader is silent raises its term at once, and deposes a healthy leader when it
        comes back from behind a broken cable.
        """
        now = clock.monotonic_s()
        if self.is_leader or self._SyncObj__raftElectionDeadline >= now:
            return
        if self._is_sole_voter:
            self.cause = "the only member with a vote"
        if self._is_sole_voter or (self._may_stand and self._is_voter):
            self._may_stand = False
            self._votes = set()
            return
        self._SyncObj__raftElectionDeadline = now + self._SyncObj__generateRaftTimeout()
        if not self._is_voter:
            return
        if self._SyncObj__raftLeader is not None:
            log.info("no word from the leader %s for %.2f s", self.leader_id, now - self._heard_s)
            self._SyncObj__raftLeader = None
        self.cause = f"the leader was silent for {now - self._heard_s:.2f} s" if self._heard_s else "the first election"
        self._trial_term, self._trial_votes = self.term + 1, set()
        for node in self._SyncObj__otherNodes:
            self._post(node.id, VoteRequest(self._trial_term, self.last_index, self.term_at(self.last_index), True))

    def _stand(self) -> None:
        """Be a candidate in the library's next tick."""
        self._may_stand = True
        self._SyncObj__raftElectionDeadline = 0.0

    # Where pysyncobj is not sound

    def _SyncObj__generateRaftTimeout(self) -> float:
        """Elect the only voter at once: there is nobody to wait for."""
        if self._is_voter and self._is_sole_voter:
            return -1.0
        timeout_s = float(super()._SyncObj__generateRaftTimeout())
        return timeout_s + 2 * self._timing.election_s if self.is_reluctant else timeout_s

    def _SyncObj__connectedToAnyone(self) -> bool:
        """Stand whenever a trial was won; connections come and go."""
        return True

    def _SyncObj__onBecomeLeader(self) -> None:
        """Sync at once (the library commits its first entry within the very tick that wrote it), and begin anew."""
        for node in self._fed():
            self._under_way[node] = deque()
            self._told_commit[node] = 0
        self._probing = set(self._fed())
        self.needs_snapshot.clear()
        super()._SyncObj__onBecomeLeader()
        self.journal.sync_now()

    def _SyncObj__applyLogEntries(self) -> bool:
        """Apply for a moment, and go on in the next turn.

        The library goes to the end at once: a member with a long log to replay is silent meanwhile, and is deposed.
        """
        commit, until_s = self.commit, clock.monotonic_s() + _APPLY_S
        has_applied = False
        try:
            while self.applied < commit and (not has_applied or clock.monotonic_s() < until_s):
                self._SyncObj__raftCommitIndex = min(commit, self.applied + _APPLY_ENTRIES)
                super()._SyncObj__applyLogEntries()
                has_applied = True
        finally:
            self._SyncObj__raftCommitIndex = commit
        return has_applied and not self._SyncObj__conf.appendEntriesUseBatch

    def _SyncObj__doApplyCommand(self, command: bytes) -> object:
        """Apply our own encoding; the library's unpickles, and a command that raises hangs it for ever."""
        if command[0] == REGULAR:
            self._apply_payload(command[1:], self.applied + 1)
        elif command[0] not in (NO_OP, MEMBERSHIP):
            log.error("log entry of kind %d ignored", command[0])
        return None

    def _SyncObj__parseChangeClusterRequest(self, command: bytes) -> None:
        """Find no membership change: the library's are pickled, and two at once are not prevented."""

    def _SyncObj__tryLogCompaction(self) -> None:
        """Do nothing: the library's throws away whatever is newer than the dump; `Member` compacts."""

    def _checkCommandsToApply(self) -> None:
        """Append everything proposed since the last turn as one group; the library sends a message for each command."""
        if not self.is_leader or self.is_handing_over:
            return
        proposals, self.proposals = self.proposals, []
        index, term = self.last_index, self.term
        for command in proposals:
            index += 1
            self.journal.add(command, index, term)
            if command[0] == MEMBERSHIP:
                self._memberships.append((index, membership.decode(command[1:])))
                self._adopt()

    def _SyncObj__sendAppendEntries(self) -> None:
        """Send a heartbeat, and entries with it; the library's pickles, and has no bound on what is under way."""
        self._SyncObj__newAppendEntriesTime = clock.monotonic_s() + self._timing.heartbeat_s
        for node in self._fed():
            self._feed(node, must=True)

    def _SyncObj__onMessageReceived(self, node: Node, message: object) -> None:
        raise AssertionError("messages come through `receive`")

    # Membership

    def found(self, first: Membership) -> None:
        """Begin a cluster with what this member has; the list is in its log, on disk, when this returns."""
        self._SyncObj__setCurrentTerm(self.term + 1, self.member_id)
        index = self.last_index + 1
        self.journal.add(bytes((MEMBERSHIP,)) + membership.encode(first), index, self.term)
        self.journal.sync_now()
        self._memberships.append((index, first))
        self._adopt()

    def propose_membership(self, wanted: Membership) -> int:
        """Put the next membership into the log with the next turn; return its index."""
        assert self.is_membership_settled, "one change at a time"
        assert not any(command[0] == MEMBERSHIP for command in self.proposals), "one change at a time"
        self.proposals.append(bytes((MEMBERSHIP,)) + membership.encode(wanted))
        return self.last_index + len(self.proposals)

    def _adopt(self) -> None:
        """Let the newest membership in the log count."""
        current = self.membership
        peers = current.peers if current else ()
        me = current.find(self.member_id) if current else None
        is_cluster = current is not None or self.incarnation != 0
        self._is_voter = (me is not None and me.is_voter and me.incarnation == self.incarnation) or not is_cluster
        known = {peer.id: peer for peer in peers if peer.id != self.member_id and peer.incarnation}
        for id in [
            id for id, node in self._by_id.items() if id not in known or known[id].incarnation != node.incarnation
        ]:
            self._forget(self._by_id.pop(id))
        self._by_id = {id: self._by_id.get(id) or _Peer(id, incarnation=peer.incarnation) for id, peer in known.items()}
        self._SyncObj__otherNodes = {self._by_id[id] for id, peer in known.items() if peer.is_voter}
        self._SyncObj__readonlyNodes = {self._by_id[id] for id, peer in known.items() if not peer.is_voter}
        self._is_sole_voter = self._is_voter and not self._SyncObj__otherNodes
        if self._is_sole_voter and not self.is_leader:
            self._SyncObj__raftElectionDeadline = 0.0  # there is nobody to wait for
        for node in self._by_id.values():
            self._SyncObj__raftNextIndex.setdefault(node, self.last_index + 1)
            self._SyncObj__raftMatchIndex.setdefault(node, 0)
            self._SyncObj__lastResponseTime.setdefault(node, clock.monotonic_s())
            self._under_way.setdefault(node, deque())
            self._told_commit.setdefault(node, 0)
        self._connect()

    def _forget(self, node: Node) -> None:
        """Forget what a member confirmed: it is gone, or is another life of it now."""
        for table in (
            self._SyncObj__raftNextIndex,
            self._SyncObj__raftMatchIndex,
            self._SyncObj__lastResponseTime,
            self._under_way,
            self._told_commit,
        ):
            table.pop(node, None)
        self._probing.discard(node)
        self._votes.discard(node.id)
        self._trial_votes.discard(node.id)
        self._round_acks.discard(node)
        self.needs_snapshot.discard(node.id)
        self._SyncObj__connectedNodes.discard(node)

    def connected(self, id: str, incarnation: int) -> None:
        """Note that messages to a member can be sent, and which life of it is there."""
        self._lives[id] = incarnation
        self._connect()

    def disconnected(self, id: str) -> None:
        """Note that what was sent to a member and not confirmed may be lost."""
        self._lives.pop(id, None)
        self._connect()

    def _connect(self) -> None:
        current = self.membership
        before = set(self._SyncObj__connectedNodes)
        self._SyncObj__connectedNodes = {
            node
            for node in self._by_id.values()
            if current and (peer := current.find(node.id)) and peer.incarnation == self._lives.get(node.id)
        }
        for node in self._SyncObj__connectedNodes - before:
            self._begin_again(node)

    def _begin_again(self, node: Node) -> None:
        """Ask a follower where it is before anything else is sent."""
        self._SyncObj__raftNextIndex[node] = max(self._SyncObj__raftMatchIndex.get(node, 0), self.last_index) + 1
        self._under_way[node] = deque()
        self._told_commit[node] = 0
        self._probing.add(node)
        self.needs_snapshot.discard(node.id)

    def _fed(self) -> set[Node]:
        """Return the members that entries go to: `_connect` sees to it that all connected ones are known ones."""
        return self._SyncObj__connectedNodes

    # Sending

    def _feed(self, node: Node, *, must: bool) -> None:
        """Send a follower what it has not got, as far as it is known to keep up; something at all if it `must` be."""
        if node.id in self.needs_snapshot:
            if must:
                self._post(node.id, Append(self.term, 0, 0, 0, []))
            return
        head, last = self.journal[0][1], self.last_index
        following: int = self._SyncObj__raftNextIndex[node]
        if following <= head:
            self.needs_snapshot.add(node.id)
            self._under_way[node].clear()
            self._feed(node, must=True)
            return
        under_way = self._under_way[node]
        if node not in self._probing:
            while following <= last and sum(size for _, size in under_way) < _AHEAD_BYTES_MAX:
                entries, size = self._entries_from(following)
                self._send_entries(node, following, entries)
                following += len(entries)
                under_way.append((following - 1, size))
                must = False
            self._SyncObj__raftNextIndex[node] = following
        if must:
            self._send_entries(node, following, [])

    def _entries_from(self, first: int) -> tuple[list[tuple[int, bytes]], int]:
        at = first - self.journal[0][1]
        entries: list[tuple[int, bytes]] = []
        size = 0
        for command, _, term in self.journal[at : at + 2000]:
            if entries and size + len(command) > peerwire.APPEND_BYTES_MAX:
                break
            entries.append((term, command))
            size += len(command) + 16
        return entries, size

    def _send_entries(self, node: Node, first: int, entries: list[tuple[int, bytes]]) -> None:
        self._told_commit[node] = self.commit
        message = Append(self.term, first - 1, self.term_at(first - 1), self.commit, entries, self._round)
        self._post(node.id, message)

    # Receiving

    def receive(self, id: str, incarnation: int, message: Raft) -> None:
        """Take a message from a member of this cluster.

        Raises:
            Contradiction: this member must not go on.
            OSError: the disk refuses.
        """
        match message:
            case Append():
                self._on_append(id, message)
            case AppendReply():
                if node := self._counted(id, incarnation):
                    self._on_append_reply(node, message)
            case VoteRequest():
                self._on_vote_request(id, incarnation, message)
            case VoteReply():
                if node := self._counted(id, incarnation):
                    self._on_vote_reply(node, message)
            case TimeoutNow():
                if message.term == self.term and self.leader_id == id and self._is_voter:
                    self.cause = f"{id} handed over"
                    self._SyncObj__transferInProgress = True
                    self._stand()
            case Chunk() | ChunkReply():
                raise AssertionError("snapshots are Member's")

    def _counted(self, id: str, incarnation: int) -> Node | None:
        """Return the node of a sender, if it is the life of it that the membership knows."""
        current = self.membership
        peer = current.find(id) if current else None
        return self._by_id.get(id) if peer is not None and peer.incarnation == incarnation else None

    def is_counted(self, id: str, incarnation: int) -> bool:
        """Tell whether what a sender confirms counts: it is the life of a member that the membership knows."""
        return self._counted(id, incarnation) is not None

    def see_term(self, term: int, sender: str) -> None:
        """Follow a later term; what this one led or stood for is over."""
        if term > self.term:
            self.cause = f"{sender} is in a later term"
            self._SyncObj__setCurrentTerm(term, None)
            self._SyncObj__setState(_FOLLOWER)
            self._SyncObj__raftLeader = None

    def _on_vote_request(self, id: str, incarnation: int, message: VoteRequest) -> None:
        """Vote once a term, and say so again to the same one; the library is silent then: lost answer, lost vote."""
        known = self.membership.find(id) if self.membership else None
        if known is not None and known.incarnation != incarnation:
            return
        own = (self.term_at(self.last_index), self.last_index)
        is_current = (message.last_term, message.last_index) >= own
        if message.is_trial:
            is_silent = clock.monotonic_s() - self._heard_s >= self._timing.election_s and not self.is_leader
            is_granted = message.term > self.term and is_current and is_silent
            self._post(id, VoteReply(message.term if is_granted else self.term, is_granted, True))
            return
        self.see_term(message.term, id)
        voted = self._SyncObj__votedForNodeId
        is_granted = message.term == self.term and not self.is_leader and is_current and voted in (None, id)
        if is_granted:
            if voted is None:
                self._SyncObj__setCurrentTerm(self.term, id)
            self._SyncObj__raftElectionDeadline = clock.monotonic_s() + self._SyncObj__generateRaftTimeout()
        self._post(id, VoteReply(self.term, is_granted))

    def _on_vote_reply(self, node: Node, message: VoteReply) -> None:
        """Count each voter once; the library counts replies."""
        if not message.is_granted:
            self.see_term(message.term, node.id)
            return
        if node not in self._SyncObj__otherNodes:
            return
        majority = (len(self._SyncObj__otherNodes) + 1) // 2 + 1
        if message.is_trial:
            if message.term == self._trial_term == self.term + 1 and not self.is_leader:
                self._trial_votes.add(node.id)
                if len(self._trial_votes) + 1 >= majority:
                    self._trial_term = 0
                    self._stand()
        elif self._SyncObj__raftState == _CANDIDATE and message.term == self.term:
            self._votes.add(node.id)
            if len(self._votes) + 1 >= majority:
                self._SyncObj__onBecomeLeader()

    def _on_append(self, id: str, message: Append) -> None:
        """Take entries; cut the log only where it contradicts the leader's, and nothing that is committed.

        The library cuts after `prev_index` even where the entries agree, also what is applied; lets the commit index
        go back, and forward beyond what this message vouches for; answers without a term, before anything is stored.
        """
        if message.term < self.term:
            self.outbox.append((id, AppendReply(self.term, False, 0, message.round)))
            return
        self._follow(id, message)
        matched = self._match(message)
        if matched < 0:
            self.outbox.append((id, AppendReply(self.term, False, -matched, message.round)))
            return
        commit = min(message.commit, matched)
        if commit > self.commit:
            self._SyncObj__raftCommitIndex = commit
            self.journal.setRaftCommitIndex(commit)
        self.outbox.append((id, AppendReply(self.term, True, matched, message.round)))

    def _follow(self, id: str, message: Append) -> None:
        now = clock.monotonic_s()
        self._heard_s = now
        if self.is_leader and message.term == self.term:
            raise Contradiction(f"two leaders in term {self.term}: {self.member_id} and {id}")
        if message.term > self.term:
            self.cause = f"{id} was elected"
            self._SyncObj__transferInProgress = False
            self._SyncObj__setCurrentTerm(message.term, None)
        if not self._SyncObj__transferInProgress:
            # while a transfer is under way the outgoing leader must not put off the election
            self._SyncObj__raftElectionDeadline = now + self._SyncObj__generateRaftTimeout()
            self._may_stand = False
        self._SyncObj__setState(_FOLLOWER)
        if self.leader_id != id:
            self._SyncObj__raftLeader = self._by_id.get(id) or Node(id)
        if message.prev_index:
            self._SyncObj__leaderCommitIndex = message.commit

    def _match(self, message: Append) -> int:
        """Bring the log in line; return up to where it is, or minus the index from which to try again."""
        head, last, previous = self.journal[0][1], self.last_index, message.prev_index
        entries = message.entries
        if previous > last:
            return -(last + 1)
        if previous < head:
            # what the snapshot holds is committed, so it agrees
            entries = entries[head - previous :]
            if previous + len(message.entries) <= head:
                return min(previous + len(message.entries), head)
            previous = head
        elif self.term_at(previous) != message.prev_term:
            first, conflicting = previous, self.term_at(previous)
            while first > head + 1 and self.term_at(first - 1) == conflicting:
                first -= 1
            return -max(first, self.commit + 1)
        index = previous
        for index, (term, command) in enumerate(entries, previous + 1):
            if index <= last:
                if self.term_at(index) == term:
                    continue
                self._cut(index)
                last = index - 1
            self.journal.add(command, index, term)
            if command[0] == MEMBERSHIP:
                self._memberships.append((index, membership.decode(command[1:])))
                self._adopt()
        return index

    def _cut(self, index: int) -> None:
        if index <= max(self.commit, self.applied):
            raise Contradiction(f"entry {index} is committed here, and {self.leader_id} has another one")
        log.info("entries from %d on were never committed: replaced by the leader's", index)
        self._SyncObj__deleteEntriesFrom(index)
        if self._memberships and self._memberships[-1][0] >= index:
            self._memberships = [(at, found) for at, found in self._memberships if at < index]
            self._adopt()

    def _on_append_reply(self, node: Node, message: AppendReply) -> None:
        """Count confirmations of this term; the library's have none, and a late one may confirm what is not there."""
        self.see_term(message.term, node.id)
        if not self.is_leader or message.term < self.term:
            return
        self._SyncObj__lastResponseTime[node] = clock.monotonic_s()
        if self._round_index is not None and message.round == self._round:
            self._round_acks.add(node)
        matches, following = self._SyncObj__raftMatchIndex, self._SyncObj__raftNextIndex
        if message.is_ok:
            if node.id in self.needs_snapshot:
                return
            self._probing.discard(node)
            matches[node] = max(matches[node], message.index)
            following[node] = max(following[node], message.index + 1)
            under_way = self._under_way[node]
            while under_way and under_way[0][0] <= message.index:
                under_way.popleft()
            return
        if message.index <= matches[node]:
            log.error("%s denies entry %d, which it had confirmed: its disk has forgotten", node.id, message.index)
            # what is committed stays so; without this it would be told of its last entry for ever
            matches[node] = max(0, message.index - 1)
        following[node] = max(matches[node] + 1, min(message.index, self.last_index + 1))
        self._under_way[node].clear()
        self._probing.add(node)
        self._feed(node, must=True)

    # Snapshots: Member carries them

    def installed(self, index: int, base: Membership | None) -> None:
        """Go on after a snapshot that took the place of the log (see `Journal.restart`)."""
        self._SyncObj__raftLastApplied = self._SyncObj__raftCommitIndex = index
        self._memberships = [(0, base)] if base is not None else []
        self._adopt()

    def snapshot_confirmed(self, id: str, index: int) -> None:
        """Note that a follower has the snapshot at `index`, and feed it what comes after."""
        self.needs_snapshot.discard(id)
        node = self._by_id.get(id)
        if node is None or not self.is_leader:
            return
        self._SyncObj__raftMatchIndex[node] = max(self._SyncObj__raftMatchIndex[node], index)
        self._SyncObj__raftNextIndex[node] = index + 1
        self._SyncObj__lastResponseTime[node] = clock.monotonic_s()
        self._probing.discard(node)
        self._feed(node, must=True)

    def heard_from(self, id: str) -> None:
        """Note a sign of life that is no confirmation."""
        node = self._by_id.get(id)
        if node is not None:
            self._SyncObj__lastResponseTime[node] = clock.monotonic_s()

    # Reads

    def ask_read_index(self, tell: ReadAt) -> None:
        """Find the log index that a read which begins now has to have seen; tell `None` if this is not the leader."""
        if not self.is_leader:
            tell(None)
        else:
            self._reads.append(tell)

    def _go_on_reading(self) -> None:
        """Share one round of confirmations among all reads that wait: who leads is asked after they began."""
        if self._round_index is not None:
            voters = self._SyncObj__otherNodes
            if len(self._round_acks & voters) + 1 > (len(voters) + 1) / 2:
                index, reads = self._round_index, self._round_reads
                self._round_index, self._round_reads = None, []
                for tell in reads:
                    tell(index)
        if self._round_index is None and self._reads and self.commit >= self._SyncObj__noopIDx:
            self._round += 1
            self._round_index, self._round_reads, self._reads = self.commit, self._reads, []
            self._round_acks = set()
            self._is_round_new = True
            if self._is_sole_voter:
                self._go_on_reading()

    def _state_changed(self, old: int, new: int) -> None:
        if old != _LEADER:
            return
        if not self._has_majority():
            self.cause = "no majority answers"
        self._SyncObj__raftElectionDeadline = clock.monotonic_s() + self._SyncObj__generateRaftTimeout()
        reads = [*self._round_reads, *self._reads]
        self._round_reads, self._reads, self._round_index = [], [], None
        self.needs_snapshot.clear()
        for tell in reads:
            tell(None)

    def _has_majority(self) -> bool:
        voters = self._SyncObj__otherNodes
        heard = [node for node in voters if self.is_heard(node.id)]
        return len(heard) + 1 > (len(voters) + 1) / 2

    # Transfer

    def hand_over_to(self) -> str:
        """Ask the voter that is furthest to take over, if there is one that has everything; return who ("": none)."""
        ready = [
            node
            for node in self._SyncObj__otherNodes & self._fed()
            if self._SyncObj__raftMatchIndex[node] == self.last_index and self.is_heard(node.id)
        ]
        if not self.is_leader or not ready:
            return ""
        chosen = min(ready, key=lambda node: str(node.id))
        self._post(chosen.id, TimeoutNow(self.term))
        return str(chosen.id)
