from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from discovery.jsonstream import MESSAGE_BYTES_MAX, Messages
from discovery.operations import Refused

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
PATIENT = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@PATIENT
@given(st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=4), st.data())
def test_what_was_joined_is_cut_again_wherever_it_was_split(
    objects: list[dict[str, object]], data: st.DataObject
) -> None:
    raw = b"".join(json.dumps(item, ensure_ascii=data.draw(st.booleans())).encode() + data.draw(
        st.sampled_from((b"", b"\n", b" \r\n\t"))) for item in objects)  # fmt: skip
    messages, found = Messages(), []
    while raw:
        count = data.draw(st.integers(1, len(raw)))
        messages.feed(raw[:count])
        found += [json.loads(message) for message in messages.take()]
        raw = raw[count:]
    assert found == objects
    assert not messages.has_rest


@pytest.mark.parametrize("raw", [b"[1]", b"x", b"}", b'"{}"', b"1{}"])
def test_what_is_no_object_is_refused(raw: bytes) -> None:
    messages = Messages()
    messages.feed(raw)
    with pytest.raises(Refused):
        list(messages.take())


def test_an_object_without_an_end_is_refused_in_time() -> None:
    messages = Messages()
    messages.feed(b'{"a":"')
    for _ in range(MESSAGE_BYTES_MAX // 1000 - 1):
        messages.feed(b"x" * 1000)
        assert not list(messages.take())
    messages.feed(b"x" * 2000)
    with pytest.raises(Refused):
        list(messages.take())
    assert messages.has_rest


@PATIENT
@given(st.binary())
def test_nothing_else_is_ever_raised(raw: bytes) -> None:
    messages = Messages()
    messages.feed(raw)
    try:
        list(messages.take())
    except Refused:
        pass
