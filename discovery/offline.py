"""What is done to a store's files while no daemon has them: restore a snapshot, force a new cluster.

    D.draft           a store that is being written; worth nothing, removed by the next attempt
    D.next            a whole and synced store that shall take the place of D
    D.before-N        what was there before; never removed by us
    D.force           the wish that the member in D go on alone, as a new cluster

A new store is written beside the old one, synced, and renamed to `D.next`; whoever opens the store next (the
daemon as it starts, or this program if none runs) sets the old one aside and puts the new one in its place.
Each step is one rename, so a crash leaves the old store or the new one, and the next start goes on.

The store that is put in place goes on far ahead in revisions, and all before that is compacted: the revisions between
were perhaps given to changes that are lost now, and who saw those must not take later ones for what comes after.

What a member of a cluster becomes this way is a new cluster of it alone, under a new number: former members are not
let in until they were wiped, so two histories never mix. Forcing keeps every entry of the member's log, also those
whose commit it never heard of: they may have been acknowledged. What only the lost members had is lost.
`hostd discovery` is the caller.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from discovery import codec, journal, membership, snapshot
from discovery.codec import Unreadable
from discovery.core import MEMBERSHIP, REGULAR
from discovery.disk import DISK
from discovery.frames import Damaged
from discovery.journal import Journal
from discovery.membership import Identity, Membership, Peer
from discovery.operations import Command, Image, RangeRequest, Refused
from discovery.requests import Requests
from discovery.state import State
from discovery.wire.errors import Conflict, Internal, Invalid, NotFound, ServiceError, Unauthorized

AHEAD = 1_000_000_000
"""So many revisions lie between what was and what goes on: more than may have been lost."""


def beside(directory: Path, suffix: str) -> Path:
    """Return the path of a store's neighbour."""
    return directory.with_name(directory.name + suffix)


def read(file: Path) -> tuple[snapshot.Snapshot, State]:
    """Read a snapshot file, whole and checked.

    Raises:
        NotFound, Unauthorized, Invalid: it cannot be read, or is none.
    """
    try:
        found = snapshot.load_file(file)
        return found, State.from_image(codec.decode_snapshot(found.chunks)[1])
    except FileNotFoundError as error:
        raise NotFound(f"there is no {file}") from error
    except PermissionError as error:
        raise Unauthorized(f"{file} cannot be read", hint="try again with sudo") from error
    except OSError as error:
        raise Invalid(f"{file}: {error.strerror}") from error
    except (Damaged, Unreadable) as error:
        raise Invalid(
            f"{error}", hint="`hostd discovery snapshot save` makes such files; this one is not whole"
        ) from error


def prepare(file: Path, directory: Path, *, may_discard: bool, address: str = "") -> dict[str, int]:
    """Write the store that a snapshot holds, so that the next start puts it in the place of the present one.

    A daemon may have the present one open. `address` is where other members reach this one.

    Raises:
        Conflict: there is a store already, and nobody said that it may go.
    """
    found, state = read(file)
    if not may_discard and has_store(directory):
        raise Conflict(
            f"{directory} holds a store, which restoring would put aside",
            hint="--discard-current says that this is meant; it is kept beside it as "
            f"{directory.name}.before-N, and what was written since the snapshot is not in use any more",
        )
    _write_next(directory, state, found.index, found.term, [], address)
    return contents(state)


def contents(state: State) -> dict[str, int]:
    """Return what is said of a store."""
    return {"revision": state.revision, "keys": state.key_count, "leases": state.lease_count}


def _write_next(
    directory: Path, state: State, index: int, term: int, requests: list[tuple[int, int]], address: str
) -> None:
    draft, ready = beside(directory, ".draft"), beside(directory, ".next")
    for old in (draft, ready):
        shutil.rmtree(old, ignore_errors=True)
    draft.mkdir(mode=0o700, parents=True)
    alone = b""
    if (directory / "identity").exists():
        alone = _found(directory, draft, address)
    snapshot.save(draft, index, term, codec.encode_snapshot(codec.Meta(alone, requests), _image(state)))
    draft.rename(ready)
    DISK.sync_directory(ready.parent)


def _image(state: State) -> Image:
    """Return a store far ahead in revisions, with no history: whoever knows later ones of before has to look anew."""
    live = state.read(RangeRequest(key=b"\0", range_end=b"\0")).records
    revision = state.revision + AHEAD
    return Image(revision, revision, state.leases(), live, [])


def _found(directory: Path, draft: Path, address: str) -> bytes:
    """Give the member in a folder a new life in `draft`; return the membership of which it is all."""
    old = membership.read_identity(directory)
    cluster_id = secrets.randbits(62) + 1
    fresh = Identity(old.member_id, secrets.randbits(62) + 1, cluster_id)
    membership.save_identity(draft, fresh)
    me = Peer(old.member_id, address, fresh.incarnation, True, True)
    return membership.encode(Membership(cluster_id, (me,)))


@dataclass(frozen=True)
class Loaded:
    """A store as its files have it, every entry of the log applied."""

    state: State
    index: int
    term: int
    requests: Requests
    membership: Membership | None


def load(directory: Path) -> Loaded:
    """Read a store that no daemon has open.

    Raises:
        Damaged, Unreadable: the files are not what was written.
    """
    stored = snapshot.load(directory)
    meta, image = codec.decode_snapshot(stored.chunks) if stored else (codec.Meta(b"", []), None)
    index, term = (stored.index, stored.term) if stored else (0, 0)
    state, requests = State() if image is None else State.from_image(image), Requests(meta.requests)
    known = membership.decode(meta.membership) if meta.membership else None
    journal = Journal(directory, snapshot_index=index, snapshot_term=term)
    try:
        for payload, at, in_term in [entry for entry in journal[:] if entry[1] > index]:
            if payload[0] == MEMBERSHIP:
                known = membership.decode(payload[1:])
            elif payload[0] == REGULAR:
                _apply(state, requests, codec.decode_command(payload[1:]), at)
            index, term = at, in_term
        return Loaded(state, index, max(term, journal.getCurrentTerm()), requests, known)
    finally:
        journal.close()


