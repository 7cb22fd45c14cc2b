"""`true` inside a running job, from the request to its end: `Spawner.exec` beside `crun exec`.

The same isolated job on either side, the same rights for what enters it: all namespaces, the job's cgroups, the default
capabilities, no_new_privs, the stock seccomp profile. Runs in a mount namespace of its own, as `job_start_spawner`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from bench.job_start_spawner import PER_ROUND, Crun, Ours, in_own_mounts, mini_root
from bench.measure import Row, interleave, row, show
from hostd.runtime.process import ExecRequest
from netns import syscalls

ARGS = ("sh", "-c", "echo on; read x")


class Inside(Ours):
    """Our arm: a job that waits for a line, and processes inside it."""

    def begin(self) -> None:
        request = msgspec.structs.replace(self._prepare("inside"), args=ARGS, has_stdin=True)
        self._job = self._loop.run_until_complete(self._spawner.spawn(request))
        assert os.read(self._job.stdout_fd, 3) == b"on\n"
        self._template = ExecRequest(
            id="",
            job_id="inside",
            args=("true",),
            env=request.env,
            cgroup_procs=request.cgroup_procs,
            capabilities=request.capabilities,
            seccomp_path=request.seccomp_path,
        )

    async def _run(self, count: int) -> None:
        exits = self._spawner.exits()
        for _ in range(count):
            self._number += 1
            request = msgspec.structs.replace(self._template, id=f"inside.exec-{self._number}")
            (await self._spawner.exec(request)).close()
            async for exited in exits:
                if exited.id == request.id:
                    assert exited.status == 0, exited
                    break
            await self._spawner.ack(request.id)


class CrunInside(Crun):
    """crun's arm: a detached container that sleeps, and `crun exec`."""

    def begin(self) -> None:
        for each in ("upper", "work", "merged"):
            (self._bundle / each).mkdir()
        options = f"lowerdir={self._root},upperdir={self._bundle}/upper,workdir={self._bundle}/work,volatile"
        syscalls.mount("overlay", str(self._bundle / "merged"), "overlay", syscalls.MS_NODEV, options)
        path = self._bundle / "config.json"
        config = json.loads(path.read_text())
        config["process"]["args"] = ["/bin/sh", "-c", "read x"]
        path.write_text(json.dumps(config))
        self._name = f"hostd-bench-{os.getpid()}-inside"
        self._stdin, self._held = os.pipe()
        command = ["crun", "--cgroup-manager=cgroupfs", "run", "-d", "--bundle", str(self._bundle), self._name]
        subprocess.run(command, check=True, stdin=self._stdin)

    def round(self) -> float:
        begin = time.perf_counter()
        for _ in range(PER_ROUND):
            pid = os.posix_spawn("/usr/bin/crun", ["crun", "exec", self._name, "/bin/true"], {})
            _, status = os.waitpid(pid, 0)
            assert status == 0, status
        return (time.perf_counter() - begin) * 1000 / PER_ROUND

    def close(self) -> None:
        subprocess.run(["crun", "delete", "-f", self._name], check=False)
        os.close(self._stdin)
        os.close(self._held)
        syscalls.umount2(str(self._bundle / "merged"), syscalls.MNT_DETACH)


def measure(rounds: int) -> list[Row]:
    """Return the row `exec`."""
    with tempfile.TemporaryDirectory(prefix="hostd-bench-") as name:
        folder = Path(name)
        root = mini_root(folder)
        ours, crun = Inside(folder, root), CrunInside(folder, root)
        try:
            ours.begin()
            crun.begin()
            found = interleave({"ours": ours.round, "crun": crun.round}, rounds)
        finally:
            crun.close()
            ours.close()
    return [row("exec", found["ours"], found["crun"], "crun exec", "ms", rounds * PER_ROUND)]


if __name__ == "__main__":
    in_own_mounts("bench.exec")
    print(show(measure(int(next(iter(sys.argv[1:]), "10")))))
