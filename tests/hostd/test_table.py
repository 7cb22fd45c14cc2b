"""A table of system calls, walked by the machine code and by Python: both do the same."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from hostd.runtime import root, seed
from hostd.runtime.root import Places, Root
from hostd.runtime.table import BASE, DATA_AT, ENTRY_BYTES, RESULT, WORDS, Label, Table, failure, told
from netns import syscalls
from netns.errors import KernelError
from rootfs.mounts import Bind, KernelPaths, plan

RUN = mmap.PROT_READ | mmap.PROT_EXEC
CHANGE = mmap.PROT_READ | mmap.PROT_WRITE


def by_code(fd: int) -> None:
    code_fd = os.memfd_create("code")
    os.write(code_fd, seed.CODE[os.uname().machine])
    syscalls.map_at(seed.CODE_AT, 4096, RUN, mmap.MAP_SHARED, code_fd)
    syscalls.map_at(BASE, os.fstat(fd).st_size, CHANGE, mmap.MAP_SHARED, fd)
    syscalls.run_at(seed.CODE_AT, BASE + ENTRY_BYTES)


Walked = Callable[[Table], tuple[int, int]]


@pytest.fixture(params=[by_code, seed.walk], ids=["code", "python"])
def walked(request: pytest.FixtureRequest) -> Walked:
    """Walk a table in a process of its own and return (its exit status, the table's memfd)."""

    def run(table: Table) -> tuple[int, int]:
        fd = table.write()
        pid = os.fork()
        if pid == 0:
            try:
                request.param(fd)
            finally:
                os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), fd

    return run


def result(fd: int, index: int) -> int:
    return int(struct.unpack("q", os.pread(fd, 8, index * ENTRY_BYTES + RESULT * 8))[0])


def test_calls_are_made_one_after_another_and_their_results_kept(walked: Walked, tmp_path: Path) -> None:
    table = Table()
    path = str(tmp_path / "made")
    opened = table.call("openat", -100, path, os.O_CREAT | os.O_WRONLY, 0o600, store=table.next_argument(0))
    written = table.call("write", -1, b"hello", 5)
    table.call("exit_group", 5)
    status, fd = walked(table)
    assert status == 5
    assert (tmp_path / "made").read_text() == "hello"
    assert result(fd, opened) >= 3
    assert result(fd, written) == 5
    assert failure(fd, table.notes) is None
    os.close(fd)


def test_what_fails_ends_it_and_is_told(walked: Walked, tmp_path: Path) -> None:
    table = Table()
    table.step = "mount"
    table.call("mkdirat", -100, str(tmp_path), 0o755, target="/there", accept=-errno.EEXIST)
    table.call("mkdirat", -100, str(tmp_path / "no" / "no"), 0o755, target="/not there")
    table.call("mkdirat", -100, str(tmp_path / "never"), 0o755)
    status, fd = walked(table)
    assert status == 127
    failed = failure(fd, table.notes)
    assert failed is not None
    assert told(*failed) == {
        "step": "mount",
        "errno": errno.ENOENT,
        "syscall": "mkdirat",
        "target": "/not there",
        "message": "mkdirat(/not there): No such file or directory",
    }
    assert list(tmp_path.iterdir()) == []
    os.close(fd)


def test_ways_part_by_result(walked: Walked, tmp_path: Path) -> None:
    table = Table()
    calls: list[tuple[str, str | None, int]] = [("chdir", "/", 0), ("chdir", "/no", 0), ("chdir", "/no", -errno.ENOENT)]
    for place, (name, argument, accept) in enumerate([*calls, ("setsid", None, 0)]):
        ways, done = (Label(), Label(), Label()), Label()
        arguments = () if argument is None else (argument,)
        table.call(name, *arguments, accept=accept, error=ways[0], zero=ways[1], more=ways[2])
        for digit, label in enumerate(ways, 1):
            table.place(label)
            table.call("mkdirat", -100, str(tmp_path / f"{place}-{digit}"), 0o755)
            table.jump(done)
        table.place(done)
    table.call("exit_group", 0)
    status, fd = walked(table)
    assert status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-2", "1-1", "2-2", "3-3"]
    os.close(fd)


