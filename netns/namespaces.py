"""Network namespaces by file descriptor: make one, enter one, tell them apart. Nothing is pinned to a path.

A namespace lives as long as an fd, a process or a link refers to it. Entering is per thread and for
single-threaded programs and tests only: daemons ask the spawner. Called by tests and tools.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from netns import syscalls

_OWN = "/proc/thread-self/ns/net"


class NamespaceFds(NamedTuple):
    """A network namespace and a NETLINK_ROUTE datagram socket opened inside it; both are the caller's to close."""

    netns_fd: int
    netlink_fd: int


def current() -> int:
    """Return an fd of the calling thread's network namespace."""
    return os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)


def of_process(pid: int) -> int:
    """Return an fd of a process's network namespace."""
    return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def identity(netns_fd: int) -> int:
    """Return the number that tells namespaces apart (the kernel's inode)."""
    return os.fstat(netns_fd).st_ino


def close(fd: int) -> None:
    """Let go of a namespace or of a socket inside one."""
    os.close(fd)


@contextmanager
def inside(netns_fd: int) -> Iterator[None]:
    """Put the calling thread into a namespace for a while."""
    own = current()
    try:
        syscalls.setns(netns_fd, syscalls.CLONE_NEWNET)
        yield
    finally:
        syscalls.setns(own, syscalls.CLONE_NEWNET)
        os.close(own)


def create() -> NamespaceFds:
    """Make a namespace; the calling thread stays where it was."""
    own = current()
    try:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        try:
            netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
            return NamespaceFds(current(), netlink.detach())
        finally:
            syscalls.setns(own, syscalls.CLONE_NEWNET)
    finally:
        os.close(own)
