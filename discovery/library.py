"""Imports pysyncobj, less what we must not or need not have: its pickle, its own journal, its password scheme.

`raft` is the only caller; nothing else of ours imports pysyncobj.
"""

from __future__ import annotations

import socket
import sys
from typing import NoReturn

from discovery.journal import Journal
from discovery.wire import clock

# The library imports `cryptography` for a password scheme that we do not use: 7 MiB in every node.
# For the time of the import it finds none, which it knows how to bear.
# It also puts its own inet_pton and inet_ntop (for Windows, and wrong for bytes) into `socket`, for everybody.
_fernet = sys.modules.get("cryptography.fernet")
_inet = socket.inet_pton, socket.inet_ntop
sys.modules["cryptography.fernet"] = None  # type: ignore[assignment]
try:
    import pysyncobj.syncobj
    from pysyncobj import SyncObj, SyncObjConf
    from pysyncobj.node import Node
    from pysyncobj.transport import Transport
finally:
    socket.inet_pton, socket.inet_ntop = _inet
    del sys.modules["cryptography.fernet"]
    if _fernet is not None:
        sys.modules["cryptography.fernet"] = _fernet

__all__ = ["Node", "SyncObj", "SyncObjConf", "Transport"]


class _NoPickle:
    """Stands where pysyncobj has pickle: nothing from the network or the disk is ever unpickled."""

    @staticmethod
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("pysyncobj tried to use pickle")

    dumps = loads = dump = load = refuse


def _journal_of(journal: Journal) -> Journal:
    assert isinstance(journal, Journal), "pysyncobj must be given our journal"
    return journal


def _now_s() -> float:
    return clock.monotonic_s()


# Its own clock is CLOCK_MONOTONIC_RAW, a quarter of a second from everybody else's after some hours: deadlines of the
# two cannot be compared.
pysyncobj.syncobj.monotonicTime = _now_s
pysyncobj.syncobj.pickle = _NoPickle
# SyncObj.__init__ makes its journal with `createJournal(conf.journalFile)`: we pass ours as "the file"
pysyncobj.syncobj.createJournal = _journal_of
