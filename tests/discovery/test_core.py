"""Each defect of pysyncobj that the project's notes list, shown in the library as shipped, and gone in ours.

Message by message, with a clock of the test's own and no network: `shipped` fails each time, `ours` does not.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from discovery import core as cores
from discovery.core import Contradiction
from discovery.membership import Membership
from discovery.peerwire import Append, AppendReply, TimeoutNow, VoteReply, VoteRequest
from discovery.wire import clock as clocks
from tests.discovery.members import free_ports
from tests.discovery.shipped import Clock, Ours, Shipped, library


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(clocks, "monotonic_s", made)
    monkeypatch.setattr(library, "monotonicTime", made)
    return made


@pytest.fixture
def ours(tmp_path: Path, clock: Clock) -> Iterator[Ours]:
    made = Ours(tmp_path / "a", "a", ["b", "c"], clock)
    yield made
    made.journal.close()


@pytest.fixture
def shipped(clock: Clock) -> Shipped:
    return Shipped("a", ["b", "c"], clock)


def leads(member: Ours) -> bool:
    return member.core.is_leader


def is_settled(member: Ours) -> bool:
    return member.core.is_membership_settled


# Votes


def test_shipped_counts_one_voter_twice(clock: Clock) -> None:
    member = Shipped("a", ["b", "c", "d", "e"], clock)
    member.stand()
    for _ in range(2):
        member.receive("b", type="response_vote", term=member.core.raftCurrentTerm)
    assert member.core._isLeader(), "two of five have voted"


def test_ours_counts_each_voter_once(tmp_path: Path, clock: Clock) -> None:
    member = Ours(tmp_path / "a", "a", ["b", "c", "d", "e"], clock)
    member.stand()
    for _ in range(5):
        member.receive("b", VoteReply(member.core.term, True))
    assert not leads(member)
    member.receive("c", VoteReply(member.core.term, True))
    assert leads(member)
    member.journal.close()


def test_shipped_is_silent_when_a_candidate_asks_again(shipped: Shipped) -> None:
    for _ in range(2):
        shipped.receive("b", type="request_vote", term=5, last_log_index=9, last_log_term=4)
    assert len(shipped.took("response_vote")) == 1


def test_ours_repeats_its_vote_and_gives_no_other_one(ours: Ours) -> None:
    for _ in range(2):
        ours.receive("b", VoteRequest(5, 9, 4))
    ours.receive("c", VoteRequest(5, 9, 4))
    assert [reply.is_granted for reply in ours.took(VoteReply)] == [True, True, False]
    assert ours.journal.getVotedForNodeId() == "b"


def test_ours_knows_its_vote_after_a_restart(ours: Ours, clock: Clock) -> None:
    ours.receive("b", VoteRequest(5, 9, 4))
    ours.journal.close()
    again = Ours(ours.folder, "a", ["b", "c"], clock)
    again.receive("c", VoteRequest(5, 9, 4))
    assert [reply.is_granted for reply in again.took(VoteReply)] == [False]
    again.journal.close()


def test_ours_does_not_count_a_life_that_has_forgotten(ours: Ours) -> None:
    ours.stand()
    ours.receive("b", VoteReply(ours.core.term, True), incarnation=2)
    assert not ours.core.is_leader


def test_shipped_raises_its_term_whenever_it_hears_nothing(shipped: Shipped) -> None:
    for _ in range(5):
        shipped.stand()
    assert shipped.core.raftCurrentTerm == 5, "and deposes the leader when it is back"


def test_ours_asks_before_it_stands(ours: Ours, clock: Clock) -> None:
    ours.append("b", 1, (1, 0))
    for _ in range(5):
        clock.now_s += 2.0
        ours.step()
    assert ours.core.term == 1
    assert all(request.is_trial for request in ours.took(VoteRequest))


def test_ours_gives_no_trial_vote_while_it_hears_a_leader(ours: Ours, clock: Clock) -> None:
    ours.append("b", 1, (1, 0))
    ours.took(AppendReply)
    ours.receive("c", VoteRequest(2, 9, 9, True))
    assert not ours.took(VoteReply)[0].is_granted
    clock.now_s += 0.6
    ours.receive("c", VoteRequest(2, 9, 9, True))
    assert ours.took(VoteReply)[0].is_granted
    assert ours.core.term == 1


# Who leads


def test_shipped_believes_for_half_a_minute_that_it_leads(shipped: Shipped, clock: Clock) -> None:
    shipped.lead()
    clock.now_s += 25.0
    shipped.tick()
    assert shipped.core._isLeader()


def test_ours_steps_down_within_an_election_timeout_of_hearing_nobody(ours: Ours, clock: Clock) -> None:
    ours.lead()
    told: list[int | None] = []
    ours.core.ask_read_index(told.append)
    clock.now_s += 0.51
    ours.step()
    assert not ours.core.is_leader
    assert told == [None]
    assert "majority" in ours.core.cause


def test_ours_hands_over_to_whom_it_says(ours: Ours) -> None:
    ours.append("b", 1, (1, 0))
    ours.receive("c", TimeoutNow(1))
    ours.step()
    assert ours.core.term == 1, "only the leader may say so"
    ours.receive("b", TimeoutNow(1))
    ours.step()
    assert ours.core.term == 2
    assert not ours.took(VoteRequest)[-1].is_trial


# Confirmations


def test_shipped_takes_a_confirmation_of_an_earlier_term(shipped: Shipped) -> None:
    shipped.lead()
    for value in "xyz":
        shipped.put(value)
    shipped.receive("b", type="append_entries", term=9, commit_index=1, entries=[], prevLogIdx=1, prevLogTerm=0)
    assert shipped.get("raftLog")[-1][1] == 1, "another leader has cut its log"
    shipped.stand()
    for id in "bc":
        shipped.receive(id, type="response_vote", term=shipped.core.raftCurrentTerm)
    shipped.put("mine")
    mine = shipped.get("raftLog")[-1][1]
    shipped.receive("b", type="next_node_idx", next_node_idx=6, reset=False, success=True)  # late, from the first term
    shipped.tick()
    assert shipped.core.raftCommitIndex >= mine, "nobody else has it"


def test_ours_drops_a_confirmation_of_an_earlier_term(ours: Ours) -> None:
    ours.lead()
    first = ours.core.term
    ours.core.proposals += [b"\x00x", b"\x00y", b"\x00z"]
    ours.step()
    ours.append("b", 9, (1, 0), b"other")
    ours.step()
    ours.lead()
    assert ours.core.term > first
    ours.core.proposals.append(b"\x00mine")
    ours.step()
    ours.receive("b", AppendReply(first, True, 5))
    ours.step()
    assert ours.core.commit == 1
    ours.receive("b", AppendReply(ours.core.term, True, ours.core.last_index))
    ours.step()
    assert ours.core.commit == ours.core.last_index


def test_ours_commits_nothing_of_an_earlier_term_by_counting(ours: Ours) -> None:
    ours.append("b", 1, (1, 0), b"old")
    ours.step()
    ours.lead()
    ours.receive("b", AppendReply(ours.core.term, True, 2))
    ours.receive("c", AppendReply(ours.core.term, True, 2))
    ours.step()
    assert ours.core.commit == 1
    ours.receive("c", AppendReply(ours.core.term, True, 3))
    ours.step()
    assert ours.core.commit == 3


def test_shipped_confirms_before_anything_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its journal has no fsync at all; the notes measured what a power cut makes of that."""
    text = Path(library.__file__).with_name("journal.py").read_text()
    assert "fsync" not in text
    assert "fdatasync" not in text


