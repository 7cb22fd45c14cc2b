from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.controller.cli.conftest import Shell
from tests.controller.cli.fake import Controller


@pytest.fixture
def app(controller: Controller) -> str:
    controller.add_app("example")
    controller.add_release("example", env={"COLOUR": "blue"})
    controller.add_job("example")
    return "example"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["rel"], ["release"]),
        (["route", ""], ["add", "list", "remove"]),
        (["route", "add", ""], ["http", "tcp"]),
        (["-a", ""], ["example"]),
        (["info", "-a", "ex"], ["example"]),
        (["-c", ""], ["default"]),
        (["-a", "example", "scale", "w"], ["web=", "worker="]),
        (["-a", "example", "kill", ""], ["job0003"]),
        (["-a", "example", "env", "get", ""], ["COLOUR"]),
        (["-a", "example", "env", "set", "C"], ["COLOUR="]),
        (["ps", "--js"], ["--json"]),
        (["cluster", "remove", ""], ["default"]),
        (["completion", "b"], ["bash"]),
        (["nosuch", ""], []),
        (["-a", "nosuch", "kill", ""], []),
    ],
)
def test_words(flynn: Shell, app: str, typed: list[str], offered: list[str]) -> None:
    assert flynn.ok("completion", "words", "--", *typed).split() == offered


def test_without_a_cluster_nothing_is_offered_and_nothing_breaks(bare: Shell) -> None:
    assert bare.ok("completion", "words", "--", "-a", "") == ""
    assert bare.ok("completion", "words", "--", "kill", "") == ""


def test_bash_asks_us(flynn: Shell, app: str, home: Path) -> None:
    (home / "flynn").write_text(f'#!/bin/sh\nexec {sys.executable} -m controller.cli.main "$@"\n')
    (home / "flynn").chmod(0o755)
    ask = 'COMP_WORDS=(flynn -a example scale wo); COMP_CWORD=4; _flynn; echo "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", f"source <(flynn completion bash); {ask}"],
        env={**os.environ, "PATH": f"{home}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == "worker=\n"


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_parses_the_script(bare: Shell) -> None:
    subprocess.run(["zsh", "-n"], input=bare.ok("completion", "zsh"), text=True, check=True)
