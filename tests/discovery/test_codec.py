from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discovery import codec
from discovery.operations import Image, Record


@given(st.binary(max_size=200))
def test_foreign_bytes_are_unreadable_and_nothing_else(raw: bytes) -> None:
    with pytest.raises(codec.Unreadable):
        codec.decode_command(b"\xc1" + raw)
    with pytest.raises(codec.Unreadable):
        codec.decode_image([b"\xc1" + raw])


def test_an_image_with_missing_records_is_unreadable() -> None:
    record = Record(b"k", b"v", 2, 2, 1)
    chunks = list(codec.encode_image(Image(2, 0, [], [], [record] * 2500)))
    assert len(chunks) == 4
    with pytest.raises(codec.Unreadable):
        codec.decode_image(chunks[:-1])
    assert codec.decode_image(chunks).events == [record] * 2500
