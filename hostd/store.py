"""hostd's memory on disk: one SQLite file with a record per job and a few facts about the host.

WAL with `synchronous=FULL`: when `save` returns, the record survives a power cut, so it is written
before anything is done about it. What is asked to be saved while a write is under way goes into the next one, together.
A fact that the disk does not take (it is full) is owed: kept, and written as soon
as that works, for what has happened has happened. All disk work happens in one thread, in the order of the calls.
Called by `records` and `daemon`; it knows nothing of what the records mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from discovery.wire.errors import Unavailable
from hostd.errors import HostFull
from hostd.runtime.network import NetworkState
from hostd.types import Job, JobSpec, SecretFile

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRY_S = 1.0
_LOG_BYTES = 1024 * 1024
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (id TEXT PRIMARY KEY, number INTEGER NOT NULL, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A job with what only hostd needs to know of it.

    `number` is the order of creation. `network` is set once the job was launched, and so is
    `uid_base`, what the host calls its uid 0 (0 = it has no user namespace). `is_stop_asked`
    means that a caller wants it gone, so no successor follows. `restarts` counts the quick restarts
    that led to this job, `root` is the id of the first of that chain, `successor` of the next, `order` the first one's
    number: where the chain stands when all jobs come back. What the spec's secrets contain is in
    `secrets` alone: `job` is what may be shown.
    """

    job: Job
    number: int
    network: NetworkState | None = None
    uid_base: int = 0
    is_stop_asked: bool = False
    restarts: int = 0
    root: str = ""
    successor: str = ""
    order: int = 0
    secrets: tuple[SecretFile, ...] = ()

    def full_spec(self) -> JobSpec:
        """Return the spec as it was asked for, to start the job with or to compare another one."""
        return msgspec.structs.replace(self.job.spec, secrets=self.secrets)


@dataclass
class _Rows:
    """What is to be written: jobs by id (`None`: removed) and facts by name."""

    jobs: dict[str, tuple[int, bytes] | None] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.jobs or self.facts)

    def __or__(self, later: _Rows) -> _Rows:
        return _Rows(self.jobs | later.jobs, self.facts | later.facts)


@dataclass
class _Save:
    """One call of `save` that has yet to be written."""

    rows: _Rows
    is_patient: bool
    done: asyncio.Future[None]


