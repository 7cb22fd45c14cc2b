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

ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[os.uname().machine]
NUMBERS = {
    "x86_64": {"read": 0, "mount": 165, "bpf": 321, "chroot": 161, "kexec_load": 246, "personality": 135, "socket": 41},
    "aarch64": {"read": 63, "mount": 40, "bpf": 280, "chroot": 51, "kexec_load": 104, "personality": 92, "socket": 198},
}[os.uname().machine]
ALLOW, EPERM, EINVAL, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050016, 0x00050026


def judge(program: bytes, name: str, *arguments: int) -> int:
    """Run the filter on one call, as the kernel would: the classic BPF that libseccomp writes."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=iIQ6Q", NUMBERS[name], ARCHITECTURE, 0, *padded)
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
    first = SeccompCache(tmp_path / "s", profile).path_for([])
    assert judge(first.read_bytes(), "mount") == EPERM
    rules.append({"names": ["mount", "no_such_call_anywhere"], "action": "SCMP_ACT_ALLOW"})
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules}))
    second = SeccompCache(tmp_path / "s", profile).path_for([])
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


def test_a_machine_without_the_profile_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        SeccompCache(tmp_path, tmp_path / "missing.json").path_for([])
    assert "golang-github-containers-common" in caught.value.hint


def test_the_kernel_takes_it(tmp_path: Path) -> None:
    path = SeccompCache(tmp_path).path_for(DEFAULT_CAPABILITIES)
    script = (
        "import sys; from netns import syscalls; syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1);"
        "syscalls.seccomp_load(open(sys.argv[1], 'rb').read());"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('Seccomp:')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "['2']"
