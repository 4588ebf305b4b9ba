"""Precision, recall, density and coverage of a generated set by nearest neighbours, with counts equal to float64's.

The ball of a row reaches to its k-th nearest neighbour in its own set. Precision and recall: Kynkäänniemi et al.,
arXiv 1904.06991, equations 1 and 2; density and coverage: Naeem et al., arXiv 2002.09797, equations 3 and 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from bench import stats
from bench.metrics.sets import SetMetric, check_pair
from bench.types import Error, Estimate, UsageError

TILE = 1024  # rows of the blocks of distances: 4 MB of float32, as fast as larger ones
PAIRS = 1 << 20  # numbers of a chunk that is computed again in float64
FEWEST = 10  # covered and uncovered rows that an interval of coverage needs
UNIT = float(np.finfo(np.float32).eps) / 2  # of rounding
TINY = float(np.finfo(np.float32).tiny)


class Prdc(NamedTuple):
    """The four shares and what they count. Density may exceed 1."""

    precision: float  # share of generated rows inside some reference ball
    recall: float  # share of reference rows inside some generated ball
    density: float  # mean number of reference balls that hold a generated row, over k
    coverage: float  # share of reference rows whose ball holds some generated row
    hits: np.ndarray  # int64 [n]: the reference balls that hold each generated row
    alone: np.ndarray  # int64 [n]: those that hold no other
    recalled: np.ndarray  # bool [m]
    covered: np.ndarray  # bool [m]
    copies: int  # reference rows with k copies of themselves: their balls have radius 0


def prdc(generated: np.ndarray, reference: np.ndarray, k: int = 5, radius: Literal["<", "<="] = "<") -> Prdc:
    """Precision, recall, density and coverage of features [n, d] against a reference [m, d], Euclidean.

    `radius`: does a row on the surface of a ball lie inside? "<" no (prdc, dgm-eval), "<=" yes (improved precision and
    recall, torch-fidelity); only copies tell them apart. Distances are float32 blocks with a bound on their rounding;
    what the bound leaves open is computed again in float64. Memory: a few blocks, whatever n.
    Raises Error where a set has not more than k rows or its features are at fault.
    """
    if radius not in ("<", "<="):
        raise UsageError(f"radius must be '<' or '<=', not {radius!r}")
    if k < 1:
        raise UsageError(f"k = {k}: at least one neighbour is needed")
    generated, reference = check_pair(generated, reference)
    for which, rows in (("generated", generated), ("reference", reference)):
        if len(rows) <= k:
            raise Error(f"the {which} set has {len(rows)} rows; {k} neighbours of each need {k + 1}")
    centre = reference.mean(axis=0, dtype=np.float64).astype(reference.dtype)
    largest = max(float(np.abs(rows[i] - centre).max()) for rows in (generated, reference) for i in _blocks(len(rows)))
    if not np.isfinite(largest):
        raise Error(f"distances of these features leave {generated.dtype}", hint="scale them")
    power = float(np.clip(-np.ceil(np.log2(largest)), -126, 126))
    scale = 2.0**power  # exact, and no square leaves float32
    fake, real = _Rows(generated, centre, scale), _Rows(reference, centre, scale)
    fake_ball, real_ball = _balls(fake, k), _balls(real, k)
    hits, held = np.zeros(len(generated), np.int64), np.zeros(len(reference), np.int64)
    places = np.zeros(len(reference))  # sum of the numbers of the generated rows in each reference ball
    recalled = np.zeros(len(reference), bool)
    open_real: list[tuple[np.ndarray, np.ndarray]] = []  # (reference row, generated row) that rounding leaves open
    open_fake: list[tuple[np.ndarray, np.ndarray]] = []
    for i in _blocks(len(reference)):
        a = real.block(i)
        for j in _blocks(len(generated)):
            low = _lower(a, b := fake.block(j))
            maybe_real, maybe_fake = low <= real_ball.high[i, None], low <= fake_ball.high[j]
            low += 2 * b.slack
            low += 2 * a.slack[:, None]  # now an upper bound
            inside_real, inside_fake = low < real_ball.low[i, None], low < fake_ball.low[j]
            recalled[i] |= inside_fake.any(1)
            rows, columns = _true(inside_real)
            _count(hits, held, places, rows + i.start, columns + j.start)
            for found, maybe, inside in ((open_real, maybe_real, inside_real), (open_fake, maybe_fake, inside_fake)):
                rows, columns = _true(maybe ^ inside)
                found.append((rows + i.start, columns + j.start))
    rows, columns = map(np.concatenate, zip(*open_real, strict=True))
    kept = _compare(_exact(real, rows, fake, columns), _exact_radii(real, rows, real_ball, k), radius)
    _count(hits, held, places, rows[kept], columns[kept])
    rows, columns = map(np.concatenate, zip(*open_fake, strict=True))
    kept = _compare(_exact(real, rows, fake, columns), _exact_radii(fake, columns, fake_ball, k), radius)
    recalled[rows[kept]] = True
    doubtful = np.flatnonzero(real_ball.low <= 0)
    return Prdc(
        float((hits > 0).mean()),
        float(recalled.mean()),
        float(hits.mean() / k),
        float((held > 0).mean()),
        hits,
        np.bincount(places[held == 1].astype(np.int64), minlength=len(generated)),
        recalled,
        held > 0,
        int((_exact_radii(real, doubtful, real_ball, k) == 0).sum()),
    )


def _count(hits: np.ndarray, held: np.ndarray, places: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
    """Adds pairs (reference row whose ball holds, generated row) to the three counts, in place."""
    hits += np.bincount(columns, minlength=len(hits))
    held += np.bincount(rows, minlength=len(held))
    places += np.bincount(rows, weights=columns, minlength=len(held))


class _Block(NamedTuple):
    rows: np.ndarray  # float32 [b, d]
    norms: np.ndarray  # float32 [b]: squared, less slack
    slack: np.ndarray  # float32 [b]: what a row adds to the rounding error of its squared distances


class _Rows:
    """A set about a common centre, at a common scale; float32 only block by block."""

    def __init__(self, features: np.ndarray, centre: np.ndarray, scale: float):
        self.features, self.centre, self.scale = features, centre, scale
        n, d = features.shape
        norms = np.empty(n)
        for i in _blocks(n):
            rows = self._shrunk(i)
            norms[i] = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
        # a product of d terms errs by d units of what it sums, in any order (Higham 2002, section 3.1); 32 units more
        # cover the rounding of rows, of norms and of sums
        slack = 1.01 * (d + 32) * UNIT * norms + d * TINY
        self.norms, self.slack = (norms - slack).astype(np.float32), slack.astype(np.float32)

    def block(self, i: slice | np.ndarray) -> _Block:
        return _Block(self._shrunk(i), self.norms[i], self.slack[i])

    def _shrunk(self, i: slice | np.ndarray) -> np.ndarray:
        rows = self.features[i] - self.centre
        rows *= rows.dtype.type(self.scale)
        return rows.astype(np.float32, copy=False)


def _lower(a: _Block, b: _Block) -> np.ndarray:
    """float32 [p, q]: no more than the squared distances, and less by no more than 2 (slack_a + slack_b)."""
    found = a.rows @ b.rows.T
    found *= -2.0
    found += a.norms[:, None]
    found += b.norms
    return found


class _Balls(NamedTuple):
    low: np.ndarray  # float32 [n]: bounds of the squared radii
    high: np.ndarray


def _balls(rows: _Rows, k: int) -> _Balls:
    """Bounds of each row's squared distance to its k-th nearest neighbour."""
    n = len(rows.features)
    lows, highs = np.full((n, k), np.inf, np.float32), np.full((n, k), np.inf, np.float32)  # of the k lowest so far
    blocks = list(_blocks(n))
    for i in blocks:  # its own block gives each row a first bound, which few pairs of other blocks undercut
        a = rows.block(i)
        low = _lower(a, a)
        np.fill_diagonal(low, np.inf)
        kept = np.argpartition(low, min(k, low.shape[1]) - 1, axis=1)[:, :k]
        lows[i, : kept.shape[1]] = np.take_along_axis(low, kept, 1)
        highs[i, : kept.shape[1]] = np.take_along_axis(low, kept, 1) + 2 * (a.slack[:, None] + a.slack[kept])
    for p, i in enumerate(blocks):
        a = rows.block(i)
        for j in blocks[p + 1 :]:
            low = _lower(a, b := rows.block(j))
            for own, axis in ((i, 0), (j, 1)):
                reach = lows[own].max(1)
                found = _true(low < (reach[:, None] if axis == 0 else reach))
                values = low[found]
                upper = values + 2 * (a.slack[found[0]] + b.slack[found[1]])
                _keep_lowest(lows[own], highs[own], found[axis], values, upper)
    return _Balls(lows.max(1), highs.max(1))


