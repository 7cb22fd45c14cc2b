from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns.addresses import AddressPool, PortPool
from netns.errors import Exhausted, Taken

SMALL = IPv4Network("10.1.0.0/29")  # .1 is the gateway, .2 to .6 are jobs'


def test_gateway_network_and_broadcast_are_never_given() -> None:
    pool = AddressPool(SMALL)
    given_out = {pool.take_next() for _ in range(5)}
    assert given_out == {IPv4Address(f"10.1.0.{n}") for n in range(2, 7)}
    with pytest.raises(Exhausted):
        pool.take_next()
    for address in ("10.1.0.0", "10.1.0.1", "10.1.0.7", "10.2.0.2"):
        with pytest.raises(ValueError):
            pool.take(IPv4Address(address))


def test_an_address_given_back_is_the_last_to_come_again() -> None:
    pool = AddressPool(SMALL)
    first = pool.take_next()
    pool.give_back(first)
    pool.give_back(first)
    assert [pool.take_next() for _ in range(5)][-1] == first


def test_a_specific_address_is_taken_once() -> None:
    pool = AddressPool(SMALL)
    pool.take(IPv4Address("10.1.0.3"))
    with pytest.raises(Taken):
        pool.take(IPv4Address("10.1.0.3"))


@given(st.lists(st.one_of(st.none(), st.integers(2, 6)), max_size=60))
def test_no_two_hold_an_address(moves: list[int | None]) -> None:
    pool = AddressPool(SMALL)
    held: set[IPv4Address] = set()
    for move in moves:
        if move is not None:
            pool.give_back(IPv4Address(f"10.1.0.{move}"))
            held.discard(IPv4Address(f"10.1.0.{move}"))
        elif len(held) < 5:
            address = pool.take_next()
            assert address not in held
            held.add(address)
    assert pool.taken == held


def test_a_subnet_without_room_is_refused() -> None:
    with pytest.raises(ValueError):
        AddressPool(IPv4Network("10.1.0.0/31"))


def test_ports_are_the_lowest_free_ones() -> None:
    pool = PortPool(55000, 55003)
    assert [pool.take_lowest("a"), pool.take_lowest("b"), pool.take_lowest("a")] == [55000, 55001, 55002]
    pool.give_back("a")
    pool.give_back("a")
    assert pool.take_lowest("c") == 55000
    assert pool.take_lowest("d", skip=frozenset({55002})) == 55003
    pool.release(55000)
    assert pool.owners == {55001: "b", 55003: "d"}


def test_a_specific_port_is_one_owners() -> None:
    pool = PortPool(55000, 55000)
    pool.take(80, "router")
    pool.take(80, "router")
    with pytest.raises(Taken, match="router"):
        pool.take(80, "other")
    pool.take(55000, "other")
    with pytest.raises(Exhausted):
        pool.take_lowest("third")
    with pytest.raises(ValueError):
        pool.take(0, "x")


def test_a_number_is_shared_only_by_those_who_all_want_to() -> None:
    pool = PortPool(80, 90)
    assert pool.take(80, "old", is_shared=True)
    assert not pool.take(80, "new", is_shared=True)
    with pytest.raises(Taken):
        pool.take(80, "other")
    assert pool.take_lowest("auto") == 81
    with pytest.raises(Taken):
        pool.take(81, "new", is_shared=True)
    pool.give_back("old")
    with pytest.raises(Taken):
        pool.take(80, "other")
    pool.give_back("new")
    pool.take(80, "other")
