"""Kernel distances between feature sets: the unbiased MMD^2 over all pairs with its standard error, and KID.

MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y) (Gretton et al. 2012, lemma 6). The kernel inception distance takes
k(x, y) = (x'y / d + 1)^3 (Binkowski et al., arXiv 1801.01401, section 4); papers print it
times 1,000, here it is plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from bench.metrics.sets import SetMetric, Sets, check_pair
from bench.types import Error, Estimate, UsageError

TILE = 1024  # rows of the blocks that kernels are computed in: 4 MB of float32, as fast as larger ones
SEED = 2020  # torch-fidelity's
FEWEST = 20  # independent rows below which a standard error is not trusted


class Discrepancy(NamedTuple):
    """An MMD^2 (or a difference of two) and its standard error.

    `effects` are the first-order effects of rows on the value, float64, centred: one array [n] for each independent
    set, a single one for pairs. `se` is None with fewer than 20 clusters in a set; `freedom` is that of the t law.
    """

    value: float
    se: float | None
    freedom: int
    effects: tuple[np.ndarray, ...]


def kid(
    x: np.ndarray,
    y: np.ndarray,
    clusters_x: Sequence[str] | None = None,
    clusters_y: Sequence[str] | None = None,
    paired: bool = False,
) -> Discrepancy:
    """Kernel inception distance of features [n, d] and [m, d], from every pair of rows once: nothing is drawn.

    The arithmetic has the precision of the features, the sums are float64; no n x n matrix is held. See `mmd` for
    clusters, pairs and errors.
    """
    return mmd(_cubic, x, y, clusters_x, clusters_y, paired)


def _cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    gram = a @ b.T
    gram /= a.shape[1]
    gram += 1.0
    square = gram * gram
    square *= gram
    return square


def mmd(
    kernel: Callable[[np.ndarray, np.ndarray], np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    clusters_x: Sequence[str] | None = None,
    clusters_y: Sequence[str] | None = None,
    paired: bool = False,
) -> Discrepancy:
    """Unbiased MMD^2 of [n, d] and [m, d]; kernel(a [p, d], b [q, d]) gives [p, q], symmetric in a and b.

    Pairs of rows that depend on one another are left out, as they would bias the value: a row with itself, rows that
    share a cluster, and, if `paired` (row i of x belongs to row i of y), x_i with its own y_i; `clusters_x` then names
    clusters of pairs. The standard error is the closed form of a U-statistic: the spread of the rows' effects (summed
    over clusters), and for independent rows the second-order term t, which is all there is when both sets have one
    law: V = max(V1 - 4 t_xx/n^2 - 4 t_yy/m^2 - 8 t_xy/nm, 0) + 2 t_xx/n^2 + 2 t_yy/m^2 + 4 t_xy/nm. With clusters t
    is not taken out of V1, which near zero makes the error up to sqrt 2 too large.
    Raises Error naming the fault of the features, and where clusters leave no pair.
    """
    x, y = check_pair(x, y)
    n, m = len(x), len(y)
    if paired:
        if n != m:
            raise Error(f"pairs need sets of one shape, not {list(x.shape)} and {list(y.shape)}")
        if clusters_y is not None and list(clusters_y) != list(clusters_x or ()):
            raise Error("pairs have one list of clusters, not two")

        def both(i: slice, j: slice) -> np.ndarray:
            h = kernel(x[i], x[j])
            h += kernel(y[i], y[j])
            h -= kernel(x[i], y[j])
            h -= kernel(y[i], x[j])
            return h

        labels = _labels(clusters_x, n)
        own = _within(both, labels)
        return _finish(own.mean, [2.0 * own.effects], [labels], 2.0 * own.second)
    labels_x, labels_y = _labels(clusters_x, n), _labels(clusters_y, m)
    xx = _within(lambda i, j: kernel(x[i], x[j]), labels_x)
    yy = _within(lambda i, j: kernel(y[i], y[j]), labels_y)
    rows, columns, squares = np.zeros(n), np.zeros(m), 0.0
    for i in _blocks(n):
        for j in _blocks(m):
            k = kernel(x[i], y[j])
            rows[i] += k.sum(1, dtype=np.float64)
            columns[j] += k.sum(0, dtype=np.float64)
            squares += _sum_of_squares(k)
    rows, columns = rows / m, columns / n
    mean = float(rows.mean())
    second_xy = (squares / (n * m) - (rows @ rows) / n - (columns @ columns) / m + mean**2) / (n * m)
    return _finish(
        xx.mean + yy.mean - 2.0 * mean,
        [2.0 * (xx.effects - (rows - mean) / n), 2.0 * (yy.effects - (columns - mean) / m)],
        [labels_x, labels_y],
        2.0 * xx.second + 2.0 * yy.second + 4.0 * second_xy,
    )


class _Within(NamedTuple):
    """Of a symmetric kernel within one set: its mean over pairs, half of each row's effect on that, and t / n^2."""

    mean: float
    effects: np.ndarray
    second: float


