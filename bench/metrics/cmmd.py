"""CMMD: the maximum mean discrepancy of unit-length features, from first and second moments (Jayasumana et al., 2024).

arXiv 2401.09603, section 4: MMD^2 with k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma = 10, times 1,000. On the unit
sphere k = exp(-b) exp(b x'y) with b = 1/sigma^2 = 0.01, so that MMD^2 = exp(-b) sum_j b^j / j! |E x^(j) - E y^(j)|^2
over tensor powers. The first two powers are means and second moments: linear in n. What j >= 3 add is at most
4,000 exp(-b) sum_{j>=3} b^j / j! = 6.6e-4 for any features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from bench.metrics.kid import Discrepancy, as_sets, estimate, finish, mmd, mmd_difference
from bench.metrics.sets import SetMetric, Sets
from bench.types import Error, Estimate

SIGMA = 10.0
SCALE = 1000.0
B = 1.0 / SIGMA**2
FRONT = float(np.exp(-B))
BLOCK = 4096  # rows whose products are summed in the features' precision


class Cmmd(NamedTuple):
    """Both are times 1,000."""

    value: float  # the V-statistic that papers print: with each row against itself, which adds about 1/n + 1/m
    unbiased: float  # without


def cmmd(x: np.ndarray, y: np.ndarray, paired: bool = False) -> Cmmd:
    """CMMD of features [n, d] and [m, d], of any length but 0, from their moments: O(n d^2) time, O(d^2) memory.

    `paired`: row i of x belongs to row i of y, and the unbiased value leaves such pairs out.
    Raises Error naming the fault of the features.
    """
    sets = _normalised(as_sets(x, y, paired=paired))
    return _values(sets, _moments(sets.generated), _moments(sets.reference))


class _Moments(NamedTuple):
    mean: np.ndarray  # float64 [d]
    second: np.ndarray  # float64 [d, d], about 0

    def covariance(self) -> np.ndarray:
        return self.second - np.outer(self.mean, self.mean)


def _values(sets: Sets, of_x: _Moments, of_y: _Moments) -> Cmmd:
    n, m = len(sets.generated), len(sets.reference)
    change = of_x.mean - of_y.mean
    value = FRONT * (B * change @ change + B**2 / 2 * np.square(of_x.second - of_y.second).sum())
    unbiased = value - (1.0 - _kernel_mean(of_x, of_x)) / (n - 1) - (1.0 - _kernel_mean(of_y, of_y)) / (m - 1)
    if sets.paired:
        gram = np.einsum("ij,ij->i", sets.generated, sets.reference, dtype=np.float64)
        own = float(np.exp(B * (gram - 1.0)).mean())
        unbiased += 2.0 * (own - _kernel_mean(of_x, of_y)) / (n - 1)
    return Cmmd(SCALE * float(value), SCALE * float(unbiased))


def _kernel_mean(a: _Moments, b: _Moments) -> float:
    """Mean of the kernel over all pairs, to 2e-7: enough where it is divided by n."""
    return FRONT * (1.0 + B * float(a.mean @ b.mean) + B**2 / 2 * float(np.vdot(a.second, b.second)))


def _moments(x: np.ndarray) -> _Moments:
    n, d = x.shape
    total, second = np.zeros(d), np.zeros((d, d))
    for start in range(0, n, BLOCK):
        rows = x[start : start + BLOCK]
        total += rows.sum(0, dtype=np.float64)
        second += rows.T @ rows  # NumPy sees A'A and calls syrk
    return _Moments(total / n, second / n)


def _normalised(sets: Sets) -> Sets:
    """The sets with rows of length 1. Raises Error where a row is zero."""
    found = {}
    for which in ("generated", "reference"):
        x = getattr(sets, which)
        lengths = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64))
        if not lengths.all():
            raise Error(f"row {int(np.argmin(lengths))} of the {which} set is zero: it has no direction")
        if not np.isfinite(lengths).all():
            raise Error(f"row {int(np.argmax(lengths))} of the {which} set is too long for float64", hint="scale it")
        found[which] = x * (1.0 / lengths[:, None]).astype(x.dtype)
    return replace(sets, **found)


def unbiased_cmmd(
    x: np.ndarray,
    y: np.ndarray,
    clusters_x: Sequence[str] | None = None,
    clusters_y: Sequence[str] | None = None,
    paired: bool = False,
) -> Discrepancy:
    """The unbiased CMMD (times 1,000) with its standard error; clusters and pairs as `bench.metrics.kid.mmd` has them.

    From moments, but for rows that share clusters inside a set, whose kernels have to be left out one by one: then
    O(n^2 d). Raises Error naming the fault of the features.
    """
    return _unbiased(as_sets(x, y, clusters_x, clusters_y, paired))


def _unbiased(sets: Sets) -> Discrepancy:
    sets = _normalised(sets)
    n, m = len(sets.generated), len(sets.reference)
    names_x, names_y = set(sets.generated_clusters), set(sets.reference_clusters)
    if (sets.paired and len(names_x) == n) or len(names_x | names_y) == n + m:
        found = _from_moments(sets)
    else:
        found = mmd(_exponential, sets)
        found = found._replace(
            value=FRONT * found.value,
            se=None if found.se is None else FRONT * found.se,
            influences=tuple(FRONT * values for values in found.influences),
        )
    return Discrepancy(
        SCALE * found.value,
        None if found.se is None else SCALE * found.se,
        found.freedom,
        tuple(SCALE * values for values in found.influences),
    )


def _exponential(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(b x'y) - 1 for |x'y| <= 1: the series to the fifth power, 1e-12; the 1 would cost float32 five digits."""
    z = a @ b.T
    z *= B
    found = z / 5.0
    for j in (4.0, 3.0, 2.0):
        found += 1.0
        found *= z
        found /= j
    found += 1.0
    found *= z
    return found