def _keep_lowest(lows: np.ndarray, highs: np.ndarray, rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """Puts new bounds, several for a row in any order, among the k lowest of each row, in place."""
    if len(rows) == 0:
        return
    k = lows.shape[1]
    order = np.lexsort((low, rows))
    rows, low, high = rows[order], low[order], high[order]
    names, first, places = np.unique(rows, return_index=True, return_inverse=True)
    rank = np.arange(len(rows)) - first[places]
    kept = rank < k
    new = np.full((2, len(names), k), np.inf, np.float32)
    new[0, places[kept], rank[kept]], new[1, places[kept], rank[kept]] = low[kept], high[kept]
    both_low, both_high = np.hstack([lows[names], new[0]]), np.hstack([highs[names], new[1]])
    best = np.argpartition(both_low, k - 1, axis=1)[:, :k]
    lows[names], highs[names] = np.take_along_axis(both_low, best, 1), np.take_along_axis(both_high, best, 1)


def _exact(a: _Rows, i: np.ndarray, b: _Rows, j: np.ndarray) -> np.ndarray:
    """float64 [p]: squared distances of rows i [p] and j [p], from their differences; 0 for copies, and symmetric."""
    found = np.empty(len(i))
    step = max(1, PAIRS // a.features.shape[1])
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        difference = (a.features[i[part]].astype(np.float64) - b.features[j[part]]) * a.scale
        found[part] = np.square(difference, out=difference).sum(1)
    return found


def _exact_radii(rows: _Rows, picked: np.ndarray, balls: _Balls, k: int) -> np.ndarray:
    """float64 [p]: the squared radii of the picked rows (with repeats)."""
    names, places = np.unique(picked, return_inverse=True)
    radii = np.empty(len(names))
    n = len(rows.features)
    for start in range(0, len(names), TILE):
        own = names[start : start + TILE]
        a = rows.block(own)
        pairs = []
        for j in _blocks(n):
            near = _lower(a, rows.block(j)) <= balls.high[own, None]
            near &= own[:, None] != np.arange(j.start, j.stop)
            found, neighbours = _true(near)
            pairs.append((found, neighbours + j.start))
        found, neighbours = map(np.concatenate, zip(*pairs, strict=True))
        distances = _exact(rows, own[found], rows, neighbours)
        order = np.lexsort((distances, found))
        first = np.searchsorted(found[order], np.arange(len(own)))
        radii[start : start + TILE] = distances[order][first + k - 1]
    return radii[places]


def _true(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of what is true in [p, q]; twice as fast as `nonzero` where that is little."""
    return np.divmod(np.flatnonzero(mask), mask.shape[1])


def _compare(distances: np.ndarray, radii: np.ndarray, radius: str) -> np.ndarray:
    return distances < radii if radius == "<" else distances <= radii


def _blocks(n: int) -> Iterator[slice]:
    """Blocks of at most TILE rows that differ in size by one at most."""
    count = -(-n // TILE)
    edges = [n * b // count for b in range(count + 1)]
    return (slice(a, b) for a, b in pairwise(edges))


@dataclass(frozen=True)
class PRDC(SetMetric):
    """Precision, recall, density and coverage of the generated set, as scores `prdc-<extractor>.precision` and so on.

    Intervals speak of other generated sets of that size against this very reference: Wilson's for precision, t for
    density, and the jackknife for coverage, which errs on the wide side (1.0 to 1.5 times the true spread in
    simulation). None for recall, as each generated row moves the balls of others and no closed form held; for pairs,
    as other reconstructions would have other originals; for coverage, where fewer than 10 reference rows are covered,
    or all but fewer than 10, or rows share clusters. All four depend on n, m and k: compare equal ones only.
    """

    k: int = 5  # neighbours; improved precision and recall takes 3
    radius: Literal["<", "<="] = "<"  # is a row on the surface inside?

    family = "prdc"
    better = "higher"
    parts = ("precision", "recall", "density", "coverage")

    def estimates(self, sets):
        found = prdc(sets.generated, sets.reference, self.k, self.radius)
        n, clusters = len(sets.generated), sets.generated_clusters
        independent = len(set(clusters)) == n
        intervals = {}
        if not sets.paired:
            inside = found.hits > 0
            rate = stats.proportion(int(inside.sum()), n) if independent else stats.mean(inside, clusters, sets.seed)
            intervals = {"precision": rate, "density": stats.mean(found.hits / self.k, clusters, sets.seed)}
            if independent and min(found.covered.sum(), (~found.covered).sum()) >= FEWEST:
                intervals["coverage"] = _jackknife(found)
        copies = f"{found.copies} reference rows have {self.k} copies: balls of radius 0" if found.copies else ""
        estimates = {}
        for part in self.parts:
            estimate = intervals.get(part, Estimate(getattr(found, part), n=n))
            basis = "the interval takes the reference as fixed" if part in intervals else "no interval: none would hold"
            estimates[part] = replace(estimate, note="; ".join(filter(None, (copies, basis))))
        return estimates

    def settings(self):
        return f"k:{self.k}|radius:{self.radius}|"


def _jackknife(found: Prdc) -> Estimate:
    """Coverage with the jackknife over generated rows: without row j, `alone[j]` balls fewer are covered."""
    n, lost = len(found.alone), found.alone / len(found.covered)
    half = stats.Z * float(np.sqrt((n - 1) / n * np.square(lost - lost.mean()).sum()))
    return Estimate(found.coverage, max(0.0, found.coverage - half), min(1.0, found.coverage + half), "jackknife", n)
