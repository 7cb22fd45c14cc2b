"""Feeds one target mutated inputs for some time, keeps what is new, and writes down what must not happen.

A target is a class with seeds, a mutator that knows its structure, and `run`, which returns a word for what became of
the input (the class of the refusal, say) and raises for what must not happen. With atheris (`pip install atheris`) the
search is guided by coverage; without, by outcomes never seen before.
A finding is kept once per place in the code, as `findings/TARGET/NAME`. To make a new target: a class in a file beside
this one, and a line in `TARGETS` of `__main__`.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"


class Target(Protocol):
    """What can be fuzzed."""

    def open(self) -> None: ...
    def close(self) -> None: ...
    def seeds(self) -> Iterable[bytes]: ...
    def mutate(self, data: bytes, dice: random.Random) -> bytes: ...
    def run(self, data: bytes) -> str: ...


class Violation(AssertionError):
    """An invariant that did not hold."""


class Session:
    """Counts, and keeps findings."""

    def __init__(self, name: str, target: Target, folder: Path) -> None:
        self.target = target
        self.folder = folder / name
        self.count = 0
        self.outcomes: dict[str, int] = {}
        self.findings: dict[str, str] = {}
        self.slowest_s = 0.0
        self.began = time.monotonic()

    def run(self, data: bytes) -> bool:
        """Try one input; True if what became of it is new."""
        self.count += 1
        at = time.monotonic()
        try:
            outcome = self.target.run(data)
        except Exception as error:
            self._keep(data, error)
            return False
        self.slowest_s = max(self.slowest_s, time.monotonic() - at)
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        return self.outcomes[outcome] == 1

    def _keep(self, data: bytes, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        place = "|".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-3:])
        key = f"{type(error).__name__}|{place}"
        if key in self.findings:
            return
        name = hashlib.sha256(key.encode()).hexdigest()[:12]
        self.findings[key] = name
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(data)
        text = "".join(traceback.format_exception(error))
        (self.folder / f"{name}.txt").write_text(text)
        print(f"FINDING {name} of {len(data)} bytes\n{text[-1500:]}", flush=True)

    def report(self) -> str:
        seconds = time.monotonic() - self.began
        outcomes = ", ".join(
            f"{word} {count}" for word, count in sorted(self.outcomes.items(), key=lambda x: -x[1])[:12]
        )
        return (
            f"{self.count} inputs in {seconds:.0f} s ({self.count / max(seconds, 0.001):.0f}/s), "
            f"slowest {self.slowest_s * 1000:.0f} ms, {len(self.outcomes)} outcomes ({outcomes}), "
            f"{len(self.findings)} findings"
        )


def replay(name: str, target: Target) -> int:
    """Run every seed and every input of the kept corpus; return how many."""
    count = 0
    for data in (*target.seeds(), *(path.read_bytes() for path in sorted((CORPUS / name).glob("*")))):
        target.run(data)
        count += 1
    return count


def search(session: Session, seconds: float, seed: int) -> None:
    """Mutate what is known, and keep what leads to an outcome never seen."""
    dice = random.Random(seed)
    known = list(session.target.seeds())
    for data in known:
        session.run(data)
    end, said = time.monotonic() + seconds, time.monotonic()
    while time.monotonic() < end:
        data = dice.choice(known)
        for _ in range(dice.choice((1, 1, 2, 3, 5))):
            data = session.target.mutate(data, dice)
        if session.run(data) and len(known) < 5000:
            known.append(data)
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(session.report(), flush=True)


def search_by_coverage(session: Session, seconds: float, seed: int, corpus: Path) -> None:
    """Let libFuzzer (through atheris) choose; never returns, since libFuzzer ends the process itself."""
    import atheris

    corpus.mkdir(parents=True, exist_ok=True)
    session.folder.parent.mkdir(parents=True, exist_ok=True)
    for data in session.target.seeds():
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def mutate(data: bytes, size_max: int, number: int) -> bytes:
        dice = random.Random(number)
        if dice.random() < 0.25:
            return bytes(atheris.Mutate(data, size_max))
        for _ in range(dice.choice((1, 1, 2, 4))):
            data = session.target.mutate(data, dice)
        return data[:size_max]

    said = [time.monotonic()]

    def one(data: bytes) -> int:
        session.run(data)
        now = time.monotonic()
        is_over = now - session.began > seconds
        if now - said[0] > 60 or is_over:
            said[0] = now
            print(session.report(), flush=True)
        if is_over:
            os._exit(1 if session.findings else 0)  # libFuzzer would, too, without a word of ours
        return 0

    flags = [
        f"-seed={seed or 1}",
        "-max_len=65536",
        "-timeout=60",
        "-rss_limit_mb=1500",
        "-len_control=0",
        "-verbosity=0",
    ]
    flags += [f"-artifact_prefix={session.folder}-"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()
