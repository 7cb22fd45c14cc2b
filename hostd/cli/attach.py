"""Be the terminal of a job that runs already."""

from __future__ import annotations

import argparse
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
    return terminal.attach(caller, path, has_tty=job.spec.has_tty, stdin=0 if has_input else None)


def declare(commands: Any) -> None:
    attach = add(commands, "attach", attach_job, "attach to a running job", "hostd attach run-0123456789ab")
    attach.add_argument("id", metavar="ID")
    attach.add_argument("--logs", action="store_true", help="first print what it has printed so far")
