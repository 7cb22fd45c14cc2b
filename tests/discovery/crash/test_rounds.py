"""The short form of `make crash-test`; and the proof that it can fail: pysyncobj as shipped does not pass it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.discovery.crash import rounds
from tests.discovery.crash.arms import Shipped

pytestmark = [pytest.mark.needs_root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


async def test_pysyncobj_as_shipped_is_found_to_lose_what_it_acknowledged(tmp_path: Path) -> None:
    report = await rounds.run(Shipped(), 40, 1, tmp_path, stop_at=1, story="kill all")
    assert report.verdict.lost, report.summary()
    assert report.verdict.violations
    assert (tmp_path / f"seed-1-round-{report.failed[0]}" / "history.jsonl").exists()
