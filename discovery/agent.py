"""The gateway of an agent: keys from its copy, everything that is about leases and members from the members.

What is read with `serializable`, watched or looked up as a service is answered here, also while no member
answers; all else is passed on. Whoever speaks to an agent speaks with the agent's certificate to the
members, so only roles that may do as much as a host may pass anything on. `daemon` makes and runs it.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from discovery import api, replies
from discovery.access import Role, denied
from discovery.gateway import PREFIXES, Gateway
from discovery.mirror import OWN_WRITES_S, Mirror
from discovery.operating import Operating, Sample
from discovery.operations import Image
from discovery.services import Directory, Services
from discovery.types import StoreStatus
from discovery.upstream import Upstream
from discovery.watches import Watches
from discovery.wire import roles
from discovery.wire.errors import Invalid

_LEASES = ("grant", "revoke", "timetolive", "leases", "keepalive")
_CHANGES = ("grant", "revoke", "compaction", "add", "remove", "update", "promote")


class AgentGateway(Gateway):
    """etcd's endpoints over a copy."""

    def __init__(self, mirror: Mirror, upstream: Upstream) -> None:
        super().__init__(mirror, None)
        self._mirror = mirror
        self._upstream = upstream
        for path in list(self.handlers):
            room, _, verb = path.split("/", 2)[2].rpartition("/")
            if room in ("lease", "kv/lease", "maintenance", "cluster/member") or verb == "compaction":
                self._pass_on(path, is_lease=room in ("lease", "kv/lease"), is_change=verb in _CHANGES)

    def _pass_on(self, path: str, *, is_lease: bool, is_change: bool) -> None:
        asked = "/v3/" + path.removeprefix(next(prefix for prefix in PREFIXES if path.startswith(prefix + "/")) + "/")

        async def ask(raw: bytes, role: Role) -> bytes:
            if is_lease:
                role.check_lease()
            elif is_change:
                role.check_operator()
            if not (role.may_operate or role.name == roles.HOST):
                raise denied()
            answer = await self._upstream.ask(asked, raw or b"{}", is_change=is_change)
            if is_change:
                revision = replies.decode(answer, replies.Answer).header.revision
                await self._mirror.wait_revision(revision, OWN_WRITES_S)
            return answer

        self.handlers[path] = ask


@dataclass(frozen=True)
class Agent:
    """The parts of a daemon that has a copy of the store."""

    upstream: Upstream
    mirror: Mirror
    watches: Watches
    directory: Directory
    services: Services

    @classmethod
    def make(cls, addresses: Sequence[str], name: str, tls: ssl.SSLContext | None = None) -> Agent:
        """Put the parts together."""
        upstream = Upstream(addresses, tls)
        mirror = Mirror(upstream, name)
        watches, directory = Watches(mirror.state), Directory(mirror.state)
        mirror.on_applied(directory.on_applied)
        mirror.on_applied(watches.on_applied)
        mirror.on_reset(directory.on_reset)
        mirror.on_reset(lambda _: watches.close())  # who watches connects again, and takes what there is now
        return cls(upstream, mirror, watches, directory, Services(mirror, directory, watches))

    def application(self) -> Any:
        """Return the HTTP application."""
        etcd = api.EtcdApi(AgentGateway(self.mirror, self.upstream), self.mirror, self.watches)
        operating = Operating(self.status, self._image, self._samples)
        return api.make_application(etcd, api.ServicesApi(self.services, self.directory), operating)

    def status(self) -> StoreStatus:
        """Say how it is."""
        state, (services, instances) = self.mirror.state, self.directory.counts()
        return StoreStatus(
            member_id=self.mirror.member_id,
            role="agent",
            term=self.mirror.term,
            revision=state.revision,
            compacted_revision=state.compacted,
            keys=state.key_count,
            history_events=state.history_events,
            history_bytes=state.history_bytes,
            watches=self.watches.count,
            services=services,
            instances=instances,
            follows=self.mirror.upstream_address,
            is_connected=self.mirror.is_connected,
        )

    async def _image(self) -> tuple[Image, int, int]:
        raise Invalid("an agent's copy is no store: it has no leases", hint="save a snapshot on a member")

    def _samples(self) -> list[Sample]:
        return [
            ("agent_snapshots_total", "counter", "Copies that were made anew.", self.mirror.resyncs),
            ("agent_failures_total", "counter", "Members that were left.", self.mirror.failures),
        ]

    async def run(self) -> None:
        """Follow the members until cancelled."""
        try:
            await self.mirror.run()
        finally:
            await self.upstream.close()
