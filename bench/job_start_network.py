"""Start to exit of `true` with a network, through hostd's API, beside `docker run` and `podman run` of the same root.

Each makes a container with all namespaces, a veth pair into a bridge, an address, a route and NAT, its default
capabilities and seccomp profile, 256 MiB, one CPU, 100 processes and a log, and removes it. What is timed is what one
would do: for ours the request and the `ended` event at the API, for the peers their command line, whose daemon
(docker's) runs already. A peer that does not start here is said to be missing, and has no row.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.job_start import Ours, unpacked
from bench.measure import Row, interleave, row, show
from bench.peers import Docker, NoPeer, Peer, Podman
from hostd.types import Resources
from tests.hostd.node import node

LIMITS = Resources(memory_bytes=256 * 2**20, cpu_quota_millis=1000, pids_max=100)
PEER_RUNS = 3
PEERS: dict[str, type[Peer]] = {"docker": Docker, "podman": Podman}


@contextlib.contextmanager
def open_peers(folder: Path, root: Path) -> Iterator[dict[str, Peer]]:
    """Bring up the peers that can be; say which cannot, and why."""
    with contextlib.ExitStack() as stack:
        found: dict[str, Peer] = {}
        for name, kind in PEERS.items():
            try:
                peer = kind(folder / name)
                stack.callback(peer.close)
                peer.open(root)
                peer.run_true()
                found[name] = peer
            except NoPeer as error:
                print(f"{name}: not measured, it does not run here: {error}", flush=True)
        yield found


def arm(peer: Peer) -> Callable[[], float]:
    def round_ms() -> float:
        begin = time.perf_counter()
        for _ in range(PEER_RUNS):
            peer.run_true()
        return (time.perf_counter() - begin) * 1000 / PEER_RUNS

    return round_ms


def measure(rounds: int) -> list[Row]:
    """Return the rows `job_start_docker` and `job_start_podman`."""
    with node() as lab, tempfile.TemporaryDirectory(prefix=f"hostd-bench-{os.getpid()}-") as name:
        lab.up()
        with open_peers(Path(name), unpacked(lab)) as peers:
            ours = Ours(lab, LIMITS)
            try:
                found = interleave({"ours": ours.round} | {each: arm(peers[each]) for each in peers}, rounds)
            finally:
                ours.close()
    return [
        row(f"job_start_{each}", found["ours"], found[each], f"{each} run", "ms", rounds * PEER_RUNS) for each in peers
    ]


if __name__ == "__main__":
    print(show(measure(int(next(iter(sys.argv[1:]), "7")))))
