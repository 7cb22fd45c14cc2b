"""Compile the stock seccomp profile of containers-common to BPF, once per profile, capabilities and machine.

libseccomp needs about 80 ms for it, which is most of what crun spends on a start; so the bytes are
kept in files named after everything they came from. Called by `launch`, which hands the path to the
spawner. Refuses a profile it does not fully understand: a rule left out could be a door left open.
What the packaged profile leaves open and Docker's does not is closed by `seccomp_delta`, and what libseccomp
writes at length is made short by `seccomp_ranges`.
Only the names of system calls that this libseccomp does not know are passed over, as podman does
(what is not named gets the profile's default, a refusal).
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from discovery.wire.errors import Invalid, ServiceError, Unavailable, error_of
from hostd.runtime.seccomp_delta import DELTA, PREFIX
from hostd.runtime.seccomp_ranges import shrink

PROFILE_PATH = Path("/usr/share/containers/seccomp.json")
_CACHE_VERSION = "3"  # changes with how we read a profile, and with the delta

_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_UNKNOWN = -1  # __NR_SCMP_ERROR
_GO_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}


class _Argument(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    index: int
    value: int
    op: str
    value_two: int = 0


class _Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    caps: tuple[str, ...] = ()
    arches: tuple[str, ...] = ()
    min_kernel: str = ""


class _Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    names: tuple[str, ...]
    action: str
    args: tuple[_Argument, ...] | None = None
    includes: _Condition = _Condition()
    excludes: _Condition = _Condition()
    errno_ret: int | None = None
    errno: str = ""
    comment: str = ""


class _ArchMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    architecture: str
    sub_architectures: tuple[str, ...] | None = ()


class _Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    default_action: str
    syscalls: tuple[_Rule, ...]
    arch_map: tuple[_ArchMap, ...] = ()
    default_errno_ret: int | None = None
    default_errno: str = ""


class SeccompCache:
    """The compiled filters of one host, in one directory."""

    def __init__(self, directory: Path, profile: Path = PROFILE_PATH) -> None:
        self._directory = directory
        self._profile = profile
        self._known: dict[frozenset[str], Path] = {}

    def path_for(self, capabilities: Iterable[str]) -> Path:
        """Return the file with the filter for a job that has these capabilities; blocks ~0.2 s the first time ever.

        Raises:
            Invalid: the profile does not parse, or says what we do not understand.
            Unavailable: the profile or libseccomp is not installed.
        """
        wanted = frozenset(capabilities)
        if wanted not in self._known:
            self._known[wanted] = self._stored(wanted)
        return self._known[wanted]

    def _stored(self, capabilities: frozenset[str]) -> Path:
        try:
            raw = self._profile.read_bytes()
        except FileNotFoundError as error:
            raise Unavailable(
                f"no seccomp profile at {self._profile}",
                hint="install golang-github-containers-common",
            ) from error
        machine = os.uname()
        facts = (_CACHE_VERSION, machine.machine, machine.release, " ".join(sorted(capabilities)))
        name = hashlib.sha256(raw + "\n".join(facts).encode()).hexdigest()
        path = self._directory / f"{name}.bpf"
        if not path.exists():
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            program = _compiled_apart(raw, capabilities)
            beside = path.with_suffix(f".{os.getpid()}")
            beside.write_bytes(program)
            beside.replace(path)
        return path


def _compiled_apart(raw: bytes, capabilities: Iterable[str]) -> bytes:
    """Compile in a process that ends: libseccomp and its binding would leave 1.4 MiB in this one (measured)."""
    command = [sys.executable, "-P", "-m", "hostd.runtime.seccomp", *sorted(capabilities)]
    done = subprocess.run(command, input=raw, capture_output=True, check=False)
    if done.returncode:
        raise error_of(500, done.stdout or done.stderr[-200:], "compiling the seccomp profile")
    return done.stdout


def main(capabilities: Sequence[str]) -> int:
    """Compile the profile on stdin to stdout; a refusal is its JSON there, and its exit status."""
    try:
        sys.stdout.buffer.write(compile_profile(sys.stdin.buffer.read(), capabilities))
    except ServiceError as error:
        sys.stdout.buffer.write(msgspec.json.encode(error.to_body()))
        return error.exit_code
    return 0


def compile_profile(raw: bytes, capabilities: Iterable[str]) -> bytes:
    """Return the profile as an array of `struct sock_filter`, for this machine and these capabilities.

    Raises:
        Invalid: the profile does not parse, or says what we do not understand.
        Unavailable: libseccomp is not installed.
    """
    try:
        profile = msgspec.json.decode(raw, type=_Profile)
    except msgspec.MsgspecError as error:
        raise Invalid(f"the seccomp profile does not parse: {error}") from error
    try:
        import pyseccomp  # imports slowly (it looks for its libraries with ldconfig), and rarely needed
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"seccomp: {error}", hint="install libseccomp2") from error
    machine = os.uname().machine
    default = _action(pyseccomp, profile.default_action, profile.default_errno_ret)
    program = pyseccomp.SyscallFilter(defaction=default)
    program.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)  # a binary tree: half the time to load, and to run
    for architecture in _sub_architectures(profile, machine):
        program.add_arch(_named(pyseccomp.Arch, architecture.removeprefix("SCMP_ARCH_")))
    granted = {f"CAP_{name}" for name in capabilities}
    for rule in _tightened(profile.syscalls):
        action = _action(pyseccomp, rule.action, rule.errno_ret)
        if action != default and _applies(rule, granted, machine):
            _add(pyseccomp, program, action, rule)
    prefix = b"".join(struct.pack("=HBBI", *each) for each in PREFIX.get(machine, ()))
    return shrink(prefix + _export(program))


def _tightened(rules: Sequence[_Rule]) -> list[_Rule]:
    """Put the delta's rules in the place of the packaged ones of the same calls."""
    delta = msgspec.convert(DELTA, tuple[_Rule, ...])
    ours = {name for rule in delta for name in rule.names}
    named = {name for rule in rules for name in rule.names}
    kept = [msgspec.structs.replace(rule, names=tuple(n for n in rule.names if n not in ours)) for rule in rules]
    return kept + [msgspec.structs.replace(rule, names=tuple(n for n in rule.names if n in named)) for rule in delta]


