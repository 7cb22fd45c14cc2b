"""The jobs of this host: in memory for readers, on disk before anyone hears of a change (but for a full disk).

Every change goes through `change` (or `add`): the record is saved, then the event is published. The
sequence of events grows by one each, also across restarts. Called by `jobs`, `lifecycle` and `api`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from discovery.wire import clock
from discovery.wire.errors import ErrorBody, Unavailable
from hostd.errors import JobNotFound
from hostd.store import Record, Store
from hostd.types import ENDED, Job, JobEvent, without_content

EventKind = Literal["snapshot", "current", "created", "started", "up", "down", "stopping", "ended", "removed"]
_SUBSCRIBER_EVENTS_MAX = 10_000
_SEQUENCE = "event_sequence"


def has_labels(job: Job, labels: Mapping[str, str]) -> bool:
    """Tell whether a job has all of these labels."""
    return labels.items() <= job.spec.labels.items()


class Records:
    """All records, the newest state of each."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._records: dict[str, Record] = {}
        self._sequence = 0
        self._number = 0
        self._subscribers: set[asyncio.Queue[JobEvent | None]] = set()

    async def load(self) -> None:
        """Read everything from the store."""
        self._records = {record.job.spec.id: record for record in await self._store.records()}
        self._number = max((record.number for record in self._records.values()), default=0)
        self._sequence = int(await self._store.fact(_SEQUENCE, "0"))

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._records

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def get(self, job_id: str) -> Record:
        """Return one record.

        Raises:
            JobNotFound: there is none of that id.
        """
        try:
            return self._records[job_id]
        except KeyError:
            raise JobNotFound(f"no job {job_id!r} on this host", hint="hostd ps --all lists them") from None

    def active(self) -> list[Record]:
        """Return the records of jobs that have not ended."""
        return [record for record in self._records.values() if record.job.status not in ENDED]

    async def add(self, job: Job, *, predecessor: Record | None = None, restarts: int = 0) -> Record:
        """Record a new job (in place of `predecessor`, whose successor it becomes), its secrets apart from it.

        Raises:
            HostFull, Unavailable: the disk refuses it; never for a successor: a full disk keeps nobody down.
        """
        self._number += 1
        root, order = job.spec.id, self._number
        if predecessor is not None:
            root = predecessor.root or predecessor.job.spec.id
            order = predecessor.order or predecessor.number
        secrets = job.spec.secrets
        if secrets:
            shown = msgspec.structs.replace(job.spec, secrets=without_content(secrets))
            job = msgspec.structs.replace(job, spec=shown)
        record = Record(job=job, number=self._number, restarts=restarts, root=root, order=order, secrets=secrets)
        changed = [record]
        self._records[job.spec.id] = record
        if predecessor is not None:
            followed = msgspec.structs.replace(self.get(predecessor.job.spec.id), successor=job.spec.id)
            self._records[followed.job.spec.id] = followed
            changed.append(followed)
        try:
            await asyncio.shield(self._save(changed, "created", job, is_patient=predecessor is not None))
        except Unavailable:
            del self._records[job.spec.id]  # nobody was told of it
            raise
        return record

    async def change(
        self,
        job_id: str,
        kind: EventKind | None,
        *,
        record: Mapping[str, Any] | None = None,
        **job: Any,
    ) -> Record:
        """Change fields of a job (and of its record), save, publish `kind` unless `None`.

        A full disk is not in the way: what has happened to a job is true before it is written.
        """
        saving = self.changing(job_id, kind, record=record, **job)
        changed = self._records[job_id]
        await asyncio.shield(saving)
        return changed

    def changing(
        self, job_id: str, kind: EventKind | None, *, record: Mapping[str, Any] | None = None, **job: Any
    ) -> asyncio.Future[None]:
        """Do as `change` for who has something else to do meanwhile; done when it is saved and published.

        The future is not to be cancelled; wait for it as for any other thing that may fail.
        """
        old = self.get(job_id)
        new = msgspec.structs.replace(old, job=msgspec.structs.replace(old.job, **job), **(record or {}))
        self._records[job_id] = new
        return self._save([new], kind, new.job, is_patient=True)

    def note(self, job_id: str, **job: Any) -> None:
        """Change a job in memory only: what need not survive a restart."""
        old = self.get(job_id)
        self._records[job_id] = msgspec.structs.replace(old, job=msgspec.structs.replace(old.job, **job))

    async def remove(self, job_ids: Iterable[str]) -> None:
        """Forget jobs."""
        gone = [self._records.pop(job_id) for job_id in job_ids if job_id in self._records]
        if not gone:
            return
        events = [self._event("removed", record.job) for record in gone]
        removed = [record.job.spec.id for record in gone]
        saving = self._store.save(facts=self._facts(), removed=removed, is_patient=True)
        await asyncio.shield(self._then_publish(saving, events))

    def _save(
        self, records: list[Record], kind: EventKind | None, job: Job, *, is_patient: bool
    ) -> asyncio.Future[None]:
        events = [] if kind is None else [self._event(kind, job)]
        return self._then_publish(self._store.save(records, facts=self._facts(), is_patient=is_patient), events)

    def _then_publish(self, saving: asyncio.Future[None], events: list[JobEvent]) -> asyncio.Future[None]:
        """Publish when it is on disk; a caller that is cancelled meanwhile (behind a shield) takes no event with it."""

        def publish(done: asyncio.Future[None]) -> None:
            if not done.cancelled() and done.exception() is None:
                for event in events:
                    self._publish(event)

        saving.add_done_callback(publish)
        return saving

    def _facts(self) -> dict[str, str]:
        return {_SEQUENCE: str(self._sequence)}

    def _event(self, kind: EventKind, job: Job) -> JobEvent:
        self._sequence += 1
        return JobEvent(sequence=self._sequence, kind=kind, at=clock.now_s(), job=job)

    def _publish(self, event: JobEvent) -> None:
        for queue in list(self._subscribers):
            if queue.qsize() >= _SUBSCRIBER_EVENTS_MAX:
                self._subscribers.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)

    @contextmanager
    def _subscription(self) -> Iterator[asyncio.Queue[JobEvent | None]]:
        queue: asyncio.Queue[JobEvent | None] = asyncio.Queue()
        self._subscribers.add(queue)
        try:
            yield queue
        finally:
            self._subscribers.discard(queue)

    async def watch(self, labels: Mapping[str, str]) -> AsyncIterator[JobEvent]:
        """Yield a `snapshot` of each job that has the labels, `current`, then every change; never ends.

        Raises:
            Unavailable: the watcher is so far behind that it must begin again.
        """
        with self._subscription() as queue:
            sequence, at = self._sequence, clock.now_s()
            jobs = [record.job for record in self._records.values() if has_labels(record.job, labels)]
            for job in jobs:
                yield JobEvent(sequence=sequence, kind="snapshot", at=at, job=job)
            yield JobEvent(sequence=sequence, kind="current", at=at)
            while True:
                event = await queue.get()
                if event is None:
                    raise Unavailable("this watch is too far behind", hint="watch again from the snapshot")
                if event.job is not None and has_labels(event.job, labels):
                    yield event


def lost(message: str) -> ErrorBody:
    """Say why a job ended without an exit status."""
    return ErrorBody(code="job_lost", family="unavailable", message=message, retry=True)
