"""A real hostd whose jobs may ask, in their environment, to have protections taken off: only for `test_escape`.

`WEAKEN=seccomp,userns` takes these off, and nothing else, between hostd's last step and the spawner; a job without
that variable gets all of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from hostd.cli.main import main
from hostd.runtime.process import ProcessStep, Spawned, SpawnRequest
from rootfs.mounts import MS_NODEV, MS_RDONLY

Plan = list[list[Any]]
_CGROUPS = "/sys/fs/cgroup"


def _plan(change: Callable[[list[Any]], list[Any] | None]) -> Callable[[SpawnRequest], SpawnRequest]:
    def act(request: SpawnRequest) -> SpawnRequest:
        if request.mounts is None:
            return request
        steps = (change(list(step)) for step in request.mounts)
        return msgspec.structs.replace(request, mounts=[step for step in steps if step is not None])

    return act


def _set(**fields: Any) -> Callable[[SpawnRequest], SpawnRequest]:
    return lambda request: msgspec.structs.replace(request, **fields)


def _without_namespace(name: str) -> Callable[[SpawnRequest], SpawnRequest]:
    def act(request: SpawnRequest) -> SpawnRequest:
        return msgspec.structs.replace(request, namespaces=tuple(each for each in request.namespaces if each != name))

    return act


def _no_mapping(step: list[Any]) -> list[Any] | None:
    if step[0] == "idmap":
        return None
    return [*step[:3], False] if step[0] == "attach" else step


def _no_mask(step: list[Any]) -> list[Any] | None:
    is_mask = step[0] in ("mask", "cover")
    return None if is_mask else step


def _writable(step: list[Any]) -> list[Any] | None:
    if step[0] == "mount" and step[2].startswith(("/proc/", "/sys")) and not step[2].startswith(_CGROUPS):
        if step[2].startswith("/proc/") and step[3] is None:
            return None
        step[4] &= ~MS_RDONLY
    return step


def _writable_cgroups(step: list[Any]) -> list[Any] | None:
    if step[0] == "mount" and step[2].startswith(_CGROUPS):
        if step[3] is None and step[1] is None:
            return None
        step[4] &= ~MS_RDONLY
    return step


def _with_devices(step: list[Any]) -> list[Any] | None:
    if step[0] == "mount" and step[2] == "/":
        step[5], step[4] = step[5], step[4] & ~MS_NODEV
    return step


def _host_device(request: SpawnRequest) -> SpawnRequest:
    assert request.mounts is not None
    number = next(Path("/dev").joinpath(name).stat().st_rdev for name in ("loop-control", "fuse", "kmsg", "vda", "sda"))
    node = ["mknod", "/dev/kmsg", 0o600, os.major(number), os.minor(number)]
    return msgspec.structs.replace(request, mounts=[*request.mounts, node])


def _writable_volume(step: list[Any]) -> list[Any] | None:
    if step[0] == "mount" and step[2] == "/readonly":
        step[4] &= ~MS_RDONLY
    return step


def _host_root(request: SpawnRequest) -> SpawnRequest:
    env = {**request.env, "PATH": os.environ["PATH"]}
    return msgspec.structs.replace(request, mounts=None, root="", has_init=False, uid_base=0, env=env)


def _leaky(request: SpawnRequest) -> SpawnRequest:
    args = ("/bin/sh", "-c", 'exec 9</etc/passwd; exec "$@"', "sh", *request.args)
    return msgspec.structs.replace(request, args=args)


OFF: dict[str, Callable[[SpawnRequest], SpawnRequest]] = {
    "seccomp": _set(seccomp_path=""),
    "capabilities": _set(capabilities=None),
    "userns": lambda request: _plan(_no_mapping)(_set(uid_base=0)(request)),
    "no_new_privs": _set(has_no_new_privs=False),
    "pid": _without_namespace("pid"),
    "ipc": _without_namespace("ipc"),
    "uts": _without_namespace("uts"),
    "cgroup": _without_namespace("cgroup"),
    "net": _set(netns=""),
    "mask": _plan(_no_mask),
    "readonly": _plan(_writable),
    "cgroup_view": _plan(_writable_cgroups),
    "nodev": _plan(_with_devices),
    "dev": _host_device,
    "readonly_volume": _plan(_writable_volume),
    "root": _host_root,
    "closed_fds": lambda request: _set(args=("/bin/sh", "-c", 'exec 9</etc/passwd; exec "$@"', "sh", *request.args))(
        request
    ),
    "closed_env": lambda request: _set(env={**os.environ, **request.env})(request),
    "firewall": lambda request: request,  # the test takes the rules away
    "prefix": lambda request: request,  # the test's spec grants it
}

_apply = ProcessStep.apply


async def apply(self: ProcessStep, request: SpawnRequest) -> Spawned:
    for name in filter(None, request.env.get("WEAKEN", "").split(",")):
        request = OFF[name](request)
    return await _apply(self, request)


if __name__ == "__main__":
    ProcessStep.apply = apply  # type: ignore[method-assign]
    sys.exit(main(["daemon"]))