def _within(tile: Callable[[slice, slice], np.ndarray], labels: np.ndarray) -> _Within:
    """Over all pairs of rows whose labels differ; tile(i, j) gives the kernel of two blocks of rows."""
    n = len(labels)
    rows, squares = np.zeros(n), 0.0
    blocks = _blocks(n)
    for p, i in enumerate(blocks):
        for j in blocks[p:]:
            k = tile(i, j)
            if labels[i].max() >= labels[j].min() and labels[j].max() >= labels[i].min():
                k[labels[i][:, None] == labels[j]] = 0.0
            rows[i] += k.sum(1, dtype=np.float64)
            squares += _sum_of_squares(k) * (1 if i == j else 2)
            if i != j:
                rows[j] += k.sum(0, dtype=np.float64)
    counts = (n - np.bincount(labels)[labels]).astype(np.float64)  # partners of each row
    pairs = counts.sum()
    if pairs == 0:
        raise Error(f"all {n} rows share one cluster: no two of them are independent")
    mean = float(rows.sum() / pairs)
    second = (squares / pairs - 2.0 * (rows @ rows) / n / (n - 1) ** 2 + mean**2) / n**2
    return _Within(mean, (rows - mean * counts) / pairs, second)


def _finish(value: float, effects: list[np.ndarray], labels: list[np.ndarray], second: float) -> Discrepancy:
    """Value and standard error; `second` is the variance that second-order terms add, known for independent rows."""
    clusters = [int(found.max()) + 1 for found in labels]
    if any(c < len(found) for c, found in zip(clusters, labels, strict=True)):
        second = 0.0
    spread = 0.0
    for effect, found, c in zip(effects, labels, clusters, strict=True):
        sums = np.bincount(found, weights=effect)
        spread += c / (c - 1) * float(sums @ sums)
    se = float(np.sqrt(max(spread - second, second, 0.0))) if min(clusters) >= FEWEST else None
    return Discrepancy(float(value), se, min(clusters) - 1, tuple(effects))


def kid_difference(
    a: np.ndarray,
    b: np.ndarray,
    y: np.ndarray,
    clusters: Sequence[str] | None = None,
    clusters_y: Sequence[str] | None = None,
    paired: bool = False,
) -> Discrepancy:
    """KID(a, y) - KID(b, y) of two checkpoints' features [n, d], row i of both from one seed and prompt.

    See `mmd_difference`; `paired`: y_i is the original of a_i and of b_i.
    """
    return mmd_difference(
        kid(a, y, clusters, clusters_y, paired), kid(b, y, clusters, clusters_y, paired), clusters, clusters_y
    )


def mmd_difference(
    first: Discrepancy,
    second: Discrepancy,
    clusters: Sequence[str] | None = None,
    clusters_y: Sequence[str] | None = None,
) -> Discrepancy:
    """first - second, two distances to the same reference whose rows correspond: what a row shares cancels.

    The standard error sums the differences of effects by cluster; the second-order term stays in, so that between
    equal models it is up to sqrt 2 too large. Raises Error where the rows do not correspond.
    """
    if [len(e) for e in first.effects] != [len(e) for e in second.effects]:
        raise Error("the two distances are not of the same rows", hint="compare checkpoints on the items they share")
    effects = [a - b for a, b in zip(first.effects, second.effects, strict=True)]
    labels = [_labels(names, len(e)) for names, e in zip((clusters, clusters_y), effects, strict=False)]
    return _finish(first.value - second.value, effects, labels, 0.0)


