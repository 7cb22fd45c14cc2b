"""The developer's command `flynn`: finds the command, runs it, turns every error into two lines and an exit code.

Each noun's module is imported only when its command is called: starting fast is a feature.
The article's spellings with dashes (`flynn key-add`, `route-add-http`, `server-add`) are the same commands.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

from controller.cli.command import EXIT_CODES, Command, Failed
from discovery.wire.errors import Invalid, ServiceError

if TYPE_CHECKING:
    import argparse

NOUNS: dict[str, tuple[str, str]] = {
    "cluster": ("cluster", "say which clusters there are: list, add, remove, default"),
    "key": ("key", "say who may push: list, add, remove"),
    "create": ("app", "make an app, and its git remote"),
    "apps": ("app", "list the apps"),
    "info": ("app", "show an app's addresses and state"),
    "delete": ("app", "remove an app and all that belongs to it"),
    "scale": ("scale", "show or set how many processes run"),
    "ps": ("job", "list an app's jobs"),
    "kill": ("job", "stop jobs"),
    "run": ("job", "run a one-off job, at your terminal or detached"),
    "log": ("log", "show or follow an app's log"),
    "env": ("env", "configure an app: list, get, set, unset"),
    "route": ("route", "bring traffic to an app: list, add http, add tcp, remove"),
    "release": ("release", "an app's versions: list, show, rollback"),
    "deployment": ("deployment", "moves from release to release: list, show, timeout"),
    "completion": ("completion", "print the completion script for bash or zsh"),
    "version": ("version", "print the version"),
}
ALIASES = {"server": "cluster", "keys": "key", "routes": "route", "releases": "release", "deployments": "deployment"}
DEFAULT_VERB = "list"

USAGE = "usage: flynn [-a APP] [-c CLUSTER] COMMAND …"


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code; never raises, never prints a traceback."""
    try:
        _print_anything()
        code = run(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (ServiceError, Failed) as error:
        return _report(error.message, error.hint, error.exit_code)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the flush at exit does not complain again
        return 141
    except SystemExit as stop:  # argparse, after --help
        return int(stop.code or 0)
    except UnicodeEncodeError:
        return _report("an argument is not valid UTF-8", "", Invalid.exit_code)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _report(f"{error.strerror or error}", "", 74)
    except Exception as error:  # the command's main is one of the three homes of this
        if os.environ.get("FLYNN_DEBUG"):
            raise
        return _report(
            f"internal error: {type(error).__name__}: {error}", "FLYNN_DEBUG=1 shows where; please report", 70
        )
    return code


def _print_anything() -> None:
    """Let no terminal's character set stop us: what it cannot show becomes `?`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _report(message: str, hint: str, code: int) -> int:
    with suppress(OSError, AttributeError):
        sys.stdout.flush()
    print(f"flynn: {message}" + (f"\n  hint: {hint}" if hint else ""), file=sys.stderr)
    return code


def run(argv: list[str]) -> int:
    """Find the command in `argv` and run it.

    Raises:
        Invalid: there is no such command, or its arguments are wrong.
    """
    app, cluster, words = _globals(argv)
    if not words or words[0] in ("-h", "--help") or words == ["help"]:
        print(overview())
        return 0
    if words[0] == "help":
        words = [*words[1:], "--help"]
    command, rest = find(words)
    if command is None:
        print(group_help(ALIASES.get(words[0], words[0])))
        return 0
    arguments = parse(command, rest)
    from controller.cli.session import Session

    session = Session(
        app=getattr(arguments, "app", None) or app, cluster=getattr(arguments, "cluster", None) or cluster
    )
    return command.run(session, arguments) or 0


def parse(command: Command, rest: list[str]) -> argparse.Namespace:
    """Parse the arguments after the command's words."""
    return command.parser().parse_args(rest)


def _globals(argv: list[str]) -> tuple[str, str, list[str]]:
    """Take the options before the command: app, cluster, and what is left."""
    found = {"app": "", "cluster": ""}
    names = {"-a": "app", "--app": "app", "-c": "cluster", "--cluster": "cluster"}
    rest = list(argv)
    while rest and rest[0].startswith("-") and rest[0] not in ("-h", "--help"):
        flag, has_value, value = rest.pop(0).partition("=")
        if flag == "--version":
            return "", "", ["version"]
        if flag not in names:
            raise Invalid(f"unknown option {flag}", hint=USAGE)
        if not has_value:
            if not rest:
                raise Invalid(f"{flag} needs a value", hint=USAGE)
            value = rest.pop(0)
        found[names[flag]] = value
    return found["app"], found["cluster"], rest


def commands(noun: str) -> tuple[Command, ...]:
    """Return the commands that begin with `noun`."""
    module = import_module(f"controller.cli.{NOUNS[noun][0]}")
    return tuple(c for c in module.COMMANDS if c.words.split()[0] == noun)


def find(words: list[str]) -> tuple[Command | None, list[str]]:
    """Return the command that `words` begin with and the arguments after it; `None` when only a group's help is asked.

    Raises:
        Invalid: there is none; the hint has the nearest.
    """
    noun = ALIASES.get(words[0], words[0])
    if noun not in NOUNS and "-" in noun:
        first, *others = noun.split("-")
        if ALIASES.get(first, first) in NOUNS:
            return find([first, *others, *words[1:]])
    if noun not in NOUNS:
        raise Invalid(f"no command {words[0]!r}", hint=_nearest(words[0], list(NOUNS)))
    known = {tuple(c.words.split()): c for c in commands(noun)}
    spelled = (noun, *words[1:])
    for length in (3, 2, 1):
        if spelled[:length] in known and len(spelled) >= length:
            return known[spelled[:length]], list(spelled[length:])
    rest = list(spelled[1:])
    if rest and rest[0] in ("-h", "--help"):
        return None, []
    if (noun, DEFAULT_VERB) in known and (not rest or rest[0].startswith("-")):
        return known[(noun, DEFAULT_VERB)], rest
    verbs = sorted(" ".join(key[1:]) for key in known)
    given = " ".join([noun, *rest[:1]])
    raise Invalid(f"no command {given!r}", hint=f"flynn {noun} takes: {', '.join(verbs)}")


def _nearest(word: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean `flynn {close[0]}`?" if close else "`flynn --help` lists the commands"


def overview() -> str:
    """Return what `flynn --help` prints."""
    width = max(map(len, NOUNS))
    lines = [
        USAGE,
        "",
        "Run apps: git push, scale, route.",
        "",
        "commands:",
        *(f"  {noun.ljust(width)}  {summary}" for noun, (_, summary) in NOUNS.items()),
        "",
        "options:",
        "  -a APP, --app APP              the app (else FLYNN_APP, else the git remote)",
        "  -c CLUSTER, --cluster CLUSTER  the cluster (else FLYNN_CLUSTER, else the git remote's, else the default)",
        "",
        "Spelled with a dash they are the same: flynn key-add, flynn route-add-http, flynn server-add.",
        "The configuration is ~/.flynnrc (FLYNNRC says where else). `flynn COMMAND --help` says more.",
        "",
        "example:",
        "  flynn create example && git push flynn master && flynn scale web=3",
        "",
        EXIT_CODES,
    ]
    return "\n".join(lines)


def group_help(noun: str) -> str:
    """Return what `flynn NOUN --help` prints for a noun with several commands."""
    members = commands(noun)
    width = max(len(c.words) for c in members)
    default = f"`flynn {noun}` alone is `flynn {noun} {DEFAULT_VERB}`. "
    has_default = any(c.words == f"{noun} {DEFAULT_VERB}" for c in members)
    lines = [
        f"usage: flynn {noun} COMMAND …",
        "",
        NOUNS[noun][1].split(":")[0].capitalize() + ".",
        "",
        "commands:",
        *(f"  flynn {c.words.ljust(width)}  {c.summary}" for c in members),
        "",
        f"{default if has_default else ''}`flynn {members[0].words} --help` says more.",
        "",
        "example:",
        f"  {members[min(1, len(members) - 1)].example}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
