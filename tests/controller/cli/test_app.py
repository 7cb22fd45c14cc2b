from __future__ import annotations

import json
from pathlib import Path

import pytest

from controller.cli import git
from tests.controller.cli.conftest import Shell
from tests.controller.cli.fake import KEY, Controller

URL = "ssh://git@git.example.test:2222/example.git"


def test_create_makes_the_app_and_the_remote(flynn: Shell, controller: Controller, repository: Path) -> None:
    assert flynn.ok("create", "example") == "Created example\n"
    assert git.remotes() == {"flynn": URL}
    assert [app.name for app in controller.apps.values()] == ["example"]


def test_create_outside_a_repository_says_the_url(flynn: Shell) -> None:
    done = flynn("create", "example")
    assert (done.code, done.out) == (0, "Created example\n")
    assert URL in done.err


def test_create_without_a_name_prints_the_made_up_one(flynn: Shell, repository: Path) -> None:
    name = flynn.ok("create").split()[1]
    assert git.remotes()["flynn"] == git.url_of("git.example.test:2222", name)


def test_create_does_not_touch_a_foreign_remote(flynn: Shell, controller: Controller, repository: Path) -> None:
    git.set_remote("flynn", "https://elsewhere.test/x")
    done = flynn("create", "example")
    assert done.code == 75
    assert "-y" in done.err
    assert controller.apps == {}
    flynn.ok("create", "-r", "other", "example")
    assert git.remotes() == {"flynn": "https://elsewhere.test/x", "other": URL}
    flynn.ok("create", "-y", "second")
    assert git.remotes()["flynn"].endswith("/second.git")
    flynn.ok("create", "-r", "", "third")
    assert "third" not in str(git.remotes())


@pytest.mark.parametrize("name", ["..", "A b", "a" * 200, "-x", "1x", "x-", "é", "a/b"])
def test_impossible_names_never_reach_the_controller(flynn: Shell, controller: Controller, name: str) -> None:
    done = flynn("create", "--", name)
    assert done.code == 64
    assert "is not allowed" in done.err
    assert controller.requests == []


@pytest.mark.parametrize("name", ["..", "A b", "a" * 200, "a/b", "%2e%2e", "x?y"])
def test_an_app_flag_cannot_leave_its_path(flynn: Shell, controller: Controller, name: str) -> None:
    assert flynn("-a", name, "ps").code == 64
    assert controller.requests == []


def test_an_existing_name_is_told(flynn: Shell, controller: Controller) -> None:
    controller.add_app("example")
    assert flynn("create", "example").code == 73


def test_apps_lists_id_and_name(flynn: Shell, controller: Controller) -> None:
    controller.add_app("zebra")
    controller.add_app("ant")
    lines = [line.split() for line in flynn.ok("apps").splitlines()]
    assert lines == [["ID", "NAME"], ["app0002", "ant"], ["app0001", "zebra"]]
    assert {app["name"] for app in json.loads(flynn.ok("apps", "--json"))} == {"ant", "zebra"}


def test_info_shows_addresses_release_and_scale(flynn: Shell, controller: Controller) -> None:
    flynn.ok("create", "example")
    assert "none yet" in flynn.ok("-a", "example", "info")
    controller.add_release("example")
    controller.scales[controller.find("example").id] = {"web": 3}
    text = flynn.ok("info", "-a", "example")
    assert text.splitlines() == [
        "=== example",
        f"Git URL:  {URL}",
        "Web URL:  http://example.example.test",
        "Release:  v1",
        "Scale:    web=3",
    ]
    facts = json.loads(flynn.ok("-a", "example", "info", "--json"))
    assert (facts["git_url"], facts["processes"]) == (URL, {"web": 3})


def test_delete_removes_app_and_remote(flynn: Shell, controller: Controller, repository: Path) -> None:
    flynn.ok("create", "example")
    controller.add_release("example")
    assert flynn.ok("delete", "-y") == "Deleted example (releases: 1, routes: 1)\n"
    assert controller.apps == {}
    assert git.remotes() == {}


def test_delete_asks_and_needs_somebody_to_answer(flynn: Shell, controller: Controller) -> None:
    controller.add_app("example")
    done = flynn("-a", "example", "delete")
    assert done.code == 64
    assert "-y" in done.err
    assert controller.apps


def test_app_comes_from_flag_environment_or_remote(
    flynn: Shell, controller: Controller, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flagged", "named", "pushed"):
        controller.add_app(name)
    done = flynn("info")
    assert done.code == 64
    assert "-a APP" in done.err
    git.set_remote("origin", "https://elsewhere.test/x.git")
    git.set_remote("flynn", git.url_of("git.example.test:2222", "pushed"))
    assert "=== pushed" in flynn.ok("info")
    monkeypatch.setenv("FLYNN_APP", "named")
    assert "=== named" in flynn.ok("info")
    assert "=== flagged" in flynn.ok("-a", "flagged", "info")


def test_the_remotes_cluster_is_meant(flynn: Shell, controller: Controller, repository: Path, url: str) -> None:
    controller.add_app("pushed")
    flynn.ok("cluster", "add", "-g", "other.test:2222", "other", "http://127.0.0.1:1", KEY)
    git.set_remote("production", git.url_of("git.example.test:2222", "pushed"))
    flynn.ok("cluster", "default", "other")
    assert "=== pushed" in flynn.ok("info")
    assert flynn("-c", "other", "info").code == 64


def test_a_remote_of_no_known_cluster_is_no_app(flynn: Shell, repository: Path) -> None:
    git.set_remote("flynn", "ssh://git@unknown.test:2222/example.git")
    assert flynn("info").code == 64


def test_an_unknown_app_is_told(flynn: Shell) -> None:
    done = flynn("-a", "nosuch", "ps")
    assert (done.code, done.err) == (66, "flynn: no app 'nosuch'\n  hint: flynn apps\n")


def test_git_urls_read_back() -> None:
    assert git.parse_url(git.url_of("h:1", "x")) == ("h:1", "x")
    assert git.parse_url("git@github.com:a/b.git") is None
    assert git.parse_url("ssh://git@h:1/a/b.git") is None


def test_remotes_without_git_are_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))
    assert git.remotes() == {}
    assert not git.is_repository()
    with pytest.raises(Exception, match="git is not installed"):
        git.set_remote("x", "y")


def test_an_impossible_remote_name_is_refused_before_anything_is_made(
    flynn: Shell, controller: Controller, repository: Path
) -> None:
    done = flynn("create", "-r=--mirror=push", "example")
    assert done.code == 64
    assert git.remotes() == {}
    assert controller.apps == {}
