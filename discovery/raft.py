"""One member of the replicated store: pysyncobj, fenced in, with our disk, codec and state machine at its seams.

The library decides who leads and what is committed; everything else is ours, for the reasons
measured in the project's notes (as shipped it loses acknowledged writes, unpickles what strangers
send, and hangs on a command that raises). Seams used: `transport=`, the journal that it creates,
`autoTick=False`. Where it has none, `_Core` overrides the one private method, with the reason
beside it. `library` imports it, without its pickle.

The order that makes "acknowledged" true: a tick may append to the log; the log is synced before
the next tick; only that next tick commits, applies and answers. So every answer is preceded by a
sync of all that it depends on, and everything proposed meanwhile shares the next sync.

One member for now, with no port open at all (`_Alone`); members, transport and reads that ask a
majority come into `_Core`, beside `_Alone`, and into `Member.read`. The api, services and DNS of
this process are the callers.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from discovery import codec, snapshot
from discovery.journal import Journal
from discovery.library import Node, SyncObj, SyncObjConf, Transport
from discovery.operations import Body, Command, Event, Outcome, RangeRequest, RangeResult, Refused
from discovery.state import State
from discovery.wire import clock
from discovery.wire.errors import Conflict, DeadlineExceeded, Internal, Unavailable

log = logging.getLogger(__name__)

COMPACT_ENTRIES = 20_000
COMPACT_BYTES = 32 * 1024 * 1024
DISK_RESERVE_BYTES = 32 * 1024 * 1024
"""Below this much free space writes are refused, so that the log never meets a full disk in the middle of a record."""
IDLE_TICK_S = 1.0
RETRY_COMPACTION_S = 60.0
_QUEUE_MAX = 10_000
_REGULAR, _NO_OP = 0, 1
_SUCCESS = 0

Applied = Callable[[list[Event]], None]


class _Alone(Transport):  # type: ignore[misc]  # untyped library
    """The transport of a member without peers: opens no port, reaches nobody, refuses members."""

    ready = True

    def tryGetReady(self) -> None: ...

    def waitReady(self) -> None: ...

    def destroy(self) -> None: ...

    def send(self, node: Node, message: object) -> bool:
        return False

    def addNode(self, node: Node) -> None:
        raise AssertionError("this member has no peers")

    def dropNode(self, node: Node) -> None:
        raise AssertionError("this member has no peers")


class _Core(SyncObj):  # type: ignore[misc]  # untyped library
    """pysyncobj with its unsafe private parts replaced; see each override for its reason."""

    def __init__(self, member_id: str, journal: Journal, applied_index: int, apply: Callable[[bytes], object]) -> None:
        self._apply_payload = apply
        self._journal = journal
        configuration = SyncObjConf(
            autoTick=False,
            journalFile=journal,
            appendEntriesUseBatch=False,  # the default waits for a period before it sends: 10 writes a second
            commandsQueueSize=_QUEUE_MAX,
            dynamicMembershipChange=False,
        )
        super().__init__(Node(member_id), [], configuration, transport=_Alone(None, None, []))
        # The journal begins at our snapshot, which is applied already; the library assumes 1.
        self._SyncObj__raftLastApplied = max(applied_index, 1)

    def _SyncObj__generateRaftTimeout(self) -> float:
        """Elect a member that has no peers at once: there is nobody to wait for."""
        return float(super()._SyncObj__generateRaftTimeout()) if self.otherNodes else -1.0

    def _SyncObj__onBecomeLeader(self) -> None:
        """Sync at once: the library commits its first entry within the very tick that wrote it."""
        super()._SyncObj__onBecomeLeader()
        self._journal.sync_now()

    def _SyncObj__doApplyCommand(self, command: bytes) -> object:
        """Apply our own encoding; the library's unpickles, and a command that raises hangs it for ever."""
        if command[0] != _REGULAR:
            if command[0] != _NO_OP:
                log.error("log entry of kind %d ignored", command[0])
            return None
        return self._apply_payload(command[1:])

    def _SyncObj__parseChangeClusterRequest(self, command: bytes) -> None:
        """Find no membership change: the library's are pickled, and two at once are not prevented."""

    def _SyncObj__tryLogCompaction(self) -> None:
        """Do nothing: the library's throws away whatever is newer than the dump; `Member` compacts."""


