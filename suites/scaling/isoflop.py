"""Approaches 1 and 2: the envelope of training curves, and a parabola for each budget (isoFLOP profiles).

Approach 2 of Hoffmann et al. (arXiv 2203.15556, section 3.2): for each budget the loss is a parabola in ln N whose
vertex is N*; a line through the vertices in ln C gives the exponent. The vertex of a least-squares parabola is not the
optimum of the surface, as the two sides of an isoFLOP curve are not alike: `corrected_vertex` undoes that.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from suites.scaling.fit import Surface
from suites.scaling.table import Runs

LEAST_SIZES = 4
GAPS = 25  # points between two sizes, for the minimum of an interpolated curve
ONE_SIDED = 5.0  # the longer over the shorter side of a curve, in ln N, above which it is no parabola
WEAK = 4.0  # curvature over its error below which the delta method is not trusted


@dataclass(frozen=True)
class Vertex:
    """The minimum of one budget's curve. `problem` is empty where it may be used for a law."""

    budget: float
    params: float  # N*; NaN where there is none
    tokens: float  # D*
    loss: float  # at the vertex
    log_se: float  # standard error of ln N*, delta method; NaN where there is none
    low: float  # of N*, 95 %: delta method, or Fieller's where the curvature is weak
    high: float
    curvature: float  # p of loss = p ln(N)^2 + q ln N + s
    curvature_se: float
    sizes: int
    problem: str = ""
    interpolated: bool = False  # by Akima's spline, not by a parabola


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * C^exponent by a line in logarithms."""

    exponent: float
    log_coefficient: float
    exponent_se: float
    points: int

    def __call__(self, flops: Any) -> np.ndarray:
        return np.exp(self.log_coefficient + self.exponent * np.log(np.asarray(flops, np.float64)))


@dataclass(frozen=True)
class Profiles:
    """Approach 2's result: a vertex for each budget, and the laws N*(C), D*(C) through those that may be used."""

    vertices: tuple[Vertex, ...]
    params: PowerLaw | None
    tokens: PowerLaw | None
    warnings: tuple[str, ...]


def parabola(
    params: np.ndarray,
    loss: np.ndarray,
    tokens: np.ndarray,
    budget: float,
    weights: np.ndarray | None = None,
    strict: bool = True,
) -> Vertex:
    """The least-squares parabola of loss in ln N, its vertex, and the vertex' error; rows of one budget, [n] each.

    `strict` also refuses a curvature whose 95 % interval covers 0 and sizes that lie to one side of the minimum.
    """
    from scipy.special import stdtrit

    n, sizes = len(params), len(np.unique(params))
    nothing = {"params": math.nan, "tokens": math.nan, "loss": math.nan, "log_se": math.nan}
    nothing |= {"low": math.nan, "high": math.nan, "curvature": math.nan, "curvature_se": math.nan}
    if sizes < LEAST_SIZES:
        return Vertex(budget, sizes=sizes, problem=_too_few(sizes), **nothing)
    x = np.log(params)
    centre = x.mean()
    u = x - centre
    design = np.stack([u**2, u, np.ones(n)], 1)
    w = np.ones(n) if weights is None else weights * n / weights.sum()
    gram = np.linalg.inv((design * w[:, None]).T @ design)
    p, q, s = gram @ (design * w[:, None]).T @ loss
    residual = loss - design @ (p, q, s)
    variance = float((w * residual**2).sum() / max(n - 3, 1))
    cov = gram * variance
    se_p = math.sqrt(cov[0, 0])
    v = -q / (2 * p) if p else math.nan
    nothing |= {"curvature": float(p), "curvature_se": se_p}
    if not p > 0:
        return Vertex(budget, sizes=sizes, problem="the curve opens downwards", **nothing)
    g = np.array([q / (2 * p * p), -1 / (2 * p)])
    log_se = math.sqrt(max(float(g @ cov[:2, :2] @ g), 0.0))
    t = float(stdtrit(n - 3, 0.975)) if n > 3 else math.nan
    low, high = v - t * log_se, v + t * log_se
    if n > 3 and se_p > 0 and p / se_p < WEAK:
        low, high = fieller(-q / 2, p, cov[1, 1] / 4, cov[0, 0], -cov[0, 1] / 2, t)
    problem = ""
    short, long = sorted((v - u.min(), u.max() - v))
    if short <= 0:
        problem = "the minimum lies outside the sampled sizes"
    elif strict and n > 3 and p < t * se_p:
        problem = "the curvature is not distinguishable from none"
    elif strict and long > ONE_SIDED * short:
        problem = "the sizes lie to one side of the minimum"
    found = _exp(v + centre)
    return Vertex(
        budget,
        params=found,
        tokens=_least_tokens(tokens, loss, u, v, w),
        loss=float(s - q * q / (4 * p)),
        log_se=log_se,
        low=_exp(low + centre),
        high=_exp(high + centre),
        curvature=float(p),
        curvature_se=se_p,
        sizes=sizes,
        problem=problem,
    )


