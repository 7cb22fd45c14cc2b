"""Start to exit of `true` with full isolation, at the spawner, beside crun doing the same.

Both: namespaces mount, pid, net (only lo), uts, ipc, cgroup; a fresh overlay; proc, dev, pts, shm, mqueue, sys,
masked and read-only paths; the default capabilities, no_new_privs, the stock seccomp profile; cgroup limits for
memory, cpu and pids; making and removing the cgroups and the overlay's directories. Ours has an init on top,
which crun has not. Runs in a mount namespace of its own, because crun refuses hybrid cgroups, and both on a file
system made for it (`fresh_disk`).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.cgroups import Cgroups
from bench.measure import Row, interleave, row, show
from hostd.runtime import init
from hostd.runtime.launch import DEFAULT_CAPABILITIES
from hostd.runtime.process import JOB_NAMESPACES, Spawner, SpawnRequest
from hostd.runtime.seccomp import PROFILE_PATH, SeccompCache
from netns import syscalls
from rootfs.mounts import MASKED, READ_ONLY, plan, probe
from rootfs.removal import remove_tree

PER_ROUND = 10
TOGETHER = 4
_DISK_BYTES = 1 << 30  # sparse


def mini_root(folder: Path) -> Path:
    """Copy `true` and `sh` with their libraries."""
    root = folder / "rootfs"
    for name in ("proc", "sys", "dev", "etc", "tmp"):
        (root / name).mkdir(parents=True)
    for program in ("/bin/true", "/bin/sh"):
        listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout.split()
        for path in [program, *(word for word in listed if word.startswith("/"))]:
            target = root / path[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    (folder / "host" / ".hostd").mkdir(parents=True)
    (folder / "host" / ".hostd" / "init").write_bytes(init.program())
    (folder / "host" / ".hostd" / "init").chmod(0o755)
    return root


class Ours:
    """The spawner's arm: what hostd does around it, and the spawner itself."""

    def __init__(self, folder: Path, root: Path, *, has_init: bool = True) -> None:
        self._folder, self._root, self._has_init = folder, root, has_init
        self._loop = asyncio.new_event_loop()
        self._spawner = self._loop.run_until_complete(Spawner.open(folder / "run"))
        self._seccomp = str(SeccompCache(folder / "seccomp").path_for(DEFAULT_CAPABILITIES))
        self._kernel = probe()
        self._number = 0
        self._cgroups = Cgroups(f"hostd-bench-{os.getpid()}")

    def round(self) -> float:
        begin = time.perf_counter()
        self._loop.run_until_complete(self._run(PER_ROUND))
        return (time.perf_counter() - begin) * 1000 / PER_ROUND

    def rate_together(self) -> float:
        """Return jobs per second with `TOGETHER` of them under way at any time."""
        begin = time.perf_counter()
        self._loop.run_until_complete(self._run_together())
        return TOGETHER * PER_ROUND / (time.perf_counter() - begin)

    async def _run_together(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(TOGETHER):
                group.create_task(self._run(PER_ROUND))

    async def _run(self, count: int) -> None:
        exits = self._spawner.exits()
        for _ in range(count):
            self._number += 1
            job_id = f"b{self._number}"
            request = self._prepare(job_id)
            (await self._spawner.spawn(request)).close()
            async for exited in exits:
                if exited.id == job_id:
                    assert exited.status == 0, exited
                    break
            await self._spawner.ack(job_id)
            remove_tree(self._folder / job_id)
            self._cgroups.remove(job_id)

    def _prepare(self, job_id: str) -> SpawnRequest:
        job = self._folder / job_id
        for name in ("", "upper", "work", "root"):
            os.mkdir(f"{job}/{name}")
        return SpawnRequest(
            id=job_id,
            args=("true",),
            env={"PATH": "/bin"},
            hostname=job_id,
            namespaces=(*JOB_NAMESPACES, "net"),
            mounts=plan(
                lower=[self._root, self._folder / "host"],
                upper=job / "upper",
                work=job / "work",
                kernel=self._kernel,
                has_init=True,
            ),
            root=str(job / "root"),
            cgroup_procs=self._cgroups.add(job_id),
            rlimits={"NOFILE": 10000},
            capabilities=tuple(DEFAULT_CAPABILITIES),
            seccomp_path=self._seccomp,
            has_no_new_privs=True,
            has_init=self._has_init,
        )

    def close(self) -> None:
        self._loop.run_until_complete(self._spawner.quit(kill_all=True))
        self._loop.close()
        self._cgroups.close()


class Crun:
    """crun's arm: a bundle, an overlay mounted for it, `crun run`."""

    def __init__(self, folder: Path, root: Path, name: str = "bundle") -> None:
        self._folder, self._root = folder, root
        self._bundle = folder / name
        self._bundle.mkdir()
        self._number = 0
        (self._bundle / "config.json").write_text(json.dumps(self._config()))

    def _config(self) -> dict[str, Any]:
        subprocess.run(["crun", "spec"], cwd=self._bundle, check=True)
        config: dict[str, Any] = json.loads((self._bundle / "config.json").read_text())
        capabilities = [f"CAP_{name}" for name in DEFAULT_CAPABILITIES]
        config["process"] |= {
            "terminal": False,
            "args": ["/bin/true"],
            "env": ["PATH=/bin"],
            "noNewPrivileges": True,
            "capabilities": {kind: capabilities for kind in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 10000, "hard": 10000}],
        }
        config["root"] = {"path": str(self._bundle / "merged"), "readonly": False}
        (self._bundle / "config.json").unlink()
        config["mounts"] = [each for each in config["mounts"] if each["destination"] != "/sys/fs/cgroup"]
        config["linux"] |= {
            "namespaces": [{"type": each} for each in ("mount", "pid", "network", "uts", "ipc", "cgroup")],
            "resources": {"memory": {"limit": 268435456}, "cpu": {"shares": 512}, "pids": {"limit": 100}},
            "maskedPaths": [path for path in MASKED if Path(path).exists()],
            "readonlyPaths": list(READ_ONLY),
            "seccomp": _oci_seccomp(set(capabilities)),
        }
        return config

    def round(self) -> float:
        begin = time.perf_counter()
        for _ in range(PER_ROUND):
            self._number += 1
            name = f"hostd-bench-{os.getpid()}-{self._bundle.name}-{self._number}"
            for each in ("upper", "work", "merged"):
                (self._bundle / each).mkdir()
            options = f"lowerdir={self._root},upperdir={self._bundle}/upper,workdir={self._bundle}/work,volatile"
            syscalls.mount("overlay", str(self._bundle / "merged"), "overlay", syscalls.MS_NODEV, options)
            pid = os.posix_spawn(
                "/usr/bin/crun", ["crun", "--cgroup-manager=cgroupfs", "run", "--bundle", str(self._bundle), name], {}
            )
            _, status = os.waitpid(pid, 0)
            assert status == 0, status
            syscalls.umount2(str(self._bundle / "merged"), syscalls.MNT_DETACH)
            for each in ("upper", "work", "merged"):
                remove_tree(self._bundle / each)
        return (time.perf_counter() - begin) * 1000 / PER_ROUND


