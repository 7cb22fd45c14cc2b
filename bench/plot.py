"""Draws ratios to a peer on a logarithmic axis as SVG, in colours for light and dark pages. Called by `report`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, LINE, TOP = 860, 190, 600, 24, 58
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.card { fill: #ffffff; stroke: #d1d9e0 } .soft, .axis { fill: #59636e; font-size: 12px } .title { font-weight: 600 }
.grid { stroke: #e3e7eb } .peer { stroke: #59636e; stroke-width: 1.5 } .aim { stroke: #1f2328; stroke-width: 2.5 }
.good { fill: #2f81c7 } .bad { fill: #d9762b }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .card { fill: #0d1117; stroke: #3d444d } .soft, .axis { fill: #9198a1 }
  .grid { stroke: #262c34 } .peer { stroke: #9198a1 } .aim { stroke: #f0f6fc }
  .good { fill: #4493f8 } .bad { fill: #e8904c }
}
"""


@dataclass(frozen=True)
class Bar:
    """One row: `value` and `aim` as multiples of the peer's cost (below 1 is better)."""

    name: str
    text: str
    value: float
    aim: float | None
    is_good: bool


def draw(parts: list[tuple[str, list[Bar]]]) -> str:
    """Return the picture of all bars, in parts with a title each."""
    bars = [bar for _, part in parts for bar in part]
    values = [1.0, *(bar.value for bar in bars), *(bar.aim for bar in bars if bar.aim)]
    low, high = math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08

    def at(value: float) -> float:
        return round(LEFT + (math.log10(value) - low) / (high - low) * (RIGHT - LEFT), 1)

    height = TOP + LINE * (len(bars) + len(parts)) + 14
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f'<style>{STYLE}</style><rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        *_legend(),
    ]
    for tick in _ticks(low, high):
        kind, x = "peer" if tick == 1 else "grid", at(tick)
        out.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{TOP}" y2="{height - 10}"/>')
        out.append(f'<text class="axis" x="{x}" y="{TOP - 6}" text-anchor="middle">{_tick_text(tick)}</text>')
    y = TOP
    for title, part in parts:
        y += LINE
        out.append(f'<text class="title" x="16" y="{y - 6}">{escape(title)}</text>')
        for bar in part:
            y += LINE
            out += _bar(bar, y, at)
    return "\n".join([*out, "</svg>", ""])


def _bar(bar: Bar, y: int, at: Callable[[float], float]) -> list[str]:
    left, right = sorted((at(bar.value), at(1.0)))
    kind = "good" if bar.is_good else "bad"
    lines = [
        f'<text x="24" y="{y - 7}">{escape(bar.name)}</text>',
        f'<rect class="{kind}" x="{left}" y="{y - 18}" width="{max(right - left, 1.5):.1f}" height="13" rx="2"/>',
        f'<text class="soft" x="{RIGHT + 14}" y="{y - 7}">{escape(bar.text)}</text>',
    ]
    if bar.aim:
        lines.append(f'<line class="aim" x1="{at(bar.aim)}" x2="{at(bar.aim)}" y1="{y - 22}" y2="{y - 1}"/>')
    return lines


def _legend() -> list[str]:
    y = 22
    out = [f'<line class="aim" x1="418" x2="418" y1="{y - 13}" y2="{y + 4}"/>']
    for x, kind in ((16, "good"), (172, "bad")):
        out.append(f'<rect class="{kind}" x="{x}" y="{y - 10}" width="22" height="11" rx="2"/>')
    words = {44: "aim met, or better", 200: "aim missed, or none and worse", 426: "aim"}
    words[RIGHT + 14] = "ours / peer; further left is better"
    return out + [f'<text class="soft" x="{x}" y="{y}">{text}</text>' for x, text in words.items()]


def _ticks(low: float, high: float) -> list[float]:
    found = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in (1, 2, 5)]
    inside = [tick for tick in found if low <= math.log10(tick) <= high]
    return inside if len(inside) < 9 else [tick for tick in inside if math.log10(tick) % 1 == 0]


def _tick_text(tick: float) -> str:
    if tick == 1:
        return "the peer"
    return f"{tick:g}×" if tick > 1 else f"1/{round(1 / tick)}"
