"""Approach 3: the loss surface L(N, D) = E + A N^-alpha + B D^-beta, with a certificate for every fit.

`from suites.scaling.fit import fit_surface`: arrays in, parameters, optimum and diagnostics out. Natural logarithms;
N parameters, D tokens, C training FLOPs with C = kappa N D (kappa = 6 unless said otherwise).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from suites.scaling import solver
from suites.scaling.solver import Data, Form, Loss

OBJECTIVES = {
    "huber_log_auto": "Huber on ln L, threshold 1.345 sigma of the residuals (default)",
    "huber_log": "Huber on ln L, threshold 0.001, summed (Hoffmann et al.)",
    "ls_log": "least squares on ln L",
    "ls_raw": "least squares on L",
    "lad_log": "least absolute deviations on ln L",
    "asym": "Huber on ln L, rows above which the model lies counted tenfold",
}
FORMS = ("full", "tied", "no_floor")
CHINCHILLA = 1e-3  # delta of Hoffmann et al.
AUTO = 1.345  # 95 % efficiency under Gaussian noise
OVER = 10.0  # of "asym"
LAD = 1e-3  # of the residuals' scale: close to least absolute deviations
AGREE = 1e-8  # relative difference of objectives that are the same optimum
EXACT = 1e-16  # objective below which the residuals are rounding
PROFILE = 40  # values of E
CHI2 = 3.841458820694124  # the 95 % quantile of chi-squared with one degree of freedom


@dataclass(frozen=True)
class Surface:
    """L(N, D) = E + A N^-alpha + B D^-beta, and what follows from it under C = kappa N D."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params: Any, tokens: Any) -> np.ndarray:
        """The loss at sizes and tokens, broadcast together."""
        n, d = np.asarray(params, np.float64), np.asarray(tokens, np.float64)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    @property
    def a(self) -> float:
        """Exponent of N* in C: beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Exponent of D* in C: 1 - a."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def gamma(self) -> float:
        """Exponent with which the reducible loss falls in C: alpha beta / (alpha + beta)."""
        return self.alpha * self.beta / (self.alpha + self.beta)

    def optimum(self, flops: Any, kappa: float = 6.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """N*, D* and L* at compute C."""
        c = np.asarray(flops, np.float64) / kappa
        log_g = np.log(self.alpha * self.A / (self.beta * self.B)) / (self.alpha + self.beta)
        n = np.exp(log_g + self.a * np.log(c))
        d = np.exp(-log_g + self.b * np.log(c))
        return n, d, self.loss(n, d)

    def compute_for(self, loss: Any, kappa: float = 6.0) -> np.ndarray:
        """C at which the optimal allocation reaches a loss; NaN at or below E."""
        log_g = np.log(self.alpha * self.A / (self.beta * self.B)) / (self.alpha + self.beta)
        k = self.A * np.exp(-self.alpha * log_g) + self.B * np.exp(self.beta * log_g)
        above = np.asarray(loss, np.float64) - self.E
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(above > 0, kappa * (above / k) ** (-1.0 / self.gamma), np.nan)

    def excess_compute(self, params: Any, tokens: Any, kappa: float = 6.0) -> np.ndarray:
        """FLOPs that an allocation spends beyond the least with which its loss could be had."""
        n, d = np.asarray(params, np.float64), np.asarray(tokens, np.float64)
        return kappa * n * d - self.compute_for(self.loss(n, d), kappa)


@dataclass(frozen=True)
class SurfaceFit:
    """A fitted surface with all that is needed to judge it.

    `theta` = (ln A, ln B, ln E, alpha, beta) of centred logarithms, `centre` their means; `covariance` [5, 5] is of
    theta. `warnings` are in words: an empty tuple is a fit without a reproach.
    """

    surface: Surface
    objective: str
    form: str
    delta: float
    value: float  # of the objective, at the end
    sigma: float  # of the residuals: 1.4826 MAD
    n: int
    starts: int
    agreeing: int  # starts that ended at the same optimum
    iterations: int
    converged: bool
    gradient: float  # largest component, of the sum of its absolute terms
    condition: float  # of J'J
    floor_share: float  # E over the smallest loss
    floor_interval: tuple[float, float] | None  # of the profile of E, 95 %
    warnings: tuple[str, ...]
    theta: np.ndarray = field(repr=False)
    centre: tuple[float, float] = field(repr=False)
    residuals: np.ndarray = field(repr=False)  # ln model - ln loss (model - loss for ls_raw), [n]
    covariance: np.ndarray = field(repr=False)
    profile: tuple[np.ndarray, np.ndarray] = field(repr=False)  # E, objective at it

    def to_json(self) -> dict[str, Any]:
        """Everything, arrays as lists."""
        found = asdict(self)
        found["exponents"] = {"a": self.surface.a, "b": self.surface.b, "gamma": self.surface.gamma}
        return _plain(found)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (np.floating, float)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def fit_surface(
    params: Any,
    tokens: Any,
    loss: Any,
    *,
    objective: str = "huber_log_auto",
    form: str = "full",
    floor: float | None = None,
    weights: Any = None,
    delta: float | None = None,
    profile: bool = True,
) -> SurfaceFit:
    """Fits the surface to rows [n] of parameters, tokens and losses.

    `objective` is one of OBJECTIVES, `form` one of FORMS; `floor` holds E at a value; `weights` [n] multiply rows;
    `delta` replaces the threshold that the objective would take. Raises ValueError naming what is wrong: arrays of
    other lengths, values that are not positive and finite, too few rows, sizes or tokens that do not vary.
    """
    shape = form_of(form, floor)
    data, centre = prepare(params, tokens, loss, shape.free.shape[1] + 1)
    m = _weights(weights, len(data.x))
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
    solved, criterion, sigma = _solve(data, m, objective, shape, delta)
    best = int(np.argmin(np.where(solved.converged, solved.objective, np.inf)))
    if not solved.converged.any():
        best = int(np.argmin(solved.objective))
    theta = solved.theta[best]
    value = float(solved.objective[best])
    agreeing = int((solved.objective <= value * (1 + AGREE) + 1e-13 * len(data.x)).sum())
    r = solver.residuals(theta[None], data, criterion)[0]
    j = solver.jacobian(theta[None], data, criterion)[0] @ shape.free
    psi = np.clip(r, -criterion.delta, criterion.delta) * solver.sided(r, m, criterion)
    terms = np.abs(psi[:, None] * j).sum(0)
    gradient = float((np.abs(psi @ j) / np.maximum(terms, 1e-300)).max()) if terms.any() else 0.0
    if value < EXACT:
        gradient = 0.0
    scale = np.sqrt((j**2).sum(0))
    condition = float(np.linalg.cond(j / np.maximum(scale, 1e-300)) ** 2)
    surface = unpack(theta, centre)
    curve = _profile(data, m, criterion, theta) if profile and floor is None and form == "full" else None
    interval = _profile_interval(curve, value, sigma, criterion) if curve is not None else None
    found = SurfaceFit(
        surface=surface,
        objective=objective,
        form=form if floor is None else f"floor={floor:g}",
        delta=float(criterion.delta),
        value=value,
        sigma=sigma,
        n=len(data.x),
        starts=len(solved.theta),
        agreeing=agreeing,
        iterations=int(solved.iterations[best]),
        converged=bool(solved.converged[best]),
        gradient=gradient,
        condition=condition,
        floor_share=surface.E / float(data.y.min()),
        floor_interval=interval,
        warnings=(),
        theta=theta,
        centre=centre,
        residuals=r,
        covariance=covariance(theta, data, m, criterion, shape),
        profile=curve if curve is not None else (np.empty(0), np.empty(0)),
    )
    return replace(found, warnings=tuple(_warnings(found, data)))


def prepare(params: Any, tokens: Any, loss: Any, least: int = 6) -> tuple[Data, tuple[float, float]]:
    """Checked, centred logarithms; raises ValueError naming the column and the first bad row, or too few rows."""
    columns = {"params": params, "tokens": tokens, "loss": loss}
    arrays = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    if len({a.shape for a in arrays.values()}) > 1 or arrays["loss"].ndim != 1:
        raise ValueError("params, tokens and loss must be one-dimensional and of one length")
    if len(arrays["loss"]) < least:
        raise ValueError(f"a surface of {least - 1} parameters needs {least} rows or more, not {len(arrays['loss'])}")
    for name, values in arrays.items():
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise ValueError(f"{name} must be positive and finite; row {bad[0]} holds {values[bad[0]]}")
    x, z = np.log(arrays["params"]), np.log(arrays["tokens"])
    for name, values in (("params", x), ("tokens", z)):
        if np.ptp(values) < 1e-9:
            raise ValueError(f"{name} does not vary: its exponent cannot be told")
    centre = float(x.mean()), float(z.mean())
    return Data(x - centre[0], z - centre[1], arrays["loss"]), centre


def form_of(form: str, floor: float | None = None) -> Form:
    """The solver's form of a name and a held floor; ValueError for an unknown name or a floor that is no loss."""
    if form not in FORMS:
        raise ValueError(f"form {form!r} is not one of {', '.join(FORMS)}")
    if floor is not None and not (np.isfinite(floor) and floor >= 0):
        raise ValueError(f"floor = {floor} must be 0 or more")
    if floor is not None and form != "full":
        raise ValueError("a held floor goes with the full form alone")
    if floor is not None or form == "no_floor":
        return solver.fixed_floor(floor or 0.0)
    return solver.TIED if form == "tied" else solver.FULL


