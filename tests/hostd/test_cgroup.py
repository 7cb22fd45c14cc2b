from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hostd.limits import LimitWatch
from hostd.runtime.cgroup import (
    CgroupState,
    CgroupStep,
    CgroupV1,
    CgroupV2,
    Incidents,
    Mounts,
    find_disk,
    find_mounts,
    open_cgroups,
)
from hostd.types import MIB, Pressure, Resources, Usage
from netns.errors import KernelError
from tests.pace import SLOWNESS

PARENT = f"hostd-test-{os.getpid()}"
DISK = Path("/var/tmp")
BOMB = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"


def directories_below(parent: str) -> list[Path]:
    mounts = find_mounts()
    roots = [*mounts.v1.values(), *([mounts.v2] if mounts.v2 else [])]
    return sorted({path for root in roots for pattern in (parent, f"{parent}~*") for path in root.glob(pattern)})


@pytest.fixture(params=["chosen", "unified"])
async def step(request: pytest.FixtureRequest) -> AsyncIterator[CgroupStep]:
    """Give the version that this machine has, and beside it v2 on whatever controllers it has left."""
    mounts = find_mounts()
    if request.param == "unified":
        if mounts.v2 is None:
            pytest.skip("needs a cgroup v2 mount")
        step: CgroupStep = CgroupV2(mounts.v2, PARENT, find_disk(DISK))
    else:
        step = open_cgroups(PARENT, device=find_disk(DISK))
    yield step
    await step.teardown()
    assert directories_below(PARENT) == []


