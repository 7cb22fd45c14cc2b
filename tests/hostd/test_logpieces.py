"""A log that is sent as it lies on the disk makes the same lines on the other side, also if it is cut meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery.wire.errors import Internal
from discovery.wire.filepart import FilePart
from hostd import logpieces
from hostd.joblog import JobLog
from hostd.loglines import Block, Joiner, Piece
from hostd.logpieces import Pieces, decode
from hostd.logreader import Reader, raw_chunks
from hostd.segments import CLOSED, GONE, OUTPUT, drop, segments
from tests.hostd.test_joblog import STEPS, carry_out, no_fd_left
from tests.hostd.test_logs import held_files


@pytest.fixture(autouse=True)
def sends_little_things_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logpieces, "_SENT_LEAST_BYTES", 20)
    monkeypatch.setattr(logpieces, "_SENT_MOST_BYTES", 50)
    monkeypatch.setattr(logpieces, "_BLOCK_BYTES", 30)


def carried(part: bytes | FilePart) -> bytes:
    """What the other side gets."""
    if isinstance(part, bytes):
        return part
    data = os.pread(part.file.fileno(), part.size, part.offset)
    end = part.end(len(data))
    assert len(data) + len(end) == part.size + part.end_bytes
    return part.head + data + end


def frames(folder: Path, since: int = 0, stream: int | None = None) -> Iterator[bytes]:
    pieces = Pieces(folder, since, stream=stream)
    while part := pieces.read():
        yield carried(part)
    pieces.close()


def lines(blocks: list[Block]) -> list[tuple[int, bytes]]:
    return [(block.stream, line) for block in blocks for line in block.data.splitlines(keepends=True)]


def joined(found: Iterator[bytes]) -> list[Block]:
    joiner = Joiner()
    return [block for piece in decode(found) for block in joiner.take(piece)]


def read(folder: Path, since: int) -> list[Block]:
    reader, found = Reader(folder, "j", {}, since=since), list[Block]()
    while blocks := reader.blocks():
        found += blocks
    reader.close()
    return found


@given(STEPS, st.sampled_from([100, 300, 1_000_000]), st.integers(0, 300), st.sampled_from([None, 1, 2]))
@settings(max_examples=200, deadline=None)
def test_both_sides_make_the_same_lines(
    steps: list[tuple[str, int, str]], size: int, since: int, stream: int | None
) -> None:
    with TemporaryDirectory() as name, no_fd_left():
        folder = Path(name) / "j"
        log = JobLog(folder, segment_bytes=size)
        for step in steps:
            log = carry_out(log, *step)
        since = min(since, log.position)
        wanted = [line for line in lines(read(folder, since)) if stream in (None, line[0])]
        found = joined(frames(folder, since, stream))
        assert [line for line in lines(found) if stream in (None, line[0])] == wanted
        if size == 1_000_000:
            raw = [(piece.stream, piece.data) for piece in decode(frames(folder)) if piece.kind == OUTPUT]
            for of in (0, 1, 2):
                everything = b"".join(data for number, data in raw_chunks(folder, 10**9) if number == of)
                assert b"".join(data for number, data in raw if number == of) == everything
        log.close()


@given(st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_frames_may_come_in_parts_of_any_size(size: int) -> None:
    with TemporaryDirectory() as name:
        log = JobLog(Path(name) / "j")
        for number in range(20):
            log.append(1 + number % 2, b"line %d\n" % number * number, at=float(number))
        whole = b"".join(frames(log.folder)) + logpieces.KEEP_ALIVE
        pieces = list(decode(whole[at : at + size] for at in range(0, len(whole), size)))
        assert pieces[-1] == Piece(0, CLOSED, 0.0, 0, 0, b"")
        assert [(p.start, p.end, p.at) for p in pieces[:-1]] == [
            (p.end - len(p.data), p.end, p.at) for p in pieces[:-1]
        ]
        assert pieces[-2].end == log.position
        assert {p.at for p in pieces[:-1]} == {float(number) for number in range(1, 20)}
        log.end()


def test_a_stream_that_breaks_off_is_no_end() -> None:
    with pytest.raises(Internal):
        list(decode([logpieces.KEEP_ALIVE, logpieces.KEEP_ALIVE[:-1]]))


def test_what_the_rotation_takes_while_it_is_sent_is_said_to_be_gone(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "j", segment_bytes=200)
    log.append(1, b"0123456\n" * 10, at=1.0)
    pieces = Pieces(log.folder, 0)
    head = carried(pieces.read())  # who opens a file reads a block of it
    part = pieces.read()
    assert isinstance(part, FilePart)
    assert part.size == 50
    first = os.pread(part.file.fileno(), 20, part.offset)
    while len(segments(log.folder)) < 2 or segments(log.folder)[0] == 0:
        log.append(1, b"after 1\n", at=2.0)
    drop(log.folder, 0)
    found = [head, part.head + first + part.end(20)]
    while part := pieces.read():
        found.append(carried(part))
    got = list(decode(found))
    assert (got[1].data, got[1].start, got[1].end) == (first, 30, 50)
    assert (got[2].kind, got[2].start, got[2].end) == (GONE, 50, segments(log.folder)[0])
    assert b"".join(piece.data for piece in got[3:]).endswith(b"after 1\n")
    pieces.close()
    log.end()


def test_nothing_is_open_when_all_was_read(tmp_path: Path) -> None:
    log = JobLog(tmp_path / "j")
    log.append(1, b"x" * 1000 + b"\n")
    log.close()
    pieces = Pieces(log.folder, 0)
    while part := pieces.read():
        carried(part)
    assert not held_files(log.folder)