def _too_few(sizes: int) -> str:
    return f"{sizes} size{'' if sizes == 1 else 's'}; {LEAST_SIZES} are needed"


def _least_tokens(tokens: np.ndarray, loss: np.ndarray, u: np.ndarray, v: float, w: np.ndarray) -> float:
    """D*: the vertex of the budget's own parabola in ln D; where that has none inside, ln D at v as a line in u."""
    z = np.log(tokens)
    own = math.nan
    if len(np.unique(z.round(3))) >= LEAST_SIZES:
        p, q, _ = np.polyfit(z - z.mean(), loss, 2, w=np.sqrt(w))
        own = -q / (2 * p) + z.mean() if p > 0 else math.nan
    if z.min() < own < z.max():
        return math.exp(own)
    slope, level = np.polyfit(u, z, 1)
    return _exp(level + slope * v)


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)  # the vertex of a curve that is nearly straight


def fieller(a: float, b: float, var_a: float, var_b: float, cov: float, t: float) -> tuple[float, float]:
    """Fieller's interval of a ratio a / b of two normal estimates; unbounded where b may be 0 (Fieller 1954)."""
    g = t * t * var_b / (b * b)
    if g >= 1:
        return -math.inf, math.inf
    ratio = a / b
    inner = var_a - 2 * ratio * cov + ratio**2 * var_b - g * (var_a - cov**2 / var_b if var_b else 0.0)
    half = t / b * math.sqrt(max(inner, 0.0))
    middle = ratio - g * cov / var_b if var_b else ratio
    return (middle - half) / (1 - g), (middle + half) / (1 - g)


def interpolated(params: np.ndarray, loss: np.ndarray, tokens: np.ndarray, budget: float) -> Vertex:
    """The minimum of Akima's spline of ln loss in ln N, 25 points to a gap; an end is no minimum (formll's way).

    Replicates of a size stand in it with the means of their logarithms.
    """
    from scipy.interpolate import Akima1DInterpolator

    params, which = np.unique(params, return_inverse=True)
    n = len(params)
    nan = math.nan
    if n < LEAST_SIZES:
        return Vertex(budget, nan, nan, nan, nan, nan, nan, nan, nan, n, _too_few(n), True)
    times = np.bincount(which)
    loss, tokens = (np.exp(np.bincount(which, np.log(v)) / times) for v in (loss, tokens))
    x = np.log(params)
    fine = np.concatenate([np.linspace(a, b, GAPS, endpoint=False) for a, b in itertools.pairwise(x)])
    fine = np.append(fine, x[-1])
    curve = Akima1DInterpolator(x, np.log(loss))(fine)
    k = int(np.argmin(curve))
    if k in (0, len(fine) - 1):
        problem = "the minimum lies at an end of the sampled sizes"
        return Vertex(budget, nan, nan, nan, nan, nan, nan, nan, nan, n, problem, True)
    d = math.exp(float(np.interp(fine[k], x, np.log(tokens))))
    return Vertex(budget, math.exp(fine[k]), d, math.exp(curve[k]), nan, nan, nan, nan, nan, n, "", True)


def line(flops: np.ndarray, values: np.ndarray, weights: np.ndarray | None = None) -> PowerLaw:
    """The power law through points (C, y) by (weighted) least squares in logarithms; two points or more."""
    x, y = np.log(flops), np.log(values)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    total = w.sum()
    mx, my = (w @ x) / total, (w @ y) / total
    sxx = w @ (x - mx) ** 2
    slope = (w @ ((x - mx) * (y - my))) / sxx
    residual = y - my - slope * (x - mx)
    freedom = len(x) - 2
    se = math.sqrt(float(w @ residual**2) / freedom / sxx) if freedom > 0 else math.nan
    return PowerLaw(float(slope), float(my - slope * mx), se, len(x))


