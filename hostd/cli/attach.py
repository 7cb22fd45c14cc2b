"""Be the terminal of a job that runs already."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hostd.cli.command import add
from hostd.cli.connect import caller_of, job_path
from hostd.types import Job


def attach_job(arguments: argparse.Namespace) -> int:
    from discovery.wire import terminal

    caller = caller_of(arguments)
    job = caller.request("GET", job_path(arguments.id), into=Job)
    path = job_path(arguments.id) + "/attach" + ("?logs=true" if arguments.logs else "")
    has_input = job.spec.has_stdin or job.spec.has_tty
    stdin = 0 if has_input else None
    keys = terminal.detach_keys_of(arguments.detach_keys)
    aside = job_path(arguments.id) + "/signal"
    status = terminal.attach(caller, path, has_tty=job.spec.has_tty, stdin=stdin, detach_keys=keys, signal_path=aside)
    return left(status, arguments.id)


def left(status: int, job_id: str) -> int:
    """Say so if the person has detached; return the exit status."""
    from discovery.wire import terminal

    if status != terminal.DETACHED:
        return status
    print(f"\ndetached; `hostd attach {job_id}` comes back", file=sys.stderr)
    return 0


def add_detach_keys(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says what to type to leave a job's terminal."""
    parser.add_argument(
        "--detach-keys",
        default="ctrl-p,ctrl-q",
        metavar="KEYS",
        help='what to type on a terminal to leave the job running ("": nothing; default: ctrl-p,ctrl-q)',
    )


def declare(commands: Any) -> None:
    attach = add(commands, "attach", attach_job, "attach to a running job", "hostd attach run-0123456789ab")
    attach.add_argument("id", metavar="ID")
    add_detach_keys(attach)
    attach.add_argument("--logs", action="store_true", help="first print what it has printed so far")
