from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildpack import procfile
from buildpack.refusals import BuildRefused
from controller.errors import InvalidName
from controller.types import parse_process_type


def test_types_come_in_the_files_order_with_comments_and_blank_lines_skipped() -> None:
    raw = b"\xef\xbb\xbf# what runs\r\nweb: node index.js --a=b:c\r\n\r\n  worker :  bundle exec x  \nrelease:true\n"
    assert procfile.parse(raw) == {"web": "node index.js --a=b:c", "worker": "bundle exec x", "release": "true"}
    assert list(procfile.parse(raw)) == ["web", "worker", "release"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"web: x\n\nworker\n", "line 3: no colon in 'worker'"),
        (b"web: x\nweb: y\n", "line 2: process type 'web' is declared twice"),
        (b"we b: x\n", "line 1: 'we b' is no process type"),
        (b"../web: x\n", "line 1: '../web' is no process type"),
        (b"web:\n", "line 1: no command after 'web'"),
        (b"a: x\nb: \xff\n", "line 2: not UTF-8"),
        (b"a: x\0y\n", "line 1: a zero byte"),
        (b": x\n", "line 1: '' is no process type"),
    ],
)
def test_a_wrong_line_is_named(raw: bytes, words: str) -> None:
    with pytest.raises(BuildRefused, match=words) as caught:
        procfile.parse(raw)
    assert caught.value.hint


def test_an_empty_file_declares_nothing() -> None:
    assert procfile.parse(b"") == {}


@given(st.text(max_size=40))
def test_types_are_those_that_the_controller_accepts(name: str) -> None:
    try:
        types = procfile.parse(f"{name}: x".encode())
    except (BuildRefused, UnicodeEncodeError):
        return
    for type in types:
        try:
            parse_process_type(type)
        except InvalidName:
            pytest.fail(f"{type!r} is refused by the controller")


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        procfile.parse(raw)
    except BuildRefused:
        pass