def unpack(theta: np.ndarray, centre: tuple[float, float]) -> Surface:
    """The surface of one row of parameters of centred logarithms."""
    a, b, e, alpha, beta = (float(v) for v in theta)
    floor = float(np.exp(e)) if e > solver.GONE else 0.0
    return Surface(floor, float(np.exp(a + alpha * centre[0])), float(np.exp(b + beta * centre[1])), alpha, beta)


def criterion_of(objective: str, sigma: float, delta: float | None = None) -> Loss:
    """The solver's loss of an objective at a residual scale."""
    if objective == "ls_log":
        return Loss()
    if objective == "ls_raw":
        return Loss(raw=True)
    if objective == "asym":
        return Loss(CHINCHILLA if delta is None else delta, over=OVER)
    if delta is not None:
        return Loss(delta)
    if objective == "huber_log":
        return Loss(CHINCHILLA)
    return Loss(max((AUTO if objective == "huber_log_auto" else LAD) * sigma, 1e-9))


def _solve(
    data: Data, m: np.ndarray, objective: str, form: Form, delta: float | None
) -> tuple[solver.Solved, Loss, float]:
    starts = solver.start(data, m, form)
    if not len(starts):
        raise ValueError("no start was found: is the loss the same in every row?")
    first = solver.polish(starts, data, m, Loss(), form)
    theta = first.theta[int(np.argmin(first.objective))]
    sigma = scale_of(solver.residuals(theta[None], data, Loss())[0])
    criterion = criterion_of(objective, sigma, delta)
    if objective == "ls_log":
        return first, criterion, sigma
    if objective == "huber_log_auto" and delta is None:
        for _ in range(3):
            step = solver.polish(theta[None], data, m, criterion, form)
            theta = step.theta[0]
            sigma = scale_of(solver.residuals(step.theta, data, criterion)[0])
            criterion = criterion_of(objective, sigma)
    solved = solver.polish(np.concatenate([starts, theta[None]]), data, m, criterion, form)
    best = solved.theta[int(np.argmin(solved.objective))]
    return solved, criterion, scale_of(solver.residuals(best[None], data, criterion)[0])


