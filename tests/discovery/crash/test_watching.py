"""Watchers and holders of leases find fault with whoever gives cause for it, and with nobody else."""

from __future__ import annotations

import random
import time

import pytest

from tests.discovery.crash import leasing
from tests.discovery.crash.history import Operation, Seen
from tests.discovery.crash.leasing import Holder
from tests.discovery.crash.store import Answer, NotAnswered, Store
from tests.discovery.crash.watching import Change, Watcher, differences

TRUTH = [Change(revision, f"k{revision}", 1, "v") for revision in (5, 6, 6, 8)]


def seen(*changes: Change) -> Watcher:
    return Watcher({}, 5, random.Random(1), list(changes))


def test_who_saw_everything_once_is_believed() -> None:
    later = Change(9, "later", 1, "v")
    assert differences([seen(*TRUTH), seen(*TRUTH, later)], TRUTH, []) == []


@pytest.mark.parametrize(
    "changes",
    [
        TRUTH[1:],
        TRUTH[:1] + TRUTH[2:],
        [TRUTH[0], *TRUTH],
        [*TRUTH[:3], Change(7, "lost", 1, "v"), TRUTH[3]],
        TRUTH[::-1],
    ],
)
def test_what_is_missed_repeated_invented_or_out_of_order_is_found(changes: list[Change]) -> None:
    assert len(differences([seen(*changes)], TRUTH, [])) == 1


def test_an_answered_change_that_no_watch_tells_of_is_found() -> None:
    there = Operation(client=1, kind="put", key="k8", start_s=1.0, end_s=2.0, value="v", revision=8)
    untold = Operation(client=1, kind="put", key="other", start_s=1.0, end_s=2.0, value="v", revision=7)
    read = Operation(client=1, kind="get", key="other", start_s=1.0, end_s=2.0, seen=Seen(None, 0), revision=7)
    assert differences([seen(*TRUTH)], TRUTH, [there, read]) == []
    assert len(differences([seen(*TRUTH)], TRUTH, [there, untold])) == 1


class _Told(Store):
    """A store that answers as it is told."""

    def __init__(self, is_there: list[bool]) -> None:
        self.is_there = is_there

    async def keep_alive(self, lease: int) -> bool:
        del lease
        return self.is_there.pop(0)

    async def get(self, key: str, *, is_serializable: bool = False, is_raw: bool = False) -> Answer:
        del key, is_serializable, is_raw
        if not self.is_there:
            raise NotAnswered("unknown", "no answer")
        return Answer(Seen(None, int(self.is_there.pop(0))))


def holder(is_there: list[bool], *, kept_s: float) -> Holder:
    held = Holder({"a": _Told(is_there)}, "l/", random.Random(1))
    held._lease, held._key, held._kept_s = 7, "l/1", time.monotonic() - kept_s
    return held


async def test_a_lease_may_end_when_its_time_is_over_and_not_before() -> None:
    for is_there, kept_s, is_wrong in ([False], 1.0, True), ([False], 2.1, False), ([True, True, False], 2.1, False):
        held = holder(is_there, kept_s=kept_s)
        await held.see_it_go()
        assert bool(held.wrong) == is_wrong
        held = holder([False], kept_s=kept_s)
        await held._keep()
        assert bool(held.wrong) == (kept_s < 2)


async def test_a_key_that_stays_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leasing, "GONE_S", 0.2)
    held = holder([True] * 100, kept_s=3.0)
    await held.see_it_go()
    assert len(held.wrong) == 1
