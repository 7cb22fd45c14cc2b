from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hostd.runtime.cgroup import CgroupState, CgroupStep, CgroupV1, CgroupV2, Mounts, find_mounts, open_cgroups
from hostd.types import MIB, Resources
from netns.errors import KernelError

PARENT = f"hostd-test-{os.getpid()}"


def directories_below(parent: str) -> list[Path]:
    mounts = find_mounts()
    roots = [*mounts.v1.values(), *([mounts.v2] if mounts.v2 else [])]
    return sorted({root / parent for root in roots if (root / parent).exists()})


@pytest.fixture(params=["chosen", "unified"])
async def step(request: pytest.FixtureRequest) -> AsyncIterator[CgroupStep]:
    """Give the version that this machine has, and beside it v2 on whatever controllers it has left."""
    mounts = find_mounts()
    if request.param == "unified":
        if mounts.v2 is None:
            pytest.skip("needs a cgroup v2 mount")
        step: CgroupStep = CgroupV2(mounts.v2, PARENT)
    else:
        step = open_cgroups(PARENT)
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
        waiting = asyncio.to_thread(process.wait, 5)
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
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    with start_inside(state, f"trap '' TERM; exec /usr/bin/python3 -SIc '{bomb}'") as process:
        wait_until_inside(process)
        async with asyncio.timeout(60):
            while len(step.pids("bomb")) < 50:
                await asyncio.sleep(0.005)
        await asyncio.gather(step.kill("bomb"), asyncio.to_thread(process.wait, 5))
    assert step.pids("bomb") == ()
    await step.undo("bomb")


@pytest.mark.needs_root
async def test_undo_kills_what_is_left(step: CgroupStep) -> None:
    state = await step.apply("job-2", Resources())
    with start_inside(state, "sleep 60") as process:
        wait_until_inside(process)
        await asyncio.gather(step.undo("job-2"), asyncio.to_thread(process.wait, 5))
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
    assert step.oom_count("small") >= 1
    usage = step.usage("small")
    assert 0 < usage.cpu_s < 10
    assert usage.memory_bytes < 16 * MIB
    with start_inside(state, "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 20 & done; wait") as process:
        wait_until_inside(process)
        assert step.usage("small").pids <= 8
        await asyncio.gather(step.kill("small"), asyncio.to_thread(process.wait, 5))
    await step.undo("small")


@pytest.mark.needs_root
async def test_a_refused_limit_names_the_file_and_leaves_nothing(step: CgroupStep) -> None:
    if step.missing:
        pytest.skip(f"needs the controllers {', '.join(step.missing)}")
    with pytest.raises(KernelError, match=r"pids\.max"):
        await step.apply("wrong", Resources(pids_max=-5))
    assert step.list() == ()


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
    step = open_cgroups("hostd", Mounts(v1={}, v2=root))
    assert step.version == 2
    assert step.missing == ()
    state = await step.apply("j", Resources(memory_bytes=MIB, cpu_millis=500, cpu_quota_millis=250, pids_max=7))
    assert state.procs == (str(parent / "j/cgroup.procs"),)
    written = {file.name: file.read_text() for file in (parent / "j").iterdir()}
    assert written == {"memory.max": str(MIB), "cpu.weight": "50", "cpu.max": "25000 100000", "pids.max": "7"}


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
    assert step.missing == ("pids",)


def test_no_cgroups_at_all_is_said() -> None:
    with pytest.raises(KernelError, match="no cgroup hierarchy"):
        open_cgroups("hostd", Mounts(v1={}, v2=None))
