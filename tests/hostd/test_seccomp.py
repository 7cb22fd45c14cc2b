"""The stock profile, compiled: what it says, when it is compiled again, what it refuses."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from discovery.wire.errors import Invalid, Unavailable
from hostd.runtime.launch import DEFAULT_CAPABILITIES
from hostd.runtime.seccomp import PROFILE_PATH, SeccompCache, compile_profile
from tests.pace import SLOWNESS

ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[os.uname().machine]
NUMBERS = {
    "x86_64": {
        **{"read": 0, "mount": 165, "bpf": 321, "chroot": 161, "kexec_load": 246, "personality": 135, "socket": 41},
        **{"clone": 56, "umount2": 166, "pivot_root": 155, "unshare": 272, "setns": 308, "syslog": 103, "reboot": 169},
        **{"keyctl": 250, "clone3": 435, "fsopen": 430, "move_mount": 429, "open_tree": 428, "mount_setattr": 442},
    },
    "aarch64": {
        **{"read": 63, "mount": 40, "bpf": 280, "chroot": 51, "kexec_load": 104, "personality": 92, "socket": 198},
        **{"clone": 220, "umount2": 39, "pivot_root": 41, "unshare": 97, "setns": 268, "syslog": 116, "reboot": 142},
        **{"keyctl": 219, "clone3": 435, "fsopen": 430, "move_mount": 429, "open_tree": 428, "mount_setattr": 442},
    },
}[os.uname().machine]
ALLOW, EPERM, EINVAL, ENOSYS, EAFNOSUPPORT = 0x7FFF0000, 0x00050001, 0x00050016, 0x00050026, 0x00050061
NAMESPACE_FLAGS = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
BEHIND_ADMIN = "unshare setns mount umount2 pivot_root fsopen move_mount open_tree mount_setattr".split()


def judge(program: bytes, name: str, *arguments: int) -> int:
    """Run the filter on one call, as the kernel would: the classic BPF that libseccomp writes."""
    return judge_number(program, ARCHITECTURE, NUMBERS[name], *arguments)


def judge_number(program: bytes, architecture: int, number: int, *arguments: int) -> int:
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=iIQ6Q", number, architecture, 0, *padded)
    code = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        operation, if_true, if_false, value = code[at]
        at += 1
        if operation == 0x20:  # load a word
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif operation == 0x05:  # jump
            at += value
        elif operation == 0x54:  # and
            accumulator &= value
        elif operation == 0x06:  # return
            return int(value)
        else:
            tests = {0x15: accumulator == value, 0x25: accumulator > value, 0x35: accumulator >= value}
            at += if_true if tests[operation] else if_false


@pytest.fixture(scope="module")
def program() -> bytes:
    return compile_profile(PROFILE_PATH.read_bytes(), DEFAULT_CAPABILITIES)


def test_it_allows_and_refuses_as_the_profile_says(program: bytes) -> None:
    assert judge(program, "read") == ALLOW
    assert judge(program, "kexec_load") == EPERM
    assert judge(program, "bpf") == EPERM
    assert judge(program, "chroot") == ALLOW


def test_arguments_are_compared(program: bytes) -> None:
    assert judge(program, "personality", 0) == ALLOW
    assert judge(program, "personality", 0x0020000) == ALLOW
    assert judge(program, "personality", 0x0040000) == ENOSYS
    assert judge(program, "socket", 2, 1, 0) == ALLOW
    assert judge(program, "socket", 16, 3, 9) == EINVAL  # audit


def test_capabilities_change_what_is_allowed() -> None:
    program = compile_profile(PROFILE_PATH.read_bytes(), ["SYS_ADMIN", "AUDIT_WRITE"])
    assert judge(program, "bpf") == ALLOW
    assert judge(program, "chroot") == EPERM
    assert judge(program, "socket", 16, 3, 9) == ALLOW


@pytest.mark.parametrize("name", BEHIND_ADMIN)
def test_namespaces_and_mounts_are_for_administrators_as_in_dockers_default(program: bytes, name: str) -> None:
    assert judge(program, name, 0x10000000) == EPERM
    assert judge(compile_profile(PROFILE_PATH.read_bytes(), ["SYS_ADMIN"]), name, 0x10000000) == ALLOW


def test_clone_makes_processes_and_threads_but_no_namespaces(program: bytes) -> None:
    as_fork, as_thread, as_vfork = 0x1200011, 0x3D0F00, 0x4111
    for flags in (as_fork, as_thread, as_vfork):
        assert judge(program, "clone", flags) == ALLOW
        for flag in NAMESPACE_FLAGS:
            assert judge(program, "clone", flags | flag) == EPERM
    assert judge(program, "clone", 0x11 | 1 << 40 | 0x10000000) == EPERM  # the kernel cuts the upper half off
    assert judge(program, "clone3") == ENOSYS  # its flags are in memory: libc falls back to clone
    admin = compile_profile(PROFILE_PATH.read_bytes(), ["SYS_ADMIN"])
    assert judge(admin, "clone", 0x10000011) == judge(admin, "clone3") == ALLOW


def test_keys_the_kernels_log_and_reboot_are_refused(program: bytes) -> None:
    for name in ("keyctl", "syslog", "reboot"):
        assert judge(program, name, 3) == EPERM
    assert judge(compile_profile(PROFILE_PATH.read_bytes(), ["SYSLOG"]), "syslog", 3) == ALLOW


def test_no_socket_leads_to_the_hypervisor(program: bytes) -> None:
    for capabilities in (DEFAULT_CAPABILITIES, [*DEFAULT_CAPABILITIES, "AUDIT_WRITE"]):
        program = compile_profile(PROFILE_PATH.read_bytes(), capabilities)
        assert judge(program, "socket", 40, 1, 0) == EAFNOSUPPORT
        assert judge(program, "socket", 40 | 1 << 32, 1, 0) == EAFNOSUPPORT  # an int: the upper half does not count
        for family in {*range(48)} - {40}:
            assert judge(program, "socket", family, 1, 0) == ALLOW
            assert judge(program, "socket", family | 1 << 32, 1, 0) == ALLOW
        assert judge(program, "socket", 48, 1, 0) == ENOSYS


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="i386 calls need a machine that has them")
def test_nor_one_of_a_32_bit_program(program: bytes) -> None:
    i386, socketcall, socket, clone, unshare = 0x40000003, 102, 359, 120, 310
    assert judge_number(program, i386, socketcall, 1) == ENOSYS  # the family would be in memory
    assert judge_number(program, i386, socket, 40, 1, 0) == EAFNOSUPPORT
    assert judge_number(program, i386, socket, 2, 1, 0) == ALLOW
    assert judge_number(program, i386, clone, 0x10000011) == judge_number(program, i386, unshare, 1 << 28) == EPERM
    assert judge_number(program, i386, clone, 0x11) == ALLOW


def test_a_profile_that_names_less_is_not_widened(tmp_path: Path) -> None:
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}
    program = compile_profile(json.dumps(profile).encode(), ["SYS_ADMIN"])
    assert judge(program, "clone", 17) == judge(program, "socket", 2, 1, 0) == judge(program, "mount") == EPERM


def test_the_same_question_has_the_same_answer_byte_for_byte(program: bytes) -> None:
    assert compile_profile(PROFILE_PATH.read_bytes(), DEFAULT_CAPABILITIES) == program


def test_it_is_compiled_once_and_kept(tmp_path: Path, program: bytes) -> None:
    first = SeccompCache(tmp_path / "seccomp").path_for(DEFAULT_CAPABILITIES)
    assert first.read_bytes() == program
    stamp = first.stat().st_mtime_ns
    assert SeccompCache(tmp_path / "seccomp").path_for(reversed(DEFAULT_CAPABILITIES)) == first
    assert first.stat().st_mtime_ns == stamp
    assert SeccompCache(tmp_path / "seccomp").path_for(["CHOWN"]) != first
    assert len(list((tmp_path / "seccomp").iterdir())) == 2


def test_another_profile_is_another_file(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    rules: list[dict[str, Any]] = [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}))
    first = SeccompCache(tmp_path / "s", profile).path_for(["SYS_ADMIN"])
    assert judge(first.read_bytes(), "mount") == EPERM
    rules.append({"names": ["mount", "no_such_call_anywhere"], "action": "SCMP_ACT_ALLOW"})
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}))
    second = SeccompCache(tmp_path / "s", profile).path_for(["SYS_ADMIN"])
    assert judge(second.read_bytes(), "mount") == ALLOW
    assert first != second


@pytest.mark.parametrize(
    "change",
    [
        {"defaultAction": "SCMP_ACT_SHRUG"},
        {"listenerPath": "/x"},
        {"syscalls": [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]},
        {"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "includes": {"moons": ["full"]}}]},
        {
            "syscalls": [
                {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_X"}]}
            ]
        },
    ],
)
def test_what_it_does_not_understand_it_refuses(change: dict[str, Any]) -> None:
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []} | change
    with pytest.raises(Invalid):
        compile_profile(json.dumps(profile).encode(), [])


def test_a_refusal_comes_through_the_cache_as_it_was(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text('{"defaultAction": "SCMP_ACT_SHRUG", "syscalls": []}')
    with pytest.raises(Invalid, match="SHRUG"):
        SeccompCache(tmp_path / "s", profile).path_for(["SYS_ADMIN"])
    assert list((tmp_path / "s").iterdir()) == []


def test_a_machine_without_the_profile_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        SeccompCache(tmp_path, tmp_path / "missing.json").path_for(["SYS_ADMIN"])
    assert "golang-github-containers-common" in caught.value.hint


def test_the_kernel_takes_it(tmp_path: Path) -> None:
    path = SeccompCache(tmp_path).path_for(DEFAULT_CAPABILITIES)
    script = (
        "import sys; from netns import syscalls; syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1);"
        "syscalls.seccomp_load(open(sys.argv[1], 'rb').read());"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('Seccomp:')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=30 * SLOWNESS, check=True
    )
    assert done.stdout.strip() == "['2']"
