"""System calls, each carried out for real; what changes this process is done in a child of its own."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from netns import syscalls
from netns.errors import KernelError
from tests.pace import SLOWNESS


def in_child(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter and return what it prints; its namespaces die with it."""
    script = "import os, sys\nfrom netns import syscalls\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=30 * SLOWNESS, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_error_names_the_call_and_its_target() -> None:
    with pytest.raises(KernelError) as caught:
        syscalls.umount2("/no/such/place", 0)
    assert (caught.value.syscall, caught.value.target, caught.value.name) == ("umount2", "/no/such/place", "ENOENT")


def test_openat2_keeps_a_symlink_inside_the_root(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("inner")
    (tmp_path / "way-out").symlink_to("/etc/passwd")
    (tmp_path / "up").symlink_to("../../../../etc/passwd")
    root = os.open(tmp_path, os.O_PATH)
    for name in ("/way-out", "up", "/../../etc/passwd"):
        fd = syscalls.openat2(root, name, os.O_RDONLY, resolve=syscalls.RESOLVE_IN_ROOT)
        assert os.read(fd, 10) == b"inner"
        assert not os.get_inheritable(fd)
        os.close(fd)
    with pytest.raises(KernelError) as caught:
        syscalls.openat2(root, "/usr", os.O_PATH, resolve=syscalls.RESOLVE_IN_ROOT)
    assert caught.value.errno == errno.ENOENT
    os.close(root)


def test_openat2_beneath_refuses_to_leave(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_PATH)
    with pytest.raises(KernelError) as caught:
        syscalls.openat2(root, "../", os.O_PATH, resolve=syscalls.RESOLVE_BENEATH)
    assert caught.value.errno == errno.EXDEV
    os.close(root)


def test_close_range_marks_for_exec_and_closes() -> None:
    found = in_child(
        """
        a, b = os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)
        os.set_inheritable(a, True)
        syscalls.close_range(a, a, syscalls.CLOSE_RANGE_CLOEXEC)
        print(os.get_inheritable(a))
        syscalls.close_range(a, b, 0)
        for fd in (a, b):
            try:
                os.fstat(fd)
            except OSError as error:
                print(error.errno)
        """
    )
    assert found.split() == ["False", str(errno.EBADF), str(errno.EBADF)]


def test_clone3_gives_a_child_with_its_own_memory_and_a_pidfd() -> None:
    value = ["parent"]
    pid, pidfd = syscalls.clone3(0, signal.SIGCHLD)
    if pid == 0:
        value[0] = "child"
        os._exit(7 if value == ["child"] else 1)
    assert not os.get_inheritable(pidfd)
    result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)
    assert result is not None
    assert (result.si_pid, result.si_status) == (pid, 7)
    assert value == ["parent"]


@pytest.mark.needs_root
def test_clone3_makes_the_first_process_of_a_pid_namespace() -> None:
    here, there = os.pipe()
    pid, pidfd = syscalls.clone3(syscalls.CLONE_NEWPID, signal.SIGCHLD)
    if pid == 0:
        os.write(there, str(os.getpid()).encode())
        os._exit(0)
    os.close(there)
    assert os.read(here, 10) == b"1"
    os.waitpid(pid, 0)
    os.close(pidfd)
    os.close(here)


def test_clone3_refuses_flags_that_exclude_each_other() -> None:
    with pytest.raises(KernelError) as caught:
        syscalls.clone3(syscalls.CLONE_NEWNS | 0x200, signal.SIGCHLD)  # CLONE_FS
    assert (caught.value.syscall, caught.value.errno) == ("clone3", errno.EINVAL)


@pytest.mark.needs_root
def test_unshare_and_setns_change_the_network_and_bring_it_back() -> None:
    found = in_child(
        """
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        before = os.readlink("/proc/self/ns/net")
        syscalls.unshare(syscalls.CLONE_NEWNET)
        print(os.readlink("/proc/self/ns/net") != before, os.listdir("/proc/self/net/dev_snmp6"))
        syscalls.setns(home, syscalls.CLONE_NEWNET)
        print(os.readlink("/proc/self/ns/net") == before)
        """
    )
    assert found.split("\n") == ["True ['lo']", "True"]