class Member:
    """The store as this process has it: propose changes, read, hear of what was applied.

    Raises:
        Damaged: the files in `directory` are not what was written.
        Unreadable: they are of a version that this one cannot read.
        Conflict: another process has them open.
    """

    def __init__(self, directory: Path, member_id: str) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.member_id = member_id
        self._directory = directory
        self._lock = _lock(directory)
        stored = snapshot.load(directory)
        self.state = State() if stored is None else State.from_image(codec.decode_image(stored.chunks))
        index, term = (stored.index, stored.term) if stored else (0, 0)
        self._journal = Journal(directory, snapshot_index=index, snapshot_term=term)
        self._core = _Core(member_id, self._journal, index, self._apply)
        self._listeners: list[Applied] = []
        self._waiting: set[asyncio.Future[Outcome]] = set()
        self._wakeup = asyncio.Event()
        self._ready = asyncio.Event()
        self._failure: str = ""
        self._compaction: asyncio.Task[None] | None = None
        self._compact_after_s = 0.0
        self._disk_checked_s = 0.0
        self._has_space = True
        self.compact_entries = COMPACT_ENTRIES
        self.compact_bytes = COMPACT_BYTES

    @property
    def term(self) -> int:
        """Return Raft's current term."""
        return int(self._core.raftCurrentTerm)

    @property
    def index(self) -> int:
        """Return the log index up to which the state is applied."""
        return int(self._core.raftLastApplied)

    @property
    def is_leader(self) -> bool:
        """Tell whether this member leads and knows it."""
        return self._ready.is_set() and bool(self._core._isLeader()) and not self._failure

    @property
    def log_entries(self) -> int:
        """Return how many entries the log holds in memory."""
        return len(self._journal)

    def disk_bytes(self) -> int:
        """Return how much the log and the snapshots take."""
        return sum(path.stat().st_size for path in self._directory.iterdir() if path.is_file())

    def on_applied(self, listener: Applied) -> None:
        """Call `listener` with the changes of every command from now on, before its proposer is answered."""
        self._listeners.append(listener)

    async def wait_ready(self) -> None:
        """Wait until the log is replayed and this member can answer."""
        await self._ready.wait()

    async def read(self, request: RangeRequest) -> RangeResult:
        """Read what is certainly the newest state.

        Raises:
            Refused: the revision is not to be had.
            Unavailable: this member cannot know.
        """
        self.check_leading()
        return self.state.read(request)

    async def propose(self, body: Body, timeout_s: float = 10.0) -> Outcome:
        """Put a change into the log and return what it did, once it is safe.

        Raises:
            Refused: the store says no; nothing changed.
            Unavailable: it was not taken, nothing changed.
            DeadlineExceeded: it may or may not be done.
        """
        self.check_leading()
        self._check_space()
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        command = Command(id=secrets.randbits(63), time_ms=int(clock.now_s() * 1000), body=body)
        self._waiting.add(future)
        self._core._applyCommand(codec.encode_command(command), _answer(future), _REGULAR)
        self._wakeup.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the store did not confirm within {timeout_s:g} s", hint="the change may be done: read, then decide"
            ) from error
        finally:
            self._waiting.discard(future)

    async def run(self) -> None:
        """Keep the member alive until cancelled.

        Raises:
            OSError: the disk refuses; all waiting proposals are told that their outcome is unknown.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await self._turn(tasks)
        except* OSError as group:
            error = group.exceptions[0]
            self._failure = f"the disk failed: {error}"
            log.critical("the log cannot be written, this member stops: %s", error)
            raise error from None
        finally:
            self._failure = self._failure or "this member has stopped"
            self._ready.clear()
            for future in list(self._waiting):
                if not future.done():
                    future.set_exception(DeadlineExceeded(self._failure, hint="the change may be done"))

    def close(self) -> None:
        """Close the files; call after `run` has ended."""
        self._core.destroy()
        os.close(self._lock)

    async def _turn(self, tasks: asyncio.TaskGroup) -> None:
        self._wakeup.clear()
        self._core.doTick(0.0)
        if self._journal.is_dirty:
            await self._journal.sync()
            return
        if not self._ready.is_set() and self._core._isLeader() and self._core.isReady():
            log.info("member %s leads: term %d, revision %d", self.member_id, self.term, self.state.revision)
            self._ready.set()
        if self._is_compaction_due():
            self._compaction = self._begin_compaction(tasks)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_TICK_S):
                await self._wakeup.wait()

    def _apply(self, payload: bytes) -> object:
        """Apply one committed command; what the state makes of it is an answer, never an exception.

        Raises:
            Unreadable: a newer version wrote it; the member stops rather than go on without it.
        """
        command = codec.decode_command(payload)
        try:
            outcome = self.state.apply(command.body)
        except Refused as refused:
            return refused
        except Exception:
            log.exception("a committed command could not be applied: %r", payload[:200])
            return Internal("the store could not apply this", hint="the discovery daemon's log has the cause")
        if outcome.events:
            self._tell(outcome.events)
        return outcome

    def _tell(self, events: list[Event]) -> None:
        for listener in self._listeners:
            try:
                listener(events)
            except Exception:
                log.exception("a listener failed")

    def check_leading(self) -> None:
        """Make sure that this member can speak for the store.

        Raises:
            Unavailable: it cannot now.
        """
        if not self.is_leader:
            raise Unavailable(self._failure or "the store is starting", hint="try again in a moment")

    def _check_space(self) -> None:
        now = clock.monotonic_s()
        if now >= self._disk_checked_s + 1.0:
            self._disk_checked_s = now
            self._has_space = shutil.disk_usage(self._directory).free > DISK_RESERVE_BYTES
            if self._has_space:
                self._journal.keep_reserve()
        if not self._has_space:
            raise Unavailable(f"the disk of {self._directory} is full", hint="free some space; reads still work")

    def _is_compaction_due(self) -> bool:
        if self._compaction is not None and not self._compaction.done():
            return False
        is_long = len(self._journal) > self.compact_entries or self._journal.bytes_since_snapshot > self.compact_bytes
        return is_long and clock.monotonic_s() >= self._compact_after_s

    def _begin_compaction(self, tasks: asyncio.TaskGroup) -> asyncio.Task[None]:
        """Take the state as it is between two turns; the writing goes on beside further turns."""
        index = self.index
        term = self._journal[index - self._journal[0][1]][2]
        image = self.state.image()
        self._journal.rotate()
        return tasks.create_task(self._compact(index, term, image))

    async def _compact(self, index: int, term: int, image: Any) -> None:
        try:
            await asyncio.to_thread(snapshot.save, self._directory, index, term, codec.encode_image(image))
        except OSError as error:
            log.error("no snapshot could be written, the log stays long: %s", error)
            self._compact_after_s = clock.monotonic_s() + RETRY_COMPACTION_S
            return
        self._journal.forget_to(index)
        log.info("snapshot at log index %d, revision %d", index, image.revision)


def _answer(future: asyncio.Future[Outcome]) -> Callable[[object, int], None]:
    def answer(result: object, reason: int) -> None:
        if future.done():
            return
        if isinstance(result, Outcome):
            future.set_result(result)
        elif isinstance(result, (Refused, Internal)):
            future.set_exception(result)
        elif reason == _SUCCESS:
            future.set_exception(Internal("the store gave no answer"))
        else:
            future.set_exception(Unavailable(f"the store did not take the change (reason {reason})"))

    return answer


def _lock(directory: Path) -> int:
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise Conflict(f"{directory} is in use by another discovery daemon") from error
    return fd
