"""A hundredth of `tests.discovery.scale`: keep-alives stay out of the log, and everything is there after a kill."""

from __future__ import annotations

from pathlib import Path

from tests.discovery.scale import FULL, measure


async def test_at_rest_nothing_is_written(tmp_path: Path) -> None:
    found = await measure(FULL.part(0.005), tmp_path, 4.0)
    assert found.renewals_per_s > 0
    assert found.writes_per_s_at_rest == 0
    assert found.bytes_per_s_at_rest == 0
