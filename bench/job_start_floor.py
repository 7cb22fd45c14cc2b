"""Start to exit at the spawner beside a small C program that makes the same system calls (`floor.c`).

The C program is built here, gets the very same mount plan, seccomp filter, capabilities and limits, and
does in one process what hostd, the spawner and its child do in three.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.cgroups import Cgroups
from bench.job_start_spawner import PER_ROUND, Ours, mini_root
from bench.measure import Row, interleave, row, show
from hostd.runtime.launch import DEFAULT_CAPABILITIES
from hostd.runtime.seccomp import SeccompCache
from netns import syscalls
from rootfs.mounts import plan, probe

SOURCE = Path(__file__).with_name("floor.c")


def plan_text(steps: Sequence[Sequence[Any]]) -> str:
    """Write a mount plan as floor.c reads it."""
    return "".join("\t".join("-" if field is None else str(field) for field in step) + "\n" for step in steps)


class Floor:
    """The C program's arm."""

    def __init__(self, folder: Path, root: Path) -> None:
        self._folder = folder
        self._program = folder / "floor"
        subprocess.run(["gcc", "-O2", "-o", str(self._program), str(SOURCE)], check=True)
        steps = plan(
            lower=[root, folder / "host"],
            upper=Path("/@JOB@/upper"),
            work=Path("/@JOB@/work"),
            kernel=probe(),
            has_init=True,
        )
        (folder / "plan").write_text(plan_text(steps).replace("/@JOB@", "@JOB@"))
        (folder / "floor-jobs").mkdir()
        self._filter = SeccompCache(folder / "seccomp-floor").path_for(DEFAULT_CAPABILITIES)
        self._cgroups = Cgroups(f"hostd-bench-floor-{os.getpid()}")
        (folder / "groups").write_text(self._cgroups.text())

    def round(self) -> float:
        command = [
            *(str(self._program), str(PER_ROUND), str(self._folder / "floor-jobs"), str(self._folder / "groups")),
            *(str(self._filter), str(self._folder / "plan"), "/dev/.hostd-init", "/bin/true"),
            str(syscalls.capability_mask(DEFAULT_CAPABILITIES)),
        ]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    def close(self) -> None:
        self._cgroups.close()


def measure(rounds: int) -> list[Row]:
    """Return the row `job_start_floor`."""
    with tempfile.TemporaryDirectory(prefix="hostd-bench-") as name:
        folder = Path(name)
        root = mini_root(folder)
        ours = Ours(folder, root)
        try:
            floor = Floor(folder, root)
            try:
                found = interleave({"ours": ours.round, "floor": floor.round}, rounds)
            finally:
                floor.close()
        finally:
            ours.close()
    return [row("job_start_floor", found["ours"], found["floor"], "C, the same calls", "ms", rounds * PER_ROUND)]


if __name__ == "__main__":
    print(show(measure(int(next(iter(sys.argv[1:]), "10")))))
