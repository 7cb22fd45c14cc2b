"""`flynn env list|get|set|unset`: an app's environment; every change is a new release that is deployed."""

from __future__ import annotations

import re
from argparse import Namespace

import msgspec

from controller.cli import output
from controller.cli.app import current_release
from controller.cli.command import Command, Parser
from controller.cli.deployment import deploy
from controller.cli.session import Session
from controller.types import NewRelease, ProcessType, Release, ReleaseRef
from discovery.wire.errors import Invalid, NotFound

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def parse_key(text: str) -> str:
    """Accept a variable's name.

    Raises:
        Invalid: it is none.
    """
    if not _KEY.fullmatch(text):
        raise Invalid(f"{text!r} is not a variable's name", hint="letters, digits and underscores, no digit first")
    return text


def parse_assignments(texts: list[str]) -> dict[str, str]:
    """Read `K=V` words; a value may be empty and may contain `=`.

    Raises:
        Invalid: a word is no K=V.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign:
            raise Invalid(f"{text!r} is not K=V", hint="such as: flynn env set COLOUR=blue")
        if "\0" in value:
            raise Invalid(f"the value of {key} has a NUL character")
        pairs[parse_key(key)] = value
    return pairs


def _env(session: Session, kind: str) -> dict[str, str]:
    release = current_release(session)
    if release is None:
        return {}
    return _process(release, kind).env if kind else release.env


def _process(release: Release | None, kind: str) -> ProcessType:
    known = release.processes if release else {}
    if kind not in known:
        raise NotFound(f"no process type {kind!r}", hint=f"there are: {', '.join(sorted(known)) or 'none yet'}")
    return known[kind]


def show(session: Session, arguments: Namespace) -> None:
    """Print the variables, sorted."""
    env = _env(session, arguments.type)
    if arguments.is_json:
        output.print_json(env)
    else:
        print("".join(f"{key}={value}\n" for key, value in sorted(env.items())), end="")


def get(session: Session, arguments: Namespace) -> None:
    """Print one variable's value."""
    key = parse_key(arguments.key)
    env = _env(session, arguments.type)
    if key not in env:
        raise NotFound(f"{key} is not set", hint="`flynn env` lists what is")
    output.print_json(env[key]) if arguments.is_json else print(env[key])


def set_(session: Session, arguments: Namespace) -> None:
    """Set variables."""
    _change(session, arguments.type, parse_assignments(arguments.assignments), ())


def unset(session: Session, arguments: Namespace) -> None:
    """Remove variables."""
    keys = tuple(parse_key(key) for key in arguments.keys)
    present = _env(session, arguments.type)
    if missing := [key for key in keys if key not in present]:
        raise NotFound(f"{missing[0]} is not set", hint="`flynn env` lists what is")
    _change(session, arguments.type, {}, keys)


def _change(session: Session, kind: str, added: dict[str, str], removed: tuple[str, ...]) -> None:
    current = current_release(session)
    process = _process(current, kind) if kind else None
    before = process.env if process else (current.env if current else {})
    after = {key: value for key, value in (before | added).items() if key not in removed}
    if after == before and current is not None:
        print("nothing to change")
        return
    release = session.ask("POST", session.path("releases"), Release, changed(current, kind, after))
    print(f"Created release v{release.number}", flush=True)
    if current is None:  # nothing was pushed yet: the first push finds it and keeps it
        session.ask("PUT", session.path("release"), Release, ReleaseRef(release_id=release.id))
    else:
        deploy(session, release)


def changed(current: Release | None, kind: str, env: dict[str, str]) -> NewRelease:
    """Return what the next release is: the current one with another environment (of one process type)."""
    if current is None:
        return NewRelease(artifact_ids=(), env=env)
    processes = dict(current.processes)
    if kind:
        processes[kind] = msgspec.structs.replace(processes[kind], env=env)
    return NewRelease(
        artifact_ids=current.artifact_ids, env=current.env if kind else env, processes=processes, meta=current.meta
    )


def _type_option(parser: Parser) -> None:
    parser.add_argument("-t", "--type", metavar="TYPE", default="", help="of this process type only")


def _get_options(parser: Parser) -> None:
    _type_option(parser)
    parser.add_argument("key", metavar="KEY")


def _set_options(parser: Parser) -> None:
    _type_option(parser)
    parser.add_argument("assignments", metavar="K=V", nargs="+")


def _unset_options(parser: Parser) -> None:
    _type_option(parser)
    parser.add_argument("keys", metavar="KEY", nargs="+")


_DEPLOYS = "Makes a release and deploys it: new jobs come up before the old ones go."

COMMANDS = (
    Command("env list", "print the app's variables", "flynn env", show, _type_option, has_json=True, needs_app=True),
    Command(
        "env get",
        "print one variable's value",
        "flynn env get COLOUR",
        get,
        _get_options,
        has_json=True,
        needs_app=True,
    ),
    Command(
        "env set", "set variables", "flynn env set COLOUR=blue SIZE=2", set_, _set_options, _DEPLOYS, needs_app=True
    ),
    Command("env unset", "remove variables", "flynn env unset COLOUR", unset, _unset_options, _DEPLOYS, needs_app=True),
)