def profiles(
    runs: Runs, *, vertex: str = "parabola", weighted: bool = False, kappa: float | None = None, strict: bool = True
) -> Profiles:
    """Approach 2 over all budgets of a table.

    `vertex` is "parabola" or "akima"; `weighted` weighs the second stage by 1 / Var(ln N*). D* comes from a budget's
    own tokens at the vertex, or as C / (kappa N*) where kappa is given. `strict` as in `parabola`.
    """
    if vertex not in ("parabola", "akima"):
        raise ValueError(f"vertex {vertex!r} is neither 'parabola' nor 'akima'")
    found = []
    for budget, part in runs.budgets():
        if vertex == "parabola":
            w = None if part.loss_sd is None else 1.0 / part.loss_sd**2
            found.append(parabola(part.params, part.loss, part.tokens, budget, w, strict))
        else:
            found.append(interpolated(part.params, part.loss, part.tokens, budget))
    used = [v for v in found if not v.problem]
    problems: dict[str, list[str]] = {}
    for v in found:
        if v.problem:
            problems.setdefault(v.problem, []).append(f"{v.budget:.3g}")
    warnings = [
        f"budget {at[0]} is not used: {why}" if len(at) == 1 else f"budgets {', '.join(at)} are not used: {why}"
        for why, at in problems.items()
    ]
    if len(used) < 2:
        warnings.append(f"{len(used)} of {len(found)} budgets have a usable minimum: no law can be drawn through them")
        return Profiles(tuple(found), None, None, tuple(warnings))
    c = np.array([v.budget for v in used])
    w = None
    if weighted and all(v.log_se > 0 for v in used):
        w = 1.0 / np.array([v.log_se for v in used]) ** 2
    n = np.array([v.params for v in used])
    d = c / (kappa * n) if kappa else np.array([v.tokens for v in used])
    of_params, of_tokens = line(c, n, w), line(c, d, w)
    total = of_params.exponent + of_tokens.exponent
    if abs(total - 1) > 0.02:
        warnings.append(f"the exponents of N* and D* add up to {total:.3f}: C is not proportional to N D")
    if len(used) == 2:
        warnings.append("two budgets alone: a line through two points has no error")
    return Profiles(tuple(found), of_params, of_tokens, tuple(warnings))


def corrected_vertex(vertex: Vertex, params: np.ndarray, alpha: float, beta: float, steps: int = 50) -> float:
    """N* of the surface whose isoFLOP curve has the parabola's vertex where it was observed.

    Along one budget the reducible loss is proportional to f(w) = beta exp(-alpha w) + alpha exp(beta w), w = ln N -
    ln N*. The fixed point x0 <- x0 - (vertex(x0) - observed) on the sizes that were sampled, until it moves by less
    than 1e-12; NaN where it does not settle.
    """
    if vertex.problem or vertex.interpolated:
        return math.nan
    x = np.log(params)
    observed = math.log(vertex.params)
    u = x - x.mean()
    design = np.stack([u**2, u, np.ones(len(u))], 1)
    solve = np.linalg.pinv(design)
    at = observed
    for _ in range(steps):
        w = x - at
        p, q, _ = solve @ (beta * np.exp(-alpha * w) + alpha * np.exp(beta * w))
        if not p > 0:
            return math.nan
        move = (x.mean() - q / (2 * p)) - observed
        at -= move
        if abs(move) < 1e-12:
            return math.exp(at)
    return math.exp(at) if abs(move) < 1e-6 else math.nan


def corrected(runs: Runs, found: Profiles, surface: Surface) -> PowerLaw | None:
    """The law N*(C) through corrected vertices, with the exponents of a fitted surface."""
    points = []
    for (budget, part), vertex in zip(runs.budgets(), found.vertices, strict=True):
        value = corrected_vertex(vertex, part.params, surface.alpha, surface.beta)
        if math.isfinite(value):
            points.append((budget, value))
    if len(points) < 2:
        return None
    c, n = np.array(points).T
    return line(c, n)


@dataclass(frozen=True)
class Envelope:
    """Approach 1's result; `winners` counts the runs that are the best at some compute."""

    params: PowerLaw
    tokens: PowerLaw
    winners: int


def envelope(curves: list[tuple[float, np.ndarray, np.ndarray, np.ndarray]], points: int = 200) -> Envelope:
    """Approach 1: at each compute the run with the least loss, and a line through the winners' sizes.

    `curves` holds for each run its parameters and its smoothed curve (flops, tokens, loss), each [k] and rising in
    compute. Winners that are the smallest or the largest run say nothing of where the optimum lies and are left out.
    Raises ValueError for fewer than 4 distinct winners.
    """
    low = max(min(c[1][0] for c in curves), 1e-300)
    high = max(c[1][-1] for c in curves)
    grid = np.geomspace(low, high, points)
    losses = np.full((len(curves), points), np.inf)
    tokens = np.full((len(curves), points), np.nan)
    for i, (_, flops, seen, loss) in enumerate(curves):
        inside = (grid >= flops[0]) & (grid <= flops[-1])
        losses[i, inside] = np.interp(np.log(grid[inside]), np.log(flops), np.log(loss))
        tokens[i, inside] = np.exp(np.interp(np.log(grid[inside]), np.log(flops), np.log(seen)))
    best = losses.argmin(0)
    sizes = np.array([c[0] for c in curves])
    inner = np.isfinite(losses.min(0)) & (sizes[best] > sizes.min()) & (sizes[best] < sizes.max())
    winners = len(set(best[inner].tolist()))
    if winners < 4:
        raise ValueError(f"{winners} runs between the smallest and the largest win at some compute; 4 are needed")
    picked = best[inner]
    return Envelope(line(grid[inner], sizes[picked]), line(grid[inner], tokens[picked, np.flatnonzero(inner)]), winners)
