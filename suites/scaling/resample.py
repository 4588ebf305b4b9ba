"""How sure a fitted surface is: resamples, intervals of what follows from it, bands, back-test, mixture of forms.

Derived quantities (a, N*(C), L*(C), ...) are computed for each resample, never from intervals of parameters, which are
strongly correlated. Which resampling holds what it promises was simulated; `choose` applies the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from suites.scaling import fit as fitting
from suites.scaling import solver
from suites.scaling.fit import Surface, SurfaceFit

KINDS = ("pairs", "cluster", "residual", "wild", "parametric")
LEVEL = 0.95
FAR = 30.0  # times the largest compute: warned
TOO_FAR = 1000.0  # no point estimate without a band
ORIGINS = 8  # budgets from which a back-test looks ahead, at most
ROUNDING = 1e-9  # an error of ln L that is none


@dataclass(frozen=True)
class Resamples:
    """Surfaces fitted to resampled rows: columns E, A, B, alpha, beta of `surfaces` [R, 5].

    `failed` counts fits that did not converge even from fresh starts; they are left out.
    """

    kind: str
    surfaces: np.ndarray
    failed: int
    seed: int
    freedom: float = math.inf  # rows, or runs, less parameters

    def __len__(self) -> int:
        return len(self.surfaces)

    def derive(self, quantity: Callable[[Surface], Any]) -> np.ndarray:
        """A quantity of each surface, [R, 1] or [R, k]: the surface's fields are arrays [R, 1]."""
        columns = [self.surfaces[:, k : k + 1] for k in range(5)]
        return np.asarray(quantity(Surface(*columns)))

    def interval(self, quantity: Callable[[Surface], Any]) -> tuple[np.ndarray, np.ndarray]:
        """The 95 % interval of a quantity, [1] or [k] each."""
        return percentile(self.derive(quantity), self.freedom)


def choose(fit: SurfaceFit, run_id: Sequence[str] | None, params: Any, tokens: Any) -> tuple[str, str]:
    """Which resampling suits a fit, and why: clusters where runs have several rows, pairs where the errors are unlike,
    else residuals."""
    if run_id is not None and len(set(run_id)) < len(run_id):
        return "cluster", "runs have several rows"
    p = breusch_pagan(fit, params, tokens)
    if p < 0.05:
        return "pairs", f"the errors differ in size along compute (p = {p:.2g})"
    return "residual", "rows are independent and their errors of one size"


def breusch_pagan(fit: SurfaceFit, params: Any, tokens: Any) -> float:
    """p-value that |r| does not depend on ln C (a rank-free form of Breusch and Pagan's test, by Glejser)."""
    from scipy.stats import linregress

    x = np.log(np.asarray(params, np.float64) * np.asarray(tokens, np.float64))
    if fit.sigma < 1e-9 or np.ptp(x) < 1e-9:
        return 1.0
    return float(linregress(x, np.abs(fit.residuals)).pvalue)


