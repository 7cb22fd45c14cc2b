"""`flynn release list|show|rollback`: an app's versions."""

from __future__ import annotations

import re
import shlex
import sys
from argparse import Namespace

from controller.cli import output
from controller.cli.app import current_release
from controller.cli.command import Command, Failed, Parser
from controller.cli.deployment import deploy
from controller.cli.session import Session
from controller.types import App, Release
from discovery.wire.errors import Conflict, Invalid, NotFound

_RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}")


def parse_release(text: str) -> str:
    """Accept a release's id or `vN`.

    Raises:
        Invalid: it is neither.
    """
    if not _RELEASE.fullmatch(text):
        raise Invalid(f"release {text!r}", hint="an id or vN, as `flynn release` lists them")
    return text


def show_all(session: Session, arguments: Namespace) -> None:
    """List the releases, newest first."""
    releases = session.ask("GET", session.path("releases"), list[Release])
    releases.sort(key=lambda release: -release.number)
    if arguments.is_json:
        output.print_json(releases)
        return
    current = session.ask("GET", session.path(), App).release_id
    rows = [
        (f"v{one.number}", one.id, output.age(one.created_at), "current" if one.id == current else "")
        for one in releases
    ]
    output.table(("VERSION", "ID", "CREATED", ""), rows)


def show(session: Session, arguments: Namespace) -> None:
    """Show one release; the environment's values only in JSON."""
    if arguments.release:
        release = session.ask("GET", session.path("releases", parse_release(arguments.release)), Release)
    elif (found := current_release(session)) is not None:
        release = found
    else:
        raise NotFound("the app has no release yet", hint="git push flynn master")
    if arguments.is_json:
        output.print_json(release)
        return
    print(f"Version:  v{release.number}\nID:       {release.id}\nCreated:  {output.utc(release.created_at)}")
    for artifact in release.artifact_ids:
        print(f"Artifact: {artifact}")
    for kind, process in sorted(release.processes.items()):
        print(f"Process:  {kind}: {shlex.join(process.args)}")
    if release.env:
        print(f"Env:      {' '.join(sorted(release.env))}")


def rollback(session: Session, arguments: Namespace) -> None:
    """Deploy an earlier release."""
    current = current_release(session)
    if arguments.release:
        target = session.ask("GET", session.path("releases", parse_release(arguments.release)), Release)
    else:
        target = _before(session, current)
    if current is not None and target.id == current.id:
        raise Conflict(f"v{target.number} is the current release", hint="`flynn release` lists the others")
    if not arguments.is_yes and sys.stdin.isatty():
        name = f"v{current.number}" if current else "nothing"
        if not output.is_asked(f"Roll back from {name} to v{target.number}?", flag="-y"):
            raise Failed("nothing was rolled back")
    deploy(session, target)


def _before(session: Session, current: Release | None) -> Release:
    releases = session.ask("GET", session.path("releases"), list[Release])
    older = [one for one in releases if current is not None and one.number < current.number and one.artifact_ids]
    if not older:
        raise NotFound("there is no earlier release to roll back to", hint="`flynn release` lists them")
    return max(older, key=lambda one: one.number)


def _release_option(parser: Parser) -> None:
    parser.add_argument("release", metavar="RELEASE", nargs="?", help="id or vN (default: the current one)")


def _rollback_options(parser: Parser) -> None:
    parser.add_argument("release", metavar="RELEASE", nargs="?", help="id or vN (default: the one before the current)")
    parser.add_argument("-y", "--yes", action="store_true", dest="is_yes", help="do not ask")


COMMANDS = (
    Command(
        "release list", "list an app's releases, newest first", "flynn release", show_all, has_json=True, needs_app=True
    ),
    Command(
        "release show", "show a release", "flynn release show v3", show, _release_option, has_json=True, needs_app=True
    ),
    Command(
        "release rollback",
        "deploy an earlier release",
        "flynn release rollback v2",
        rollback,
        _rollback_options,
        description="New jobs come up before the old ones go. At a terminal it asks first.",
        needs_app=True,
    ),
)