def test_a_label_may_lie_behind_and_a_word_be_set(walked: Walked, tmp_path: Path) -> None:
    table = Table()
    again, after = Label(), Label()
    table.jump(after)
    table.place(again)
    end = table.call("exit_group", 1)
    table.call("mkdirat", -100, str(tmp_path / "never"), 0o755)
    table.place(after)
    table.set_word(42, table.argument(end, 0))
    table.jump(again)
    status, fd = walked(table)
    assert status == 42
    assert list(tmp_path.iterdir()) == []
    os.close(fd)


def test_a_failure_without_a_call(walked: Walked) -> None:
    table = Table()
    table.fail(errno.EACCES, target="x", message="denied")
    status, fd = walked(table)
    failed = failure(fd, table.notes)
    assert (status, failed and told(*failed)["message"], failed and failed[1]) == (127, "denied", errno.EACCES)
    os.close(fd)


def test_large_results_are_no_errors(walked: Walked) -> None:
    table = Table()
    at = 0x10_8000_0000
    mapped = table.call("mmap", at, 4096, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000, -1, 0)
    table.call("exit_group", 0)
    status, fd = walked(table)
    assert (status, result(fd, mapped)) == (0, at)
    os.close(fd)


def test_equal_data_is_kept_once_unless_calls_may_change_it() -> None:
    table = Table()
    assert table.keep("/dev/null") == table.keep("/dev/null")
    assert table.own(b"x") != table.own(b"x")
    assert table.keep(b"") % 8 == 0


def described(table: Table) -> list[list[int | bytes]]:
    """Say what each entry does, whatever lies where in the data."""

    def word(value: int) -> int | bytes:
        at = value - BASE - DATA_AT
        if not 0 <= at < len(table._data):
            return value
        end = table._data.find(b"\0", at)
        return bytes(table._data[at : end if end > at else at + 24])  # a text, or a structure that begins with a zero

    words = [word(value) for value in table._words]
    return [words[at : at + WORDS] for at in range(0, len(words), WORDS)]


def test_what_jobs_have_in_common_is_as_if_worked_out_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def table_of(job: str) -> Table:
        job_dir, binds = Path("/jobs", job), [Bind(source=f"/vol/{job}", target="/data/x", is_read_only=True)]
        masked, read_only = ("/proc/keys", "/proc/kcore"), ("/proc/bus", "/proc/sys")
        files = KernelPaths(masked_files=masked, masked_dirs=("/proc/acpi",), read_only=read_only, has_mqueue=True)
        cgroups = {name: f"/sys/fs/cgroup/{name}/{job}" for name in ("cpu", "memory")}
        upper, work = job_dir / "upper", job_dir / "work"
        steps = plan(lower=[Path("/l")], upper=upper, work=work, kernel=files, binds=binds, cgroups=cgroups)
        table = Table()
        table.call("setsid")
        Root(table, f"/jobs/{job}/root", Places(20, 21, 22, 23, 24)).carry_out([*steps, ("file", "/etc/motd")])
        return table

    monkeypatch.setattr(root, "_SEEN_MAX", 0)
    apart = [table_of(job) for job in ("a", "bb")]
    monkeypatch.undo()
    monkeypatch.setattr(root, "_SEEN", set())
    monkeypatch.setattr(root, "_PASSAGES", {})
    together = [table_of(job) for job in ("other", "a", "bb", "a")][1:]
    assert root._PASSAGES
    for one, other in zip([*apart, apart[0]], together, strict=True):
        assert described(one) == described(other)
        assert one.notes == other.notes


def test_a_table_that_is_too_long_is_refused() -> None:
    table = Table()
    for _ in range(DATA_AT // ENTRY_BYTES):
        table.call("setsid")
    with pytest.raises(KernelError) as caught:
        table.write()
    assert caught.value.errno == errno.E2BIG


def test_the_two_machine_codes_agree_with_the_tables_words() -> None:
    assert (len(seed.CODE["x86_64"]), len(seed.CODE["aarch64"])) == (89, 100)
    assert ENTRY_BYTES == WORDS * 8 == 104
