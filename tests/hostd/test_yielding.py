"""Who yields: decided by parts alone, then seen on a real node."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from discovery.wire.clock import monotonic_s
from hostd import yielding
from hostd.runtime.cgroup import find_mounts
from hostd.types import Resources
from hostd.yielding import CALM_TURNS, Yielding, parts_of
from tests.hostd.node import Node, wait_until
from tests.hostd.node import node as new_node
from tests.pace import SLOWNESS


class Told:
    """Cgroups that only remember who was demoted."""

    def __init__(self, *demoted: str) -> None:
        self.demoted = set(demoted)
        self.crowded: set[str] = set()
        self.held: set[str] = set()

    def is_at_pids_limit(self, job_id: str) -> bool:
        return job_id in self.crowded

    def hold(self, job_id: str) -> None:
        self.held.add(job_id)

    def let_go(self, job_id: str) -> None:
        self.held.discard(job_id)

    def cpu_s(self, job_id: str) -> float:
        return 0.0

    def demote(self, job_id: str) -> None:
        self.demoted.add(job_id)

    def promote(self, job_id: str, cpu_millis: int) -> None:
        assert cpu_millis == 1000
        self.demoted.discard(job_id)

    def is_demoted(self, job_id: str) -> bool:
        return job_id in self.demoted


@contextmanager
def jobs(told: Told, *names: str) -> Iterator[Yielding]:
    made = Yielding(told)
    try:
        for name in names:
            made.add(name, 1000)
        yield made
    finally:
        made.close()


def test_parts_are_by_weight_and_only_of_those_who_want_something() -> None:
    assert parts_of({"a": 1.5, "b": 0.5, "idle": 0.0}, {"a": 3000, "b": 1000, "idle": 9000}) == {"a": 1.0, "b": 1.0}
    assert parts_of({"a": 2.0, "idle": 0.0}, {"a": 1000, "idle": 1000}) == {}


async def test_who_is_above_his_part_yields_only_while_somebody_is_well_below() -> None:
    told = Told()
    with jobs(told, "heavy", "light") as made:
        made.judge({"heavy": 1.1, "light": 0.9})  # two that both want all: their weights do it
        assert told.demoted == set()
        made.judge({"heavy": 1.8, "light": 0.2})
        assert told.demoted == {"heavy"}
        for _ in range(3 * CALM_TURNS):
            made.judge({"heavy": 1.8, "light": 0.2})
        assert told.demoted == {"heavy"}


async def test_it_comes_back_when_calm_and_later_each_time() -> None:
    told = Told()
    with jobs(told, "heavy", "light") as made:
        for patience in (CALM_TURNS, 2 * CALM_TURNS):
            made.judge({"heavy": 1.8, "light": 0.2})
            for _ in range(patience - 1):
                made.judge({})
            assert told.demoted == {"heavy"}
            made.judge({})
            assert told.demoted == set()


async def test_one_that_starves_comes_back() -> None:
    told = Told()
    with jobs(told, "heavy", "light") as made:
        made.judge({"heavy": 1.8, "light": 0.2})
        for _ in range(CALM_TURNS):
            made.judge({"heavy": 0.3, "light": 1.7})
        assert told.demoted == {"light"}


async def test_one_that_is_held_back_waits_until_nobody_else_is_modest() -> None:
    told = Told()
    with jobs(told, "light") as made:
        made.add("flooder", 1000, is_held_back=lambda: True)
        made.judge({"flooder": 1.8, "light": 0.2})
        for _ in range(2 * CALM_TURNS):  # read slowly, it uses little: not because it wants little
            made.judge({"flooder": 0.1, "light": 0.2})
        assert told.demoted == {"flooder"}
        for _ in range(CALM_TURNS):
            made.judge({})
        assert told.demoted == set()


async def test_one_that_yields_with_all_its_processes_is_held_most_of_the_time() -> None:
    told = Told()
    told.crowded = {"bomb", "pool"}  # a pool of workers at its limit that takes no more than its part is left alone
    with jobs(told, "bomb", "pool", "light") as made:
        made.judge({"bomb": 1.8, "pool": 0.9, "light": 0.2})
        made.hold_crowds()
        assert told.held == {"bomb"}
        async with asyncio.timeout(10 * SLOWNESS):
            while told.held:
                await asyncio.sleep(0.01)
        for _ in range(2 * CALM_TURNS):  # what it could not use does not make it modest
            made.judge({"bomb": 0.1, "pool": 0.9, "light": 0.2})
        assert told.demoted == {"bomb"}
        made.hold_crowds()
        made.remove("bomb")
        assert told.held == set()
        made.judge({"pool": 1.8, "light": 0.2})
        made.hold_crowds()
        assert told.held == {"pool"}
    assert told.held == set()


async def test_a_job_is_told_when_it_begins_and_ends_to_yield() -> None:
    heard = list[bool]()
    with jobs(Told()) as made:
        made.add("bomb", 1000, heard.append)
        made.begin("bomb", "storm")
        made.begin("bomb", "share")
        made.end("bomb", "storm")
        made.end("bomb", "share")
    assert heard == [True, False]


async def test_two_reasons_have_to_go_both() -> None:
    told = Told("bomb")
    with jobs(told, "bomb") as made:
        assert told.demoted == set()  # what an earlier hostd did is undone
        made.begin("bomb", "storm")
        made.begin("bomb", "share")
        made.end("bomb", "storm")
        assert told.demoted == {"bomb"}
        made.end("bomb", "share")
        assert told.demoted == set()
        made.remove("bomb")
        made.remove("bomb")


async def test_the_timer_looks_only_while_the_machine_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real loop, with a machine that is busy (all cores' time passes) and one job that takes it all."""
    monkeypatch.setattr(yielding, "TURN_S", 0.02)
    monkeypatch.setattr(yielding, "_busy_now_s", lambda: monotonic_s() * (os.cpu_count() or 1))
    used = {"heavy": 0.0, "light": 0.0}

    class Running(Told):
        def cpu_s(self, job_id: str) -> float:
            used[job_id] += 1.9 if job_id == "heavy" else 0.1
            return used[job_id]

    told = Running()
    with jobs(told, "heavy", "light"):
        async with asyncio.timeout(10 * SLOWNESS):
            while told.demoted != {"heavy"}:
                await asyncio.sleep(0.01)