def _from_moments(sets: Sets) -> Discrepancy:
    """The unbiased MMD^2, not scaled; to the error's second-order term only the power j = 1 is taken, right to 1 %."""
    x, y = sets.generated, sets.reference
    of_x, of_y = _moments(x), _moments(y)
    slope, curve = B * (of_x.mean - of_y.mean), B**2 / 2 * (of_x.second - of_y.second)
    influences = []
    for rows, sign in ((x, 2.0 * FRONT), (y, -2.0 * FRONT)):
        values = np.concatenate([_quadratic(rows[s : s + BLOCK], slope, curve) for s in range(0, len(rows), BLOCK)])
        influences.append(sign * (values - values.mean()))
    n, m = len(x), len(y)
    if sets.paired:
        second = 2.0 * _spread(x - y, _moments(x - y)) / n**2
    else:
        second = 2.0 * _spread(x, of_x) / n**2 + 2.0 * _spread(y, of_y) / m**2
        second += 4.0 * float(np.vdot(of_x.covariance(), of_y.covariance())) / (n * m)
    second *= (FRONT * B) ** 2
    return finish(_values(sets, of_x, of_y).unbiased / SCALE, *influences, sets, second)


def _quadratic(rows: np.ndarray, slope: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """float64 [b]: slope'x + x'curve x of each row; the second is some 1e-3 of the first, so that float32 will do."""
    return rows @ slope + np.einsum("ij,ij->i", rows @ curve.astype(rows.dtype), rows)


def _spread(rows: np.ndarray, moments: _Moments) -> float:
    """Mean square of x'y over pairs of centred rows: the covariance's sum of squares without each row with itself."""
    n, mean = len(rows), moments.mean
    lengths = np.einsum("ij,ij->i", rows, rows) - 2.0 * (rows @ mean) + mean @ mean
    return (n * float(np.square(moments.covariance()).sum()) - float(lengths @ lengths) / n) / (n - 1)


@dataclass(frozen=True)
class CMMD(SetMetric):
    """CMMD times 1,000 as papers print it, and as `unbiased` what it estimates, with an interval.

    Papers take CLIP ViT-L/14 at 336 px: `extractor="clip-vitl14-336"`.
    """

    family = "cmmd"
    parts = ("", "unbiased")

    def estimates(self, sets):
        printed = Estimate(cmmd(sets.generated, sets.reference).value, note="no interval: its bias grows with 1/n")
        return {"": printed, "unbiased": estimate(_unbiased(sets))}

    def difference(self, a, b):
        return {"unbiased": estimate(mmd_difference(_unbiased, a, b))}

    def settings(self):
        return f"sigma:{SIGMA:g}|scale:{SCALE:g}|"
