"""A picture of rows of bars, side by side under headings, as an SVG that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from torchtitan_tp_validate.cli.files import visible

_LABEL, _BAR, _GAP, _ROW, _LINE = 240, 320, 90, 26, 20
_TOP = 3 * _LINE
_COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        parts: what it is made of, and how much of it.
        instead: what stands in its place, or empty.
    """

    parts: tuple[tuple[str, float], ...] = ()
    instead: str = ""

    @property
    def total(self) -> float:
        """All of its parts."""
        return sum(size for _, size in self.parts)


@dataclass(frozen=True)
class Column:
    """Bars of one kind, the longest of which is as wide as the column.

    Attributes:
        heading: what they show.
        unit: of the sizes of their parts.
        bars: one for each row.
    """

    heading: str
    unit: str
    bars: Sequence[Bar]


def svg(title: str, labels: Sequence[str], columns: Sequence[Column]) -> Iterator[str]:
    """Yield the lines of a picture.

    Args:
        title: what stands above it.
        labels: of the rows.
        columns: side by side, of as many bars as there are rows.
    """
    names = [list(dict.fromkeys(name for bar in one.bars for name, _ in bar.parts)) for one in columns]
    legend = max(map(len, names), default=0)
    width = _LABEL + len(columns) * (_BAR + _GAP)
    height = _TOP + _ROW * len(labels) + _LINE * (legend + 1)
    yield f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    yield ' font-family="sans-serif" font-size="13">\n'
    yield '<rect width="100%" height="100%" fill="white"/>\n'
    yield _text(8, _LINE, title, weight="bold")
    for row, label in enumerate(labels):
        yield _text(8, _baseline(row), label)
    for number, (column, known) in enumerate(zip(columns, names, strict=True)):
        left = _LABEL + number * (_BAR + _GAP)
        yield _text(left, 2 * _LINE + 8, f"{column.heading}, {column.unit}", weight="bold")
        longest = max((bar.total for bar in column.bars), default=0) or 1
        for row, bar in enumerate(column.bars):
            yield from _bar(left, row, bar, column.unit, known, _BAR / longest)
        for place, name in enumerate(known):
            at = _TOP + _ROW * len(labels) + _LINE * place
            yield f'<rect x="{left}" y="{at + 4}" width="12" height="12" fill="{_color(place)}"/>\n'
            yield _text(left + 18, at + 15, name)
    yield "</svg>\n"


def _bar(left: int, row: int, bar: Bar, unit: str, known: Sequence[str], scale: float) -> Iterator[str]:
    if bar.instead:
        yield _text(left, _baseline(row), bar.instead)
        return
    at = float(left)
    for name, size in bar.parts:
        title = f"<title>{escape(visible(name))}: {size:.2f} {unit}</title>"
        place = f'x="{at:.1f}" y="{_TOP + _ROW * row + 4}" width="{size * scale:.1f}" height="{_ROW - 8}"'
        yield f'<rect {place} fill="{_color(known.index(name))}">{title}</rect>\n'
        at += size * scale
    yield _text(at + 6, _baseline(row), f"{bar.total:.2f}")


def _color(place: int) -> str:
    return _COLORS[place % len(_COLORS)]


def _baseline(row: int) -> int:
    return _TOP + _ROW * row + 18


def _text(x: float, y: int, text: str, weight: str = "normal") -> str:
    return f'<text x="{x:.0f}" y="{y}" font-weight="{weight}">{escape(visible(text))}</text>\n'
