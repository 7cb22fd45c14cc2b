"""`flynn scale`: show or set how many processes of each type run, and watch it happen."""

from __future__ import annotations

import time
from argparse import Namespace
from collections import Counter

from controller.cli import output
from controller.cli.command import Command, Failed, Parser
from controller.cli.session import Session
from controller.types import ActualJob, Formation, Scale, parse_process_type
from discovery.wire import clock
from discovery.wire.errors import DeadlineExceeded, Invalid, Unavailable

ENDED = ("down", "crashed", "failed")
FAILURES_UNTIL_GIVING_UP = 5
POLL_S = (0.1, 0.5)
AWAY_S = 30.0


def _options(parser: Parser) -> None:
    parser.add_argument("counts", metavar="TYPE=N", nargs="*", help="how many of a process type to run, from 0")
    parser.add_argument("-n", "--no-wait", action="store_true", dest="is_unwatched", help="return at once")
    parser.add_argument("-r", "--release", metavar="RELEASE", default="", help="id or vN (default: the current one)")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=120.0, help="how long to wait (default: 120)"
    )


def parse_counts(texts: list[str]) -> dict[str, int]:
    """Read `web=3 worker=1`.

    Raises:
        Invalid: a word is no TYPE=N, N is no whole number from 0, or a type is named twice.
    """
    counts: dict[str, int] = {}
    for text in texts:
        kind, sign, number = text.partition("=")
        if not sign:
            raise Invalid(f"{text!r} is not TYPE=N", hint="such as: flynn scale web=3")
        parse_process_type(kind)
        if not (number.isascii() and number.isdigit()) or len(number) > 6:
            raise Invalid(f"{text!r}: {number!r} is not a number of processes", hint="a whole number from 0 to 999999")
        if kind in counts:
            raise Invalid(f"process type {kind!r} is named twice")
        counts[kind] = int(number)
    return counts


def scale(session: Session, arguments: Namespace) -> None:
    """Show the formation, or change it."""
    wanted = parse_counts(arguments.counts)
    release = _release_id(session, arguments.release)
    present = next(
        (
            f.processes
            for f in session.ask("GET", session.path("formations"), list[Formation])
            if f.release_id == release
        ),
        {},
    )
    if not wanted:
        _show(present, is_json=arguments.is_json)
        return
    seen: dict[str, str] = {job.id: job.state for job in _jobs(session)}
    body = Scale(processes=wanted, release_id=release if arguments.release else "")
    formation = session.ask("PUT", session.path("scale"), Formation, body)
    changed = {kind: n for kind, n in wanted.items() if present.get(kind, 0) != n}
    if arguments.is_json:
        output.print_json(formation)
    elif not changed:
        print("requested scale equals current scale, nothing to do!")
    else:
        print("scaling " + ", ".join(f"{kind}: {present.get(kind, 0)}=>{n}" for kind, n in changed.items()), flush=True)
    if changed and not arguments.is_unwatched:
        _watch(session, formation, changed, seen, arguments)


def _release_id(session: Session, text: str) -> str:
    from controller.types import App, Release

    if text:
        return session.ask("GET", session.path("releases", text), Release).id
    return session.ask("GET", session.path(), App).release_id


def _show(counts: dict[str, int], *, is_json: bool) -> None:
    if is_json:
        output.print_json(counts)
    else:
        print(
            " ".join(f"{kind}={n}" for kind, n in sorted(counts.items())) or "nothing is scaled; try: flynn scale web=1"
        )


def _jobs(session: Session) -> list[ActualJob]:
    return session.caller.request("GET", session.path("jobs"), into=list[ActualJob], query={"all": "1"})


def _watch(
    session: Session, formation: Formation, wanted: dict[str, int], seen: dict[str, str], arguments: Namespace
) -> None:
    """Print every change of state until the counts are reached."""
    started = clock.monotonic_s()
    heard, pause_s = started, POLL_S[0]
    failures: Counter[str] = Counter()
    with output.Waiting(", ".join(f"{kind}={n}" for kind, n in wanted.items())) as waiting:
        while True:
            now = clock.monotonic_s()
            try:
                jobs = [job for job in _jobs(session) if job.type in wanted]
                heard = now
            except Unavailable:
                if now - heard > AWAY_S:
                    raise
                jobs = None
            for job in sorted(jobs or (), key=lambda job: job.created_at):
                if seen.get(job.id) == job.state:
                    continue
                seen[job.id] = job.state
                failures[job.type] += job.state in ("crashed", "failed")
                if not arguments.is_json:
                    waiting.line(job_line(job))
            if jobs is not None and _is_reached(jobs, formation.release_id, wanted):
                break
            _give_up(failures, now - started, arguments.timeout)
            time.sleep(pause_s)
            pause_s = min(POLL_S[1], pause_s * 1.3)
    if not arguments.is_json:
        print(f"scale completed in {clock.monotonic_s() - started:.2f} s")


def _is_reached(jobs: list[ActualJob], release_id: str, wanted: dict[str, int]) -> bool:
    alive = Counter(job.type for job in jobs if job.state not in ENDED)
    serving = Counter(job.type for job in jobs if job.state == "up" and job.release_id == release_id)
    return all(alive[kind] == serving[kind] == count for kind, count in wanted.items())


def _give_up(failures: Counter[str], waited_s: float, timeout_s: float) -> None:
    for kind, count in failures.items():
        if count >= FAILURES_UNTIL_GIVING_UP:
            raise Failed(
                f"{kind} failed {count} times; it is being tried again, more and more slowly",
                f"flynn log -t {kind} -n 50",
            )
    if waited_s > timeout_s:
        raise DeadlineExceeded(
            f"the scale was not reached in {timeout_s:g} s", hint="it goes on without us: flynn ps, flynn log"
        )


def job_line(job: ActualJob) -> str:
    """Say one change of a job's state, with the time when we saw it (a job does not record when it came up)."""
    why = f" (exit status {job.exit_status})" if job.state == "crashed" and job.exit_status is not None else ""
    why += f": {job.error}" if job.error else ""
    return f"{output.time_of_day(clock.now_s())} ==> {job.type or 'run'} {job.id} {job.state}{why}"


COMMANDS = (
    Command(
        "scale",
        "show or set how many processes of each type run",
        "flynn scale web=3 worker=1",
        scale,
        _options,
        description="Types that are not named keep their count. Prints each job's changes until the scale is reached.",
        has_json=True,
        needs_app=True,
    ),
)
