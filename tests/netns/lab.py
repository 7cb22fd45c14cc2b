"""A node's network namespace and the network outside it, made for one test, entered by the test's own thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from netns import namespaces, sysctls

NODE, MEMBER, STRANGER = "192.0.2.1", "192.0.2.2", "192.0.2.3"


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@dataclass
class Outside:
    """The network beyond the node: one namespace that has the addresses of a member and of a stranger."""

    netns_fd: int

    def connect(self, address: str, port: int, source: str, timeout_s: float = 3.0) -> socket.socket:
        with namespaces.inside(self.netns_fd):
            return socket.create_connection((address, port), timeout_s, source_address=(source, 0))


@contextlib.contextmanager
def node() -> Iterator[Outside]:
    """Enter a fresh namespace with lo, an uplink of MTU 1400 at 192.0.2.1 and a default route; leave it behind."""
    own, outside = namespaces.create(), namespaces.create()
    fds = [*own, *outside]
    try:
        with namespaces.inside(own.netns_fd):
            sysctls.write("ipv4/ip_forward", "0")  # a new namespace inherits the machine's
            ip("link", "set", "lo", "up")
            target = f"/proc/self/fd/{outside.netns_fd}"
            subprocess.run(
                ["ip", "link", "add", "up0", "mtu", "1400", "type", "veth", "peer", "name", "out0", "netns", target],
                pass_fds=(outside.netns_fd,),
                check=True,
            )
            ip("addr", "add", f"{NODE}/24", "dev", "up0")
            ip("link", "set", "up0", "up")
            with namespaces.inside(outside.netns_fd):
                ip("link", "set", "lo", "up")
                ip("addr", "add", f"{MEMBER}/24", "dev", "out0")
                ip("addr", "add", f"{STRANGER}/24", "dev", "out0")
                ip("link", "set", "out0", "up")
            ip("route", "add", "default", "via", MEMBER)
            yield Outside(outside.netns_fd)
    finally:
        for fd in fds:
            os.close(fd)


class _Held(NamedTuple):
    netns: tuple[str, ...]


@dataclass
class Source:
    """Makes namespaces as the spawner does, in this process; `netns_of` lets a test act inside one."""

    held: dict[str, int] = field(default_factory=dict)
    creations: int = 0

    async def create_netns(self, name: str, uid_base: int = 0) -> tuple[int, int]:
        made = namespaces.create()
        self.held[name] = os.dup(made.netns_fd)
        self.creations += 1
        return made

    async def drop_netns(self, name: str) -> None:
        if (fd := self.held.pop(name, None)) is not None:
            os.close(fd)

    async def list(self) -> _Held:
        return _Held(tuple(self.held))

    def netns_of(self, name: str | None) -> int:
        assert name is not None
        return self.held[name]

    def close(self) -> None:
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for something that the kernel does in its own time."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def serve(port: int, netns_fd: int | None = None, address: str = "0.0.0.0", *, is_udp: bool = False) -> socket.socket:
    """Listen in a namespace (None = the node's own)."""
    with namespaces.inside(netns_fd) if netns_fd is not None else contextlib.nullcontext():
        if is_udp:
            listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            listener.bind((address, port))
        else:
            listener = socket.create_server((address, port))
    listener.settimeout(3.0)
    return listener


def connect(
    address: str, port: int, netns_fd: int | None = None, timeout_s: float = 3.0, source: str = ""
) -> socket.socket:
    """Connect from a namespace (None = the node's own)."""
    with namespaces.inside(netns_fd) if netns_fd is not None else contextlib.nullcontext():
        return socket.create_connection((address, port), timeout_s, source_address=(source, 0) if source else None)


def peer_seen_by(listener: socket.socket) -> str:
    """Return the address from which the next connection seems to come."""
    accepted, (address, _) = listener.accept()
    accepted.close()
    return str(address)
