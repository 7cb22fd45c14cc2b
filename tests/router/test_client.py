"""What a route may be."""

from __future__ import annotations

import pytest

from router.client import check, key_of
from router.errors import InvalidRoute
from router.types import Route


def http(domain: str, path: str = "/") -> Route:
    return Route(id="1", kind="http", service="web", domain=domain, path=path)


@pytest.mark.parametrize(
    "domain", ["", "..", "a..b", "-a.test", "a b.test", "a.test\nx", "*.*.test", "a" * 64 + ".test", "*"]
)
def test_what_is_no_domain_is_refused(domain: str) -> None:
    with pytest.raises(InvalidRoute):
        check(http(domain))


@pytest.mark.parametrize("path", ["/a b/", "/a?x=1", "/a\n/", "/" + "x" * 600])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(InvalidRoute):
        check(http("a.test", path))


def test_a_route_has_one_spelling() -> None:
    assert key_of(check(http("WWW.Example.Test.", "api"))) == "/router/routes/http/www.example.test/api/"


@pytest.mark.parametrize("port", [80, 443, 0, 70000])
def test_reserved_and_impossible_tcp_ports_are_refused(port: int) -> None:
    with pytest.raises(InvalidRoute):
        check(Route(id="1", kind="tcp", service="web", port=port))


def test_a_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(InvalidRoute):
        check(Route(id="1", kind="http", service="web", domain="a.test", certificate="x"))
