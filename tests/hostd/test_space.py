"""What the disk holds, and that garbage collection takes nothing that somebody needs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from discovery.wire import clock
from hostd import config as config_of
from hostd import space as space_module
from hostd.config import Config
from hostd.jobs import to_forget
from hostd.logs import Logs
from hostd.runtime.files import FilesStep
from hostd.space import Space, tree_bytes, used_bytes
from hostd.store import Record
from hostd.types import JobSpec, Layer
from rootfs.types import ImageConfig
from rootfs.types import Layer as ImageLayer
from tests.hostd.test_jobs import ended
from tests.hostd.test_store import a_record
from tests.rootfs.tars import file, tar_of

pytestmark = pytest.mark.needs_root


class Records(list[Record]):
    def active(self) -> list[Record]:
        return [record for record in self if record.job.status == "running"]


class SomeJobs:
    """The part of `hostd.jobs.Jobs` that is asked, over a list of records."""

    def __init__(self, folder: Path) -> None:
        self.records = Records()
        self.logs = Logs(folder)

    async def forget_old(self, *, keep_count: int, keep_s: float) -> None:
        gone = to_forget(self.records, now=clock.now_s(), keep_count=keep_count, keep_s=keep_s)
        self.records[:] = [record for record in self.records if record.job.spec.id not in gone]
        for job_id in gone:
            self.logs.remove(job_id)


class Lab:
    def __init__(self, folder: Path) -> None:
        self.config: Config = config_of.load({"state_dir": str(folder), "cache_dir": str(folder / "cache")})
        self.files = FilesStep(folder, disk_pool=0)
        self.jobs = SomeJobs(self.config.logs_dir)
        self.set(gc_disk_high_percent=100)

    def set(self, **settings: Any) -> None:
        self.config = msgspec.structs.replace(self.config, **settings)
        jobs: Any = self.jobs
        self.space = Space(self.config, self.files, jobs)

    async def unpacked(self, name: str, *, kib: int = 64) -> Layer:
        raw = tar_of(file(name, os.urandom(kib * 1024)))
        layer = Layer(digest=self.files.images.add_blob(raw), size_bytes=len(raw))
        await self.files.apply(JobSpec(id="x", layers=(layer,), args=("x",)), hostname="x")
        await self.files.undo("x")
        await asyncio.to_thread(self.files.layers.settle)  # else it may write the layer's age anew behind a test's back
        return layer

    def image(self, name: str, *layers: Layer) -> None:
        kept = [
            ImageLayer(digest=each.digest, size_bytes=each.size_bytes, media_type=each.media_type, diff_id=each.digest)
            for each in layers
        ]
        self.files.images.set_image(name, kept, ImageConfig())

    def age(self, *layers: Layer, by_s: float = 1e6) -> None:
        for layer in layers:
            path = self.files.layers.path_of(layer.digest)
            os.utime(path.with_name(path.name + ".ready"), times=(clock.now_s() - by_s,) * 2)

    def running(self, job_id: str, *layers: Layer) -> None:
        record = a_record(job_id)
        spec = msgspec.structs.replace(record.job.spec, layers=layers)
        self.jobs.records.append(
            msgspec.structs.replace(record, job=msgspec.structs.replace(record.job, spec=spec, status="running"))
        )


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    made = Lab(tmp_path)
    await made.files.open()
    yield made
    await made.files.close()
    made.jobs.logs.close()


async def test_old_layers_go_that_nobody_needs(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_module, "BLOB_KEEP_S", -1.0)
    old, young, stored, lived, starting = [await lab.unpacked(name) for name in ("a", "b", "c", "d", "e")]
    lab.image("mine", stored)
    lab.running("job", lived)
    await lab.files.apply(JobSpec(id="begins", layers=(starting,), args=("x",)), hostname="x")
    lab.age(old, stored, lived, starting)
    said = await lab.space.gc(is_dry_run=True)
    assert set(lab.files.layers.digests()) == {each.digest for each in (old, young, stored, lived, starting)}
    removed = await lab.space.gc()
    assert [(each.kind, each.name) for each in removed if each.kind == "layers"] == [("layers", old.digest)]
    assert [each.name for each in said] == [each.name for each in removed]
    assert removed[0].size_bytes >= 64 * 1024
    assert set(lab.files.layers.digests()) == {each.digest for each in (young, stored, lived, starting)}
    assert not lab.files.images.blob(old.digest).exists()
    assert lab.files.images.blob(starting.digest).exists()
    assert await lab.space.gc() == []
    await lab.space.gc(is_pressed=True)
    assert young.digest not in lab.files.layers.digests()


async def test_a_blob_that_was_asked_for_just_now_stays(lab: Lab) -> None:
    digest = lab.files.images.add_blob(b"on its way into an image")
    assert await lab.space.gc() == []
    assert lab.files.images.has_blob(digest)


async def test_above_the_mark_unused_images_go_oldest_first_until_below(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {name: await lab.unpacked(name, kib=1024) for name in ("base", "oldest", "older", "newest", "used")}
    for name, layer in layers.items():
        lab.image(name, layer)
    for by_s, name in enumerate(("newest", "older", "oldest", "used", "base"), 1):
        lab.age(layers[name], by_s=by_s * 1e5)
    lab.running("job", layers["used"])
    monkeypatch.setattr(space_module, "used_bytes", lambda *_: 3 << 20)  # one image is 1 MiB twice: blob and layer
    removed = await lab.space.turn()
    assert [each.name for each in removed] == ["oldest", "older"]
    assert {image.name for image in lab.files.images.images()} == {"base", "newest", "used"}
    assert not lab.files.images.blob(layers["oldest"].digest).exists()
    monkeypatch.setattr(space_module, "used_bytes", lambda *_: 1 << 40)
    await lab.space.turn()
    assert {image.name for image in lab.files.images.images()} == {"base", "used"}


async def test_ended_jobs_and_their_logs_go_by_age(lab: Lab) -> None:
    now = clock.now_s()
    for name, at in (("old", now - 1e6), ("fresh", now - 60)):
        lab.jobs.records.append(ended(name, at))
        lab.jobs.logs.say(name, "x" * 5000)
    lab.set(ended_keep_count=0)
    removed = await lab.space.gc()
    assert [(each.kind, each.name) for each in removed] == [("logs", "old")]
    assert [record.job.spec.id for record in lab.jobs.records] == ["fresh"]
    assert not lab.jobs.logs.folder("old").exists()


async def test_df_adds_up(lab: Lab, tmp_path: Path) -> None:
    old = await lab.unpacked("a", kib=512)
    lab.age(old)
    (lab.files.volumes.ensure("data") / "file").write_bytes(b"x" * 300_000)
    lab.files.volumes.snapshot("data", "one")
    found = {each.kind: each for each in await lab.space.df()}
    assert found["layers"].count == 1
    assert found["layers"].size_bytes >= found["layers"].reclaimable_bytes >= 512 * 1024
    assert (found["volumes"].count, found["snapshots"].count) == (1, 1)
    assert found["volumes"].size_bytes >= 300_000
    assert [each.kind for each in await lab.space.df_volumes()] == ["data", "data@one"]


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    alone = tree_bytes(tmp_path)
    os.link(tmp_path / "a", tmp_path / "b")
    assert tree_bytes(tmp_path) == alone
    assert tree_bytes(tmp_path / "none") == 0
    assert used_bytes(tmp_path, 100) == 0
