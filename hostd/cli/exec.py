"""Run one more program inside a living job, at our terminal or left alone."""

from __future__ import annotations

import argparse
import os
from typing import Any

import msgspec

from hostd.cli.command import add
from hostd.cli.connect import caller_of, job_path, labels_of
from hostd.types import ExecSpec, ExecStarted

_DETAILS = """The exit status is the program's own, 128+N if signal N ended it. It runs as the job does: its user, its
limits, its files, its environment (and what -e adds). With -t every key goes to the program, Ctrl-C too. Without it
SIGINT, SIGTERM and the like are passed on, and the third Ctrl-C leaves. A program whose `hostd exec` has gone is ended:
SIGHUP, then SIGKILL 3 seconds later. With -d it stays until the job (or hostd) ends, and what it prints is dropped."""


def execute(arguments: argparse.Namespace) -> int:
    args = arguments.args[1:] if arguments.args[:1] == ["--"] else arguments.args
    from discovery.wire import terminal

    caller = caller_of(arguments)
    rows, columns = terminal.size(0) if arguments.tty else (24, 80)
    env = {"TERM": os.environ["TERM"]} if arguments.tty and "TERM" in os.environ else {}
    spec = ExecSpec(
        args=tuple(args),
        env=env | labels_of(arguments.env),
        working_dir=arguments.workdir,
        user=arguments.user,
        has_tty=arguments.tty,
        rows=rows,
        columns=columns,
        has_stdin=arguments.stdin or arguments.tty,
    )
    path = job_path(arguments.id) + "/exec"
    if arguments.detach:
        print(caller.request("POST", path, into=ExecStarted, body=spec).id)
        return 0
    stdin = 0 if spec.has_stdin else None
    return terminal.attach(caller, path, has_tty=spec.has_tty, stdin=stdin, first=msgspec.json.encode(spec).decode())


def declare(commands: Any) -> None:
    """Add this command."""
    example = "hostd exec -t run-0123456789ab -- /bin/sh"
    run = add(commands, "exec", execute, "run a program inside a running job", example, details=_DETAILS)
    run.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    run.add_argument("-i", "--stdin", action="store_true", help="send it our stdin")
    run.add_argument("-d", "--detach", action="store_true", help="print its id and leave it running")
    run.add_argument("-e", "--env", action="append", default=[], metavar="KEY=VALUE", help="environment variable")
    run.add_argument("-w", "--workdir", "--cwd", default="", metavar="DIR", help="working directory")
    run.add_argument("-u", "--user", default="", metavar="UID[:GID]", help="user, as numbers (default: the job's)")
    run.add_argument("id", metavar="ID")
    run.add_argument("args", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")
