"""Says which mounts make a job's root, as plain data; never mounts anything itself.

`plan` is pure: values in, a list of steps out. hostd sends the steps to the spawner, whose child carries
them out in the job's own mount namespace (made private first) before `pivot_root`; nothing is ever
mounted in the machine's namespace. Called by `hostd.runtime.files`.

A step is a JSON array. Every target is an absolute path inside the new root, to be resolved with
`openat2(RESOLVE_IN_ROOT)`, so that a symlink in an image cannot lead a mount out of it:

    ["idmap", path]                                  `path` of the HOST, and the mounts below it, once more on the
                                                     same path, the former with its owners shifted into the job's
                                                     user namespace; only before the first "mount"
    ["attach", source, place, is_mapped]                        a mount that hostd holds and that hangs nowhere, such as
                                                     "/proc/4711/fd/9", on a path of the HOST, with `is_mapped`
                                                     its owners shifted as well; only before the first "mount"
    ["mount", source, target, fstype, flags, data]   mount(2); source is a path of the HOST, or a name
                                                     such as "proc"; with MS_BIND and source null the
                                                     target is bound onto itself; with MS_REMOUNT null
    ["mkdir", target, mode]                          with missing parents (0755); fine if it exists
    ["file", target]                                 an empty file (0644) to bind on, with missing parents;
                                                     fine if it exists
    ["mask", target]                                 the job's own /dev/null on it: root inside could change
                                                     owner and mode of one that is the host's
    ["cover", target]                                an empty directory that cannot be written to on it: the same one
                                                     on all that the job has of them, for each file system costs
    ["symlink", to, target]    ["mknod", target, mode, major, minor]    ["umount", target]

The first "mount" step mounts the overlay on "/", which is `FilesState.root` on the host until the pivot. The child
runs with umask 0, so that modes mean what they say; what it makes belongs to root of the job.

Source: OCI runtime-spec `config-linux.md` (default devices and file systems), containers-common's defaults
for masked and read-only paths, mount(2), Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rootfs.errors import NameInvalid

Step = tuple[str | int | None, ...]

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_STRICTATIME = 32, 4096, 16384, 1 << 24
_SAFE = MS_NOSUID | MS_NODEV | MS_NOEXEC
_REMOUNT_READ_ONLY = MS_REMOUNT | MS_BIND | MS_RDONLY

INIT_PATH = "/dev/.hostd-init"
_HOST_LAYER_INIT = "/.hostd/init"
_OPTIONS_BYTES_MAX = 4095  # the kernel takes one page of mount data, with its zero byte

_DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))
_DEV_LINKS = (
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
)
MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/selinux",
    "/sys/kernel/debug",
    "/sys/kernel/tracing",
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_OURS = ("/proc", "/sys", "/dev", "/.hostd")
_CGROUPS = "/sys/fs/cgroup"
_TTY_GID = 5


@dataclass(frozen=True, kw_only=True)
class KernelPaths:
    """Which of the masked and read-only paths this kernel has, and whether it knows `mqueue`."""

    masked_files: tuple[str, ...]
    masked_dirs: tuple[str, ...]
    read_only: tuple[str, ...]
    has_mqueue: bool


@dataclass(frozen=True, kw_only=True)
class Bind:
    """A path of the host at `target` inside; a directory or, with `is_file`, a file. `flags` are added."""

    source: str
    target: str
    is_read_only: bool
    is_file: bool = False
    flags: int = 0


def probe() -> KernelPaths:
    """Look which of the paths exist: `/proc` and `/sys` of a job show the same kernel as the host's."""
    masked = [Path(path) for path in MASKED]
    return KernelPaths(
        masked_files=tuple(str(path) for path in masked if path.exists() and not path.is_dir()),
        masked_dirs=tuple(str(path) for path in masked if path.is_dir()),
        read_only=tuple(path for path in READ_ONLY if Path(path).exists()),
        has_mqueue="mqueue" in Path("/proc/filesystems").read_text().split(),
    )


def plan(
    *,
    lower: Sequence[Path],
    upper: Path,
    work: Path,
    kernel: KernelPaths,
    binds: Iterable[Bind] = (),
    has_init: bool = True,
    shm_bytes: int = 64 * 1024 * 1024,
    cgroups: Mapping[str, str] | None = None,
    uid_base: int = 0,
    idmaps: Sequence[str] = (),
    attached: Sequence[tuple[str, str, bool]] = (),
) -> list[Step]:
    """Return the steps for one job. `lower` is bottom first; its last one is the host layer if `has_init`.

    `cgroups` are the job's own, read-only below /sys/fs/cgroup: directories of the host by controller, or the one of
    cgroup v2 by "". With a `uid_base` (what the host calls uid 0 of the job) `idmaps` are the host's paths
    that have to be mapped; all of layers, `upper`, `work` and binds should be below one of them.
    `attached` are the arguments of "attach": the file system that `upper` and `work` lie on comes first.

    Raises:
        NameInvalid: a bind's target is not allowed, or the layers do not fit into one mount call.
    """
    steps: list[Step] = [("idmap", path) for path in idmaps] if uid_base else []
    steps.extend(("attach", *each) for each in attached)
    steps.append(_overlay(lower, upper, work))
    steps.append(("mount", "proc", "/proc", "proc", _SAFE, None))
    steps.extend(_dev(has_init=has_init, has_mqueue=kernel.has_mqueue, shm_bytes=shm_bytes, uid_base=uid_base))
    steps.append(("mount", "sysfs", "/sys", "sysfs", _SAFE | MS_RDONLY, None))
    steps.extend(_hidden(kernel))
    steps.extend(_cgroup_view(cgroups or {}))
    # Parents before children, so that one bind may lie inside another.
    for bind in sorted(binds, key=lambda each: (each.target.count("/"), each.target)):
        steps.extend(_bind(bind))
    return steps


