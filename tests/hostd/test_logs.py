"""What a job prints is read back whole, in order, across chunks, rotations, restarts and power cuts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.logs import Logs, raw_chunks
from hostd.types import LogLine
from tests.hostd.disk import fill, on_small_disk


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    made = Logs(tmp_path / "logs", segment_bytes=4096)
    yield made
    made.close()


def texts(logs: Logs, *, since: int = 0, lines: int | None = None, stream: int | None = None) -> list[str]:
    reader = logs.reader("j", {}, since=since, lines=lines, stream=stream)
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


def test_each_line_has_its_stream_labels_and_a_growing_sequence(logs: Logs) -> None:
    log = logs.open("j")
    log.append(1, b"out\n", at=5.0)
    log.append(2, b"err\n", at=6.0)
    log.say("a word")
    found = list(logs.reader("j", {"app": "x"}).iterate())
    assert [(line.stream, line.text, line.sequence) for line in found] == [
        (1, "out", 1),
        (2, "err", 2),
        (0, "hostd: a word", 3),
    ]
    assert found[0].at == 5.0
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
    assert texts(logs, lines=2, stream=1) == ["out 3", "err 3", "out 4", "err 4"]


def test_since_continues_after_a_sequence_number(logs: Logs) -> None:
    logs.open("j").append(1, b"".join(b"line %d\n" % number for number in range(1, 101)))
    assert texts(logs, since=98) == ["line 99", "line 100"]
    assert texts(logs, since=100) == []


def test_rotation_keeps_two_segments_and_says_what_is_gone(logs: Logs) -> None:
    log = logs.open("j")
    for number in range(1000):
        log.append(1, b"line %d\n" % number)
    assert len(list(logs.folder("j").iterdir())) == 2
    found = list(logs.reader("j", {}).iterate())
    assert found[0].stream == 0
    assert "earlier lines are gone" in found[0].text
    assert found[0].sequence == found[1].sequence - 1
    assert found[-1].text == "line 999"
    assert texts(logs, lines=150)[0] == "line 850"


def test_a_line_across_two_segments_is_whole(logs: Logs) -> None:
    log = logs.open("j")
    log.append(1, b"x" * 5000)
    log.append(1, b"y\nnext\n")
    assert len(list(logs.folder("j").iterdir())) == 2
    assert texts(logs) == ["x" * 5000 + "y", "next"]


def test_a_later_hostd_goes_on_where_the_killed_one_stopped(logs: Logs) -> None:
    logs.open("j").append(1, b"one\nunfin")
    later = Logs(logs.root, segment_bytes=4096)
    later.open("j").append(1, b"ished\n")
    later.open("j").append(1, b"rest")
    later.open("j").end()
    assert [(line.sequence, line.text) for line in later.reader("j", {}).iterate()] == [
        (1, "one"),
        (3, "unfinished"),
        (5, "rest"),
    ]


def test_a_record_torn_by_a_power_cut_is_cut_off(logs: Logs) -> None:
    logs.open("j").append(1, b"one\n")
    logs.close()
    path = next(logs.folder("j").iterdir())
    with path.open("ab") as file:
        file.write(b"17000000")
    logs.open("j").append(1, b"two\n")
    assert texts(logs) == ["one", "two"]


def test_a_block_of_zeros_left_by_a_power_cut_is_skipped(logs: Logs) -> None:
    logs.open("j").append(1, b"one\n")
    logs.close()
    with next(logs.folder("j").iterdir()).open("ab") as file:
        file.write(b"\0" * 100 + b"\n")
    logs.open("j").append(1, b"two\n")
    assert texts(logs) == ["one", "two"]


def test_the_log_of_an_unknown_job_is_empty(logs: Logs) -> None:
    assert texts(logs) == []
    assert texts(logs, lines=5) == []


async def test_following_sees_old_and_new_lines_and_ends_with_the_log(logs: Logs) -> None:
    log = logs.open("j")
    log.append(1, b"old\n")
    seen: list[LogLine] = []

    async def follow() -> None:
        async for line in logs.follow(logs.reader("j", {})):
            seen.append(line)

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
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
    async with asyncio.timeout(5):
        assert [line.text async for line in logs.follow(logs.reader("j", {}))] == ["all"]


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
        assert texts(logs)[-2] == "after"
        assert "the disk was full" in texts(logs)[-1]
        kept = [line.text for line in logs.reader("later", {}).iterate()]
        assert kept[0] == "kept"
        logs.close()