def start_inside(state: CgroupState, script: str) -> subprocess.Popen[bytes]:
    """Start a shell that enters the cgroups itself, as a job's first process does."""
    enter = "".join(f"echo 0 > {file}; " for file in state.procs)
    return subprocess.Popen(["sh", "-c", f"{enter} echo; {script}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def wait_until_inside(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"


@pytest.mark.needs_root
async def test_apply_kill_undo_leave_nothing(step: CgroupStep) -> None:
    state = await step.apply("job-1", Resources())
    with start_inside(state, "sleep 60 & sleep 60") as process:
        wait_until_inside(process)
        assert process.pid in step.pids("job-1")
        assert step.list() == ("job-1",)
        waiting = asyncio.to_thread(process.wait, 20 * SLOWNESS)
        await asyncio.gather(step.kill("job-1"), waiting)
        assert step.pids("job-1") == ()
    await step.undo("job-1")
    await step.undo("job-1")
    await step.undo("never-applied")
    assert step.list() == ()


@pytest.mark.needs_root
async def test_a_fork_bomb_cannot_outrun_kill(step: CgroupStep) -> None:
    if "pids" in step.missing:
        pytest.skip("needs the pids controller: an unlimited bomb is no test")
    state = await step.apply("bomb", Resources(pids_max=100))
    # not a shell's: a shell gives up when a fork is refused, and the bomb would be over by itself
    with start_inside(state, f"trap '' TERM; exec /usr/bin/python3 -SIc '{BOMB}'") as process:
        wait_until_inside(process)
        async with asyncio.timeout(60 * SLOWNESS):
            while len(step.pids("bomb")) < 50:
                await asyncio.sleep(0.005)
        await asyncio.gather(step.kill("bomb"), asyncio.to_thread(process.wait, 20 * SLOWNESS))
    assert step.pids("bomb") == ()
    await step.undo("bomb")


@pytest.mark.needs_root
async def test_who_is_killed_yields_no_more(step: CgroupStep) -> None:
    if "cpu" in step.missing:
        pytest.skip("needs the cpu controller")
    state = await step.apply("idle", Resources())
    with start_inside(state, "while :; do :; done") as process:
        wait_until_inside(process)
        step.demote("idle")
        assert step.is_demoted("idle")
        await asyncio.gather(step.kill("idle"), asyncio.to_thread(process.wait, 20 * SLOWNESS))
    assert not step.is_demoted("idle")
    await step.undo("idle")


@pytest.mark.needs_root
async def test_undo_kills_what_is_left(step: CgroupStep) -> None:
    state = await step.apply("job-2", Resources())
    with start_inside(state, "sleep 60") as process:
        wait_until_inside(process)
        await asyncio.gather(step.undo("job-2"), asyncio.to_thread(process.wait, 20 * SLOWNESS))
    assert step.list() == ()


@pytest.mark.needs_root
async def test_limits_hold_and_are_counted(step: CgroupStep) -> None:
    if step.missing:
        pytest.skip(f"needs the controllers {', '.join(step.missing)}")
    resources = Resources(memory_bytes=16 * MIB, pids_max=8, cpu_quota_millis=500)
    state = await step.apply("small", resources)
    with start_inside(state, "sleep 1 & sleep 1 & head -c 64M /dev/zero | tail -c 64M > /dev/null") as process:
        wait_until_inside(process)
        await asyncio.to_thread(process.wait, 20)
    assert step.incidents("small").oom_kills >= 1
    usage = step.usage("small")
    assert 0 < usage.cpu_s < 10
    assert usage.memory_bytes < 16 * MIB
    with start_inside(state, "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 20 & done; wait") as process:
        wait_until_inside(process)
        assert step.usage("small").pids <= 8
        await asyncio.gather(step.kill("small"), asyncio.to_thread(process.wait, 20 * SLOWNESS))
    await step.undo("small")


@pytest.mark.needs_root
async def test_a_refused_limit_names_the_file_and_leaves_nothing(step: CgroupStep) -> None:
    if step.missing:
        pytest.skip(f"needs the controllers {', '.join(step.missing)}")
    with pytest.raises(KernelError, match=r"pids\.max"):
        await step.apply("wrong", Resources(pids_max=-5))
    assert step.list() == ()


@pytest.mark.needs_root
async def test_a_cpu_quota_throttles(step: CgroupStep) -> None:
    if "cpu" in step.missing:
        pytest.skip("needs the cpu controller")
    state = await step.apply("spin", Resources(cpu_quota_millis=200))
    with start_inside(state, "while :; do :; done") as process:
        wait_until_inside(process)
        began, used = time.monotonic(), step.usage("spin").cpu_s
        while (usage := step.usage("spin")).cpu_throttled_s < 1.0:
            assert time.monotonic() - began < 60 * SLOWNESS
            await asyncio.sleep(0.05)
        took_s = time.monotonic() - began
        await asyncio.gather(step.kill("spin"), asyncio.to_thread(process.wait, 20 * SLOWNESS))
    assert usage.cpu_s - used < took_s * 0.2 + 0.1  # a period more may have been begun
    await step.undo("spin")


@pytest.mark.needs_root
async def test_an_io_limit_slows_direct_writes_and_reads_and_is_counted(step: CgroupStep, disk_file: Path) -> None:
    if step.missing:
        pytest.skip(f"needs the controllers {', '.join(step.missing)}")
    limits = Resources(io_write_bytes_per_s=4 * MIB, io_read_bytes_per_s=8 * MIB)
    state = await step.apply("disk", limits)
    began = time.monotonic()
    write = f"dd if=/dev/zero of={disk_file} bs=1M count=8 oflag=direct conv=notrunc"
    with start_inside(state, write) as process:
        assert await asyncio.to_thread(process.wait, 60) == 0
    wrote_s = time.monotonic() - began
    with start_inside(state, f"dd if={disk_file} of=/dev/null bs=1M count=8 iflag=direct") as process:
        assert await asyncio.to_thread(process.wait, 60) == 0
    read_s = time.monotonic() - began - wrote_s
    assert wrote_s > 1.4
    assert read_s > 0.7
    usage = step.usage("disk")
    assert usage.io_write_bytes >= 8 * MIB
    assert usage.io_read_bytes >= 8 * MIB
    assert usage.io_write_ops > 0
    assert usage.io_read_ops > 0
    await step.undo("disk")


@pytest.fixture
def disk_file() -> Iterator[Path]:
    """A file of 8 MiB that is not on a tmpfs."""
    handle, name = tempfile.mkstemp(prefix="hostd-test-", dir=DISK)
    os.pwrite(handle, b"x" * 8 * MIB, 0)
    os.fsync(handle)
    os.close(handle)
    yield Path(name)
    Path(name).unlink()


@pytest.mark.needs_root
async def test_met_limits_are_told_while_the_job_lives(step: CgroupStep) -> None:
    if {"memory", "pids"} & set(step.missing):
        pytest.skip("needs the memory and pids controllers")
    watch, told = LimitWatch(step), asyncio.Queue[Incidents]()
    try:
        state = await step.apply("met", Resources(memory_bytes=16 * MIB, pids_max=20))
        script = f"sleep 1; head -c 64M /dev/zero | tail -c 64M >/dev/null; exec /usr/bin/python3 -SIc '{BOMB}'"
        with start_inside(state, script) as process:
            wait_until_inside(process)
            watch.add("met", told.put_nowait)
            async with asyncio.timeout(30 * SLOWNESS):
                first = await told.get()
                assert first.oom_kills >= 1
                assert not first.is_host_oom
                while not first.forks_refused:
                    first = await told.get()
            began = time.process_time()
            await asyncio.sleep(1)
            assert time.process_time() - began < 0.5 * SLOWNESS  # a storm of refused forks is not listened to
            await asyncio.gather(step.kill("met"), asyncio.to_thread(process.wait, 20 * SLOWNESS))
        watch.remove("met")
        watch.remove("met")
        await step.undo("met")
    finally:
        watch.close()


async def test_job_names_never_lead_out_of_the_parent(tmp_path: Path) -> None:
    step = CgroupV2(tmp_path, "hostd")
    for name in ("..", "a/b", "", "."):
        with pytest.raises(Exception, match="job id"):
            await step.undo(name)
    with pytest.raises(ValueError):
        CgroupV2(tmp_path, "..")


def fake_v2(root: Path, controllers: str) -> Path:
    root.mkdir()
    (root / "cgroup.controllers").write_text(controllers)
    (root / "cgroup.subtree_control").write_text("")
    return root


async def test_v2_values(tmp_path: Path) -> None:
    """Only the words that would be written: this machine's v2 may lack the controllers themselves."""
    root = fake_v2(tmp_path / "v2", "cpuset cpu io memory hugetlb pids")
    parent = root / "hostd"
    parent.mkdir()
    (parent / "cgroup.subtree_control").write_text("")
    step = open_cgroups("hostd", Mounts(v1={}, v2=root), device="254:0")
    assert step.version == 2
    assert step.missing == ()
    (parent / "j").mkdir()
    for name in ("memory.swap.max", "io.weight"):
        (parent / "j" / name).touch()  # these the kernel may lack, so they are only written when they are there
    resources = Resources(
        memory_bytes=MIB,
        swap_bytes=2 * MIB,
        cpu_millis=500,
        cpu_quota_millis=250,
        pids_max=7,
        io_weight=200,
        io_read_bytes_per_s=1000,
        io_write_ops_per_s=50,
    )
    state = await step.apply("j", resources)
    assert state.procs == (str(parent / "j/cgroup.procs"),)
    written = {file.name: file.read_text() for file in (parent / "j").iterdir()}
    assert written == {
        "memory.max": str(MIB),
        "memory.swap.max": str(2 * MIB),
        "cpu.weight": "50",
        "cpu.max": "25000 100000",
        "pids.max": "7",
        "io.weight": "200",
        "io.max": "254:0 rbps=1000 wiops=50",
    }


async def test_v2_counters(tmp_path: Path) -> None:
    """The words of Linux 6.1, as they are in the machine of `make test-vm`."""
    root = fake_v2(tmp_path / "v2", "cpu io memory pids")
    job = root / "hostd" / "j"
    job.mkdir(parents=True)
    for name, text in {
        "memory.current": "5000\n",
        "memory.stat": "anon 100\nfile 900\ninactive_file 1000\nactive_file 1\n",
        "memory.events": "low 0\nhigh 0\nmax 3\noom 0\noom_kill 2\noom_group_kill 0\n",
        "cpu.stat": "usage_usec 1500000\nuser_usec 1\nnr_throttled 7\nthrottled_usec 250000\n",
        "pids.current": "4\n",
        "pids.events": "max 9\n",
        "io.stat": "254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n254:16 rbytes=5 wbytes=5 rios=1 wios=1\n",
        "io.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=2500000\nfull avg10=0.00 total=1000000\n",
    }.items():
        (job / name).write_text(text)
    step = open_cgroups("hostd", Mounts(v1={}, v2=root))
    assert step.usage("j") == Usage(
        memory_bytes=4000, cpu_s=1.5, cpu_throttled_s=0.25, pids=4,
        io_read_bytes=15, io_write_bytes=25, io_read_ops=2, io_write_ops=3,
    )  # fmt: skip
    assert step.incidents("j") == Incidents(oom_kills=2, is_host_oom=True, forks_refused=9)
    assert step.pressure("j") == {"io": Pressure(some_s=2.5, full_s=1.0)}
    assert step.usage("gone") == Usage()


def test_io_limits_are_for_the_disk_not_the_partition(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    disk = tmp_path / "devices/disk"
    part = disk / "disk1"
    part.mkdir(parents=True)
    (disk / "dev").write_text("254:16\n")
    (part / "dev").write_text("254:17\n")
    (part / "partition").write_text("1\n")
    sys = tmp_path / "block"
    sys.mkdir()
    assert find_disk(tmp_path, sys) == ""
    (sys / f"{os.major(device)}:{os.minor(device)}").symlink_to(part)
    assert find_disk(tmp_path, sys) == "254:16"


async def test_what_cannot_be_enforced_is_named(tmp_path: Path) -> None:
    step = open_cgroups("hostd", Mounts(v1={}, v2=fake_v2(tmp_path / "v2", "memory pids")))
    assert set(step.missing) == {"cpu", "io"}
    asked = Resources(io_weight=50, io_read_ops_per_s=10)
    assert [text.split()[0] for text in step.unenforced(asked)] == ["io_weight", "io"]
    assert step.unenforced(Resources()) == ()


def test_hybrid_machines_get_v1_and_combined_controllers_share_a_directory(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    both = tmp_path / "cpu,cpuacct"
    mountinfo.write_text(
        f"30 25 0:26 / {both} rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
        f"31 25 0:27 / {tmp_path}/memory rw - cgroup cgroup rw,memory\n"
        f"32 25 0:28 / {tmp_path}/unified rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    mounts = find_mounts(mountinfo)
    assert mounts.v2 == tmp_path / "unified"
    step = open_cgroups("hostd", mounts)
    assert isinstance(step, CgroupV1)
    assert step.missing[:2] == ("pids", "blkio")
    assert len(step.missing) == 3  # and swap cannot be bounded here


def test_no_cgroups_at_all_is_said() -> None:
    with pytest.raises(KernelError, match="no cgroup hierarchy"):
        open_cgroups("hostd", Mounts(v1={}, v2=None))
