"""The pure half of the router: routes plus instances to a table, and one table to the next."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from discovery.types import Instance
from router.table import HttpRule, Server, Table, backend_name, build, rule_changes, server_changes
from router.types import Route


def route(
    id: str, domain: str = "a.test", path: str = "/", service: str = "web", at: float = 0, **more: object
) -> Route:
    return Route(id=id, kind="http", service=service, domain=domain, path=path, created_at=at, **more)  # type: ignore[arg-type]


def instance(port: int, service: str = "web") -> Instance:
    return Instance(id=f"h-{port}", service=service, host="10.0.0.1", port=port)


def test_a_route_gets_a_backend_with_every_instance() -> None:
    table = build([route("1")], {"web": [instance(55001), instance(55000)]})
    assert [rule.key for rule in table.http] == ["a.test/"]
    assert [s.port for s in table.backends[0].servers] == [55000, 55001]


def test_of_two_routes_for_one_path_the_older_wins() -> None:
    table = build([route("2", service="new", at=2), route("1", service="old", at=1)], {})
    assert table.http[0].backend == backend_name("old", "http", False)


def test_domains_are_compared_without_case() -> None:
    assert build([route("1", domain="WWW.Example.TEST")], {}).http[0].key == "www.example.test/"


def test_a_change_of_instances_keeps_the_shape() -> None:
    before, after = build([route("1")], {}), build([route("1")], {"web": [instance(55000)]})
    assert before.shape == after.shape
    assert before != after


def test_a_rule_for_a_known_service_keeps_the_shape_and_a_new_service_does_not() -> None:
    before = build([route("1")], {})
    assert before.shape == build([route("1"), route("2", domain="b.test")], {}).shape
    assert before.shape != build([route("1"), route("2", domain="b.test", service="other")], {}).shape
    assert before.shape != build([route("1"), route("2", domain="*.b.test")], {}).shape


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["x", "y"])),
    st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["x", "y"])),
)
def test_the_rule_changes_lead_from_any_rules_to_any_other(old: dict[str, str], new: dict[str, str]) -> None:
    def table(rules: dict[str, str]) -> Table:
        return Table(http=tuple(sorted(HttpRule(key, backend) for key, backend in rules.items())))

    rules = dict(old)
    for change in rule_changes(table(old), table(new)):
        assert (change.rule.key in rules) == (change.verb != "add")
        if change.verb == "del":
            del rules[change.rule.key]
        else:
            rules[change.rule.key] = change.rule.backend
    assert rules == new


def test_a_sticky_backend_needs_a_reload_for_its_servers() -> None:
    before = build([route("1", is_sticky=True)], {})
    after = build([route("1", is_sticky=True)], {"web": [instance(55000)]})
    assert before.shape != after.shape


def test_additions_come_before_removals() -> None:
    before = build([route("1")], {"web": [instance(55000)]})
    after = build([route("1")], {"web": [instance(55001)]})
    assert [change.verb for change in server_changes(before, after)] == ["add", "remove"]


def test_services_with_like_names_get_different_backends() -> None:
    assert backend_name("a.b", "http", False) != backend_name("a_b", "http", False)


ports = st.sets(st.integers(55000, 55020))


@given(ports, ports)
def test_the_changes_lead_from_any_set_of_servers_to_any_other(old: set[int], new: set[int]) -> None:
    seen = build([route("1")], {"web": map(instance, old)})
    wanted = build([route("1")], {"web": map(instance, new)})
    servers: set[Server] = set(seen.backends[0].servers)
    for change in server_changes(seen, wanted):
        assert (change.server in servers) == (change.verb == "remove")
        servers ^= {change.server}
    assert servers == set(wanted.backends[0].servers)


def test_an_empty_table_has_nothing() -> None:
    assert build([], {"web": [instance(1)]}) == Table()
