"""Say to the kernel what Python's standard library cannot say: the only ctypes file of the tree.

Functions are named as the system call (man section 2) and take what it takes; a refusal is a
`KernelError` that carries the call's name and its target. Standard library only, because the
spawner imports this file without site-packages. Called by the spawner, `netns` and `rootfs`.

Refuses machines whose system call numbers it does not know (it has x86_64 and aarch64). Numbers
above 423 are the same on every architecture. Nothing here keeps state or checks what it is told.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import struct
from collections.abc import Iterable

from netns.errors import KernelError

CLONE_VM = 0x00000100
CLONE_FILES = 0x00000400
CLONE_PIDFD = 0x00001000
CLONE_PARENT = 0x00008000
CLONE_PARENT_SETTID = 0x00100000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_CLEAR_SIGHAND = 0x1_0000_0000

MS_RDONLY = 1 << 0
MS_NOSUID = 1 << 1
MS_NODEV = 1 << 2
MS_NOEXEC = 1 << 3
MS_REMOUNT = 1 << 5
MS_NOSYMFOLLOW = 1 << 8
MS_NOATIME = 1 << 10
MS_BIND = 1 << 12
MS_MOVE = 1 << 13
MS_REC = 1 << 14
MS_SLAVE = 1 << 19
MS_PRIVATE = 1 << 18
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MNT_DETACH = 2

MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_IDMAP = 1 << 1, 1 << 2, 1 << 3, 1 << 20
OPEN_TREE_CLONE = 1
AT_RECURSIVE = 1 << 15
AT_EMPTY_PATH = 1 << 12
MOVE_MOUNT_F_EMPTY_PATH = 4
KEYCTL_JOIN_SESSION_KEYRING = 1
FSMOUNT_CLOEXEC = FSOPEN_CLOEXEC = 1
LO_FLAGS_AUTOCLEAR = 4

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

CLOSE_RANGE_CLOEXEC = 1 << 2

IN_MODIFY = 0x00000002
IN_ONESHOT = 0x80000000

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_MM = 35
PR_SET_MM_MAP = 14
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_NO_NEW_PRIVS = 38
SECBIT_NO_SETUID_FIXUP = 1 << 2
SECCOMP_MODE_FILTER = 2

CAPABILITIES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
).split()
"""Names without `CAP_`; the index is the kernel's number."""

_CAPABILITY_VERSION_3 = 0x20080522
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442
_SYS_CLONE3, _SYS_CLOSE_RANGE, _SYS_OPENAT2 = 435, 436, 437
_AT_FDCWD = -100
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE, _LOOP_SET_DIRECT_IO = 0x4C82, 0x4C0A, 0x4C08
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_RT_SIGACTION = {"x86_64": 13, "aarch64": 134}
_SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}
_PIDFD_GET_INFO, _PIDFD_INFO_EXIT = 0xC040FF0B, 1 << 3  # _IOWR(0xFF, 11, 64 bytes)

_NUMBERS = {
    "capset": (126, 91),
    "chdir": (80, 49),
    "clone3": (435, 435),
    "close_range": (436, 436),
    "dup3": (292, 24),
    "execve": (59, 221),
    "exit_group": (231, 94),
    "faccessat": (269, 48),
    "fchdir": (81, 50),
    "fchown": (93, 55),
    "ioctl": (16, 29),
    "keyctl": (250, 219),
    "mkdirat": (258, 34),
    "mknodat": (259, 33),
    "mmap": (9, 222),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "munmap": (11, 215),
    "open_tree": (428, 428),
    "openat": (257, 56),
    "openat2": (437, 437),
    "pivot_root": (155, 41),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "readv": (19, 65),
    "recvfrom": (45, 207),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "setfsgid": (123, 152),
    "setfsuid": (122, 151),
    "setgroups": (116, 159),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setresgid": (119, 149),
    "setresuid": (117, 147),
    "setsid": (112, 157),
    "socket": (41, 198),
    "symlinkat": (266, 36),
    "umask": (95, 166),
    "umount2": (166, 39),
    "unlinkat": (263, 35),
    "unshare": (272, 97),
    "write": (1, 64),
    "writev": (20, 66),
}
"""By name: the number on x86_64 and on aarch64. Source: asm/unistd_64.h and asm-generic/unistd.h."""

