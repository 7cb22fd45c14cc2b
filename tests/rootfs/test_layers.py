"""Unpacked layers: once each, whole or not at all, whatever happens in between."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from rootfs.errors import LayerInvalid, NameInvalid
from rootfs.layers import Layers
from tests.rootfs.tars import file, link, saved, tar_of

pytestmark = pytest.mark.needs_root


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Layers]:
    found = Layers(tmp_path / "layers", boot_id="this-boot")
    found.open()
    yield found
    found.close()


def getter(path: Path) -> tuple[Callable[[], Awaitable[Path]], list[None]]:
    calls: list[None] = []

    async def get() -> Path:
        calls.append(None)
        await asyncio.sleep(0)
        return path

    return get, calls


def names(layers: Layers) -> list[str]:
    return sorted(path.name for path in layers.path.iterdir())


async def test_concurrent_callers_unpack_once(layers: Layers, tmp_path: Path) -> None:
    path, digest = saved(tmp_path, tar_of(file("x", b"hello")))
    get, calls = getter(path)
    found = await asyncio.gather(*(layers.ensure(digest, get) for _ in range(20)))
    assert len(calls) == 1
    assert set(found) == {layers.path_of(digest)}
    assert (found[0] / "x").read_bytes() == b"hello"
    assert found[0].stat().st_mode & 0o777 == 0o755
    assert layers.digests() == (digest,)


async def test_refused_layer_leaves_nothing_and_may_come_again(layers: Layers, tmp_path: Path) -> None:
    bad, digest = saved(tmp_path, tar_of(file("ok", b"x"), link("h", "../x", is_hard=True)))
    for _ in range(2):
        with pytest.raises(LayerInvalid):
            await layers.ensure(digest, getter(bad)[0])
        assert names(layers) == []
    assert not layers.has(digest)


async def test_layer_is_known_after_a_restart(layers: Layers, tmp_path: Path) -> None:
    path, digest = saved(tmp_path, tar_of(file("x")))
    await layers.ensure(digest, getter(path)[0])
    again = Layers(layers.path, boot_id="this-boot")
    again.open()
    assert again.has(digest)
    again.close()


async def test_after_a_power_cut_only_layers_that_reached_the_disk_count(layers: Layers, tmp_path: Path) -> None:
    path, digest = saved(tmp_path, tar_of(file("x")))
    await layers.ensure(digest, getter(path)[0])
    layers.close()
    assert (layers.path / f"{digest[7:]}.ready").read_text() == "synced"
    after = Layers(layers.path, boot_id="next-boot")
    after.open()
    assert after.has(digest)
    (layers.path / f"{digest[7:]}.ready").write_text("this-boot")  # as if the cut had come before the sync
    after.open()
    unsure = Layers(layers.path, boot_id="next-boot")
    unsure.open()
    assert not unsure.has(digest)
    assert names(unsure) == []
    after.close()
    unsure.close()


@pytest.mark.parametrize("left", ["new-abc", "old-abc", "a" * 64])
def test_halves_that_a_crash_left_are_removed(tmp_path: Path, left: str) -> None:
    (tmp_path / "layers" / left / "etc").mkdir(parents=True)
    (tmp_path / "layers" / ("b" * 64 + ".ready")).write_text("this-boot")
    layers = Layers(tmp_path / "layers", boot_id="this-boot")
    layers.open()
    assert names(layers) == []
    layers.close()


async def test_collect_removes_what_nobody_keeps(layers: Layers, tmp_path: Path) -> None:
    one, first = saved(tmp_path, tar_of(file("x", b"1")))
    two, second = saved(tmp_path, tar_of(file("x", b"2")))
    await layers.ensure(first, getter(one)[0])
    await layers.ensure(second, getter(two)[0])
    assert await layers.collect([second]) == 1
    assert layers.digests() == (second,)
    assert not layers.path_of(first).exists()
    assert await layers.ensure(first, getter(one)[0])
    assert (layers.path_of(first) / "x").read_bytes() == b"1"


async def test_collect_and_a_new_unpacking_at_once(layers: Layers, tmp_path: Path) -> None:
    path, digest = saved(tmp_path, tar_of(*(file(f"f{i}", b"x") for i in range(500))))
    for _ in range(5):
        await layers.ensure(digest, getter(path)[0])
        async with asyncio.TaskGroup() as group:
            group.create_task(layers.collect([]))
            await asyncio.sleep(0)
            group.create_task(layers.ensure(digest, getter(path)[0]))
        assert len(list(layers.path_of(digest).iterdir())) == 500


async def test_cancelled_caller_leaves_a_layer_that_others_can_have(layers: Layers, tmp_path: Path) -> None:
    path, digest = saved(tmp_path, tar_of(*(file(f"f{i}", b"x") for i in range(2000))))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await layers.ensure(digest, getter(path)[0])
    assert len(list((await layers.ensure(digest, getter(path)[0])).iterdir())) == 2000


async def test_names_that_are_no_digests_are_refused(layers: Layers, tmp_path: Path) -> None:
    with pytest.raises(NameInvalid):
        await layers.ensure("sha256:../../../etc", getter(tmp_path)[0])
