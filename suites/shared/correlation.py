"""Does the loss say how good the pictures are? Rank agreement of loss and FID, for each guidance scale.

A row is one checkpoint sampled at one guidance scale: its run, validation loss, training compute and FID (or another
distance that is positive and better when small). Rows of one run are one cluster: every interval comes from drawing
whole runs, the same ones at all scales, so that scales are compared on the same draws. Distances of other sample counts
or other networks are other quantities, and are refused together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95
MARGIN = 0.1  # what rho may lose against the least guidance before the loss is no longer a guide
LEAST_RUNS = 5  # below, no interval
LEAST_SCALES = 4  # for the parabola of one run
NAMES = ("spearman", "kendall", "pearson")


class Interval(NamedTuple):
    """A value with its 95 % interval; NaN bounds where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """Checked rows, each column [n]: run (index into `names`), guidance, loss, FLOPs, value, and budget or None."""

    run: np.ndarray
    guidance: np.ndarray
    loss: np.ndarray
    flops: np.ndarray
    value: np.ndarray
    budget: np.ndarray | None
    names: tuple[str, ...]
    n_gen: int
    extractor: str


def scores(
    run: Sequence[str],
    guidance: Any,
    loss: Any,
    flops: Any,
    value: Any,
    *,
    n_gen: Any,
    extractor: str | Sequence[str],
    budget: Any = None,
) -> Scores:
    """Columns of one length; `n_gen` (pictures behind each value) and `extractor` are one for all, or a column.

    Raises ValueError naming the first bad row: other lengths, values that are not positive and finite (a loss may be
    negative), several n_gen or extractors, a checkpoint (run and FLOPs) twice at one guidance scale.
    """
    columns = {"guidance": guidance, "loss": loss, "flops": flops, "value": value}
    columns |= {} if budget is None else {"budget": budget}
    arrays = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    labels = np.asarray([str(r) for r in run])
    n = len(labels)
    for name, values in arrays.items():
        if values.shape != (n,):
            raise ValueError(f"{name} must be {n} numbers, one for each run named")
        good = np.isfinite(values) if name == "loss" else np.isfinite(values) & (values > 0)
        if not good.all():
            bad = int(np.flatnonzero(~good)[0])
            what = "finite" if name == "loss" else "positive and finite"
            raise ValueError(f"{name} must be {what}; row {bad} holds {values[bad]}")
    counts = sorted(set(np.broadcast_to(np.asarray(n_gen), n).tolist()))
    if len(counts) > 1:
        raise ValueError(
            f"values of {', '.join(map(str, counts))} pictures are not comparable: "
            "measure all with one number, or bring each to infinity with `without_bias`"
        )
    extractors = sorted(set(np.broadcast_to(np.asarray(extractor), n).tolist()))
    if len(extractors) > 1:
        raise ValueError(f"values of several networks are not comparable: {', '.join(extractors)}")
    seen: dict[tuple[Any, ...], int] = {}
    for i, key in enumerate(zip(labels, arrays["flops"], arrays["guidance"], strict=True)):
        if key in seen:
            raise ValueError(f"rows {seen[key]} and {i} are one checkpoint of {str(key[0])!r} at guidance {key[2]:g}")
        seen[key] = i
    if not n:
        raise ValueError("there are no rows")
    names, index = np.unique(labels, return_inverse=True)
    found = [arrays.get(k) for k in ("guidance", "loss", "flops", "value", "budget")]
    return Scores(index, *found, tuple(names.tolist()), counts[0], extractors[0])


def without_bias(n_gen: Any, value: Any) -> tuple[float, float]:
    """A distance at infinitely many pictures, and its standard error: a line in 1 / n through values of >= 3 counts.

    FID of n pictures is too high by a term in 1 / n (Chong and Forsyth 2020, arXiv 1911.07023). The error is NaN
    where three values leave none. Raises ValueError for fewer than three counts.
    """
    n, y = np.asarray(n_gen, np.float64), np.asarray(value, np.float64)
    if len(np.unique(n)) < 3 or n.shape != y.shape:
        raise ValueError(f"{len(np.unique(n))} sample counts; three are needed to take the bias away")
    design = np.stack([np.ones(len(n)), 1 / n], 1)
    gram = np.linalg.inv(design.T @ design)
    found = gram @ design.T @ y
    residual = y - design @ found
    freedom = len(n) - 2
    return float(found[0]), math.sqrt(float(residual @ residual) / freedom * gram[0, 0]) if freedom > 0 else math.nan


