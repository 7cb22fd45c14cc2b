"""The member processes of a cluster under test: started, killed, stopped, cut from power, and what their disks kept."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from tests.discovery.crash.arms import ROOT, Arm, environment, socket, state_directory, tape
from tests.discovery.crash.network import Network
from tests.discovery.crash.powercut import Platter
from tests.discovery.crash.store import NotAnswered, Store

TOLD = {
    "compactions": r"snapshot at log index \d+, revision",
    "snapshots received": r"snapshot at log index \d+ from",
    "torn tails": "cut a torn tail",
    "uncommitted entries replaced": "were never committed",
    "elections": "this member leads now",
}
"""What is counted in the logs: a crash test in which these do not happen shows little."""
STARTS_MAX = 3
"""How often a member that ends by itself is started again, as hostd would."""
ALARMS = r" (ERROR|CRITICAL) |^Traceback|Task exception was never retrieved"
READY_S = 60.0
"""A member that does not answer within this time, with everything healed, needs a hand."""


class Member:
    """One process and its disk. `problems` collects what no member may do: end by itself, not come back."""

    def __init__(self, arm: Arm, folder: Path, network: Network, name: str) -> None:
        self.name = name
        self._arm = arm
        self._folder = folder
        self._network = network
        self.directory = state_directory(folder, name)
        self.directory.mkdir(parents=True, mode=0o700)
        self.platter = Platter(self.directory)
        self._process: subprocess.Popen[bytes] | None = None
        self.problems: list[str] = []
        self.starts = 0
        self._is_doomed = False
        self.cuts = 0
        self.log_lines: Counter[str] = Counter()
        self._log_read = 0

    @property
    def socket(self) -> Path:
        return socket(self._folder, self.name)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> Path:
        return self._folder / self.name / "log"

    @property
    def has_power_cuts(self) -> bool:
        return self._arm.has_tape

    @property
    def is_up(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        assert self._process is None
        self.socket.unlink(missing_ok=True)
        command = self._network.inside(self.name, *self._arm.command(self._folder, self._network, self.name))
        with self.log.open("ab") as log:
            log.write(b"--- start %d\n" % self.starts)
            log.flush()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(), cwd=ROOT
            )
        self.starts += 1

    def kill(self, power_cut: random.Random | None = None, *, is_total: bool = False) -> None:
        """Kill -9; with dice for it, the disk keeps only what it had to."""
        if self._process is None:
            return
        if not self._is_doomed:
            self._look()
        self._is_doomed = False
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._arm.has_tape:
            self.platter.follow(tape(self._folder, self.name))
            if power_cut is None:
                self.platter.reconcile()
            else:
                self.platter.cut(power_cut, is_total=is_total)
                self.cuts += 1

    def doom(self) -> None:
        """Have it die in the middle of one of its next steps on the disk, if it can; `kill` has to follow."""
        if self._process is not None and self._arm.has_tape:
            self._is_doomed = True
            os.kill(self._process.pid, signal.SIGUSR1)

    def slow(self) -> None:
        """Have its disk be a slow one, until it is started again."""
        if self._process is not None and self._arm.has_tape:
            os.kill(self._process.pid, signal.SIGUSR2)

    def pause(self) -> None:
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGCONT)

    def _look(self) -> None:
        """Notice a process that ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            self.problems.append(f"{self.name} ended by itself with {self._process.returncode}: {self.last_words()}")
            self._process = None
            if self._arm.has_tape:
                self.platter.follow(tape(self._folder, self.name))
                self.platter.reconcile()

    def read_log(self) -> list[str]:
        """Count what the log says since the last look, and return what no member of a healthy disk may say."""
        with self.log.open("rb") as file:
            file.seek(self._log_read)
            raw = file.read()
        self._log_read += len(raw)
        lines = raw.decode(errors="replace").splitlines()
        self.log_lines.update(what for line in lines for what, said in TOLD.items() if re.search(said, line))
        return [f"{self.name} says: {line}" for line in lines if re.search(ALARMS, line)]

    def last_words(self) -> str:
        lines = self.log.read_bytes().decode(errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-600:]

    async def wait_ready(self) -> bool:
        """Wait until the member answers as one of its cluster; start it again if it ends, and take note of that."""
        deadline = time.monotonic() + READY_S
        starts = self.starts
        store = Store(self.socket, timeout_s=5.0)
        try:
            while time.monotonic() < deadline:
                self._look()
                if self._process is None and self.starts >= starts + STARTS_MAX:
                    return False
                if self._process is None:
                    self.start()
                with contextlib.suppress(NotAnswered):
                    await store.call("maintenance/status", {})
                    await store.get("is anybody there")
                    return True
                await asyncio.sleep(0.03)
        finally:
            await store.close()
        self.problems.append(
            f"{self.name} does not answer {READY_S:g} s after everything is healed: {self.last_words()}"
        )
        return False
