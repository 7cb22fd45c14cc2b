"""Gives a job a file system of its own for all that it writes, whose size bounds it: ext4 without a journal in a file.

The file has no name, its loop device frees itself, and its mount hangs nowhere until the job's own mount
namespace takes it: when the last process of the job and the last fd of ours are gone, the kernel frees all three.
So a crash leaves nothing behind, and a job that outlives hostd keeps its disk. Made ready ahead (a disk takes 2 ms) by
threads of this file; refilled behind the starts. Called by `hostd.runtime.files`.

A disk begins in the host's page cache: what is written and deleted soon never reaches the host's disk, and a sync costs
next to nothing. One that is written much is better off without (`Disk.go_direct`): the kernel would copy all of it once
more, in threads as important as any process of the host and in turns of tens of milliseconds, and hold it twice.

Where the kernel has no loop devices or no ext4 there are no disks, `refusal` says why, and jobs write into
a plain directory without a bound. The file is sparse: disks promise more than there is, and a job whose host has
no room left reads EIO, not ENOSPC.

Source: loop(4), Documentation/admin-guide/ext4.rst, fsopen(2), move_mount(2).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from hostd.types import MIB
from netns import syscalls
from netns.errors import KernelError

POOL_SIZE = 4
UPPER, WORK, ROOT, SECRETS = "upper", "work", "root", "secrets"
_LOOP_CONTROL = "/dev/loop-control"
_LOOP_MAJOR = 7
_ATTEMPTS = 100
_TEMPLATES_MAX = 16
_BLOCK_BYTES = 4096
# No journal: what a crash tears dies with the job. `uninit_bg` lets mkfs leave the bitmaps of empty groups unwritten.
_FEATURES = (
    "none,64bit,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,sparse_super2,"
    "uninit_bg"
)
_MKFS = (
    "mkfs.ext4", "-q", "-F", "-t", "ext4", "-b", str(_BLOCK_BYTES), "-I", "256", "-i", "16384", "-m", "0",
    "-O", _FEATURES, "-E", "lazy_itable_init=1,nodiscard,num_backup_sb=0",
)  # fmt: skip
# nobarrier: nobody needs these bytes after a power cut. discard: what a job deletes goes back to the host.
_OPTIONS = (("noinit_itable", None), ("nobarrier", None), ("discard", None), ("errors", "continue"))
_log = logging.getLogger(__name__)

Extent = tuple[int, bytes]


class DiskUsage(NamedTuple):
    """How much of a disk is used, in bytes; `free_bytes` is what a job can still write."""

    used_bytes: int
    free_bytes: int

    @property
    def is_full(self) -> bool:
        """Say whether the next larger write fails: less than 1 MiB is left."""
        return self.free_bytes < MIB


class Disk:
    """One mounted file system, held by `fd`, which is its top directory (or, adopted, an overlay on top of it)."""

    def __init__(self, fd: int, size_bytes: int, device: str = "") -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self.device = device
        """Its loop device, as `MAJOR:MINOR`; nothing if it is adopted and nobody remembers."""

    @property
    def path(self) -> Path:
        """Where this process finds it."""
        return Path(f"/proc/self/fd/{self.fd}")

    @property
    def source(self) -> str:
        """Where another process of this machine finds it."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def usage(self) -> DiskUsage:
        """Return how full it is now."""
        found = os.fstatvfs(self.fd)
        return DiskUsage((found.f_blocks - found.f_bfree) * found.f_frsize, found.f_bavail * found.f_frsize)

    def go_direct(self, *, is_direct: bool = True) -> None:
        """Have it written past the host's page cache, after what is there; takes as long as writing that.

        Raises:
            KernelError: the host's file system does not do that.
            OSError: its device cannot be opened.
        """
        loop = _open_loop(int(self.device.partition(":")[2]), os.O_RDONLY)
        try:
            syscalls.loop_set_direct_io(loop, is_direct=is_direct)
        finally:
            os.close(loop)

    def is_own(self) -> bool:
        """Say whether `fd` lies on a file system of `size_bytes`, and not on the host's."""
        found = os.fstatvfs(self.fd)
        return found.f_blocks * found.f_frsize <= -(-self.size_bytes // MIB) * MIB

    def close(self) -> None:
        """Let go of it; takes milliseconds when nobody else has it, for it is unmounted."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Disks:
    """Makes the disks of one state directory, on which their files lie."""

    def __init__(self, folder: Path, *, size_bytes: int, pool_size: int = POOL_SIZE) -> None:
        self.refusal = "not opened yet"
        self.direct_refusal = ""
        """Why the host's file system takes no direct writes."""
        self._folder = folder
        self._size_bytes = size_bytes
        self._pool_size = pool_size
        self._ready: deque[Disk] = deque()
        self._making = 0
        self._counting = threading.Lock()
        self._templates: dict[int, list[Extent]] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="hostd-disks")
        self._is_closed = False

    def open(self) -> None:
        """Find out, by making one, whether this kernel can; blocking."""
        if not self._pool_size:
            self.refusal = "turned off"
            return
        try:
            made = self._make(self._size_bytes)
            self.direct_refusal = _why_not_direct(made)
            self._ready.append(made)
            self.refusal = ""
        except (OSError, subprocess.CalledProcessError) as error:
            self.refusal = str(error)
            _log.warning("jobs' temp disks are plain directories without a bound: %s", error)
            return
        self._threads.submit(self._refill)

    async def take(self, size_bytes: int) -> Disk:
        """Return a disk of this size, rounded up to whole MiB; it is the caller's to close.

        Raises:
            OSError: it cannot be made, ENOSPC if the host's disk is full.
        """
        size_bytes = -(-size_bytes // MIB) * MIB
        if size_bytes == self._size_bytes and self._ready:
            disk = self._ready.popleft()
            asyncio.get_running_loop().call_soon(self._refill_later)  # not in the way of the start that wants this one
            return disk
        made = asyncio.get_running_loop().run_in_executor(self._threads, self._make, size_bytes)
        try:
            return await asyncio.shield(made)
        except asyncio.CancelledError:
            made.add_done_callback(_close_unwanted)
            raise

    def _refill_later(self) -> None:
        if not self._is_closed:
            self._threads.submit(self._refill)

    def _refill(self) -> None:
        while self._has_room():
            try:
                self._ready.append(self._make(self._size_bytes))
            except (OSError, subprocess.CalledProcessError) as error:  # the start that needs one will say so, too
                _log.warning("no temp disk could be made ahead: %s", error)
                return
            finally:
                with self._counting:
                    self._making -= 1

    def _has_room(self) -> bool:
        """Say whether the caller has to make one more, and count it: there are two threads."""
        with self._counting:
            has_room = len(self._ready) + self._making < self._pool_size and not self._is_closed
            self._making += has_room
            return has_room

    def _make(self, size_bytes: int) -> Disk:
        file = _open_nameless(self._folder)
        try:
            os.ftruncate(file, size_bytes)
            for offset, content in self._template(size_bytes):
                os.pwrite(file, content, offset)
            loop, number = _attach_loop(file)
        finally:
            os.close(file)
        try:
            fd = _mount(f"/dev/loop{number}")
        finally:
            os.close(loop)  # from here on the mount alone keeps it
        disk = Disk(fd, size_bytes, f"{_LOOP_MAJOR}:{number}")
        try:
            for name, mode in ((UPPER, 0o755), (WORK, 0o700), (ROOT, 0o700), (SECRETS, 0o700)):
                os.mkdir(name, dir_fd=fd)
                os.chmod(name, mode, dir_fd=fd)
        except BaseException:
            disk.close()
            raise
        return disk

    def _template(self, size_bytes: int) -> list[Extent]:
        """Return what mkfs writes for this size: some ten pages."""
        if size_bytes not in self._templates:
            if len(self._templates) >= _TEMPLATES_MAX:
                self._templates.clear()
            self._templates[size_bytes] = _make_template(self._folder, size_bytes)
        return self._templates[size_bytes]

    def close(self) -> None:
        """Let go of the disks that nobody took, and wait for the threads."""
        self._is_closed = True
        self._threads.shutdown()
        while self._ready:
            self._ready.pop().close()


def _why_not_direct(disk: Disk) -> str:
    try:
        disk.go_direct()
        disk.go_direct(is_direct=False)
    except OSError as error:
        return str(error)
    return ""


def _close_unwanted(made: asyncio.Future[Disk]) -> None:
    if not made.cancelled() and made.exception() is None:
        made.result().close()


def _open_nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):  # overlayfs before Linux 6.3 has no O_TMPFILE
            raise
    fd, path = tempfile.mkstemp(dir=folder)
    Path(path).unlink()
    return fd


