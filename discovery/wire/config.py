"""One table of settings feeds the config file, the environment, the flags, `--help` and the reference page.

Later sources win: default, file (TOML), environment (`PREFIX_NAME`), flag (`--name`). Unknown keys in
the file are errors, so that a typing mistake never passes for a setting.
"""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discovery.wire.errors import Invalid


@dataclass(frozen=True)
class Setting:
    """One setting; `parse` turns text into its value and raises `ValueError` for nonsense."""

    name: str
    default: Any
    parse: Callable[[str], Any]
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, settings: Sequence[Setting]) -> None:
    """Add one flag a setting; a flag that is not given stays `None`."""
    for setting in settings:
        shown = setting.default if setting.default not in ("", None) else "none"
        parser.add_argument(setting.flag, dest=setting.name, metavar="VALUE", help=f"{setting.help} (default: {shown})")


def load(
    settings: Sequence[Setting],
    *,
    prefix: str,
    file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return every setting's value by name.

    Raises:
        Invalid: the file does not parse or has unknown keys, or a value is nonsense; says which and where.
    """
    table = {setting.name: setting for setting in settings}
    values = {setting.name: setting.default for setting in settings}
    sources: list[tuple[str, Mapping[str, Any]]] = []
    if file is not None and file.exists():
        try:
            content = tomllib.loads(file.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise Invalid(f"{file} does not parse: {error}") from error
        if unknown := sorted(set(content) - set(table)):
            raise Invalid(f"{file}: unknown setting {unknown[0]!r}", hint="known: " + ", ".join(sorted(table)))
        sources.append((str(file), content))
    named = {
        name: environment[f"{prefix}_{name.upper()}"] for name in table if f"{prefix}_{name.upper()}" in environment
    }
    sources.append(("environment", named))
    sources.append(
        ("flag", {name: value for name, value in (flags or {}).items() if name in table and value is not None})
    )
    for where, found in sources:
        for name, value in found.items():
            try:
                values[name] = table[name].parse(value) if isinstance(value, str) else value
            except ValueError as error:
                raise Invalid(f"{where}: {name}={value!r}: {error}", hint=table[name].help) from error
    return values


def to_bool(text: str) -> bool:
    """Read a switch.

    Raises:
        ValueError: the text is none of 1 0 true false yes no.
    """
    known = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in known:
        raise ValueError("expected true or false")
    return known[text.lower()]
