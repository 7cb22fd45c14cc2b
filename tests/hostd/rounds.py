"""kill -9 of hostd, of the spawner, or of both, at random moments, while jobs start, run and end: nothing is lost.

`python -m tests.hostd.rounds --rounds 1000 --spawner 200 --both 50 --seed 1` (`make crash-rounds`). Every round
starts some jobs, kills something at a random moment, starts hostd again and asks again for what was not answered.
A job counts its own starts in a volume and prints numbered lines on both streams. In the end each must have run
once, with every line once and in order and its own exit status, and of all of them nothing may be left.

Where hostd and the spawner died together, a job that ended before there was a new hostd may say that nobody knows its
status (`unknown`), its lines are then the first so many; so may one that began and ended while the spawner that started
it was being killed. Nothing else is forgiven.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from discovery.wire.errors import ServiceError
from hostd.types import ENDED, Job, JobSpec, LogLine, Port, Resources, VolumeMount
from tests.hostd.node import DEADLINE_S, Node, node, sh, snapshot, wait_until

JOBS_PER_ROUND = 3
LONGEST_KILL_S = 0.7
CHECK_EVERY = 25
_SCRIPT = """
echo run >> /runs/$NAME
i=0
while [ $i -lt $LINES ]; do i=$((i+1)); echo o $i; echo e $i >&2; [ $PAUSE = 0 ] || sleep $PAUSE; done
exit $STATUS
"""


@dataclass
class Wanted:
    """A job as it was asked for, and what has happened since."""

    spec: JobSpec
    lines: int
    status: int
    is_confirmed: bool = False
    is_young: bool = True
    may_be_unknown: str = ""
    """The kill after which its status may be unknown."""


@dataclass
class Rounds:
    """The state of all rounds on one node."""

    node: Node
    seed: int
    dice: random.Random = field(init=False)
    wanted: dict[str, Wanted] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    done: int = 0
    daemon: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)

    # the daemon

    def start_daemon(self) -> None:
        """Start hostd as `hostd up` does, without waiting for it."""
        with (self.node.state_dir / "hostd.log").open("ab") as output:
            self.daemon = subprocess.Popen(
                self.node.inside(sys.executable, "-P", "-m", "hostd.cli", "daemon"),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env=self.node.environment(),
            )  # fmt: skip

    def wait_ready(self) -> None:
        def probe() -> object:
            if self.daemon is not None and self.daemon.poll() is not None:
                raise AssertionError(f"hostd ended with {self.daemon.returncode} while starting")
            return self.node.status()

        wait_until("hostd is ready", probe)

    def kill_daemon(self) -> None:
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()

    def spawner_pid(self) -> int:
        file = self.node.run_dir / "spawner.pid"  # empty for a moment when one is just starting
        return int(wait_until("there is a spawner", lambda: file.read_text().strip()))

    def kill_spawner(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # it is just being started
            os.kill(self.spawner_pid(), signal.SIGKILL)

    # one round

    def make_job(self, name: str) -> Wanted:
        lines, pause, status = self.dice.choice([0, 1, 20, 200]), self.dice.choice(["0", "0.002", "0.02"]), 0
        lines = min(lines, 60) if pause == "0.02" else lines
        status = self.dice.choice([0, 0, 1, 42])
        spec = self.node.spec(
            name, "/bin/sh", "-c", _SCRIPT,
            env={"NAME": name, "LINES": str(lines), "PAUSE": pause, "STATUS": str(status)},
            volumes=(VolumeMount(name="runs", path="/runs"),),
            ports=(Port(),) if self.dice.random() < 0.3 else (),
            resources=Resources(memory_bytes=64 * 2**20),
        )  # fmt: skip
        return Wanted(spec, lines, status)

    def ask(self, deadline: float) -> None:
        """Ask for everything that was not confirmed yet, until `deadline`."""
        for job in self.wanted.values():
            if not job.is_confirmed and time.monotonic() < deadline:
                try:
                    self.node.start(job.spec)
                    job.is_confirmed = True
                except ServiceError:  # it was killed before it answered
                    return

    def round(self, kind: str) -> None:
        """Start jobs, kill at a random moment, bring hostd back."""
        self.done += 1
        self.kills[kind] += 1
        for index in range(JOBS_PER_ROUND):
            job = self.make_job(f"r{self.done}-{index}")
            self.wanted[job.spec.id] = job
        moment = self.dice.random() * LONGEST_KILL_S
        killer = subprocess.Popen(
            [sys.executable, "-c", _KILLER, str(moment), *(str(pid) for pid in self.victims(kind))],
        )
        self.ask(time.monotonic() + moment)
        killer.wait()
        for job in self.wanted.values():
            if kind == "both" or (kind == "spawner" and not job.may_be_unknown and job.is_young):
                job.may_be_unknown = kind
            job.is_young = False
        if kind != "spawner":
            assert self.daemon is not None
            self.daemon.wait()
            self.start_daemon()
            if self.dice.random() < 0.1:  # and once more while it starts
                time.sleep(self.dice.random() * 0.8)
                self.kill_daemon()
                self.kills["while starting"] += 1
                self.start_daemon()
            self.wait_ready()
        self.ask(time.monotonic() + DEADLINE_S)

    def victims(self, kind: str) -> list[int]:
        assert self.daemon is not None
        pids = []
        if kind != "spawner":
            pids.append(self.daemon.pid)
        if kind != "hostd":
            pids.append(self.spawner_pid())
        self.dice.shuffle(pids)
        return pids

    # what has become of the jobs

    def check_ended(self, *, is_last: bool = False) -> None:
        """Check every job that has ended and forget it; in the end wait for all."""
        jobs = {job.spec.id: job for job in self.node.jobs()}
        for name, wanted in list(self.wanted.items()):
            job = jobs.get(name)
            if is_last and (job is None or job.status not in ENDED):
                job = wait_until(f"{name} has ended", lambda name=name: self._ended(name))  # type: ignore[misc]
            if job is not None and job.status in ENDED:
                self.check(wanted, job)
                del self.wanted[name]
            elif job is None and wanted.is_confirmed:
                self.fail(f"{name} was confirmed and is lost")
                del self.wanted[name]

    def _ended(self, name: str) -> Job | None:
        job = self.node.job(name)
        return job if job.status in ENDED else None

    def check(self, wanted: Wanted, job: Job) -> None:
        name = job.spec.id
        self.endings[f"{job.end_reason} ({wanted.may_be_unknown})" if job.exit_status is None else "exited"] += 1
        runs = self.node.state_dir / "volumes" / "runs" / name
        count = len(runs.read_text().splitlines()) if runs.exists() else 0
        if count != 1:
            self.fail(f"{name} ran {count} times: {job}")
        is_unknown = bool(job.end_reason == "unknown" and job.exit_status is None and wanted.may_be_unknown)
        if not is_unknown and (job.exit_status, job.end_reason) != (wanted.status, "exited"):
            self.fail(f"{name} should have ended with {wanted.status}: {job.status} {job.exit_status} {job.end_reason}")
        lines = list(self.node.caller().events(f"/jobs/{name}/log", LogLine))
        is_said = wanted.may_be_unknown == "both" and any("neither hostd nor" in line.text for line in lines)
        for stream, letter in ((1, "o"), (2, "e")):
            found = [line.text for line in lines if line.stream == stream]
            expected = [f"{letter} {number}" for number in range(1, wanted.lines + 1)]
            if found != (expected[: len(found)] if is_unknown or is_said else expected):
                self.fail(f"{name} printed {len(expected)} lines on {stream}, its log has {len(found)}: {found[:400]}")

    def fail(self, text: str) -> None:
        self.failures.append(f"round {self.done}: {text}")
        print("FAILED", self.failures[-1][:2000], flush=True)

    def check_nothing_left(self, files_before: dict[str, int]) -> None:
        """Check that of all ended jobs nothing is left but logs and records."""
        deadline = time.monotonic() + DEADLINE_S
        while left := self.leftovers(files_before):
            if time.monotonic() > deadline:
                self.fail(f"left behind: {left}")
                return
            time.sleep(0.2)

    def leftovers(self, files_before: dict[str, int]) -> dict[str, object]:
        found: dict[str, object] = {}
        cgroups = [
            str(path)
            for pattern in (f"{self.node.name}/*/", f"*/{self.node.name}/*/")
            for path in Path("/sys/fs/cgroup").glob(pattern)
        ]
        found["cgroups"] = cgroups
        found["job files"] = [path.name for path in (self.node.state_dir / "jobs").iterdir()]
        links = sh(*self.node.inside("ip", "-br", "link", "show", "master", "hstest0")).split("\n")[:-1]
        found["veths"] = links[4:]  # the pool of ready ones
        rules = sh(*self.node.inside("nft", "list", "ruleset")) + sh(*self.node.inside("iptables-legacy-save"))
        found["rules"] = [line for line in rules.splitlines() if re.search(r"\br\d+-\d\b", line)]
        mounts = Path("/proc/mounts").read_text().splitlines()
        found["mounts"] = [line for line in mounts if str(self.node.folder) in line]
        found["processes"] = [pid for pid in self._processes() if pid not in self._ours()]
        files = self.open_files().items()
        found["fds"] = {name: (files_before[name], count) for name, count in files if count > files_before[name] + 6}
        return {name: what for name, what in found.items() if what}

    def _processes(self) -> Iterator[int]:
        """Yield the processes that bear this node's name: all that was started for it but jobs, whose cgroups tell."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if self.node.name.encode() in (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes():
                        yield int(entry.name)

    def _ours(self) -> set[int]:
        assert self.daemon is not None
        discovery = self.node.status().features.get("discovery", "pid 0").removeprefix("pid ")
        return {self.daemon.pid, self.spawner_pid(), int(discovery) if discovery.isdigit() else 0, os.getpid()}

    def open_files(self) -> dict[str, int]:
        """Count the open files of hostd and of the spawner."""
        assert self.daemon is not None
        pids = {"hostd": self.daemon.pid, "spawner": self.spawner_pid()}
        return {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in pids.items()}


