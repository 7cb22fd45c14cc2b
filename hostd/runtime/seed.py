"""Make the children of the spawner, cheaply: from a process with next to nothing in it.

A copy of the spawner would have to copy Python's page tables, and take them down again, for every job. So the spawner
makes one process, the seed, that lets go of all memory but two small pieces: 89 bytes of machine code, which walk a
`table` of system calls, and a table. It waits for a command, copies itself with clone3 (as a sibling: the child's
parent is the spawner), and the child maps its own table and walks on in that. The seed shares the spawner's fds, which
is how the child comes to them; memory it shares with nobody: that a job's memory is exhausted while its child is in its
cgroup already can cost that child only, and whoever looked into one would find its own request and no other's.

Neither has a name for a program of the host: /proc/self/exe is an empty file that nothing can be written to. Otherwise
an image with `#!/proc/self/exe` could run, and overwrite, the host's Python (CVE-2019-5736 was such a case).

Where the machine code is not known (`CODE`), or a test wants it so, `Copies` makes copies of the spawner that walk the
same tables in Python. Both are called by `spawner` only, and raise `KernelError` if the kernel refuses.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import select
import signal
import struct
from typing import NamedTuple, Protocol

from hostd.runtime.table import (
    ACCEPT,
    BASE,
    DATA_AT,
    ENTRY_BYTES,
    ERROR,
    MORE,
    NO_CALL,
    RESULT,
    STORE,
    WORDS,
    ZERO,
    Label,
    Table,
)
from netns import syscalls
from netns.errors import KernelError

CODE_AT = 0x10_0000_0000
CONTROL_AT = 0x10_0100_0000
_CONTROL_BYTES = DATA_AT + 0x10000
_CODE_BYTES = 0x10000  # the largest page there is

# rdi and x0: the address of the first entry. The word numbers are those of `table`, times 8.
CODE = {
    "x86_64": bytes.fromhex(
        "4889fb"  # .         mov  %rdi, %rbx
        "488b03"  # next:     mov  (%rbx), %rax          the call's number
        "488b7b08"  # .       mov  8(%rbx), %rdi
        "4885c0"  # .         test %rax, %rax
        "7818"  # .           js   given
        "488b7310"  # .       mov  16(%rbx), %rsi
        "488b5318"  # .       mov  24(%rbx), %rdx
        "4c8b5320"  # .       mov  32(%rbx), %r10
        "4c8b4328"  # .       mov  40(%rbx), %r8
        "4c8b4b30"  # .       mov  48(%rbx), %r9
        "0f05"  # .           syscall
        "eb03"  # .           jmp  done
        "4889f8"  # given:    mov  %rdi, %rax
        "48894338"  # done:   mov  %rax, 56(%rbx)        RESULT
        "488b4b40"  # .       mov  64(%rbx), %rcx        STORE
        "4885c9"  # .         test %rcx, %rcx
        "7403"  # .           jz   kept
        "488901"  # .         mov  %rax, (%rcx)
        "483b4348"  # kept:   cmp  72(%rbx), %rax        ACCEPT
        "740d"  # .           je   zero
        "4885c0"  # .         test %rax, %rax
        "7408"  # .           jz   zero
        "780c"  # .           js   error
        "48035b60"  # .       add  96(%rbx), %rbx        MORE
        "ebb6"  # .           jmp  next
        "48035b58"  # zero:   add  88(%rbx), %rbx        ZERO
        "ebb0"  # .           jmp  next
        "488b5b50"  # error:  mov  80(%rbx), %rbx        ERROR
        "ebaa"  # .           jmp  next
    ),
    "aarch64": bytes.fromhex(
        "f30300aa"  # .       mov  x19, x0
        "680240f9"  # next:   ldr  x8, [x19]             the call's number
        "608640a9"  # .       ldp  x0, x1, [x19, #8]
        "8800f8b7"  # .       tbnz x8, #63, done
        "628e41a9"  # .       ldp  x2, x3, [x19, #24]
        "649642a9"  # .       ldp  x4, x5, [x19, #40]
        "010000d4"  # .       svc  #0
        "692240f9"  # done:   ldr  x9, [x19, #64]        STORE
        "601e00f9"  # .       str  x0, [x19, #56]        RESULT
        "490000b4"  # .       cbz  x9, kept
        "200100f9"  # .       str  x0, [x9]
        "692640f9"  # kept:   ldr  x9, [x19, #72]        ACCEPT
        "1f0009eb"  # .       cmp  x0, x9
        "c0000054"  # .       b.eq zero
        "1f0000f1"  # .       cmp  x0, #0
        "80000054"  # .       b.eq zero
        "ab000054"  # .       b.lt error
        "693240f9"  # .       ldr  x9, [x19, #96]        MORE
        "05000014"  # .       b    go
        "692e40f9"  # zero:   ldr  x9, [x19, #88]        ZERO
        "03000014"  # .       b    go
        "732a40f9"  # error:  ldr  x19, [x19, #80]       ERROR
        "ebffff17"  # .       b    next
        "7302098b"  # go:     add  x19, x19, x9
        "e9ffff17"  # .       b    next
    ),
}
_RESET_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_SIG_SETMASK = 2
_NO_RSEQ = "glibc.pthread.rseq=0"
_MAP_FIXED_NOREPLACE = 0x100000


class Maker(Protocol):
    """What makes children; `kind` says it to the operator."""

    kind: str

    def make(self, table_fd: int, flags: int, job: int = -1) -> tuple[int, int]:
        """Return (pid, pidfd) of a child of the caller that walks the table in this memfd.

        It is cloned with `flags` (CLONE_*), in the pid namespace of the process that `job` is a pidfd of.
        The caller's fds as they are now are the child's, too.

        Raises:
            KernelError: the kernel refused.
        """
        ...

    def close(self) -> None:
        """Leave nothing behind but the children."""
        ...


class _Report(NamedTuple):
    """What the seed's calls returned: below 0 an errno."""

    named: int
    entered: int
    pid: int
    pidfd: int