def _make_template(folder: Path, size_bytes: int) -> list[Extent]:
    file = _open_nameless(folder)
    try:
        os.ftruncate(file, size_bytes)
        command = [*_MKFS, f"/proc/self/fd/{file}"]
        made = subprocess.run(command, pass_fds=(file,), stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if made.returncode != 0:
            raise OSError(errno.EIO, f"mkfs.ext4: {made.stderr.decode(errors='replace').strip()[-200:]}")
        return list(_content(file))
    finally:
        os.close(file)


def _content(file: int) -> Iterator[Extent]:
    """Yield the runs of blocks that are not all zero."""
    offset = 0
    while True:
        try:
            begin = os.lseek(file, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        offset = os.lseek(file, begin, os.SEEK_HOLE)
        run = bytearray()
        for at in range(begin, offset, _BLOCK_BYTES):
            block = os.pread(file, min(_BLOCK_BYTES, offset - at), at)
            if block.count(0) != len(block):
                run += block
            elif run:
                yield at - len(run), bytes(run)
                run.clear()
        if run:
            yield offset - len(run), bytes(run)


def _attach_loop(file: int) -> tuple[int, int]:
    """Return an open loop device that stands for the file until its last user is gone, and its number."""
    control = os.open(_LOOP_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            number = syscalls.loop_get_free(control)
            loop = _open_loop(number)
            try:
                # blocks as large as any disk's sectors, so that it can go direct on each
                syscalls.loop_configure(loop, file, syscalls.LO_FLAGS_AUTOCLEAR, _BLOCK_BYTES)
                return loop, number
            except KernelError as error:
                os.close(loop)
                if error.errno != errno.EBUSY:  # EBUSY: another was faster
                    raise
    finally:
        os.close(control)
    raise KernelError(errno.EBUSY, "ioctl", "LOOP_CONFIGURE")


def _open_loop(number: int, access: int = os.O_RDWR) -> int:
    path = f"/dev/loop{number}"
    try:
        return os.open(path, access | os.O_CLOEXEC)
    except FileNotFoundError:  # a /dev that the kernel does not keep, as in a container
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(_LOOP_MAJOR, number))
        return os.open(path, access | os.O_CLOEXEC)


def _mount(device: str) -> int:
    configured = syscalls.fsopen("ext4")
    try:
        syscalls.fsconfig(configured, "source", device)
        for key, value in _OPTIONS:
            syscalls.fsconfig(configured, key, value)
        syscalls.fsconfig_create(configured)
        return syscalls.fsmount(configured, syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV)
    finally:
        os.close(configured)