class Store:
    """One open database; `open` makes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hostd-store")
        self._database: sqlite3.Connection | None = None
        self._owed: _Rows = _Rows()
        self._waiting: deque[_Save] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Open or make the file.

        Raises:
            Unavailable: the file cannot be opened or is damaged; the message says why.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        await self._call(self._connect)

    def _connect(self) -> None:
        database = sqlite3.connect(self.path, isolation_level=None)
        # we are alone, and so it needs no shared index on disk: a node whose disk is full can still start and read
        database.execute("PRAGMA locking_mode=EXCLUSIVE")
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.executescript(_SCHEMA)
        self._database = database
        self.path.chmod(0o600)
        with contextlib.suppress(sqlite3.OperationalError):  # a full disk: each save takes longer, that is all
            _grow_log(database)

    async def close(self) -> None:
        """Finish what is under way and close the file."""
        if self._timer is not None:
            self._timer.cancel()

        def close() -> None:
            if self._database is not None:
                with contextlib.suppress(sqlite3.Error):
                    self._write(_Rows())
                self._database.close()
                self._database = None

        await asyncio.get_running_loop().run_in_executor(self._thread, close)
        self._thread.shutdown()

    def _call(self, act: Callable[[], T]) -> asyncio.Future[T]:
        def careful() -> T:
            try:
                return act()
            except sqlite3.Error as error:
                raise self._refusal(error) from error

        return asyncio.get_running_loop().run_in_executor(self._thread, careful)

    def _refusal(self, error: sqlite3.Error) -> Unavailable:
        if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
            return HostFull(f"the disk of {self.path.parent} is full", hint="free some space on the host")
        return Unavailable(f"{self.path}: {error}", hint="the file may be damaged", retry=False)

    def _open_database(self) -> sqlite3.Connection:
        assert self._database is not None, "the store is not open"
        return self._database

    def save(self, records: Iterable[Record] = (), facts: dict[str, str] | None = None,
                   removed: Iterable[str] = (), *, is_patient: bool = False) -> asyncio.Future[None]:  # fmt: skip
        """Write records and facts and remove jobs, all or nothing; done when it is safe, cancelled or not.

        With `is_patient` a refusal is logged, and what was to be written is tried again until it is.

        Raises:
            HostFull, Unavailable: the disk refused, and it was not `is_patient`.
        """
        jobs: dict[str, tuple[int, bytes] | None] = dict.fromkeys(removed)
        jobs |= {record.job.spec.id: (record.number, msgspec.msgpack.encode(record)) for record in records}
        loop = asyncio.get_running_loop()
        asked = _Save(_Rows(jobs, dict(facts or {})), is_patient, loop.create_future())
        self._waiting.append(asked)
        self._thread.submit(self._write_waiting, loop)
        return asked.done

    def _write_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        """Write all that waits; if it cannot be written together, one after the other, so that each has its answer."""
        saves = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not saves:  # an earlier turn took it along
            return
        answers: list[tuple[_Save, BaseException | None]]
        try:
            together = _Rows()
            for save in saves:
                together |= save.rows
            self._write(together)
            answers = [(save, None) for save in saves]
        except Exception:  # noqa: BLE001 — whatever it was, each is told what became of it alone
            answers = [(save, self._write_alone(save, loop)) for save in saves]
        with contextlib.suppress(RuntimeError):  # the loop is gone, and with it all who waited
            loop.call_soon_threadsafe(_tell, answers)

    def _write_alone(self, save: _Save, loop: asyncio.AbstractEventLoop) -> BaseException | None:
        """Write one; return why not, unless it can wait."""
        try:
            self._write(save.rows)
        except sqlite3.Error as error:
            if not save.is_patient or not isinstance(error, sqlite3.OperationalError):
                refusal = self._refusal(error)
                refusal.__cause__ = error
                return refusal
            if not self._owed:
                log.error("%s: %s; trying on, jobs are not touched by it", self.path, error)
            self._owed |= save.rows
            loop.call_soon_threadsafe(self._try_later)
        except Exception as error:  # noqa: BLE001 — it is raised where it was asked for
            return error
        return None

    def _write(self, rows: _Rows) -> None:
        """Write in one transaction, with all that is owed."""
        everything = self._owed | rows
        if not everything:
            return
        saved = [(job_id, *row) for job_id, row in everything.jobs.items() if row is not None]
        gone = [(job_id,) for job_id, row in everything.jobs.items() if row is None]
        database = self._open_database()
        database.execute("BEGIN")
        try:
            for row in saved:
                database.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?)", row)
            for fact in everything.facts.items():
                database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", fact)
            for job_id in gone:
                database.execute("DELETE FROM jobs WHERE id = ?", job_id)
            database.execute("COMMIT")
        except sqlite3.Error:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        if self._owed:
            log.info("%s takes writes again", self.path)
            self._owed = _Rows()

    def _try_later(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(RETRY_S, self._try_again)

    def _try_again(self) -> None:
        self._timer = None
        if self._database is not None:
            self.save(is_patient=True)

    async def records(self) -> list[Record]:
        """Return all records in order of creation; one that this version cannot read is reported and left out."""
        rows = await self._call(
            lambda: self._open_database().execute("SELECT id, record FROM jobs ORDER BY number").fetchall()
        )
        found = []
        for job_id, blob in rows:
            try:
                found.append(msgspec.msgpack.decode(blob, type=Record))
            except msgspec.MsgspecError as error:
                log.error("record of job %s cannot be read, it counts as unknown: %s", job_id, error)
        return found

    async def fact(self, name: str, default: str = "") -> str:
        """Return a fact by name."""
        row = await self._call(
            lambda: self._open_database().execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        )
        return default if row is None else str(row[0])


def _tell(answers: list[tuple[_Save, BaseException | None]]) -> None:
    """Answer those who asked, in the order in which they did."""
    for save, error in answers:
        if save.done.done():  # nobody waits any more
            continue
        if error is None:
            save.done.set_result(None)
        else:
            save.done.set_exception(error)


def _grow_log(database: sqlite3.Connection) -> None:
    """Make the write-ahead log as large as it gets: it is written from its begin again and again.

    A write that makes a file longer has the file system write its journal as well before it is safe: three times as
    slow, for each save until then.
    """
    (page_bytes,) = database.execute("PRAGMA page_size").fetchone()
    database.execute(f"PRAGMA wal_autocheckpoint={_LOG_BYTES // page_bytes}")
    database.execute("DROP TABLE IF EXISTS room")  # of a hostd that was killed just here
    database.execute("CREATE TABLE room (bytes BLOB)")
    database.execute("INSERT INTO room VALUES (zeroblob(?))", (_LOG_BYTES,))
    database.execute("DROP TABLE room")
    database.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    database.execute("PRAGMA shrink_memory")
