from __future__ import annotations

import io
import sys

import pytest

from controller.cli import output
from discovery.wire import clock
from tests.controller.cli.conftest import Shell
from tests.controller.cli.fake import Controller


@pytest.mark.parametrize(
    ("passed_s", "text"),
    [(0, "just now"), (1, "1 second ago"), (59, "59 seconds ago"), (61, "1 minute ago"), (7200, "2 hours ago"),
     (90000, "1 day ago"), (86400 * 70, "2 months ago"), (86400 * 800, "2 years ago")],
)  # fmt: skip
def test_age(passed_s: int, text: str) -> None:
    assert output.age(clock.now_s() - passed_s) == text


def test_never_has_no_age() -> None:
    assert output.age(0) == ""


def test_table_is_aligned_without_trailing_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("A", "LONG", ""), [("xxx", "y", ""), ("", "", "z")])
    assert capsys.readouterr().out == "A    LONG\nxxx  y\n           z\n"


def test_a_slow_answer_shows_a_sign_of_life(
    flynn: Shell, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "QUIET_S", 0.3)
    controller.slow_s = 1.0
    done = flynn("apps")
    assert done.code == 0
    assert "... waiting for the controller (" in done.err
    assert done.out.startswith("ID")


def test_a_quick_answer_shows_none(flynn: Shell) -> None:
    assert flynn("apps").err == ""


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_is_a_spinner_that_goes_away(
    flynn: Shell, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(output, "QUIET_S", 0.2)
    controller.slow_s = 0.8
    flynn.ok("apps")
    assert " waiting for the controller (" in screen.getvalue()
    assert screen.getvalue().endswith("\r\x1b[K")
