"""Keeps layers unpacked, each once, by the digest of its blob: `<hex>/` beside `<hex>.ready`.

A layer counts only with its `.ready` file, which names the boot in which it was unpacked until its bytes are
known to be on the disk, and then says `synced`. So a job can start the moment its layer is unpacked, and after
a power cut a layer that may have holes is unpacked again. What a crash left half done is thrown away by `open`.
Refuses digests that are none. Threads only for unpacking, syncing and removing. Called by
`hostd.runtime.files`, which says what is still needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rootfs.errors import BlobMissing
from rootfs.layerstream import Limits
from rootfs.removal import remove_tree
from rootfs.types import hex_of
from rootfs.unpack import unpack

_SYNCED = "synced"
_TOUCH_S = 3600.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_log = logging.getLogger(__name__)

GetBlob = Callable[[], Awaitable[Path]]


class Layers:
    """One directory of unpacked layers, owned by one process."""

    def __init__(self, path: Path, *, limits: Limits | None = None, boot_id: str = "") -> None:
        self.path = path
        self._limits = limits or Limits()
        self._boot_id = boot_id or _BOOT_ID.read_text().strip()
        self._ready: set[str] = set()
        self._locks: dict[str, asyncio.Lock] = {}
        self._threads = ThreadPoolExecutor(max_workers=3, thread_name_prefix="layers")
        self._settling = threading.Lock()
        self._touched: dict[str, float] = {}

    def open(self) -> None:
        """Read which layers are here; remove what is not whole."""
        self.path.mkdir(parents=True, exist_ok=True)
        for entry in self.path.iterdir():
            if entry.suffix == ".ready" and self._is_whole(entry):
                self._ready.add(entry.stem)
        for entry in self.path.iterdir():
            if entry.name.removesuffix(".ready") not in self._ready:
                remove_tree(entry)

    def _is_whole(self, ready: Path) -> bool:
        return ready.with_suffix("").is_dir() and ready.read_text() in (_SYNCED, self._boot_id)

    def path_of(self, digest: str) -> Path:
        """Return the directory of a layer, whether it is here or not."""
        return self.path / hex_of(digest)

    def has(self, digest: str) -> bool:
        """Say whether the layer is here and whole."""
        return hex_of(digest) in self._ready

    def touch(self, digest: str) -> None:
        """Note that a layer is used now; once in an hour is enough."""
        name, now = hex_of(digest), time.monotonic()
        if now - self._touched.get(name, -_TOUCH_S) >= _TOUCH_S:
            self._touched[name] = now
            with contextlib.suppress(OSError):
                os.utime(self.path / f"{name}.ready")

    def used_at(self, digest: str) -> float:
        """Return when a layer was last used or unpacked, in seconds since the epoch; 0 if it is not here."""
        try:
            return (self.path / f"{hex_of(digest)}.ready").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def digests(self) -> tuple[str, ...]:
        """Return the digests of all layers that are here."""
        return tuple(f"sha256:{name}" for name in sorted(self._ready))

    async def ensure(self, digest: str, get_blob: GetBlob) -> Path:
        """Return the layer's directory; get and unpack its blob first if it is not here.

        Concurrent callers wait for one unpacking. One that is cancelled leaves nothing that counts.

        Raises:
            LayerInvalid, BlobMismatch, DiskFull: from unpacking; whatever `get_blob` raises.
        """
        name = hex_of(digest)
        if name in self._ready:
            return self.path / name
        lock = self._locks.setdefault(name, asyncio.Lock())
        try:
            async with lock:
                if name not in self._ready:
                    blob = await get_blob()
                    await asyncio.get_running_loop().run_in_executor(self._threads, self._unpack, blob, digest)
                    self._ready.add(name)
                    self._threads.submit(self.settle)
        finally:
            self._locks.pop(name, None)
        return self.path / name

    def _unpack(self, blob: Path, digest: str) -> None:
        if not blob.is_file():
            raise BlobMissing(f"no blob {digest} at {blob}")
        staging = Path(tempfile.mkdtemp(dir=self.path, prefix="new-"))
        try:
            staging.chmod(0o755)
            unpack(blob, staging, digest=digest, limits=self._limits)
            self._publish(staging, hex_of(digest))
        except BaseException:
            remove_tree(staging, _log_removal)
            raise

    def _publish(self, staging: Path, name: str) -> None:
        try:
            staging.rename(self.path / name)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            remove_tree(staging)  # a caller that was cancelled had got further: the same bytes
        self._write_ready(name, self._boot_id)

    def _write_ready(self, name: str, content: str) -> None:
        ready = self.path / f"{name}.ready"
        temporary = ready.with_suffix(".writing")
        temporary.write_text(content)
        temporary.replace(ready)

    def settle(self) -> None:
        """Bring all layers to the disk and say so in their `.ready`; blocking, runs by itself after each unpacking."""
        with self._settling:  # two unpackings may end together, and both would write the same files
            self._settle()

    def _settle(self) -> None:
        waiting = [name for name in tuple(self._ready) if self._content(name) == self._boot_id]
        if not waiting:
            return
        try:
            # coreutils' `sync -f` is syncfs(2): one call for thousands of files.
            subprocess.run(["sync", "-f", str(self.path)], stdin=subprocess.DEVNULL, check=True)
            for name in waiting:
                if name in self._ready:
                    self._write_ready(name, _SYNCED)
        except (OSError, subprocess.CalledProcessError) as error:
            _log.warning("layers are not known to be on the disk yet, the next unpacking tries again: %s", error)

    def _content(self, name: str) -> str:
        try:
            return (self.path / f"{name}.ready").read_text()
        except FileNotFoundError:
            return ""

    async def collect(self, keep: Iterable[str]) -> int:
        """Remove every layer that is not in `keep` (digests); return how many went.

        The caller keeps those of all living jobs, or their files vanish under them.
        """
        kept = {hex_of(digest) for digest in keep}
        doomed = []
        for name in sorted(self._ready - kept):
            self._ready.discard(name)
            self._touched.pop(name, None)
            (self.path / f"{name}.ready").unlink(missing_ok=True)
            # Out of the way at once, so that the same layer can come back while this is being removed.
            doomed.append(Path(tempfile.mkdtemp(dir=self.path, prefix="old-")))
            (self.path / name).rename(doomed[-1] / name)
        for path in doomed:
            await asyncio.get_running_loop().run_in_executor(self._threads, remove_tree, path)
        return len(doomed)

    def close(self) -> None:
        """Wait for the threads."""
        self._threads.shutdown()


def _log_removal(path: str, error: OSError) -> None:
    _log.warning("cannot remove %s, the next start tries again: %s", path, error)
