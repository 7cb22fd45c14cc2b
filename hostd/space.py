"""Says what takes the host's disk, and gives back what nobody needs: by age, and more of it when the disk gets full.

    always, by age      ended jobs' records and logs; unpacked layers that neither a job nor a stored image needs; blobs
                        of the store that no image names
    above the mark      the same whatever their age (jobs that ended in the last ten minutes stay), then images that no
                        job uses, the longest unused first, until the disk is below the lower mark; never those
                        that `hostd image build` makes

`gc` and its dry run ask the same questions. What a start in flight uses is asked last, on the loop, right before the
removal; every removal is a rename or an entry of an index first, so a crash leaves no half of anything that counts.
Never volumes or snapshots. Made and run by `daemon`. Source of the marks: Docker's and kubelet's image GC (85 %).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from discovery.wire import clock
from hostd.config import Config
from hostd.jobs import Jobs, has_to_restart, to_forget
from hostd.runtime.files import FilesStep
from hostd.types import ENDED, DiskUse, Removed
from rootfs import types as rootfs_types
from rootfs.errors import StoreBusy

log = logging.getLogger(__name__)

PERIOD_S = 60.0
BLOB_KEEP_S = 3600.0
"""How long a blob stays that somebody brought or asked for: the image that names it may still come."""
PRESSED_KEEP_S = 600.0
"""How long the log of an ended job stays on a full disk: why it ended is asked just then."""
PROTECTED = frozenset({"base", "system", "stack", "build"})
_BLOCK_BYTES = 512


class Space:
    """The disk of one node."""

    def __init__(self, config: Config, files: FilesStep, jobs: Jobs) -> None:
        self._config = config
        self._files = files
        self._jobs = jobs
        self._one = asyncio.Lock()

    # --- what there is

    async def df(self) -> list[DiskUse]:
        """Measure all that we keep on the disk; `reclaimable_bytes` is what a `gc` would free now."""
        doomed: dict[str, int] = {}
        for removed in await self.gc(is_dry_run=True):
            doomed[removed.kind] = doomed.get(removed.kind, 0) + removed.size_bytes
        state, volumes = self._config.state_dir, self._files.volumes
        found = []
        for kind, folder, count in (
            ("images", self._files.images.path, len(await asyncio.to_thread(self._files.images.images))),
            ("layers", self._files.layers.path, len(self._files.layers.digests())),
            ("volumes", volumes.path, len(volumes.names())),
            ("snapshots", state / "snapshots", len(volumes.snapshots())),
            ("logs", self._config.logs_dir, len(self._jobs.logs.names())),
            ("downloads", state / "downloads", 0),
            ("build cache", self._config.cache_dir, 0),
        ):
            size = await asyncio.to_thread(tree_bytes, folder)
            found.append(DiskUse(kind=kind, count=count, size_bytes=size, reclaimable_bytes=doomed.get(kind, 0)))
        active = self._jobs.records.active()
        usages = [usage for record in active if (usage := self._files.usage(record.job.spec.id)) is not None]
        used = sum(usage.used_bytes for usage in usages)
        found.insert(2, DiskUse(kind="temp disks", count=len(usages), size_bytes=used))
        return found

    async def df_volumes(self) -> list[DiskUse]:
        """Measure each volume and each snapshot (which may share blocks with its volume)."""
        store = self._files.volumes
        places = [(name, store.place(name)) for name in store.names()]
        places += [(f"{each.volume}@{each.name}", store.place(each.volume, each.name)) for each in store.snapshots()]
        return [
            DiskUse(kind=kind, count=1, size_bytes=await asyncio.to_thread(tree_bytes, place)) for kind, place in places
        ]

    # --- what nobody needs

    async def gc(self, *, is_dry_run: bool = False, is_pressed: bool = False) -> list[Removed]:
        """Remove what nobody needs (or only say what that is); `is_pressed` does not ask for its age."""
        async with self._one:
            found = await self._gc_ended(is_dry_run=is_dry_run, is_pressed=is_pressed)
            found += await self._gc_layers(is_dry_run=is_dry_run, is_pressed=is_pressed)
            found += await self._gc_blobs(is_dry_run=is_dry_run)
            if is_pressed:
                found += await self._gc_images(is_dry_run=is_dry_run)
        return found

    async def _gc_ended(self, *, is_dry_run: bool, is_pressed: bool) -> list[Removed]:
        keep_count, keep_s = (
            (0, PRESSED_KEEP_S) if is_pressed else (self._config.ended_keep_count, self._config.ended_keep_s)
        )
        gone = to_forget(self._jobs.records, now=clock.now_s(), keep_count=keep_count, keep_s=keep_s)
        found = [
            Removed(kind="logs", name=job_id, size_bytes=tree_bytes(self._jobs.logs.folder(job_id))) for job_id in gone
        ]
        if not is_dry_run and gone:
            await self._jobs.forget_old(keep_count=keep_count, keep_s=keep_s)
        return found

    def _needed(self) -> set[str]:
        """Return the layers of all jobs that live or come back."""
        records = [each for each in self._jobs.records if each.job.status not in ENDED or has_to_restart(each)]
        return {layer.digest for record in records for layer in record.job.spec.layers} | self._files.in_use()

    async def _gc_layers(self, *, is_dry_run: bool, is_pressed: bool) -> list[Removed]:
        layers, images = self._files.layers, await asyncio.to_thread(self._files.images.images)
        keep_s = 0.0 if is_pressed else self._config.gc_layer_keep_s
        stored = {layer.digest for image in images for layer in image.layers}
        unneeded = set(layers.digests()) - stored - self._needed()
        old = [digest for digest in sorted(unneeded) if clock.now_s() - layers.used_at(digest) >= keep_s]
        sizes = {digest: await asyncio.to_thread(tree_bytes, layers.path_of(digest)) for digest in old}
        if not is_dry_run:  # measuring took its time: who uses what is asked once more
            keep = {digest for digest in layers.digests() if digest not in sizes} | self._needed()
            sizes = {digest: size for digest, size in sizes.items() if digest not in keep}
            await layers.collect(keep)
        return [Removed(kind="layers", name=digest, size_bytes=size) for digest, size in sizes.items()]

    async def _gc_blobs(self, *, is_dry_run: bool) -> list[Removed]:
        store = self._files.images
        try:
            freed = await asyncio.to_thread(
                store.collect, self._needed(), unused_for_s=BLOB_KEEP_S, is_dry_run=is_dry_run
            )
        except StoreBusy:  # an image is coming in: the next turn looks again
            return []
        return [Removed(kind="images", name="blobs that no image names", size_bytes=freed)] if freed else []

    async def _gc_images(self, *, is_dry_run: bool) -> list[Removed]:
        """Remove unused images, the longest unused first, until the disk is below the lower mark."""
        found: list[Removed] = []
        to_free = used_bytes(self._config.state_dir, self._config.gc_disk_low_percent)
        for image in self._unused(await asyncio.to_thread(self._files.images.images)):
            if sum(each.size_bytes for each in found) >= to_free:
                break
            if image.layers[-1].digest in self._needed():  # since we looked
                continue
            found.append(await self._drop(image, is_dry_run=is_dry_run))
        return found

    def _unused(self, images: Iterable[rootfs_types.Image]) -> list[rootfs_types.Image]:
        needed = self._needed()
        found = [
            image
            for image in images
            if image.name not in PROTECTED and image.layers and image.layers[-1].digest not in needed
        ]
        return sorted(found, key=lambda image: self._files.layers.used_at(image.layers[-1].digest))

    async def _drop(self, image: rootfs_types.Image, *, is_dry_run: bool) -> Removed:
        store, layers = self._files.images, self._files.layers
        others = {
            layer.digest
            for each in await asyncio.to_thread(store.images)
            if each.name != image.name
            for layer in each.layers
        }
        own = [layer for layer in image.layers if layer.digest not in others]
        size = sum(layer.size_bytes for layer in own)
        for layer in own:
            if layers.has(layer.digest):
                size += await asyncio.to_thread(tree_bytes, layers.path_of(layer.digest))
        if not is_dry_run:
            log.info("image %s is removed, the disk is full and no job uses it", image.name)
            await asyncio.to_thread(store.remove_image, image.name)
            needed = self._needed()
            doomed = {layer.digest for layer in own} - needed
            await layers.collect({*layers.digests()} - doomed)
            for digest in doomed:
                await asyncio.to_thread(store.remove_blob, digest)
        return Removed(kind="images", name=image.name, size_bytes=size)

    # --- by itself

    async def run(self) -> None:
        """Look after the disk, for ever."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self.turn()
            except OSError as error:  # one turn; a full disk refuses even this
                log.warning("garbage collection: %s", error)

    async def turn(self) -> list[Removed]:
        """Collect by age, and by pressure if the disk is above the upper mark."""
        is_pressed = used_bytes(self._config.state_dir, self._config.gc_disk_high_percent) > 0
        removed = await self.gc(is_pressed=is_pressed)
        if removed:
            freed = sum(each.size_bytes for each in removed)
            log.info("garbage collection: %d things, %d MiB", len(removed), freed >> 20)
        return removed


def used_bytes(path: Path, percent: int) -> int:
    """Return how many bytes more than `percent` of a file system are used, at least 0; as df(1) counts."""
    found = os.statvfs(path)
    used = found.f_blocks - found.f_bfree
    return max(0, used - (used + found.f_bavail) * percent // 100) * found.f_frsize


def tree_bytes(path: Path) -> int:
    """Return what a tree takes on the disk; a file with two names in it counts once, what vanishes meanwhile not."""
    total, seen, waiting = 0, set(), [str(path)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if found.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                        if (found.st_dev, found.st_ino) in seen:
                            continue
                        seen.add((found.st_dev, found.st_ino))
                    total += found.st_blocks * _BLOCK_BYTES
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return total
