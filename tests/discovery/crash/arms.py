"""What the crash test can be pointed at, our daemon or pysyncobj as shipped, and how a member of each is started."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hostd.authority import Authority
from tests.discovery.crash.certificates import certify
from tests.discovery.crash.network import Network

ROOT = Path(__file__).parents[3]
PORT = 4001


class Arm(Protocol):
    """One kind of member."""

    @property
    def has_tape(self) -> bool:
        """Tell whether power cuts can be simulated."""

    @property
    def has_watches(self) -> bool:
        """Tell whether there are watches and leases."""

    def prepare(self, folder: Path, network: Network) -> Authority | None:
        """Make what all members share; return who certifies them."""

    def command(self, folder: Path, network: Network, member: str) -> list[str]:
        """Return the command that runs a member whose files are all in `folder`/`member`."""


def state_directory(folder: Path, member: str) -> Path:
    return folder / member / "state"


def socket(folder: Path, member: str) -> Path:
    return folder / member / "d.sock"


def tape(folder: Path, member: str) -> Path:
    return folder / member / "tape"


def environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True)
class Shipped:
    """pysyncobj with its own journal and dump, its own transport, its own pickle."""

    reads: str = "log"
    compact_entries: int = 100
    has_tape: bool = False
    has_watches: bool = False

    def prepare(self, folder: Path, network: Network) -> None:
        del folder, network

    def command(self, folder: Path, network: Network, member: str) -> list[str]:
        peers = ",".join(f"{network.address(other)}:{PORT}" for other in network.members if other != member)
        return [
            sys.executable, "-m", "tests.discovery.crash.shipped",
            "--socket", str(socket(folder, member)), "--directory", str(state_directory(folder, member)),
            "--address", f"{network.address(member)}:{PORT}", "--peers", peers, "--reads", self.reads,
            "--compact-entries", str(self.compact_entries),
        ]  # fmt: skip


@dataclass(frozen=True)
class Ours:
    """The discovery daemon, with a small log before it compacts, and the tape under its files."""

    has_tape: bool = True
    has_watches: bool = True
    compact_entries: int = 150
    sync_s: float = 0.01
    broken: str = ""

    def prepare(self, folder: Path, network: Network) -> Authority:
        return certify(folder / "tls", network.members)

    def command(self, folder: Path, network: Network, member: str) -> list[str]:
        everybody = ",".join(f"{name}={network.address(name)}:{PORT}" for name in network.members)
        tls = folder / "tls"
        return [
            sys.executable, "-m", "tests.discovery.crash.wrapped",
            "--tape", str(tape(folder, member)), "--sync-s", str(self.sync_s),
            "--compact-entries", str(self.compact_entries), "--broken", self.broken, "--",
            "--state-dir", str(state_directory(folder, member)), "--socket", str(socket(folder, member)),
            "--member-id", member, "--raft-address", f"{network.address(member)}:{PORT}",
            "--initial-members", everybody, "--tls-ca", str(tls / "ca.pem"),
            "--tls-cert", str(tls / f"{member}.pem"),
        ]  # fmt: skip