@pytest.mark.needs_root
def test_pivot_root_leaves_nothing_of_the_old_root(tmp_path: Path) -> None:
    mounts_before = Path("/proc/self/mountinfo").read_text()
    found = in_child(
        """
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("tmpfs", sys.argv[1], "tmpfs", syscalls.MS_NODEV, "size=64k")
        os.mkdir(sys.argv[1] + "/only")
        os.chdir(sys.argv[1])
        syscalls.pivot_root(".", ".")
        syscalls.umount2(".", syscalls.MNT_DETACH)
        os.chdir("/")
        print(os.listdir("/"))
        """,
        str(tmp_path),
    )
    assert found == "['only']"
    assert Path("/proc/self/mountinfo").read_text() == mounts_before


@pytest.mark.needs_root
def test_mount_flags_take_effect(tmp_path: Path) -> None:
    found = in_child(
        """
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("tmpfs", sys.argv[1], "tmpfs", 0, None)
        syscalls.mount(None, sys.argv[1], None, syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY)
        try:
            os.mkdir(sys.argv[1] + "/x")
        except OSError as error:
            print(error.errno)
        """,
        str(tmp_path),
    )
    assert found == str(errno.EROFS)
    assert stat.S_ISDIR(tmp_path.stat().st_mode)


def test_a_path_that_is_not_utf8_reaches_the_kernel_unchanged() -> None:
    with pytest.raises(KernelError) as caught:
        syscalls.umount2(os.fsdecode(b"/no/\xff"), 0)
    assert caught.value.errno == errno.ENOENT


def test_capability_names_are_the_kernels_numbers() -> None:
    assert syscalls.capability_mask(["CHOWN"]) == 1
    assert syscalls.capability_mask(["SYS_ADMIN"]) == 1 << 21
    assert syscalls.capability_mask(["CHECKPOINT_RESTORE"]) == 1 << 40
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert len(syscalls.CAPABILITIES) == last + 1
    with pytest.raises(KernelError):
        syscalls.capability_mask(["CAP_CHOWN"])


def test_the_bounding_set_is_what_proc_says() -> None:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert syscalls.capability_bounding_set() == int(status["CapBnd"], 16)


def test_a_new_session_keyring_is_another_one() -> None:
    found = in_child(
        """
        import ctypes
        libc = ctypes.CDLL(None)
        number = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
        def session():
            return libc.syscall(number, 0, -3, 0)  # KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING
        before = session()
        syscalls.keyctl_join_session_keyring()
        print(session() not in (before, -1))
        """
    )
    assert found == "True"


@pytest.mark.needs_root
def test_capset_drops_for_real() -> None:
    found = in_child(
        """
        mask = syscalls.capability_mask(["CHOWN", "CHECKPOINT_RESTORE"])
        syscalls.capset(mask, mask, 0)
        print(*[line for line in open("/proc/self/status") if line.startswith("CapEff")])
        """
    )
    assert int(found.split()[1], 16) == 1 | 1 << 40


def test_a_seccomp_filter_is_obeyed() -> None:
    # load arch-blind: syscall number of uname -> EPERM, else allow
    found = in_child(
        """
        import struct
        number = {"x86_64": 63, "aarch64": 160}[os.uname().machine]
        program = b"".join([
            struct.pack("HBBI", 0x20, 0, 0, 0),
            struct.pack("HBBI", 0x15, 0, 1, number),
            struct.pack("HBBI", 0x06, 0, 0, 0x00050001),
            struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000),
        ])
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        syscalls.seccomp_load(program)
        try:
            os.uname()
        except PermissionError:
            print("refused")
        """
    )
    assert found == "refused"


def test_a_seccomp_filter_that_is_nonsense_is_refused() -> None:
    with pytest.raises(KernelError) as caught:
        syscalls.seccomp_load(b"\xff" * 8)
    assert caught.value.errno == errno.EINVAL


def test_only_this_file_imports_ctypes() -> None:
    tree = Path(syscalls.__file__).parent.parent
    rooms = ("netns", "rootfs", "discovery", "hostd", "router", "controller", "buildpack")
    users = [
        path
        for room in rooms
        for path in (tree / room).rglob("*.py")
        if any(line.strip().startswith(("import ctypes", "from ctypes")) for line in path.read_text().splitlines())
    ]
    assert users == [Path(syscalls.__file__)]
