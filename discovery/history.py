"""Keeps the store's history bounded: proposes a compaction when more changes are retained than watchers need."""

from __future__ import annotations

import asyncio
import logging

from discovery.operations import Compact, Refused
from discovery.raft import Member
from discovery.wire.errors import ServiceError

log = logging.getLogger(__name__)

CHECK_INTERVAL_S = 10.0
EVENTS_MAX = 20_000
BYTES_MAX = 64 * 1024 * 1024


async def trim_history(member: Member, *, events_max: int = EVENTS_MAX, bytes_max: int = BYTES_MAX) -> None:
    """Compact to half the bounds whenever one is passed, until cancelled."""
    while True:
        state = member.state
        is_long = state.history_events > events_max or state.history_bytes > bytes_max
        if is_long and member.is_leader:
            revision = state.revision_keeping(events_max // 2, bytes_max // 2)
            try:
                await member.propose(Compact(revision=revision))
                log.info("history before revision %d forgotten", revision)
            except (Refused, ServiceError) as error:
                log.warning("history could not be trimmed: %s", error)
        await asyncio.sleep(CHECK_INTERVAL_S)
