"""hostd with one step that kills: the real daemon, its real steps wrapped, started in place of `hostd daemon`.

The file named by `FAULT_FILE` says where and whom: `network.apply after both job-7`. When that step of that job comes
there, the file goes and so do the victims. Without the file nothing happens. `POINTS` are all there is. While a file
of that name and `.slow` is there, the disk takes half a second for what hostd records.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from hostd.cli.main import main
from hostd.grants import Grants
from hostd.lifecycle import JobRun
from hostd.records import Records
from hostd.runtime.cgroup import CgroupStep
from hostd.runtime.files import FilesStep
from hostd.runtime.network import NetworkStep
from hostd.runtime.process import ProcessStep, Spawner
from hostd.store import Store

STEPS: dict[str, tuple[type, str]] = {
    "cgroup": (CgroupStep, "cgroup"),
    "network": (NetworkStep, "network"),
    "files": (FilesStep, "files"),
    "process": (ProcessStep, "process"),
}
OTHERS: dict[str, tuple[type, str]] = {
    "record.change": (Records, "change"),
    "stop.deregister": (JobRun, "_deregister"),
    "stop.signal": (Spawner, "signal"),
    "stop.kill": (JobRun, "_kill"),
    "end.ack": (Spawner, "ack"),
}
GRANTS: dict[str, tuple[type, str]] = {"grants.apply": (Grants, "apply"), "grants.undo": (Grants, "undo")}
GRANT_POINTS = [f"{name} {when}" for name in GRANTS for when in ("before", "after")]
"""Of jobs that are granted some of the store: `test_grants` has one."""
LAUNCH_POINTS = [f"{step}.apply {when}" for step in STEPS for when in ("before", "after")]
UNDO_POINTS = [f"{step}.undo {when}" for step in STEPS for when in ("before", "after")]
_OTHER_POINTS = [f"{name} {when}" for name in OTHERS for when in ("before", "after")]
STOP_POINTS = [
    *UNDO_POINTS,
    *(point for point in _OTHER_POINTS if point != "stop.kill after"),
]  # it is cancelled by then


def strike(point: str, job_id: str) -> None:
    """Kill whom the fault file names, if it names this point of this job; then forget the fault."""
    file = Path(os.environ["FAULT_FILE"])
    try:
        where, when, victim, whose = file.read_text().split()
    except (OSError, ValueError):
        return
    if (f"{where} {when}", whose) != (point, job_id):
        return
    file.unlink()
    if victim in ("spawner", "both"):
        os.kill(int((Path(os.environ["HOSTD_RUN_DIR"]) / "spawner.pid").read_text()), signal.SIGKILL)
    if victim in ("hostd", "both"):
        os.kill(os.getpid(), signal.SIGKILL)


def id_in(value: Any) -> str:
    """Return the job's id, which is the first argument, or part of it or of the object."""
    return value if isinstance(value, str) else str(getattr(value, "id", "") or value.spec.id)


def wrap(owner: type, method: str, point: str) -> None:
    """Have a step look for its fault before and after."""
    real: Callable[..., Awaitable[Any]] = getattr(owner, method)

    @functools.wraps(real)
    async def wrapped(self: Any, *args: Any, **more: Any) -> Any:
        job_id = id_in(args[0] if args else self)
        strike(f"{point} before", job_id)
        result = await real(self, *args, **more)
        strike(f"{point} after", job_id)
        return result

    assert inspect.iscoroutinefunction(real), (owner, method)
    setattr(owner, method, wrapped)


def slow(store: type[Store]) -> None:
    """Have the disk take its time, if it is told to."""
    real = store._write

    @functools.wraps(real)
    def wrapped(self: Store, *args: Any) -> None:
        if Path(os.environ["FAULT_FILE"] + ".slow").exists():
            time.sleep(0.5)  # the disk's own time, in its own thread
        real(self, *args)

    store._write = wrapped  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    slow(Store)
    for name, (step, _) in STEPS.items():
        wrap(step, "apply", f"{name}.apply")
        wrap(step, "undo", f"{name}.undo")
    for name, (owner, attribute) in (OTHERS | GRANTS).items():
        wrap(owner, attribute, name)
    sys.exit(main(["daemon"]))
