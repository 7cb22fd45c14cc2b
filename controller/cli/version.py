"""`flynn version`."""

from __future__ import annotations

from argparse import Namespace

from controller.cli.command import Command
from controller.cli.session import Session
from discovery.wire.version import VERSION


def show(_: Session, arguments: Namespace) -> None:
    """Print the version."""
    from controller.cli import output

    if arguments.is_json:
        output.print_json({"version": VERSION})
    else:
        print(f"flynn {VERSION}")


COMMANDS = (
    Command("version", "print the version of this command", "flynn version", show, has_json=True, needs_cluster=False),
)
