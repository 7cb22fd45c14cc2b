"""How a noun's file declares its commands: each with a sentence, one real example and the exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from discovery.wire.errors import Invalid

Command = Callable[[argparse.Namespace], int]
EXIT_CODES = (
    "exit codes: 0 done, 64 bad input, 66 not found, 69 not reachable, 70 internal error, 73 exists, 75 conflict,"
    " 77 not allowed; `run` exits with the job's own"
)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises instead of exiting with 2."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments.

        Raises:
            Invalid: always.
        """
        raise Invalid(message, hint=self.format_usage().strip())


def add(
    commands: Any, name: str, act: Command, summary: str, example: str, *, has_json: bool = False, details: str = ""
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + "." + (f"\n\n{details}" if details else ""),
        epilog=f"example:\n  {example}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(act=act)
    if has_json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