def test_ours_confirms_only_what_is_on_disk(ours: Ours) -> None:
    ours.append("b", 1, (1, 0), b"x")
    assert ours.journal.is_dirty
    assert not ours.took(AppendReply), "it waits in the outbox for the sync"
    ours.step()
    assert ours.took(AppendReply)[0].index == 2


# The log


def test_shipped_cuts_where_nothing_contradicts(shipped: Shipped) -> None:
    entries = [(shipped.command(value), index, 1) for index, value in enumerate("xyz", 2)]
    shipped.receive("b", type="append_entries", term=1, commit_index=4, entries=entries, prevLogIdx=1, prevLogTerm=0)
    shipped.tick()
    assert shipped.applied == ["x", "y", "z"]
    shipped.receive(
        "b", type="append_entries", term=1, commit_index=4, entries=entries[:1], prevLogIdx=1, prevLogTerm=0
    )
    assert shipped.get("raftLog")[-1][1] == 2, "a repeated message undid what was applied"
    assert shipped.core.raftCommitIndex == 2, "and the commit index went back"


def test_ours_cuts_nothing_that_agrees(ours: Ours) -> None:
    ours.append("b", 1, (1, 0), b"x", b"y", b"z", commit=4)
    ours.step()
    assert ours.applied == [b"x", b"y", b"z"]
    ours.append("b", 1, (1, 0), b"x", commit=2)
    ours.append("b", 1, (2, 1), commit=2)
    ours.step()
    assert ours.log == [(1, b"x"), (1, b"y"), (1, b"z")]
    assert ours.core.commit == 4
    assert [reply.index for reply in ours.took(AppendReply)] == [4, 2, 2]