def _apply(state: State, requests: Requests, command: Command, index: int) -> None:
    """Apply an entry as `raft.Member` does."""
    if requests.is_done(command.id) or requests.is_void(command.after, index):
        return
    requests.add(command.id, index)
    with contextlib.suppress(Refused):
        state.apply(command.body)


def force(directory: Path) -> dict[str, int]:
    """Prepare the store in a folder as a new cluster of its member alone.

    Raises:
        NotFound: there is none.
        Conflict: it is alone already, or a daemon has it open.
    """
    if not has_store(directory):
        raise NotFound(f"there is no store in {directory}")
    if not (directory / "identity").exists():
        raise Conflict("this member is alone already: there is nothing to force")
    with _unused(directory):
        _check_knows(directory)
        loaded = load(directory)
        me = loaded.membership.find(membership.read_identity(directory).member_id) if loaded.membership else None
        address, requests = me.address if me else "", loaded.requests.image()
        _write_next(directory, loaded.state, loaded.index, loaded.term, requests, address)
    return contents(loaded.state)


def _check_knows(directory: Path) -> None:
    """Make sure that a member still has what it had confirmed to the others.

    Raises:
        NotFound: it has not.
    """
    if not journal.is_there(directory) or membership.read_identity(directory).lost_cluster_id:
        raise NotFound(
            f"the log in {directory} was lost: this member does not know any more what it knew",
            hint="force another member; or `hostd discovery snapshot restore FILE` goes on from a snapshot",
        )


def wish(directory: Path) -> None:
    """Have the daemon force a new cluster when it starts next.

    Raises:
        NotFound, Conflict: there is nothing to force.
    """
    if not (directory / "identity").exists():
        raise Conflict("this member is alone already: there is nothing to force")
    _check_knows(directory)
    beside(directory, ".force").touch(mode=0o600)
    DISK.sync_directory(directory.parent)


def carry_out(directory: Path) -> str:
    """Do what was prepared or wished for; return what is to be said about it, empty if nothing was.

    Raises:
        Conflict: a daemon has the store open.
    """
    said = []
    if aside := adopt_next(directory):
        said.append(f"another store was put in place, what was there before is in {aside}")
    wished = beside(directory, ".force")
    if wished.exists():
        force(directory)
        aside = adopt_next(directory)
        said.append(f"this member goes on alone, as a new cluster; what was there before is in {aside}")
        wished.unlink()
        DISK.sync_directory(directory.parent)
    return "; ".join(said)


def has_store(directory: Path) -> bool:
    """Tell whether there are files of a store."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return any(name.startswith(("journal-", "snapshot-")) for name in names)


def adopt_next(directory: Path) -> Path | None:
    """Put a prepared store, if there is one, in the place of the present one; return where that is now.

    Raises:
        Conflict: a daemon has the present one open.
    """
    ready, aside = beside(directory, ".next"), None
    if not ready.exists():
        return None
    with _alone(beside(directory, ".swap")):
        if not ready.exists():
            return None
        Journal(ready).close()  # without a log it would be a store that has lost it
        if directory.exists():
            with _unused(directory):
                aside = next(path for n in range(1, 10_000) if not (path := beside(directory, f".before-{n}")).exists())
                directory.rename(aside)
        ready.rename(directory)
        DISK.sync_directory(directory.parent)
    return aside


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _unused(directory: Path) -> Iterator[None]:
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Conflict(
            f"{directory} is in use by a discovery daemon", hint="it takes the new store when it starts"
        ) from None
    finally:
        os.close(fd)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m discovery.offline", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="read a snapshot file and say what is in it")
    restore = commands.add_parser("restore", help="prepare the store that a snapshot file holds")
    for command in (verify, restore):
        command.add_argument("file", type=Path)
    restore.add_argument("--state-dir", type=Path, required=True)
    restore.add_argument("--discard-current", action="store_true")
    restore.add_argument("--address", default="")
    adopt = commands.add_parser("adopt", help="put a prepared store in the place of the present one, if no daemon runs")
    adopt.add_argument("--state-dir", type=Path, required=True)
    forced = commands.add_parser("force", help="make the member in a folder a new cluster of it alone")
    forced.add_argument("--state-dir", type=Path, required=True)
    forced.add_argument("--when-it-starts", action="store_true", help="only leave word for the daemon, which runs now")
    given = parser.parse_args(arguments)
    os.umask(0o077)
    try:
        if given.command == "adopt":
            aside = adopt_next(given.state_dir)
            print(json.dumps({"aside": str(aside) if aside else ""}))
        elif given.command == "force" and given.when_it_starts:
            wish(given.state_dir)
            print("{}")
        elif given.command == "force":
            told = force(given.state_dir)
            adopt_next(given.state_dir)
            print(json.dumps(told))
        elif given.command == "restore":
            print(
                json.dumps(
                    prepare(given.file, given.state_dir, may_discard=given.discard_current, address=given.address)
                )
            )
        else:
            _, state = read(given.file)
            print(json.dumps(contents(state)))
    except ServiceError as error:
        return _say(error)
    except (Damaged, Unreadable) as error:
        return _say(Internal(f"the store's files cannot be used: {error}"))
    except OSError as error:
        return _say(Internal(f"the disk refuses: {error}"))
    return 0


def _say(error: ServiceError) -> int:
    print(json.dumps({"message": error.message, "hint": error.hint, "code": error.code}), file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
