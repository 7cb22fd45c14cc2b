"""Speaks Heroku's contract for our own buildpacks: `detect BUILD`, `compile BUILD CACHE ENV`, `release BUILD`.

Each pack module gives three functions to `main`; exit status 1 of `detect` means "not mine".
Standard library only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from buildpack import output
from buildpack.refusals import BuildRefused


@dataclass(frozen=True)
class Workshop:
    """Where a pack works: the app, its cache, the app's environment, and what programs are started with."""

    app: Path
    cache: Path
    app_environment: Mapping[str, str]
    environment: Mapping[str, str]

    def write_profile(self, name: str, text: str) -> None:
        """Leave a script that every process of the app reads before it starts."""
        folder = self.app / ".profile.d"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.sh").write_text(text, encoding="utf-8")


def read_env_dir(folder: Path) -> dict[str, str]:
    """Return the app's environment from one file a variable."""
    return {path.name: path.read_text("utf-8", "replace") for path in folder.iterdir() if path.is_file()}


def _outer() -> dict[str, str]:
    """Return our environment without the path to our own code: the app's tools must not find it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def main(
    detect: Callable[[Path], str | None],
    compile: Callable[[Workshop], None],
    release: Callable[[Path], Mapping[str, str]],
) -> None:
    """Do what the command line asks and exit."""
    match sys.argv[1:]:
        case ["detect", app]:
            shown = detect(Path(app))
            if shown is None:
                sys.exit(1)
            sys.stdout.write(shown + "\n")
        case ["compile", app, cache, environment]:
            try:
                compile(Workshop(Path(app), Path(cache), read_env_dir(Path(environment)), _outer()))
            except BuildRefused as error:
                output.refuse(error)
                sys.exit(1)
        case ["release", app]:
            sys.stdout.write("---\ndefault_process_types:\n")
            for name, command in release(Path(app)).items():
                sys.stdout.write(f"  {name}: '{command.replace(chr(39), chr(39) * 2)}'\n")
        case _:
            sys.stderr.write("usage: detect BUILD | compile BUILD CACHE ENV | release BUILD\n")
            sys.exit(64)
