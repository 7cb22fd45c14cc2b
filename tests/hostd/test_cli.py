"""The command explains itself, exits as its errors say, and finds its neighbours."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.cli import main as cli
from hostd.cli.job import signal_number
from hostd.cli.main import NOUNS


def commands(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield (*path, name), child
                yield from commands(child, (*path, name))


LEAVES = [(path, parser) for path, parser in commands(cli.parser()) if parser.epilog]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOSTD_CONFIG": "/nonexistent", **environment}
    return subprocess.run([sys.executable, "-m", "hostd.cli", *words], capture_output=True, text=True, env=env)


def test_every_command_is_there() -> None:
    assert {" ".join(path) for path, _ in LEAVES} >= {
        "daemon", "up", "down", "ps", "run", "log", "stop", "signal", "inspect", "status", "attach", "forget",
        "image list", "image build", "image inspect", "image import", "image pull", "image login",
        "image logout", "image rm", "image prune", "image ls", "volume list", "volume remove", "version",
    }  # fmt: skip


@pytest.mark.parametrize(("path", "parser"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
def test_help_has_an_example_that_parses_and_the_exit_codes(
    path: tuple[str, ...], parser: argparse.ArgumentParser
) -> None:
    text = parser.format_help()
    assert "exit codes:" in text
    example = text.partition("example:\n")[2].splitlines()[0].split()
    assert example[0] == "hostd"
    cli.parser().parse_args(example[1:])


@pytest.mark.parametrize("words", [["ps"], ["status"], ["version"], ["image", "list"], ["volume", "list"]])
def test_reading_commands_take_json(words: list[str]) -> None:
    assert cli.parser().parse_args([*words, "--json"]).json


def test_a_node_that_is_not_there_is_69_with_a_hint(tmp_path: Path) -> None:
    done = run("--run-dir", str(tmp_path), "ps")
    assert done.returncode == 69
    assert done.stderr.startswith("hostd: ")
    assert "Traceback" not in done.stderr


def test_bad_settings_are_64_and_named() -> None:
    done = run("ps", HOSTD_BRIDGE="much too long for a bridge")
    assert done.returncode == 64
    assert "bridge" in done.stderr


def test_wrong_arguments_are_64() -> None:
    done = run("signal", "only-one")
    assert (done.returncode, done.stdout) == (64, "")
    assert "usage: hostd signal" in done.stderr


def test_an_unknown_word_runs_the_neighbour_of_that_name(tmp_path: Path) -> None:
    neighbour = tmp_path / "hostd-greet"
    neighbour.write_text("#!/bin/sh\necho hello $1\nexit 9\n")
    neighbour.chmod(0o755)
    done = run("greet", "you", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (9, "hello you\n")


def test_an_unknown_word_without_neighbour_is_66() -> None:
    done = run("nosuchword")
    assert done.returncode == 66
    assert "nosuchword" in done.stderr


@pytest.mark.parametrize("name", ["HUP", "SIGHUP", "1", "hup"])
def test_signals_have_names_and_numbers(name: str) -> None:
    assert signal_number(name) == 1


def test_starting_is_quick() -> None:
    code = "import sys, hostd.cli.main as m; m.main(['version']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not [
        name for name in ("aiohttp", "asyncio", "pyroute2", "wsproto", "hostd.cli.job") if f"'{name}'" in done.stdout
    ]


def test_each_file_declares_what_the_table_says() -> None:
    files: dict[str, set[str]] = {}
    for noun, file in NOUNS.items():
        files.setdefault(file, set()).add(noun)
    for file, nouns in files.items():
        assert {path[0] for path, _ in commands(cli.parser([next(iter(nouns))]))} == nouns, file
