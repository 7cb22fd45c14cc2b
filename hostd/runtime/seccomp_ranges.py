"""Make a seccomp filter small: every start of a job has the kernel check it, run it once for each call, and compile it.

libseccomp compares a call's number with one number after another. Most neighbours have the same fate, so `shrink` finds
the ranges of numbers that have, and searches those by halves: some 400 instructions in the place of 1500. What a filter
does when it looks at a call's arguments is copied as it is.

It refuses (the filter stays what it was) whatever it cannot follow: instructions other than those that libseccomp
writes, arithmetic with the number or the architecture. And it trusts itself no more than that: the result is walked
for every range of either filter, under every architecture named and another one, before it is given out. Pure; called
by `seccomp`, where a filter is compiled once.

Source: seccomp(2), on `struct seccomp_data`; Documentation/networking/filter.rst, on classic BPF.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_LOAD, _RETURN, _GO, _IF_EQUAL, _IF_ABOVE, _IF_FROM, _IF_ANY, _AND = 0x20, 0x06, 0x05, 0x15, 0x25, 0x35, 0x45, 0x54
_CONDITIONS = frozenset({_IF_EQUAL, _IF_ABOVE, _IF_FROM, _IF_ANY})
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_WORD_MAX = 0xFFFFFFFF
_CHUNK_NODES = 120  # a conditional jump leads at most 255 instructions ahead
_FORMAT = struct.Struct("=HBBI")


class Instruction(NamedTuple):
    """`struct sock_filter`."""

    code: int
    if_true: int
    if_false: int
    k: int


class Fate(NamedTuple):
    """What becomes of a call: RETURN of a value, or GO to where the filter looks at arguments."""

    code: int
    k: int


class _CannotFollow(Exception):
    """The filter does what this module does not know."""


Range = tuple[int, Fate]
"""The first number of a range that ends where the next one begins."""


def shrink(program: bytes) -> bytes:
    """Return a filter that decides as `program` does, or `program` itself if it cannot be followed or made smaller."""
    old = [Instruction(*each) for each in _FORMAT.iter_unpack(program)]
    try:
        new, moved = _rebuilt(old)
        is_same = _decide_alike(old, new, moved)
    except _CannotFollow:
        return program
    if not is_same or len(new) >= len(old):
        return program
    return b"".join(_FORMAT.pack(*each) for each in new)


def _rebuilt(old: Sequence[Instruction]) -> tuple[list[Instruction], dict[int, int]]:
    """Return the filter, and where in it what looks at arguments is now, by where it was."""
    copied = _reachable(old)
    new = [Instruction(_LOAD, 0, 0, _ARCHITECTURE_AT)]
    holes: list[tuple[int, int]] = []  # a jump in `new`, and where in `old` it leads
    architectures = _compared(old, _ARCHITECTURE_AT)
    for architecture in architectures:
        body, its_holes = _search(_ranges(old, architecture))
        # Over the body if it is another architecture: a jump of 32 bits, a body may be long.
        new += [Instruction(_IF_EQUAL, 1, 0, architecture), Instruction(_GO, 0, 0, len(body))]
        holes += [(len(new) + at, to) for at, to in its_holes]
        new += body
    fate = _others(old, architectures)
    if fate.code == _GO:
        holes.append((len(new), fate.k))
    new.append(Instruction(fate.code, 0, 0, fate.k))
    moved = {pc: len(new) + index for index, pc in enumerate(copied)}
    for pc in copied:
        new.append(_moved(old[pc], pc, moved))
    for at, to in holes:
        new[at] = Instruction(_GO, 0, 0, moved[to] - at - 1)
    return new, moved


def _ranges(program: Sequence[Instruction], architecture: int) -> list[Range]:
    """Return what becomes of every number under an architecture: nothing changes but where one is compared with."""
    found: list[Range] = []
    for first in _starts(_compared(program, _NUMBER_AT)):
        fate = _fate(program, architecture, first)
        if not found or found[-1][1] != fate:
            found.append((first, fate))
    return found


def _starts(compared: Iterable[int]) -> list[int]:
    return sorted({0} | {each for k in compared for each in (k, k + 1) if each <= _WORD_MAX})


def _compared(program: Sequence[Instruction], word_at: int) -> list[int]:
    """Return the numbers that a word of the call is compared with, on whatever way.

    Which word it is, is known by the last load before, along every way that leads there.
    """
    found: dict[int, None] = {}
    seen: set[tuple[int, int]] = set()
    waiting = [(0, -1)]
    while waiting:
        pc, loaded = waiting.pop()
        if (pc, loaded) in seen:
            continue
        seen.add((pc, loaded))
        each = _at(program, pc)
        if each.code == _LOAD:
            loaded = each.k
        elif each.code in _CONDITIONS:
            if loaded == word_at:
                found[each.k] = None
        elif each.code == _AND and loaded in (-1, _NUMBER_AT, _ARCHITECTURE_AT):
            raise _CannotFollow
        waiting += [(to, loaded) for to in _next(each, pc)]
    return sorted(found)


def _next(each: Instruction, pc: int) -> list[int]:
    if each.code == _RETURN:
        return []
    if each.code == _GO:
        return [pc + 1 + each.k]
    if each.code in _CONDITIONS:
        return [pc + 1 + each.if_true, pc + 1 + each.if_false]
    return [pc + 1]


def _at(program: Sequence[Instruction], pc: int) -> Instruction:
    if pc >= len(program):
        raise _CannotFollow
    each = program[pc]
    if each.code not in _CONDITIONS | {_LOAD, _RETURN, _GO, _AND}:
        raise _CannotFollow
    return each


def _fate(program: Sequence[Instruction], architecture: int, number: int) -> Fate:
    """Walk as the kernel does until the filter ends, or needs an argument."""
    words = {_NUMBER_AT: number, _ARCHITECTURE_AT: architecture}
    pc, word = 0, None
    while True:
        each = _at(program, pc)
        if each.code == _RETURN:
            return Fate(_RETURN, each.k)
        if each.code == _LOAD:
            if each.k not in words:
                return Fate(_GO, pc)
            word = words[each.k]
            pc += 1
        elif each.code == _GO:
            pc += 1 + each.k
        elif word is None or each.code in (_IF_ANY, _AND):
            raise _CannotFollow
        else:
            is_true = {_IF_EQUAL: word == each.k, _IF_ABOVE: word > each.k, _IF_FROM: word >= each.k}[each.code]
            pc += 1 + (each.if_true if is_true else each.if_false)


def _others(program: Sequence[Instruction], architectures: Sequence[int]) -> Fate:
    """Return what becomes of calls under any other architecture: the same for all numbers, or we do not follow."""
    fates = {fate for other in _strangers(architectures) for _, fate in _ranges(program, other)}
    if len(fates) != 1:
        raise _CannotFollow
    return fates.pop()


def _strangers(architectures: Sequence[int]) -> list[int]:
    """Return one of every range between those that are named."""
    return [each for each in _starts(architectures) if each not in architectures]


def _reachable(program: Sequence[Instruction]) -> list[int]:
    """Return where everything is that the filter does from the first look at an argument on, in its order."""
    found: set[int] = set()
    waiting = [pc for pc in range(len(program)) if _looks_further(program[pc])]
    while waiting:
        pc = waiting.pop()
        if pc in found:
            continue
        each = _at(program, pc)
        if each.code == _LOAD and not _looks_further(each):
            raise _CannotFollow  # back to the number
        found.add(pc)
        waiting += _next(each, pc)
    return sorted(found)


def _looks_further(each: Instruction) -> bool:
    return each.code == _LOAD and each.k not in (_NUMBER_AT, _ARCHITECTURE_AT)


def _moved(each: Instruction, pc: int, moved: dict[int, int]) -> Instruction:
    """Return an instruction with its jumps as they are after the move. What lay between is gone: they only shrink."""
    here = moved[pc] + 1
    if each.code == _GO:
        return each._replace(k=moved[pc + 1 + each.k] - here)
    if each.code in _CONDITIONS:
        true, false = moved[pc + 1 + each.if_true] - here, moved[pc + 1 + each.if_false] - here
        return each._replace(if_true=true, if_false=false)
    return each


# the search


def _search(ranges: Sequence[Range]) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """Return the instructions that find a number's fate, and which of them are jumps into the old filter."""
    body, holes = _branch(ranges)
    return [Instruction(_LOAD, 0, 0, _NUMBER_AT), *body], [(at + 1, to) for at, to in holes]


