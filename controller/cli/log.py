"""`flynn log`: an app's log, all jobs merged, past or live."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TextIO

from controller.cli import output
from controller.cli.command import Command, Parser
from controller.cli.session import Session
from discovery.wire import clock
from discovery.wire.errors import Invalid, Unavailable
from hostd.types import LogLine

FOLLOWED_LINES = 20
AWAY_S = 30.0
STDERR = 2


def _options(parser: Parser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", dest="is_followed", help="go on with what comes")
    parser.add_argument("-j", "--job", metavar="JOB", default="", help="only this job")
    parser.add_argument(
        "-n",
        "--lines",
        metavar="N",
        type=int,
        help=f"only the last N lines (default: all kept; with -f {FOLLOWED_LINES})",
    )
    parser.add_argument("-r", "--raw", action="store_true", dest="is_raw", help="only the text, no time and job")
    parser.add_argument("-s", "--split-stderr", action="store_true", dest="is_split", help="the jobs' stderr to stderr")
    parser.add_argument("-t", "--type", metavar="TYPE", help="only this process type (`run` for one-off jobs)")


def query_of(arguments: Namespace) -> dict[str, str]:
    """Return the question to the controller.

    Raises:
        Invalid: -n is negative.
    """
    lines = FOLLOWED_LINES if arguments.lines is None and arguments.is_followed else arguments.lines
    if lines is not None and lines < 0:
        raise Invalid(f"-n {lines}: not a number of lines", hint="a whole number from 0")
    query = {"job": arguments.job} if arguments.job else {}
    if arguments.type is not None:
        query["type"] = "" if arguments.type == "run" else arguments.type  # a one-off has no type
    if lines is not None:
        query["lines"] = str(lines)
    return query | ({"follow": "1"} if arguments.is_followed else {})


def log(session: Session, arguments: Namespace) -> None:
    """Print the log; a follower survives a restart of the controller without losing or repeating a line."""
    query = query_of(arguments)
    last: dict[str, int] = {}
    heard = clock.monotonic_s()
    while True:
        try:
            for line in session.follow(session.path("log"), LogLine, query):
                heard = clock.monotonic_s()
                if line.sequence > last.get(line.job_id, -1):
                    last[line.job_id] = line.sequence
                    _print(line, arguments)
            sys.stdout.flush()
            return
        except Unavailable:
            if not arguments.is_followed or not last or clock.monotonic_s() - heard > AWAY_S:
                raise
            _pause()
            query.pop("lines", None)  # whatever came meanwhile; what we have is left out above


def _pause() -> None:
    import time

    time.sleep(0.5)


def _print(line: LogLine, arguments: Namespace) -> None:
    stream: TextIO = sys.stderr if arguments.is_split and line.stream == STDERR else sys.stdout
    if arguments.is_json:
        import msgspec

        text = msgspec.json.encode(line).decode()
    else:
        text = line.text if arguments.is_raw else f"{prefix(line)} {line.text}"
    stream.write(text + "\n")
    if arguments.is_followed:
        stream.flush()


def prefix(line: LogLine) -> str:
    """Say when, who and which job: `2026-11-23T08:18:38.123Z app[web.ID]:`; the platform's own word is `flynn[…]`."""
    who = "app" if line.stream else "flynn"
    kind = line.labels.get("type")  # missing where the host does not say
    job = line.job_id if kind is None else f"{kind or 'run'}.{line.job_id}"
    return f"{output.utc(line.at)} {who}[{job}]:"


COMMANDS = (
    Command(
        "log",
        "show or follow an app's log",
        "flynn log -f -t web",
        log,
        _options,
        description="Times are UTC. --json prints one object a line.",
        has_json=True,
        needs_app=True,
    ),
)
