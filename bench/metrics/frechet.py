"""Fréchet distance between sets of features: exact forms, corrections of its bias, and errors by influence functions.

d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^{1/2} (Dowson and Landau 1982; FID: Heusel et al., arXiv 1706.08500).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bench.metrics.moments import BLOCK, BlockMoments, Moments, mean_and_covariance, near_mean
from bench.metrics.sets import SetMetric, Sets, check_pair, describe_network, influence_error
from bench.metrics.transport import (
    EPSILON,
    Influence,
    Transport,
    factor_of,
    gaussian_bias,
    influence,
    raw_distance,
    transport,
)
from bench.types import Error, Estimate, UsageError

FLOOR = 1e-6  # share of the traces below which a negative distance is rounding
ENOUGH = 4  # rows per dimension that an interval needs: below, errors and corrections are off
COVARIANCES = ("unbiased", "biased")


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray, strict: bool = False
) -> float:
    """Squared Fréchet distance of two Gaussians; means [d], covariances [d, d], computed in float64.

    The trace of the square root is sum sqrt eig(L' S1 L) with L L' = S2. `strict` takes singular values of L' K with
    K K' = S1 instead: no small eigenvalue is ever rooted, so that 1e-14 holds at any conditioning, for 3 x the time.
    A singular covariance goes through its eigenvectors and the strict form. Raises Error for input that is no pair of
    Gaussians of one dimension; a negative result within rounding is 0 (`raw_distance` keeps it).
    """
    mean1, cov1 = _gaussian(mean1, cov1, "first")
    mean2, cov2 = _gaussian(mean2, cov2, "second")
    if len(mean1) != len(mean2):
        raise Error(f"feature sets differ in dimension: {len(mean1)} and {len(mean2)}")
    return _floored(*raw_distance(mean1, cov1, mean2, cov2, strict))


def frechet_from_features(a: np.ndarray, b: np.ndarray, strict: bool = False, covariance: str = "unbiased") -> float:
    """Squared Fréchet distance of two feature sets [n, d] and [m, d], any n, m >= 2.

    `covariance` divides by n - 1 ("unbiased") or by n ("biased", as StyleGAN-V's and cd-fvd's FVD do). Sets of at most
    d rows are their own factors (S = A'A), so the trace is the nuclear norm of A B': exact where S is singular, and
    without a d x d decomposition. Raises Error naming the fault of the features.
    """
    a, b = check_pair(a, b)
    return _floored(*_raw_from_features(a, b, strict, covariance))


def check_covariance(name: str) -> None:
    """Raises UsageError unless it names a way to normalise a covariance."""
    if name not in COVARIANCES:
        raise UsageError(f"covariance {name!r} is not one of {', '.join(COVARIANCES)}")


class Corrected(NamedTuple):
    """A distance without its bias, and the standard error; `se` is None where rows are too few for it."""

    value: float  # half-split: 2 F - the mean of F over two halves; may be negative near 0
    plug_in: float  # rounding below 0 included
    se: float | None
    freedom: float  # degrees of freedom of `se`
    gaussian: float | None  # the correction for independent Gaussian rows; None where rows depend on each other


def corrected_distance(
    generated: np.ndarray,
    reference: np.ndarray,
    generated_clusters: Sequence[str] | None = None,
    reference_clusters: Sequence[str] | None = None,
    seed: int = 0,
) -> Corrected:
    """Fréchet distance of two feature sets [n, d] and [m, d], n, m > d, without the bias of both finite sets.

    Rows, of one set or of both, that share a cluster depend on each other; without names every row is its own. The
    bias c/n + e/m is removed by splitting both sets into halves, whole clusters together: 2 F - mean F(halves), each
    weighted with its size so that what is linear in the rows cancels. `seed` draws the split. The standard error is
    that of the summed influence of rows, by cluster; it needs n / d and m / d of at least 4, and two clusters a side.
    Raises Error where a set has at most d rows, or clusters too few to halve.
    """
    sets = _sets(generated, reference, generated_clusters, reference_clusters, seed)
    return _corrected(sets)[0]


def paired_distance(
    fake: np.ndarray, real: np.ndarray, clusters: Sequence[str] | None = None, seed: int = 0
) -> Corrected:
    """`corrected_distance` between pictures and their own reconstructions, [n, d] each, row i with row i.

    Treating the two sets as independent would inflate both the bias and the error.
    """
    if np.shape(fake) != np.shape(real):
        raise Error(f"pairs need sets of one shape, not {list(np.shape(fake))} and {list(np.shape(real))}")
    names = [str(i) for i in range(len(fake))] if clusters is None else clusters
    return corrected_distance(fake, real, names, names, seed)


class Difference(NamedTuple):
    """F(b) - F(a) without the bias of either, on matched rows; `se` is None where rows are too few for it."""

    value: float
    plug_in: float
    se: float | None
    freedom: float
    gain: float | None  # variance of the difference if a and b were independent, over this one's


def frechet_difference(
    a: np.ndarray,
    b: np.ndarray,
    reference: np.ndarray,
    clusters: Sequence[str] | None = None,
    reference_clusters: Sequence[str] | None = None,
    seed: int = 0,
) -> Difference:
    """How much farther from one reference [m, d] the set b is than a, [n, d] each, row i of both from one seed or item.

    The error is that of the difference of the influences of row i under b and under a, reference side included, by
    cluster. For two autoencoders the reference holds the originals in the same order and both `clusters` are the same
    names. Raises Error like `corrected_distance`.
    """
    if np.shape(a) != np.shape(b):
        raise Error(f"matched rows need sets of one shape, not {list(np.shape(a))} and {list(np.shape(b))}")
    return _difference(*(_sets(x, reference, clusters, reference_clusters, seed) for x in (a, b)))


def block_distance(generated: BlockMoments, reference: BlockMoments, paired: bool = False) -> Corrected:
    """`corrected_distance` from moments in K blocks, no features needed: halves of blocks, and a group standard error.

    The influence functional is linear in a block's mean and second moment, so a block's value is that of its rows.
    `paired`: block k of one holds the counterparts of block k of the other. Take 20 blocks or more: the error has
    K - 1 degrees of freedom. Raises Error where rows are no more than dimensions.
    """
    if generated.dim != reference.dim:
        raise Error(f"feature sets differ in dimension: {generated.dim} and {reference.dim}")
    if paired and [b.n for b in generated.blocks] != [b.n for b in reference.blocks]:
        raise Error("blocks of pairs differ in size", hint="update both with the same ids and clusters")
    n, m, d = generated.n, reference.n, generated.dim
    value, between, traces = _half_split(generated.halves(), reference.halves())
    gaussian = None if paired else between.value - gaussian_bias(between, *traces, n, m)
    if min(n, m) < ENOUGH * d:
        return Corrected(value, between.value, None, 0, gaussian)
    of_generated = _of_blocks(generated, 2.0 * between.slope, between.forth)
    of_reference = _of_blocks(reference, -2.0 * between.slope, between.back)
    groups = [of_generated + of_reference] if paired else [of_generated, of_reference]
    variances = [len(g) / (len(g) - 1) * float(g @ g) for g in groups]
    freedom = sum(variances) ** 2 / sum(v * v / (len(g) - 1) for v, g in zip(variances, groups, strict=True))
    return Corrected(value, between.value, float(np.sqrt(sum(variances))), freedom, gaussian)


def _of_blocks(moments: BlockMoments, slope: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """What each block adds to the mean influence, float64 [K], of sum 0."""
    total = sum(block.mean() * block.n for block in moments.blocks if block.n) / moments.n
    curvature = np.eye(moments.dim) - projection @ projection.T
    found = np.zeros(len(moments.blocks))
    for k, block in enumerate(moments.blocks):
        if block.n:
            shift = block.mean() - total
            own = float(np.vdot(curvature, block.covariance(biased=True))) if block.n > 1 else 0.0
            found[k] = (slope @ shift + own + shift @ curvature @ shift) * block.n / moments.n
    return found - found.sum() * np.array([block.n for block in moments.blocks]) / moments.n


def _sets(
    generated: np.ndarray,
    reference: np.ndarray,
    generated_clusters: Sequence[str] | None,
    reference_clusters: Sequence[str] | None,
    seed: int,
) -> Sets:
    generated, reference = check_pair(generated, reference)
    names = [
        [f"{side}/{i}" for i in range(len(rows))] if given is None else [str(c) for c in given]
        for side, rows, given in (("g", generated, generated_clusters), ("r", reference, reference_clusters))
    ]
    for rows, found in zip((generated, reference), names, strict=True):
        if len(rows) != len(found):
            raise Error(f"{len(rows)} rows of features have {len(found)} clusters")
    return Sets(generated, reference, names[0] == names[1], *names, seed)


def _corrected(sets: Sets) -> tuple[Corrected, Influence | None]:
    """The corrected distance, and the influences that its error came from where there is one."""
    generated, reference = sets.generated, sets.reference
    n, m, d = len(generated), len(reference), generated.shape[1]
    if min(n, m) <= d:
        raise Error(f"{min(n, m)} rows in {d} dimensions have a singular covariance: the bias cannot be removed")
    halves = _halves(sets)
    origins = near_mean(generated[:BLOCK]), near_mean(reference[:BLOCK])
    value, between, traces = _half_split(
        *(
            tuple(Moments(d, origin).update(rows[half]) for half in both)
            for rows, both, origin in zip((generated, reference), halves, origins, strict=True)
        )
    )
    dependent = len({*sets.generated_clusters, *sets.reference_clusters}) < n + m
    gaussian = None if dependent else between.value - gaussian_bias(between, *traces, n, m)
    effect = influence(generated, reference, between) if min(n, m) >= ENOUGH * d else None
    found = influence_error(sets, *effect) if effect else None
    se, freedom = found or (None, 0.0)
    return Corrected(value, between.value, se, freedom, gaussian), effect if found else None


def _half_split(
    generated: tuple[Moments, Moments], reference: tuple[Moments, Moments]
) -> tuple[float, Transport, tuple[float, float]]:
    """2 F - the mean of F over halves, the transport between the wholes, and the traces of their covariances."""
    stats = [(part.n, part.mean(), part.covariance()) for part in (*generated, *reference)]
    of_halves = [raw_distance(*stats[k][1:], *stats[k + 2][1:])[0] for k in (0, 1)]
    wholes = [side[0].merge(side[1]) for side in (generated, reference)]
    covariances = [whole.covariance() for whole in wholes]
    between = transport(wholes[0].mean(), covariances[0], wholes[1].mean(), covariances[1])
    shares = [(stats[k][0] / wholes[0].n + stats[k + 2][0] / wholes[1].n) / 2 for k in (0, 1)]
    value = 2 * between.value - float(np.dot(shares, of_halves))
    return value, between, (float(np.trace(covariances[0])), float(np.trace(covariances[1])))


def _halves(sets: Sets) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Row numbers of two random halves of either set; a cluster, of one set or of both, stays whole.

    Clusters are dealt, large ones first, each to where it leaves the halves of both sets more even.
    """
    names, index = np.unique([*sets.generated_clusters, *sets.reference_clusters], return_inverse=True)
    n, m = len(sets.generated), len(sets.reference)
    of_generated, of_reference = index[:n], index[n:]
    generator = np.random.Generator(np.random.Philox(sets.seed))
    order = generator.permutation(len(names))
    coins = generator.integers(2, size=len(names)).tolist()
    shares = np.bincount(of_generated, minlength=len(names)) / n, np.bincount(of_reference, minlength=len(names)) / m
    order = order[np.argsort(-(shares[0] + shares[1])[order], kind="stable")]
    second = np.zeros(len(names), dtype=bool)
    lead_g = lead_r = 0.0  # of the first half over the second
    for cluster, g, r in zip(order.tolist(), shares[0][order].tolist(), shares[1][order].tolist(), strict=True):
        lead = lead_g * g + lead_r * r
        right = lead > EPSILON or (lead >= -EPSILON and coins[cluster])
        second[cluster] = right
        lead_g, lead_r = (lead_g - g, lead_r - r) if right else (lead_g + g, lead_r + r)
    halves = tuple((np.flatnonzero(~second[i]), np.flatnonzero(second[i])) for i in (of_generated, of_reference))
    if min(len(half) for both in halves for half in both) < 2:
        raise Error("there are too few clusters to halve the sets: the bias cannot be removed")
    return halves


def _difference(a: Sets, b: Sets) -> Difference:
    (of_a, effect_a), (of_b, effect_b) = _corrected(a), _corrected(b)
    value, plug_in = of_b.value - of_a.value, of_b.plug_in - of_a.plug_in
    if effect_a is None or effect_b is None:
        return Difference(value, plug_in, None, 0.0, None)
    se, freedom = influence_error(a, effect_b.fake - effect_a.fake, effect_b.real - effect_a.real)
    return Difference(value, plug_in, se, freedom, (of_a.se**2 + of_b.se**2) / se**2 if se else None)


def _raw_from_features(a: np.ndarray, b: np.ndarray, strict: bool, covariance: str) -> tuple[float, float]:
    check_covariance(covariance)
    n, m, d = len(a), len(b), a.shape[1]
    shrink = [(size - 1) / size if covariance == "biased" else 1.0 for size in (n, m)]
    if min(n, m) > d:
        stats = [mean_and_covariance(rows) for rows in (a, b)]
        return raw_distance(stats[0][0], stats[0][1] * shrink[0], stats[1][0], stats[1][1] * shrink[1], strict)
    difference = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    factors = [factor_of(rows) * share**0.5 for rows, share in zip((a, b), shrink, strict=True)]
    scale = float(difference @ difference + sum((factor**2).sum() for factor in factors))
    return scale - 2.0 * float(np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()), scale


def _gaussian(mean: Any, cov: Any, which: str) -> tuple[np.ndarray, np.ndarray]:
    mean, cov = np.asarray(mean, dtype=np.float64), np.asarray(cov, dtype=np.float64)
    if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
        raise Error(f"the {which} Gaussian needs mean [d] and covariance [d, d], not {mean.shape} and {cov.shape}")
    if mean.size < 2:
        raise Error(f"the {which} Gaussian has d = {mean.size}; features have more than one dimension")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise Error(f"the {which} mean or covariance holds NaN or infinity")
    if not (np.diagonal(cov) > 0).any():
        raise Error(f"the {which} covariance has no variance")
    if np.abs(cov - cov.T).max() > FLOOR * np.abs(cov).max():  # else one triangle alone would decide
        raise Error(f"the {which} covariance is not symmetric")
    return mean, cov


def _floored(raw: float, scale: float) -> float:
    if raw < -FLOOR * scale:
        raise Error(f"the Fréchet distance came out as {raw:g}: a covariance is not positive semidefinite")
    return max(raw, 0.0)


def frechet_estimates(sets: Sets, covariance: str = "unbiased") -> dict[str, Estimate]:
    """The plug-in as "", and as "corrected" the half-split estimate with its t interval, or a note why there is none.

    The plug-in has no interval, as its bias is larger than its error. The corrected value does not depend on
    `covariance`; near 0 it may be negative, as an estimate without bias must.
    """
    generated, reference = sets.generated, sets.reference
    rows, d = min(len(generated), len(reference)), generated.shape[1]

    def plug_in(note: str = "") -> Estimate:
        return _plug_in(_raw_from_features(generated, reference, False, covariance)[0], note)

    if rows <= d:
        note = f"rank-deficient: {rows} rows, d = {d} dimensions: no correction, no interval"
        return {"": plug_in(note), "corrected": Estimate(None, note=note)}
    try:
        found, _ = _corrected(sets)
    except Error as e:  # clusters that cannot be halved
        return {"": plug_in(), "corrected": Estimate(None, note=str(e))}
    first = _plug_in(found.plug_in) if covariance == "unbiased" else plug_in()
    if found.se is None:
        few = f"{rows} rows, d = {d} dimensions, n/d < {ENOUGH}" if rows < ENOUGH * d else "one cluster"
        return {"": first, "corrected": Estimate(found.value, method="half-split", note=f"no interval: {few}")}
    note = ""
    if found.gaussian is not None and abs(found.value - found.gaussian) > 2 * found.se:
        note = f"n too small or heavy tails: the Gaussian correction gives {found.gaussian:.5g}"
    return {"": first, "corrected": _with_interval(found.value, found.se, found.freedom, "influence-t", note)}


def frechet_differences(a: Sets, b: Sets) -> dict[str, Estimate]:
    """b - a as `bench.metrics.sets.SetMetric.difference` wants it: plug-in as "", and "corrected" with an interval."""
    if a.generated.shape != b.generated.shape or not np.array_equal(a.reference, b.reference):
        raise Error("a paired difference needs matched rows and one reference")
    if (*a.generated_clusters, *a.reference_clusters) != (*b.generated_clusters, *b.reference_clusters):
        raise Error("a paired difference needs the same clusters on both sides")
    if min(len(a.generated), len(a.reference)) <= a.generated.shape[1]:
        raise Error(f"rank-deficient: {len(a.generated)} rows, d = {a.generated.shape[1]} dimensions")
    found = _difference(a, b)
    if found.se is None:
        corrected = Estimate(found.value, method="half-split", note=f"no interval: n/d < {ENOUGH}, or one cluster")
    else:
        note = f"variance 1/{found.gain:.3g} of unpaired" if found.gain else ""
        corrected = _with_interval(found.value, found.se, found.freedom, "paired influence-t", note)
    return {"": Estimate(found.plug_in), "corrected": corrected}


def _plug_in(raw: float, note: str = "") -> Estimate:
    return Estimate(max(raw, 0.0), note=note or (f"rounding: computed as {raw:.1g}" if raw < 0 else ""))


def _with_interval(value: float, se: float, freedom: float, method: str, note: str) -> Estimate:
    from scipy.special import stdtrit

    half = float(stdtrit(freedom, 0.975)) * se
    return Estimate(value, value - half, value + half, f"half-split, {method}", note=note)


@dataclass(frozen=True)
class Frechet(SetMetric):
    """Fréchet distance between two sets of pictures: plug-in and, as `corrected`, without its bias and with its error.

    `fid` is the name for Inception alone, `sfid` for its spatial features (Nash et al. 2021). With no more rows than
    dimensions the plug-in alone is there, and says so. Raises UsageError for an unknown covariance.
    """

    covariance: str = "unbiased"  # of the plug-in; "biased" divides by n

    version = 2
    parts = ("", "corrected")
    family = "frechet"

    def __post_init__(self):
        check_covariance(self.covariance)

    @property
    def name(self) -> str:
        if not self.extractor.startswith("inception"):
            return f"frechet-{self.extractor}"
        return "sfid" if self.extractor.endswith("/spatial") else "fid"

    def estimates(self, sets):
        return frechet_estimates(sets, self.covariance)

    def difference(self, a, b):
        return frechet_differences(a, b)

    def settings(self) -> str:
        return f"cov:{self.covariance}|"


@dataclass(frozen=True)
class PairwiseFeatureDistance(SetMetric):
    """Mean |phi(x) - phi(y)|^2 of pictures and their reconstructions: per picture, with an interval and no bias in n.

    FlowMo reports it beside rFID as PAIRWISE_INCEPTION. Independent sets have no such pairs: withheld.
    """

    version = 2
    family = "pairwise"

    def measure(self, media, ctx):
        columns = super().measure(media, ctx)
        real, fake = (columns.get(f"{self.extractor}/{side}") for side in ("real", "fake"))
        if real is None or fake is None:
            return columns
        return {**columns, self.name: np.square(real.astype(np.float64) - fake).sum(1).tolist()}

    def estimates(self, sets):
        from bench import stats

        if not sets.paired:
            raise Error("a pairwise distance needs pictures and their own reconstructions, not independent sets")
        squares = np.square(sets.generated.astype(np.float64) - sets.reference).sum(1)
        return {"": stats.mean(squares, sets.generated_clusters, sets.seed)}

    def signature(self, table):
        return f"{self.name}|{describe_network(table, self.extractor)}|{self.quantise}|v:{self.version}"