def scale_of(residuals: np.ndarray) -> float:
    """1.4826 times the median absolute deviation from the median."""
    return float(1.4826 * np.median(np.abs(residuals - np.median(residuals))))


def covariance(theta: np.ndarray, data: Data, m: np.ndarray, loss: Loss, form: Form) -> np.ndarray:
    """The sandwich (J'HJ)^-1 J' diag(psi^2) J (J'HJ)^-1 n / (n - p), [5, 5]; H = 1 inside the threshold, 0 outside.

    For least squares it is the heteroscedasticity-robust covariance (HC1); parameters that are held have zeros.
    """
    r = solver.residuals(theta[None], data, loss)[0]
    j = solver.jacobian(theta[None], data, loss)[0] @ form.free
    weighed = solver.sided(r, m, loss)
    psi = np.clip(r, -loss.delta, loss.delta) * weighed
    inside = (np.abs(r) <= loss.delta) * weighed
    n, p = j.shape
    bread = np.linalg.pinv((j * inside[:, None]).T @ j, rcond=1e-14)
    meat = (j * (psi**2)[:, None]).T @ j
    found = bread @ meat @ bread * (n / max(n - p, 1))
    return form.free @ found @ form.free.T


def least_squares_covariance(theta: np.ndarray, data: Data, m: np.ndarray, loss: Loss, form: Form) -> np.ndarray:
    """sigma^2 (J'J)^-1 with sigma^2 = sum m r^2 / (n - p), [5, 5]: for independent errors of one size."""
    r = solver.residuals(theta[None], data, loss)[0]
    j = solver.jacobian(theta[None], data, loss)[0] @ form.free
    n, p = j.shape
    found = np.linalg.pinv((j * m[:, None]).T @ j, rcond=1e-14) * float((m * r**2).sum() / max(n - p, 1))
    return form.free @ found @ form.free.T


