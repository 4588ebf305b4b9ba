"""Which data to train on, and how much of each class: scores of samples, kept fractions, robust class weights.

The building blocks of pruning and reweighting (arXiv 2409.19128): scores of features within each class, as in instance
selection for GANs (DeVries et al. 2020), then class weights by distributionally robust optimisation, as DoReMi (Xie et
al. 2023, arXiv 2305.10429) or group DRO (Sagawa et al. 2020, arXiv 1911.08731) update them. Density keeps what is
typical: it buys fidelity with recall, so report recall of each class beside every curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

RIDGE = 1e-5  # on the covariance of a class
EXPLAINED = 0.95  # share of the variance that the components of ppca reach
NEIGHBOUR = 5
CELLS = 10  # k-means cells of a class, at most
MIX = 1e-4  # DoReMi: share of the uniform weights
METHODS = ("gaussian", "ppca", "knn", "moderate", "cluster", "random", "loss")


def scores(
    features: Any, labels: Any = None, method: str = "gaussian", *, losses: Any = None, seed: int = 0
) -> np.ndarray:
    """A score [n] of each sample, computed within its class; high is kept first.

    `features` [n, d], `labels` [n] (None: one class). `gaussian` and `ppca` are log likelihoods, `knn` is minus the
    distance to the fifth neighbour, `moderate` minus the distance of |x - mean| to its median, `cluster` keeps the same
    share of each k-means cell, nearest to its centre first, `random` is uniform, `loss` minus `losses` [n] (a sample's
    diffusion loss at common noise). Raises ValueError for an unknown method, other lengths, values that are not finite,
    and `loss` without losses.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError("features must be finite numbers [samples, dimensions]")
    classes = _labels(labels, len(x))
    if method == "loss":
        y = np.asarray(losses if losses is not None else [], np.float64)
        if y.shape != (len(x),) or not np.isfinite(y).all():
            raise ValueError(f"the method loss needs {len(x)} finite losses")
        return -y
    rng = np.random.Generator(np.random.Philox(key=[seed, 21]))
    if method == "random":
        return rng.random(len(x))
    within = {"gaussian": _gaussian, "ppca": _ppca, "knn": _knn, "moderate": _moderate}
    found = np.empty(len(x))
    for k in np.unique(classes):
        rows = np.flatnonzero(classes == k)
        found[rows] = _cluster(x[rows], seed) if method == "cluster" else within[method](x[rows])
    return found


