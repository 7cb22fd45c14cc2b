"""A root for isolated processes: the machine's own /usr, read-only, under an overlay of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostd.runtime import init
from hostd.runtime.process import JOB_NAMESPACES, Exited, Spawned, Spawner, SpawnRequest
from rootfs.mounts import Bind, plan, probe
from tests.pace import SLOWNESS

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
KERNEL = probe()
DEADLINE_S = 20.0 * SLOWNESS
HAS_EXIT_INFO = tuple(int(word) for word in os.uname().release.split(".")[:2]) >= (6, 15)
"""Whether the kernel says how a process ended that is nobody's child here; if not, the status may be unknown."""
UID_BASE = 524288


@dataclass(frozen=True)
class Isolation:
    """Makes requests for isolated processes below one directory."""

    directory: Path

    def request(
        self, job_id: str, *args: str, binds: Sequence[Bind] = (), uid_base: int = UID_BASE, **fields: Any
    ) -> SpawnRequest:
        lower, host = self.directory / "lower", self.directory / "host"
        if not lower.exists():
            for name in ("proc", "sys", "dev", "etc", "tmp", "root"):
                (lower / name).mkdir(parents=True)
            for name in ("bin", "sbin", "lib", "lib64"):
                (lower / name).symlink_to(f"usr/{name}")
            (lower / "tmp").chmod(0o1777)
            (host / ".hostd").mkdir(parents=True)
            (host / ".hostd" / "init").write_bytes(init.program())
            (host / ".hostd" / "init").chmod(0o755)
        job = self.directory / job_id
        for name in ("upper", "work", "root"):
            (job / name).mkdir(parents=True)
        steps = plan(
            lower=[lower, host],
            upper=job / "upper",
            work=job / "work",
            kernel=KERNEL,
            binds=[Bind(source="/usr", target="/usr", is_read_only=True), *binds],
            uid_base=uid_base,
            idmaps=[str(self.directory), "/usr", *(bind.source for bind in binds)],
        )
        settings: dict[str, Any] = {
            "env": {"PATH": PATH},
            "uid_base": uid_base,
            "hostname": job_id,
            "namespaces": (*JOB_NAMESPACES, "net"),
            "mounts": steps,
            "root": str(job / "root"),
            "capabilities": ("CHOWN", "KILL", "SETUID", "SETGID"),
            "has_no_new_privs": True,
            "has_init": True,
        }
        return SpawnRequest(id=job_id, args=args, **(settings | fields))


@asynccontextmanager
async def spawner_in(run_dir: Path, *, may_have_seed: bool = True) -> AsyncIterator[Spawner]:
    """Run a spawner of the test's own; at the end it and all its processes are gone."""
    spawner = await Spawner.open(run_dir, may_have_seed=may_have_seed)
    pid = spawner.pid
    try:
        yield spawner
    finally:
        if not spawner.is_connected:
            spawner = await Spawner.open(run_dir, may_start=False)
        await spawner.quit(kill_all=True)
        await gone(pid)


async def gone(pid: int) -> None:
    """Wait until a process is no more."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), DEADLINE_S)
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def read_all(fd: int) -> str:
    """Read to the end of file (a terminal's end is EIO), and close."""

    def read() -> bytes:
        found = b""
        while True:
            try:
                chunk = os.read(fd, 65536)
            except OSError:
                return found
            if not chunk:
                return found
            found += chunk

    try:
        return (await asyncio.wait_for(asyncio.to_thread(read), DEADLINE_S)).decode()
    finally:
        os.close(fd)


async def exit_of(spawner: Spawner, job_id: str) -> Exited:
    """Wait until it has ended."""
    async with asyncio.timeout(DEADLINE_S):
        async for exited in spawner.exits():
            if exited.id == job_id:
                return exited
    raise AssertionError


async def run(spawner: Spawner, request: SpawnRequest) -> tuple[int, str, str]:
    """Run to the end and return (status, stdout, stderr)."""
    fds: Spawned = await spawner.spawn(request)
    out, err = await asyncio.gather(read_all(fds.stdout_fd), read_all(fds.stderr_fd))
    if fds.stdin_fd >= 0:
        os.close(fds.stdin_fd)
    status = (await exit_of(spawner, request.id)).status
    assert status is not None
    await spawner.ack(request.id)
    return status, out, err
