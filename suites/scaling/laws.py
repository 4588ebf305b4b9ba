"""Laws of one variable, and laws beside the plain surface: over-training, broken power laws, repeated data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from suites.scaling.fit import Surface, SurfaceFit, fit_surface

EXPONENTS = -np.geomspace(1e-3, 1.5, 400)  # p of y = E + k C^p
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Power:
    """y = floor + coefficient * x^exponent; `value` is the sum of squared residuals, of ln y where `log`."""

    floor: float
    coefficient: float
    exponent: float
    value: float
    log: bool
    edge: bool = False  # the exponent ended at a bound

    def __call__(self, x: Any) -> np.ndarray:
        return self.floor + self.coefficient * np.asarray(x, np.float64) ** self.exponent


def power(x: Any, y: Any) -> Power:
    """y = k x^p by least squares in logarithms, [n] each and positive."""
    x, y = _positive(x, y, 2)
    slope, level = np.polyfit(np.log(x), np.log(y), 1)
    residual = np.log(y) - level - slope * np.log(x)
    return Power(0.0, math.exp(level), float(slope), float(residual @ residual), True)


def saturating(x: Any, y: Any) -> Power:
    """y = E + k x^p with E, k >= 0 and p in [-1.5, -0.001] by least squares on y, weights 1 / y^2.

    For a given p the model is linear: 400 exponents are tried, each with its non-negative solution, and the best is
    refined by golden section. No random starts.
    """
    x, y = _positive(x, y, 4)
    centred = np.log(x) - np.log(x).mean()
    w = 1.0 / y**2

    def solve(p: float) -> tuple[float, float, float]:
        u = np.exp(p * centred)
        suu, su, s1 = w @ u**2, w @ u, w.sum()
        suy, sy = w @ (u * y), w @ y
        det = suu * s1 - su * su
        k, e = ((suy * s1 - sy * su) / det, (suu * sy - su * suy) / det) if det > 1e-14 * suu * s1 else (-1.0, -1.0)
        if k < 0 or e < 0:
            options = [(suy / suu, 0.0), (0.0, sy / s1)]
            k, e = min(((max(k, 0.0), e) for k, e in options), key=lambda o: float(w @ (y - o[0] * u - o[1]) ** 2))
        return float(w @ (y - k * u - e) ** 2), k, e

    values = np.array([solve(p)[0] for p in EXPONENTS])
    best = int(values.argmin())
    low, high = EXPONENTS[min(best + 1, 399)], EXPONENTS[max(best - 1, 0)]
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    f_left, f_right = solve(left)[0], solve(right)[0]
    for _ in range(80):
        if f_left < f_right:
            high, right, f_right = right, left, f_left
            left = high - GOLDEN * (high - low)
            f_left = solve(left)[0]
        else:
            low, left, f_left = left, right, f_right
            right = low + GOLDEN * (high - low)
            f_right = solve(right)[0]
    p = (low + high) / 2
    value, k, e = solve(p)
    edge = best in (0, 399)
    return Power(e, k * math.exp(-p * np.log(x).mean()), p, value, False, edge)


@dataclass(frozen=True)
class ErrorLaw:
    """error = ceiling - k exp(-gamma loss): downstream error from loss (Gadre et al., arXiv 2403.08540, eq. 5)."""

    ceiling: float
    k: float
    gamma: float
    value: float

    def __call__(self, loss: Any) -> np.ndarray:
        return self.ceiling - self.k * np.exp(-self.gamma * np.asarray(loss, np.float64))


def error_from_loss(loss: Any, error: Any) -> ErrorLaw:
    """Least squares on the error; gamma is searched in [0.01, 20], the rest is linear. Four rows or more."""
    from scipy.optimize import minimize_scalar

    x, y = _positive(loss, error, 4)
    centre = x.mean()

    def solve(log_gamma: float) -> tuple[float, np.ndarray]:
        design = np.stack([np.ones(len(x)), -np.exp(-math.exp(log_gamma) * (x - centre))], 1)
        found, *_ = np.linalg.lstsq(design, y, rcond=None)
        return float(((y - design @ found) ** 2).sum()), found

    grid = np.linspace(math.log(0.01), math.log(20.0), 200)
    best = int(np.argmin([solve(g)[0] for g in grid]))
    bounds = grid[max(best - 1, 0)], grid[min(best + 1, 199)]
    at = minimize_scalar(lambda g: solve(g)[0], bounds=bounds, method="bounded", options={"xatol": 1e-10}).x
    value, (ceiling, k) = solve(float(at))
    gamma = math.exp(float(at))
    return ErrorLaw(float(ceiling), float(k * math.exp(gamma * centre)), gamma, value)


@dataclass(frozen=True)
class OverTraining:
    """L = E + (a M^eta + b M^-eta) C^-eta with M = D / N (Gadre et al., eq. 4): a surface with alpha = beta = 2 eta."""

    E: float
    a: float
    b: float
    eta: float
    fit: SurfaceFit

    def __call__(self, flops: Any, multiplier: Any) -> np.ndarray:
        c, m = np.asarray(flops, np.float64), np.asarray(multiplier, np.float64)
        return self.E + (self.a * m**self.eta + self.b * m**-self.eta) * c**-self.eta


def over_training(params: Any, tokens: Any, loss: Any, kappa: float = 6.0) -> OverTraining:
    """The over-training form by least squares on L; five rows or more, of which some differ in D / N."""
    fit = fit_surface(params, tokens, loss, form="tied", objective="ls_raw", profile=False)
    s = fit.surface
    eta = s.alpha / 2
    return OverTraining(s.E, s.A * kappa**eta, s.B * kappa**eta, eta, fit)


# -- broken laws


@dataclass(frozen=True)
class Broken:
    """y = a + b x^-c0 prod_i (1 + (x / d_i)^(1 / f_i))^(-c_i f_i) (Caballero et al., arXiv 2210.14891, eq. 1)."""

    a: float
    b: float
    c0: float
    breaks: tuple[tuple[float, float, float], ...]  # (c_i, d_i, f_i)
    value: float  # sum of squared residuals of ln y

    def __call__(self, x: Any) -> np.ndarray:
        x = np.asarray(x, np.float64)
        found = np.log(max(self.b, 1e-300)) - self.c0 * np.log(x)
        for c, d, f in self.breaks:
            found = found - c * f * np.logaddexp(0.0, (np.log(x) - math.log(d)) / f)
        return self.a + np.exp(found)


def broken(x: Any, y: Any, breaks: int = 1, *, reach: float = 2.0) -> Broken:
    """A broken law with 0, 1 or 2 breaks by least squares on ln y; breaks lie in [min x / reach, max x * reach].

    Starts: breaks on a grid of positions and sharpnesses, slopes by linear least squares on ln y; the best twelve are
    refined together. Raises ValueError for fewer rows than parameters.
    """
    from itertools import combinations, product

    from scipy.optimize import least_squares

    x, y = _positive(x, y, 3 + 3 * breaks)
    t, target = np.log(x), np.log(y)
    low, high = t.min() - math.log(reach), t.max() + math.log(reach)
    places = np.linspace(low, high, 12)
    starts = []
    for at in combinations(places, breaks):
        for f in product((0.05, 0.3, 1.0), repeat=breaks):
            columns = [np.ones(len(t)), -t]
            columns += [-fi * np.logaddexp(0.0, (t - di) / fi) for di, fi in zip(at, f, strict=True)]
            for share in (0.0, 0.5, 0.9):
                floor = share * y.min()
                design = np.stack(columns, 1)
                found, *_ = np.linalg.lstsq(design, np.log(y - floor), rcond=None)
                residual = np.log(floor + np.exp(design @ found)) - target
                parts = [v for i in range(breaks) for v in (found[2 + i], at[i], math.log(f[i]))]
                starts.append((float(residual @ residual), [share, *found[:2], *parts]))
    starts.sort(key=lambda s: s[0])

    def model(p: np.ndarray) -> np.ndarray:
        found = p[1] - p[2] * t
        for c, d, log_f in p[3:].reshape(-1, 3):
            f = math.exp(log_f)
            found = found - c * f * np.logaddexp(0.0, (t - d) / f)
        return np.log(p[0] * y.min() + np.exp(np.clip(found, -700, 700)))

    bounds = (
        [0.0, -np.inf, -20.0] + [-20.0, low, math.log(0.01)] * breaks,
        [1.0, np.inf, 20.0] + [20.0, high, 3.0] * breaks,
    )
    best = None
    for _, start in starts[:12]:
        inside = np.clip(start, np.array(bounds[0]) + 1e-9, np.array(bounds[1]) - 1e-9)
        found = least_squares(lambda p: model(p) - target, inside, bounds=bounds, x_scale="jac", max_nfev=400)
        if best is None or found.cost < best.cost:
            best = found
    p = best.x
    parts = tuple((float(c), math.exp(d), math.exp(f)) for c, d, f in p[3:].reshape(-1, 3))
    return Broken(float(p[0] * y.min()), math.exp(p[1]), float(p[2]), parts, float(2 * best.cost))


def choose_breaks(x: Any, y: Any, most: int = 2, last: int = 3) -> tuple[Broken, dict[int, float]]:
    """The number of breaks that best predicts the last `last` rows from the ones before, and each number's error.

    Errors are root mean squares in ln y. In-sample error would always choose the most breaks.
    """
    x, y = _positive(x, y, 3 + last)
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    errors = {}
    for n in range(most + 1):
        if len(x) - last >= 3 + 3 * n:
            law = broken(x[:-last], y[:-last], n)
            errors[n] = float(np.sqrt(np.mean((np.log(law(x[-last:])) - np.log(y[-last:])) ** 2)))
    best = min(errors, key=errors.get)
    return broken(x, y, best), errors


# -- repeated data


@dataclass(frozen=True)
class Repeated:
    """Muennighoff et al. (arXiv 2305.16264): tokens seen R + 1 times are worth U + U R* (1 - exp(-R / R*)).

    `sizes` decays the same way in the parameters beyond what U unique tokens can feed. `edge` names what ran to the end
    of its range, `unstable` what moves more than twofold when the rows of the highest losses are left out: such a
    constant is not identified, and its value no number.
    """

    base: Surface
    tokens: float  # R_D*
    sizes: float  # R_N*
    r_squared: float  # of L
    edge: tuple[str, ...] = ()
    unstable: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the constants, in words."""
        found = [f"R* of {name} ended at a bound: the rows do not tell it" for name in self.edge]
        found += [
            f"R* of {name} moves more than twofold when up to a quarter of the rows, those of the highest losses, are "
            "left out: it says what the filter was"
            for name in self.unstable
        ]
        return tuple(found)

    def effective(self, params: Any, tokens: Any, unique: Any, kappa: float = 6.0) -> tuple[np.ndarray, np.ndarray]:
        """N' and D'."""
        n, d, u = (np.asarray(v, np.float64) for v in (params, tokens, unique))
        u = np.minimum(u, d)
        of_d = _decayed(u, d, self.tokens)
        fed = _params_for(self.base, u)
        un = np.minimum(fed, n)
        return _decayed(un, n, self.sizes), of_d

    def loss(self, params: Any, tokens: Any, unique: Any) -> np.ndarray:
        return self.base.loss(*self.effective(params, tokens, unique))


