"""`flynn ps`, `kill`, `run`: an app's jobs, and one-off jobs at your terminal."""

from __future__ import annotations

import os
import shlex
import sys
from argparse import REMAINDER, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from controller.cli import output
from controller.cli.app import number_of
from controller.cli.command import Command, Parser
from controller.cli.env import parse_assignments
from controller.cli.session import Session
from controller.types import ActualJob, NewJob, Release
from discovery.wire.errors import Invalid, ServiceError, Unavailable


def _ps_options(parser: Parser) -> None:
    parser.add_argument(
        "-a", "--all", action="store_true", dest="is_all", help="ended jobs too, with their exit status"
    )
    parser.add_argument("-c", "--command", action="store_true", dest="has_command", help="show the commands")
    parser.add_argument("-q", "--quiet", action="store_true", dest="is_quiet", help="only ids")
    parser.add_argument("-t", "--type", metavar="TYPE", help="only this process type (`run` for one-off jobs)")


def ps(session: Session, arguments: Namespace) -> None:
    """List an app's jobs."""
    query = {"all": "1"} if arguments.is_all else {}
    jobs = session.ask("GET", session.path("jobs"), list[ActualJob], query=query)
    jobs = [job for job in jobs if arguments.type in (None, job.type or "run")]
    if arguments.is_json:
        output.print_json(jobs)
        return
    jobs.sort(key=lambda job: (job.type, job.created_at))
    if arguments.is_quiet:
        print("".join(f"{job.id}\n" for job in jobs), end="")
        return
    releases = session.ask("GET", session.path("releases"), list[Release]) if jobs else []
    header = ["ID", "TYPE", "STATE", "CREATED", "RELEASE"]
    header += (["EXIT"] if arguments.is_all else []) + (["COMMAND"] if arguments.has_command else [])
    output.table(header, [_row(job, releases, arguments) for job in jobs])


def _row(job: ActualJob, releases: list[Release], arguments: Namespace) -> list[str]:
    row = [job.id, job.type or "run", job.state, output.age(job.created_at), number_of(releases, job.release_id)]
    if arguments.is_all:
        row.append("" if job.exit_status is None else str(job.exit_status))
    if arguments.has_command:
        row.append(shlex.join(job.args))
    return row


def kill(session: Session, arguments: Namespace) -> None:
    """Stop jobs; those of the formation are replaced."""
    for job in arguments.jobs:
        session.ask("DELETE", session.path("jobs", _id(job)))
        print(f"Job {job} killed")


def _id(text: str) -> str:
    from hostd.types import parse_job_id

    return parse_job_id(text)


def _kill_options(parser: Parser) -> None:
    parser.add_argument("jobs", metavar="JOB", nargs="+", help="id, as `flynn ps` shows it")


def _run_options(parser: Parser) -> None:
    parser.usage = "flynn run [options] [--] COMMAND [ARGUMENT …]"
    parser.add_argument(
        "-d", "--detached", action="store_true", dest="is_detached", help="return at once; print the job's id"
    )
    parser.add_argument("-e", "--env", metavar="K=V", action="append", default=[], help="set a variable for this job")
    parser.add_argument(
        "-l", "--enable-log", action="store_true", dest="has_log", help="keep its output in the app's log"
    )
    parser.add_argument("-r", "--release", metavar="RELEASE", default="", help="id or vN (default: the current one)")
    parser.add_argument(
        "-T", "--no-tty", action="store_true", dest="is_plain", help="no terminal for the job, even at one"
    )
    parser.add_argument(
        "command", metavar="COMMAND", nargs=REMAINDER, help="program and arguments; -- before it is fine"
    )


def run(session: Session, arguments: Namespace) -> int:
    """Run a one-off job and be its terminal; returns its exit status."""
    args = tuple(arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command)
    if not args:
        raise Invalid("no command is given", hint="such as: flynn run bash")
    job = session.ask("POST", session.path("jobs"), ActualJob, new_job(session, args, arguments))
    if arguments.is_detached:
        print(job.id)
        if sys.stderr.isatty():
            output.note(f"It runs in the background. Its log: flynn log -f -j {job.id}")
        return 0
    from discovery.wire import terminal

    try:
        with _stdin() as stdin, output.Waiting(f"job {job.id}") as waiting:
            return terminal.attach(
                session.caller,
                session.path("jobs", job.id, "attach"),
                has_tty=_has_tty(arguments),
                stdin=stdin,
                on_open=waiting.stop,
            )
    except Unavailable as error:
        error.hint = error.hint or f"the job is {job.id}: flynn ps, flynn kill {job.id}"
        raise
    except ServiceError:
        _stop_quietly(session, job.id)
        raise


def new_job(session: Session, args: tuple[str, ...], arguments: Namespace) -> NewJob:
    """Say which job is wanted."""
    env = parse_assignments(arguments.env)
    release = session.ask("GET", session.path("releases", arguments.release), Release).id if arguments.release else ""
    rows, columns = 24, 80
    if _has_tty(arguments):
        from discovery.wire import terminal

        rows, columns = terminal.size()
        env = {"TERM": os.environ.get("TERM", "xterm")} | env
    return NewJob(
        args=args,
        release_id=release,
        env=env,
        has_tty=_has_tty(arguments),
        rows=rows,
        columns=columns,
        is_detached=arguments.is_detached,
        has_log=arguments.has_log or arguments.is_detached,
    )


def _has_tty(arguments: Namespace) -> bool:
    return not arguments.is_plain and not arguments.is_detached and sys.stdin is not None and _both_terminals()


def _both_terminals() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


@contextmanager
def _stdin() -> Iterator[int]:
    """Yield a descriptor to read: ours, or nothing at all when we were started without one."""
    if sys.stdin is not None:
        yield sys.stdin.fileno()
        return
    with Path(os.devnull).open("rb") as nothing:
        yield nothing.fileno()


def _stop_quietly(session: Session, job: str) -> None:
    try:
        session.caller.request("DELETE", session.path("jobs", job))
    except ServiceError:
        pass  # it is gone, or was never there


COMMANDS = (
    Command(
        "ps",
        "list an app's jobs",
        "flynn ps",
        ps,
        _ps_options,
        description="STATE is pending, starting, up (healthy), stopping; with -a also down, crashed, failed.",
        has_json=True,
        needs_app=True,
        is_app_short=False,
    ),
    Command(
        "kill",
        "stop jobs; the scheduler replaces those of the formation",
        "flynn kill ID",
        kill,
        _kill_options,
        needs_app=True,
    ),
    Command(
        "run",
        "run a one-off job with the app's code and environment",
        "flynn run -- python -c 'import sys; sys.exit(42)'",
        run,
        _run_options,
        description="At a terminal the job has one, too (resize, Ctrl-C, colours). Otherwise stdin, stdout and\n"
        "stderr are piped and signals passed on. The exit code is the job's, 128+N if signal N ended it.",
        needs_app=True,
    ),
)