# -- correlation with multiplicities


def ranks(x: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Midranks [B, n] of values [n], each standing m times [B, n]."""
    group = np.unique(x, return_inverse=True)[1]
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    held = np.add.reduceat(m[:, order], starts, axis=1)
    return (np.cumsum(held, 1) - held + (held + 1) / 2)[:, group]


def pearson(x: np.ndarray, y: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Weighted correlation [B] of x and y, [n] or [B, n]; NaN where one does not vary."""
    total = m.sum(1, keepdims=True)
    dx = x - (m * x).sum(1, keepdims=True) / total
    dy = y - (m * y).sum(1, keepdims=True) / total
    sxx, syy = (m * dx * dx).sum(1), (m * dy * dy).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (m * dx * dy).sum(1) / np.sqrt(sxx * syy)
    tiny = 1e-24 * np.maximum(np.abs(x).max(), 1e-300) ** 2, 1e-24 * np.maximum(np.abs(y).max(), 1e-300) ** 2
    return np.where((sxx > tiny[0]) & (syy > tiny[1]), np.clip(found, -1, 1), np.nan)


def spearman(x: np.ndarray, y: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Spearman's rho [B] of values [n] with multiplicities [B, n], ties at their midranks."""
    return pearson(ranks(x, m), ranks(y, m), m)


def kendall(x: np.ndarray, y: np.ndarray, m: np.ndarray, block: np.ndarray | None = None) -> np.ndarray:
    """Kendall's tau-b [B] of values [n] with multiplicities [B, n]; only pairs of one `block` [n] count where given.

    A row drawn twice is tied with itself, and says nothing.
    """
    sx, sy = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    if block is not None:
        same = block[:, None] == block
        sx, sy = sx * same, sy * same

    def pairs(q: np.ndarray) -> np.ndarray:
        return ((m @ q) * m).sum(1)

    with np.errstate(invalid="ignore", divide="ignore"):
        return pairs(sx * sy) / np.sqrt(pairs(np.abs(sx)) * pairs(np.abs(sy)))


def partial(xy: np.ndarray, xz: np.ndarray, yz: np.ndarray) -> np.ndarray:
    """Correlation of x and y given z, of the three plain ones; NaN where z explains one of them wholly."""
    left = (1 - xz**2) * (1 - yz**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(left > 1e-12, np.clip((xy - xz * yz) / np.sqrt(left), -1, 1), np.nan)


# -- by guidance scale


@dataclass(frozen=True)
class Comparison:
    """Is Spearman's rho the same at two scales? `difference` is of Fisher's z; `adjusted` is Holm's p of all pairs."""

    first: float
    second: float
    difference: float
    p: float
    adjusted: float


@dataclass(frozen=True)
class Correlations:
    """For each guidance scale (ascending) its statistics, and what follows.

    `statistics[k]` of scale `guidance[k]` has "spearman", "kendall", "pearson" of (loss, ln FID); the same with
    "compute " before of (ln C, ln FID); "partial", Spearman's of (loss, ln FID) given ln C; and, with budgets, "within
    budget", Kendall's over pairs of one budget. `trusted` is the largest scale up to which rho is nowhere below that of
    the smallest scale by more than 0.1.
    """

    guidance: tuple[float, ...]
    rows: tuple[int, ...]
    runs: tuple[int, ...]
    statistics: tuple[Mapping[str, Interval], ...]
    comparisons: tuple[Comparison, ...]
    trusted: float
    count: int
    seed: int


def correlations(s: Scores, *, count: int = 4000, seed: int = 0) -> Correlations:
    """All correlations at each guidance scale, with 95 % intervals from `count` draws of whole runs.

    Intervals are t intervals of Fisher's z with the spread of the draws (percentiles of correlations cover too little
    at some dozens of runs), as many degrees of freedom as runs less two. Below 5 runs there is none. Raises ValueError
    where a scale has fewer than 3 rows.
    """
    scales = np.unique(s.guidance)
    rng = np.random.Generator(np.random.Philox(key=[seed, 11]))
    groups = len(s.names)
    drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=count).astype(np.float64)
    once = np.ones((1, groups))
    found, rows, runs, z_of = [], [], [], {}
    for w in scales:
        at = np.flatnonzero(s.guidance == w)
        if len(at) < 3:
            raise ValueError(f"guidance {w:g} has {len(at)} rows; a correlation needs 3 or more")
        k = len(np.unique(s.run[at]))
        single = _statistics(s, at, once)
        many = _statistics(s, at, drawn)
        found.append({name: _interval(name, float(single[name][0]), many[name], k) for name in single})
        rows.append(len(at))
        runs.append(k)
        z_of[float(w)] = float(_fisher(single["spearman"])[0]), _fisher(many["spearman"])
    rho = [one["spearman"].value for one in found]
    fallen = [i for i in range(len(rho)) if not rho[i] >= rho[0] - MARGIN]
    trusted = float(scales[(fallen[0] if fallen else len(scales)) - 1]) if rho[0] == rho[0] else math.nan
    return Correlations(
        tuple(map(float, scales)), tuple(rows), tuple(runs), tuple(found), _compare(z_of), trusted, count, seed
    )


def _statistics(s: Scores, at: np.ndarray, drawn: np.ndarray) -> dict[str, np.ndarray]:
    """Each statistic [B] of the rows `at`, with runs drawn [B, runs]."""
    m = drawn[:, s.run[at]]
    loss, compute, value = s.loss[at], np.log(s.flops[at]), np.log(s.value[at])
    found = {}
    for prefix, x in (("", loss), ("compute ", compute)):
        for name, function in zip(NAMES, (spearman, kendall, pearson), strict=True):
            found[prefix + name] = function(x, value, m)
    found["partial"] = partial(found["spearman"], spearman(loss, compute, m), found["compute spearman"])
    if s.budget is not None:
        found["within budget"] = kendall(loss, value, m, s.budget[at])
    return found


def _fisher(r: np.ndarray) -> np.ndarray:
    return np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))


