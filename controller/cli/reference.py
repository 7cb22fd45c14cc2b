"""Writes `docs/cli.md` from the commands themselves: `python -m controller.cli.reference > docs/cli.md`.

A test compares the two, so that the page is never out of date.
"""

from __future__ import annotations

import os
import sys

from controller.cli import main
from controller.cli.command import EXIT_CODES, Command

HEAD = """\
# The `flynn` command

<!-- Generated: python -m controller.cli.reference > docs/cli.md -->

`flynn [-a APP] [-c CLUSTER] COMMAND …` speaks to a cluster's controller. The cluster comes from `-c`, else
`FLYNN_CLUSTER`, else the git remote's, else the default of `~/.flynnrc` (`FLYNNRC` says where else). The app
comes from `-a`, else `FLYNN_APP`, else the git remote. Spelled with a dash a command is the same:
`flynn key-add`, `flynn route-add-http`, `flynn server-add` (= `cluster add`).

Every reading command takes `--json`. Errors are two lines on stderr, `flynn: MESSAGE` and a hint.
"""


def page() -> str:
    """Return the whole page."""
    os.environ["COLUMNS"] = "100"  # argparse wraps by it
    parts = [HEAD, "```text", EXIT_CODES, "```", ""]
    for noun, (_, summary) in main.NOUNS.items():
        parts += [f"## {noun}", "", summary[0].upper() + summary[1:] + ".", ""]
        for command in main.commands(noun):
            parts += section(command)
    return "\n".join(parts).rstrip() + "\n"


def section(command: Command) -> list[str]:
    """Return what the page says of one command: its `--help`, but for the exit codes."""
    text = command.parser().format_help().replace("\n" + EXIT_CODES, "").rstrip()
    return [f"### flynn {command.words}", "", "```text", text, "```", ""]


if __name__ == "__main__":
    sys.stdout.write(page())
