"""One client's `/v3/watch`: messages that make and end watches come in, lines of JSON about changes go out.

Many watches may share a stream, as etcd's gateway allows: a body holds one message after the other, and may stay
open. What is sent, when, and in which fields is etcd 3.4's. `api` opens one for every request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from discovery import etcdjson
from discovery.access import Role
from discovery.etcdjson import Json
from discovery.jsonstream import Messages
from discovery.operations import INVALID_ARGUMENT, Event, Refused
from discovery.state import State
from discovery.watches import Watch, Watches
from discovery.wire import clock

PROGRESS_S = 60.0
"""How long a watch that asked for progress hears nothing before it is told the revision."""
FRAGMENT_BYTES = 1024 * 1024
WATCHES_MAX = 10_000

_NO_ID = -1


@dataclass
class _Followed:
    wanted: etcdjson.WatchCreateJson
    watch: Watch
    told_s: float = field(default_factory=clock.monotonic_s)


class Lines:
    """Lines about one change each, written once for all streams that tell it in the same words."""

    def __init__(self) -> None:
        self._event: Event | None = None
        self._written: dict[tuple[bytes, int, bool], bytes] = {}

    def line(self, event: Event, id: int, header: Callable[[int | None], Json], *, has_previous: bool) -> bytes:
        """Return the line about a change for a watch of this id."""
        if event is not self._event:
            self._event = event
            self._written.clear()
        head = header(None)
        key = bytes(head["header"]), id, has_previous
        if (written := self._written.get(key)) is None:
            shown = {"events": [etcdjson.event(event, has_previous=has_previous)]}
            written = self._written[key] = _encoded(head | _id(id) | shown)
        return written


class WatchStream:
    """The watches of one client; `header` makes the head of a line for a revision (0: leave it out)."""

    def __init__(
        self,
        watches: Watches,
        state: State,
        role: Role,
        header: Callable[[int | None], Json],
        lines: Lines | None = None,
        progress_s: float = 0,
    ) -> None:
        self._watches = watches
        self._state = state
        self._role = role
        self._header = header
        self._lines = lines or Lines()
        self._progress_s = progress_s or PROGRESS_S
        self._messages: deque[etcdjson.WatchJson] = deque()
        self._followed: dict[int, _Followed] = {}
        self._next_id = 0
        self._woken = asyncio.Event()
        self._is_closed = False

    async def first(self, chunks: AsyncIterator[bytes], messages: Messages) -> None:
        """Wait for the first message, which decides whether this becomes a stream at all.

        Raises:
            Refused: there is none, or it makes no sense.
        """
        while not self._messages:
            chunk = await anext(chunks, b"")
            messages.feed(chunk)
            self._add(messages)
            if not chunk and not self._messages:
                raise Refused(INVALID_ARGUMENT, "unexpected EOF")
        if self._messages[0] == etcdjson.WatchJson():
            raise Refused(INVALID_ARGUMENT, "the first message of a watch is a create_request")

    async def read(self, chunks: AsyncIterator[bytes], messages: Messages) -> None:
        """Take further messages until there are no more; one that makes no sense is the last."""
        with suppress(Refused):
            async for chunk in chunks:
                messages.feed(chunk)
                self._add(messages)

    def close(self) -> None:
        """End the stream, and its watches."""
        self._is_closed = True
        for followed in self._followed.values():
            self._watches.remove(followed.watch)
        self._followed.clear()
        self._woken.set()

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield what the client is to hear, a line or more at a time, until the stream is closed."""
        while not self._is_closed:
            self._woken.clear()
            if any(followed.watch.is_closed for followed in self._followed.values()):
                return  # the daemon is stopping: the client sees the stream end and connects again
            if self._followed and self._role.now(self._state.value) is not self._role:
                return  # what allowed it was taken back: the next stream is refused
            if told := [line if isinstance(line, bytes) else _encoded(line) for line in self._news()]:
                yield b"".join(told)
            if (due := self._progress_due()) is None:
                await self._woken.wait()
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._woken.wait()

    def _add(self, messages: Messages) -> None:
        for message in messages.take():
            self._messages.append(etcdjson.decode(message, etcdjson.WatchJson))
            self._woken.set()

    def _news(self) -> Iterator[Json | bytes]:
        while self._messages:
            message = self._messages.popleft()
            if message.create_request is not None:
                yield from self._create(message.create_request)
            elif message.cancel_request is not None:
                yield from self._cancel(message.cancel_request.watch_id)
            elif message.progress_request is not None:
                yield from self._changes()
                yield self._header(None) | _id(_NO_ID)
        yield from self._changes()
        yield from self._progress()

    def _create(self, wanted: etcdjson.WatchCreateJson) -> Iterator[Json]:
        key, end = wanted.key or b"\x00", wanted.range_end
        try:
            self._role.now(self._state.value).check_range(key, end)
        except Refused as refused:
            yield self._refused(refused.message)
            return
        if end not in (b"", b"\x00") and end <= key:
            yield self._refused("mvcc: watcher range is empty")
        elif wanted.watch_id in self._followed and wanted.watch_id:
            yield self._refused("mvcc: duplicate watch ID provided on the WatchStream")
        elif len(self._followed) >= WATCHES_MAX:
            yield self._refused("too many watches on one stream")
        else:
            id = wanted.watch_id or self._free_id()
            start = wanted.start_revision if wanted.start_revision > 0 else self._state.revision + 1
            self._followed[id] = _Followed(wanted, self._watches.add(key, end, start, self._woken))
            yield self._header(None) | _id(id) | {"created": True}

    def _refused(self, reason: str) -> Json:
        return self._header(None) | _id(_NO_ID) | {"created": True, "canceled": True, "cancel_reason": reason}

    def _free_id(self) -> int:
        while self._next_id in self._followed:
            self._next_id += 1
        self._next_id += 1
        return self._next_id - 1

    def _cancel(self, id: int) -> Iterator[Json]:
        if followed := self._followed.pop(id, None):
            self._watches.remove(followed.watch)
            yield self._header(None) | _id(id) | {"canceled": True}

    def _changes(self) -> Iterator[Json | bytes]:
        for id, followed in list(self._followed.items()):
            try:
                events = followed.watch.take()
            except Refused:
                self._watches.remove(self._followed.pop(id).watch)
                compacted = {"canceled": True, "compact_revision": str(self._state.compacted)}
                yield self._header(0) | _id(id) | compacted
                continue
            if followed.wanted.filters:
                events = [event for event in events if followed.wanted.wants(event)]
            if events:
                followed.told_s = clock.monotonic_s()
                yield from self._shown(id, followed.wanted, events)

    def _shown(self, id: int, wanted: etcdjson.WatchCreateJson, events: list[Event]) -> Iterator[Json | bytes]:
        if len(events) == 1:
            yield self._lines.line(events[0], id, self._header, has_previous=wanted.prev_kv)
            return
        head = self._header(None) | _id(id)
        groups = list(_fragments(events)) if wanted.fragment else [events]
        for number, group in enumerate(groups, 1):
            shown = [etcdjson.event(event, has_previous=wanted.prev_kv) for event in group]
            yield head | ({"fragment": True} if number < len(groups) else {}) | {"events": shown}

    def _progress(self) -> Iterator[Json]:
        now = clock.monotonic_s()
        for id, followed in self._followed.items():
            if followed.wanted.progress_notify and now >= followed.told_s + self._progress_s:
                followed.told_s = now
                yield self._header(None) | _id(id)

    def _progress_due(self) -> float | None:
        told = [followed.told_s for followed in self._followed.values() if followed.wanted.progress_notify]
        if not told:
            return None
        wait_s = min(told) + self._progress_s - clock.monotonic_s()
        return asyncio.get_running_loop().time() + max(wait_s, 0.001)


def _encoded(line: Json) -> bytes:
    return msgspec.json.encode({"result": line}) + b"\n"


def _id(id: int) -> Json:
    return {"watch_id": str(id)} if id else {}


def _fragments(events: list[Event]) -> Iterator[list[Event]]:
    """Cut a list into parts of about `FRAGMENT_BYTES`."""
    part: list[Event] = []
    size = 0
    for event in events:
        grown = len(event.record.key) + len(event.record.value) + 100
        if part and size + grown > FRAGMENT_BYTES:
            yield part
            part, size = [], 0
        part.append(event)
        size += grown
    yield part
