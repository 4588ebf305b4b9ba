"""Ranks with ties: two models share ranks where the paired interval of their difference covers zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench import stats
from bench.compare import protocol_of, set_differences
from bench.report.collect import Cell, Collection
from bench.types import Estimate, Score, Table


class Differences:
    """Compares cells of one column. Rows are read only for pairs whose own intervals overlap, and each run once."""

    def __init__(self, found: Collection):
        self.found = found
        self.pairs: dict[tuple[str, str, str], Estimate] = {}  # (column, run a, run b) -> a - b
        self._rows: dict[str, _Rows | None] = {}
        self._of_sets: dict[tuple[str, str], dict[str, Estimate]] = {}  # (run a, run b) -> score -> a - b

    def distinct(self, column: str, a: Cell, b: Cell) -> bool:
        """Is the difference of two scores sure? Intervals that do not touch settle it: the standard error of a
        difference is at most the sum of both. Otherwise the paired interval over shared items decides, of rows or of
        sets of features; where there is none, overlapping or absent intervals leave the pair tied."""
        if None not in (a.score.low, a.score.high, b.score.low, b.score.high) and (
            a.score.high < b.score.low or b.score.high < a.score.low
        ):
            return True
        if b.score.run < a.score.run:
            a, b = b, a
        key = (column, a.score.run, b.score.run)
        if key not in self.pairs:
            found = self._paired(a, b) or self._sets(a, b) or self.found.pairs.get(key)
            if found is None:
                return False
            self.pairs[key] = found
        e = self.pairs[key]
        return e.low is not None and e.high is not None and (e.low > 0 or e.high < 0)

    def _paired(self, a: Cell, b: Cell) -> Estimate | None:
        rows = [self._load(c.score.run) for c in (a, b)]
        if rows[0] is None or rows[1] is None:
            return None
        values = [r.values(c) for r, c in zip(rows, (a, b), strict=True)]
        if values[0] is None or values[1] is None:
            return None
        first, second = rows
        if first.keys == second.keys:
            return stats.paired_difference(*values, first.clusters, a.facts.seed)
        places = {key: i for i, key in enumerate(second.keys)}
        shared = [i for i, key in enumerate(first.keys) if key in places]
        sides = values[0][shared], values[1][[places[first.keys[i]] for i in shared]]
        return stats.paired_difference(*sides, [first.clusters[i] for i in shared], a.facts.seed)

    def _sets(self, a: Cell, b: Cell) -> Estimate | None:
        """The paired difference of a score of two sets of features, which has no rows of its own."""
        runs = [self.found.runs.get(c.score.run) for c in (a, b)]
        if None in runs or a.score.slice != "all" or protocol_of(a.score.signature) != protocol_of(b.score.signature):
            return None
        key = (a.score.run, b.score.run)
        if key not in self._of_sets:
            self._of_sets[key] = set_differences(runs[0], runs[1].table(), runs[0].table())
        return self._of_sets[key].get(a.score.metric)

    def _load(self, run_id: str) -> _Rows | None:
        if run_id not in self._rows:
            run = self.found.runs.get(run_id)
            self._rows[run_id] = None if run is None else _Rows(run.table(), self.found)
        return self._rows[run_id]


class _Rows:
    """The columns of one run that may be compared, by item; light enough to keep for a thousand runs."""

    def __init__(self, table: Table, found: Collection):
        names = {n for c in found.board.column for n in column_names(c.metric)}
        slices = {c.slice.partition("=")[0] for c in found.board.column if c.slice != "all"}
        seen: dict[str, int] = {}
        self.keys = []
        for row in table.rows:
            item = str(row["item"])
            seen[item] = seen.get(item, 0) + 1
            self.keys.append((item, seen[item]))  # an item may stand in several rows: one per sample
        self.clusters = table.clusters()
        present = {name for row in table.rows for name in row}
        self.columns = {name: table.values(name) for name in names & present}
        self.slices = {name: table.column(name) for name in slices & present}
        self._found: dict[tuple[str, str], np.ndarray | None] = {}

    def values(self, cell: Cell) -> np.ndarray | None:
        """Per row the values whose mean is the score, NaN elsewhere; None where the score is no mean of one column."""
        key = (cell.score.metric, cell.score.slice)
        if key not in self._found:
            self._found[key] = self._find(cell.score)
        return self._found[key]

    def _find(self, score: Score) -> np.ndarray | None:
        picked = np.ones(len(self.keys), bool)
        if score.slice != "all":
            name, _, value = score.slice.partition("=")
            if name not in self.slices:
                return None
            picked = np.array([str(v) == value for v in self.slices[name]])
        for name in column_names(score.metric):
            if name in self.columns:
                values = np.where(picked, self.columns[name], np.nan)
                if np.isfinite(values).any() and math.isclose(
                    np.nanmean(values), score.value, rel_tol=1e-6, abs_tol=1e-12
                ):
                    return values
        return None


def column_names(metric: str) -> tuple[str, ...]:
    """The names a metric's column may have in the rows; that it is the right one is checked by its mean."""
    plain = metric.replace("-", "_").replace(".", "_")
    return tuple(dict.fromkeys((metric, plain, metric.replace(".", "-"), metric.replace("-", "_"))))


def ranks(differences: Differences, column: str, cells: Sequence[Cell | None]) -> list[tuple[int, int] | None]:
    """For each cell its shared rank (first, last), counted from 1; None for what is partial, withheld or absent."""
    places = [i for i, c in enumerate(cells) if c is not None and c.ranked]
    result: list[tuple[int, int] | None] = [None] * len(cells)
    picked: list[Any] = [cells[i] for i in places]
    if not picked or picked[0].score.better == "none":
        return result
    values = [c.score.value for c in picked]
    found = stats.ranks(values, picked[0].score.better, lambda i, j: differences.distinct(column, picked[i], picked[j]))
    for place, rank in zip(places, found, strict=True):
        result[place] = rank
    return result


def best(differences: Differences, column: str, cells: Sequence[Cell | None]) -> int | None:
    """The place of the one cell that is distinguishably better than every other; None where there is no such cell."""
    picked = [(i, c) for i, c in enumerate(cells) if c is not None and c.ranked]
    if len(picked) < 2 or picked[0][1].score.better == "none":
        return None
    sign = -1 if picked[0][1].score.better == "higher" else 1
    (place, first), *others = sorted(picked, key=lambda p: (sign * p[1].score.value, p[0]))
    return place if all(differences.distinct(column, first, c) for _, c in others) else None
