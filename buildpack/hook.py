"""The pre-receive hook: hands git's list of changed refs to the daemon and shows what it says.

Started by path by `git receive-pack`, standard library only, so that it costs nothing. Speaks to
`HOSTD_PUSH_SOCKET`: one JSON line there (`token`, `updates`, `environment`), then JSON lines back (`text`
to show, at last `status` to exit with). No last line means that the daemon is gone: the push is refused.
"""

from __future__ import annotations

import json
import os
import socket
import sys

PASSED_ON = ("GIT_DIR", "GIT_QUARANTINE_PATH", "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES")


def main() -> int:
    """Ask the daemon; return the exit status."""
    request = {
        "token": os.environ.get("HOSTD_PUSH_TOKEN", ""),
        "updates": sys.stdin.read().splitlines(),
        "environment": {name: os.environ[name] for name in PASSED_ON if name in os.environ},
    }
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(os.environ["HOSTD_PUSH_SOCKET"])
        connection.sendall(json.dumps(request).encode() + b"\n")
        for line in connection.makefile("rb"):
            message = json.loads(line)
            if "status" in message:
                return int(message["status"])
            sys.stdout.write(message["text"] + "\n")
            sys.stdout.flush()
    except (OSError, ValueError, KeyError):
        pass
    sys.stdout.write(" !     git-receive has stopped in the middle; push again\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
