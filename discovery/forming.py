"""How members find each other: founding a cluster, being let in, and the leader's changes of the list.

A member whose log names no cluster asks all of `initial`. If one of them is in a cluster it asks to
be let in, under its incarnation; only when every one of them has answered that it is in none does
one found a cluster: the one that has data, else the first by name. The others are let in like
anybody else. So a wiped member can never found a second cluster beside the first, nor vote in it
twice. Where one remembers that it was in a cluster, and has lost the log, none is founded: it waits
for that cluster, and says so. The leader takes care that a learner that has caught up becomes a voter.

`raft.Member` is the caller, and what is called.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from discovery.membership import Cluster, Membership, Peer
from discovery.peerwire import Answer, Change, Done, Join, Nature, Probe, Refusal
from discovery.wire import clock
from discovery.wire.errors import Conflict, DeadlineExceeded, ErrorBody, Invalid, NotLeader, ServiceError, Unavailable

if TYPE_CHECKING:
    from discovery.raft import Member

log = logging.getLogger(__name__)

_PAUSE_S = 0.2
_ANSWER_S = 2.0
_CAUGHT_UP_ENTRIES = 200
_SAY_AFTER_S, _SAY_AGAIN_S = 2.0, 60.0
"""The others are not connected at once; after that it is said, now and again."""


class Forming:
    """One member's part in who is a member."""

    def __init__(self, member: Member, cluster: Cluster) -> None:
        self._member = member
        self._cluster = cluster
        self._changing = asyncio.Lock()
        self._say_at_s = 0.0

    def is_in(self) -> bool:
        """Tell whether this life of this member is one of the cluster's."""
        current = self._member.core.membership
        me = current.find(self._member.member_id) if current else None
        return me is not None and me.incarnation == self._member.identity.incarnation

    def _has_moved(self) -> bool:
        """Tell whether the others look for this member at another address than its own."""
        current = self._member.core.membership
        me = current.find(self._member.member_id) if current else None
        return me is not None and me.address != self._cluster.address

    async def run(self) -> None:
        """Get in, then promote whoever has caught up while this member leads; until cancelled.

        Raises:
            Conflict: this member has data of another cluster.
        """
        while True:
            if self.is_in():
                self._note_where_it_is()
            if not self.is_in():
                await self._try_to_get_in()
            elif self._has_moved():
                await self._tell_address()
            elif not self._member.has_space():
                if self._member.core.is_leader:
                    log.warning("the disk is full: another member had better lead")
                    await self._member.hand_over()
            elif self._member.core.is_leader:
                await self._promote()
            await asyncio.sleep(_PAUSE_S)

    # Getting in

    async def _try_to_get_in(self) -> None:
        member = self._member
        current = member.core.membership
        others = {peer.id for peer in current.peers} if current else set(self._cluster.initial)
        others.discard(member.member_id)
        answers = await asyncio.gather(*(member.questions.ask_for(id, Probe(), _ANSWER_S) for id in others))
        natures = {id: answer for id, answer in zip(others, answers, strict=True) if isinstance(answer, Nature)}
        knowing = {id: nature.cluster_id for id, nature in natures.items() if nature.cluster_id}
        if knowing:
            member.trouble = ""
        for id, cluster_id in knowing.items():
            if await self._join(id, cluster_id):
                break
        losers = [id for id, nature in natures.items() if nature.lost_cluster_id]
        losers += [member.member_id] if member.identity.lost_cluster_id else []
        if losers and not knowing:
            self._say_lost(losers, others - natures.keys())
        elif current is None and len(natures) == len(others) and not knowing:
            self._found_if_first(natures)

    def _note_where_it_is(self) -> None:
        """Remember the cluster beside the log, lest a member that loses the log takes itself for a new one.

        What an earlier life has lost is made good when this one has a vote.
        """
        member, current = self._member, self._member.core.membership
        assert current is not None
        lost = 0 if member.core.is_voter else member.identity.lost_cluster_id
        known = msgspec.structs.replace(member.identity, cluster_id=current.cluster_id, lost_cluster_id=lost)
        member.trouble = ""
        if known != member.identity:
            member.identity = known
            member.save_identity()

    def _say_lost(self, losers: list[str], silent: set[str]) -> None:
        """Say, now and again, that nothing can be founded where something was lost."""
        trouble = f"{' and '.join(sorted(losers))} had a store and lost the log of it, and "
        trouble += f"{' and '.join(sorted(silent))} cannot be asked for it" if silent else "no other member has it"
        now = clock.monotonic_s()
        if trouble != self._member.trouble:
            self._member.trouble = trouble
            self._say_at_s = now + _SAY_AFTER_S
        if now >= self._say_at_s:
            self._say_at_s = now + _SAY_AGAIN_S
            log.error(
                "%s: waiting for one that has it. If there is none any more, `hostd discovery snapshot restore FILE`"
                " goes on from a snapshot, `python -m discovery.rebuild` on every member with nothing",
                trouble,
            )

    def _found_if_first(self, natures: dict[str, Nature]) -> None:
        member = self._member
        with_data = [id for id, nature in natures.items() if nature.has_data]
        if member.core.last_index > 1:
            with_data.append(member.member_id)
        if len(with_data) > 1:
            raise Conflict(f"{' and '.join(sorted(with_data))} both have data, and are in no cluster together")
        if member.member_id != (with_data or [min(self._cluster.initial)])[0]:
            return
        peers = [Peer(id, address) for id, address in sorted(self._cluster.initial.items())]
        own = Peer(member.member_id, self._cluster.address, member.identity.incarnation, True, True)
        first = Membership(secrets.randbits(62) + 1, tuple(peers)).with_peer(own)
        log.info("founding a cluster of %s", ", ".join(peer.id for peer in first.peers))

        def begin() -> None:
            if member.core.membership is None:
                member.identity = msgspec.structs.replace(member.identity, cluster_id=first.cluster_id)
                member.save_identity()  # before the log says it: see `_note_where_it_is`
                member.core.found(first)

        member.between_turns(begin)

    async def _join(self, id: str, cluster_id: int) -> bool:
        """Ask to be let in; tell whether the answer was yes.

        Raises:
            Conflict: this member has data of another cluster.
        """
        member = self._member
        if member.core.membership is None and member.core.last_index > 1 and member.identity.cluster_id != cluster_id:
            raise Conflict(
                f"{id} is in a cluster, and this member has data of its own",
                hint="python -m discovery.rebuild sets them aside",
            )
        if member.identity.cluster_id != cluster_id:
            member.identity = msgspec.structs.replace(member.identity, cluster_id=cluster_id)
            member.save_identity()
        answer = await member.questions.ask_for(
            id, Join(self._cluster.address, member.identity.incarnation), 2 * _ANSWER_S
        )
        if isinstance(answer, Refusal):
            log.info("%s does not let this member in yet: %s", id, answer.message)
        return isinstance(answer, Done)

    async def _tell_address(self) -> None:
        """Have the list say where this member is now; the answer may not come before the others have heard of it."""
        member = self._member
        wish = Join(self._cluster.address, member.identity.incarnation)
        try:
            if member.core.is_leader:
                await self._let_in(member.member_id, wish)
            elif leader := member.core.leader_id:
                await member.questions.ask_for(leader, wish, _ANSWER_S)
            else:
                for id in self._cluster.initial.keys() - {member.member_id}:
                    await member.questions.ask_for(id, wish, _ANSWER_S / 4)
        except ServiceError as error:
            log.info("the others could not be told that this member has moved: %s", error.message)

    # Changing: the leader's part

    async def change(self, change: Change, timeout_s: float) -> None:
        """Change the membership, here or at the leader.

        Raises:
            ServiceError: it cannot be.
        """
        member = self._member
        if change.verb in ("remove", "demote") and change.member_id == member.member_id and member.core.is_leader:
            await member.hand_over()
        if member.core.is_leader:
            await self._carry_out(change, timeout_s)
            return
        end_s = clock.monotonic_s() + timeout_s
        while True:
            leader = member.core.leader_id
            answer = await member.questions.ask_for(leader, change, end_s - clock.monotonic_s()) if leader else None
            if isinstance(answer, Done) or _is_done(change, member.core.membership):
                return
            if isinstance(answer, Refusal) and answer.code != NotLeader.code:
                raise _error(answer)
            if clock.monotonic_s() > end_s:
                raise DeadlineExceeded("no leader confirmed the change", hint="it may be done: look at the members")
            await asyncio.sleep(_PAUSE_S)

    async def answer(self, id: str, question: Join | Change, reply: Callable[[Answer], None]) -> None:
        """Answer a member that wants in, or wants a change."""
        member = self._member
        try:
            if not member.core.is_leader:
                leader = member.core.leader_id
                if isinstance(question, Join) and leader and leader != id:
                    await self._pass_on(id, question, leader)
                else:
                    raise NotLeader(f"{leader or 'nobody'} leads")
            elif isinstance(question, Join):
                await self._let_in(id, question)
            elif question.verb in ("remove", "demote") and question.member_id == member.member_id:
                await self.change(question, _ANSWER_S)
            else:
                await self._carry_out(question, _ANSWER_S)
        except ServiceError as error:
            reply(Refusal(error.code, error.message))
            return
        reply(Done())

    async def _pass_on(self, id: str, question: Join, leader: str) -> None:
        """Tell the leader who wants in; the name is from the certificate that was shown here."""
        change = Change("join", id, f"{question.incarnation} {question.address}")
        answer = await self._member.questions.ask_for(leader, change, _ANSWER_S)
        if isinstance(answer, Refusal):
            raise _error(answer)
        if answer is None:
            raise Unavailable(f"{leader} did not answer")

    async def _let_in(self, id: str, question: Join) -> None:
        def wanted(current: Membership) -> Membership:
            peer = current.find(id)
            if peer is not None and peer.incarnation == question.incarnation:
                return current.with_peer(msgspec.structs.replace(peer, address=question.address))
            return current.joined(id, question.address, question.incarnation)

        await self._propose(wanted, _ANSWER_S)

    async def _carry_out(self, change: Change, timeout_s: float) -> None:
        def wanted(current: Membership) -> Membership:
            match change.verb:
                case "add":
                    return current.added(change.member_id, change.address)
                case "remove":
                    if change.member_id == self._member.member_id:
                        raise Conflict(f"{change.member_id} leads: it has to hand over first")
                    return current.removed(change.member_id)
                case "promote":
                    return current.wanting(change.member_id)
                case "demote":
                    if change.member_id == self._member.member_id:
                        raise Conflict(f"{change.member_id} leads: it has to hand over first")
                    return current.with_role(change.member_id, is_voter=False)
            raise Invalid(f"change {change.verb!r}")

        if change.verb == "join":
            incarnation, _, address = change.address.partition(" ")
            await self._let_in(change.member_id, Join(address, int(incarnation)))
        else:
            await self._propose(wanted, timeout_s)

    async def _propose(self, wanted: Callable[[Membership], Membership], timeout_s: float) -> None:
        """Make the next membership of the current one, once that is settled; return when it is committed.

        Raises:
            ServiceError: it cannot be, or this member lost the lead (then it may still become true).
        """
        core = self._member.core
        try:
            async with asyncio.timeout(timeout_s), self._changing:
                while not core.is_membership_settled:
                    if not core.is_leader:
                        raise NotLeader("another member leads now", hint="nothing was changed")
                    await asyncio.sleep(0.02)
                current = core.membership
                assert current is not None
                following = wanted(current)
                if following == current:
                    return
                term = core.term
                index = core.propose_membership(following)
                self._member.wake()
                await self._member.wait_applied(index)
                if core.membership_at(index) != following:
                    raise NotLeader(f"the lead was lost in term {term}", hint="nothing was changed")
        except TimeoutError as error:
            raise Unavailable("a majority did not confirm the change in time", hint="it may be done") from error

    async def _promote(self) -> None:
        core = self._member.core
        current = core.membership
        if current is None or not core.is_membership_settled:
            return
        for peer in current.peers:
            is_due = peer.is_wanted and not peer.is_voter and peer.incarnation
            if is_due and core.is_heard(peer.id) and core.match_of(peer.id) >= core.commit - _CAUGHT_UP_ENTRIES:
                try:
                    await self._propose(lambda now, id=peer.id: now.with_role(id, is_voter=True), _ANSWER_S)  # type: ignore[misc]
                    log.info("%s has caught up: it is a voter now", peer.id)
                except ServiceError as error:
                    log.warning("%s could not be made a voter yet: %s", peer.id, error.message)
                return


def _is_done(change: Change, current: Membership | None) -> bool:
    """Tell whether the membership is what a change, whose answer was lost, would make it."""
    peer = current.find(change.member_id) if current else None
    match change.verb:
        case "add":
            return peer is not None and peer.address == change.address
        case "remove":
            return peer is None
        case "promote":
            return peer is not None and peer.is_wanted
        case _:
            return peer is not None and not peer.is_voter and not peer.is_wanted


def _error(refusal: Refusal) -> ServiceError:
    return ServiceError.from_body(ErrorBody(code=refusal.code, message=refusal.message, family=refusal.code))
