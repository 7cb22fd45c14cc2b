"""The probe that `test_default_job` runs inside a job: tries one kind of mischief, prints a JSON object at the end.

Standard library only. `OK` is what worked; else the errno's name, or `timeout`.
"""

from __future__ import annotations

import ctypes  # noqa: TID251 — runs alone, inside a job
import errno
import json
import os
import socket
import sys
from collections.abc import Callable

LIBC = ctypes.CDLL(None, use_errno=True)
FLAGS = {
    **{"user": 0x10000000, "mount": 0x20000, "net": 0x40000000, "pid": 0x20000000},
    **{"uts": 0x4000000, "ipc": 0x8000000, "cgroup": 0x2000000, "time": 0x80},
}
HIDDEN = ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/kmsg", "/proc/sched_debug", "/proc/interrupts")
HIDDEN_FOLDERS = ("/proc/acpi", "/proc/scsi", "/sys/firmware", "/sys/kernel/debug", "/sys/fs/bpf")


def call(number: int, *arguments: object) -> str:
    """Make a system call in a child of its own, so that what it changes ends with it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        result = LIBC.syscall(number, *arguments)
        os.write(write, b"OK" if result >= 0 else errno.errorcode[ctypes.get_errno()].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text.partition("OK")[1] or text


def calls() -> dict[str, str]:
    found = {f"unshare {name}": call(272, flag) for name, flag in FLAGS.items()}
    found |= {f"clone {name}": call(56, flag | 17, 0, 0, 0, 0) for name, flag in FLAGS.items() if name != "time"}
    block, memory = os.makedev(8, 0), os.makedev(1, 1)
    buffer = ctypes.create_string_buffer(64)
    tries: dict[str, tuple[object, ...]] = {
        "mount tmpfs": (165, b"t", b"/mnt", b"tmpfs", 0, 0),
        "mount bind": (165, b"/", b"/mnt", b"", 4096, 0),
        "mount proc again": (165, b"proc", b"/mnt", b"proc", 0, 0),
        "umount": (166, b"/proc/keys", 2),
        "pivot_root": (155, b"/", b"/"),
        "fsopen": (430, b"tmpfs", 0),
        "open_tree": (428, -100, b"/", 1),
        "mknod disk": (133, b"/tmp/disk", 0o60600, block),
        "mknod memory": (133, b"/tmp/memory", 0o20600, memory),
        "setns": (308, os.open("/proc/self/ns/net", os.O_RDONLY), 0),
        "keyctl": (250, 0, -3, 1),
        "add_key": (248, b"user", b"x", b"y", 1, -3),
        "request_key": (249, b"user", b"x", 0, 0),
        "bpf": (321, 0, buffer, 64),
        "perf_event_open": (298, buffer, 0, -1, -1, 0),
        "userfaultfd": (323, 0),
        "io_uring_setup": (425, 8, buffer),
        "open_by_handle_at": (304, -100, buffer, 0),
        "syslog": (103, 3, buffer, 64),
        "reboot": (169, 0, 0, 0, 0),
        "init_module": (175, buffer, 64, b""),
        "kexec_load": (246, 0, 0, 0, 0),
        "sethostname": (170, b"x", 1),
        "settimeofday": (164, 0, 0),
        "iopl": (172, 3),
        "swapon": (167, b"/tmp", 0),
        "ptrace of itself": (101, 0, 0, 0, 0),
        "chroot": (161, b"/"),
    }
    return found | {name: call(*arguments) for name, arguments in tries.items()}  # type: ignore[arg-type]


def attempt(act: Callable[[], object]) -> str:
    try:
        act()
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "OK"


def sockets() -> dict[str, str]:
    kinds = {
        "tcp": (2, 1, 0),
        "udp": (2, 2, 0),
        "unix": (1, 1, 0),
        "netlink route": (16, 3, 0),
        "raw": (2, 3, 1),
        "raw 6": (10, 3, 58),
        "packet": (17, 3, 0x300),
        "netlink audit": (16, 3, 9),
        "vsock": (40, 1, 0),
        "vsock in disguise": (40 | 1 << 32, 1, 0),
        "xdp": (44, 3, 0),
    }
    return {name: call(41, ctypes.c_long(kind[0]), *kind[1:]) for name, kind in kinds.items()}


def files() -> dict[str, list[str]]:
    settings = [os.path.join(at, name) for at, _, names in os.walk("/proc/sys") for name in names]
    settings += [os.path.join(at, name) for at, _, names in os.walk("/sys") for name in names]
    settings += ["/proc/sysrq-trigger", "/proc/irq/default_smp_affinity"]
    writable = [path for path in settings if attempt(lambda path=path: os.close(os.open(path, os.O_WRONLY))) == "OK"]  # type: ignore[misc]
    readable = [path for path in HIDDEN if _content(path)]
    readable += [path for path in HIDDEN_FOLDERS if os.path.isdir(path) and os.listdir(path)]
    readable += [f"/dev/{name}" for name in os.listdir("/dev") if name.startswith(("sd", "vd", "mem", "kmsg", "loop"))]
    changed = [path for path in HIDDEN if attempt(lambda path=path: os.chmod(path, 0o600)) == "OK"]  # type: ignore[misc]
    return {"writable": writable, "readable": readable, "changed": changed}


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(16)
    except OSError:
        return b""


def connect(*addresses: str) -> dict[str, str]:
    def act(host: str, port: str) -> None:
        socket.create_connection((host, int(port)), timeout=1.0).close()

    pairs = [address.rpartition(":") for address in addresses]
    return {f"{host}:{port}": attempt(lambda host=host, port=port: act(host, port)) for host, _, port in pairs}  # type: ignore[misc]


def connect6(*addresses: str) -> dict[str, str]:
    """Try the link-local addresses that belong to our hardware addresses (`netns.links.mac_of`)."""

    def act(address: str, port: int) -> None:
        a, b, c, d = (int(part) for part in address.split("."))
        local = f"fe80::64:{a:02x}ff:fe{b:02x}:{c:02x}{d:02x}"
        with socket.socket(socket.AF_INET6) as client:
            client.settimeout(1.5)
            client.connect((local, port, 0, socket.if_nametoindex("eth0")))

    ports = (53, 80, 8080, 9000)
    return {f"{a} {p}": attempt(lambda a=a, p=p: act(a, p)) for a in addresses for p in ports}  # type: ignore[misc]


def spoof(address: str, to: str) -> dict[str, str]:
    def freely() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND
            sender.bind((address, 9999))
            sender.sendto(b"x", (to, 53))

    def transparently() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IP, 19, 1)  # IP_TRANSPARENT

    def by_netlink() -> None:
        import struct

        index = socket.if_nametoindex("eth0")
        body = struct.pack("=BBBBi", 2, 24, 0, 0, index) + struct.pack("=HH4s", 8, 2, socket.inet_aton(address))
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
            link.send(struct.pack("=IHHII", 16 + len(body), 20, 0x405, 1, 0) + body)
            number = struct.unpack_from("=i", link.recv(4096), 16)[0]
            if number:
                raise OSError(-number, "netlink")

    return {"freebind": attempt(freely), "transparent": attempt(transparently), "own address": attempt(by_netlink)}


def deep(levels: str) -> dict[str, str]:
    """Leave directories inside each other, more than a stack or a path can hold."""
    os.chdir("/root")
    for _ in range(int(levels)):
        os.mkdir("d")
        os.chdir("d")
    return {}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
