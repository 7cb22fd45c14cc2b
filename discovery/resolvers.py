"""Asks the machine's own name servers what is none of our names.

In the order of `/etc/resolv.conf`, each for `FORWARD_TIMEOUT_S`; one that gave no answer comes last for
`AVOID_S`, so that a dead first server costs one question and not every one. An answer of failure or
refusal has the next one asked, and is passed on only if none knows better. A fresh port and a fresh id
for each question, and answers to another question are ignored: the client's own would be easier to
guess. `dns` is the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

from discovery.wire import clock

FORWARD_TIMEOUT_S = 2.0
AVOID_S = 30.0

Ask = Callable[[bytes, str, int], Awaitable[bytes]]

_SERVFAIL, _REFUSED = 2, 5


class Resolvers:
    """The machine's name servers, read again when the file changes; never our own address."""

    def __init__(self, file: Path, own_address: str, *, port: int = 53) -> None:
        self._file = file
        self._own_address = own_address
        self._port = port
        self._stamp = 0.0
        self._servers: list[str] = []
        self._avoided_until: dict[str, float] = {}

    def servers(self) -> list[str]:
        """Return the addresses in the order of the file, those that did not answer lately behind the others."""
        try:
            stamp = self._file.stat().st_mtime
            if stamp != self._stamp:
                self._servers = self._read()
                self._stamp = stamp
                self._avoided_until.clear()
        except OSError:
            pass  # gone for now: those that we know may still answer
        now = clock.monotonic_s()
        return sorted(self._servers, key=lambda server: self._avoided_until.get(server, 0.0) > now)

    async def ask(self, raw: bytes, *, is_udp: bool) -> bytes | None:
        """Return the best answer to a query, `None` if there is none at all."""
        ask = _ask_udp if is_udp else _ask_tcp
        second_best: bytes | None = None
        for server in self.servers():
            try:
                async with asyncio.timeout(FORWARD_TIMEOUT_S):
                    answer = await ask(raw, server, self._port)
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                self._avoided_until[server] = clock.monotonic_s() + AVOID_S
                continue
            if len(answer) >= 12 and answer[3] & 0x0F not in (_SERVFAIL, _REFUSED):
                return answer
            second_best = second_best or answer
        return second_best

    def _read(self) -> list[str]:
        found = []
        for line in self._file.read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) >= 2 and words[0] == "nameserver" and words[1] != self._own_address:
                with contextlib.suppress(ValueError):
                    ipaddress.ip_address(words[1].partition("%")[0])
                    found.append(words[1])
        return list(dict.fromkeys(found))


class _Reply(asyncio.DatagramProtocol):
    """Waits for the one datagram that answers our question, and ignores others."""

    def __init__(self, raw: bytes) -> None:
        self._asked = raw
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if _is_answer(self._asked, data) and not self.answer.done():
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)
            self.answer.exception()  # retrieved here: the asker may have given up already


def _is_answer(asked: bytes, data: bytes) -> bool:
    """Tell whether a datagram answers a query: its id, and its question unless the server did not understand that."""
    if len(data) < 12 or data[:2] != asked[:2] or not data[2] & 0x80:
        return False
    if data[4:6] == b"\0\0":
        return data[3] & 0x0F != 0  # an error without the question
    end = 12
    while end < len(asked) and asked[end]:
        end += asked[end] + 1
    end += 5
    return data[12:end].lower() == asked[12:end].lower()


async def _ask_udp(raw: bytes, server: str, port: int) -> bytes:
    loop = asyncio.get_running_loop()
    question = random.SystemRandom().randbytes(2) + raw[2:]
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    transport, reply = await loop.create_datagram_endpoint(
        lambda: _Reply(question), remote_addr=(server, port), family=family
    )
    try:
        transport.sendto(question)
        return raw[:2] + (await reply.answer)[2:]
    finally:
        transport.close()


async def _ask_tcp(raw: bytes, server: str, port: int) -> bytes:
    reader, writer = await asyncio.open_connection(server, port)
    try:
        writer.write(struct.pack(">H", len(raw)) + raw)
        return await reader.readexactly(struct.unpack(">H", await reader.readexactly(2))[0])
    finally:
        writer.close()
