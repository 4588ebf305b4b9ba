"""Numbers as the page and the tables print them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.report.board import Column
from bench.report.collect import Cell
from bench.types import Score


def count(n: int, word: str) -> str:
    return f"{n:,} {word}" + ("" if n == 1 else "s")


def number(value: float, digits: int) -> str:
    """Fixed digits with a real minus sign; what is too large or small for them in scientific form."""
    if value and (abs(value) >= 1e7 or (abs(value) < 0.5 * 10.0**-digits and abs(value) < 1e-4)):
        return f"{value:.{max(digits, 1)}e}".replace("-", "−")
    text = f"{value:,.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else f"{0:.{digits}f}"


def digits_for(column: Column, cells: Sequence[Cell | None]) -> int:
    """As the board says, else two significant digits of the median half-width, else three of the values."""
    if column.digits is not None:
        return column.digits
    scores = [c.score for c in cells if c is not None and c.score.value is not None]
    widths = sorted((s.high - s.low) / 2 for s in scores if s.low is not None and s.high is not None and s.high > s.low)
    values = sorted(abs(s.value) for s in scores if s.value)
    if widths:
        return min(6, max(0, 1 - math.floor(math.log10(widths[len(widths) // 2]))))
    return min(6, max(0, 2 - math.floor(math.log10(values[len(values) // 2])))) if values else 2


def interval(score: Score, digits: int) -> str:
    """`±0.72` where both sides are equal to the digits shown, else `30.96–32.41`; empty without an interval."""
    if score.value is None or score.low is None or score.high is None:
        return ""
    below, above = score.value - score.low, score.high - score.value
    width = max(below, above)
    if abs(below - above) < 0.5 * 10.0**-digits and min(below, above) >= 0:
        hidden = 0 < width < 0.5 * 10.0**-digits  # then one significant digit says more than a row of zeros
        more = min(9, -int(f"{width:.0e}".partition("e")[2])) if hidden else digits
        return "±" + number(width, more)
    return f"{number(score.low, digits)}–{number(score.high, digits)}"


def rank_text(place: tuple[int, int] | None) -> str:
    if place is None:
        return ""
    return str(place[0]) if place[0] == place[1] else f"{place[0]}–{place[1]}"


def decimals(scores: Sequence[Score]) -> int:
    """Digits after the point as a source printed them: those of its longest number, as 1.00 is read as 1.0."""
    return max((len(f"{s.value:.10f}".rstrip("0").partition(".")[2]) for s in scores if s.value is not None), default=0)
