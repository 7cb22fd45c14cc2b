"""`flynn version`."""

from __future__ import annotations

from argparse import Namespace

from controller.cli.command import Command
from controller.cli.session import Session


def installed() -> str:
    """Return the version of the installed distribution."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hostd")
    except PackageNotFoundError:
        return "unknown"


def show(_: Session, arguments: Namespace) -> None:
    """Print the version."""
    from controller.cli import output

    if arguments.is_json:
        output.print_json({"version": installed()})
    else:
        print(f"flynn {installed()}")


COMMANDS = (
    Command("version", "print the version of this command", "flynn version", show, has_json=True, needs_cluster=False),
)