# PyDLL, not CDLL: none of these calls waits for long, and a child made by clone3 must not give away
# an interpreter lock that it could find changed.
_libc = ctypes.PyDLL(None, use_errno=True)
# What may wait for a disk gives the interpreter lock away; never for a child of the spawner.
_libc_waiting = ctypes.CDLL(None, use_errno=True)
_long, _int, _ulong, _text = ctypes.c_long, ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p
_libc.syscall.restype = _libc_waiting.syscall.restype = _long
_libc.mmap.restype = ctypes.c_ssize_t
_libc.mount.argtypes = (_text, _text, _text, _ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (_text, _int)
_libc.prctl.argtypes = (_int, _ulong, _ulong, _ulong, _ulong)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _LoopConfig(ctypes.Structure):
    """`struct loop_config` with the `struct loop_info64` in its middle, as far as we fill it."""

    _fields_ = (
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("device_to_key_size", ctypes.c_byte * 52),
        ("lo_flags", ctypes.c_uint32),
        ("names_and_key", ctypes.c_byte * 176),
        ("reserved", ctypes.c_uint64 * 8),
    )


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _check(result: int, syscall: str, target: str | int = "") -> int:
    if result < 0:
        raise KernelError(ctypes.get_errno(), syscall, target if isinstance(target, str) else hex(target))
    return result


def _number(numbers: dict[str, int], syscall: str) -> ctypes.c_long:
    machine = os.uname().machine
    if machine not in numbers:
        raise KernelError(errno.ENOSYS, syscall, machine)
    return _long(numbers[machine])


def _encode(path: str | None) -> bytes | None:
    return None if path is None else os.fsencode(path)


def clone3(flags: int, exit_signal: int) -> tuple[int, int]:
    """Make a copy-on-write child, as fork does, in new namespaces; return (pid, pidfd), in the child (0, -1).

    For a single-threaded caller only: no fork handlers run. The pidfd closes on exec.
    """
    pidfd = ctypes.c_int(-1)
    arguments = (ctypes.c_uint64 * 11)(flags | CLONE_PIDFD, ctypes.addressof(pidfd), 0, 0, exit_signal)
    pid = _libc.syscall(_long(_SYS_CLONE3), ctypes.byref(arguments), _long(ctypes.sizeof(arguments)))
    return _check(pid, "clone3", flags), pidfd.value if pid else -1


def pidfd_exit_status(pidfd: int) -> int | None:
    """Return the wait status of a process that is nobody's zombie any more, child of ours or not; None if not told.

    The kernel keeps it for as long as somebody holds a pidfd of it. Source: PIDFD_GET_INFO, Linux 6.15
    (include/uapi/linux/pidfd.h); an older kernel knows the call not at all, or leaves the bit unset.
    """
    info = bytearray(struct.pack("Q56x", _PIDFD_INFO_EXIT))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    (told,) = struct.unpack_from("Q", info)
    return int(struct.unpack_from("i", info, 60)[0]) if told & _PIDFD_INFO_EXIT else None


@functools.cache
def numbers() -> dict[str, int]:
    """Return the numbers of those system calls that tables are made of, on this machine.

    Raises:
        KernelError: ENOSYS, the machine is not known.
    """
    machine = os.uname().machine
    if machine not in ("x86_64", "aarch64"):
        raise KernelError(errno.ENOSYS, "syscall", machine)
    return {name: both[machine == "aarch64"] for name, both in _NUMBERS.items()}


def call(number: int, *arguments: int) -> int:
    """Make any system call; the result is the kernel's, below 0 an errno."""
    result = int(_libc.syscall(_long(number), *(_long(each) for each in arguments)))
    return -ctypes.get_errno() if result == -1 else result


def map_at(address: int, length: int, protection: int, flags: int, fd: int) -> None:
    """Map a file at a fixed address where nothing is mapped yet; `flags` is MAP_SHARED or MAP_PRIVATE."""
    flags |= 0x100000  # MAP_FIXED_NOREPLACE
    arguments = (ctypes.c_void_p(address), ctypes.c_size_t(length), _int(protection), _int(flags), _int(fd), _long(0))
    _check(0 if _libc.mmap(*arguments) == address else -1, "mmap", address)


def run_at(address: int, argument: int) -> None:
    """Call machine code that has been mapped there, with one argument."""
    ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(address)(argument)


def highest_address() -> int:
    """Return the end of the highest mapping of this process, but for those that cannot be unmapped."""
    with open("/proc/self/maps") as file:
        spans = [line.split()[0] for line in file if "[vsyscall]" not in line]
    return int(spans[-1].partition("-")[2], 16)


def unshare(flags: int) -> None:
    """Move the caller into new namespaces."""
    _check(_libc.unshare(flags), "unshare", flags)


def setns(fd: int, kind: int) -> None:
    """Move the caller into the namespace(s) that `fd` stands for; `kind` is a CLONE_NEW* flag, 0 = any."""
    _check(_libc.setns(fd, kind), "setns", kind)


def mount(source: str | None, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """Mount, bind, move, remount or change propagation."""
    done = _libc.mount(_encode(source), _encode(target), _encode(fstype), flags, _encode(data))
    _check(done, "mount", target)


def umount2(target: str, flags: int) -> None:
    """Unmount what is mounted last at `target`."""
    _check(_libc.umount2(_encode(target), flags), "umount2", target)


def fsopen(fstype: str) -> int:
    """Begin to configure a file system of this type; the fd closes on exec."""
    return _check(_libc.syscall(_long(_SYS_FSOPEN), _encode(fstype), _long(FSOPEN_CLOEXEC)), "fsopen", fstype)


def fsconfig(fs_fd: int, key: str, value: str | None = None) -> None:
    """Set an option of what `fsopen` began: a flag, or a text."""
    command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
    done = _libc.syscall(_long(_SYS_FSCONFIG), _int(fs_fd), _long(command), _encode(key), _encode(value), _long(0))
    _check(done, "fsconfig", key)


def fsconfig_create(fs_fd: int) -> None:
    """Make the file system's superblock: reads its device."""
    done = _libc_waiting.syscall(_long(_SYS_FSCONFIG), _int(fs_fd), _long(_FSCONFIG_CMD_CREATE), None, None, _long(0))
    _check(done, "fsconfig", "CMD_CREATE")


def fsmount(fs_fd: int, attributes: int) -> int:
    """Return a mount that hangs nowhere and dies with the last fd of it, unless `move_mount` has hung it up."""
    done = _libc_waiting.syscall(_long(_SYS_FSMOUNT), _int(fs_fd), _long(FSMOUNT_CLOEXEC), _long(attributes))
    return _check(done, "fsmount")


def loop_get_free(control_fd: int) -> int:
    """Return the number of a loop device that is free now; another may take it first."""
    return fcntl.ioctl(control_fd, _LOOP_CTL_GET_FREE)


def loop_configure(loop_fd: int, file_fd: int, flags: int, block_bytes: int = 0) -> None:
    """Make a loop device stand for a file. EBUSY: somebody else has taken it. `block_bytes` 0: of 512."""
    config = _LoopConfig(fd=file_fd, lo_flags=flags, block_size=block_bytes)
    try:
        fcntl.ioctl(loop_fd, _LOOP_CONFIGURE, config)
    except OSError as error:
        raise KernelError(error.errno or 0, "ioctl", "LOOP_CONFIGURE") from error


def loop_set_direct_io(loop_fd: int, *, is_direct: bool) -> None:
    """Have a loop device read and write its file past the page cache, or through it; writes out what is there first.

    EINVAL: the file's file system cannot, or not in blocks as small as the device's.
    """
    try:
        fcntl.ioctl(loop_fd, _LOOP_SET_DIRECT_IO, int(is_direct))
    except OSError as error:
        raise KernelError(error.errno or 0, "ioctl", "LOOP_SET_DIRECT_IO") from error


def pivot_root(new_root: str, put_old: str) -> None:
    """Make `new_root` the root of the caller's mount namespace, the old one visible at `put_old`."""
    number = _number(_SYS_PIVOT_ROOT, "pivot_root")
    _check(_libc.syscall(number, _encode(new_root), _encode(put_old)), "pivot_root", new_root)


def open_tree(path: str, flags: int) -> int:
    """Return an fd of the mount that `path` is in, with OPEN_TREE_CLONE of a copy that is mounted nowhere yet."""
    fd = _libc.syscall(_long(_SYS_OPEN_TREE), _int(_AT_FDCWD), _encode(path), _long(flags | os.O_CLOEXEC))
    return int(_check(fd, "open_tree", path))


def mount_setattr_idmap(tree_fd: int, userns_fd: int, path: str = "") -> None:
    """Show the files of a copied mount with their owners shifted as the user namespace does; `path` is for errors."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_IDMAP, 0, 0, userns_fd)
    done = _libc.syscall(
        _long(_SYS_MOUNT_SETATTR), _int(tree_fd), b"", _long(AT_EMPTY_PATH), ctypes.byref(attributes), _long(32)
    )
    _check(done, "mount_setattr", path)


def move_mount(tree_fd: int, path: str) -> None:
    """Mount at `path` what is mounted nowhere yet, from `open_tree` or `fsmount`."""
    flags = _long(MOVE_MOUNT_F_EMPTY_PATH)
    done = _libc.syscall(_long(_SYS_MOVE_MOUNT), _int(tree_fd), b"", _int(_AT_FDCWD), _encode(path), flags)
    _check(done, "move_mount", path)


def openat2(directory_fd: int, path: str, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """Open `path` with the walk restricted as `resolve` (RESOLVE_*) says; the fd closes on exec.

    Tries again when the kernel could not tell, for a rename elsewhere, whether the walk left the tree (EAGAIN).
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(100):
        fd = _libc.syscall(
            _long(_SYS_OPENAT2), _int(directory_fd), _encode(path), ctypes.byref(how), _long(ctypes.sizeof(how))
        )
        if fd >= 0 or ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            break
    return _check(fd, "openat2", path)


def close_range(first: int, last: int, flags: int) -> None:
    """Close the fds `first` to `last`, or mark them to be closed on exec."""
    done = _libc.syscall(_long(_SYS_CLOSE_RANGE), _long(first), _long(last), _long(flags))
    _check(done, "close_range", f"{first}-{last}")


def prctl(option: int, argument: int = 0) -> int:
    """Do an operation on the calling process that takes one number."""
    return _check(_libc.prctl(option, argument, 0, 0, 0), "prctl", option)


def inotify_init1(flags: int) -> int:
    """Return a descriptor that reads as events; `flags` are O_NONBLOCK and O_CLOEXEC."""
    return _check(_libc.inotify_init1(flags), "inotify_init1")


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """Return the number under which events of a file will be told."""
    return _check(_libc.inotify_add_watch(fd, _encode(path), ctypes.c_uint32(mask)), "inotify_add_watch", path)


def inotify_rm_watch(fd: int, watch: int) -> None:
    """Watch a file no longer."""
    _check(_libc.inotify_rm_watch(fd, watch), "inotify_rm_watch", watch)


def set_file_ids(uid: int, gid: int) -> None:
    """Make what the caller creates belong to these ids (setfsuid, setfsgid); its capabilities may change with it.

    The two calls tell no failure; the kernel only refuses ids that the caller's user namespace does not have.
    """
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)


def rt_sigaction_default(number: int) -> None:
    """Give a signal its default action, also one that glibc keeps for itself and `signal.signal` refuses.

    An all-zero `struct kernel_sigaction` is SIG_DFL. Source: rt_sigaction(2), signal(7) on signals 32 and 33.
    """
    action = ctypes.create_string_buffer(32)
    call = _number(_SYS_RT_SIGACTION, "rt_sigaction")
    _check(_libc.syscall(call, _long(number), action, None, _ulong(8)), "rt_sigaction", number)


def keyctl_join_session_keyring() -> None:
    """Leave the inherited session keyring for a new, empty one without a name."""
    number = _number(_SYS_KEYCTL, "keyctl")
    _check(_libc.syscall(number, _long(KEYCTL_JOIN_SESSION_KEYRING), None), "keyctl", "JOIN_SESSION_KEYRING")


def capability_mask(names: Iterable[str]) -> int:
    """Return the bits of these capabilities.

    Raises:
        KernelError: EINVAL, for a name that is unknown.
    """
    mask = 0
    for name in names:
        if name not in CAPABILITIES:
            raise KernelError(errno.EINVAL, "capset", name)
        mask |= 1 << CAPABILITIES.index(name)
    return mask


def capability_bounding_set() -> int:
    """Return the bits of the capabilities that the caller and its children can ever have."""
    mask = 0
    for number in range(64):
        try:
            mask |= prctl(PR_CAPBSET_READ, number) << number
        except KernelError:  # beyond the last one that this kernel knows
            break
    return mask


def capabilities_known() -> int:
    """Return the bits of all capabilities that this kernel has."""
    mask = number = 0
    try:
        while True:
            prctl(PR_CAPBSET_READ, number)
            mask |= 1 << number
            number += 1
    except KernelError:  # beyond the last one
        return mask


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the calling thread's capabilities, each given as bits."""
    low, high = 0xFFFFFFFF, 32
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (effective, permitted, inheritable)
    data = (ctypes.c_uint32 * 6)(*(bits & low for bits in sets), *(bits >> high for bits in sets))
    _check(_libc.capset(ctypes.byref(header), ctypes.byref(data)), "capset", permitted)


def seccomp_load(program: bytes) -> None:
    """Install a filter (an array of `struct sock_filter`) for good; wants no_new_privs or CAP_SYS_ADMIN.

    Source: seccomp(2); through prctl, which has a number in libc on every architecture.
    """
    instructions = ctypes.create_string_buffer(program, len(program))
    fprog = _SockFprog(len(program) // 8, ctypes.addressof(instructions))
    done = _libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(fprog), 0, 0)
    _check(done, "prctl", f"PR_SET_SECCOMP, {fprog.len} instructions")


class Nftables:
    """libnftables in this process: one context, bound to the network namespace of the thread that makes it.

    Each `run` is one transaction of the kernel. Not for two threads at once.
    """

    _JSON = 1 << 4

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL("libnftables.so.1")
        except OSError as error:
            raise KernelError(errno.ENOENT, "dlopen", "libnftables.so.1") from error
        context = ctypes.c_void_p
        library.nft_ctx_new.restype = context
        for name in ("nft_ctx_free", "nft_ctx_buffer_output", "nft_ctx_buffer_error"):
            getattr(library, name).argtypes = (context,)
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(library, name).argtypes = (context,)
            getattr(library, name).restype = _text
        library.nft_run_cmd_from_buffer.argtypes = (context, _text)
        library.nft_ctx_output_set_flags.argtypes = (context, ctypes.c_uint)
        self._library = library
        self._context = library.nft_ctx_new(0)
        if not self._context:
            raise KernelError(errno.ENOMEM, "nft_ctx_new")
        library.nft_ctx_buffer_output(self._context)
        library.nft_ctx_buffer_error(self._context)
        library.nft_ctx_output_set_flags(self._context, self._JSON)

    def run(self, commands: str) -> str:
        """Carry out commands in nft's language, all or none; what they list comes back as JSON."""
        failed = self._library.nft_run_cmd_from_buffer(self._context, commands.encode())
        output: bytes = self._library.nft_ctx_get_output_buffer(self._context)
        complaint: bytes = self._library.nft_ctx_get_error_buffer(self._context)
        if failed:
            message = complaint.decode("utf-8", "replace").strip()
            raise KernelError(_errno_of(message), "nft", message or commands[:200])
        return output.decode()

    def close(self) -> None:
        """Free the context and its netlink socket; a second time is fine."""
        if self._context:
            self._library.nft_ctx_free(self._context)
            self._context = None


def _errno_of(complaint: str) -> int:
    """Read the errno back from libnftables' words, which end their first line with strerror's text."""
    first = complaint.partition("\n")[0]
    for number in (errno.EEXIST, errno.ENOENT, errno.EBUSY, errno.EPERM, errno.EOPNOTSUPP, errno.ENOMEM, errno.EINVAL):
        if first.endswith(os.strerror(number)):
            return number
    return errno.EINVAL
