"""What a job has printed."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec

from hostd.cli.command import add
from hostd.cli.connect import caller_of, job_path
from hostd.types import LogLine


def show_log(arguments: argparse.Namespace) -> int:
    query = {"follow": "true"} if arguments.follow else {}
    query |= {"lines": str(arguments.lines)} if arguments.lines is not None else {}
    for line in caller_of(arguments).events(job_path(arguments.id) + "/log", LogLine, query):
        if arguments.json:
            print(msgspec.json.encode(line).decode(), flush=True)
            continue
        at = datetime.fromtimestamp(line.at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z "
        out = sys.stderr if line.stream == 2 else sys.stdout
        print((at if arguments.time else "") + line.text, file=out, flush=True)
    return 0


def declare(commands: Any) -> None:
    log = add(commands, "log", show_log, "print a job's log", "hostd log -f -n 20 run-0123456789ab", has_json=True)
    log.add_argument("id", metavar="ID")
    log.add_argument("-f", "--follow", action="store_true", help="go on with what comes")
    log.add_argument("-n", "--lines", type=int, metavar="COUNT", help="only the last so many lines")
    log.add_argument("-t", "--time", action="store_true", help="begin each line with its time (UTC)")
