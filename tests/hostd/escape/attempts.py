"""Attempts to break out of a job, run inside it as its root: `python3 -c THIS NAME…` prints a JSON object.

Standard library only, no import of ours: the text of this file goes into the job. Each attempt runs in a child of
its own. One that gets what it wants returns (`ESCAPED`); else it raises, and the errno's name or the reason is the
result. None does harm where it gets through: what would be changed is only opened, or written as it was, and calls
that could hurt get arguments that the kernel refuses after it has looked whether we may.
"""

from __future__ import annotations

import contextlib
import ctypes  # noqa: TID251 — runs alone, inside a job
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator

LIBC = ctypes.CDLL(None, use_errno=True)
ATTEMPTS: dict[str, Callable[[], object]] = {}
ENV = os.environ
NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MOUNT, UMOUNT2, UNSHARE, CLONE, CLONE3, SETNS = 165, 166, 272, 56, 435, 308
MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
TIMEOUT_S = 8


class Held(Exception):
    """The attempt did not get what it wanted."""


def attempt(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def add(act: Callable[[], object]) -> Callable[[], object]:
        assert name not in ATTEMPTS
        ATTEMPTS[name] = act
        return act

    return add


def add(name: str, act: Callable[[], object]) -> None:
    attempt(name)(act)


def call(number: int, *arguments: object) -> int:
    """Make a system call; an error is raised."""
    fixed = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = LIBC.syscall(ctypes.c_long(number), *fixed)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


def passes(*names: str) -> Callable[[Callable[[], object]], Callable[[], None]]:
    """Turn a call whose arguments are wrong into one that counts as permitted if only they were refused."""

    def wrap(act: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            try:
                act()
            except OSError as error:
                if errno.errorcode.get(error.errno or 0) not in names:
                    raise

        return run

    return wrap


def want(condition: object, why: str = "not there") -> None:
    if not condition:
        raise Held(why)


def mount(source: str | None, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    call(MOUNT, *texts, flags, None if data is None else data.encode())


def writes_itself(path: str) -> None:
    """Write to a setting what it says already."""
    with open(path) as file:
        value = file.read()
    with open(path, "w") as file:
        file.write(value)


def opens(path: str, flags: int = os.O_WRONLY) -> None:
    os.close(os.open(path, flags))


def content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


def fresh(name: str) -> str:
    path = f"/tmp/{name}-{os.getpid()}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    return path


# mounts


add("mount a tmpfs", lambda: mount("t", fresh("m"), "tmpfs"))
add("bind the root elsewhere", lambda: mount("/", fresh("m"), None, MS_BIND))
add("mount a fresh proc", lambda: mount("proc", fresh("m"), "proc"))
add("mount a fresh sysfs", lambda: mount("sysfs", fresh("m"), "sysfs"))
add("mount a cgroup hierarchy for its release_agent", lambda: _mount_cgroup())
add("make /proc/sys writable", lambda: mount(None, "/proc/sys", None, MS_REMOUNT | MS_BIND))
add("make /sys writable", lambda: mount(None, "/sys", None, MS_REMOUNT))
add("take the mask off /proc/interrupts", lambda: call(UMOUNT2, b"/proc/interrupts", 2))
add("open_tree of the root", lambda: call(428, -100, b"/", 1))
add("fsopen and fsmount", lambda: _new_mount())
add("mount_setattr on /proc/sys", lambda: _mount_setattr())


def _mount_cgroup() -> None:
    for kind, data in (("cgroup", "none,name=escape"), ("cgroup2", None)):
        with contextlib.suppress(OSError):
            return mount("c", fresh("c"), kind, 0, data)
    raise Held("no cgroup mount")


def _new_mount() -> None:
    fd = call(430, b"tmpfs", 0)
    call(431, fd, 6, None, None, 0)
    call(432, fd, 0, 0)


def _mount_setattr() -> None:
    call(442, -100, b"/proc/sys", 0, struct.pack("QQQQ", 0, MS_RDONLY, 0, 0), 32)


# devices


def _disk_numbers() -> Iterator[tuple[int, int]]:
    for name in sorted(os.listdir("/sys/class/block")):
        major, minor = content(f"/sys/class/block/{name}/dev").split(b":")
        if int(open(f"/sys/class/block/{name}/size").read()) > 0:
            yield int(major), int(minor)


def _node(path: str, kind: int, major: int, minor: int) -> str:
    os.mknod(path, kind | 0o600, os.makedev(major, minor))
    return path


@attempt("mknod of a disk")
def _mknod_disk() -> None:
    _node(f"{fresh('d')}/disk", stat.S_IFBLK, *next(_disk_numbers()))


@attempt("read a disk through a node of its own")
def _read_disk() -> None:
    want(content(_node(f"{fresh('d')}/disk", stat.S_IFBLK, *next(_disk_numbers()))))


@attempt("read a disk through a node in /dev")
def _read_disk_in_dev() -> None:
    want(content(_node(f"/dev/disk-{os.getpid()}", stat.S_IFBLK, *next(_disk_numbers()))))


@attempt("read the kernel's log through a node in /dev")
def _read_kmsg() -> None:
    fd = os.open(_node(f"/dev/log-{os.getpid()}", stat.S_IFCHR, 1, 11), os.O_RDONLY | os.O_NONBLOCK)
    want(os.read(fd, 8192))


@attempt("find a device of the host in /dev")
def _devices() -> None:
    for at, folders, names in os.walk("/dev"):
        folders[:] = [name for name in folders if name not in ("pts", "shm", "mqueue", "fd")]
        for name in names:
            mode = os.lstat(f"{at}/{name}").st_mode
            if stat.S_ISBLK(mode) or name in ("mem", "kmsg", "port", "kvm", "loop-control", "fuse"):
                return
    raise Held("only its own")


# settings of the kernel


add("write core_pattern", lambda: writes_itself("/proc/sys/kernel/core_pattern"))
add("write vm.overcommit_memory", lambda: writes_itself("/proc/sys/vm/overcommit_memory"))
add("write net.ipv4.ip_forward", lambda: writes_itself("/proc/sys/net/ipv4/ip_forward"))
add("write kernel.hostname", lambda: writes_itself("/proc/sys/kernel/hostname"))
add("open sysrq-trigger", lambda: opens("/proc/sysrq-trigger"))
add("open an interrupt's affinity", lambda: opens("/proc/irq/default_smp_affinity"))
add("read /proc/keys", lambda: want(content("/proc/keys")))
add("read /proc/timer_list", lambda: want(content("/proc/timer_list")))
add("read /proc/interrupts", lambda: want(content("/proc/interrupts")))
add("list /sys/firmware", lambda: want(os.listdir("/sys/firmware")))


@attempt("write anything in /sys")
def _write_sys() -> None:
    for at, folders, names in os.walk("/sys"):
        folders[:] = [name for name in folders if name not in ("cgroup", "debug", "tracing")]
        for name in names:
            with contextlib.suppress(OSError):
                if os.lstat(f"{at}/{name}").st_mode & 0o222:
                    return opens(f"{at}/{name}")
    raise Held("nothing")


# calls for those who rule the machine

BUFFER = ctypes.create_string_buffer(4096)
add("init_module", passes("ENOEXEC", "EFAULT", "EINVAL")(lambda: call(175, BUFFER, 64, b"")))
add("delete_module", passes("ENOENT")(lambda: call(176, b"no-such-module", 0o4000)))
add("kexec_load", passes("EINVAL", "EBUSY", "EADDRNOTAVAIL")(lambda: call(246, 0, 0, 0, 1 << 60)))
add("reboot", passes("EINVAL")(lambda: call(169, 1, 2, 3, 0)))
add("swapon", passes("ENOENT", "EINVAL")(lambda: call(167, b"/no/such/file", 0)))
add("acct", passes("ENOENT")(lambda: call(163, b"/no/such/file")))
add("iopl", lambda: call(172, 3))
add("ioperm", lambda: call(173, 0x80, 1, 1))
add("read the kernel's log", lambda: call(103, 3, BUFFER, 4096))
add("sethostname", lambda: call(170, b"x", 1))
add("setdomainname", lambda: call(171, b"x", 1))
add("vhangup", lambda: call(153))
add("set the clock", passes("EINVAL")(lambda: call(159, struct.pack("I4xqqq", 0x4000, 0, 0, 0).ljust(256, b"\0"))))
add("fanotify", lambda: call(300, 4, 0))
add("a higher priority", lambda: os.setpriority(os.PRIO_PROCESS, 0, -10))
add("a higher priority for the disk", lambda: call(251, 1, 0, 1 << 13))
add("take capabilities back", lambda: _take_back())
add("bpf", lambda: call(321, 0, struct.pack("IIIII", 2, 4, 4, 1, 0).ljust(128, b"\0"), 128))
add("perf_event_open", lambda: call(298, struct.pack("IIQ", 1, 128, 0).ljust(128, b"\0"), 0, -1, -1, 0))
add("userfaultfd", lambda: call(323, 1))
add("io_uring", lambda: call(425, 8, ctypes.create_string_buffer(120)))
add("add_key", lambda: call(248, b"user", b"escape", b"x", 1, -2))
add("request_key", passes("ENOKEY")(lambda: call(249, b"user", b"no-such-key", 0, 0)))
add("keyctl", lambda: call(250, 0, -3, 1))
add("personality that makes data run", lambda: call(135, 0x0400000))
add("open a file by its handle", lambda: _by_handle())


def _take_back() -> None:
    version = ctypes.create_string_buffer(struct.pack("II", 0x20080522, 0))
    every = ctypes.create_string_buffer(struct.pack("IIIIII", 1 << 21, 1 << 21, 0, 0, 0, 0))  # SYS_ADMIN
    call(126, version, every)


def _by_handle() -> None:
    with open("/dev/shm/handle", "w") as file:
        file.write("x")
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
    call(303, -100, b"/dev/shm/handle", handle, ctypes.create_string_buffer(4), 0)
    folder = os.open("/dev/shm", os.O_RDONLY)
    os.close(call(304, folder, handle, 0))


# namespaces


for _name, _flag in {
    "user": NEWUSER, "mount": NEWNS, "net": NEWNET, "pid": NEWPID, "ipc": NEWIPC, "uts": NEWUTS, "cgroup": NEWCGROUP,
}.items():  # fmt: skip
    add(f"unshare {_name}", lambda flag=_flag: call(UNSHARE, flag))  # type: ignore[misc]
add("clone into a user namespace", lambda: _clone(NEWUSER))
add("clone into a mount namespace", lambda: _clone(NEWNS))
add("clone3 into a user namespace", lambda: _clone3(NEWUSER))
add("user namespaces in user namespaces", lambda: _nest(3))
add("setns into its own network namespace", lambda: call(SETNS, os.open("/proc/self/ns/net", os.O_RDONLY), 0))
add("unshare through the 32-bit door", lambda: _int80(310, NEWUSER))


def _nest(levels: int) -> None:
    for _ in range(levels):
        call(UNSHARE, NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _clone(flags: int) -> None:
    pid = call(CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _clone3(flags: int) -> None:
    pid = call(CLONE3, struct.pack("QQQQQQQQ", flags, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _int80(number: int, argument: int) -> None:
    """Call as a 32-bit program does: `mov eax, N; mov ebx, A; int 0x80; ret`."""
    code = b"\x53\xb8" + struct.pack("I", number) + b"\xbb" + struct.pack("I", argument) + b"\xcd\x80\x5b\xc3"
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
    if result < 0:
        raise OSError(-result, os.strerror(-result))


# other processes


def _processes() -> Iterator[tuple[int, bytes]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                yield int(name), content_all(f"/proc/{name}/cmdline")


def content_all(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _foreign() -> int:
    """Return the process that the test started in another job, told by its command line."""
    marker = ENV["FOREIGN"].encode()
    for pid, words in _processes():
        if words.startswith(b"sleep\0") and marker in words:
            return pid
    raise Held("no such process")


add("see a process of another job", _foreign)
add("signal a process of another job", lambda: os.kill(_foreign(), 0))
add("read another job's environment", lambda: want(content_all(f"/proc/{_foreign()}/environ")))
add("enter another job's root", lambda: want(os.listdir(f"/proc/{_foreign()}/root/")))
add("ptrace a process of another job", lambda: call(101, 16, _foreign(), 0, 0))
add("read another process's memory", lambda: _vm_read())
add("copy a file descriptor from another job", lambda: call(438, call(434, _foreign(), 0), 1, 0))
add("join another job's namespaces", lambda: call(SETNS, os.open(f"/proc/{_foreign()}/ns/ipc", os.O_RDONLY), 0))


def _vm_read() -> None:
    pid = _foreign()
    with open(f"/proc/{pid}/maps") as file:
        start = int(file.readline().split("-")[0], 16)
    with open(f"/proc/{pid}/mem", "rb", 0) as file:
        file.seek(start)
        want(file.read(4))


@attempt("shared memory of the host")
def _shared_memory() -> None:
    want(LIBC.shmget(int(ENV["SHM_KEY"]), 0, 0) >= 0)


@attempt("message queues of the host")
def _queues() -> None:
    LIBC.mq_open.argtypes = [ctypes.c_char_p, ctypes.c_int]
    want(LIBC.mq_open(ENV["QUEUE"].encode(), os.O_RDONLY) >= 0)


# files of the host


MARKER = ENV.get("MARKER", "/nowhere")
add("see a file of the host", lambda: os.stat(MARKER))
add("leave through ..", lambda: os.stat("/../../../../.." + MARKER))
add("leave through /proc/self/root", lambda: os.stat("/proc/self/root/../.." + MARKER))
add("leave by chroot and fchdir", lambda: _chroot_out())
add("a file descriptor of the host", lambda: _leaked_fd())
add("a variable of the host", lambda: want(ENV.get("HOST_SECRET")))
add("write a foreign file system's owner", lambda: _foreign_owner())
add("write through a volume that is read-only", lambda: opens("/readonly/file", os.O_WRONLY | os.O_CREAT))


def _chroot_out() -> None:
    folder = fresh("jail")
    root = os.open("/", os.O_RDONLY)
    os.chroot(folder)
    os.fchdir(root)
    for _ in range(64):
        os.chdir("..")
    os.chroot(".")
    os.stat(MARKER)


def _leaked_fd() -> None:
    # by number, not by listing, which opens one; 3 to 255 as they were when we began
    want(OPEN_AT_START, "none")


def _foreign_owner() -> None:
    path = f"{fresh('own')}/file"
    opens(path, os.O_CREAT | os.O_WRONLY)
    os.chown(path, 70000, 70000)


# rights by other programs


def _as_user(path: str, *arguments: str) -> str:
    """Run a program as uid 1000 and return what it says."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        os.setgroups([])
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
        os.execv(path, [path, *arguments])
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


def _copy(source: str, mode: int) -> str:
    os.makedirs("/suid", exist_ok=True)
    path = f"/suid/{os.getpid()}"
    with open(path, "wb") as file:
        file.write(content_all(source))
    os.chmod(path, mode)
    return path


@attempt("a set-user-id program makes root of a user")
def _setuid() -> None:
    text = _as_user(_copy(os.path.realpath("/bin/cat"), 0o4755), "/proc/self/status")
    uids = next(line for line in text.splitlines() if line.startswith("Uid:")).split()
    want(uids[2] == "0", f"effective uid {uids[2]}")


@attempt("a program's file capabilities")
def _file_capabilities() -> None:
    path = _copy(os.path.realpath("/bin/cat"), 0o755)
    os.setxattr(path, "security.capability", struct.pack("<IIIII", 0x02000001, 1, 0, 0, 0))  # CHOWN
    text = _as_user(path, "/proc/self/status")
    effective = next(line for line in text.splitlines() if line.startswith("CapEff:")).split()[1]
    want(int(effective, 16) != 0, "no capability")


# cgroups


def _cgroup_files(*names: str) -> Iterator[str]:
    for at, _, files in os.walk("/sys/fs/cgroup"):
        yield from (f"{at}/{name}" for name in names if name in files)


def _first(paths: Iterator[str], act: Callable[[str], object]) -> None:
    last: OSError | Held = Held("there is none")
    for path in paths:
        try:
            act(path)
            return
        except OSError as error:
            last = error
    raise last


add("raise its memory limit", lambda: _first(_cgroup_files("memory.limit_in_bytes", "memory.max"), writes_itself))
add("raise its limit of processes", lambda: _first(_cgroup_files("pids.max"), writes_itself))
add("open cgroup.procs", lambda: _first(_cgroup_files("cgroup.procs"), opens))
add("make a cgroup of its own", lambda: os.mkdir(f"{os.path.dirname(next(_cgroup_files('pids.max')))}/escape"))
add("see where in the host's cgroups it is", lambda: want(ENV["HOSTNAME"] in open("/proc/self/cgroup").read(), "/"))


# network


def _connect(host: str, port: int) -> None:
    socket.create_connection((host, port), timeout=2).close()


def _interface(flags: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, 0x8914, struct.pack("16sh22x", b"lo", flags))


def _netlink(kind: int, flags: int, body: bytes) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
        link.send(struct.pack("=IHHII", 16 + len(body), kind, 5 | flags, 1, 0) + body)
        number = struct.unpack_from("=i", link.recv(4096), 16)[0]
    if number:
        raise OSError(-number, os.strerror(-number))


def _abstract() -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\0" + ENV["ABSTRACT"])


def _write_key(key: str) -> None:
    """Write a key of the store with the certificate that this job got; its own has to go, or nothing is shown."""
    import base64
    import ssl
    import urllib.error
    import urllib.request

    tls = ssl.create_default_context(cafile=ENV["STORE_CA"])
    tls.load_cert_chain(ENV["STORE_CERT"], ENV["STORE_KEY"])

    def put(key: str) -> None:
        body = json.dumps({"key": base64.b64encode(key.encode()).decode()}).encode()
        request = urllib.request.Request(ENV["STORE_URL"] + "/v3/kv/put", body)
        urllib.request.urlopen(request, context=tls, timeout=TIMEOUT_S).close()

    try:
        put("/escape/own/key")
    except OSError as error:
        raise KeyError(f"its own key: {error}") from error
    try:
        put(key)
    except urllib.error.HTTPError as error:
        raise Held(str(error.code)) from error


def _transparent() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, 19, 1)


_ADDRESS = struct.pack("=BBBBi", 2, 32, 0, 0, 1) + struct.pack("=HH4s", 8, 2, socket.inet_aton("10.9.9.9"))
add("a raw socket", lambda: call(41, 2, 3, 1))
add("a raw socket of IPv6", lambda: call(41, 10, 3, 58))
add("a packet socket", lambda: call(41, 17, 3, 0x300))
add("the audit socket", lambda: call(41, 16, 3, 9))
add("a socket out of the virtual machine", lambda: call(41, 40, 1, 0))
add("a socket out of the virtual machine, disguised", lambda: call(41, 40 | 1 << 32, 1, 0))
add("another's address as the sender's", _transparent)
add("an address of its choice", lambda: _netlink(20, 0x400, _ADDRESS))
add("take an interface down", lambda: _interface(0))
add("an abstract socket of the host", _abstract)
add("connect to a port of the host", lambda: _connect(ENV["HOST_IP"], int(ENV["HOST_PORT"])))
add("connect to a port of the gateway", lambda: _connect(ENV["GATEWAY"], int(ENV["HOST_PORT"])))
add("connect to the cloud's metadata", lambda: _connect("169.254.169.254", 80))
add("connect to the store", lambda: _connect(ENV["GATEWAY"], int(ENV["STORE_PORT"])))
add("write a key of the store that another job has", lambda: _write_key("/escape/other/key"))
add("connect to another job's unpublished port", lambda: _connect(ENV["OTHER_IP"], 9000))


# running them


def _run(act: Callable[[], object]) -> str:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(TIMEOUT_S)
        try:
            act()
            said = "ESCAPED"
        except OSError as error:
            said = errno.errorcode.get(error.errno or 0, "") or str(error)
        except Held as error:
            said = f"held: {error}"
        except BaseException as error:  # noqa: BLE001 — its word is the result
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode()[:300])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    return text or f"ended with {os.waitstatus_to_exitcode(status)}"


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


OPEN_AT_START = [fd for fd in range(3, 256) if _is_open(fd)]

if __name__ == "__main__":
    names = sys.argv[1:] or list(ATTEMPTS)
    print(json.dumps({name: _run(ATTEMPTS[name]) for name in names}))
