"""What an operator asks a discovery daemon: how it is, its numbers for Prometheus, the whole store as one file.

    GET /status     a `StoreStatus`
    GET /metrics    Prometheus' text format
    GET /snapshot   a snapshot file, as the store itself keeps them: checked from the first byte to the last
    POST /members/ID/promote, demote, remove     change who has a vote

The daemon makes one of a member or an agent; `hostd discovery` and whoever scrapes are the callers.

Source: Prometheus exposition formats, text format 0.0.4.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

from aiohttp import web

from discovery import codec, snapshot
from discovery.access import role_of
from discovery.measures import Times
from discovery.operations import Image
from discovery.types import StoreStatus
from discovery.wire import roles
from discovery.wire.errors import Invalid, Unauthorized
from discovery.wire.serve import Call, Endpoint, send_stream

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[str, str, str, float]
"""Name (without the prefix), type, help, value."""


class Operating:
    """The operator's endpoints over whatever `status` describes."""

    def __init__(
        self,
        status: Callable[[], StoreStatus],
        image: Callable[[], Awaitable[tuple[Image, int, int]]],
        samples: Callable[[], list[Sample]] = list,
        times: Mapping[str, tuple[str, Times]] = {},
        change: Callable[[str, str, str], Awaitable[None]] | None = None,
    ) -> None:
        """Take what there is to say: the status, the state with its place in the log (index, term), more numbers.

        `times` are histograms with what they are about, by name;
        `change` carries out a verb on a member (and its address); without it there are no members to change.
        """
        self._change = change
        self._times = times
        self._status = status
        self._image = image
        self._samples = samples

    def endpoints(self) -> list[Endpoint]:
        """Return the table that `wire.serve` serves and documents."""
        return [
            Endpoint(method="GET", path="/status", handler=self.status, summary="Show how it is", response=StoreStatus),
            Endpoint(
                method="GET",
                path="/metrics",
                handler=self.metrics,
                summary="Show its numbers, in Prometheus' text format",
                kind="bytes",
                response=bytes,
            ),
            Endpoint(
                method="GET",
                path="/snapshot",
                handler=self.snapshot,
                summary="Save the whole store",
                kind="bytes",
                response=bytes,
            ),
            Endpoint(
                method="POST",
                path="/members/{id}/promote",
                handler=self.promote,
                summary="Give a member a vote once it has caught up; with an address, let a new one come",
                query={"address": "HOST:PORT of one that is no member yet"},
            ),
            Endpoint(
                method="POST",
                path="/members/{id}/demote",
                handler=self.demote,
                summary="Take a member's vote; it goes on following",
            ),
            Endpoint(method="POST", path="/members/{id}/remove", handler=self.remove, summary="Take a member out"),
        ]

    async def status(self, call: Call) -> StoreStatus:
        _check(call, is_whole=False)
        return self._status()

    async def metrics(self, call: Call) -> web.Response:
        _check(call, is_whole=False)
        lines = [text_of(self._status(), self._samples())]
        for name, (about, times) in self._times.items():
            lines += [line + "\n" for line in times.lines(f"discovery_{name}", about)]
        return web.Response(text="".join(lines), headers={"Content-Type": METRICS_TYPE})

    async def snapshot(self, call: Call) -> web.StreamResponse:
        _check(call, is_whole=True)
        image, index, term = await self._image()
        parts = _parts(snapshot.written(index, term, codec.encode_image(image)))
        return await send_stream(call, parts, "application/octet-stream", b"")

    async def promote(self, call: Call) -> None:
        address = call.query.get("address", "")
        await self._carry_out(call, "add" if address else "promote", address)

    async def demote(self, call: Call) -> None:
        await self._carry_out(call, "demote")

    async def remove(self, call: Call) -> None:
        await self._carry_out(call, "remove")

    async def _carry_out(self, call: Call, verb: str, address: str = "") -> None:
        _check(call, is_whole=True)
        if self._change is None:
            raise Invalid("this is an agent: it has no members", hint="ask on the host of a member")
        host, _, port = address.rpartition(":")
        if address and not (host and port.isdigit()):
            raise Invalid(f"address {address[:80]!r}", hint="HOST:PORT")
        await self._change(verb, call.path["id"], address)


def _check(call: Call, *, is_whole: bool) -> None:
    """Hold a request to its certificate: the whole store is for those who may operate it."""
    role = role_of(roles.certificate_of(call.raw.transport))
    if not (role.may_operate if is_whole else role.may_read_services):
        raise Unauthorized("this certificate does not allow that", hint="one with the unit controller does")


async def _parts(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Make one part after the other, beside the loop: a large store takes its time."""
    while True:
        part = await asyncio.to_thread(next, parts, None)
        if part is None:
            return
        yield part


def text_of(status: StoreStatus, more: list[Sample]) -> str:
    """Write a status, and what else was measured, as Prometheus reads it."""
    samples: list[Sample] = [
        ("is_leader", "gauge", "Whether this member leads.", status.role == "leader"),
        ("has_leader", "gauge", "Whether a leader is known.", bool(status.leader_id)),
        ("is_connected", "gauge", "Whether an agent follows a member.", status.is_connected),
        ("term", "counter", "The term of the store.", status.term),
        ("revision", "counter", "The newest revision here.", status.revision),
        ("compacted_revision", "counter", "The oldest revision that is retained.", status.compacted_revision),
        ("applied_index", "counter", "The last log entry that was applied.", status.applied_index),
        ("log_entries", "gauge", "Entries of the log in memory.", status.log_entries),
        ("disk_bytes", "gauge", "Size of log and snapshots.", status.disk_bytes),
        ("keys", "gauge", "Keys.", status.keys),
        ("history_events", "gauge", "Changes that are retained for watches.", status.history_events),
        ("history_bytes", "gauge", "Their size.", status.history_bytes),
        ("leases", "gauge", "Leases.", status.leases),
        ("watches", "gauge", "Watches that are open.", status.watches),
        ("services", "gauge", "Services.", status.services),
        ("instances", "gauge", "Instances.", status.instances),
        ("members", "gauge", "Members of the store, learners included.", len(status.members)),
        *more,
    ]
    lines = []
    for name, kind, about, value in samples:
        name = f"discovery_{name}"
        lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}", f"{name} {float(value):.15g}"]
    return "\n".join(lines) + "\n"
