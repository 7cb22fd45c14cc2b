"""Launch step one: put limits on a job, on cgroup v1 or v2, whichever the machine has.

Finds where cgroups are mounted and which disk is under the jobs' files, and chooses the version; from there on both
answer the same calls (`hostd.runtime.cgroup_tree.CgroupStep`). Controllers that the machine lacks are skipped and
named in `missing`. Called by `hostd.daemon`; `hostd.runtime.launch`, `hostd.lifecycle` and `hostd.usage` use the step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from errno import ENODEV
from pathlib import Path

from hostd.runtime.cgroup_tree import CgroupState, CgroupStep, Incidents
from hostd.runtime.cgroup_v1 import CgroupV1
from hostd.runtime.cgroup_v2 import CgroupV2, controllers
from netns.errors import KernelError


@dataclass(frozen=True, kw_only=True)
class Mounts:
    """Where this machine's cgroups are: v1 controllers by name (several may share a directory), v2's root."""

    v1: Mapping[str, Path]
    v2: Path | None


def find_mounts(mountinfo: Path = Path("/proc/self/mountinfo")) -> Mounts:
    """Read where cgroups are mounted; the first mount of a controller counts."""
    v1: dict[str, Path] = {}
    v2: Path | None = None
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        place = Path(before.split()[4])
        if kind == "cgroup2" and v2 is None:
            v2 = place
        elif kind == "cgroup":
            for option in options.split(","):
                v1.setdefault(option, place)
    return Mounts(v1=v1, v2=v2)


def open_cgroups(parent: str, mounts: Mounts | None = None, device: str = "") -> CgroupStep:
    """Choose v2 when it carries the memory and pids controllers, else v1, else v2 without limits.

    `device` is what `find_disk` says of the state directory.

    Raises:
        KernelError: neither is mounted.
    """
    found = mounts or find_mounts()
    if found.v2 is not None and {"memory", "pids"} <= controllers(found.v2):
        return CgroupV2(found.v2, parent, device)
    if {"memory", "pids", "cpu"} & set(found.v1):
        return CgroupV1(dict(found.v1), found.v2, parent, device)
    if found.v2 is not None:
        return CgroupV2(found.v2, parent, device)
    raise KernelError(ENODEV, "mount", "no cgroup hierarchy is mounted")


def find_disk(path: Path, sys: Path = Path("/sys/dev/block")) -> str:
    """Return `MAJOR:MINOR` of the whole disk that a directory lies on; "" when no single disk is under it.

    The kernel takes io limits for disks (and device mapper volumes), not for partitions. btrfs gives its files a device
    number of their own, so the mount's source is asked when there is no such disk.
    """
    number = path.stat().st_dev
    found = f"{os.major(number)}:{os.minor(number)}"
    if not (sys / found).exists():
        found = _source_device(found)
    if not found or not (sys / found).exists():
        return ""
    entry = (sys / found).resolve()
    if (entry / "partition").exists():
        entry = entry.parent
    return (entry / "dev").read_text().strip()


def _source_device(number: str, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the device number of the block device that is mounted under a made-up one."""
    for line in mountinfo.read_text().splitlines():
        before, _, after = line.partition(" - ")
        source = Path(after.split(" ", 2)[1])
        if before.split()[2] == number and source.is_block_device():
            device = source.stat().st_rdev
            return f"{os.major(device)}:{os.minor(device)}"
    return ""


__all__ = [
    "CgroupState",
    "CgroupStep",
    "CgroupV1",
    "CgroupV2",
    "Incidents",
    "Mounts",
    "find_disk",
    "find_mounts",
    "open_cgroups",
]