_KILLER = """
import os, sys, time
time.sleep(float(sys.argv[1]))
for pid in sys.argv[2:]:
    try:
        os.kill(int(pid), 9)
    except ProcessLookupError:
        pass
"""


def plan(rounds: int, spawner: int, both: int, dice: random.Random) -> list[str]:
    """Return what each round kills, in random order."""
    kinds = ["hostd"] * rounds + ["spawner"] * spawner + ["both"] * both
    dice.shuffle(kinds)
    return kinds


def run(*, rounds: int, spawner: int, both: int, seed: int, has_discovery: bool = False) -> list[str]:
    """Make a node, do all rounds on it, take it down; return what went wrong."""
    with node(7, has_discovery=has_discovery) as machine:
        before = snapshot(machine)
        work = Rounds(machine, seed)
        work.start_daemon()
        work.wait_ready()
        warm = work.make_job("warm")  # unpacks layers
        work.wanted["warm"] = warm
        work.ask(time.monotonic() + DEADLINE_S)
        work.check_ended(is_last=True)
        files_before = work.open_files()
        began = time.monotonic()
        for kind in plan(rounds, spawner, both, work.dice):
            work.round(kind)
            work.check_ended()
            if work.done % CHECK_EVERY == 0:
                work.check_ended(is_last=True)
                work.check_nothing_left(files_before)
                print(
                    f"{work.done} rounds, {time.monotonic() - began:.0f} s, kills {dict(work.kills)}, "
                    f"endings {dict(work.endings)}, open files {work.open_files()}, failures {len(work.failures)}",
                    flush=True,
                )
        work.check_ended(is_last=True)
        work.check_nothing_left(files_before)
        machine.down()
        work.daemon.wait() if work.daemon is not None else None
        after = snapshot(machine)
        if after != before:
            work.fail(f"after hostd down: {after} instead of {before}")
        print(
            f"seed {seed}: {work.done} rounds in {time.monotonic() - began:.0f} s, {sum(work.endings.values())} jobs, "
            f"kills {dict(work.kills)}, endings {dict(work.endings)}, failures {len(work.failures)}"
        )
        return work.failures


def main() -> int:
    parser = argparse.ArgumentParser(description="kill -9 in a thousand places, and count what is lost")
    parser.add_argument("--rounds", type=int, default=1000, help="with hostd killed")
    parser.add_argument("--spawner", type=int, default=200, help="with the spawner killed")
    parser.add_argument("--both", type=int, default=50, help="with both killed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--discovery", action="store_true", help="with the discovery daemon as well")
    words = parser.parse_args()
    failures = run(
        rounds=words.rounds, spawner=words.spawner, both=words.both, seed=words.seed, has_discovery=words.discovery
    )
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
