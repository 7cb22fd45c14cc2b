"""Three hosts on one switch: a network namespace for each member and one with the bridge between them.

Packets are lost as iptables' DROP on the receiving side, so one direction of a link can fail alone. Nothing is made
outside these namespaces, and they are gone after `close`.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Network:
    """`members` are names; member number n has address 10.77.0.(n + 1)."""

    def __init__(self, members: Sequence[str], tag: str = "") -> None:
        self.members = list(members)
        self._tag = f"crash{os.getpid()}{tag}"

    def address(self, member: str) -> str:
        return f"10.77.0.{self.members.index(member) + 1}"

    def namespace(self, member: str) -> str:
        return f"{self._tag}-{member}"

    def inside(self, member: str, *command: str) -> list[str]:
        """Return a command that runs another in a member's namespace, as the same process."""
        return ["nsenter", f"--net=/run/netns/{self.namespace(member)}", "--", *command]

    def open(self) -> None:
        switch = self.namespace("switch")
        _run("ip", "netns", "add", switch)
        _batch(switch, "link add name sw type bridge", "link set sw up", "link set lo up")
        for member in self.members:
            own = self.namespace(member)
            _run("ip", "netns", "add", own)
            _batch(
                switch,
                f"link add name to-{member} type veth peer name eth0 netns {own}",
                f"link set to-{member} master sw up",
            )
            _batch(own, "link set lo up", f"address add {self.address(member)}/24 dev eth0", "link set eth0 up")

    def close(self) -> None:
        for name in ("switch", *self.members):
            subprocess.run(["ip", "netns", "delete", self.namespace(name)], capture_output=True, check=False)

    async def lose(self, source: str, target: str, share: float = 1.0) -> None:
        """Lose this share of the packets from one member to another."""
        some = [] if share >= 1.0 else ["-m", "statistic", "--mode", "random", "--probability", f"{share:.3f}"]
        await self._iptables(target, "-A", "INPUT", "-s", self.address(source), *some, "-j", "DROP")

    async def heal(self) -> None:
        """Let everything through again."""
        await asyncio.gather(*(self._iptables(member, "-F", "INPUT") for member in self.members))

    async def _iptables(self, member: str, *words: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *self.inside(member, "iptables", "-w", *words), stderr=asyncio.subprocess.PIPE
        )
        _, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()


@contextmanager
def network(members: Sequence[str], tag: str = "") -> Iterator[Network]:
    made = Network(members, tag)
    try:
        made.open()
        yield made
    finally:
        made.close()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _batch(namespace: str, *lines: str) -> None:
    done = subprocess.run(
        ["ip", "-netns", namespace, "-batch", "-"], input="\n".join(lines), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{namespace}: {lines}: {done.stderr}"
