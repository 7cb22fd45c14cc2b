from __future__ import annotations

import json

import pytest

from tests.controller.cli.conftest import Shell
from tests.controller.cli.fake import Controller


@pytest.fixture
def app(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> str:
    controller.add_app("example")
    for number in range(3):
        controller.add_release("example", env={"N": str(number)})
    monkeypatch.setenv("FLYNN_APP", "example")
    return "example"


def test_list_is_newest_first(flynn: Shell, app: str) -> None:
    lines = flynn.ok("release").splitlines()
    assert lines[0].split() == ["VERSION", "ID", "CREATED"]
    assert [line.split()[0] for line in lines[1:]] == ["v3", "v2", "v1"]
    assert lines[1].endswith("current")
    assert [one["number"] for one in json.loads(flynn.ok("releases", "--json"))] == [3, 2, 1]


def test_show(flynn: Shell, controller: Controller, app: str) -> None:
    text = flynn.ok("release", "show")
    assert "Version:  v3" in text
    assert "Process:  web: start web" in text
    assert json.loads(flynn.ok("release", "show", "v1", "--json"))["env"] == {"N": "0"}
    assert flynn("release", "show", "v9").code == 66
    assert flynn("release", "show", "../x").code == 64
    controller.add_app("fresh")
    assert flynn("-a", "fresh", "release", "show").code == 66


def test_rollback_deploys_the_one_before(flynn: Shell, controller: Controller, app: str) -> None:
    assert "Deployed v2" in flynn.ok("release", "rollback", "-y")
    assert "Deployed v1" in flynn.ok("release", "rollback")
    done = flynn("release", "rollback")
    assert (done.code, "no earlier release" in done.err) == (66, True)
    assert "Deployed v3" in flynn.ok("release", "rollback", "v3")
    assert flynn("release", "rollback", "v3").code == 75


def test_deployments(flynn: Shell, app: str) -> None:
    flynn.ok("release", "rollback")
    lines = flynn.ok("deployment").splitlines()
    assert lines[0].split() == ["ID", "STATUS", "FROM", "TO", "CREATED", "TOOK"]
    assert lines[1].split()[1:4] == ["complete", "v3", "v2"]
    assert lines[1].endswith("2.5 s")
    id = lines[1].split()[0]
    assert f"ID:       {id}" in flynn.ok("deployment", "show", id)
    assert json.loads(flynn.ok("deployment", "show", id, "--json"))["id"] == id
    assert flynn("deployment", "show", "..").code == 64


def test_deployment_timeout(flynn: Shell, app: str) -> None:
    assert flynn.ok("deployment", "timeout") == "120\n"
    assert flynn.ok("deployment", "timeout", "180") == "180\n"
    assert json.loads(flynn.ok("deployment", "timeout", "--json")) == {"timeout_s": 180}
    assert flynn("deployment", "timeout", "0").code == 64
