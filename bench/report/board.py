"""A board: the small file in `reports/` that says which scores stand on a page, how they rank and what is drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from bench.text import brief, closest, read_toml
from bench.types import Error, UsageError

NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,79}")  # a board's, from which its folder is named
KINDS = {  # what each kind of figure needs
    "scatter": ("x", "y"),
    "profile": ("metric",),
    "forest": ("metric",),
    "tradeoff": ("y", "vary"),
}


@dataclass(frozen=True)
class Select:
    """Which runs: patterns of suite and of model label. `complete` leaves partial runs out, counted."""

    suite: tuple[str, ...] = ("*",)
    model: tuple[str, ...] = ("*",)
    complete: bool = True


@dataclass(frozen=True)
class Column:
    """One number of the table: `suite:metric@slice`."""

    suite: str
    metric: str
    slice: str = "all"
    label: str = ""
    digits: int | None = None  # after the point; None: two significant digits of the interval

    @property
    def key(self) -> str:
        return f"{self.suite}:{self.metric}" + ("" if self.slice == "all" else f"@{self.slice}")

    @property
    def title(self) -> str:
        return self.label or self.metric + ("" if self.slice == "all" else f" ({self.slice})")


@dataclass(frozen=True)
class Plot:
    """One figure. scatter: y over x, both with intervals; models of one family (labels but for a last number) are
    joined. profile: the scores `metric.<suffix>` over their suffixes. forest: one metric, model by model. tradeoff: y
    over x, or over `vary` where x is left out; models that differ in their argument `vary` alone are joined."""

    kind: str
    suite: str
    title: str
    x: str = ""
    y: str = ""
    metric: str = ""
    vary: str = ""  # an argument of the models, a number
    note: str = ""


@dataclass(frozen=True)
class Rank:
    """`by` names a column as `suite:metric`. Models share ranks where the paired interval covers zero."""

    by: str
    ties: str = "interval"


@dataclass(frozen=True)
class Gallery:
    items: int = 8  # pictures shown per page, at most 48 with their models


@dataclass(frozen=True)
class Board:
    name: str
    title: str
    about: str = ""
    sources: tuple[str, ...] = ("store",)
    select: Select = Select()
    column: tuple[Column, ...] = ()
    rank: Rank | None = None
    figure: tuple[Plot, ...] = ()
    gallery: Gallery = Gallery()
    folder: Path = field(default=Path("."), compare=False)  # where the file lies; sources are found from here


def read_board(path: Path) -> Board:
    """Reads a board file; raises Error naming file and key for what it does not know."""
    path = Path(path)
    if not NAME.fullmatch(path.stem):
        raise Error(f"{path}: a board is not called {path.stem!r}", hint="letters, digits, and - . _ between them")
    value = read_toml(path, hint="a board is TOML, reports/<name>.toml: a title, [[column]], [rank]")
    board = _build(Board, {**value, "name": path.stem, "folder": path.parent}, str(path), ("name", "folder"))
    if not board.column:
        raise Error(f"{path}: no column", hint='add one: [[column]] suite = "reconstruction" metric = "psnr"')
    for source in board.sources:
        if source != "store" and (Path(source).is_absolute() or ".." in Path(source).parts or "\0" in source):
            raise Error(
                f"{path}: sources: {brief(source)!r} lies elsewhere", hint="`store`, or CSV files beside the board"
            )
    for column in board.column:
        if column.digits is not None and not 0 <= column.digits <= 15:
            raise Error(f"{path}: [[column]] {brief(column.key)}: digits = {column.digits}", hint="0 to 15")
    keys = [c.key for c in board.column]
    for key in {k for k in keys if keys.count(k) > 1}:
        raise Error(f"{path}: column {brief(key)} stands twice", hint="remove one")
    if board.rank and board.rank.by not in keys:
        raise Error(f"{path}: rank.by = {brief(board.rank.by)!r} is no column", hint=closest(board.rank.by, keys))
    if board.rank and board.rank.ties != "interval":
        raise Error(f"{path}: rank.ties = {brief(board.rank.ties)!r}", hint='the one rule is "interval"')
    if not 0 <= board.gallery.items <= 48:
        raise Error(f"{path}: gallery.items = {board.gallery.items}", hint="0 to 48")
    for plot in board.figure:
        if plot.kind not in KINDS:
            raise Error(f"{path}: figure kind {brief(plot.kind)!r}", hint=closest(plot.kind, KINDS))
        needs = KINDS[plot.kind]
        for name in needs:
            if not getattr(plot, name):
                raise Error(
                    f"{path}: figure {brief(plot.title)!r} has no {name}",
                    hint=f"a {plot.kind} needs {' and '.join(needs)}",
                )
    return board


def find_board(name: str | None = None) -> Path:
    """The file of a board: a path, a name in `reports/`, or without a name the only board, else `leaderboard`.

    Boards of the working folder come before those that the harness brings. Raises UsageError with suggestions.
    """
    from bench.manifest_places import shared_folder

    if name and (name.endswith(".toml") or "/" in name):
        return Path(name)
    known: dict[str, Path] = {}
    for place in shared_folder("reports"):
        for path in sorted(place.glob("*.toml")):
            known.setdefault(path.stem, path)
    if name is None and len(known) == 1:
        return next(iter(known.values()))
    wanted = name or "leaderboard"
    if wanted in known:
        return known[wanted]
    if not known:
        raise UsageError("no board: there is no reports/*.toml", hint="write one, or give a path")
    if name is None:
        raise UsageError("which board?", hint=f"bench leaderboard {' | '.join(sorted(known))}")
    raise UsageError(f"no board is called {name!r}", hint=closest(name, known))


NESTED = {"select": Select, "rank": Rank, "gallery": Gallery, "column": [Column], "figure": [Plot]}


def _build(kind: type, value: Any, where: str, given: tuple[str, ...] = ()) -> Any:
    """A dataclass from a TOML table: unknown keys, missing keys and wrong types are errors."""
    if not isinstance(value, Mapping):
        raise Error(f"{where}: must be a table, not {brief(repr(value))}")
    known = {f.name: f for f in fields(kind)}
    for key in value:
        if key not in known:
            raise Error(f"{where}: unknown key {brief(key)!r}", hint=closest(key, [k for k in known if k not in given]))
    filled = {}
    for name, f in known.items():
        if name not in value:
            if f.default is MISSING:
                raise Error(f"{where}: {name!r} is missing")
            continue
        filled[name] = value[name] if name in given else _convert(name, str(f.type), value[name], where)
    return kind(**filled)


def _convert(name: str, kind: str, value: Any, where: str) -> Any:
    nested = NESTED.get(name)
    if isinstance(nested, list):
        if not isinstance(value, list):
            raise Error(f"{where}: {name} must be written [[{name}]]")
        return tuple(_build(nested[0], v, f"{where}: [[{name}]] {i}") for i, v in enumerate(value, 1))
    if nested:
        return _build(nested, value, f"{where}: [{name}]")
    if kind.startswith("tuple"):
        value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
        if isinstance(value, tuple) and all(isinstance(v, str) for v in value):
            return value
        raise Error(f"{where}: {name} must be a list of strings")
    expected = {"str": str, "bool": bool}.get(kind, int)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise Error(
            f"{where}: {name} = {brief(repr(value))} must be {'a string' if expected is str else expected.__name__}"
        )
    return value