def check_target(path: str) -> str:
    """Accept where a bind or volume may go: absolute, in normal form, and not where the plan's own mounts are.

    Raises:
        NameInvalid: it is anything else.
    """
    is_plain = path.startswith("/") and not path.startswith("//") and posixpath.normpath(path) == path
    if not is_plain or path == "/" or "\0" in path or len(path) > 1024:
        raise NameInvalid(f"mount path {path[:100]!r}", hint="an absolute path without `..`, such as /data")
    if any(path == ours or path.startswith(ours + "/") for ours in _OURS):
        raise NameInvalid(f"mount path {path!r} is inside a system directory", hint="not under /proc /sys /dev")
    return path


def _overlay(lower: Sequence[Path], upper: Path, work: Path) -> Step:
    # volatile: the upper directory dies with the job, so its fsyncs and its unmount need not wait for the disk.
    top_first = ":".join(_escape(path) for path in reversed(lower))
    options = f"lowerdir={top_first},upperdir={_escape(upper)},workdir={_escape(work)},volatile"
    if len(options.encode()) > _OPTIONS_BYTES_MAX:
        raise NameInvalid(f"{len(lower)} layers do not fit into one mount", hint="fewer layers, or a shorter state_dir")
    return ("mount", "overlay", "/", "overlay", MS_NODEV, options)


def _escape(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def _cgroup_view(cgroups: Mapping[str, str]) -> list[Step]:
    """Let programs find their limits where they look for them."""
    read_only = MS_BIND | MS_RDONLY | _SAFE
    if not cgroups:
        return []  # sysfs of its own has an empty directory there
    if "" in cgroups:
        return [("mount", cgroups[""], _CGROUPS, None, read_only, None)]
    steps: list[Step] = [("mount", "tmpfs", _CGROUPS, "tmpfs", _SAFE, "mode=755,size=16k")]
    for name, directory in sorted(cgroups.items()):
        steps.append(("mkdir", f"{_CGROUPS}/{name}", 0o755))
        steps.append(("mount", directory, f"{_CGROUPS}/{name}", None, read_only, None))
    steps.append(("mount", None, _CGROUPS, None, _REMOUNT_READ_ONLY | _SAFE, None))
    return steps


@lru_cache(64)
def _dev(*, has_init: bool, has_mqueue: bool, shm_bytes: int, uid_base: int) -> tuple[Step, ...]:
    steps: list[Step] = [
        ("mount", "tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_NOEXEC | MS_STRICTATIME, "mode=755,size=65536k")
    ]
    steps += [("mknod", f"/dev/{name}", 0o666, major, minor) for name, major, minor in _DEVICES]
    steps += [("symlink", to, f"/dev/{name}") for to, name in _DEV_LINKS]
    if has_init:
        steps.append(("symlink", _HOST_LAYER_INIT, INIT_PATH))
    steps.append(("mkdir", "/dev/pts", 0o755))
    pts_options = f"newinstance,ptmxmode=0666,mode=0620,gid={uid_base + _TTY_GID}"
    steps.append(("mount", "devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, pts_options))
    steps.append(("mkdir", "/dev/shm", 0o1777))
    steps.append(("mount", "shm", "/dev/shm", "tmpfs", _SAFE, f"mode=1777,size={shm_bytes}"))
    if has_mqueue:
        steps.append(("mkdir", "/dev/mqueue", 0o755))
        steps.append(("mount", "mqueue", "/dev/mqueue", "mqueue", _SAFE, None))
    return tuple(steps)


@lru_cache(4)
def _hidden(kernel: KernelPaths) -> tuple[Step, ...]:
    steps: list[Step] = []
    for path in kernel.read_only:
        steps.append(("mount", None, path, None, MS_BIND | MS_REC, None))
        steps.append(("mount", None, path, None, _REMOUNT_READ_ONLY | _SAFE, None))
    steps += [("mask", path) for path in kernel.masked_files]
    steps += [("cover", path) for path in kernel.masked_dirs]
    return tuple(steps)


def _bind(bind: Bind) -> list[Step]:
    # Not recursive: what is mounted below the source on the host stays there, and could not be made read-only.
    target = check_target(bind.target)
    flags = MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV | (MS_RDONLY if bind.is_read_only else 0) | bind.flags
    return [
        ("file", target) if bind.is_file else ("mkdir", target, 0o755),
        ("mount", bind.source, target, None, MS_BIND, None),
        ("mount", None, target, None, flags, None),
    ]
