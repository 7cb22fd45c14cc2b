"""The short form of `make damage`."""

from __future__ import annotations

import os
from pathlib import Path

from tests.discovery.crash import damage


async def test_damaged_files_and_refusing_disks_make_no_member_lie(tmp_path: Path) -> None:
    counts = await damage.run(tmp_path, os.getpid(), flips=8, tears_count=5, refusals=2)
    assert counts["by itself"] > 0
    assert counts["rebuilt"] > 0
    assert counts["as another life"] > 0
    assert counts["refused"] > 0
