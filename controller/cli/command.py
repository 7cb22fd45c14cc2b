"""One command as a value: its words, its sentence, its example, its options and what it does.

`main` finds and runs it, `completion` offers it, `reference` writes it down, the tests try its
example: all from the same value. Wrong usage is `Invalid`, like every other wrong input.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from discovery.wire.errors import Invalid

if TYPE_CHECKING:
    from controller.cli.session import Session

EXIT_CODES = (
    "exit codes: 0 done, 1 tried and failed, 64 wrong input, 66 not found, 69 not reachable or too slow,\n"
    "70 internal error, 73 exists already, 74 cannot write, 75 not now (conflict), 77 not allowed, 130 interrupted"
)


class Failed(Exception):
    """The thing was tried and did not work out (exit code 1); not an error of the request."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises instead of exiting with 2."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments.

        Raises:
            Invalid: always.
        """
        raise Invalid(message, hint=f"usage: {' '.join(self.format_usage().split()[1:])}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Says `-g, --git HOST:PORT`, as Python does from 3.13 on, under every Python."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {action.metavar}"


def no_options(_: Parser) -> None:
    """Take no arguments."""


@dataclass(frozen=True)
class Command:
    """One command. `words` is how it is spelled (`route add http`); `run` returns an exit code or `None` for 0."""

    words: str
    summary: str
    example: str
    run: Callable[[Session, argparse.Namespace], int | None]
    options: Callable[[Parser], None] = no_options
    description: str = ""
    has_json: bool = False
    needs_app: bool = False
    needs_cluster: bool = True
    is_app_short: bool = True

    def parser(self) -> Parser:
        """Make the parser of this command, `--help` included."""
        text = self.summary[0].upper() + self.summary[1:] + "."
        parser = Parser(
            prog=f"flynn {self.words}",
            description=text + (f"\n\n{self.description}" if self.description else ""),
            epilog=f"example:\n  {self.example.replace(chr(10), chr(10) + '  ')}\n\n{EXIT_CODES}",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self.options(parser)
        if self.needs_app:
            flags = ("-a", "--app") if self.is_app_short else ("--app",)
            parser.add_argument(*flags, dest="app", metavar="APP", help="the app (else FLYNN_APP, else the git remote)")
        if self.needs_cluster:
            parser.add_argument(
                "--cluster", metavar="CLUSTER", help="the cluster (else FLYNN_CLUSTER, else the default)"
            )
        if self.has_json:
            parser.add_argument("--json", action="store_true", dest="is_json", help="print JSON")
        return parser
