"""Targets of discovery's wires: what members say to each other, and streams of messages from clients."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable

from discovery import codec, peerwire
from discovery.codec import Unreadable
from discovery.jsonstream import Messages
from discovery.operations import Command, PutRequest, Refused
from discovery.peerwire import Ask, Change, Done, Join, KeepAlive, Message, Numbers, Propose, Refusal, Reply
from tests.fuzz import mutation
from tests.fuzz.harness import Violation


class PeerMessages:
    """Decode what another member sends: a message that comes back the same, or `Unreadable`."""

    def open(self) -> None: ...
    def close(self) -> None: ...

    def seeds(self) -> Iterable[bytes]:
        payload = codec.encode_command(Command(id=1, time_ms=2, body=PutRequest(key=b"a", value=b"1")))
        messages: list[Message] = [
            Ask(1, Propose(payload)),
            Ask(2, KeepAlive([1, 2, 3])),
            Ask(3, Join("127.0.0.1:4001", 7)),
            Ask(4, Change("add", "b", "127.0.0.1:4002")),
            Reply(1, Done(5)),
            Reply(2, Numbers([10, 0])),
            Reply(3, Refusal("not_leader", "b leads")),
        ]
        for message in messages:
            yield peerwire.encode(message)[peerwire.LENGTH.size :]

    def mutate(self, data: bytes, dice: random.Random) -> bytes:
        return mutation.of_bytes(data, dice)

    def run(self, data: bytes) -> str:
        try:
            message = peerwire.decode(data)
        except peerwire.Unreadable:
            return "unreadable"
        again = peerwire.encode(message)[peerwire.LENGTH.size :]
        if peerwire.decode(again) != message:
            raise Violation("a message comes back as another")
        if isinstance(message, Ask) and isinstance(message.question, Propose):
            try:
                codec.decode_command(message.question.command)
            except Unreadable:
                return "Ask Propose of nonsense"
        inner = getattr(message, "question", None) or getattr(message, "answer", None)
        return f"{type(message).__name__} {type(inner).__name__ if inner is not None else ''}"


class Streams:
    """Cut a stream of messages: however it arrives, the same objects, which are all of it; else `Refused`."""

    def open(self) -> None: ...
    def close(self) -> None: ...

    def seeds(self) -> Iterable[bytes]:
        create = {"create_request": {"key": "YQ==", "filters": ["NOPUT"]}}
        yield json.dumps(create).encode()
        yield json.dumps(create).encode() + b" \n" + json.dumps({"cancel_request": {"watch_id": 1}}).encode()
        yield b'{"a":"\\"}{\\\\"}{"b":{}}{}'

    def mutate(self, data: bytes, dice: random.Random) -> bytes:
        return mutation.of_bytes(data, dice) if dice.random() < 0.7 else data + mutation.of_json_text(data, dice)

    def run(self, data: bytes) -> str:
        whole, rest, refused = self._cut([data])
        dice = random.Random(len(data))
        cuts = sorted(dice.randrange(len(data) + 1) for _ in range(5))
        parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        if self._cut(parts) != (whole, rest, refused):
            raise Violation("it matters how the bytes arrive")
        if not refused and b"".join(data.split()) != b"".join(b"".join([*whole, rest]).split()):
            raise Violation("something got lost")
        for message in whole:
            if not (message.startswith(b"{") and message.endswith(b"}")):
                raise Violation(f"no object: {message[:50]!r}")
        return f"{min(len(whole), 4)} objects{', refused' if refused else ''}{', rest' if rest else ''}"

    @staticmethod
    def _cut(parts: Iterable[bytes]) -> tuple[list[bytes], bytes, bool]:
        messages, found = Messages(), []
        for part in parts:
            messages.feed(part)
            try:
                for message in messages.take():
                    found.append(message)
            except Refused:
                return found, b"", True
        return found, bytes(messages._raw), False
