from __future__ import annotations

import json
import re

import pytest

from tests.controller.cli.conftest import Shell
from tests.controller.cli.fake import Controller

LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3} ==> web job\d{4} (pending|starting|up|stopping|down|crashed)")


@pytest.fixture
def app(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> str:
    controller.add_app("example")
    controller.add_release("example")
    monkeypatch.setenv("FLYNN_APP", "example")
    return "example"


def test_up_prints_every_change_until_reached(flynn: Shell, app: str) -> None:
    lines = flynn.ok("scale", "web=3").splitlines()
    assert lines[0] == "scaling web: 0=>3"
    assert all(LINE.match(line) for line in lines[1:-1])
    assert [line.split()[-1] for line in lines[1:-1]].count("up") == 3
    assert re.fullmatch(r"scale completed in \d+\.\d\d s", lines[-1])


def test_down_waits_until_the_jobs_are_gone(flynn: Shell, app: str) -> None:
    flynn.ok("scale", "web=3")
    lines = flynn.ok("scale", "web=1").splitlines()
    assert lines[0] == "scaling web: 3=>1"
    assert [line.split()[-1] for line in lines[1:-1]] == ["stopping", "stopping", "down", "down"]


def test_the_same_scale_is_nothing_to_do(flynn: Shell, app: str) -> None:
    flynn.ok("scale", "web=1")
    assert flynn.ok("scale", "web=1") == "requested scale equals current scale, nothing to do!\n"


def test_without_counts_it_is_shown(flynn: Shell, app: str) -> None:
    assert "nothing is scaled" in flynn.ok("scale")
    flynn.ok("scale", "web=1", "worker=2")
    assert flynn.ok("scale") == "web=1 worker=2\n"
    assert json.loads(flynn.ok("scale", "--json")) == {"web": 1, "worker": 2}


def test_no_wait_returns_at_once(flynn: Shell, controller: Controller, app: str) -> None:
    controller.trouble.add("stuck")
    assert flynn.ok("scale", "-n", "web=2") == "scaling web: 0=>2\n"


def test_a_release_may_be_named(flynn: Shell, app: str) -> None:
    assert flynn("scale", "-r", "v1", "web=1").code == 0
    assert flynn("scale", "-r", "v9", "web=1").code == 66


@pytest.mark.parametrize(
    "counts", ["web=-1", "web", "web=", "web=x", "web=1.5", "=1", "we b=1", "web=٣", "web=9999999"]
)
def test_nonsense_never_reaches_the_controller(flynn: Shell, controller: Controller, app: str, counts: str) -> None:
    done = flynn("scale", counts)
    assert done.code == 64
    assert done.err.startswith("flynn: ")
    assert controller.requests == []


def test_a_type_named_twice_is_refused(flynn: Shell, app: str) -> None:
    assert flynn("scale", "web=1", "web=2").code == 64


def test_an_unknown_type_is_told(flynn: Shell, app: str) -> None:
    done = flynn("scale", "nosuch=1")
    assert (done.code, done.err.splitlines()[1]) == (64, "  hint: it has: web, worker")


def test_before_the_first_push_the_hint_says_push(flynn: Shell, controller: Controller) -> None:
    controller.add_app("empty")
    done = flynn("-a", "empty", "scale", "web=1")
    assert done.code == 75
    assert "git push flynn master" in done.err


def test_crashes_are_told_and_waiting_ends(flynn: Shell, controller: Controller, app: str) -> None:
    controller.trouble.add("crash")
    done = flynn("scale", "web=1")
    assert done.code == 1
    assert "crashed (exit status 1)" in done.out
    assert "flynn log -t web" in done.err


def test_a_scale_that_is_not_reached_is_a_timeout(flynn: Shell, controller: Controller, app: str) -> None:
    controller.trouble.add("stuck")
    done = flynn("scale", "--timeout", "0.3", "web=1")
    assert done.code == 69
    assert "flynn ps" in done.err


def test_a_restart_of_the_controller_in_between_is_ridden_out(flynn: Shell, controller: Controller, app: str) -> None:
    flynn.ok("scale", "-n", "web=0")
    original = controller.scale

    async def then_away(call: object) -> object:
        controller.trouble.add("away")
        return await original(call)  # type: ignore[arg-type]

    for resource in (flynn, controller):
        assert resource
    controller.scale = then_away  # type: ignore[method-assign, assignment]
    assert flynn("scale", "web=1").code == 0
