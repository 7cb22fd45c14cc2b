"""Cuts a stream of JSON objects, one after the other with or without space between them, into its objects.

What clients of etcd's gateway send to the endpoints that stream (`watch`, `lease/keepalive`): several messages in
one body, which may arrive in pieces. Called by `gateway` and `watchstream`; whether an object's inside is JSON, they
find out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from discovery.operations import INVALID_ARGUMENT, Refused

MESSAGE_BYTES_MAX = 1024 * 1024
_SPACE = b" \t\r\n"
_OUTSIDE = re.compile(rb'["{}]')
_INSIDE = re.compile(rb'["\\]')


class Messages:
    """Bytes in, complete objects out."""

    def __init__(self) -> None:
        self._raw = bytearray()
        self._at = 0
        self._depth = 0
        self._is_text = False

    @property
    def has_rest(self) -> bool:
        """Tell whether an object has begun that has not ended yet."""
        return bool(self._raw.strip(_SPACE))

    def feed(self, raw: bytes) -> None:
        """Add what has arrived."""
        self._raw += raw

    def take(self) -> Iterator[bytes]:
        """Yield the objects that are complete.

        Raises:
            Refused: what comes next is no object, or one that does not end within `MESSAGE_BYTES_MAX`.
        """
        while (end := self._find_end()) is not None:
            message = bytes(self._raw[:end])
            del self._raw[:end]
            self._at = 0
            yield message
        if len(self._raw) > MESSAGE_BYTES_MAX:
            raise Refused(INVALID_ARGUMENT, "request is too large")

    def _find_end(self) -> int | None:
        """Look on from where the last look ended; return where the first object ends."""
        if not self._at:
            del self._raw[: len(self._raw) - len(self._raw.lstrip(_SPACE))]
            if self._raw and self._raw[:1] != b"{":
                raise Refused(INVALID_ARGUMENT, f"request does not parse: it begins with {bytes(self._raw[:1])!r}")
        while found := (_INSIDE if self._is_text else _OUTSIDE).search(self._raw, self._at):
            self._at = found.end()
            mark = found[0]
            if mark == b"\\":
                if self._at == len(self._raw):
                    self._at -= 1  # what it escapes is still to come
                    return None
                self._at += 1
            elif mark == b'"':
                self._is_text = not self._is_text
            else:
                self._depth += 1 if mark == b"{" else -1
                if self._depth == 0:
                    return self._at
        self._at = len(self._raw)
        return None
