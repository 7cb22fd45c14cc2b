"""A job's temp disk: as large as was said, gone with its last user, whoever died first."""

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from hostd.runtime import disks
from hostd.runtime.disks import Disk, Disks
from hostd.types import MIB
from netns import syscalls
from netns.errors import KernelError
from tests.pace import SLOWNESS

pytestmark = pytest.mark.needs_root

SIZE_BYTES = 32 * MIB


def loops_of(folder: Path) -> list[str]:
    """Return the loop devices whose file lies in `folder`, by what the kernel says."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if path.read_text().startswith(f"{folder}/"):
                found.append(path.parts[3])
        except OSError:  # it goes while we look
            continue
    return found


def wait_until(probe: Callable[[], bool], deadline_s: float = 10.0 * SLOWNESS) -> None:
    end = time.monotonic() + deadline_s
    while not probe():
        assert time.monotonic() < end, "not within the deadline"
        time.sleep(0.01)


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Disks]:
    found = Disks(tmp_path, size_bytes=SIZE_BYTES, pool_size=2)
    await asyncio.to_thread(found.open)
    if found.refusal:
        pytest.skip(f"this kernel has no disks: {found.refusal}")
    yield found
    await asyncio.to_thread(found.close)
    wait_until(lambda: not loops_of(tmp_path))


def fill(folder: Path) -> int:
    """Write until nothing more fits; return how many bytes did."""
    path = folder / "big"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 65536):
            pass
    return path.stat().st_size


async def test_a_disk_holds_what_was_said_and_no_more(made: Disks) -> None:
    disk = await made.take(SIZE_BYTES)
    before = disk.usage()
    assert before.free_bytes <= SIZE_BYTES
    written = await asyncio.to_thread(fill, disk.path / disks.UPPER)
    assert SIZE_BYTES * 0.8 < written <= SIZE_BYTES
    after = disk.usage()
    assert after.is_full
    assert not before.is_full
    assert after.used_bytes >= written
    (disk.path / disks.UPPER / "big").unlink()
    assert not disk.usage().is_full
    disk.close()
    disk.close()


async def test_sizes_of_their_own_and_many_at_once(made: Disks, tmp_path: Path) -> None:
    sizes = [SIZE_BYTES] * 40 + [8 * MIB, 100 * MIB, 4096 * MIB, 65536 * MIB] + [9 * MIB + 1] * 4
    taken = await asyncio.gather(*(made.take(size) for size in sizes))
    assert [disk.size_bytes for disk in taken[-5:]] == [65536 * MIB] + [10 * MIB] * 4
    assert len({os.fstat(disk.fd).st_dev for disk in taken}) == len(sizes)
    assert len(loops_of(tmp_path)) >= len(sizes)
    for disk in taken:
        disk.close()


async def test_two_threads_make_no_more_ahead_than_was_said(made: Disks, tmp_path: Path) -> None:
    for _ in range(20):
        for disk in [await made.take(SIZE_BYTES) for _ in range(4)]:
            disk.close()
    (await made.take(8 * MIB)).close()  # whoever waited for a thread has had it
    await asyncio.to_thread(wait_until, lambda: len(loops_of(tmp_path)) <= 2)


async def test_nothing_of_a_disk_has_a_name_on_the_host(made: Disks, tmp_path: Path) -> None:
    disk = await made.take(SIZE_BYTES)
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert sorted(path.name for path in disk.path.iterdir()) == ["lost+found", "root", "secrets", "upper", "work"]
    disk.close()


def test_a_file_that_is_deleted_goes_back_to_the_host(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(tmp_path)], check=True)  # a host of our own
    made = Disks(tmp_path, size_bytes=SIZE_BYTES, pool_size=1)
    try:
        made.open()
        if made.refusal:
            pytest.skip(made.refusal)

        def host_used_bytes() -> int:
            found = os.statvfs(tmp_path)
            return (found.f_blocks - found.f_bfree) * found.f_frsize

        disk = asyncio.run(made.take(SIZE_BYTES))
        (disk.path / "x").write_bytes(os.urandom(16 * MIB))
        with (disk.path / "x").open("rb") as file:
            os.fsync(file.fileno())
        assert host_used_bytes() > 16 * MIB
        (disk.path / "x").unlink()
        top = os.open(disk.path, os.O_RDONLY)
        os.fsync(top)
        os.close(top)
        wait_until(lambda: host_used_bytes() < 4 * MIB)
        disk.close()
    finally:
        made.close()
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


async def test_one_who_goes_away_while_it_is_made_leaves_none(made: Disks, tmp_path: Path) -> None:
    asking = asyncio.ensure_future(made.take(77 * MIB))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


def test_kill_9_of_the_holder_frees_loop_device_and_file(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import asyncio, sys
        from pathlib import Path
        from hostd.runtime.disks import Disks
        made = Disks(Path({str(tmp_path)!r}), size_bytes={SIZE_BYTES})
        made.open()
        disk = asyncio.run(made.take({SIZE_BYTES}))
        (disk.path / "upper/file").write_bytes(b"x" * 1000000)
        print(made.refusal, flush=True)
        while True:
            asyncio.run(made.take({SIZE_BYTES})).close()
        """
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert holder.stdout is not None
    if refusal := holder.stdout.readline().strip():
        pytest.skip(refusal)
    assert loops_of(tmp_path)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    wait_until(lambda: not loops_of(tmp_path))
    assert list(tmp_path.iterdir()) == []


def is_direct(disk: Disk) -> bool:
    return Path(f"/sys/dev/block/{disk.device}/loop/dio").read_text().strip() == "1"


async def test_a_disk_that_goes_direct_keeps_what_it_holds(made: Disks) -> None:
    if made.direct_refusal:
        pytest.skip(made.direct_refusal)
    disk = await made.take(SIZE_BYTES)
    before, after = os.urandom(MIB), os.urandom(MIB)
    (disk.path / "before").write_bytes(before)
    assert not is_direct(disk)
    disk.go_direct()
    disk.go_direct()
    assert is_direct(disk)
    (disk.path / "after").write_bytes(after)
    os.sync()
    for name, content in (("before", before), ("after", after)):
        with (disk.path / name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == content
    assert fill(disk.path / disks.UPPER) > 0
    disk.close()


async def test_where_nothing_goes_direct_disks_are_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int, *, is_direct: bool) -> None:
        raise KernelError(errno.EINVAL, "ioctl", "LOOP_SET_DIRECT_IO")

    monkeypatch.setattr(syscalls, "loop_set_direct_io", refuse)
    found = Disks(tmp_path, size_bytes=SIZE_BYTES, pool_size=1)
    await asyncio.to_thread(found.open)
    try:
        if found.refusal:
            pytest.skip(found.refusal)
        assert "LOOP_SET_DIRECT_IO" in found.direct_refusal
        (await found.take(SIZE_BYTES)).close()
    finally:
        await asyncio.to_thread(found.close)


async def test_without_loop_devices_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "_LOOP_CONTROL", str(tmp_path / "none"))
    found = Disks(tmp_path, size_bytes=SIZE_BYTES)
    await asyncio.to_thread(found.open)
    assert "none" in found.refusal
    await asyncio.to_thread(found.close)
    assert loops_of(tmp_path) == []
