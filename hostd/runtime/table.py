"""A list of system calls that a new process makes one after another, as an image in memory.

The child of the spawner runs no Python: it walks such a table (`seed` says how it comes to be and who walks) until
execve or until a call fails. `child` fills the table from a request, and reads out of it afterwards which call
failed. Pure but for the memfd that holds the image.

An entry is 13 words of 64 bits. Its call is made with six arguments, and then:

    result    what the call returned is written here (PENDING until then)
    store     and, if not 0, at this address, too: an argument of a later entry, say
    accept    a result equal to this one counts as 0: -EEXIST for a mkdir
    error     the address of the entry to go to on a negative result; 0 and above go on
    zero      … so many bytes further for 0
    more      … and for more than that

A call number below 0 makes no call: the result is the first argument, which with `store` sets a word, and else is a
jump. Entry 0 is the end of all that fail: it exits with FAILED_STATUS. All addresses are those in the child, where
the image lies at BASE, the same for every child. It refuses tables that outgrow their part of the image.
"""

from __future__ import annotations

import errno
import os
import struct
from array import array
from typing import Any, NamedTuple

from netns import syscalls
from netns.errors import KernelError

BASE = 0x10_1000_0000
"""Free in every process of ours, also with 39 bits of address space (the smallest there is): below all libraries."""
FAILED_STATUS = 127
WORDS = 13
ENTRY_BYTES = WORDS * 8
RESULT, STORE, ACCEPT, ERROR, ZERO, MORE = range(7, 13)
PENDING = 1 << 62
NO_CALL = -1
DATA_AT = 1 << 20
_LONGEST_ERROR = 4095
_AFTER = tuple((0,) * (6 - count) + (PENDING,) for count in range(7))
"""What comes after so many arguments: zeros for the missing ones, and the result."""
_TO_WORDS = tuple(bytes(-length % 8) for length in range(8))

Argument = int | str | bytes


class Note(NamedTuple):
    """What a failure of one entry is told as; `message` is for the person who wrote the job, "" = the usual words."""

    step: str
    syscall: str
    target: str
    message: str = ""


class Passage(NamedTuple):
    """Entries that go into any table, where they have to be moved: the places of their addresses, by what they mean."""

    words: list[int]
    notes: list[Note]
    data: bytes
    to_data: list[int]
    to_entries: list[int]


class Label:
    """A place in a table that may still be ahead."""

    __slots__ = ("index", "users")

    def __init__(self) -> None:
        self.index = -1
        self.users: list[tuple[int, int]] = []


_SAME_CALLS: dict[Any, tuple[list[int], list[Note]]] = {}
_SAME_CALLS_MAX = 64


