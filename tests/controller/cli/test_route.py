from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.controller.cli.conftest import Shell
from tests.controller.cli.fake import Controller


@pytest.fixture
def app(controller: Controller, monkeypatch: pytest.MonkeyPatch) -> str:
    controller.add_app("example")
    monkeypatch.setenv("FLYNN_APP", "example")
    return "example"


def test_the_articles_line_adds_an_http_route(flynn: Shell, controller: Controller, app: str) -> None:
    assert flynn.ok("route-add-http", "www.example.test") == "Route http://www.example.test added (route0002)\n"
    route = controller.routes[0]
    assert (route.domain, route.path, route.service) == ("www.example.test", "/", "example-web")


def test_options_of_http(flynn: Shell, controller: Controller, app: str, home: Path) -> None:
    (home / "c.pem").write_text("CERT")
    (home / "k.pem").write_text("KEY")
    out = flynn.ok(
        "route", "add", "http", "-s", "other", "--sticky", "-c", "c.pem", "-k", "k.pem", "WWW.example.test/api/v1"
    )
    assert out.startswith("Route https://www.example.test/api/v1/ added")
    route = controller.routes[0]
    assert (route.domain, route.path, route.service, route.is_sticky) == ("www.example.test", "/api/v1/", "other", True)
    assert (route.certificate, route.private_key) == ("CERT", "KEY")
    assert "KEY" not in flynn.ok("route", "--json")


def test_an_existing_route_is_told(flynn: Shell, app: str) -> None:
    flynn.ok("route", "add", "http", "www.example.test")
    done = flynn("route", "add", "http", "www.example.test")
    assert (done.code, done.err.splitlines()[0]) == (73, "flynn: a route for www.example.test exists already")


@pytest.mark.parametrize(
    "words", [["http://www.example.test"], [""], ["/x"], ["-c", "x", "d.test"], ["-k", "x", "d.test"]]
)
def test_nonsense_is_refused(flynn: Shell, controller: Controller, app: str, words: list[str]) -> None:
    assert flynn("route", "add", "http", *words).code == 64
    assert controller.requests == []


def test_a_missing_certificate_file_is_told(flynn: Shell, app: str) -> None:
    assert flynn("route", "add", "http", "-c", "no", "-k", "no", "d.test").code == 66


def test_tcp(flynn: Shell, controller: Controller, app: str) -> None:
    assert flynn.ok("route", "add", "tcp", "-s", "example-db") == "Route tcp port 3000 added (route0002)\n"
    assert flynn("route", "add", "tcp", "-p", "70000").code == 64
    assert flynn("route", "add", "tcp", "-p", "x").code == 64


def test_list(flynn: Shell, app: str) -> None:
    flynn.ok("route", "add", "http", "www.example.test")
    flynn.ok("route", "add", "tcp", "-p", "3306", "-s", "db")
    lines = [line.split() for line in flynn.ok("route").splitlines()]
    assert lines == [
        ["ROUTE", "SERVICE", "ID", "STICKY", "TLS"],
        ["http:www.example.test", "example-web", "route0002", "no"],
        ["tcp:3306", "db", "route0003", "no"],
    ]
    assert json.loads(flynn.ok("routes", "--json"))[0]["domain"] == "www.example.test"


@pytest.mark.parametrize("wanted", ["route0002", "http/route0002", "d.test/a", "d.test/a/", "http:d.test/a/"])
def test_remove_by_id_or_by_what_it_routes(flynn: Shell, controller: Controller, app: str, wanted: str) -> None:
    flynn.ok("route", "add", "http", "d.test/a")
    flynn.ok("route", "add", "http", "d.test")
    assert flynn.ok("route", "remove", wanted) == "Route http:d.test/a/ removed\n"
    assert [route.path for route in controller.routes] == ["/"]


def test_remove_of_no_route_is_told(flynn: Shell, app: str) -> None:
    assert flynn("route", "remove", "nosuch.test").code == 66
