"""The store as a client sees it: etcd's JSON gateway on one member's unix socket, with every answer sorted by outcome.

The same for every arm of the crash test; what the arm cannot answer (a revision) is left out. An answer counts as
`refused`, that is certainly not done, only where the store says so: the connection could not be made, or gRPC's
UNAVAILABLE (14). Deadlines, broken connections and whatever is not understood are `unknown`.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from tests.discovery.crash import values
from tests.discovery.crash.history import Outcome, Seen

UNAVAILABLE, DEADLINE = 14, 4


class NotAnswered(Exception):
    """There is no result; `outcome` says what is known of the operation."""

    def __init__(self, outcome: Outcome, why: str, *, is_strange: bool = False) -> None:
        super().__init__(f"{outcome}: {why}")
        self.outcome = outcome
        self.is_strange = is_strange
        """Whether it is an answer that no member may give: an internal error, or nothing that one can read."""


@dataclass(frozen=True)
class Answer:
    """What an operation saw of its key, whether it was done, and at which revision."""

    seen: Seen | None
    succeeded: bool = True
    revision: int = 0


class Store:
    """One member. Times in seconds."""

    def __init__(self, socket: Path, timeout_s: float = 2.0) -> None:
        self._timeout_s = timeout_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(path=str(socket), limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )

    async def close(self) -> None:
        await self._session.close()

    async def get(self, key: str, *, is_serializable: bool = False, is_raw: bool = False) -> Answer:
        """Read a key; `is_raw`: its value is none of `values`."""
        asked: dict[str, Any] = {"key": _text(key.encode())}
        if is_serializable:
            asked["serializable"] = True
        raw = await self.call("kv/range", asked)
        return Answer(_seen(raw.get("kvs", []), is_raw=is_raw), True, _revision(raw))

    async def put(self, key: str, value: bytes, *, wants_previous: bool, lease: int = 0) -> Answer:
        asked: dict[str, Any] = {"key": _text(key.encode()), "value": _text(value)}
        if wants_previous:
            asked["prev_kv"] = True
        if lease:
            asked["lease"] = str(lease)
        raw = await self.call("kv/put", asked)
        return Answer(
            _seen([raw["prev_kv"]] if "prev_kv" in raw else []) if wants_previous else None, True, _revision(raw)
        )

    async def delete(self, key: str) -> Answer:
        raw = await self.call("kv/deleterange", {"key": _text(key.encode()), "prev_kv": True})
        return Answer(_seen(raw.get("prev_kvs", [])), True, _revision(raw))

    async def delete_prefix(self, prefix: str) -> None:
        await self.call("kv/deleterange", {"key": _text(prefix.encode()), "range_end": _text(_end(prefix))})

    async def swap(self, key: str, expected: bytes | None, value: bytes) -> Answer:
        """Put if the key has this value (`None`: if it is not there), otherwise read it."""
        at = {"key": _text(key.encode())}
        compare: dict[str, Any] = {"target": "VALUE", "result": "EQUAL", "value": _text(expected or b"")}
        if expected is None:
            compare = {"target": "VERSION", "result": "EQUAL", "version": "0"}
        raw = await self.call(
            "kv/txn",
            {
                "compare": [at | compare],
                "success": [{"requestPut": at | {"value": _text(value)}}],
                "failure": [{"requestRange": at}],
            },
        )
        if raw.get("succeeded", False):
            return Answer(None, True, _revision(raw))
        return Answer(_seen(raw["responses"][0]["response_range"].get("kvs", [])), False, _revision(raw))

    async def names(self, prefix: str, *, is_serializable: bool = False) -> tuple[dict[str, Seen], int]:
        """Return all keys under a prefix, and the revision at which they were read."""
        asked: dict[str, Any] = {"key": _text(prefix.encode()), "range_end": _text(_end(prefix))}
        if is_serializable:
            asked["serializable"] = True
        raw = await self.call("kv/range", asked)
        found: dict[str, Seen] = {}
        for one in raw.get("kvs", []):
            seen = _seen([one])
            found[base64.b64decode(one["key"]).decode()] = seen
        return found, _revision(raw)

    async def grant(self, ttl_s: int) -> int:
        """Make a lease; return its id."""
        return int((await self.call("lease/grant", {"TTL": str(ttl_s)}))["ID"])

    async def keep_alive(self, lease: int) -> bool:
        """Renew a lease; tell whether there is one."""
        return int((await self.call("lease/keepalive", {"ID": str(lease)}))["result"].get("TTL", 0)) > 0

    async def lines(self, path: str, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """Ask for a stream and yield its lines for as long as it lasts.

        Raises:
            NotAnswered: there is none, or it broke.
        """
        pending = b""
        try:
            async with self._session.post(f"http://unix/v3/{path}", json=body) as response:
                if response.status != 200:
                    _answer(response.status, await response.read())
                async for chunk in response.content.iter_any():
                    *whole, pending = (pending + chunk).split(b"\n")
                    for line in whole:
                        yield _answer(200, line)
        except aiohttp.ClientConnectorError as error:
            raise NotAnswered("refused", str(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise NotAnswered("unknown", repr(error)) from error

    async def call(self, path: str, body: dict[str, Any]) -> Any:
        """Ask once; values that came back damaged are a `ValueError`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._session.post(f"http://unix/v3/{path}", json=body) as response:
                    raw = await response.read()
                    status = response.status
        except aiohttp.ClientConnectorError as error:
            raise NotAnswered("refused", str(error)) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise NotAnswered("unknown", repr(error)) from error
        return _answer(status, raw)


def _answer(status: int, raw: bytes) -> Any:
    try:
        answer = msgspec.json.decode(raw)
    except msgspec.MsgspecError as error:
        raise NotAnswered("unknown", f"{status}: {raw[:200]!r}", is_strange=True) from error
    if status == 200:
        return answer
    code = answer.get("code") if isinstance(answer, dict) else None
    is_strange = code not in (UNAVAILABLE, DEADLINE)
    raise NotAnswered(
        "refused" if code == UNAVAILABLE else "unknown", f"{status}: {raw[:200]!r}", is_strange=is_strange
    )


def _seen(found: list[dict[str, Any]], *, is_raw: bool = False) -> Seen:
    if not found:
        return Seen(None, 0)
    if is_raw:
        return Seen(None, int(found[0].get("version", 0)))
    return Seen(values.decode(base64.b64decode(found[0].get("value", ""))), int(found[0].get("version", 0)))


def _revision(raw: dict[str, Any]) -> int:
    return int(raw.get("header", {}).get("revision", 0))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _end(prefix: str) -> bytes:
    raw = prefix.encode()
    return raw[:-1] + bytes((raw[-1] + 1,))