class Table:
    """The entries, their data, and what to say about each."""

    def __init__(self, base: int = BASE) -> None:
        """Begin one that will lie at the address `base`."""
        self.step = "start"
        self._base = base
        self.notes: list[Note] = [Note("exit", "exit_group", "")]
        self._numbers = syscalls.numbers()
        self._words: list[int] = [self._numbers["exit_group"], FAILED_STATUS, 0, 0, 0, 0, 0, PENDING, 0, 0, base, 0, 0]
        self._data = bytearray(8)  # begins with a word of zeros
        self._known: dict[str | bytes, int] = {bytes(8): base + DATA_AT}

    def apart(self) -> Table:
        """Return an empty table for a part of this one."""
        table = Table(self._base)
        table.step = self.step
        return table

    @property
    def length(self) -> int:
        """The number of entries so far, which is the index of the next one."""
        return len(self.notes)

    def call(
        self,
        name: str,
        *arguments: Argument,
        target: str = "",
        message: str = "",
        accept: int = 0,
        store: int = 0,
        error: Label | None = None,
        zero: Label | None = None,
        more: Label | None = None,
    ) -> int:
        """Add a call and return its index. Texts and bytes are kept as data and given as their address."""
        index = len(self.notes)
        keep = self.keep
        given = [each if isinstance(each, int) else keep(each) for each in arguments]
        after = _AFTER[len(given)]
        self._words += (self._numbers[name], *given, *after, store, accept, self._base, ENTRY_BYTES, ENTRY_BYTES)
        self.notes.append(Note(self.step, name, target, message))
        if error is not None:  # one by one: this runs for most entries of each job
            self._lead(index, ERROR, error)
        if zero is not None:
            self._lead(index, ZERO, zero)
        if more is not None:
            self._lead(index, MORE, more)
        return index

    def calls(self, name: str, rows: tuple[tuple[int, int], ...]) -> None:
        """Add many calls with two numbers each, as `call` would; the same ones are made only once."""
        key = (name, rows, self._base, self.step)
        if key not in _SAME_CALLS:
            apart = self.apart()
            for row in rows:
                apart.call(name, *row)
            _SAME_CALLS[key] = (apart._words[WORDS:], apart.notes[1:])
            if len(_SAME_CALLS) > _SAME_CALLS_MAX:
                del _SAME_CALLS[next(iter(_SAME_CALLS))]
        words, notes = _SAME_CALLS[key]
        self._words += words
        self.notes += notes

    def set_word(self, value: Argument, address: int) -> None:
        """Add an entry that only writes a word."""
        number = value if isinstance(value, int) else self.keep(value)
        self._words += (NO_CALL, number, 0, 0, 0, 0, 0, PENDING, address, 0, self._base, ENTRY_BYTES, ENTRY_BYTES)
        self.notes.append(Note(self.step, "", ""))

    def fail(self, number: int, *, target: str, message: str) -> None:
        """Add an entry that fails with that errno, without a call."""
        self.set_word(-number, 0)
        self.notes[-1] = Note(self.step, "", target, message)

    def jump(self, label: Label) -> None:
        """Add an entry that only goes elsewhere."""
        index = len(self.notes)
        self.set_word(0, 0)
        self._lead(index, ZERO, label)

    def place(self, label: Label) -> None:
        """Let a label stand for the next entry."""
        label.index = len(self.notes)
        for index, word in label.users:
            self._set_index(index, word, label.index)

    def _lead(self, index: int, word: int, label: Label) -> None:
        if label.index >= 0:
            self._set_index(index, word, label.index)
        else:
            label.users.append((index, word))

    def _set_index(self, index: int, word: int, to: int) -> None:
        self.set_jump(index, word, self._base + to * ENTRY_BYTES)

    def set_jump(self, index: int, word: int, address: int) -> None:
        """Have an entry go on at an address, in this table or another; `word` is ERROR, ZERO or MORE."""
        here = self._base + index * ENTRY_BYTES
        self._words[index * WORDS + word] = address if word == ERROR else address - here

    def argument(self, index: int, number: int) -> int:
        """Return the address of an argument of an entry, for `store`."""
        return self._base + index * ENTRY_BYTES + 8 + 8 * number

    def word(self, index: int, number: int) -> int:
        """Return the address of a word of an entry: 1 to 6 are its arguments, or RESULT and so on."""
        return self._base + index * ENTRY_BYTES + 8 * number

    def change_vector(self, index: int, addresses: list[int]) -> None:
        """Fill in what the second argument of a readv or writev points to: a word at each of the addresses."""
        at = self._words[index * WORDS + 2] - self._base - DATA_AT
        for number, address in enumerate(addresses):
            struct.pack_into("=2q", self._data, at + 16 * number, address, 8)

    def next_argument(self, number: int) -> int:
        """Return the address of an argument of the entry after the one that is about to be added."""
        return self._base + (len(self.notes) + 1) * ENTRY_BYTES + 8 + 8 * number

    def keep(self, value: str | bytes) -> int:
        """Keep bytes, or a path with its zero byte, and return their address; the same bytes only once."""
        address = self._known.get(value)
        if address is None:
            address = self._known[value] = self.own(_text(value) if isinstance(value, str) else value)
        return address

    def own(self, raw: bytes) -> int:
        """Keep bytes at a place of their own, aligned to words, and return the address: the calls may change them."""
        data = self._data
        address = self._base + DATA_AT + len(data)
        data += raw
        data += _TO_WORDS[len(raw) % 8]
        return address

    def words(self, *values: int) -> bytes:
        """Pack words, for structures in memory."""
        return struct.pack(f"={len(values)}q", *values)

    def pointers(self, texts: list[str]) -> int:
        """Keep an array of texts that ends with a null pointer, as execve takes them."""
        return self.own(self.words(*(self.own(_text(text)) for text in texts), 0))

    def passage(self) -> Passage:
        """Return all entries after the first, for `add`; what is kept as data must not hold addresses of its own."""
        words, end = self._words[WORDS:], self._base + DATA_AT + len(self._data)
        at = [index for index, word in enumerate(words) if self._base < word < end]
        to_data = [index for index in at if words[index] >= self._base + DATA_AT]
        to_entries = [index for index in at if words[index] < self._base + DATA_AT]
        return Passage(words, self.notes[1:], bytes(self._data), to_data, to_entries)

    def add(self, passage: Passage) -> None:
        """Add the entries of a passage from a table with the same base: a fraction of the work of making them."""
        by_data, by_entries = len(self._data), (len(self.notes) - 1) * ENTRY_BYTES
        words = passage.words.copy()
        for index in passage.to_data:
            words[index] += by_data
        for index in passage.to_entries:
            words[index] += by_entries
        self._words += words
        self._data += passage.data
        self.notes += passage.notes

    # the finished table

    def write(self) -> int:
        """Return a memfd with the image.

        Raises:
            KernelError: E2BIG, it is too large.
        """
        if len(self.notes) * ENTRY_BYTES > DATA_AT:
            raise KernelError(errno.E2BIG, "table", f"{len(self.notes)} calls")
        fd = os.memfd_create("hostd-table", os.MFD_CLOEXEC)
        try:
            os.pwrite(fd, struct.pack(f"{len(self._words)}q", *self._words), 0)  # a third of what an array takes
            os.pwrite(fd, self._data, DATA_AT)
        except OSError:
            os.close(fd)
            raise
        return fd


def _text(value: str) -> bytes:
    """Return a path or an argument with its zero byte."""
    return (value.encode() if value.isascii() else os.fsencode(value)) + b"\0"


def failure(fd: int, notes: list[Note]) -> tuple[Note, int] | None:
    """Return what failed in the table of that memfd, and its errno; None if nothing did."""
    words = array("q", os.pread(fd, len(notes) * ENTRY_BYTES, 0))
    for index, result in enumerate(words[RESULT::WORDS]):
        if -_LONGEST_ERROR <= result < 0:
            at = index * WORDS
            if words[at + ERROR] == BASE and result != words[at + ACCEPT]:
                return notes[index], -result
    return None


def told(note: Note, number: int) -> dict[str, Any]:
    """Return a failure in the words that hostd is told."""
    message = note.message or KernelError(number, note.syscall, note.target).args[-1]
    return {"step": note.step, "errno": number, "syscall": note.syscall, "target": note.target, "message": message}
