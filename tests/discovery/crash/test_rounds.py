"""The short form of `make crash-test`; and the proof that it can fail: pysyncobj as shipped does not pass it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.discovery.crash import rounds
from tests.discovery.crash.arms import Ours, Shipped
from tests.discovery.crash.rounds import Report

pytestmark = [pytest.mark.needs_root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


async def test_pysyncobj_as_shipped_does_not_pass(tmp_path: Path) -> None:
    report = await rounds.run(Shipped(), 40, 1, tmp_path, Report(), stop_at=1, story="kill all")
    assert report.verdict.lost or report.verdict.violations, report.summary()
    assert (tmp_path / f"seed-1-round-{report.failed[0]}" / "history.jsonl").exists()


async def test_no_fault_makes_three_members_lose_contradict_or_need_anything(tmp_path: Path) -> None:
    report = await rounds.run(Ours(), 6, os.getpid(), tmp_path / "out", Report())
    assert report.verdict.is_fine, report.verdict.lines()
    assert report.counts["rounds"] == 6


@pytest.mark.parametrize(
    ("way", "story"), [("no-sync", "kill all"), ("early-confirmation", "late leader"), ("local-reads", "island")]
)
async def test_a_broken_promise_is_found(tmp_path: Path, way: str, story: str) -> None:
    report = await rounds.run(Ours(broken=way), 20, 1, tmp_path / "out", Report(), stop_at=1, story=story)
    assert not report.verdict.is_fine
