"""What is spliced into a log survives kills and power cuts at any byte, and chunks never change the lines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostd import segments
from hostd.joblog import JobLog
from hostd.logreader import Reader, raw_chunks, start_of_tail
from hostd.segments import RECORD_BYTES, path_of
from hostd.types import LogLine
from tests.hostd.disk import fill, on_small_disk


def lines_of(folder: Path, since: int = 0) -> list[LogLine]:
    reader = Reader(folder, "j", {}, since=since)
    try:
        return list(reader.iterate())
    finally:
        reader.close()


def told(folder: Path, since: int = 0) -> list[tuple[int, str]]:
    """Return the lines, without what is said of a rotation."""
    return [(line.stream, line.text) for line in lines_of(folder, since) if "dropped by rotation" not in line.text]


def splice(log: JobLog, stream: int, data: bytes) -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.write(write, data)
    assert log.take(stream, read, is_wanted=True) == (len(data), data)
    with pytest.raises(BlockingIOError):
        log.take(stream, read)
    os.close(write)
    assert log.take(stream, read) == (0, b"")
    os.close(read)


def test_what_a_pipe_holds_goes_to_the_log_and_no_further_than_asked(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "j")
    splice(log, 1, b"one\ntw")
    splice(log, 2, b"error\n")
    splice(log, 1, b"o\n")
    assert told(log.folder) == [(1, "one"), (2, "error"), (1, "two")]
    assert path_of(log.folder, 0, "data").read_bytes() == b"one\ntwerror\no\n"
    log.end()


def test_a_descriptor_that_cannot_be_spliced_from_is_read(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "j")
    main, other = os.openpty()
    os.write(other, b"typed\n")
    assert log.take(1, main) == (7, b"typed\r\n")
    splice_after = os.pipe()
    os.write(splice_after[1], b"more\n")
    assert log.take(1, splice_after[0])[0] == 5
    assert told(log.folder) == [(1, "typed"), (1, "more")]
    for fd in (main, other, *splice_after):
        os.close(fd)
    log.end()


@pytest.mark.needs_root
def test_on_a_full_disk_a_pipe_is_emptied_all_the_same(tmp_path: Path) -> None:
    with on_small_disk(tmp_path) as folder:
        log = JobLog(folder / "j")
        splice(log, 1, b"before\n")
        ballast = fill(folder)
        read, write = os.pipe()
        os.set_blocking(read, False)
        for _ in range(100):
            os.write(write, b"x" * 4095 + b"\n")
            while True:
                try:
                    assert log.take(1, read)[0] > 0
                except BlockingIOError:
                    break
        ballast.unlink()
        os.write(write, b"after\n")
        log.take(1, read)
        found = [text for _, text in told(log.folder)]
        assert found[0] == "before"
        assert found[-1] == "after"
        assert sum("bytes of output were lost here: No space left" in text for text in found) == 1
        for fd in (read, write):
            os.close(fd)
        log.end()


def test_an_idle_log_has_no_files(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "j")
    log.end_stream(1)
    log.end()
    assert not (tmp_path / "j").exists()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("print"), st.sampled_from([1, 2]), st.text("ab\n", max_size=12)),
        st.tuples(st.just("splice"), st.sampled_from([1, 2]), st.text("cd\n", min_size=1, max_size=40)),
        st.tuples(st.just("say"), st.just(0), st.just("word")),
        st.tuples(st.just("end"), st.sampled_from([1, 2]), st.just("")),
        st.tuples(st.just("kill"), st.just(0), st.just("")),
        st.tuples(st.just("close"), st.just(0), st.just("")),
    ),
    max_size=40,
)


class Model:
    """What a log should be, told line by line."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        self.raw = {1: "", 2: ""}
        self._open = {1: "", 2: ""}

    def step(self, act: str, stream: int, text: str) -> None:
        if act == "say":
            self.lines.append((0, f"hostd: {text}"))
        elif act == "end" and self._open[stream]:
            self.lines.append((stream, self._open[stream]))
            self._open[stream] = ""
        elif act in ("print", "splice"):
            self.raw[stream] += text
            *whole, self._open[stream] = (self._open[stream] + text).split("\n")
            self.lines += [(stream, line) for line in whole]


def carry_out(log: JobLog, act: str, stream: int, text: str) -> JobLog:
    if act == "print":
        log.append(stream, text.encode())
    elif act == "splice":
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.write(write, text.encode())
        os.close(write)
        while log.take(stream, read)[0]:
            pass
        os.close(read)
    elif act == "say":
        log.say(text)
    elif act == "end":
        log.end_stream(stream)
    elif act == "close":
        log.close()
    if act in ("kill", "close"):
        return JobLog(log.folder, segment_bytes=log.segment_bytes)
    return log


@contextlib.contextmanager
def no_fd_left() -> Iterator[None]:
    """Close what killed logs leave open: libnftables, in the same process, aborts once it gets an fd above 1023."""
    before = set(os.listdir("/proc/self/fd"))
    try:
        yield
    finally:
        for fd in set(os.listdir("/proc/self/fd")) - before:
            with contextlib.suppress(OSError):
                os.close(int(fd))


