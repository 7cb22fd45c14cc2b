"""A filter made small decides as the long one did; what cannot be followed stays as it was."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Sequence

import pytest

from hostd.runtime import seccomp, seccomp_ranges
from hostd.runtime.launch import DEFAULT_CAPABILITIES
from hostd.runtime.seccomp_ranges import Instruction, shrink
from tests.hostd.test_seccomp import judge, judge_number

X86_64, I386, AARCH64, ARM, UNKNOWN = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028, 0x12345
NATIVE = {"x86_64": (X86_64, I386), "aarch64": (AARCH64, ARM)}[os.uname().machine]
STRANGE = tuple({X86_64, I386, AARCH64, ARM, UNKNOWN} - {*NATIVE})
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0
WORDS = (0, 1, 9, 16, 40, 0x20000, 0x7E020000, 0x10000000, 0xFFFFFFFF, 0x1_0000_0000, 0x28_0000_0028, 1 << 63)


def write(instructions: Sequence[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("=HBBI", *each) for each in instructions)


def long_one(allowed: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Compare with one number after another, as libseccomp does."""
    compared = [each for number in allowed for each in ((0x15, 0, 1, number), (0x06, 0, 0, ALLOW))]
    head = [(0x20, 0, 0, 4), (0x15, 1, 0, X86_64), (0x06, 0, 0, KILL), (0x20, 0, 0, 0)]
    return [*head, *compared, (0x06, 0, 0, REFUSE)]


@pytest.mark.parametrize("capabilities", [DEFAULT_CAPABILITIES, (), (*DEFAULT_CAPABILITIES, "SYS_ADMIN", "SYSLOG")])
def test_the_stock_profile_decides_as_before_on_every_call(
    monkeypatch: pytest.MonkeyPatch, capabilities: tuple[str, ...]
) -> None:
    raw = seccomp.PROFILE_PATH.read_bytes()
    small = seccomp.compile_profile(raw, capabilities)
    monkeypatch.setattr(seccomp, "shrink", lambda program: program)
    whole = seccomp.compile_profile(raw, capabilities)
    dice = random.Random(len(capabilities))
    numbers = (*range(470), *range(0x40000000, 0x40000000 + 560), 0x7FFFFFFF, 0x3FFFFFFF)
    calls = [(architecture, number) for architecture in NATIVE for number in numbers]
    calls += [(architecture, number) for architecture in STRANGE for number in range(470)]
    for architecture, number in calls:
        arguments = [dice.choice(WORDS) for _ in range(3)]
        before = judge_number(whole, architecture, number, *arguments)
        assert judge_number(small, architecture, number, *arguments) == before, (architecture, number)
    for name in ("socket", "clone", "personality"):
        for _ in range(200):
            arguments = [dice.choice(WORDS) for _ in range(3)]
            assert judge(small, name, *arguments) == judge(whole, name, *arguments), (name, arguments)


def test_the_stock_profile_is_a_third_of_what_libseccomp_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = seccomp.PROFILE_PATH.read_bytes()
    small = seccomp.compile_profile(raw, DEFAULT_CAPABILITIES)
    monkeypatch.setattr(seccomp, "shrink", lambda program: program)
    assert len(small) * 3 < len(seccomp.compile_profile(raw, DEFAULT_CAPABILITIES))


@pytest.mark.parametrize("seed", range(8))
def test_any_set_of_numbers_keeps_its_edges(seed: int) -> None:
    dice = random.Random(seed)
    allowed = sorted(dice.sample(range(500), dice.randint(1, 400)))
    whole = write(long_one(allowed))
    small = shrink(whole)
    assert len(small) <= len(whole)
    for number in (*range(502), 0x40000000, 0x7FFFFFFF):
        assert judge_number(small, X86_64, number) == (ALLOW if number in allowed else REFUSE), number
        assert judge_number(small, I386, number) == KILL


@pytest.mark.parametrize(
    "instruction",
    [
        (0x54, 0, 0, 0xFF),  # arithmetic with the number
        (0x45, 0, 1, 0x40000000),  # a bit of the number
        (0x04, 0, 0, 1),  # an addition
        (0x02, 0, 0, 0),  # the kernel's scratch memory
    ],
)
def test_what_it_cannot_follow_stays_as_it_was(instruction: tuple[int, int, int, int]) -> None:
    whole = long_one(range(0, 300, 2))
    whole.insert(4, instruction)
    assert shrink(write(whole)) == write(whole)


def test_a_filter_that_runs_off_its_end_stays_as_it_was() -> None:
    whole = write(long_one(range(0, 300, 2))[:-1])
    assert shrink(whole) == whole


@pytest.mark.parametrize("seed", range(10))
def test_one_instruction_gone_wrong_is_noticed_before_it_is_given_out(seed: int) -> None:
    old = [Instruction(*each) for each in long_one(range(0, 300, 3))]
    new, moved = seccomp_ranges._rebuilt(old)
    assert seccomp_ranges._decide_alike(old, new, moved)
    compared = [at for at, each in enumerate(new) if each.code in (0x15, 0x35)]
    at = random.Random(seed).choice(compared)
    new[at] = new[at]._replace(k=new[at].k + 1)
    assert not seccomp_ranges._decide_alike(old, new, moved)
