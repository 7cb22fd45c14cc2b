"""One client of the spawner: bytes in, messages out, never blocking on a client that does not read.

The framing is drawn in `spawner`, which is the only user. Standard library only. Refuses messages
above `MESSAGE_BYTES_MAX`, bytes that are not JSON, and a client that is too far behind with reading:
their connection is closed.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

MESSAGE_BYTES_MAX = 16 * 1024 * 1024
BACKLOG_BYTES_MAX = 64 * 1024 * 1024  # a reader that is this far behind is stuck
READ_BYTES = 64 * 1024  # above 128 KiB malloc maps memory for it, and unmaps it, every time
_HEADER = struct.Struct(">I")
_RIGHTS_BYTES = socket.CMSG_SPACE(16 * 4)


def close_fds(fds: Iterable[int]) -> None:
    """Close them all, whatever one of them says."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


class Connection:
    """`is_open` turns false when it is to be closed; `is_watching` and `waits_for_room` are the spawner's notes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.is_watching = False
        self.waits_for_room = False
        self.is_open = True
        self._in = bytearray()
        self._fds: deque[int] = deque()
        self._out: deque[tuple[bytes, list[int]]] = deque()
        self._out_bytes = 0

    @property
    def has_backlog(self) -> bool:
        return bool(self._out)

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield every whole message that has arrived; closes itself at the end of file or at nonsense.

        `fds` of a message is the list of those that came with it; they are the receiver's to close.
        """
        try:
            data, rights, _, _ = self.sock.recvmsg(READ_BYTES, _RIGHTS_BYTES, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, rights = b"", []
        for _, _, payload in rights:
            self._fds.extend(array.array("i", payload[: len(payload) // 4 * 4]))
        self._in += data
        self.is_open = bool(data)
        while self.is_open and len(self._in) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._in)
            end = _HEADER.size + length
            self.is_open = length <= MESSAGE_BYTES_MAX
            if not self.is_open or len(self._in) < end:
                return
            message = json.loads(self._in[_HEADER.size : end])
            del self._in[:end]
            count = message.get("fds", 0)
            if not 0 <= count <= len(self._fds):
                raise ValueError(f"a message says that it brings {count} fds")
            message["fds"] = [self._fds.popleft() for _ in range(count)]
            yield message

    def send(self, message: dict[str, Any], fds: list[int]) -> None:
        """Send a message with duplicates of `fds`, later if the socket is full."""
        if fds:
            message["fds"] = len(fds)
        body = json.dumps(message).encode()
        self._out.append((_HEADER.pack(len(body)) + body, [os.dup(fd) for fd in fds]))
        self._out_bytes += len(body)
        self.flush()
        if self._out_bytes > BACKLOG_BYTES_MAX:
            self.is_open = False

    def flush(self) -> None:
        """Send as much of the backlog as the socket takes."""
        while self._out and self.is_open:
            data, fds = self._out[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                sent = self.sock.sendmsg([data], rights)
            except BlockingIOError:
                return
            except OSError:
                self.is_open = False
                return
            close_fds(fds)  # they went with the first byte
            self._out_bytes -= sent
            self._out.popleft()
            if sent < len(data):
                self._out.appendleft((data[sent:], []))

    def close(self) -> None:
        """Close the socket and the duplicates that were never sent."""
        self.is_open = False
        for _, fds in self._out:
            close_fds(fds)
        close_fds(self._fds)
        self._fds.clear()
        self._out.clear()
        self.sock.close()
