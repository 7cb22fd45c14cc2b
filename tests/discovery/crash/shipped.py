"""A member that is pysyncobj as shipped, with its journal and dump files: what the crash test has to find fault with.

`python -m tests.discovery.crash.shipped --socket S --address HOST:PORT --peers HOST:PORT,… --directory D`. A small
versioned key-value consumer behind the part of etcd's gateway that `store` speaks. It is used with the care that the
library's documentation asks for: whatever is set is one of its own options, every reply that could mean "not done" but
is not documented so is reported as unknown, and reads go through the log unless it is told to read on the leader.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, SyncObjConsumer, replicated

CERTAINLY_NOT = (FAIL_REASON.QUEUE_FULL, FAIL_REASON.MISSING_LEADER, FAIL_REASON.REQUEST_DENIED)
Found = tuple[str, int] | None


class Keys(SyncObjConsumer):  # type: ignore[misc]  # untyped library
    """Values (base64 text) with their versions; every method answers with what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[str, tuple[str, int]] = {}

    @replicated  # type: ignore[untyped-decorator]
    def get(self, key: str) -> Found:
        return self.keys.get(key)

    @replicated  # type: ignore[untyped-decorator]
    def put(self, key: str, value: str) -> Found:
        before = self.keys.get(key)
        self.keys[key] = (value, before[1] + 1 if before else 1)
        return before

    @replicated  # type: ignore[untyped-decorator]
    def swap(self, key: str, expected: str | None, value: str) -> tuple[bool, Found]:
        before = self.keys.get(key)
        if (before[0] if before else None) != expected:
            return False, before
        self.put(key, value, _doApply=True)
        return True, before

    @replicated  # type: ignore[untyped-decorator]
    def delete(self, key: str, end: str | None) -> list[tuple[str, str, int]]:
        gone = [name for name in self.keys if (name == key if end is None else key <= name < end)]
        return [(name, *self.keys.pop(name)) for name in sorted(gone)]

    @replicated  # type: ignore[untyped-decorator]
    def under(self, key: str, end: str) -> list[tuple[str, str, int]]:
        return [(name, *self.keys[name]) for name in sorted(self.keys) if key <= name < end]


class NotDone(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Member:
    """One SyncObj, ticking in its own thread as it does by default."""

    def __init__(self, address: str, peers: list[str], directory: Path, compact_entries: int, reads: str) -> None:
        self.keys = Keys()
        self._reads = reads
        self.core = SyncObj(
            address,
            peers,
            SyncObjConf(
                journalFile=str(directory / "journal"),
                fullDumpFile=str(directory / "dump"),
                appendEntriesUseBatch=False,
                logCompactionMinEntries=compact_entries,
                commandsWaitLeader=False,
                connectionRetryTime=0.5,
            ),
            consumers=[self.keys],
        )

    async def change(self, method: Callable[..., None], *arguments: Any) -> Any:
        """Replicate a call and wait for its result."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[Any, int]] = loop.create_future()

        def set_result(result: Any, reason: int) -> None:
            if not future.done():
                future.set_result((result, reason))

        method(*arguments, callback=lambda result, reason: loop.call_soon_threadsafe(set_result, result, reason))
        async with asyncio.timeout(5.0):
            result, reason = await future
        if reason == FAIL_REASON.SUCCESS:
            return result
        raise NotDone(14 if reason in CERTAINLY_NOT else 4)

    async def read(self, key: str, end: str | None) -> list[tuple[str, str, int]]:
        if self._reads == "log":
            if end is not None:
                return [tuple(one) for one in await self.change(self.keys.under, key, end)]
            found = await self.change(self.keys.get, key)
            return [(key, *found)] if found else []
        if not self.core._isLeader() or not self.core.isReady():
            raise NotDone(14)
        keys = self.keys.keys
        return [(name, *keys[name]) for name in sorted(keys) if (name == key if end is None else key <= name < end)]


class Gateway:
    """As much of etcd's gateway as `store` asks for."""

    def __init__(self, member: Member) -> None:
        self._member = member

    def application(self) -> web.Application:
        app = web.Application(client_max_size=4 * 1024 * 1024)
        for path, handler in (
            ("kv/range", self.range),
            ("kv/put", self.put),
            ("kv/deleterange", self.delete),
            ("kv/txn", self.txn),
            ("maintenance/status", self.status),
        ):
            app.router.add_post(f"/v3/{path}", self._answering(handler))
        return app

    def _answering(self, handler: Callable[[Any], Any]) -> Callable[[web.Request], Any]:
        async def answer(request: web.Request) -> web.Response:
            try:
                return web.json_response(await handler(await request.json()))
            except NotDone as error:
                return web.json_response({"code": error.code}, status=503)
            except TimeoutError:
                return web.json_response({"code": 4}, status=504)

        return answer

    async def status(self, _: Any) -> Any:
        if not self._member.core.isReady() or self._member.core._getLeader() is None:
            raise NotDone(14)
        return {"leader": str(self._member.core._getLeader()), "is_leader": self._member.core._isLeader()}

    async def range(self, asked: Any) -> Any:
        return {"kvs": _kvs(await self._member.read(_text(asked["key"]), _end(asked)))}

    async def put(self, asked: Any) -> Any:
        before = await self._member.change(self._member.keys.put, _text(asked["key"]), asked["value"])
        return {"prev_kv": _kvs([("", *before)])[0]} if before and asked.get("prev_kv") else {}

    async def delete(self, asked: Any) -> Any:
        gone = await self._member.change(self._member.keys.delete, _text(asked["key"]), _end(asked))
        return {"deleted": str(len(gone)), "prev_kvs": _kvs([tuple(one) for one in gone])}

    async def txn(self, asked: Any) -> Any:
        key = _text(asked["compare"][0]["key"])
        expected = asked["compare"][0]["value"] if asked["compare"][0]["target"] == "VALUE" else None
        value = asked["success"][0]["requestPut"]["value"]
        is_done, before = await self._member.change(self._member.keys.swap, key, expected, value)
        if is_done:
            return {"succeeded": True}
        return {"responses": [{"response_range": {"kvs": _kvs([(key, *before)] if before else [])}}]}


def _kvs(found: list[tuple[str, str, int]]) -> list[dict[str, str]]:
    return [
        {"key": base64.b64encode(name.encode()).decode(), "value": value, "version": str(version)}
        for name, value, version in found
    ]


def _text(raw: str) -> str:
    return base64.b64decode(raw).decode()


def _end(asked: Any) -> str | None:
    return _text(asked["range_end"]) if "range_end" in asked else None


async def run(arguments: argparse.Namespace) -> None:
    arguments.directory.mkdir(parents=True, exist_ok=True)
    peers = [peer for peer in arguments.peers.split(",") if peer]
    member = Member(arguments.address, peers, arguments.directory, arguments.compact_entries, arguments.reads)
    runner = web.AppRunner(Gateway(member).application(), access_log=None)
    await runner.setup()
    await web.UnixSite(runner, str(arguments.socket)).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--peers", default="")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--compact-entries", type=int, default=200)
    parser.add_argument("--reads", choices=["log", "leader"], default="log")
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(run(parser.parse_args()))
