"""`python -m discovery.rebuild --state-dir DIR`: set damaged files aside, so that a member comes back from its peers.

For a member of a cluster whose files are damaged or whose disk was restored from an old copy. Its
daemon must not be running. The next start finds an empty folder, begins a new life, asks the other
members to be let in and gets everything from them (see `forming`). A member that is alone has
nobody to get anything from: it is refused unless `--even-alone`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from discovery.raft import lock_folder
from discovery.wire import clock
from discovery.wire.errors import Conflict, NotFound, ServiceError


def set_aside(directory: Path, *, is_alone_fine: bool = False) -> Path:
    """Move everything into a folder of its own beside; return that.

    Raises:
        NotFound: there is nothing.
        Conflict: a daemon is using it, or it is no cluster's.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        raise NotFound(f"there is nothing in {directory}")
    if not (directory / "identity").exists() and not is_alone_fine:
        raise Conflict(
            f"{directory} is of a member that is alone: nobody else has what is in it", hint="--even-alone forgets it"
        )
    lock = lock_folder(directory)
    try:
        aside = directory.with_name(f"{directory.name}.damaged-{int(clock.now_s())}")
        aside.mkdir(mode=0o700)
        for path in directory.iterdir():
            if path.name != "lock":
                path.rename(aside / path.name)
    finally:
        os.close(lock)
    return aside


def main(arguments: Sequence[str] | None = None) -> int:
    """Set the files aside; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m discovery.rebuild", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--state-dir", type=Path, required=True, metavar="DIR", help="the member's folder")
    parser.add_argument("--even-alone", action="store_true", help="also forget what nobody else has")
    given = parser.parse_args(arguments)
    try:
        aside = set_aside(given.state_dir, is_alone_fine=given.even_alone)
    except ServiceError as error:
        print(f"{error.message}{f' ({error.hint})' if error.hint else ''}", file=sys.stderr)  # noqa: T201 — a command
        return error.exit_code
    print(f"set aside in {aside}; the member comes back from its peers when it starts")  # noqa: T201 — a command
    return 0


if __name__ == "__main__":
    sys.exit(main())
