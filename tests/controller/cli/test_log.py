from __future__ import annotations

import json

import pytest

from hostd.types import LogLine
from tests.controller.cli.conftest import Shell
from tests.controller.cli.fake import Controller


@pytest.fixture
def app(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> str:
    controller.add_app("example")
    monkeypatch.setenv("FLYNN_APP", "example")
    controller.lines = [
        LogLine(
            job_id="job1", sequence=0, at=1700000000.5, stream=1, text="Listening on 55000", labels={"type": "web"}
        ),
        LogLine(job_id="job1", sequence=1, at=1700000001, stream=2, text="a warning", labels={"type": "web"}),
        LogLine(job_id="job2", sequence=0, at=1700000002, stream=1, text="done", labels={"type": ""}),
        LogLine(job_id="job1", sequence=2, at=1700000003, stream=0, text="stopped", labels={"type": "web"}),
    ]
    return "example"


def test_lines_say_when_and_who(flynn: Shell, app: str) -> None:
    assert flynn.ok("log").splitlines() == [
        "2023-11-14T22:13:20.500Z app[web.job1]: Listening on 55000",
        "2023-11-14T22:13:21.000Z app[web.job1]: a warning",
        "2023-11-14T22:13:22.000Z app[run.job2]: done",
        "2023-11-14T22:13:23.000Z flynn[web.job1]: stopped",
    ]


def test_filters(flynn: Shell, controller: Controller, app: str) -> None:
    assert flynn.ok("log", "-r", "-j", "job2") == "done\n"
    assert flynn.ok("log", "-r", "-t", "web", "-n", "1") == "stopped\n"
    assert "GET /apps/example/log?type=web&lines=1" in controller.requests


def test_one_offs_are_the_type_run(flynn: Shell, app: str) -> None:
    assert flynn.ok("log", "-r", "-t", "run") == "done\n"


def test_no_history_but_what_comes(flynn: Shell, controller: Controller, app: str) -> None:
    flynn.ok("log", "-f", "-n", "0")
    assert "GET /apps/example/log?lines=0&follow=1" in controller.requests


def test_stderr_can_be_split_off(flynn: Shell, app: str) -> None:
    done = flynn("log", "-r", "-s")
    assert done.err == "a warning\n"
    assert "warning" not in done.out


def test_json_is_a_line_each(flynn: Shell, app: str) -> None:
    assert [json.loads(line)["text"] for line in flynn.ok("log", "--json", "-n", "2").splitlines()] == [
        "done",
        "stopped",
    ]


def test_following_survives_a_restart_without_loss_or_repetition(
    flynn: Shell, controller: Controller, app: str
) -> None:
    controller.trouble.add("cut")
    assert flynn.ok("log", "-f", "-r") == "Listening on 55000\na warning\ndone\nstopped\n"
    assert "GET /apps/example/log?lines=20&follow=1" in controller.requests


def test_without_follow_a_break_is_an_error(flynn: Shell, controller: Controller, app: str) -> None:
    controller.trouble.add("cut")
    assert flynn("log").code == 69


@pytest.mark.parametrize("lines", ["-3", "x"])
def test_nonsense_lines_are_refused(flynn: Shell, app: str, lines: str) -> None:
    assert flynn("log", "-n", lines).code == 64