class Seed:
    """The seed process. If it dies (somebody's kill -9), the next child comes from a new one."""

    kind = "copies of a seed"

    def __init__(self) -> None:
        """Make it.

        Raises:
            KernelError: EOPNOTSUPP, there is no machine code for this machine, or glibc has told the kernel where it
                keeps its restartable sequences: the kernel writes there, and the seed has let go of that memory.
                EPERM, EINVAL: the kernel does not let a process choose what it is called and its executable, which
                wants CAP_CHECKPOINT_RESTORE. What else the kernel refused.
        """
        machine = os.uname().machine
        if machine not in CODE:
            raise KernelError(errno.EOPNOTSUPP, "seed", machine)
        if _NO_RSEQ not in os.environ.get("GLIBC_TUNABLES", ""):
            raise KernelError(errno.EOPNOTSUPP, "seed", "started without GLIBC_TUNABLES=" + _NO_RSEQ)
        self._code_fd = _sealed("hostd-walker", CODE[machine])
        self._executable_fd = _sealed(f"hostd-child:{_run_dir()[:200]}", b"")
        self._pidns_fd = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._start()

    def _start(self) -> None:
        """Make the process; it shows that it is there by a first report."""
        control_fd = self._lay_out()
        pid, self._pidfd = syscalls.clone3(syscalls.CLONE_FILES, signal.SIGCHLD)
        if pid == 0:
            try:
                read, change = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
                syscalls.map_at(CODE_AT, _CODE_BYTES, read | mmap.PROT_EXEC, mmap.MAP_SHARED, self._code_fd)
                syscalls.map_at(CONTROL_AT, _CONTROL_BYTES, change, mmap.MAP_PRIVATE, control_fd)
                syscalls.run_at(CODE_AT, CONTROL_AT + ENTRY_BYTES)
            finally:
                os._exit(127)
        self._poll = select.poll()
        self._poll.register(self._report_fd, select.POLLIN)
        self._poll.register(self._pidfd, select.POLLIN)
        report = self._wait()
        os.close(control_fd)  # not before: the fds are one and the same
        if report is None or report.named < 0:
            self._end()
            raise KernelError(-report.named if report else errno.ESRCH, "prctl", "PR_SET_MM_MAP")

    def _lay_out(self) -> int:
        """Write the seed's own table into a memfd, and make the pipes that it listens to and reports to.

        A command is read right into those words of the table that change with every child, and a report written
        from where the results are: memory of the seed's own, of which a child has a copy as it was.
        """
        command_fd, self._command_fd = os.pipe()
        self._report_fd, report_fd = os.pipe()
        self._its_fds = (command_fd, report_fd)
        table = Table(CONTROL_AT)
        call, loop, child, report = table.call, Label(), Label(), Label()
        end = CONTROL_AT + _CONTROL_BYTES
        call("munmap", 0, CODE_AT)
        call("munmap", end, syscalls.highest_address() - end)
        call("prctl", syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in _RESET_SIGNALS:
            call("rt_sigaction", number, bytes(32), 0, 8)
        call("rt_sigprocmask", _SIG_SETMASK, b"\xff" * 8, 0, 8)  # a child opens it again, the seed never
        call("prctl", syscalls.PR_SET_NAME, b"hostd-seed\0")
        command = b"hostd-seed\0"  # not to be seen: /proc shows no arguments that lie in a file's pages
        args = table.own(command)
        args_end = args + len(command)
        places = (CODE_AT, CODE_AT + 1, CONTROL_AT, CONTROL_AT + 1, end, end, CONTROL_AT, args, args_end)
        memory_map = struct.pack("=12QII", *places, args_end, args_end, 0, 0, self._executable_fd)
        named = call("prctl", syscalls.PR_SET_MM, syscalls.PR_SET_MM_MAP, memory_map, len(memory_map), error=report)
        table.jump(report)
        table.place(loop)
        read = call("readv", command_fd, table.own(bytes(6 * 16)), 6)
        enter = call("setns", -1, syscalls.CLONE_NEWPID, error=report)
        pidfd = table.own(bytes(8))
        clone_args = table.own(struct.pack("11Q", 0, pidfd, *[0] * 9))
        clone = call("clone3", clone_args, 88, zero=child, error=report)
        call("setns", self._pidns_fd, syscalls.CLONE_NEWPID)
        table.place(report)
        write = call("writev", report_fd, table.own(bytes(4 * 16)), 4)
        table.jump(loop)
        table.place(child)
        flags = mmap.MAP_SHARED | _MAP_FIXED_NOREPLACE
        map_own = call("mmap", BASE, 0, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        table.set_jump(map_own, MORE, BASE + ENTRY_BYTES)
        self._ways = ((clone - read) * ENTRY_BYTES, (write - clone) * ENTRY_BYTES)
        self._ways_through_job = ((enter - read) * ENTRY_BYTES, ENTRY_BYTES)
        word = table.word
        heard = [word(read, MORE), word(clone, MORE), word(enter, 1), clone_args, word(map_own, 2), word(map_own, 5)]
        table.change_vector(read, heard)
        table.change_vector(write, [word(named, RESULT), word(enter, RESULT), word(clone, RESULT), pidfd])
        fd = table.write()
        os.ftruncate(fd, _CONTROL_BYTES)
        return fd

    def make(self, table_fd: int, flags: int, job: int = -1) -> tuple[int, int]:
        """Do as `Maker.make`."""
        ways = self._ways_through_job if job >= 0 else self._ways
        all_flags = flags | syscalls.CLONE_PIDFD | syscalls.CLONE_PARENT
        command = struct.pack("6q", *ways, job, all_flags, os.fstat(table_fd).st_size, table_fd)
        for _ in range(2):
            os.write(self._command_fd, command)
            report = self._wait()
            if report is not None:
                break
            self._end()  # somebody killed it: the next one does it
            self._start()
        else:
            raise KernelError(errno.ESRCH, "clone3", "the seed died twice")
        if job >= 0 and report.entered < 0:
            raise KernelError(-report.entered, "setns", hex(syscalls.CLONE_NEWPID))
        if report.pid < 0:
            raise KernelError(-report.pid, "clone3", hex(flags))
        return report.pid, report.pidfd & 0x7FFFFFFF

    def _wait(self) -> _Report | None:
        """Wait for its report; None: it is dead."""
        if any(fd == self._report_fd for fd, _ in self._poll.poll()):
            return _Report(*struct.unpack("4q", os.read(self._report_fd, 32)))
        return None

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        for fd in (self._pidfd, self._command_fd, self._report_fd, *self._its_fds):
            os.close(fd)

    def close(self) -> None:
        """End it."""
        self._end()
        for fd in (self._code_fd, self._executable_fd, self._pidns_fd):
            os.close(fd)


class Copies:
    """Copies of the caller itself, which walk a table in Python: slower, and the same on every machine."""

    def __init__(self, reason: str) -> None:
        """`reason`: why there is no seed."""
        self.kind = f"copies of the spawner, no seed: {reason}"
        self._pidns_fd = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def make(self, table_fd: int, flags: int, job: int = -1) -> tuple[int, int]:
        """Do as `Maker.make`."""
        if job >= 0:
            syscalls.setns(job, syscalls.CLONE_NEWPID)  # only for the children that we make from here on
        try:
            pid, pidfd = syscalls.clone3(flags, signal.SIGCHLD)
            if pid == 0:
                try:
                    for number in _RESET_SIGNALS:
                        signal.signal(number, signal.SIG_DFL)
                    walk(table_fd)
                finally:
                    os._exit(127)
        finally:
            if job >= 0:
                syscalls.setns(self._pidns_fd, syscalls.CLONE_NEWPID)
        return pid, pidfd

    def close(self) -> None:
        """Close what it holds."""
        os.close(self._pidns_fd)


def walk(table_fd: int) -> None:
    """Make the calls of a table, as `CODE` does; returns never, unless the table tells it to go nowhere."""
    length = os.fstat(table_fd).st_size
    syscalls.map_at(BASE, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, table_fd)
    words = memoryview(mmap.mmap(table_fd, length)).cast("q")
    at = WORDS
    while True:
        number, first = words[at], words[at + 1]
        result = first if number == NO_CALL else syscalls.call(number, *words[at + 1 : at + RESULT])
        words[at + RESULT] = result
        if words[at + STORE]:
            words[(words[at + STORE] - BASE) // 8] = result
        if result in (0, words[at + ACCEPT]):
            at += words[at + ZERO] // 8
        elif result > 0:
            at += words[at + MORE] // 8
        else:
            at = (words[at + ERROR] - BASE) // 8


def _run_dir() -> str:
    """Return the node's directory, the spawner's last argument: the name of what a child executes until it has become
    its program bears it, and by that `adoption` knows what a spawner left behind.
    """
    fd = os.open("/proc/self/cmdline", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.fsdecode(os.read(fd, 1 << 16).split(b"\0")[-2])
    finally:
        os.close(fd)


def _sealed(name: str, content: bytes) -> int:
    """Return a memfd that nobody can ever write to."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    os.ftruncate(fd, len(content))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return fd