def keep(score: Any, fraction: float, labels: Any = None) -> np.ndarray:
    """A mask [n] of the highest scores: round(fraction x n_k) of each class, one at least; ties by position.

    Raises ValueError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction = {fraction:g} must lie in (0, 1]")
    y = np.asarray(score, np.float64)
    classes = _labels(labels, len(y))
    mask = np.zeros(len(y), bool)
    for k in np.unique(classes):
        rows = np.flatnonzero(classes == k)
        order = rows[np.argsort(-y[rows], kind="stable")]
        mask[order[: max(round(fraction * len(rows)), 1)]] = True
    return mask


def pseudo_classes(features: Any, count: int, seed: int = 0) -> np.ndarray:
    """k-means cells [n] in place of classes, for data without labels."""
    from sklearn.cluster import KMeans

    x = np.asarray(features, np.float64)
    return KMeans(min(count, len(x)), n_init=4, random_state=seed).fit_predict(x)


def _labels(labels: Any, n: int) -> np.ndarray:
    found = np.zeros(n, int) if labels is None else np.asarray(labels)
    if found.shape != (n,):
        raise ValueError(f"labels must be {n}, one for each sample")
    return found


def _gaussian(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(0)
    cov = centred.T @ centred / len(x) + RIDGE * np.eye(x.shape[1])
    lower = np.linalg.cholesky(cov)
    z = np.linalg.solve(lower, centred.T)
    return -0.5 * (z**2).sum(0) - np.log(np.diag(lower)).sum() - 0.5 * x.shape[1] * math.log(2 * math.pi)


def _ppca(x: np.ndarray) -> np.ndarray:
    """Log likelihood of probabilistic PCA (Tipping and Bishop 1999) with the fewest components that reach 95 %."""
    n, d = x.shape
    centred = x - x.mean(0)
    variances, vectors = np.linalg.eigh(centred.T @ centred / max(n - 1, 1))
    variances, vectors = np.maximum(variances[::-1], 0), vectors[:, ::-1]
    total = variances.sum()
    if total <= 0:
        return np.zeros(n)
    q = min(int(np.searchsorted(np.cumsum(variances) / total, EXPLAINED)) + 1, d - 1) if d > 1 else 0
    noise = max(float(variances[q:].mean()), RIDGE)
    along = np.maximum(variances[:q], noise)
    z = centred @ vectors[:, :q]
    rest = np.maximum((centred**2).sum(1) - (z**2).sum(1), 0)
    distance = (z**2 / along).sum(1) + rest / noise
    return -0.5 * (distance + np.log(along).sum() + (d - q) * math.log(noise) + d * math.log(2 * math.pi))


def _knn(x: np.ndarray) -> np.ndarray:
    from scipy.spatial import cKDTree

    k = min(NEIGHBOUR, len(x) - 1)
    return -cKDTree(x).query(x, k + 1)[0][:, k] if k else np.zeros(1)


def _moderate(x: np.ndarray) -> np.ndarray:
    distance = np.linalg.norm(x - x.mean(0), axis=1)
    return -np.abs(distance - np.median(distance))


def _cluster(x: np.ndarray, seed: int) -> np.ndarray:
    """Minus the share of a sample's cell that lies nearer to the cell's centre."""
    cell = pseudo_classes(x, min(CELLS, max(len(x) // 10, 1)), seed)
    found = np.empty(len(x))
    for k in np.unique(cell):
        rows = np.flatnonzero(cell == k)
        order = np.argsort(np.linalg.norm(x[rows] - x[rows].mean(0), axis=1), kind="stable")
        found[rows[order]] = -(np.arange(len(rows)) + 0.5) / len(rows)
    return found


# -- class weights


@dataclass
class DoReMi:
    """Class weights that follow the excess loss of a proxy over a reference; `weights` is the average over steps.

    ln q <- ln q + eta e_k, e_k = mean of max(loss - reference, 0) over the samples of a class; normalised; q <- (1 -
    1e-4) q + 1e-4 / K. Classes that a batch lacks keep their last e_k. Loss and reference must share time and noise,
    and be divided by the mean of their time bin (`by_time`), else the bins of high noise decide alone.
    """

    classes: int
    eta: float = 1.0
    current: np.ndarray = field(init=False)
    excess: np.ndarray = field(init=False)
    total: np.ndarray = field(init=False)
    steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.current = np.full(self.classes, 1 / self.classes)
        self.excess, self.total = np.zeros(self.classes), np.zeros(self.classes)

    def update(self, loss: Any, reference: Any, labels: Any) -> np.ndarray:
        """One step with samples [B]; returns q [K], with which the proxy's loss is weighted at this step."""
        over = np.maximum(np.asarray(loss, np.float64) - np.asarray(reference, np.float64), 0)
        if not np.isfinite(over).all():
            raise ValueError("a loss is not finite: the weights would be lost")
        mean, there = _class_means(over, labels, self.classes)
        self.excess[there] = mean[there]
        q = _shifted(self.current, self.eta * self.excess)
        self.current = (1 - MIX) * q + MIX / self.classes
        self.total += self.current
        self.steps += 1
        return self.current

    @property
    def weights(self) -> np.ndarray:
        """The average of q over the steps [K]; uniform before the first."""
        return self.total / self.steps if self.steps else self.current


@dataclass
class GroupDRO:
    """Class weights of group DRO: q_k <- q_k exp(eta (loss_k + adjustment / sqrt(n_k))), normalised; no reference.

    `counts` [K] are the classes' sizes. Classes that a batch lacks do not move.
    """

    counts: np.ndarray
    eta: float = 0.01
    adjustment: float = 0.0
    current: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.asarray(self.counts, np.float64)
        self.current = np.full(len(self.counts), 1 / len(self.counts))

    def update(self, loss: Any, labels: Any) -> np.ndarray:
        """One step with samples [B]; returns q [K]."""
        loss = np.asarray(loss, np.float64)
        if not np.isfinite(loss).all():
            raise ValueError("a loss is not finite: the weights would be lost")
        mean, there = _class_means(loss, labels, len(self.counts))
        move = np.where(there, mean + self.adjustment / np.sqrt(self.counts), 0.0)
        self.current = _shifted(self.current, self.eta * move)
        return self.current


