"""Reads a Procfile: one `type: command` a line.

Pure. Refuses a line that is none, a type that is no process type, and a type given twice, each with
its line number, because a Procfile that was half understood runs half an app. Blank lines and lines
that start with `#` are skipped. Called by `compile`; standard library only.
"""

from __future__ import annotations

import re

from buildpack.refusals import BuildRefused

_TYPE = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,30}[a-z0-9])?", re.IGNORECASE)  # as controller.types parses it
_HINT = "each line is `type: command`, for example `web: node server.js`"


def parse(raw: bytes) -> dict[str, str]:
    """Return the command of each process type, in the file's order.

    Raises:
        BuildRefused: names the first line that is wrong.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw[: error.start].count(b"\n") + 1
        raise BuildRefused(f"Procfile line {number}: not UTF-8 text", _HINT) from error
    types: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            name, command = _entry(number, line)
            if name in types:
                raise BuildRefused(f"Procfile line {number}: process type {name!r} is declared twice", _HINT)
            types[name] = command
    return types


def _entry(number: int, line: str) -> tuple[str, str]:
    name, colon, command = line.partition(":")
    name, command = name.strip(), command.strip()
    if not colon:
        raise BuildRefused(f"Procfile line {number}: no colon in {_short(line)}", _HINT)
    if not _TYPE.fullmatch(name):
        raise BuildRefused(
            f"Procfile line {number}: {_short(name)} is no process type",
            "a process type is 1 to 32 letters, digits, dashes and underscores",
        )
    if not command:
        raise BuildRefused(f"Procfile line {number}: no command after {name!r}", _HINT)
    if "\0" in command:
        raise BuildRefused(f"Procfile line {number}: a zero byte in the command", _HINT)
    return name, command


def _short(text: str) -> str:
    return repr(text.strip() if len(text.strip()) <= 60 else text.strip()[:57] + "...")
