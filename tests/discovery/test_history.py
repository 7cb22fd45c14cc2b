from __future__ import annotations

import asyncio

import pytest

from discovery import history
from discovery.daemon import Daemon
from discovery.operations import PutRequest
from tests.discovery.conftest import DEADLINE_S


@pytest.mark.parametrize(("events_max", "bytes_max"), [(20, 10**9), (10**9, 20_000)])
async def test_history_stays_within_its_bounds_and_keys_stay(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, events_max: int, bytes_max: int
) -> None:
    monkeypatch.setattr(history, "CHECK_INTERVAL_S", 0.01)
    member = daemon.member
    trimming = asyncio.ensure_future(history.trim_history(member, events_max=events_max, bytes_max=bytes_max))
    for number in range(200):
        await member.propose(PutRequest(key=b"k%d" % (number % 10), value=bytes(900)))
    async with asyncio.timeout(DEADLINE_S):
        while member.state.history_events > 25:
            await asyncio.sleep(0.01)
    trimming.cancel()
    assert member.state.compacted > 0
    assert len(member.state._live) == 10