def _branch(ranges: Sequence[Range]) -> tuple[list[Instruction], list[tuple[int, int]]]:
    if len(ranges) <= _CHUNK_NODES:
        return _chunk(ranges)
    middle = len(ranges) // 2
    low, low_holes = _branch(ranges[:middle])
    high, high_holes = _branch(ranges[middle:])
    head = [Instruction(_IF_FROM, 0, 1, ranges[middle][0]), Instruction(_GO, 0, 0, len(low))]
    holes = [(at + 2, to) for at, to in low_holes] + [(at + 2 + len(low), to) for at, to in high_holes]
    return [*head, *low, *high], holes


def _chunk(ranges: Sequence[Range]) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """Return a search whose ends are shared: comparisons first, then each fate once."""
    nodes: list[tuple[int, int, Fate | int, Fate | int]] = []  # code, k, where to if true, and if not
    _compare(ranges, nodes)
    fates = list(dict.fromkeys(fate for _, fate in ranges))
    place = {fate: len(nodes) + index for index, fate in enumerate(fates)}
    body = []
    for index, (code, k, true, false) in enumerate(nodes):
        if_true, if_false = ((place[to] if isinstance(to, Fate) else to) - index - 1 for to in (true, false))
        body.append(Instruction(code, if_true, if_false, k))
    holes = [(place[fate], fate.k) for fate in fates if fate.code == _GO]
    return body + [Instruction(fate.code, 0, 0, fate.k) for fate in fates], holes


