"""The discovery daemon itself, with a disk that can lose its power and a log that is soon compacted.

`python -m tests.discovery.crash.wrapped --tape FILE [--sync-s S] [--compact-entries N] -- DAEMON'S FLAGS`. Only the
object that `discovery.disk` offers for this purpose and the daemon's own limits are changed, before it starts. SIGUSR1
has it die at one of its next steps on the disk, SIGUSR2 makes that a slow one. With
`--broken` one promise of the daemon's is broken on purpose, to see that the crash test finds out.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from discovery import daemon, disk, raft, transfer
from tests.discovery.crash import broken
from tests.discovery.crash.taping import TapingDisk

CHUNK_BYTES = 8 * 1024
"""So that a snapshot takes many messages."""
GIVE_UP_S = 0.8
"""So that a member tells its client, before that gives up, what it knows of a change that it could not confirm."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tape", type=Path, required=True)
    parser.add_argument("--sync-s", type=float, default=0.0)
    parser.add_argument("--compact-entries", type=int, default=raft.COMPACT_ENTRIES)
    parser.add_argument("--broken", choices=["", *broken.WAYS], default="")
    parser.add_argument("flags", nargs="*")
    asked = parser.parse_args()
    raft.COMPACT_ENTRIES = asked.compact_entries
    raft.KEEP_ENTRIES = asked.compact_entries // 10
    transfer.CHUNK_BYTES = CHUNK_BYTES  # type: ignore[attr-defined]
    raft.Member.propose.__defaults__ = (GIVE_UP_S,)
    raft.Member.read.__kwdefaults__ = {"serializable": False, "timeout_s": GIVE_UP_S}
    disk.DISK.__class__ = TapingDisk
    TapingDisk.__init__(disk.DISK, asked.tape, asked.sync_s)  # type: ignore[arg-type]
    signal.signal(signal.SIGUSR1, lambda *_: disk.DISK.doom())  # type: ignore[attr-defined]
    signal.signal(signal.SIGUSR2, lambda *_: disk.DISK.slow())  # type: ignore[attr-defined]
    if asked.broken:
        broken.WAYS[asked.broken]()
    return daemon.main(asked.flags)


if __name__ == "__main__":
    sys.exit(main())
