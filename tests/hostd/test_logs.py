"""What a job prints is read back whole, in order, across chunks, rotations, restarts and power cuts."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.loglines import LINE_BYTES_MAX
from hostd.logreader import Reader, raw_chunks
from hostd.logs import Logs
from hostd.types import LogLine
from tests.hostd.disk import fill, on_small_disk
from tests.pace import SLOWNESS


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    made = Logs(tmp_path / "logs", segment_bytes=4096)
    yield made
    made.close()


def texts(source: Logs | Reader, *, since: int = 0, lines: int | None = None, stream: int | None = None) -> list[str]:
    if isinstance(source, Reader):
        reader = source
    else:
        reader = source.reader("j", {}, since=since, lines=lines, stream=stream)
    try:
        return [line.text for line in reader.iterate()]
    finally:
        reader.close()


def test_a_line_that_arrives_in_pieces_is_one_line(logs: Logs) -> None:
    log = logs.open("j")
    log.append(1, b"one\ntw")
    log.append(2, b"error\n")
    log.append(1, b"o\nthree\n")
    assert texts(logs) == ["one", "error", "two", "three"]


def test_each_line_has_its_stream_time_labels_and_the_position_after_it(logs: Logs) -> None:
    log = logs.open("j")
    log.append(1, b"out\n", at=5.0)
    log.append(2, b"err\n", at=6.0)
    log.say("a word")
    found = list(logs.reader("j", {"app": "x"}).iterate())
    assert [(line.stream, line.text, line.sequence) for line in found] == [
        (1, "out", 4),
        (2, "err", 8),
        (0, "hostd: a word", 22),
    ]
    assert [line.at for line in found[:2]] == [5.0, 6.0]
    assert found[0].labels == {"app": "x"}


def test_a_last_line_without_newline_appears_when_the_stream_ends(logs: Logs) -> None:
    log = logs.open("j")
    log.append(1, b"prompt> ")
    assert texts(logs) == []
    log.end_stream(1)
    assert texts(logs) == ["prompt> "]
    assert list(raw_chunks(logs.folder("j"), log.position)) == [(1, b"prompt> ")]


def test_raw_chunks_give_back_every_byte(logs: Logs) -> None:
    printed = [b"a\r\nb", b"\xff\x00c\n\n", b"tail"]
    for chunk in printed:
        logs.open("j").append(1, chunk)
    assert b"".join(data for _, data in raw_chunks(logs.folder("j"), 10**9)) == b"".join(printed)


def test_raw_chunks_stop_where_told_and_keep_streams_apart(logs: Logs) -> None:
    log = logs.open("j")
    log.append(1, b"a\nb\n")
    log.append(2, b"c\n")
    until = log.position
    log.append(1, b"later\n")
    assert list(raw_chunks(logs.folder("j"), until)) == [(1, b"a\nb\n"), (2, b"c\n")]


@pytest.mark.parametrize(("lines", "expected"), [(0, []), (1, ["5"]), (3, ["3", "4", "5"]), (99, list("12345"))])
def test_lines_returns_the_newest(logs: Logs, lines: int, expected: list[str]) -> None:
    logs.open("j").append(1, b"1\n2\n3\n4\n")
    logs.open("j").append(2, b"5\n")
    assert texts(logs, lines=lines) == expected


def test_lines_counts_only_the_wanted_stream(logs: Logs) -> None:
    log = logs.open("j")
    for number in range(5):
        log.append(1, b"out %d\n" % number)
        log.append(2, b"err %d\n" % number)
    found = logs.reader("j", {}, lines=2, stream=1).iterate()
    assert [line.text for line in found if line.stream == 1] == ["out 3", "out 4"]


def test_since_continues_after_a_sequence_number(logs: Logs) -> None:
    logs.open("j").append(1, b"".join(b"line %d\n" % number for number in range(1, 101)))
    sequences = [line.sequence for line in logs.reader("j", {}).iterate()]
    assert texts(logs, since=sequences[97]) == ["line 99", "line 100"]
    assert texts(logs, since=sequences[99]) == []
    assert texts(logs, since=10**9) == []


def test_since_finds_the_begin_of_a_line_that_others_interrupted(logs: Logs) -> None:
    log = logs.open("j")
    for stream, chunk in ((1, b"first\nfo"), (2, b"err\nmore"), (1, b"ob"), (2, b"\n"), (1, b"ar\n")):
        log.append(stream, chunk)
    found = list(logs.reader("j", {}).iterate())
    assert [line.text for line in found] == ["first", "err", "more", "foobar"]
    for number, line in enumerate(found):
        assert texts(logs, since=line.sequence) == [each.text for each in found[number + 1 :]]


def test_reading_can_begin_at_a_time(tmp_path: Path) -> None:
    logs = Logs(tmp_path / "timed", segment_bytes=40_000)
    log = logs.open("j")
    for second in range(2000):
        log.append(1, b"at %d\n" % second, at=1000.0 + second)
    assert texts(logs_from(logs, 2500.0))[:2] == ["at 1500", "at 1501"]
    assert texts(logs_from(logs, 999.0))[-1] == "at 1999"
    assert texts(logs_from(logs, 9999.0)) == []
    logs.close()


def logs_from(logs: Logs, at: float) -> Reader:
    return logs.reader("j", {}, at=at)


def test_rotation_keeps_two_segments_and_says_what_is_gone(logs: Logs) -> None:
    log = logs.open("j")
    for number in range(1000):
        log.append(1, b"line %d\n" % number)
    assert len(list(logs.folder("j").glob("*.data"))) == 2
    assert sum(path.stat().st_size for path in logs.folder("j").iterdir()) <= 2 * 4096 + 100
    found = list(logs.reader("j", {}).iterate())
    assert found[0].stream == 0
    assert found[0].text.startswith(f"hostd: {log.bytes_dropped} bytes dropped by rotation")
    numbers = [int(line.text.split()[1]) for line in found if line.stream == 1]
    assert numbers == list(range(numbers[0], 1000))
    assert found[-1].text == "line 999"
    tail = [line for line in logs.reader("j", {}, lines=150, stream=1).iterate() if line.stream == 1]
    assert [line.text for line in tail] == [f"line {number}" for number in range(850, 1000)]


def test_a_flood_is_said_once(logs: Logs) -> None:
    log = logs.open("j")
    words = set()
    for _ in range(100):
        log.append(1, b"x" * 999 + b"\n")
        words |= {text for text in texts(logs) if "floods its log" in text}
    assert len(words) == 1


def test_a_line_across_two_segments_is_whole(logs: Logs) -> None:
    log = logs.open("j")
    log.append(1, b"x" * 5000)
    log.append(1, b"y\nnext\n")
    assert len(list(logs.folder("j").glob("*.data"))) == 2
    assert texts(logs) == ["x" * 5000 + "y", "next"]


def test_a_line_whose_begin_was_dropped_is_left_out(logs: Logs) -> None:
    log = logs.open("j")
    log.append(1, b"x" * 20_000 + b" the end\nwhole\n")
    assert [text for text in texts(logs) if not text.startswith("hostd:")] == ["whole"]


def test_lines_up_to_a_mebibyte_are_whole_and_longer_ones_come_in_pieces(tmp_path: Path) -> None:
    logs = Logs(tmp_path / "big")
    sizes = [LINE_BYTES_MAX, 1, LINE_BYTES_MAX + 1, 5, 3 * LINE_BYTES_MAX, 0]
    for size in sizes:
        logs.open("j").append(1, b"x" * size)
        logs.open("j").append(2, b"between\n")
        logs.open("j").append(1, b"\n")
    found = [line for line in logs.reader("j", {}).iterate() if line.stream == 1]
    full = LINE_BYTES_MAX
    assert [len(line.text) for line in found] == [full, 1, full, 1, 5, full, full, full, 0]
    every = list(logs.reader("j", {}).iterate())
    assert len({line.sequence for line in every}) == len(every)
    for number, line in enumerate(every):
        assert texts(logs, since=line.sequence) == [each.text for each in every[number + 1 :]]
    logs.close()


def test_a_later_hostd_goes_on_where_the_killed_one_stopped(logs: Logs) -> None:
    logs.open("j").append(1, b"one\nunfin")
    later = Logs(logs.root, segment_bytes=4096)
    later.open("j").append(1, b"ished\n")
    later.open("j").append(1, b"rest")
    later.open("j").end()
    assert [(line.sequence, line.text) for line in later.reader("j", {}).iterate()] == [
        (4, "one"),
        (15, "unfinished"),
        (20, "rest"),
    ]


def test_segments_of_an_older_hostd_are_dropped_and_the_log_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "j"
    folder.mkdir(parents=True)
    (folder / f"{1:020d}.log").write_text("1700000000.123456 1F an old line\n")
    logs = Logs(tmp_path / "logs")
    assert texts(logs) == ["hostd: 33 bytes of log from before hostd was upgraded are gone: their format is not read"]
    assert sorted(path.suffix for path in folder.iterdir()) == [".data", ".index"]


def test_a_reader_that_the_rotation_overtakes_is_told_and_holds_no_disk(logs: Logs) -> None:
    log = logs.open("j")
    log.append(1, b"first\n")
    reader = logs.reader("j", {})
    assert [line.text for line in reader.read()] == ["first"]
    for number in range(2000):
        log.append(1, b"line %d\n" % number)
    held = sum(os.stat(f"/proc/self/fd/{fd}").st_size for fd in held_files(logs.folder("j")))
    assert held <= 2 * 4096 + 4096
    found = list(reader.iterate())
    assert "bytes dropped by rotation" in found[0].text
    numbers = [int(line.text.split()[1]) for line in found if line.stream == 1]
    assert numbers == list(range(numbers[0], 2000))
    reader.close()


def held_files(folder: Path) -> list[str]:
    """Return our descriptors of a log's data, of files that are gone, too."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if target.startswith(str(folder)) and ".data" in target:
                found.append(fd)
    return found


