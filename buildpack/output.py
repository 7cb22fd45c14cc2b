"""Speaks to the pusher from inside the build job, in the shape that Heroku's buildpacks use.

A step starts with an arrow, what belongs to it is indented by seven spaces, a refusal is marked by
an exclamation mark. Every line is flushed, so that it is on the pusher's terminal while the work goes on.
Standard library only.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from buildpack.refusals import BuildRefused

ARROW = "-----> "
INDENT = "       "
MARK = " !     "


def _say(prefix: str, text: str) -> None:
    for line in text.splitlines() or [""]:
        sys.stdout.write(f"{prefix}{line}".rstrip() + "\n")
    sys.stdout.flush()


def step(text: str) -> None:
    """Begin a step."""
    _say(ARROW, text)


def detail(text: str) -> None:
    """Add to the current step."""
    _say(INDENT, text)


def warn(text: str) -> None:
    """Say what will probably be a problem, and go on."""
    _say(MARK, text)


def refuse(error: BuildRefused) -> None:
    """Show why there will be no slug."""
    _say(MARK, error.message)
    if error.hint:
        _say(MARK, error.hint)


def follow(
    command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], prefix: str = INDENT, silent: bool = False
) -> int:
    """Run a program with its output, both streams, shown line by line behind `prefix`; return its exit status.

    `silent` keeps the output back and shows it only if the program fails.

    Raises:
        BuildRefused: the program cannot be started.
    """
    kept: list[str] = []
    try:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise BuildRefused(f"{command[0]} cannot be started: {error.strerror}") from error
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if silent:
                kept.append(line)
            else:
                _say(prefix, line.rstrip("\r\n"))
    if process.returncode != 0:
        for line in kept:
            _say(prefix, line.rstrip("\r\n"))
    return process.returncode


def run(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    otherwise: str,
    hint: str = "",
    silent: bool = False,
) -> None:
    """Run a program as `follow` does, and take a failure for the build's.

    Raises:
        BuildRefused: with `otherwise` and `hint`, when the exit status is not 0.
    """
    status = follow(command, cwd=cwd, environment=environment, silent=silent)
    if status != 0:
        raise BuildRefused(f"{otherwise} (exit status {status})", hint)