BURN = "import os\nfor _ in range(os.cpu_count()): os.fork()\nwhile True: pass\n"
SERVE = """
import time
while True:
    time.sleep(0.01)
    until = time.process_time() + 0.0005  # a twentieth of a core, however slow that is
    while time.process_time() < until: pass
"""


@pytest.fixture
def node() -> Iterator[Node]:
    with new_node(has_discovery=False) as made:
        made.up()
        yield made
        made.down()


@pytest.mark.needs_root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_job_that_takes_all_cores_yields_to_one_that_does_not(node: Node) -> None:
    mounts = find_mounts()
    root = mounts.v1.get("cpu") or mounts.v2
    if root is None or (mounts.v1.get("cpu") is None and "cpu" not in (root / "cgroup.controllers").read_text()):
        pytest.skip("needs the cpu controller")

    def weight(job_id: str) -> str:
        folder = root / f"{node.name}~{job_id}" if "cpu" in mounts.v1 else root / node.name / job_id
        file = folder / "cpu.idle"
        return file.read_text().strip() if file.exists() else (folder / "cpu.shares").read_text().strip()

    node.start(node.spec("modest", "/usr/bin/python3", "-c", SERVE, image="system", resources=Resources()))
    before = weight("modest")
    node.start(node.spec("greedy", "/usr/bin/python3", "-c", BURN, image="system", resources=Resources()))
    wait_until("the greedy one yields", lambda: weight("greedy") != before, 120)
    assert weight("modest") == before
    node.kill_daemon()
    node.up()
    wait_until("the next hostd has it yield, too", lambda: weight("greedy") != before, 120)
    for job_id in ("greedy", "modest"):
        assert node.stop(job_id).end_reason == "stopped"
