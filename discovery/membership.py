"""Who belongs to the store: the list that travels through the log, the changes that it may undergo, and who this is.

A change is one entry of the log with the whole new list, made by the leader, one at a time, each
different in one member only; it counts from the moment that it is in a member's log. A member has
an *incarnation*: a random number in its `identity` file, as old as what its disk remembers. A
member that was wiped, or whose log is gone, is another incarnation: it comes back as a learner, and
neither its votes nor its confirmations count for the life that it has forgotten. Pure but for the
file; `core`, `forming` and `raft` use it.
"""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from discovery import frames
from discovery.codec import Unreadable
from discovery.disk import DISK, Disk
from discovery.frames import Damaged
from discovery.wire.errors import AlreadyExists, Conflict, Invalid, NotFound

log = logging.getLogger(__name__)

MEMBERS_MAX = 9
_KIND = b"IDN"


@dataclass(frozen=True)
class Cluster:
    """What a member of a cluster is told: its address, who the first members are, and its certificate.

    `initial` names members by id with their addresses, this one among them.
    """

    address: str
    initial: dict[str, str]
    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class Timing:
    """How long things may take, in seconds; the same on all members.

    Elections begin `election_s` to twice that after the leader was last heard; a leader that hears
    of no majority for `election_s` steps down.
    """

    heartbeat_s: float = 0.1
    election_s: float = 0.5


TIMING = Timing()


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """One member: `incarnation` 0 means that it has not come yet; `is_wanted`: to be a voter once it has caught up."""

    id: str
    address: str
    incarnation: int = 0
    is_voter: bool = False
    is_wanted: bool = True


class Membership(msgspec.Struct, frozen=True, array_like=True):
    """All members, by id, and the number of the cluster, which no other has."""

    cluster_id: int
    peers: tuple[Peer, ...] = ()

    def find(self, id: str) -> Peer | None:
        return next((peer for peer in self.peers if peer.id == id), None)

    def voters(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.is_voter]

    def with_peer(self, peer: Peer) -> Membership:
        """Return the membership with one member added or replaced."""
        others = [other for other in self.peers if other.id != peer.id]
        return msgspec.structs.replace(self, peers=tuple(sorted([*others, peer], key=lambda each: each.id)))

    def added(self, id: str, address: str) -> Membership:
        """Return the membership with a new member that has still to come.

        Raises:
            AlreadyExists: it is there, or another has its address.
            Invalid: there are too many.
        """
        if any(id == peer.id or address == peer.address for peer in self.peers):
            raise AlreadyExists(f"{id} or its address {address} is a member already")
        if len(self.peers) >= MEMBERS_MAX:
            raise Invalid(f"more than {MEMBERS_MAX} members", hint="hosts beyond that follow without a vote")
        return self.with_peer(Peer(id, address))

    def removed(self, id: str) -> Membership:
        """Return the membership without one member.

        Raises:
            NotFound: it is none.
            Conflict: it is the only voter.
        """
        if self.find(id) is None:
            raise NotFound(f"{id} is no member")
        if [peer.id for peer in self.voters()] == [id]:
            raise Conflict(f"{id} is the only member with a vote")
        return msgspec.structs.replace(self, peers=tuple(peer for peer in self.peers if peer.id != id))

    def joined(self, id: str, address: str, incarnation: int) -> Membership:
        """Return the membership after a life of a member has come: a learner, whatever it was before.

        Raises:
            NotFound: it is no member.
            Conflict: it is the only voter, and has forgotten everything.
        """
        peer = self.find(id)
        if peer is None:
            raise NotFound(f"{id} is no member of this cluster", hint="add it first")
        if [voter.id for voter in self.voters()] == [id]:
            raise Conflict(f"{id} is the only member with a vote, and has forgotten what it knew")
        return self.with_peer(Peer(id, address, incarnation, False, peer.is_voter or peer.is_wanted))

    def wanting(self, id: str) -> Membership:
        """Return the membership with a learner that shall be a voter once it has caught up.

        Raises:
            NotFound: it is no member.
        """
        peer = self.find(id)
        if peer is None:
            raise NotFound(f"{id} is no member")
        return self.with_peer(msgspec.structs.replace(peer, is_wanted=True))

    def with_role(self, id: str, *, is_voter: bool) -> Membership:
        """Return the membership with a member made a voter or a learner.

        Raises:
            NotFound: it is no member.
            Conflict: it is the only voter.
        """
        peer = self.find(id)
        if peer is None:
            raise NotFound(f"{id} is no member")
        if not is_voter and [voter.id for voter in self.voters()] == [id]:
            raise Conflict(f"{id} is the only member with a vote")
        return self.with_peer(msgspec.structs.replace(peer, is_voter=is_voter, is_wanted=is_voter))


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """Who this member is; `cluster_id` is the one that it is in, or has asked to be let into (0: none yet).

    `lost_cluster_id` is the cluster whose log an earlier life has lost (0: none): until this one has caught up with
    that, it knows that there was something, and founds nothing.
    """

    member_id: str
    incarnation: int
    cluster_id: int = 0
    lost_cluster_id: int = 0