def test_ours_cuts_what_contradicts_and_was_never_committed(ours: Ours) -> None:
    ours.append("b", 1, (1, 0), b"x", b"y", b"z", commit=2)
    ours.append("c", 3, (2, 1), b"other")
    ours.step()
    assert ours.log == [(1, b"x"), (3, b"other")]


def test_ours_stops_rather_than_undo_what_is_committed(ours: Ours) -> None:
    ours.append("b", 1, (1, 0), b"x", b"y", commit=3)
    with pytest.raises(Contradiction, match="entry 2 is committed"):
        ours.append("c", 3, (1, 0), b"other")


def test_ours_commits_only_what_the_message_vouches_for(ours: Ours) -> None:
    """A tail of another history must not be committed because the leader is further."""
    ours.append("b", 1, (1, 0), b"x", b"stale", b"stale")
    ours.append("c", 2, (2, 1), commit=4)
    assert ours.core.commit == 2


def test_ours_drops_what_a_deposed_leader_still_sends(ours: Ours) -> None:
    ours.append("b", 5, (1, 0), b"x")
    ours.append("c", 4, (1, 0), b"late")
    ours.step()
    assert ours.log == [(5, b"x")]
    assert [(reply.is_ok, reply.term) for reply in ours.took(AppendReply)] == [(True, 5), (False, 5)]


def test_ours_says_where_it_is_when_something_is_missing(ours: Ours) -> None:
    ours.append("b", 1, (1, 0), b"x", b"y")
    ours.append("b", 1, (9, 1), b"later")
    ours.step()
    assert [(reply.is_ok, reply.index) for reply in ours.took(AppendReply)] == [(True, 3), (False, 4)]


# Commands


def test_shipped_hangs_on_a_command_that_raises(shipped: Shipped) -> None:
    entries = [(shipped.command(value), index, 1) for index, value in enumerate(["raise", "after"], 2)]
    shipped.receive("b", type="append_entries", term=1, commit_index=3, entries=entries, prevLogIdx=1, prevLogTerm=0)
    for _ in range(5):
        with pytest.raises(ValueError, match="raise"):
            shipped.tick()
    assert shipped.applied == []


class Bomb:
    has_run = False

    @staticmethod
    def run() -> None:
        Bomb.has_run = True

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return Bomb.run, ()


def test_shipped_runs_what_a_peer_sends(shipped: Shipped) -> None:
    Bomb.has_run = False
    raw = pickle.dumps(Bomb())
    for transmission, data in (("start", raw[:10]), ("finish", raw[10:])):
        message = {"type": "append_entries", "term": 1, "commit_index": 1, "prevLogIdx": 1, "prevLogTerm": 0}
        with contextlib.suppress(TypeError):  # what it unpickled is no entry: too late
            shipped.receive("b", **message, transmission=transmission, data=data)
    assert Bomb.has_run


def test_ours_has_no_message_that_runs(ours: Ours) -> None:
    """The wire knows the messages that there are, of plain data (see `test_peerwire`); the log's kinds as well."""
    Bomb.has_run = False
    ours.receive("b", Append(1, 1, 0, 2, [(1, b"\x03" + pickle.dumps(Bomb()))]))
    ours.step()
    assert ours.core.applied == 2
    assert not Bomb.has_run


# Disk and wire: what ours does is in `test_journal`, `test_transport` and `test_members`


