"""A fake controller, a home folder of its own, and a way to type commands."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from controller.cli.main import main
from tests.controller.cli.fake import KEY, Controller, serving


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


class Shell:
    """Types `flynn …` in this process: as fast as tests should be."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: str) -> Done:
        self.capsys.readouterr()
        code = main(list(words))
        captured = self.capsys.readouterr()
        return Done(code, captured.out, captured.err)

    def ok(self, *words: str) -> str:
        done = self(*words)
        assert done.code == 0, done
        return done.out


@pytest.fixture
def controller() -> Controller:
    return Controller()


@pytest.fixture
def url(controller: Controller) -> Iterator[str]:
    with serving(controller) as address:
        yield address


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without anything, outside any git repository."""
    for name in [name for name in os.environ if name.startswith(("FLYNN", "GIT_", "SSH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bare(home: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    """A shell that knows no cluster."""
    return Shell(capsys)


@pytest.fixture
def flynn(bare: Shell, home: Path, url: str) -> Shell:
    """A shell that knows the fake cluster."""
    (home / ".flynnrc").write_text(
        f'default = "default"\n\n[[cluster]]\nname = "default"\nurl = "{url}"\n'
        f'key = "{KEY}"\ngit_address = "git.example.test:2222"\n'
    )
    (home / ".flynnrc").chmod(0o600)
    return bare


@pytest.fixture
def repository(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository, and we are in it."""
    folder = home / "work"
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    monkeypatch.chdir(folder)
    return folder
