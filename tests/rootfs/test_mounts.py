"""The mount plan as a value: what is in it, in which order, and what it refuses."""

from pathlib import Path

import pytest

from rootfs import mounts
from rootfs.errors import NameInvalid
from rootfs.mounts import MS_BIND, MS_RDONLY, Bind, KernelPaths, Step, plan

KERNEL = KernelPaths(
    masked_files=("/proc/kcore",), masked_dirs=("/sys/firmware",), read_only=("/proc/sys",), has_mqueue=True
)


def planned(*binds: Bind, lower: tuple[str, ...] = ("/l/base", "/l/top"), has_init: bool = True) -> list[Step]:
    return plan(
        lower=[Path(path) for path in lower],
        upper=Path("/j/upper"),
        work=Path("/j/work"),
        kernel=KERNEL,
        binds=binds,
        has_init=has_init,
    )


def test_root_comes_first_with_the_top_layer_on_top() -> None:
    kind, source, target, fstype, _, options = planned()[0]
    assert (kind, source, target, fstype) == ("mount", "overlay", "/", "overlay")
    assert options == "lowerdir=/l/top:/l/base,upperdir=/j/upper,workdir=/j/work,volatile"


def test_paths_with_signs_that_mean_something_to_overlayfs_are_escaped() -> None:
    options = planned(lower=("/a:b,c\\d",))[0][5]
    assert isinstance(options, str)
    assert options.startswith("lowerdir=/a\\:b\\,c\\\\d,")


def test_too_many_layers_are_refused_before_the_kernel_cuts_them_off() -> None:
    with pytest.raises(NameInvalid, match="layers"):
        planned(lower=tuple(f"/var/lib/hostd/layers/{i:064x}" for i in range(60)))


def test_every_mount_of_proc_and_sys_comes_before_what_hides_parts_of_it() -> None:
    hiding = ("mask", "cover")
    targets = [step[1 if step[0] in hiding else 2] if step[0] in ("mount", *hiding) else None for step in planned()]
    assert targets.index("/proc") < targets.index("/proc/kcore")
    assert targets.index("/sys") < targets.index("/sys/firmware")


def test_nothing_of_the_hosts_is_mounted_but_what_was_asked_for() -> None:
    sources = {step[1] for step in planned() if step[0] == "mount"}
    assert not {source for source in sources if str(source).startswith("/")}
    assert planned().index(("mknod", "/dev/null", 0o666, 1, 3)) < planned().index(("mask", "/proc/kcore"))


def test_read_only_paths_are_bound_onto_themselves_and_then_made_read_only() -> None:
    steps = [step for step in planned() if step[0] == "mount" and step[2] == "/proc/sys"]
    assert [step[1] for step in steps] == [None, None]
    flags = [step[4] for step in steps]
    assert isinstance(flags[1], int)
    assert flags[1] & MS_RDONLY


def test_bind_makes_its_target_and_loses_devices_and_setuid() -> None:
    bind = Bind(source="/var/lib/x", target="/data", is_read_only=False)
    made, mounted, remounted = planned(bind)[-3:]
    assert made == ("mkdir", "/data", 0o755)
    assert mounted == ("mount", "/var/lib/x", "/data", None, MS_BIND, None)
    assert remounted[4] == mounts.MS_REMOUNT | MS_BIND | mounts.MS_NOSUID | mounts.MS_NODEV


def test_file_bind_is_bound_on_a_file() -> None:
    bind = Bind(source="/run/x.sock", target="/run/x.sock", is_read_only=True, is_file=True)
    assert planned(bind)[-3] == ("file", "/run/x.sock")
    flags = planned(bind)[-1][4]
    assert isinstance(flags, int)
    assert flags & MS_RDONLY


def test_outer_binds_come_before_inner_ones() -> None:
    inner = Bind(source="/i", target="/data/inner", is_read_only=False)
    outer = Bind(source="/o", target="/data", is_read_only=False)
    targets = [step[1] for step in planned(inner, outer) if step[0] == "mkdir"]
    assert targets.index("/data") < targets.index("/data/inner")


@pytest.mark.parametrize(
    "target",
    ["", "/", "data", "/a/../etc", "/a/./b", "//a", "/a/", "/proc/1", "/sys", "/dev/sda", "/.hostd/init", "/a\0b"],
)
def test_odd_or_system_targets_are_refused(target: str) -> None:
    with pytest.raises(NameInvalid):
        planned(Bind(source="/x", target=target, is_read_only=True))


def test_names_that_only_begin_like_a_system_directory_are_fine() -> None:
    assert mounts.check_target("/processes/x") == "/processes/x"
    assert mounts.check_target("/devices") == "/devices"


def test_plan_without_init_has_no_link_to_it() -> None:
    assert any(mounts.INIT_PATH in step for step in planned())
    assert not any(mounts.INIT_PATH in step for step in planned(has_init=False))


def test_probe_sees_this_kernel() -> None:
    found = mounts.probe()
    assert "/proc/sys" in found.read_only
    assert not set(found.masked_files) & set(found.masked_dirs)
