"""A plan as a picture: from the top down, stages on the accelerator to the left and sites on the CPU to the right."""

from __future__ import annotations

import textwrap
from typing import Protocol
from xml.sax.saxutils import escape

_WIDTH, _BOX, _LINE, _GAP = 860, 400, 16, 14
_FILL = {"stage": "#dbe9f6", "site": "#fde6cf"}


class Parts(Protocol):
    """What a picture shows of a plan."""

    @property
    def headline(self) -> str: ...

    def parts(self) -> list[tuple[str, str]]: ...


def picture(plan: Parts) -> str:
    """The SVG text: one box for each run of equal stages or sites, from the top down, joined by arrows."""
    boxes, arrows, y = [], [], 48
    last: tuple[int, int] | None = None  # middle and bottom of the box before
    for name, text in plan.parts():
        kind = "stage" if name.startswith("stage") else "site"
        x = 20 if kind == "stage" else _WIDTH - _BOX - 20
        lines = [name, *textwrap.wrap(text, 58)]
        height = _LINE * len(lines) + 14
        boxes.append(_box(x, y, height, lines, _FILL[kind]))
        middle = x + _BOX // 2
        if last is not None:
            arrows.append(_arrow(last[0], last[1], middle, y))
        last = (middle, y + height)
        y += height + _GAP * 2
    return _document(plan.headline, y, [*arrows, *boxes])


def _box(x: int, y: int, height: int, lines: list[str], fill: str) -> str:
    weights = ["bold", *["normal"] * (len(lines) - 1)]
    text = "".join(
        f'<text x="{x + 10}" y="{y + 18 + _LINE * row}" font-weight="{weight}">{escape(line)}</text>'
        for row, (line, weight) in enumerate(zip(lines, weights, strict=True))
    )
    return f'<rect x="{x}" y="{y}" width="{_BOX}" height="{height}" rx="6" fill="{fill}" stroke="#555"/>{text}'


def _arrow(x0: int, y0: int, x1: int, y1: int) -> str:
    return f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1 - 2}" stroke="#555" marker-end="url(#tip)"/>'


def _document(title: str, height: int, shapes: list[str]) -> str:
    size = f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12"'
    tip = '<marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
    tip += '<path d="M0,0 L6,3 L0,6 z"/></marker>'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f"<defs>{tip}</defs>",
        f'<text x="20" y="26" font-size="13">{escape(title)}</text>',
        *shapes,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
