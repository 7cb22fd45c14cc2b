from __future__ import annotations

from urllib.parse import parse_qsl

import pytest

from buildpack import tickets
from buildpack.errors import TicketRefused


def _query(key: str = "k", bytes_max: int = 5) -> dict[str, str]:
    return dict(parse_qsl(tickets.sign(key, "PUT", "/temp/x", ends_at=100, bytes_max=bytes_max)))


def test_a_ticket_permits_what_it_was_signed_for_until_it_ends() -> None:
    assert tickets.check(["new", "k"], "PUT", "/temp/x", _query(), now_s=100) == 5


@pytest.mark.parametrize(
    "change",
    [{"ends": "101"}, {"max": "6"}, {"max": "x"}, {"signature": ""}, {"signature": "ü"}, {"ends": ""}],
)
def test_a_changed_ticket_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(TicketRefused):
        tickets.check(["k"], "PUT", "/temp/x", _query() | change, now_s=1)


def test_a_ticket_for_something_else_or_of_another_key_or_over_is_refused() -> None:
    for keys, method, path, now_s in (
        (["k"], "GET", "/temp/x", 1),
        (["k"], "PUT", "/temp/y", 1),
        (["other"], "PUT", "/temp/x", 1),
        ([], "PUT", "/temp/x", 1),
        (["k"], "PUT", "/temp/x", 101),
    ):
        with pytest.raises(TicketRefused):
            tickets.check(keys, method, path, _query(), now_s=now_s)
