"""Hand out IPv4 addresses of one subnet and port numbers: pure, no kernel, no clock, no dice.

Addresses move on (the next after the last given), because an address that comes back at once meets
stale neighbours; ports are the lowest free, because people read them. Called by `hostd.runtime.network`.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from netns.errors import Exhausted, Taken


class AddressPool:
    """The addresses of a subnet but network, gateway (the first) and broadcast."""

    def __init__(self, subnet: IPv4Network, start: int = 0) -> None:
        """Begin with the `start`-th address; a restarted node begins elsewhere, away from those just given up."""
        if subnet.num_addresses < 4:
            raise ValueError(f"{subnet} has no room for a gateway and a job")
        self.subnet = subnet
        self.gateway = subnet[1]
        self._taken: set[IPv4Address] = set()
        self._last = 1 + start

    @property
    def taken(self) -> frozenset[IPv4Address]:
        return frozenset(self._taken)

    def take_next(self) -> IPv4Address:
        """Take the next free address after the last one given, going round.

        Raises:
            Exhausted: every address is taken.
        """
        usable = self.subnet.num_addresses - 3
        for step in range(usable):
            index = 2 + (self._last - 1 + step) % usable
            address = self.subnet[index]
            if address not in self._taken:
                self._last = index
                self._taken.add(address)
                return address
        raise Exhausted(f"no free address in {self.subnet}")

    def take(self, address: IPv4Address) -> None:
        """Take this very address.

        Raises:
            Taken: somebody has it.
            ValueError: it is not one of the pool's.
        """
        if address not in self.subnet or address in (self.subnet[0], self.gateway, self.subnet[-1]):
            raise ValueError(f"{address} is no job address of {self.subnet}")
        if address in self._taken:
            raise Taken(f"address {address} is taken")
        self._taken.add(address)

    def give_back(self, address: IPv4Address) -> None:
        """Return an address; one that was not taken is fine."""
        self._taken.discard(address)


class PortPool:
    """Port numbers, each held by an owner, or by several that agreed to share; one for all protocols.

    Automatic numbers are `low` to `high`; a specific one may be any from 1 to 65535.
    """

    def __init__(self, low: int, high: int) -> None:
        if not 1 <= low <= high <= 65535:
            raise ValueError(f"ports {low} to {high}")
        self.low, self.high = low, high
        self._owners: dict[int, str] = {}
        self._sharers: dict[int, set[str]] = {}

    @property
    def owners(self) -> dict[int, str]:
        return dict(self._owners)

    def take_lowest(self, owner: str, *, skip: frozenset[int] = frozenset()) -> int:
        """Take the lowest free number that is not in `skip`.

        Raises:
            Exhausted: every number is taken or skipped.
        """
        for number in range(self.low, self.high + 1):
            if number not in self._owners and number not in self._sharers and number not in skip:
                self._owners[number] = owner
                return number
        raise Exhausted(f"no free port from {self.low} to {self.high}")

    def take(self, number: int, owner: str, *, is_shared: bool = False) -> bool:
        """Take this very number; the owner may take it again (the other protocol). Return whether it is alone.

        Raises:
            Taken: another owner has it, and not both want to share.
            ValueError: it is no port number.
        """
        if not 1 <= number <= 65535:
            raise ValueError(f"port {number}")
        holders = {self._owners.get(number, owner), *(self._sharers.get(number, ()) if not is_shared else ())} - {owner}
        if holders:
            raise Taken(f"port {number} is taken by {min(holders)}")
        if is_shared:
            self._sharers.setdefault(number, set()).add(owner)
        else:
            self._owners[number] = owner
        return self._sharers.get(number, {owner}) == {owner}

    def give_back(self, owner: str) -> None:
        """Return all numbers of an owner; an unknown owner is fine."""
        for number in [number for number, holder in self._owners.items() if holder == owner]:
            del self._owners[number]
        for number, sharers in list(self._sharers.items()):
            sharers.discard(owner)
            if not sharers:
                del self._sharers[number]

    def release(self, number: int) -> None:
        """Return one number; one that was not taken is fine."""
        self._owners.pop(number, None)