def _compare(ranges: Sequence[Range], nodes: list[tuple[int, int, Fate | int, Fate | int]]) -> Fate | int:
    """Add the comparisons that tell these ranges apart, and return the first: its index, or the fate if there is one.

    A single number that its neighbours on both sides are alike but for is told with one.
    """
    if len(ranges) == 1:
        return ranges[0][1]
    here = len(nodes)
    nodes.append((0, 0, 0, 0))
    if len(ranges) == 3 and ranges[0][1] == ranges[2][1] and ranges[2][0] == ranges[1][0] + 1:
        nodes[here] = (_IF_EQUAL, ranges[1][0], ranges[1][1], ranges[0][1])
        return here
    middle = _middle(ranges)
    low = _compare(ranges[:middle], nodes)
    high = _compare(ranges[middle:], nodes)
    nodes[here] = (_IF_FROM, ranges[middle][0], high, low)
    return here


def _middle(ranges: Sequence[Range]) -> int:
    """Return where to halve: next to the middle, but not beside a single number that both sides are alike around."""
    middle = len(ranges) // 2
    near = sorted(range(1, len(ranges)), key=lambda at: abs(at - middle))[:3]
    return next((at for at in near if not (_is_single(ranges, at) or _is_single(ranges, at - 1))), middle)


def _is_single(ranges: Sequence[Range], at: int) -> bool:
    if not 0 < at < len(ranges) - 1:
        return False
    return ranges[at + 1][0] == ranges[at][0] + 1 and ranges[at - 1][1] == ranges[at + 1][1]


# the check


def _decide_alike(old: Sequence[Instruction], new: Sequence[Instruction], moved: dict[int, int]) -> bool:
    """Tell whether both filters do the same to every call: what is copied, instruction by instruction."""
    for pc, to in moved.items():
        ways = [(moved[each], where) for each, where in zip(_next(old[pc], pc), _next(new[to], to), strict=True)]
        if old[pc].code != new[to].code or any(here != there for here, there in ways):
            return False
        if old[pc].code != _GO and old[pc].k != new[to].k:
            return False
    named = sorted({*_compared(old, _ARCHITECTURE_AT), *_compared(new, _ARCHITECTURE_AT)})
    numbers = _starts([*_compared(old, _NUMBER_AT), *_compared(new, _NUMBER_AT)])
    for architecture in (*named, *_strangers(named)):
        for number in numbers:
            before, after = _fate(old, architecture, number), _fate(new, architecture, number)
            if before.code == _GO:
                before = Fate(_GO, moved[before.k])
            if before != after or max(each.if_true | each.if_false for each in new) > 0xFF:
                return False
    return True