def _decayed(unique: np.ndarray, seen: np.ndarray, constant: float) -> np.ndarray:
    repeats = np.maximum(seen / unique - 1.0, 0.0)
    if math.isinf(constant):
        return seen
    return unique + unique * constant * -np.expm1(-repeats / constant)


def _params_for(surface: Surface, tokens: np.ndarray) -> np.ndarray:
    """N for which D is the optimal number of tokens."""
    log_g = np.log(surface.alpha * surface.A / (surface.beta * surface.B)) / (surface.alpha + surface.beta)
    return np.exp(log_g + surface.a / surface.b * (np.log(tokens) + log_g))


def repeated_r_squared(law: Repeated, params: Any, tokens: Any, unique: Any, loss: Any) -> float:
    """R^2 of the law's losses."""
    y = np.asarray(loss, np.float64)
    return float(1 - ((y - law.loss(params, tokens, unique)) ** 2).sum() / ((y - y.mean()) ** 2).sum())


CUTS = (0.05, 0.1, 0.25)  # shares of the rows, the highest losses, without which the constants are fitted again


def repeated(params: Any, tokens: Any, unique: Any, loss: Any, base: Surface) -> Repeated:
    """R_D* and R_N* by least squares on L with the base law held; ranges [0.1, 1,000].

    Fitted again without the 5, 10 and 25 % highest losses: `unstable` names a constant whose values differ more than
    twofold among the four fits.
    """
    rows = np.stack([np.asarray(v, np.float64) for v in (params, tokens, unique, loss)])
    order = np.argsort(rows[3], kind="stable")
    fits = [_decay_constants(*rows[:, np.sort(order[: round((1 - cut) * len(order))])], base) for cut in (0.0, *CUTS)]
    low, high = math.log(0.1), math.log(1000.0)
    names = ("tokens", "sizes")
    edge = tuple(n for n, p in zip(names, fits[0], strict=True) if min(p - low, high - p) < 0.05)
    unstable = tuple(n for n, p in zip(names, np.ptp(fits, axis=0), strict=True) if p > math.log(2.0))
    law = Repeated(base, math.exp(fits[0][0]), math.exp(fits[0][1]), 0.0, edge, unstable)
    return replace(law, r_squared=repeated_r_squared(law, params, tokens, unique, loss))


def _decay_constants(params: Any, tokens: Any, unique: Any, loss: Any, base: Surface) -> np.ndarray:
    """(ln R_D*, ln R_N*) of the least squares on L."""
    from scipy.optimize import minimize

    y = np.asarray(loss, np.float64)
    low, high = math.log(0.1), math.log(1000.0)

    def value(p: np.ndarray) -> float:
        law = Repeated(base, math.exp(p[0]), math.exp(p[1]), 0.0)
        return float(((law.loss(params, tokens, unique) - y) ** 2).sum())

    grid = np.linspace(low, high, 12)
    starts = sorted((value(np.array([a, b])), a, b) for a in grid for b in grid)[:3]
    found = min(
        (minimize(value, s[1:], method="L-BFGS-B", bounds=[(low, high)] * 2) for s in starts), key=lambda f: f.fun
    )
    return np.clip(found.x, low, high)


def _positive(x: Any, y: Any, least: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError("x and y must be one-dimensional and of one length")
    for name, values in (("x", x), ("y", y)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise ValueError(f"{name} must be positive and finite; row {bad[0]} holds {values[bad[0]]}")
    if len(x) < least:
        raise ValueError(f"this law needs {least} rows or more, not {len(x)}")
    return x, y
