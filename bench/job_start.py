"""Start to exit of `true` with full isolation through hostd's HTTP API, beside crun doing the same.

Ours: `PUT /jobs/ID` on the unix socket of a real hostd, by the client that the controller uses, until the `ended`
event, which comes when the job's process, cgroups, files and published ports are gone and its end is on disk (its
network namespace, in which nothing is left, and its disk are let go of right behind). On top of what
`job_start_spawner` compares, ours then has a network (a veth pair into the bridge, an address, a route, DNS), a log,
an init, and four records in a database that survives a power cut; crun has an empty network namespace. Both run in the
same root, the unpacked `base` image. hostd lives in a network namespace with a state directory and cgroups of its own.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

from bench.job_start_spawner import PER_ROUND, Crun, in_own_mounts
from bench.measure import Row, interleave, row, show
from hostd.client import HostClient
from hostd.types import JobEvent, JobSpec, Layer, Resources
from tests.hostd.node import Node, node, wait_until

LIMITS = Resources(memory_bytes=256 * 2**20, cpu_millis=500, pids_max=100)


class Ours:
    """hostd's arm: one client with its connections open, one job after the other."""

    def __init__(self, lab: Node, resources: Resources = LIMITS) -> None:
        self._resources = resources
        self._loop = asyncio.new_event_loop()
        self._layers: tuple[Layer, ...] = lab.image().layers
        self._number = 0
        self._loop.run_until_complete(self._open(f"unix://{lab.run_dir}/api/hostd.sock"))

    async def _open(self, address: str) -> None:
        self._client = HostClient(address)
        self._events: AsyncIterator[JobEvent] = self._client.events()
        async for event in self._events:
            if event.kind == "current":
                break

    def round(self) -> float:
        begin = time.perf_counter()
        self._loop.run_until_complete(self._run(PER_ROUND))
        return (time.perf_counter() - begin) * 1000 / PER_ROUND

    async def _run(self, count: int) -> None:
        for _ in range(count):
            self._number += 1
            spec = JobSpec(
                id=f"b{self._number}",
                layers=self._layers,
                args=("true",),
                resources=self._resources,
            )
            await self._client.start(spec)
            async for event in self._events:
                if event.kind == "ended" and event.job is not None and event.job.spec.id == spec.id:
                    assert event.job.status == "done", event.job
                    break

    def close(self) -> None:
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _close(self) -> None:
        async with aclosing(self._events):  # type: ignore[type-var]
            await self._client.close()


def unpacked(lab: Node) -> Path:
    """Wait until hostd has unpacked all its images, which it does in the background, and return the base's root."""
    layers = {layer.digest for name in ("base", "system") for layer in lab.image(name).layers}
    paths = {digest: lab.state_dir / "layers" / digest.removeprefix("sha256:") for digest in layers}
    wait_until("the images are unpacked", lambda: all(path.is_dir() for path in paths.values()), 120)
    (base,) = lab.image().layers
    return paths[base.digest]


def measure(rounds: int) -> list[Row]:
    """Return the row `job_start`."""
    with node() as lab, tempfile.TemporaryDirectory(prefix="hostd-bench-") as name:
        lab.up()
        ours = Ours(lab)
        try:
            crun = Crun(Path(name), unpacked(lab))
            found = interleave({"ours": ours.round, "crun": crun.round}, rounds)
        finally:
            ours.close()
    return [row("job_start", found["ours"], found["crun"], "crun run", "ms", rounds * PER_ROUND)]


if __name__ == "__main__":
    in_own_mounts("bench.job_start")
    print(show(measure(int(next(iter(sys.argv[1:]), "10")))))
