"""The short form of `make strangers`."""

from __future__ import annotations

import os

import pytest

from tests.discovery.crash import strangers

pytestmark = [pytest.mark.needs_root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


async def test_strangers_cost_no_memory_learn_nothing_and_change_nothing() -> None:
    assert len(await strangers.run(3.0, 300)) == len(strangers.ATTACKS)
