"""A part of a streamed answer that lies in a file: the kernel sends it, and its bytes are never ours.

For `wire.serve.send_stream`. Apart from it, so that who makes such parts need not import a server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO


@dataclass(frozen=True)
class FilePart:
    """A part of a stream that the kernel sends from a file: `head`, then `size` bytes at `offset`, then an end.

    `end` is told how many bytes the file still had, and returns `size` less these of padding and `end_bytes` more.
    """

    head: bytes
    file: FileIO
    offset: int
    size: int
    end_bytes: int
    end: Callable[[int], bytes]