class CrunTogether:
    """Some of crun's arms at once, each with a bundle of its own."""

    def __init__(self, folder: Path, root: Path) -> None:
        self._arms = [Crun(folder, root, f"bundle{number}") for number in range(TOGETHER)]

    def rate(self) -> float:
        begin = time.perf_counter()
        with ThreadPoolExecutor(TOGETHER) as threads:  # they only wait for their crun
            list(threads.map(lambda arm: arm.round(), self._arms))
        return TOGETHER * PER_ROUND / (time.perf_counter() - begin)


def _oci_seccomp(granted: set[str]) -> dict[str, Any]:
    """Say containers-common's profile as an OCI config does, for x86_64."""
    profile = json.loads(PROFILE_PATH.read_text())
    rules = []
    for rule in profile["syscalls"]:
        wants, refuses = rule.get("includes") or {}, rule.get("excludes") or {}
        if "amd64" not in wants.get("arches", ["amd64"]) or set(refuses.get("caps", [])) & granted:
            continue
        if set(wants.get("caps", [])) <= granted:
            one = {"names": rule["names"], "action": rule["action"]}
            if rule.get("args"):
                one["args"] = rule["args"]
            if "errnoRet" in rule:
                one["errnoRet"] = rule["errnoRet"]
            rules.append(one)
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    }


@contextmanager
def fresh_disk(folder: Path) -> Iterator[Path]:
    """Give all arms one file system of their own, ext4 as mkfs makes it; wants a mount namespace of our own.

    The machine's may be an ext4 without a journal. There the kernel looks, for every file and directory it makes, at
    all that anybody has removed in the last minutes again (`recently_deleted` in fs/ext4/ialloc.c), which was up to a
    third of a job here and grew with what the rest of the machine did.
    """
    image, disk = folder / "disk.ext4", folder / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(_DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a last job's mounts may not be gone yet


def measure(rounds: int) -> list[Row]:
    """Return the rows `job_start_spawner` and `jobs_per_s_4`."""
    with tempfile.TemporaryDirectory(prefix="hostd-bench-") as name, fresh_disk(Path(name)) as folder:
        root = mini_root(folder)
        ours = Ours(folder, root)
        try:
            arms: dict[str, Callable[[], float]] = {"ours": ours.round, "crun": Crun(folder, root).round}
            found = interleave(arms, rounds)
            many = interleave({"ours": ours.rate_together, "crun": CrunTogether(folder, root).rate}, rounds // 2)
        finally:
            ours.close()
    runs = rounds * PER_ROUND
    return [
        row("job_start_spawner", found["ours"], found["crun"], "crun run", "ms", runs),
        row(f"jobs_per_s_{TOGETHER}", many["ours"], many["crun"], "crun run", "jobs/s", rounds // 2),
    ]


def in_own_mounts(module: str) -> None:
    """Go on in a private mount namespace without the empty v2 mount of a hybrid machine, which crun refuses."""
    if os.environ.get("HOSTD_BENCH_MOUNTS") == "own":
        return
    inside = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", inside, "sh"]
    os.environ["HOSTD_BENCH_MOUNTS"] = "own"
    os.execvp(command[0], [*command, sys.executable, "-m", module, *sys.argv[1:]])


if __name__ == "__main__":
    in_own_mounts("bench.job_start_spawner")
    print(show(measure(int(next(iter(sys.argv[1:]), "10")))))
