"""Kernel distances between feature sets: the unbiased MMD^2 over all pairs with its standard error, and KID.

MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y) (Gretton et al. 2012, lemma 6). The kernel inception distance takes
k(x, y) = (x'y / d + 1)^3 (Binkowski et al., arXiv 1801.01401, section 4); papers print it times 1,000, here it is
plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from bench.metrics.sets import SetMetric, Sets, check_pair, influence_error
from bench.types import Error, Estimate, UsageError

TILE = 1024  # rows of the blocks that kernels are computed in: 4 MB of float32, as fast as larger ones
SEED = 2020  # torch-fidelity's
FEWEST = 50  # independent rows below which a standard error is not trusted


class Discrepancy(NamedTuple):
    """An MMD^2 (or a difference of two) and its standard error.

    `influences` are the first-order effects of rows, float64 [n] and [m], each of mean 0: the value varies as the sum
    of their means. `se` is None with fewer than 50 clusters in a set; `freedom` is that of the t law.
    """

    value: float
    se: float | None
    freedom: float
    influences: tuple[np.ndarray, np.ndarray]


def kid(
    x: np.ndarray,
    y: np.ndarray,
    clusters_x: Sequence[str] | None = None,
    clusters_y: Sequence[str] | None = None,
    paired: bool = False,
) -> Discrepancy:
    """Kernel inception distance of features [n, d] and [m, d], from every pair of rows once: nothing is drawn.

    The arithmetic has the precision of the features, the sums are float64; no n x n matrix is held. `paired`: row i of
    x and of y belong together, `clusters_x` are those of pairs. See `mmd` for what clusters do, and for errors.
    """
    return _kid(as_sets(x, y, clusters_x, clusters_y, paired))


def _kid(sets: Sets) -> Discrepancy:
    return mmd(_cubic, sets)


def _cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    gram = a @ b.T
    gram /= a.shape[1]
    gram += 1.0
    square = gram * gram
    square *= gram
    return square


def mmd(kernel: Callable[[np.ndarray, np.ndarray], np.ndarray], sets: Sets) -> Discrepancy:
    """Unbiased MMD^2 of two sets; kernel(a [p, d], b [q, d]) gives [p, q], symmetric in a and b.

    Rows that share a cluster, in one set or across the two (the halves of a pair), depend on one another; so does a
    row on itself. The kernel of such two is left out, as it would bias the value. The standard error is the closed form
    of a U-statistic: the spread of the influences, by cluster, and, if all rows or pairs are independent, the
    second-order term t, which is all there is when both sets have one law:
    V = max(V1 - 4 t_xx/n^2 - 4 t_yy/m^2 - 8 t_xy/nm, 0) + 2 t_xx/n^2 + 2 t_yy/m^2 + 4 t_xy/nm. With clusters V = V1,
    near zero up to sqrt 2 too large an error. Raises Error where clusters leave no two rows of a set, and
    where the kernel overflows.
    """
    x, y = sets.generated, sets.reference
    n, m = len(x), len(y)
    labels_x, labels_y = _labels(sets)
    if sets.paired and labels_x.max() + 1 == n:
        return _of_pairs(kernel, sets, labels_x)
    xx = _within(lambda i, j: kernel(x[i], x[j]), labels_x, "generated")
    yy = _within(lambda i, j: kernel(y[i], y[j]), labels_y, "reference")
    rows, columns, squares = np.zeros(n), np.zeros(m), 0.0
    for i in _blocks(n):
        for j in _blocks(m):
            k = _apart(kernel(x[i], y[j]), labels_x[i], labels_y[j])
            rows[i] += k.sum(1, dtype=np.float64)
            columns[j] += k.sum(0, dtype=np.float64)
            squares += _sum_of_squares(k)
    size = max(labels_x.max(), labels_y.max()) + 1
    partners_x = m - np.bincount(labels_y, minlength=size)[labels_x]
    partners_y = n - np.bincount(labels_x, minlength=size)[labels_y]
    pairs = int(partners_x.sum())
    if pairs == 0:
        raise Error("every generated row shares a cluster with every reference row")
    mean = float(rows.sum() / pairs)
    value = xx.mean + yy.mean - 2.0 * mean
    of_x = 2.0 * (xx.influence - n * (rows - mean * partners_x) / pairs)
    of_y = 2.0 * (yy.influence - m * (columns - mean * partners_y) / pairs)
    second = 0.0
    if size == n + m:  # all rows independent
        t_xy = squares / pairs - (rows @ rows) / n / m**2 - (columns @ columns) / m / n**2 + mean**2
        second = 2.0 * xx.t / n**2 + 2.0 * yy.t / m**2 + 4.0 * t_xy / pairs
    return finish(value, of_x, of_y, sets, second)


def _of_pairs(kernel: Callable[[np.ndarray, np.ndarray], np.ndarray], sets: Sets, labels: np.ndarray) -> Discrepancy:
    """`mmd` of independent pairs: the mean over i != j of h = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(y_i, x_j).

    A U-statistic of one sample, those of pairs, so that t is known here too: V = max(V1 - 4 t/n^2, 0) + 2 t/n^2. The
    influences are those of pairs, and 0 for what they already count.
    """
    x, y = sets.generated, sets.reference

    def h(i: slice, j: slice) -> np.ndarray:
        found = kernel(x[i], x[j])
        found += kernel(y[i], y[j])
        found -= kernel(x[i], y[j])
        found -= kernel(y[i], x[j])
        return found

    found = _within(h, labels, "generated")
    n = len(x)
    return finish(found.mean, 2.0 * found.influence, np.zeros(n), sets, 2.0 * found.t / n**2)


class _Within(NamedTuple):
    mean: float  # of a symmetric kernel over the pairs of one set
    influence: np.ndarray  # half of that on the mean
    t: float  # variance of the kernel beyond what either row explains


def _within(tile: Callable[[slice, slice], np.ndarray], labels: np.ndarray, which: str) -> _Within:
    n = len(labels)
    rows, squares = np.zeros(n), 0.0
    blocks = _blocks(n)
    for p, i in enumerate(blocks):
        for j in blocks[p:]:
            k = _apart(tile(i, j), labels[i], labels[j])
            rows[i] += k.sum(1, dtype=np.float64)
            squares += _sum_of_squares(k) * (1 if i == j else 2)
            if i != j:
                rows[j] += k.sum(0, dtype=np.float64)
    partners = n - np.bincount(labels)[labels]
    pairs = int(partners.sum())
    if pairs == 0:
        raise Error(f"all {n} rows of the {which} set share one cluster: no two are independent")
    mean = float(rows.sum() / pairs)
    t = squares / pairs - 2.0 * (rows @ rows) / n / (n - 1) ** 2 + mean**2
    return _Within(mean, n * (rows - mean * partners) / pairs, t)


def _apart(k: np.ndarray, of_rows: np.ndarray, of_columns: np.ndarray) -> np.ndarray:
    """A block of kernels, in place 0 where row and column share a cluster."""
    if of_rows.max() >= of_columns.min() and of_columns.max() >= of_rows.min():
        k[of_rows[:, None] == of_columns] = 0.0
    return k


def finish(value: float, of_x: np.ndarray, of_y: np.ndarray, sets: Sets, second: float) -> Discrepancy:
    """Value and standard error; `second` is the variance that second-order terms add, 0 where it is not known."""
    if not np.isfinite(value):
        raise Error(f"features are too large for the kernel in {sets.generated.dtype}", hint="scale them")
    found = influence_error(sets, of_x, of_y)
    fewest = min(len(set(names)) for names in (sets.generated_clusters, sets.reference_clusters))
    if found is None or fewest < FEWEST:
        return Discrepancy(float(value), None, 0.0, (of_x, of_y))
    error, freedom = found
    return Discrepancy(float(value), float(np.sqrt(max(error**2 - second, second, 0.0))), freedom, (of_x, of_y))


def kid_difference(
    a: np.ndarray,
    b: np.ndarray,
    y: np.ndarray,
    clusters: Sequence[str] | None = None,
    clusters_y: Sequence[str] | None = None,
    paired: bool = False,
) -> Discrepancy:
    """KID(b, y) - KID(a, y) of two checkpoints' features [n, d], row i of both from one seed and prompt.

    `paired`: y_i is the original of a_i and of b_i. See `mmd_difference`.
    """
    return mmd_difference(_kid, *(as_sets(rows, y, clusters, clusters_y, paired) for rows in (a, b)))


def mmd_difference(distance: Callable[[Sets], Discrepancy], a: Sets, b: Sets) -> Discrepancy:
    """The distance of b less that of a, to the same reference: what corresponding rows share cancels in the error.

    The second-order term stays in the error, which between equal models is up to sqrt 2 too large. Raises Error where
    the rows do not correspond.
    """
    if a.generated.shape != b.generated.shape or not np.array_equal(a.reference, b.reference):
        raise Error("the sets do not correspond row by row", hint="compare checkpoints on the items they share")
    of_a, of_b = distance(a), distance(b)
    influences = [own - other for own, other in zip(of_b.influences, of_a.influences, strict=True)]
    return finish(of_b.value - of_a.value, *influences, b, 0.0)


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


def estimate(found: Discrepancy) -> Estimate:
    """The value with its t interval; a note says where there is none."""
    n = sum(map(len, found.influences))
    if found.se is None:
        note = f"no interval: fewer than {FEWEST} independent rows in a set"
        return Estimate(found.value, n=n, note=note)
    from scipy.special import stdtrit

    half = float(stdtrit(found.freedom, 0.975)) * found.se
    return Estimate(found.value, found.value - half, found.value + half, "u-statistic, influence-t", n)


def as_sets(
    x: np.ndarray,
    y: np.ndarray,
    clusters_x: Sequence[str] | None = None,
    clusters_y: Sequence[str] | None = None,
    paired: bool = False,
) -> Sets:
    """Checked features as sets; rows without clusters are independent. Raises Error naming what does not fit."""
    x, y = check_pair(x, y)
    if paired and len(x) != len(y):
        raise Error(f"{len(x)} and {len(y)} rows are no pairs")
    if paired and clusters_y is not None:
        raise Error("pairs have one list of clusters, not two")
    names_x = [f"x{i}" for i in range(len(x))] if clusters_x is None else list(clusters_x)
    names_y = names_x if paired else [f"y{i}" for i in range(len(y))] if clusters_y is None else list(clusters_y)
    for rows, names in ((x, names_x), (y, names_y)):
        if len(names) != len(rows):
            raise Error(f"{len(rows)} rows have {len(names)} clusters")
    return Sets(x, y, paired, names_x, names_y)


def _labels(sets: Sets) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n] and [m]: the numbers of the rows' clusters, in order of appearance, every number used."""
    numbers: dict[str, int] = {}
    return tuple(
        np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
        for names in (sets.generated_clusters, sets.reference_clusters)
    )


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

    def estimates(self, sets):
        if self.protocol == "subsets":
            found = kid_subsets(sets.generated, sets.reference)
            note = f"spread over 100 subsets of 1,000: {found.spread:.3g}, not an error of the value"
            return {"": Estimate(found.mean, note=note)}
        return {"": estimate(_kid(sets))}

    def difference(self, a, b):
        return {} if self.protocol == "subsets" else {"": estimate(mmd_difference(_kid, a, b))}

    def settings(self):
        return f"{self.protocol}|degree:3|gamma:1/d|coef0:1|scale:1|"
