"""How daemons log: one line a record on stderr, `time level logger message`, no secrets.

Called once by each `daemon.py`; libraries' loggers are kept at WARNING.
"""

from __future__ import annotations

import logging
import sys


def configure(level: int = logging.INFO) -> None:
    """Send our records to stderr as single lines with a UTC-offset-free ISO time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("aiohttp.access", "asyncssh", "pyroute2", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