def _profile(data: Data, m: np.ndarray, loss: Loss, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The objective minimised over the rest at 40 floors in [0, min L), and at 24 more close to the fitted one."""
    lowest, fitted = float(data.y.min()), float(np.exp(theta[2]))
    floors = np.linspace(0.0, lowest * (1 - 1e-3), PROFILE)
    near = fitted + lowest / PROFILE * np.array([s * 0.4**k for k in range(12) for s in (-1, 1)])
    floors = np.unique(np.concatenate([floors, near[(near > 0) & (near < floors[-1])]]))
    values = np.empty(len(floors))
    known: dict[int, np.ndarray] = {}
    for i in np.argsort(np.abs(floors - fitted), kind="stable"):
        form = solver.fixed_floor(floors[i])
        starts = np.array([*([known[k] for k in (i - 1, i + 1) if k in known] or [theta])])
        starts[:, 2] = form.fixed[2]
        solved = solver.polish(starts, data, m, loss, form)
        best = int(np.argmin(solved.objective))
        known[i], values[i] = solved.theta[best], solved.objective[best]
    return floors, values


def _profile_interval(
    curve: tuple[np.ndarray, np.ndarray], value: float, sigma: float, loss: Loss
) -> tuple[float, float] | None:
    """Where the objective, scaled to a log likelihood, lies within 1.92 of its least; None for an exact fit."""
    floors, values = curve
    if sigma <= 1e-12:
        return None
    # Huber's objective of normal residuals has less curvature than least squares: the share inside the threshold
    unit = sigma**2 if np.isinf(loss.delta) else sigma**2 * _huber_unit(loss.delta / sigma)
    excess = (values - min(value, float(values.min()))) / unit - CHI2 / 2
    inside = np.flatnonzero(excess <= 0)
    if not len(inside):  # narrower than the floors tried
        k = int(np.argmin(values))
        return float(floors[max(k - 1, 0)]), float(floors[min(k + 1, len(floors) - 1)])

    def crossing(outer: int, inner: int) -> float:
        share = excess[outer] / (excess[outer] - excess[inner])
        return float(floors[outer] + share * (floors[inner] - floors[outer]))

    first, last = int(inside[0]), int(inside[-1])
    low = float(floors[0]) if first == 0 else crossing(first - 1, first)
    high = float(floors[-1]) if last == len(floors) - 1 else crossing(last + 1, last)
    return low, high


def _huber_unit(k: float) -> float:
    """E psi^2 / E psi' at the standard normal law: what one unit of variance is worth in Huber's objective."""
    from math import erf, exp, pi, sqrt

    inside = erf(k / sqrt(2))
    second = inside - 2 * k * exp(-k * k / 2) / sqrt(2 * pi) + k * k * (1 - inside)
    return second / max(inside, 1e-12)


def _warnings(fit: SurfaceFit, data: Data) -> list[str]:
    found = []
    if not fit.converged:
        found.append("the fit did not converge: its numbers mean nothing")
    elif fit.agreeing < 2 and fit.starts > 1:
        found.append(f"one of {fit.starts} starts alone reached the optimum")
    for name, value in (("alpha", fit.surface.alpha), ("beta", fit.surface.beta)):
        if value <= 0.01 or value >= solver.EXPONENT[1] - 1e-6:
            found.append(f"{name} = {value:.3g} is at the edge of what a power law can be")
    if fit.floor_interval is not None:
        low, high = fit.floor_interval
        lowest = float(data.y.min())
        if low <= 1e-9 or high >= lowest * (1 - 2e-3):
            touched = "0" if low <= 1e-9 else "the least loss"
            found.append(f"E is not identified: its 95 % profile interval [{low:.3g}, {high:.3g}] touches {touched}")
    elif fit.form == "full" and fit.floor_share < 1e-6:
        found.append("E is not identified: the best fit has none")
    if fit.condition > 1e12:
        found.append(f"the parameters are nearly collinear (condition {fit.condition:.1e})")
    return found


def _weights(weights: Any, n: int) -> np.ndarray:
    if weights is None:
        return np.ones(n)
    m = np.asarray(weights, np.float64)
    if m.shape != (n,) or not np.isfinite(m).all() or (m < 0).any() or not m.any():
        raise ValueError(f"weights must be {n} numbers that are finite and not negative, and not all zero")
    return m * (n / m.sum())
