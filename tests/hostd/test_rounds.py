"""The short version of `make crash-rounds`."""

from __future__ import annotations

import os

import pytest

from tests.hostd import rounds

pytestmark = [pytest.mark.needs_root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


def test_kills_at_random_moments_lose_nothing_and_leave_nothing() -> None:
    assert rounds.run(rounds=15, spawner=15, both=5, seed=os.getpid()) == []