_encoder = msgspec.msgpack.Encoder()
_membership = msgspec.msgpack.Decoder(Membership)
_identity = msgspec.msgpack.Decoder(Identity)


def encode(membership: Membership) -> bytes:
    """Write a membership as the payload of a log entry."""
    return _encoder.encode(membership)


def decode(payload: bytes) -> Membership:
    """Read a membership back.

    Raises:
        Unreadable: the bytes are none.
    """
    try:
        return _membership.decode(payload)
    except msgspec.MsgspecError as error:
        raise Unreadable(f"membership does not decode: {error}") from error


def save_identity(directory: Path, identity: Identity, disk: Disk = DISK) -> None:
    """Store who this member is; it is on disk when this returns.

    Raises:
        OSError: the disk refuses.
    """
    draft = directory / "identity.draft"
    fd = disk.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        disk.write_all(fd, frames.header(_KIND) + frames.encode(_encoder.encode(identity)), 0)
        disk.fsync(fd)
    finally:
        disk.close(fd)
    disk.rename(draft, directory / "identity")
    disk.sync_directory(directory)


def load_identity(directory: Path, member_id: str, disk: Disk = DISK, *, has_log: bool = True) -> Identity:
    """Read who this member is; a member that does not know, or whose log is gone, begins a new life.

    Nobody has heard of a life before its log is on disk, so a power cut at the first start costs nothing.

    Raises:
        Damaged: the file is not what was written.
        Conflict: the folder is another member's.
    """
    path = directory / "identity"
    if not disk.exists(path):
        identity = Identity(member_id, secrets.randbits(62) + 1)
        save_identity(directory, identity, disk)
        return identity
    found = read_identity(directory, disk)
    if found.member_id != member_id:
        raise Conflict(f"{directory} belongs to the member {found.member_id!r}, not to {member_id!r}")
    if has_log:
        return found
    lost = found.cluster_id or found.lost_cluster_id
    if lost:
        log.warning("%s: the log is not there: this member has forgotten it, and begins a new life", directory)
    reborn = Identity(member_id, secrets.randbits(62) + 1, found.cluster_id, lost)
    save_identity(directory, reborn, disk)
    return reborn


def read_identity(directory: Path, disk: Disk = DISK) -> Identity:
    """Read whose folder this is.

    Raises:
        Damaged: the file is not what was written.
    """
    path = directory / "identity"
    raw = disk.read_file(path)
    frames.check_header(raw, _KIND, str(path))
    record = frames.decode_at(raw, frames.HEADER_BYTES)
    if record is None:
        raise Damaged(f"{path} is damaged")
    try:
        return _identity.decode(record.payload)
    except msgspec.MsgspecError as error:
        raise Damaged(f"{path} does not decode") from error


@dataclass(frozen=True)
class MemberStatus:
    """How a member sees itself and the others."""

    member_id: str
    is_leader: bool
    is_learner: bool
    term: int
    index: int
    applied: int
    leader_id: str
    leader_address: str
    cluster_id: int
    members: list[Peer] = field(default_factory=list)