def _class_means(values: np.ndarray, labels: Any, classes: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.asarray(labels)
    if labels.shape != values.shape or labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        raise ValueError(f"labels must be {len(values)} numbers below {classes}")
    size = np.bincount(labels, minlength=classes)
    return np.bincount(labels, values, classes) / np.maximum(size, 1), size > 0


def _shifted(q: np.ndarray, move: np.ndarray) -> np.ndarray:
    log_q = np.log(q) + move
    found = np.exp(log_q - log_q.max())
    return found / found.sum()


def sample_weights(weights: Any, labels: Any) -> np.ndarray:
    """The probability [n] with which each sample is drawn so that class k has the share `weights[k]`."""
    labels = np.asarray(labels)
    size = np.bincount(labels, minlength=len(weights))
    found = (np.asarray(weights, np.float64) / np.maximum(size, 1))[labels]
    return found / found.sum()


def by_time(loss: Any, time: Any, means: Any = None, bins: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Losses [n] over the mean of their time bin, and the means [bins]; times lie in [0, 1].

    `means` of a reference keep proxy and reference on one scale. Bins without a sample have NaN. Raises ValueError for
    a time outside [0, 1].
    """
    y, t = np.asarray(loss, np.float64), np.asarray(time, np.float64)
    if not ((t >= 0) & (t <= 1)).all():
        raise ValueError("times must lie in [0, 1]")
    index = np.minimum((t * bins).astype(int), bins - 1)
    if means is None:
        size = np.bincount(index, minlength=bins)
        means = np.where(size > 0, np.bincount(index, y, bins) / np.maximum(size, 1), np.nan)
    return y / np.asarray(means, np.float64)[index], np.asarray(means, np.float64)


# -- curves


class SpeedUp(NamedTuple):
    """Cost to a target of the reference over that of a method, with its 95 % interval over seeds."""

    value: float
    low: float
    high: float


def cost_to(target: float, cost: Any, metric: Any) -> float:
    """The first cost at which a metric that falls reaches `target`, linear in ln cost between points; inf if never."""
    c, y = np.log(np.asarray(cost, np.float64)), np.asarray(metric, np.float64)
    below = np.flatnonzero(y <= target)
    if not len(below):
        return math.inf
    k = int(below[0])
    if k == 0:
        return math.exp(c[0])
    return math.exp(c[k - 1] + (y[k - 1] - target) / (y[k - 1] - y[k]) * (c[k] - c[k - 1]))


def speed_up(target: float, cost: Any, metric: Any, reference_cost: Any, reference: Any) -> SpeedUp:
    """How much cheaper a method reaches `target`: metric [seeds, k] at costs [k], and the reference's.

    The ratio of geometric means over seeds, with Welch's t interval in logarithms; NaN where a seed never reaches the
    target (no speed-up can be told), bounds NaN with fewer than two seeds.
    """
    from scipy.special import stdtrit

    logs = [
        np.log([cost_to(target, c, row) for row in np.atleast_2d(np.asarray(m, np.float64))])
        for c, m in ((reference_cost, reference), (cost, metric))
    ]
    if not all(np.isfinite(v).all() for v in logs):
        return SpeedUp(math.nan, math.nan, math.nan)
    value = float(logs[0].mean() - logs[1].mean())
    if min(map(len, logs)) < 2:
        return SpeedUp(math.exp(value), math.nan, math.nan)
    parts = np.array([v.var(ddof=1) / len(v) for v in logs])
    if parts.sum() == 0:
        return SpeedUp(*[math.exp(value)] * 3)
    freedom = parts.sum() ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, logs, strict=True))
    half = float(stdtrit(freedom, 0.975)) * math.sqrt(parts.sum())
    return SpeedUp(math.exp(value), math.exp(value - half), math.exp(value + half))


def curve(
    score: Any, fractions: Any, measure: Callable[[np.ndarray], float], labels: Any = None
) -> list[tuple[float, int, float]]:
    """(fraction, samples kept, metric) for each fraction; `measure` trains or computes on the kept indices."""
    rows = []
    for fraction in fractions:
        kept = np.flatnonzero(keep(score, fraction, labels))
        rows.append((float(fraction), len(kept), float(measure(kept))))
    return rows
