"""The documents stay true: what they name exists, versions agree, nothing names a mirror."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

from discovery.wire.version import VERSION

ROOT = Path(__file__).parent.parent


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def test_the_changelog_names_the_version() -> None:
    assert f"## {VERSION}" in text_of("CHANGELOG.md")


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", text_of("Makefile"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", text_of("README.md") + text_of("CONTRIBUTING.md")))
    assert named <= targets | {"git"}


def test_every_function_that_the_architecture_names_exists() -> None:
    named = re.findall(
        r"`((?:netns|rootfs|discovery|hostd|router|controller|buildpack)(?:\.\w+)+)`", text_of("ARCHITECTURE.md")
    )
    assert len(named) > 20
    for name in named:
        resolve(name)


def resolve(name: str) -> object:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            assert hasattr(found, part), f"ARCHITECTURE.md names {name}, which does not exist"
            found = getattr(found, part)
        return found
    raise AssertionError(f"ARCHITECTURE.md names {name}, which does not exist")


def test_nothing_names_a_mirror_or_registry_host() -> None:
    hosts = [
        "deb" + ".debian.org",
        "pypi" + ".org",
        "registry.npmjs" + ".org",
        "files.python" + "hosted",
        "security" + ".debian.org",
    ]
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, files):
        try:
            content = text_of(name)
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        assert not [host for host in hosts if host in content], name


def test_the_readme_shows_what_was_measured() -> None:
    """After a change to bench/results.json: bench/run --readme."""
    from bench import report

    rows = report.load()
    assert report.readme(rows) == text_of("README.md")
    assert report.picture(rows) == text_of("docs/bench.svg")
    for row in rows:
        assert f"`{row.name}`" in text_of("bench/README.md"), f"bench/README.md does not say what {row.name} is"


def test_every_room_file_begins_with_what_it_is_for() -> None:
    for room in ("netns", "rootfs", "discovery", "hostd", "router", "controller", "buildpack"):
        for path in (ROOT / room).rglob("*.py"):
            content = path.read_text()
            assert path.name != "__init__.py" or content == "", f"{path}: __init__.py stays empty"
            assert not content or re.match(r'(#!.*\n)?(#.*\n)*r?"""', content), f"{path} has no docstring"
