"""The errors of the kernel floor: a refused system call, and what the room itself cannot give."""

from __future__ import annotations

import errno as _errno
import os


class KernelError(OSError):
    """A system call (or netlink, or netfilter request) that the kernel refused.

    `syscall` is its name as in its man page, `target` what it was about (a path, a link, a rule).
    """

    def __init__(self, number: int, syscall: str, target: str = "") -> None:
        super().__init__(number, f"{syscall}({target}): {os.strerror(number)}")
        self.syscall = syscall
        self.target = target

    @property
    def name(self) -> str:
        """Return the symbolic name of the error, such as `EPERM`."""
        return _errno.errorcode.get(self.errno or 0, str(self.errno))


class Exhausted(Exception):
    """Every address or port of a pool is taken."""


class Taken(Exception):
    """The very address or port asked for belongs to somebody else."""


class NatUnavailable(Exception):
    """No backend can work here, or using this one would leave two sets of NAT rules live."""
