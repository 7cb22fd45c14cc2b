"""How every benchmark measures: ours and the peer in turn, in one run, and the ratio round by round."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results.json"


class Interrupted(Exception):
    """Somebody pressed Ctrl-C: what was begun is cleaned up, and nothing more is begun."""


class _Wish:
    is_stop = False


def ask_stop() -> None:
    """Have the next `check_stop` raise; for a signal handler, so that no clean-up is cut in two."""
    _Wish.is_stop = True


def is_stop_asked() -> bool:
    return _Wish.is_stop


def check_stop() -> None:
    """Raise `Interrupted` if somebody wants this to end. Called where it is safe to end: between rounds."""
    if _Wish.is_stop:
        raise Interrupted


@dataclass(frozen=True)
class Row:
    """One line of the table. `ratio` is the median over rounds of ours/peer; `spread` its first and third quartile."""

    name: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    unit: str
    runs: int
    spread: tuple[float, float]


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def row(name: str, ours: list[float], peer: list[float], peer_name: str, unit: str, runs: int = 0) -> Row:
    """Make a row from paired rounds."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    low, high = quartiles(ratios)
    return Row(
        name=name,
        ours=round(statistics.median(ours), 4),
        peer=round(statistics.median(peer), 4),
        peer_name=peer_name,
        ratio=round(statistics.median(ratios), 3),
        unit=unit,
        runs=runs or len(ours),
        spread=(round(low, 3), round(high, 3)),
    )


def interleave(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run the arms in turn, `rounds` times, every other round in reverse order; one warm-up each."""
    for arm in arms.values():
        check_stop()
        arm()
    values: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms) if number % 2 == 0 else reversed(list(arms)):
            check_stop()
            values[name].append(arms[name]())
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return values


def show(rows: list[Row]) -> str:
    """Write the table that `make bench` prints."""
    head = f"{'name':<20} {'ours':>10} {'peer':>10} {'unit':<8} {'ratio':>7} {'quartiles':>15} {'runs':>5}  peer"
    lines = [head, "-" * len(head)]
    for r in rows:
        spread = f"{r.spread[0]:.2f} .. {r.spread[1]:.2f}"
        numbers = f"{r.ours:>10.3f} {r.peer:>10.3f} {r.unit:<8} {r.ratio:>7.2f} {spread:>15} {r.runs:>5}"
        lines.append(f"{r.name:<20} {numbers}  {r.peer_name}")
    return "\n".join(lines)


def save(rows: list[Row]) -> None:
    """Replace the rows of these names in results.json."""
    try:
        old = json.loads(RESULTS.read_text())
    except (OSError, ValueError):
        old = []
    names = {r.name for r in rows}
    kept = [entry for entry in old if entry["name"] not in names]
    RESULTS.write_text(json.dumps(kept + [asdict(r) for r in rows], indent=1) + "\n")