def _interval(name: str, value: float, draws: np.ndarray, runs: int) -> Interval:
    from scipy.special import stdtrit

    known = draws[np.isfinite(draws)]
    if runs < LEAST_RUNS or not math.isfinite(value) or len(known) < LEVEL * len(draws):
        return Interval(value, math.nan, math.nan)
    # A perfect order of few runs does not prove a perfect correlation: half a swap of neighbours may be missing, and
    # the spread is at least that of independent normal rows (Fieller, Hartley and Pearson 1957) at the same z.
    perfect = 1 - 6 / (runs * (runs**2 - 1))
    z = float(_fisher(np.clip(value, -perfect, perfect)))
    # draws of k runs spread as if 1 / k were 1 / (k - 1)
    spread = float(_fisher(np.clip(known, -perfect, perfect)).std()) * math.sqrt(runs / (runs - 1))
    tau = name in ("kendall", "compute kendall", "within budget")
    if abs(value) >= perfect:
        spread = max(spread, math.sqrt(0.437 / max(runs - 4, 1) if tau else 1.06 / (runs - 3)))
    half = float(stdtrit(runs - 2, 0.5 + LEVEL / 2)) * spread
    return Interval(value, min(math.tanh(z - half), value), max(math.tanh(z + half), value))


def _compare(z_of: Mapping[float, tuple[float, np.ndarray]]) -> tuple[Comparison, ...]:
    """Every pair of scales: how often the draws' difference lies further from its centre than 0 does; Holm's p."""
    pairs = []
    for first, second in combinations(z_of, 2):
        difference = z_of[second][0] - z_of[first][0]
        draws = z_of[second][1] - z_of[first][1]
        draws = draws[np.isfinite(draws)]
        p = (1 + (np.abs(draws - draws.mean()) >= abs(difference)).sum()) / (1 + len(draws)) if len(draws) else math.nan
        pairs.append((first, second, difference, float(p)))
    adjusted = holm([p for *_, p in pairs])
    return tuple(Comparison(*pair, q) for pair, q in zip(pairs, adjusted, strict=True))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: at least as large as the ones of every smaller p."""
    order = np.argsort(p, kind="stable")
    found, largest = [0.0] * len(p), 0.0
    for k, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - k) * p[i]))
        found[i] = largest
    return found


# -- the best guidance


@dataclass(frozen=True)
class BestGuidance:
    """One checkpoint's optimum: the vertex of the parabola of ln FID in ln w. `problem` is empty where there is one."""

    run: str
    flops: float
    guidance: Interval  # w*
    value: float  # FID at it
    problem: str = ""