def test_the_log_of_an_unknown_job_is_empty(logs: Logs) -> None:
    assert texts(logs) == []
    assert texts(logs, lines=5) == []


async def test_following_sees_old_and_new_lines_and_ends_with_the_log(logs: Logs) -> None:
    log = logs.open("j")
    log.append(1, b"old\n")
    seen: list[LogLine] = []

    async def follow() -> None:
        async for lines in logs.follow("j", logs.reader("j", {}).read):
            seen.extend(lines)

    async with asyncio.timeout(5 * SLOWNESS), asyncio.TaskGroup() as group:
        group.create_task(follow())
        await asyncio.sleep(0)
        for number in range(500):
            log.append(1, b"new %d\n" % number)
            if number % 50 == 0:
                await asyncio.sleep(0)
        logs.end("j")
    assert [line.text for line in seen] == ["old", *(f"new {number}" for number in range(500))]


async def test_following_a_job_that_has_ended_returns_what_there_is(logs: Logs) -> None:
    logs.open("j").append(1, b"all\n")
    logs.end("j")
    async with asyncio.timeout(5 * SLOWNESS):
        found = [lines async for lines in logs.follow("j", logs.reader("j", {}).read)]
    assert [line.text for lines in found for line in lines] == ["all"]


@pytest.mark.needs_root
def test_a_full_disk_costs_output_but_no_exception_and_the_log_says_so(tmp_path: Path) -> None:
    with on_small_disk(tmp_path) as folder:
        logs = Logs(folder / "logs", segment_bytes=10_000)
        logs.open("j").append(1, b"before\n")
        ballast = fill(folder)
        logs.say("new", "a log that has no room for its folder")
        for _ in range(200):
            logs.open("j").append(1, b"x" * 99 + b"\n")
        unborn = logs.open("later")
        unborn.append(1, b"lost\n")
        ballast.unlink()
        logs.open("j").append(1, b"after\n")
        unborn.append(1, b"kept\n")
        assert texts(logs)[0] == "before"
        assert texts(logs)[-1] == "after"
        assert [text for text in texts(logs) if "bytes of output were lost here: No space left" in text]
        assert all(text in ("before", "after", "x" * 99) or text.startswith("hostd: ") for text in texts(logs)[:-3])
        kept = [line.text for line in logs.reader("later", {}).iterate()]
        assert kept == ["hostd: 5 bytes of output were lost here: No space left on device", "kept"]
        logs.close()
