"""Which trainings to make: isoFLOP grids of transformers, planned one budget after another, or point by point.

Parabolas are right only where the grid is centred on the optimum: centres that drift to three times N* at the largest
budget put N* wrong by a fifth. So each budget is placed where the budgets before it predict its optimum, and a curve
whose vertex lies near an end of its sizes is extended on that side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from suites.scaling import flops as counting
from suites.scaling import solver
from suites.scaling.fit import Surface, SurfaceFit, fit_surface, prepare
from suites.scaling.table import KAPPA

ASPECT = 64  # width of a layer over the number of layers, and width of a head
NEAR = 0.35  # in ln N: a vertex closer to an end of its sizes asks for more of them
MORE = 2  # sizes that are added on that side, and how often at most
LEAST_STEPS = 100  # below, the batch is halved: a schedule of fewer steps is no training

Law = Callable[[float], Any]  # C -> N*


@dataclass(frozen=True)
class Training:
    """One row of a grid. `params` is the backbone's; `tokens` are image tokens; the schedule is as long as `steps`."""

    budget: float  # FLOPs asked for
    layers: int
    width: int
    heads: int
    batch: int  # samples
    steps: int
    params: int
    tokens: int
    flops: int  # of the whole training, counted


def sizes_around(centre: float, reach: float = 4.0, sizes: int = 7) -> np.ndarray:
    """Sizes [sizes] from centre / reach to centre * reach, evenly in logarithms."""
    return centre * np.exp(np.linspace(-math.log(reach), math.log(reach), sizes))


def plan(
    law: Law | Surface,
    budgets: Iterable[float],
    *,
    reach: float = 4.0,
    sizes: int = 7,
    kind: str = "adaln_zero",
    tokens: int = 256,
    text: int = 0,
    batch: int = 256,
    **architecture: Any,
) -> list[Training]:
    """The grid of a prior law: at each budget `sizes` transformers from N* / reach to N* x reach.

    Width is 64 x layers with as many heads as layers; sizes that round to the same depth are one row. `tokens` and
    `text` are the tokens of a sample, `architecture` goes to `flops.dit`. Steps are rounded, so that C is met within
    1 %; the batch is halved from `batch` until a training has 100 steps or more. Raises ValueError for a reach of 1 or
    less, a budget that is not positive, and one that pays for no training of its sizes.
    """
    if not reach > 1 or sizes < 1:
        raise ValueError(f"reach = {reach:g} must be more than 1, and sizes = {sizes} 1 or more")
    optimum = law_of(law)
    grid = []
    for budget in budgets:
        if not (math.isfinite(budget) and budget > 0):
            raise ValueError(f"a budget of {budget:g} FLOPs pays for nothing")
        wanted = sizes_around(optimum(budget), reach, sizes)
        depths = dict.fromkeys(depth_of(n, kind) for n in wanted)
        found = [_training(budget, depth, kind, tokens, text, batch, architecture) for depth in depths]
        if not any(found):
            raise ValueError(
                f"{budget:.3g} FLOPs pay for no {LEAST_STEPS} steps of any size around {optimum(budget):.3g}"
            )
        grid += [training for training in found if training]
    return grid


def law_of(law: Law | Surface) -> Callable[[float], float]:
    """N*(C) of a surface (under C = 6 N D) or of any function of C."""
    if isinstance(law, Surface):
        return lambda c: float(law.optimum(c)[0])
    return lambda c: float(law(c))


def depth_of(params: float, kind: str = "adaln_zero") -> int:
    """The number of layers, 1 or more, whose backbone of width 64 x layers is nearest in ln N."""
    unit = counting.params(kind, ASPECT, 1)["backbone"]  # of one layer of width 64
    guess = max((params / unit) ** (1 / 3), 1.0)
    near = {max(math.floor(guess), 1), math.ceil(guess)}
    return min(near, key=lambda layers: abs(math.log(unit * layers**3 / params)))


def _training(
    budget: float, layers: int, kind: str, tokens: int, text: int, batch: int, architecture: dict[str, Any]
) -> Training | None:
    width = ASPECT * layers
    each = counting.dit(kind, tokens, text, width, layers, **architecture).train
    while batch > 1 and budget / (each * batch) < LEAST_STEPS:
        batch //= 2
    steps = round(budget / (each * batch))
    if steps < LEAST_STEPS:
        return None
    shape = {k: v for k, v in architecture.items() if k in ("ratio", "text_width", "swiglu")}
    size = counting.params(kind, width, layers, **shape)["backbone"]
    return Training(budget, layers, width, layers, batch, steps, size, tokens * batch * steps, steps * batch * each)


# -- one budget after another


@dataclass(frozen=True)
class Campaign:
    """What a sequential plan trained, [n] each in order, the fit to all of it, and the FLOPs it spent."""

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    budget: np.ndarray
    fit: SurfaceFit
    centres: tuple[float, ...]  # where each budget was placed
    flops: float