def best_guidance(s: Scores) -> tuple[BestGuidance, ...]:
    """w* of each checkpoint by least squares, with Fieller's interval (unbounded where the curvature may be 0)."""
    found = []
    for run, flops in dict.fromkeys(zip(s.run.tolist(), s.flops.tolist(), strict=True)):
        at = np.flatnonzero((s.run == run) & (s.flops == flops))
        found.append(_vertex(s.names[run], flops, np.log(s.guidance[at]), np.log(s.value[at])))
    return tuple(found)


def _vertex(run: str, flops: float, x: np.ndarray, y: np.ndarray) -> BestGuidance:
    from scipy.special import stdtrit

    nothing = Interval(math.nan, math.nan, math.nan)
    if len(x) < LEAST_SCALES:
        return BestGuidance(run, flops, nothing, math.nan, f"{len(x)} guidance scales; {LEAST_SCALES} are needed")
    centre = x.mean()
    u = x - centre
    design = np.stack([u**2, u, np.ones(len(u))], 1)
    gram = np.linalg.inv(design.T @ design)
    p, q, level = gram @ design.T @ y
    if not p > 0:
        return BestGuidance(run, flops, nothing, math.nan, "the curve opens downwards")
    v = -q / (2 * p)
    if not u.min() < v < u.max():
        return BestGuidance(run, flops, nothing, math.nan, "the minimum lies outside the sampled scales")
    freedom = len(x) - 3
    cov = gram * float(((y - design @ (p, q, level)) ** 2).sum()) / freedom
    t2 = float(stdtrit(freedom, 0.5 + LEVEL / 2)) ** 2
    # v is inside where the slope 2 p v + q does not differ from 0: a quadratic inequality in v
    a = 4 * (p * p - t2 * cov[0, 0])
    b = 4 * (p * q - t2 * cov[0, 1])
    c = q * q - t2 * cov[1, 1]
    low, high = -math.inf, math.inf
    if a > 0:
        half = math.sqrt(max(b * b - 4 * a * c, 0.0))
        low, high = (-b - half) / (2 * a), (-b + half) / (2 * a)
    interval = Interval(math.exp(v + centre), _exp(low + centre), _exp(high + centre))
    return BestGuidance(run, flops, interval, math.exp(level - q * q / (4 * p)))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


@dataclass(frozen=True)
class Line:
    """y = exp(level) * C^exponent through points, with the exponent's interval from draws of whole runs."""

    exponent: Interval
    level: float
    points: int
    runs: int

    def __call__(self, flops: Any) -> np.ndarray:
        return np.exp(self.level + self.exponent.value * np.log(np.asarray(flops, np.float64)))


def guidance_law(optima: Sequence[BestGuidance], *, count: int = 4000, seed: int = 0) -> Line:
    """ln w* against ln C over the checkpoints that have an optimum. Raises ValueError for fewer than 3 of them."""
    used = [o for o in optima if not o.problem]
    run = [o.run for o in used]
    return power_line(run, [o.flops for o in used], [o.guidance.value for o in used], count=count, seed=seed)