@given(STEPS, st.sampled_from([100, 300, 1_000_000]))
@settings(max_examples=150, deadline=None)
def test_chunks_kills_and_rotation_never_change_the_lines(steps: list[tuple[str, int, str]], size: int) -> None:
    with TemporaryDirectory() as name, no_fd_left():
        folder, model = Path(name) / "j", Model()
        log, follower = JobLog(folder, segment_bytes=size), Reader(folder, "j", {})
        followed: list[LogLine] = []
        for step in steps:
            model.step(*step)
            log = carry_out(log, *step)
            followed += follower.iterate()
        found = [line for line in lines_of(folder) if "dropped by rotation" not in line.text]
        seen = [(line.stream, line.text) for line in found]
        for stream in (0, 1, 2):  # after a rotation: the newest, whole
            mine = [line for line in seen if line[0] == stream]
            every = [line for line in model.lines if line[0] == stream]
            assert mine == every[len(every) - len(mine) :]
        if size == 1_000_000:
            assert seen == model.lines
            assert followed == found
            for stream in (1, 2):
                raw = b"".join(data for of, data in raw_chunks(folder, 10**9) if of == stream)
                assert raw.decode() == model.raw[stream]
        assert len({line.sequence for line in found}) == len(found)
        for number, line in enumerate(found):
            assert told(folder, line.sequence) == seen[number + 1 :]
        for count in range(len(seen) if size == 1_000_000 else 0):
            assert len(told(folder, start_of_tail(folder, count))) == count
        log.close()


def written(folder: Path) -> list[bytes]:
    log = JobLog(folder)
    chunks = [b"one\n", b"two\nthr", b"oops\n", b"ee\n", b"last\n"]
    for number, chunk in enumerate(chunks):
        log.append(2 if chunk == b"oops\n" else 1, chunk, at=1000.0 + number)
    log.close()
    os.truncate(path_of(folder, 0, "index"), len(chunks) * RECORD_BYTES)  # without its orderly end
    return chunks


def reopened(folder: Path) -> list[tuple[int, str]]:
    """Go on with a log, check that what it has is a beginning of what it had, and return that."""
    log = JobLog(folder)
    log.append(1, b"\nafter\n")
    log.close()
    *found, (stream, text) = told(folder)
    assert (stream, text) == (1, "after")
    return found


@pytest.mark.parametrize("cut", range(3 * RECORD_BYTES + 1))
def test_an_index_that_is_cut_anywhere_keeps_every_byte(tmp_path: Path, cut: int) -> None:
    chunks = written(tmp_path / "j")
    index = path_of(tmp_path / "j", 0, "index")
    os.truncate(index, index.stat().st_size - cut)
    reopened(tmp_path / "j")
    assert path_of(tmp_path / "j", 0, "data").read_bytes().startswith(b"".join(chunks))


@pytest.mark.parametrize("cut", range(len(b"oops\nee\nlast\n") + 1))
def test_data_that_is_cut_anywhere_keeps_what_is_there_and_its_origin(tmp_path: Path, cut: int) -> None:
    chunks = written(tmp_path / "j")
    data = path_of(tmp_path / "j", 0, "data")
    size = data.stat().st_size - cut
    os.truncate(data, size)
    found = reopened(tmp_path / "j")
    printed = {1: "", 2: ""}
    for begin, chunk in zip(accumulate(map(len, chunks), initial=0), chunks, strict=False):
        printed[2 if chunk == b"oops\n" else 1] += chunk[: max(size - begin, 0)].decode()
    assert [text for stream, text in found if stream == 1 and text] == printed[1].split()
    assert [text for stream, text in found if stream == 2] == printed[2].split("\n")[:-1]


@pytest.mark.parametrize("torn", range(RECORD_BYTES))
def test_a_record_that_is_garbage_is_passed_over(tmp_path: Path, torn: int) -> None:
    written(tmp_path / "j")
    index = path_of(tmp_path / "j", 0, "index")
    for number in (2, 3, 4):
        content = bytearray(index.read_bytes())
        content[number * RECORD_BYTES + torn] ^= 0xFF
        index.write_bytes(content)
    assert "".join(text for _, text in reopened(tmp_path / "j")) == "onetwothroopseelast"


def test_zeros_that_a_power_cut_left_are_cut_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "j")
    data = path_of(tmp_path / "j", 0, "data")
    os.truncate(data, data.stat().st_size + 5000)
    with path_of(tmp_path / "j", 0, "index").open("ab") as file:
        file.write(bytes(100))
    before = segments.this_boot()
    monkeypatch.setattr("hostd.joblog.this_boot", lambda: before ^ 1)
    log = JobLog(tmp_path / "j")
    log.append(1, b"after\n")
    assert [text for _, text in told(log.folder)] == [
        "one", "two", "oops", "three", "last",
        "hostd: the machine was restarted before this log was closed: what was printed last may be missing",
        "after",
    ]  # fmt: skip
    log.close()
    assert told(JobLog(tmp_path / "j").folder)[-1] == (1, "after")


def test_a_kill_within_a_rotation_loses_nothing(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "j", segment_bytes=1000)
    log.append(1, b"x" * 900 + b"\nunfin")
    first = log.position
    for kind in ("index", "data"):  # as far as a killed one came
        path_of(log.folder, first, kind).touch()
        later = JobLog(log.folder, segment_bytes=1000)
    later.append(1, b"ished\n" + b"y" * 500 + b"\n")
    assert [text for _, text in told(log.folder)] == ["x" * 900, "unfinished", "y" * 500]
    later.end()
