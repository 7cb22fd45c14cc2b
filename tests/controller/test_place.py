"""Placement: even, bound by volumes and fixed ports, and the same every time."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from controller.scheduler.place import HostLoad, place, with_job

KIND = ("app", "web")
loads = st.lists(
    st.builds(
        HostLoad,
        id=st.text("abcdef", min_size=1, max_size=3),
        by_kind=st.dictionaries(st.just(KIND), st.integers(0, 5)),
        total=st.integers(5, 20),
        numbers=st.frozensets(st.integers(80, 83)),
    ),
    unique_by=lambda host: host.id,
    max_size=5,
)


@given(loads)
def test_the_host_with_the_fewest_of_the_kind_is_taken(hosts: list[HostLoad]) -> None:
    chosen = place(KIND, hosts)
    if not hosts:
        assert chosen is None
        return
    fewest = min(host.by_kind.get(KIND, 0) for host in hosts)
    assert next(h for h in hosts if h.id == chosen).by_kind.get(KIND, 0) == fewest


@given(loads, st.frozensets(st.integers(80, 83)))
def test_a_fixed_port_goes_where_it_is_free(hosts: list[HostLoad], numbers: frozenset[int]) -> None:
    chosen = place(KIND, hosts, numbers=numbers)
    free = {host.id for host in hosts if not host.numbers & numbers}
    assert chosen in free if free else chosen is None


@given(loads, st.text("abcdef", min_size=1, max_size=3))
def test_a_volume_binds_to_its_host_even_if_that_one_is_away(hosts: list[HostLoad], home: str) -> None:
    chosen = place(KIND, hosts, volumes=["data"], pins={"data": home})
    assert chosen == (home if home in {host.id for host in hosts} else None)


@given(loads)
def test_the_order_of_hosts_does_not_matter(hosts: list[HostLoad]) -> None:
    assert place(KIND, hosts) == place(KIND, hosts[::-1])


@given(st.integers(1, 5), st.integers(0, 40))
def test_a_batch_spreads_evenly(host_count: int, jobs: int) -> None:
    hosts = {str(number): HostLoad(str(number)) for number in range(host_count)}
    for _ in range(jobs):
        chosen = place(KIND, list(hosts.values()))
        assert chosen is not None
        hosts[chosen] = with_job(hosts[chosen], KIND)
    counts = Counter({id: host.total for id, host in hosts.items()}).values()
    assert max(counts) - min(counts) <= 1