def test_shipped_forgets_its_log_when_the_dump_is_newer_than_its_head(
    shipped: Shipped, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [(shipped.command(number), number, 1) for number in range(2, 11)]
    shipped.receive("b", type="append_entries", term=1, commit_index=10, entries=entries, prevLogIdx=1, prevLogTerm=0)
    shipped.tick()
    dump: tuple[object, ...] = (
        None,
        entries[3],
        entries[2],
        set(),
    )  # written by a fork, after which the log was not yet shortened
    monkeypatch.setattr(shipped.get("serializer"), "deserialize", lambda: dump)
    shipped.core._SyncObj__loadDumpFile(clearJournal=False)
    assert shipped.get("raftLog")[-1][1] == 5, "6 to 10 were acknowledged"


def test_shipped_believes_a_damaged_log(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    log = library.createJournal(str(path))
    log.add(b"command one", 1, 1)
    log.add(b"command two", 2, 1)
    log._destroy()
    raw = bytearray(path.read_bytes())
    raw[raw.find(b"two")] ^= 1
    path.write_bytes(raw)
    again = library.createJournal(str(path))
    assert again[1] == (b"command uwo", 2, 1)
    again._destroy()


def test_shipped_listens_everywhere() -> None:
    """Whatever address it is given; and whoever connects is listened to, for ever."""
    port = free_ports(1)[0]
    core = library.SyncObj(f"127.0.0.1:{port}", [f"127.0.0.1:{port + 1}"], library.SyncObjConf(autoTick=False))
    try:
        lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
        assert f"00000000:{port:04X}" in [fields[1] for fields in lines if fields[3] == "0A"]
    finally:
        core.destroy()


def test_shipped_carries_out_later_what_it_could_not_promise(shipped: Shipped) -> None:
    shipped.core.put("given up long ago")
    shipped.tick()
    shipped.lead()
    shipped.tick()
    shipped.receive("b", type="next_node_idx", next_node_idx=4, reset=False, success=True)
    shipped.tick()
    assert shipped.applied == ["given up long ago"]


def test_ours_takes_nothing_that_it_cannot_put_into_the_log(ours: Ours) -> None:
    """`Member` takes back what is left here, and answers that it is certainly not done (`test_members`)."""
    ours.core.proposals.append(b"\x00x")
    ours.step()
    assert ours.core.proposals == [b"\x00x"]
    assert ours.log == []


# Members


def test_shipped_takes_two_changes_at_once(shipped: Shipped) -> None:
    shipped.lead()
    shipped.receive("b", type="next_node_idx", next_node_idx=3, reset=False, success=True)
    shipped.tick()
    for id in ("d", "e"):
        shipped.core._applyCommand(b"\x02" + pickle.dumps(["add", id]), None)
        shipped.tick()
    assert len(shipped.core.otherNodes) == 4, "neither is committed, both count"


def test_ours_takes_one_change_at_a_time(ours: Ours) -> None:
    ours.lead()
    assert not is_settled(ours), "first an entry of its own term"
    ours.receive("b", AppendReply(ours.core.term, True, ours.core.last_index))
    ours.step()
    assert is_settled(ours)
    current = ours.core.membership
    assert isinstance(current, Membership)
    ours.core.propose_membership(current.added("d", "d:1"))
    ours.step()
    assert not is_settled(ours)
    with pytest.raises(AssertionError, match="one change"):
        ours.core.propose_membership(current.added("e", "e:1"))
    ours.receive("b", AppendReply(ours.core.term, True, ours.core.last_index))
    ours.step()
    assert is_settled(ours)


def test_ours_takes_a_membership_back_that_was_cut(ours: Ours) -> None:
    ours.lead()
    ours.receive("b", AppendReply(ours.core.term, True, ours.core.last_index))
    ours.step()
    current = ours.core.membership
    assert current is not None
    ours.core.propose_membership(current.removed("c"))
    ours.step()
    assert ours.core.membership == current.removed("c")
    ours.append("b", 9, (2, 1), b"other")
    assert ours.core.membership == current


# Reads


def test_many_reads_share_one_round(ours: Ours) -> None:
    ours.lead()
    ours.receive("b", AppendReply(ours.core.term, True, ours.core.last_index))
    ours.step()
    ours.took(Append)
    told: list[int | None] = []
    for _ in range(100):
        ours.core.ask_read_index(told.append)
    ours.step()
    asked = ours.took(Append)
    assert len(asked) == 2
    ours.receive("b", AppendReply(ours.core.term, True, 2, asked[0].round - 1))
    ours.step()
    assert told == [], "that answer was to an earlier question"
    ours.receive("b", AppendReply(ours.core.term, True, 2, asked[0].round))
    ours.step()
    assert told == [2] * 100


def test_a_new_leader_reads_only_after_an_entry_of_its_own(ours: Ours) -> None:
    ours.append("b", 1, (1, 0), b"x")
    ours.step()
    ours.lead()
    told: list[int | None] = []
    ours.core.ask_read_index(told.append)
    ours.step()
    ours.receive("b", AppendReply(ours.core.term, True, 0, ours.core._round))
    ours.step()
    assert told == []
    assert cores.NO_OP == ours.journal[-1][0][0]