def _sub_architectures(profile: _Profile, machine: str) -> tuple[str, ...]:
    if machine not in _ARCHITECTURES:
        raise Invalid(f"seccomp: machine {machine} is not known", hint="known: " + ", ".join(_ARCHITECTURES))
    native = _ARCHITECTURES[machine]
    return next((each.sub_architectures or () for each in profile.arch_map if each.architecture == native), ())


def _applies(rule: _Rule, granted: set[str], machine: str) -> bool:
    """Read `includes` and `excludes` as containers/common does: all named caps, any named architecture."""
    architecture = _GO_NAMES[machine]
    wants, refuses = rule.includes, rule.excludes
    if wants.min_kernel and _release() < _version(wants.min_kernel):
        return False
    if refuses.min_kernel and _release() >= _version(refuses.min_kernel):
        return False
    if wants.arches and architecture not in wants.arches:
        return False
    if architecture in refuses.arches:
        return False
    return set(wants.caps) <= granted and not set(refuses.caps) & granted


def _release() -> tuple[int, ...]:
    return _version(".".join(os.uname().release.split("-")[0].split(".")[:2]))


def _version(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("."))
    except ValueError as error:
        raise Invalid(f"seccomp: {text!r} is no kernel version") from error


def _add(pyseccomp: Any, program: Any, action: int, rule: _Rule) -> None:
    for name in rule.names:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
        if number == _UNKNOWN:
            continue
        for arguments in _conjunctions(rule.args or ()):
            try:
                program.add_rule(action, number, *[_comparison(pyseccomp, each) for each in arguments])
            except OSError as error:
                raise Invalid(f"seccomp: rule for {name}: {error}") from error


def _comparison(pyseccomp: Any, argument: _Argument) -> Any:
    operator = _named(pyseccomp, argument.op.removeprefix("SCMP_CMP_"))
    return pyseccomp.Arg(argument.index, operator, argument.value, argument.value_two)


def _conjunctions(arguments: Sequence[_Argument]) -> list[Sequence[_Argument]]:
    """Split a rule's arguments into rules: compared together, or one by one when an index comes twice.

    libseccomp takes each index only once; runc and crun read a repeated one as "any of these".
    """
    if len({each.index for each in arguments}) == len(arguments):
        return [arguments]
    return [[each] for each in arguments]


def _action(pyseccomp: Any, name: str, errno_ret: int | None) -> int:
    if name in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        number = errno.EPERM if errno_ret is None else errno_ret
        return int(getattr(pyseccomp, name.removeprefix("SCMP_ACT_"))(number))
    if name in ("SCMP_ACT_ALLOW", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG"):
        return _named(pyseccomp, name.removeprefix("SCMP_ACT_"))
    raise Invalid(f"seccomp: unknown action {name!r}")


def _named(holder: Any, name: str) -> int:
    value = getattr(holder, name, None)
    if not isinstance(value, int):
        raise Invalid(f"seccomp: unknown name {name!r}")
    return value


def _export(program: Any) -> bytes:
    with os.fdopen(os.memfd_create("seccomp", os.MFD_CLOEXEC), "rb") as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