def sequential(
    prior: Law | Surface,
    budgets: Sequence[float],
    train: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    reach: float = 4.0,
    sizes: int = 7,
    kappa: float = KAPPA,
) -> Campaign:
    """Trains a grid budget by budget, each centred on what the ones before it predict.

    `train` takes sizes and tokens [k] and gives losses [k]. The first budget is placed by the prior; the second by the
    first's vertex and the prior's exponent; later ones by a surface fitted to all rows. A budget whose vertex lies
    within 0.35 (in ln N) of an end of its sizes, or outside, gets two sizes more on that side, twice at most. Raises
    ValueError where fewer than two budgets are given.
    """
    budgets = sorted(map(float, budgets))
    if len(budgets) < 2:
        raise ValueError(f"{len(budgets)} budget: a law needs two or more")
    optimum = law_of(prior)
    rows: list[tuple[float, float, float, float]] = []
    centres, fit = [], None
    for i, budget in enumerate(budgets):
        centre = optimum(budget)
        if fit is not None:
            centre = float(fit.surface.optimum(budget, kappa)[0])
        elif i:
            before = budgets[i - 1]
            centre = _vertex(rows, before) * optimum(budget) / optimum(before)
        centres.append(centre)
        _measure(rows, budget, sizes_around(centre, reach, sizes), train, kappa)
        for _ in range(MORE):
            side = extension([row[0] for row in rows if row[3] == budget], _vertex(rows, budget))
            if not len(side):
                break
            _measure(rows, budget, side, train, kappa)
        if i:
            n, d, y, _ = np.array(rows).T
            fitted = fit_surface(n, d, y, profile=False)
            fit = fitted if fitted.converged else fit
    n, d, y, c = np.array(rows).T
    last = fit_surface(n, d, y)
    return Campaign(n, d, y, c, last, tuple(centres), float(kappa * (n * d).sum()))


def _measure(rows: list, budget: float, n: np.ndarray, train: Callable, kappa: float) -> None:
    d = budget / kappa / n
    rows += zip(n, d, np.asarray(train(n, d), np.float64), np.full(len(n), budget), strict=True)


def _vertex(rows: list[tuple[float, float, float, float]], budget: float) -> float:
    """N* of one budget's parabola, wherever it lies; the size of the least loss where the curve opens downwards."""
    n, y = np.array([(row[0], row[2]) for row in rows if row[3] == budget]).T
    x = np.log(n)
    p, q, _ = np.polyfit(x - x.mean(), y, 2)
    if not p > 0:
        return float(n[y.argmin()])
    # a vertex far outside is no prediction: at most one half-range beyond the sizes
    half = np.ptp(x) / 2
    return math.exp(x.mean() + float(np.clip(-q / (2 * p), -2 * half, 2 * half)))


def extension(params: Sequence[float], vertex: float) -> np.ndarray:
    """Two sizes more on the side where the vertex lies within 0.35 (in ln N) of the end or outside; else none."""
    x = np.sort(np.log(params))
    step = (x[-1] - x[0]) / (len(x) - 1)
    if x[-1] - math.log(vertex) < NEAR:
        return np.exp(x[-1] + step * np.arange(1, MORE + 1))
    if math.log(vertex) - x[0] < NEAR:
        return np.exp(x[0] - step * np.arange(1, MORE + 1))
    return np.empty(0)


# -- the next point


@dataclass(frozen=True)
class Next:
    """The training that tells most of ln N* at a target for its price.

    `variance` and `after` are Var(ln N*(C_target)) before and after it; `gain` is their difference per FLOP.
    """

    params: float
    tokens: float
    flops: float
    variance: float
    after: float
    gain: float


def next_point(
    fit: SurfaceFit,
    params: Any,
    tokens: Any,
    target: float,
    candidates: Iterable[tuple[float, float]],
    *,
    kappa: float = KAPPA,
) -> Next:
    """Of candidate (N, C) the one with the largest expected reduction of Var(ln N*(C_target)) per FLOP.

    `params`, `tokens` [n] are the rows of `fit`. With J the residuals' Jacobian and g the gradient of ln N*, the
    variance is sigma^2 g' (J'J)^-1 g, and a row j takes sigma^2 (g' M j)^2 / (1 + j' M j) away, M = (J'J)^-1. Raises
    ValueError for no candidates and for a fit that did not converge.
    """
    points = np.array(list(candidates), np.float64).reshape(-1, 2)
    if not len(points):
        raise ValueError("there is no candidate to choose from")
    if not fit.converged:
        raise ValueError("the fit did not converge: it cannot say which training tells most")
    data, _ = prepare(params, tokens, np.ones(len(np.asarray(params))), 5)
    j = solver.jacobian(fit.theta[None], data, solver.Loss())[0]
    inverse = np.linalg.pinv(j.T @ j, rcond=1e-13)
    g = optimum_gradient(fit, target, kappa)
    n, c = points.T
    d = c / kappa / n
    new = solver.Data(np.log(n) - fit.centre[0], np.log(d) - fit.centre[1], np.ones(len(n)))
    rows = solver.jacobian(fit.theta[None], new, solver.Loss())[0]
    moved = rows @ inverse
    taken = fit.sigma**2 * (moved @ g) ** 2 / (1 + np.einsum("ij,ij->i", moved, rows))
    k = int(np.argmax(taken / c))
    variance = fit.sigma**2 * float(g @ inverse @ g)
    return Next(float(n[k]), float(d[k]), float(c[k]), variance, variance - float(taken[k]), float(taken[k] / c[k]))


def optimum_gradient(fit: SurfaceFit, flops: float, kappa: float = KAPPA) -> np.ndarray:
    """d ln N*(C) / d theta, [5], theta = (ln A, ln B, ln E, alpha, beta) of centred logarithms.

    ln N* = (ln alpha + ln A - ln beta - ln B + beta ln(C / kappa)) / (alpha + beta), ln A and ln B not centred.
    """
    s = fit.surface
    total, t = s.alpha + s.beta, math.log(flops / kappa)
    log_n = math.log(float(s.optimum(flops, kappa)[0]))
    of_alpha = (1 / s.alpha + fit.centre[0] - log_n) / total
    of_beta = (-1 / s.beta - fit.centre[1] + t - log_n) / total
    return np.array([1 / total, -1 / total, 0.0, of_alpha, of_beta])
