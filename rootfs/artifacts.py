"""Fetches a blob by URL into the store, checking size and digest while it streams."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

Resolve = Callable[[str], Awaitable[list[tuple[str, int]]]]
