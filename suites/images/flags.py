"""What about two sets of pictures could explain their distance by itself: storage, sizes, repeats, leakage.

Works on columns, one entry per picture: nothing of the harness is needed here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

GENERATED, REFERENCE = "generated", "reference"
SIDES = (GENERATED, REFERENCE)


def content(picture: np.ndarray) -> str:
    """16 hex digits that equal pictures share, of uint8 [H, W, 3]."""
    shape = "x".join(map(str, picture.shape)).encode()
    return hashlib.blake2b(shape + b"|" + np.ascontiguousarray(picture).tobytes(), digest_size=8).hexdigest()


def overlap(sides: Sequence[str], contents: Sequence[str]) -> dict[str, int]:
    """How many pictures have an equal one: `generated` and `reference` within their set, `shared` generated ones that
    stand in the reference."""
    sets = {side: Counter(c for s, c in zip(sides, contents, strict=True) if s == side) for side in SIDES}
    found = {side: sum(counts.values()) - len(counts) for side, counts in sets.items()}
    found["shared"] = sum(n for c, n in sets[GENERATED].items() if c in sets[REFERENCE])
    return found


def sentences(rows: Sequence[Mapping[str, object]], size: int | None) -> list[str]:
    """What a reader of any distance between the two sets must know; empty where there is nothing, or no two sets.

    Rows hold `side`, `format` (or None), `width`, `height` in px as stored, and `content`; `size` in px is what both
    sets were brought to, or None.
    """
    found = []
    sets = {side: [row for row in rows if row["side"] == side] for side in SIDES}
    if not all(sets.values()):
        return []
    formats = {side: Counter(str(r["format"]) for r in part if r["format"]) for side, part in sets.items()}
    if all(formats.values()) and (
        formats[GENERATED].keys() != formats[REFERENCE].keys() or any(len(f) > 1 for f in formats.values())
    ):
        found.append(f"stored as {_counted(formats[GENERATED])}, the reference as {_counted(formats[REFERENCE])}")
    sizes = {side: {(r["width"], r["height"]) for r in part} for side, part in sets.items()}
    if sizes[GENERATED] != sizes[REFERENCE] or any(len(s) > 1 for s in sizes.values()):
        found.append(f"of {_sizes(sizes[GENERATED])}, the reference of {_sizes(sizes[REFERENCE])}")
    if size:
        resized = [f"{n:,} {side}" for side in SIDES if (n := sum(_resized(r, size) for r in sets[side]))]
        if resized:
            found.append(f"{' and '.join(resized)} pictures resized to {size} px")
    equal = overlap([str(r["side"]) for r in rows], [str(r["content"]) for r in rows])
    for side in SIDES:
        if equal[side]:
            found.append(f"{_pictures(equal[side], side)} repeat{'s' * (equal[side] == 1)} another one")
    if equal["shared"]:
        stand = "stands" if equal["shared"] == 1 else "stand"
        all_of_them = "all " if equal["shared"] == len(sets[GENERATED]) > 1 else ""
        found.append(f"{all_of_them}{_pictures(equal['shared'], GENERATED)} {stand} in the reference, too")
    return found


def _counted(formats: Counter[str]) -> str:
    """`PNG`, or `PNG (30) and JPEG (12)`."""
    if len(formats) == 1:
        return next(iter(formats))
    return " and ".join(f"{name} ({n:,})" for name, n in formats.most_common())


def _sizes(sizes: set[tuple[object, object]]) -> str:
    if len(sizes) == 1:
        return "{}x{} px".format(*next(iter(sizes)))
    low, high = (pick(sizes, key=lambda s: (s[0] * s[1], s)) for pick in (min, max))
    return f"{len(sizes):,} sizes from {low[0]}x{low[1]} to {high[0]}x{high[1]} px"


def _resized(row: Mapping[str, object], size: int) -> bool:
    return (row["width"], row["height"]) != (size, size)


def _pictures(n: int, side: str) -> str:
    return f"{n:,} {side} picture{'s' * (n != 1)}"
