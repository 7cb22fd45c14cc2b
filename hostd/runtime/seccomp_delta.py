"""What we refuse beyond the packaged seccomp profile, as rules of that profile's own format; data only.

containers-common leaves the doors to user namespaces open (rootless podman needs them): a job could become
root of one, mount in it and reach kernel code that has never been meant for strangers. Docker's default
refuses them to whoever lacks CAP_SYS_ADMIN, and so do we. `seccomp` takes a name that stands here out of the
packaged rules and puts these in, for names that the packaged profile mentions at all: this only ever refuses.

Source: Docker's default profile (moby `profiles/seccomp/default.json`); seccomp(2); clone(2).
"""

from __future__ import annotations

from typing import Any

_ADMIN = {"caps": ["CAP_SYS_ADMIN"]}
_BEHIND_ADMIN = [
    *("unshare", "setns", "mount", "umount", "umount2", "pivot_root", "mount_setattr"),
    *("fsopen", "fsconfig", "fsmount", "fspick", "move_mount", "open_tree"),
]
_NAMESPACE_FLAGS = (1 << 17, *(1 << bit for bit in range(25, 31)))  # NEWNS; NEWCGROUP … NEWNET
_ALL_NAMESPACE_FLAGS = sum(_NAMESPACE_FLAGS)
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97
_INT = 0xFFFFFFFF
"""A family is an int: the kernel does not look at a register's upper half, so a comparison must not either."""
_VSOCK = 40
_FAMILY_RANGES = ((~31 & _INT, 0), (~7 & _INT, 32), (_INT, 41), (~1 & _INT, 42), (~3 & _INT, 44))
"""Masks and values that cover 0 to 47 but for `_VSOCK`: what leads out of the machine past every namespace."""


def _masked(index: int, mask: int, value: int) -> dict[str, Any]:
    return {"index": index, "op": "SCMP_CMP_MASKED_EQ", "value": mask, "valueTwo": value}


_NOT_AUDIT = {"index": 2, "op": "SCMP_CMP_NE", "value": 9}
_AUDIT = [{"index": 0, "op": "SCMP_CMP_EQ", "value": 16}, {"index": 2, "op": "SCMP_CMP_EQ", "value": 9}]
_MAY_AUDIT = {"caps": ["CAP_AUDIT_WRITE"]}


def _allow(*names: str, **more: Any) -> dict[str, Any]:
    return {"names": list(names), "action": "SCMP_ACT_ALLOW", **more}


def _refuse(*names: str, errno: int = _EPERM, **more: Any) -> dict[str, Any]:
    return {"names": list(names), "action": "SCMP_ACT_ERRNO", "errnoRet": errno, **more}


DELTA: list[dict[str, Any]] = [
    _allow(*_BEHIND_ADMIN, "clone", "clone3", includes=_ADMIN),
    _refuse(*_BEHIND_ADMIN, excludes=_ADMIN),
    # clone's flags are in a register; clone3's in memory, where no filter can look: libc falls back to clone.
    _allow("clone", args=[_masked(0, _ALL_NAMESPACE_FLAGS, 0)], excludes=_ADMIN),
    *(_refuse("clone", args=[_masked(0, flag, flag)], excludes=_ADMIN) for flag in _NAMESPACE_FLAGS),
    _refuse("clone3", errno=_ENOSYS, excludes=_ADMIN),
    # Keys know no namespace but the user's: one job could see another's.
    _refuse("keyctl", "add_key", "request_key"),
    _allow("syslog", includes={"caps": ["CAP_SYSLOG"]}),
    _refuse("syslog", excludes={"caps": ["CAP_SYSLOG"]}),
    _allow("reboot", includes={"caps": ["CAP_SYS_BOOT"]}),
    _refuse("reboot", excludes={"caps": ["CAP_SYS_BOOT"]}),
    *(_allow("socket", args=[_masked(0, *each)], includes=_MAY_AUDIT) for each in _FAMILY_RANGES),
    *(_allow("socket", args=[_masked(0, *each), _NOT_AUDIT], excludes=_MAY_AUDIT) for each in _FAMILY_RANGES),
    _refuse("socket", errno=22, args=_AUDIT, excludes=_MAY_AUDIT),
    _refuse("socket", errno=_EAFNOSUPPORT, args=[_masked(0, _INT, _VSOCK)]),
]

# What libseccomp cannot say: it opens i386's socketcall wherever socket is open, and there the family is in memory.
# Programs of 32 bits have had socket(2) itself since Linux 4.3.
PREFIX = {
    "x86_64": (
        (0x20, 0, 0, 4),  # load the architecture
        (0x15, 0, 3, 0x40000003),  # i386?
        (0x20, 0, 0, 0),  # load the call's number
        (0x15, 0, 1, 102),  # socketcall?
        (0x06, 0, 0, 0x00050000 | _ENOSYS),  # refuse
    )
}
"""Instructions of classic BPF, by machine, that go before libseccomp's (all of its jumps are relative)."""
