"""How patient tests are: `HOSTD_TEST_SLOWNESS` times as patient as on an ordinary machine."""

from __future__ import annotations

import os

SLOWNESS = float(os.environ.get("HOSTD_TEST_SLOWNESS", "1"))
"""Deadlines are multiplied by it, and bounds on how long something may take; never what a test is about."""