def power_line(run: Sequence[str], flops: Any, value: Any, *, count: int = 4000, seed: int = 0) -> Line:
    """A line of ln value in ln C by least squares; its exponent's interval is t with the spread of drawn runs."""
    from scipy.special import stdtrit

    x, y = np.log(np.asarray(flops, np.float64)), np.log(np.asarray(value, np.float64))
    if len(x) < 3 or np.ptp(x) < 1e-9:
        raise ValueError(f"{len(x)} points at {len(set(x.tolist()))} computes; a line needs 3 points and 2 computes")
    names, index = np.unique(np.asarray(run, str), return_inverse=True)
    rng = np.random.Generator(np.random.Philox(key=[seed, 12]))
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)[:, index]

    def slope(m: np.ndarray) -> np.ndarray:
        total = m.sum(1, keepdims=True)
        dx = x - (m @ x)[:, None] / total
        sxx = (m * dx**2).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(sxx > 1e-12, (m * dx * y).sum(1) / sxx, np.nan)

    exponent = float(slope(np.ones((1, len(x))))[0])
    draws = slope(drawn)
    known = draws[np.isfinite(draws)]
    low = high = math.nan
    if len(names) >= LEAST_RUNS and len(known) >= LEVEL * count:
        half = (
            float(stdtrit(len(names) - 2, 0.5 + LEVEL / 2))
            * float(known.std())
            * math.sqrt(len(names) / (len(names) - 1))
        )
        low, high = exponent - half, exponent + half
    return Line(Interval(exponent, low, high), float(y.mean() - exponent * x.mean()), len(x), len(names))


# -- FID along compute


class Curve(NamedTuple):
    """Points of FID along compute, one for each checkpoint, in order of compute: laws of one variable take them.

    `guidance` is the scale of each: the same for all, or the chosen one (the geometric mean of the two halves').
    """

    run: tuple[str, ...]
    flops: np.ndarray
    value: np.ndarray
    guidance: np.ndarray


def at_guidance(s: Scores, guidance: float) -> Curve:
    """FID(C) at one scale. Raises ValueError for a scale that no row has."""
    at = np.flatnonzero(s.guidance == guidance)
    if not len(at):
        raise ValueError(f"no row has guidance {guidance:g}; there are {', '.join(f'{w:g}' for w in set(s.guidance))}")
    at = at[np.argsort(s.flops[at], kind="stable")]
    return Curve(tuple(s.names[i] for i in s.run[at]), s.flops[at], s.value[at], s.guidance[at])


def envelope(first: Scores, second: Scores) -> tuple[Curve, float]:
    """FID(C) along the best guidance, without the reward for luck; and the bias that the plain minimum would have had.

    `first` and `second` hold the same checkpoints and scales, measured on two halves of the generated pictures. The
    scale is chosen on one half and scored on the other, both ways; the two are averaged in logarithms. The bias is the
    mean of ln(min of a half / the cross-fitted value), 0 or negative up to chance. Raises ValueError where the halves
    differ in rows, sample count or network.
    """
    tables = []
    for s in (first, second):
        keys = [(s.names[r], c, w) for r, c, w in zip(s.run, s.flops.tolist(), s.guidance.tolist(), strict=True)]
        tables.append(dict(zip(keys, s.value.tolist(), strict=True)))
    if (first.n_gen, first.extractor) != (second.n_gen, second.extractor) or tables[0].keys() != tables[1].keys():
        raise ValueError("the two halves must have the same checkpoints and scales, sample count and network")
    cells: dict[tuple[float, str], list[float]] = {}
    for run, c, w in tables[0]:
        cells.setdefault((c, run), []).append(w)
    found, plain = [], []
    for (c, run), scales in sorted(cells.items()):
        chosen = [min(scales, key=lambda w, t=t, run=run, c=c: t[run, c, w]) for t in tables]
        crossed = [math.log(tables[1 - k][run, c, chosen[k]]) for k in (0, 1)]
        plain.append(np.mean([math.log(tables[k][run, c, chosen[k]]) for k in (0, 1)]) - np.mean(crossed))
        found.append((run, c, math.exp(np.mean(crossed)), math.sqrt(chosen[0] * chosen[1])))
    run, c, value, w = zip(*found, strict=True)
    return Curve(run, np.array(c), np.array(value), np.array(w)), float(np.mean(plain))