class Subsets(NamedTuple):
    """Mean and spread (population standard deviation) of KID over random subsets; the spread is no standard error."""

    mean: float
    spread: float


def kid_subsets(x: np.ndarray, y: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = SEED) -> Subsets:
    """KID as papers print it: the mean over random subsets of both sets, drawn as torch-fidelity 0.4 draws them.

    With its seed the subsets are the same ones. Raises Error where a set has fewer than `size` rows.
    """
    x, y = check_pair(x, y)
    if size < 2 or subsets < 1:
        raise UsageError(f"{subsets} subsets of {size} rows: at least 1 of 2 are needed")
    if min(len(x), len(y)) < size:
        raise Error(
            f"subsets of {size} rows cannot be drawn from sets of {len(x)} and {len(y)}",
            hint="ask for a smaller size, or for all pairs",
        )
    generator = np.random.RandomState(seed)  # the legacy stream, its own object: what torch-fidelity draws from
    found = np.empty(subsets)
    for s in range(subsets):
        a = x[generator.choice(len(x), size, replace=False)]
        b = y[generator.choice(len(y), size, replace=False)]
        k_aa, k_bb = _cubic(a, a), _cubic(b, b)
        within = sum(k.sum(dtype=np.float64) - k.trace(dtype=np.float64) for k in (k_aa, k_bb)) / (size * (size - 1))
        found[s] = within - 2.0 * _cubic(a, b).mean(dtype=np.float64)
    return Subsets(float(found.mean()), float(found.std()))


def estimate(found: Discrepancy, n: int, scale: float = 1.0) -> Estimate:
    """The value with its t interval, times `scale`; a note says where there is none."""
    if found.se is None:
        note = f"no interval: fewer than {FEWEST} independent rows in a set"
        return Estimate(scale * found.value, n=n, note=note)
    from scipy.special import stdtrit

    half = float(stdtrit(found.freedom, 0.975)) * found.se
    return Estimate(
        scale * found.value, scale * (found.value - half), scale * (found.value + half), "u-statistic, influence-t", n
    )


def _labels(clusters: Sequence[str] | None, n: int) -> np.ndarray:
    """int64 [n]: the number of each row's cluster, every number used."""
    if clusters is None:
        return np.arange(n)
    if len(clusters) != n:
        raise Error(f"{n} rows have {len(clusters)} clusters")
    names: dict[str, int] = {}
    return np.array([names.setdefault(c, len(names)) for c in clusters], np.int64)


def _blocks(n: int) -> list[slice]:
    return [slice(start, min(start + TILE, n)) for start in range(0, n, TILE)]


def _sum_of_squares(k: np.ndarray) -> float:
    return float(np.einsum("ij,ij->i", k, k).sum(dtype=np.float64))


@dataclass(frozen=True)
class KID(SetMetric):
    """Kernel inception distance, plain (papers print it times 1,000), of pairs or of independent sets.

    "all-pairs" has no sampling noise but the sets' own, and an interval. "subsets" repeats torch-fidelity's 100 random
    subsets of 1,000 for comparison with printed numbers: no interval, as their spread is not the error of their mean.
    """

    protocol: Literal["all-pairs", "subsets"] = "all-pairs"

    family = "kid"

    def estimates(self, sets: Sets):
        n = num_rows(sets)
        if self.protocol == "subsets":
            found = kid_subsets(sets.generated, sets.reference)
            note = f"spread over 100 subsets of 1,000: {found.spread:.3g}, not an error of the value"
            return {"": Estimate(found.mean, n=n, note=note)}
        return {"": estimate(distance_of(_cubic, sets), n)}

    def settings(self):
        return f"{self.protocol}|degree:3|gamma:1/d|coef0:1|scale:1|"


def distance_of(kernel: Callable[[np.ndarray, np.ndarray], np.ndarray], sets: Sets) -> Discrepancy:
    """`mmd` of a metric's sets."""
    reference_clusters = None if sets.paired else sets.reference_clusters
    return mmd(kernel, sets.generated, sets.reference, sets.generated_clusters, reference_clusters, sets.paired)


def num_rows(sets: Sets) -> int:
    """Rows of the table that both sets come from."""
    return len(sets.generated) + (0 if sets.paired else len(sets.reference))
