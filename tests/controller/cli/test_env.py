from __future__ import annotations

import json

import pytest

from tests.controller.cli.conftest import Shell
from tests.controller.cli.fake import Controller


@pytest.fixture
def app(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> str:
    controller.add_app("example")
    controller.add_release("example", env={"COLOUR": "blue", "A": "1"}, meta={"git": "abc"})
    monkeypatch.setenv("FLYNN_APP", "example")
    return "example"


def current(controller: Controller) -> dict[str, str]:
    return controller.releases[controller.find("example").id][-1].env


def test_list_and_get(flynn: Shell, app: str) -> None:
    assert flynn.ok("env") == "A=1\nCOLOUR=blue\n"
    assert json.loads(flynn.ok("env", "--json")) == {"A": "1", "COLOUR": "blue"}
    assert flynn.ok("env", "get", "COLOUR") == "blue\n"
    assert flynn.ok("env", "get", "COLOUR", "--json") == '"blue"\n'
    assert flynn("env", "get", "NOPE").code == 66


def test_set_makes_a_release_and_deploys_it(flynn: Shell, controller: Controller, app: str) -> None:
    lines = flynn.ok("env", "set", "COLOUR=red=ish", "EMPTY=", "B=x y").splitlines()
    assert current(controller) == {"A": "1", "COLOUR": "red=ish", "EMPTY": "", "B": "x y"}
    assert lines[0] == "Created release v2"
    assert [line.split(" ==> ")[1] for line in lines[1:-1]] == ["web job0099 starting", "web job0099 up"]
    assert lines[-1].startswith("Deployed v2 in ")
    release = controller.releases[controller.find("example").id][-1]
    assert (release.artifact_ids, release.meta, set(release.processes)) == (
        ("slug1",),
        {"git": "abc"},
        {"web", "worker"},
    )


def test_unset(flynn: Shell, controller: Controller, app: str) -> None:
    flynn.ok("env", "unset", "A")
    assert current(controller) == {"COLOUR": "blue"}
    assert flynn("env", "unset", "NOPE").code == 66


def test_of_one_process_type(flynn: Shell, controller: Controller, app: str) -> None:
    flynn.ok("env", "set", "-t", "worker", "QUEUE=q")
    release = controller.releases[controller.find("example").id][-1]
    assert release.processes["worker"].env == {"QUEUE": "q"}
    assert release.env == {"COLOUR": "blue", "A": "1"}
    assert flynn.ok("env", "-t", "worker") == "QUEUE=q\n"
    done = flynn("env", "set", "-t", "nosuch", "X=1")
    assert (done.code, "web, worker" in done.err) == (66, True)


def test_no_change_is_no_release(flynn: Shell, controller: Controller, app: str) -> None:
    assert flynn.ok("env", "set", "A=1") == "nothing to change\n"
    assert len(controller.releases[controller.find("example").id]) == 1


def test_before_the_first_push_it_is_kept_for_it(flynn: Shell, controller: Controller) -> None:
    controller.add_app("fresh")
    assert flynn.ok("-a", "fresh", "env") == ""
    assert flynn.ok("-a", "fresh", "env", "set", "X=1") == "Created release v1\n"
    assert controller.find("fresh").release_id
    assert controller.deployments == []


def test_a_failed_deployment_says_so_and_is_1(flynn: Shell, controller: Controller, app: str) -> None:
    controller.trouble.add("deploy")
    done = flynn("env", "set", "X=1")
    assert done.code == 1
    assert done.err.splitlines()[0] == "flynn: deploying v2 failed: web job0099 crashed with exit status 1"
    assert "the release before serves on" in done.err


def test_a_restart_of_the_controller_repeats_no_line(flynn: Shell, controller: Controller, app: str) -> None:
    controller.trouble.add("cut")
    lines = flynn.ok("env", "set", "X=1").splitlines()
    assert [line.split()[-1] for line in lines[1:-1]] == ["starting", "up"]


@pytest.mark.parametrize("word", ["X", "=1", "1X=1", "A B=1", "A-B=1"])
def test_nonsense_is_refused(flynn: Shell, controller: Controller, app: str, word: str) -> None:
    assert flynn("env", "set", word).code == 64
    assert controller.requests == []