def resample(
    fit: SurfaceFit,
    params: Any,
    tokens: Any,
    loss: Any,
    *,
    kind: str = "residual",
    count: int = 1000,
    seed: int = 0,
    run_id: Sequence[str] | None = None,
    weights: Any = None,
) -> Resamples:
    """Fits the surface again to `count` resamples of its rows, all in one batch, from the fitted optimum.

    `pairs` draws rows, `cluster` whole runs; `residual` draws centred residuals, each over sqrt(1 - leverage); `wild`
    flips their signs; `parametric` draws normal errors. Rows that do not converge are tried again from fresh starts.
    Raises ValueError for an unknown kind, and for `wild` with a threshold well below the residuals, where its
    intervals cover 78 to 89 % instead of 95.
    """
    if kind not in KINDS:
        raise ValueError(f"resampling {kind!r} is not one of {', '.join(KINDS)}")
    if kind == "wild" and fit.delta < 0.5 * fit.sigma:
        raise ValueError("wild resampling is refused with a Huber threshold far below the residuals; take 'residual'")
    data, centre = fitting.prepare(params, tokens, loss, 5)
    m = fitting._weights(weights, fit.n)
    rng = np.random.Generator(np.random.Philox(key=[seed, KINDS.index(kind)]))
    n = fit.n
    form = _form(fit)
    criterion = fitting.criterion_of(fit.objective, fit.sigma, fit.delta if np.isfinite(fit.delta) else None)
    if kind in ("pairs", "cluster"):
        if kind == "cluster":
            names = np.unique(
                np.asarray(run_id if run_id is not None else np.arange(n)).astype(str), return_inverse=True
            )
            index, groups = names[1], len(names[0])
            drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=count)[:, index]
        else:
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=count)
        batch, multiplicity = data, drawn * m
    else:
        batch, multiplicity = data._replace(y=_responses(fit, data, kind, count, rng)), m
    start = np.repeat(fit.theta[None], count, 0)
    found = solver.polish(start, batch, multiplicity, criterion, form)
    for k in np.flatnonzero(~found.converged):
        one = batch._replace(y=batch.y[k]) if batch.y.ndim == 2 else batch
        row = multiplicity[k] if multiplicity.ndim == 2 else multiplicity
        again = solver.polish(solver.start(one, row, form), one, row, criterion, form)
        good = np.flatnonzero(again.converged)
        if len(good):
            best = good[np.argmin(again.objective[good])]
            found.theta[k], found.converged[k] = again.theta[best], True
    theta = found.theta[found.converged]
    surfaces = np.array([[*_values(fitting.unpack(row, centre))] for row in theta]).reshape(-1, 5)
    freedom = (groups if kind == "cluster" else n) - form.free.shape[1]
    return Resamples(kind, surfaces, int((~found.converged).sum()), seed, max(freedom, 1))


def _values(surface: Surface) -> tuple[float, ...]:
    return surface.E, surface.A, surface.B, surface.alpha, surface.beta


def _form(fit: SurfaceFit) -> solver.Form:
    if fit.form.startswith("floor="):
        return fitting.form_of("full", float(fit.form.removeprefix("floor=")))
    return fitting.form_of(fit.form)


def _responses(fit: SurfaceFit, data: solver.Data, kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Losses [count, n]: the fitted surface with new errors on ln L (on L for ls_raw)."""
    n = fit.n
    fitted = solver.surface(fit.theta[None], data)[0][0]
    p = _form(fit).free.shape[1]
    j = solver.jacobian(fit.theta[None], data, solver.Loss(raw=fit.objective == "ls_raw"))[0] @ _form(fit).free
    leverage = np.clip(np.einsum("ij,ji->i", j, np.linalg.pinv(j, rcond=1e-12)), 0.0, 0.99)
    errors = -fit.residuals / np.sqrt(1.0 - leverage)  # observed minus model, as wide as before the fit
    errors -= np.median(errors)
    if kind == "residual":
        drawn = errors[rng.integers(n, size=(count, n))]
    elif kind == "wild":
        drawn = errors * rng.choice((-1.0, 1.0), size=(count, n))
    else:
        drawn = rng.standard_normal((count, n)) * (fit.sigma * math.sqrt(n / max(n - p, 1)))
    if fit.objective == "ls_raw":
        return np.maximum(fitted + drawn, 1e-12)
    return fitted * np.exp(drawn)


# -- intervals


def percentile(values: np.ndarray, freedom: float = math.inf) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile interval along the first axis; NaN where fewer than 95 % of the resamples have a value.

    With few rows it is expanded to the width that t with `freedom` degrees has over the normal law (Hesterberg 2015,
    section 5.3).
    """
    from scipy.special import ndtr, stdtrit

    values = np.asarray(values, np.float64)
    tail = float(ndtr(-stdtrit(freedom, 0.5 + LEVEL / 2))) if math.isfinite(freedom) else (1 - LEVEL) / 2
    finite = np.isfinite(values)
    known = np.where(finite, values, np.nan)
    with np.errstate(invalid="ignore"):
        low, high = np.nanquantile(known, [tail, 1 - tail], axis=0) if finite.any() else (np.nan, np.nan)
    enough = finite.mean(0) >= LEVEL
    return np.where(enough, low, np.nan), np.where(enough, high, np.nan)


def bca(values: np.ndarray, estimate: float, jackknife: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Efron's bias-corrected and accelerated interval of one quantity; `jackknife` holds it without each row."""
    from scipy.special import ndtr, ndtri

    values = values[np.isfinite(values)]
    share = np.clip((values < estimate).mean(), 0.5 / len(values), 1 - 0.5 / len(values))
    bias = ndtri(share)
    centred = jackknife.mean() - jackknife
    spread = (centred**2).sum()
    acceleration = (centred**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
    z = ndtri([(1 - level) / 2, (1 + level) / 2])
    tails = ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))
    low, high = np.quantile(values, tails)
    return float(low), float(high)


def jackknife(fit: SurfaceFit, params: Any, tokens: Any, loss: Any, run_id: Sequence[str] | None = None) -> np.ndarray:
    """Surfaces [G, 5] without each row, or without each run where `run_id` is given: for the acceleration of BCa."""
    data, centre = fitting.prepare(params, tokens, loss, 5)
    names = np.arange(fit.n) if run_id is None else np.unique(np.asarray(run_id, str), return_inverse=True)[1]
    left = (names[None, :] != np.arange(names.max() + 1)[:, None]).astype(np.float64)
    criterion = fitting.criterion_of(fit.objective, fit.sigma, fit.delta if np.isfinite(fit.delta) else None)
    found = solver.polish(np.repeat(fit.theta[None], len(left), 0), data, left, criterion, _form(fit))
    return np.array([_values(fitting.unpack(row, centre)) for row in found.theta])


def delta_t(
    fit: SurfaceFit,
    params: Any,
    tokens: Any,
    loss: Any,
    quantity: Callable[[Surface], float],
    *,
    sandwich: bool = False,
) -> tuple[float, float]:
    """A t interval of a scalar quantity by the delta method (numerical gradient in theta).

    The covariance is that of least squares, which suits `ls_log` alone, or the sandwich. Raises ValueError where
    least squares' covariance is asked for another objective: with a small threshold it covers 83 to 93 %.
    """
    from scipy.special import stdtrit

    if not sandwich and fit.objective not in ("ls_log", "ls_raw"):
        raise ValueError(f"the covariance of least squares does not belong to {fit.objective}; take the sandwich")
    data, centre = fitting.prepare(params, tokens, loss, 5)
    form = _form(fit)
    criterion = fitting.criterion_of(fit.objective, fit.sigma, fit.delta if np.isfinite(fit.delta) else None)
    cov = fit.covariance
    if not sandwich:
        cov = fitting.least_squares_covariance(fit.theta, data, np.ones(fit.n), criterion, form)
    gradient = np.zeros(5)
    for k in range(5):
        step = np.zeros(5)
        step[k] = 1e-5 * max(1.0, abs(fit.theta[k]))
        ends = [float(quantity(fitting.unpack(fit.theta + s * step, centre))) for s in (1, -1)]
        gradient[k] = (ends[0] - ends[1]) / (2 * step[k])
    value = float(quantity(fit.surface))
    half = float(stdtrit(max(fit.n - form.free.shape[1], 1), 0.5 + LEVEL / 2)) * math.sqrt(gradient @ cov @ gradient)
    return value - half, value + half


# -- bands and honesty


@dataclass(frozen=True)
class Band:
    """A quantity along compute with its 95 % band; `prediction` adds the error of a new run."""

    flops: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    prediction_low: np.ndarray | None = None
    prediction_high: np.ndarray | None = None


def bands(
    fit: SurfaceFit, resamples: Resamples, flops: np.ndarray, *, kappa: float = 6.0, inflate: float = 1.0
) -> dict[str, Band]:
    """N*, D* and L* along compute [k]; L* also with a prediction band. `inflate` widens bands about their value, in
    logarithms, by what a back-test found missing."""
    centre = fit.surface.optimum(flops, kappa)
    drawn = [resamples.derive(lambda s, k=k: s.optimum(flops[None, :], kappa)[k]) for k in range(3)]
    rng = np.random.Generator(np.random.Philox(key=[resamples.seed, 77]))
    found = {}
    for name, value, values in zip(("params", "tokens", "loss"), centre, drawn, strict=True):
        low, high = (_widen(bound, value, inflate) for bound in percentile(values, resamples.freedom))
        found[name] = Band(flops, value, low, high)
        if name == "loss":
            noise = rng.choice(fit.residuals - np.median(fit.residuals), size=values.shape)
            new = values * np.exp(noise) if fit.objective != "ls_raw" else values + noise
            ends = [_widen(bound, value, inflate) for bound in percentile(new, resamples.freedom)]
            found[name] = Band(flops, value, low, high, *ends)
    return found


def _widen(bound: np.ndarray, value: np.ndarray, factor: float) -> np.ndarray:
    return value * np.exp(factor * np.log(bound / value))


@dataclass(frozen=True)
class BackTest:
    """Predictions of each larger budget by a fit to the smaller ones.

    Rows: `largest` is the largest budget fitted, `budget` the one predicted, `error` = ln(observed / predicted) of its
    rows' mean, `covered` the share of rows inside the 95 % prediction interval. `inflate` is the factor on ln-widths
    with which 95 % of all rows would have been inside (1 where they were).
    """

    largest: np.ndarray
    budget: np.ndarray
    error: np.ndarray
    covered: np.ndarray
    inflate: float


def back_test(
    params: Any,
    tokens: Any,
    loss: Any,
    budget: Any,
    *,
    objective: str = "huber_log_auto",
    count: int = 300,
    seed: int = 0,
) -> BackTest | None:
    """Rolling-origin back-test: fits budgets up to c_k, predicts every larger one; None with fewer than 4 budgets."""
    params, tokens, loss, budget = (np.asarray(v, np.float64) for v in (params, tokens, loss, budget))
    levels = np.unique(budget)
    if len(levels) < 4:
        return None
    rows, needed = [], []
    origins = levels[1:-1]
    if len(origins) > ORIGINS:  # a table of scattered computes has dozens
        origins = origins[np.linspace(0, len(origins) - 1, ORIGINS).round().astype(int)]
    for last in origins:
        predicted = _predict(params, tokens, loss, budget, last, levels[levels > last], objective, count, seed)
        for c, (error, low, high) in predicted.items():
            rows.append((last, c, error.mean(), _inside(error, low, high).mean()))
            needed += list(np.where(error > 0, error / np.maximum(high, ROUNDING), error / np.minimum(low, -ROUNDING)))
    if not rows:
        return None
    inflate = max(1.0, float(np.quantile(needed, 0.95, method="higher")))
    return BackTest(*(np.array(c) for c in zip(*rows, strict=True)), inflate)


def held_out(
    params: Any,
    tokens: Any,
    loss: Any,
    budget: Any,
    *,
    objective: str = "huber_log_auto",
    count: int = 300,
    seed: int = 0,
) -> float:
    """The share of the largest budget's rows inside the widened prediction interval of all smaller ones.

    The widening is that of a back-test of the smaller budgets alone, so that nothing of the largest is known: the test
    of the back-test itself. NaN where the smaller budgets cannot be fitted.
    """
    params, tokens, loss, budget = (np.asarray(v, np.float64) for v in (params, tokens, loss, budget))
    levels = np.unique(budget)
    below = budget < levels[-1]
    columns = (params[below], tokens[below], loss[below], budget[below])
    tested = back_test(*columns, objective=objective, count=count, seed=seed) if below.any() else None
    wide = tested.inflate if tested is not None else 1.0
    found = _predict(params, tokens, loss, budget, levels[:-1].max(initial=0), levels[-1:], objective, count, seed)
    if not found:
        return math.nan
    error, low, high = found[levels[-1]]
    return float(_inside(error, wide * low, wide * high).mean())


def _inside(error: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (error >= np.minimum(low, -ROUNDING)) & (error <= np.maximum(high, ROUNDING))


def _predict(
    params: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    budget: np.ndarray,
    last: float,
    levels: np.ndarray,
    objective: str,
    count: int,
    seed: int,
) -> dict[float, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """{budget: ln(observed / predicted) of its rows, and their 95 % interval} by a fit to the budgets up to `last`."""
    inside = budget <= last
    if inside.sum() < 10:
        return {}
    try:
        fit = fitting.fit_surface(params[inside], tokens[inside], loss[inside], objective=objective, profile=False)
        drawn = resample(fit, params[inside], tokens[inside], loss[inside], count=count, seed=seed)
    except ValueError:
        return {}
    if len(drawn) < count // 2:
        return {}
    rng = np.random.Generator(np.random.Philox(key=[seed, 78]))
    found = {}
    for c in levels:
        new = budget == c
        at = drawn.derive(lambda s, new=new: s.loss(params[new][None, :], tokens[new][None, :]))
        noise = rng.choice(fit.residuals - np.median(fit.residuals), size=at.shape)
        predicted = fit.surface.loss(params[new], tokens[new])
        low, high = np.quantile(np.log(at * np.exp(noise) / predicted), [0.025, 0.975], axis=0)
        found[float(c)] = np.log(loss[new] / predicted), low, high
    return found


@dataclass(frozen=True)
class Mixture:
    """Akaike weights of several forms of the surface, and N*, L* of each at the asked compute."""

    forms: tuple[str, ...]
    weights: np.ndarray
    fits: tuple[SurfaceFit, ...]

    def loss(self, flops: Any, kappa: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
        """The weighted L* and the spread (standard deviation) between forms."""
        each = np.array([fit.surface.optimum(flops, kappa)[2] for fit in self.fits])
        mean = np.tensordot(self.weights, each, 1)
        return mean, np.sqrt(np.tensordot(self.weights, (each - mean) ** 2, 1))


def mixture(params: Any, tokens: Any, loss: Any, *, objective: str = "huber_log_auto") -> Mixture:
    """{full, tied, no_floor} weighted by AICc of least squares on ln L at their own optimum."""
    forms = fitting.FORMS
    fits = tuple(fitting.fit_surface(params, tokens, loss, form=f, objective=objective, profile=False) for f in forms)
    scores = []
    for form in forms:
        plain = fitting.fit_surface(params, tokens, loss, form=form, objective="ls_log", profile=False)
        n, k = plain.n, fitting.form_of(form).free.shape[1] + 1
        scores.append(n * math.log(max(2 * plain.value / n, 1e-300)) + 2 * k + 2 * k * (k + 1) / max(n - k - 1, 1))
    weights = np.exp(-0.5 * (np.array(scores) - min(scores)))
    return Mixture(forms, weights / weights.sum(), fits)


def extrapolation_warning(flops: float, largest: float) -> str:
    """What to say of a prediction at `flops` from rows up to `largest`; empty below 30 times."""
    factor = flops / largest
    if factor > TOO_FAR:
        return f"{factor:,.0f} times the largest compute: no point estimate without its band"
    return f"{factor:,.0f} times the largest compute" if factor > FAR else ""


def summary(
    fit: SurfaceFit, resamples: Resamples, flops: Sequence[float], kappa: float = 6.0
) -> dict[str, tuple[float, float, float]]:
    """{quantity: (estimate, low, high)} of E, alpha, beta, a, b, gamma, and N*, D*, L* at each compute."""
    quantities: Mapping[str, Callable[[Surface], Any]] = {
        "E": lambda s: s.E,
        "alpha": lambda s: s.alpha,
        "beta": lambda s: s.beta,
        "a": lambda s: s.a,
        "b": lambda s: s.b,
        "gamma": lambda s: s.gamma,
        "ln A": lambda s: np.log(s.A),
        "ln B": lambda s: np.log(s.B),
    }
    found = {}
    for name, quantity in quantities.items():
        low, high = resamples.interval(quantity)
        found[name] = (float(quantity(fit.surface)), float(low[0]), float(high[0]))
    for c in flops:
        for k, name in enumerate(("N*", "D*", "L*")):
            low, high = resamples.interval(lambda s, k=k, c=c: s.optimum(c, kappa)[k])
            found[f"{name}({c:.3g})"] = (float(fit.surface.optimum(c, kappa)[k]), float(low[0]), float(high[0]))
    return found
