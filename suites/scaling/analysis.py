"""One table of trainings through all approaches: estimates with intervals, diagnostics, and what is wrong in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from suites.scaling import fit as fitting
from suites.scaling import laws, resample
from suites.scaling.fit import SurfaceFit
from suites.scaling.isoflop import LEAST_SIZES, PowerLaw, Profiles, corrected, line, profiles
from suites.scaling.resample import BackTest, Band, Mixture, Resamples
from suites.scaling.table import Runs

DISAGREE = 0.05  # between the exponents of approaches 2 and 3 where an interval is missing
FITTED = 6  # rows that a surface needs


@dataclass(frozen=True)
class Analysis:
    """What a table says. `fit` is None where a surface cannot be fitted, `profiles.params` where no line can be drawn.

    `estimates` holds (value, low, high): None where there is no interval, or no finite value. `warnings` come first in
    every output.
    """

    runs: Runs
    fit: SurfaceFit | None
    resamples: Resamples | None
    resampling: str  # which kind, and why
    profiles: Profiles
    profile_exponents: np.ndarray  # of N*, one for each resample inside budgets
    corrected: PowerLaw | None
    power: laws.Power | None  # of the least losses along compute, without a floor
    saturating: laws.Power | None  # the same with one
    bands: dict[str, Band]
    back_test: BackTest | None
    mixture: Mixture | None
    estimates: dict[str, tuple[float | None, float | None, float | None]]
    warnings: tuple[str, ...]
    kappa: float

    def to_json(self) -> dict[str, Any]:
        """Everything but the resamples, which go to an npz."""
        found: dict[str, Any] = {
            "rows": {"used": self.runs.row, "run_id": self.runs.run_id, "columns": dict(self.runs.columns)},
            "dropped": [vars(d) for d in self.runs.dropped],
            "notes": self.runs.notes,
            "kappa": self.kappa,
            "estimates": {k: {"value": v[0], "low": v[1], "high": v[2]} for k, v in self.estimates.items()},
            "warnings": self.warnings,
            "resampling": self.resampling,
            "surface": None if self.fit is None else self.fit.to_json(),
            "profiles": {
                "vertices": [vars(v) for v in self.profiles.vertices],
                "params": None if self.profiles.params is None else vars(self.profiles.params),
                "tokens": None if self.profiles.tokens is None else vars(self.profiles.tokens),
                "corrected": None if self.corrected is None else vars(self.corrected),
            },
            "power": None if self.power is None else vars(self.power),
            "saturating": None if self.saturating is None else vars(self.saturating),
        }
        if self.resamples is not None:
            found["resamples"] = {
                "kind": self.resamples.kind,
                "count": len(self.resamples),
                "failed": self.resamples.failed,
                "seed": self.resamples.seed,
            }
        if self.back_test is not None:
            found["back_test"] = vars(self.back_test)
        if self.mixture is not None:
            found["mixture"] = {"forms": self.mixture.forms, "weights": self.mixture.weights}
        return fitting._plain(found)


def analyse(
    runs: Runs,
    *,
    objective: str = "huber_log_auto",
    form: str = "full",
    kind: str = "",
    count: int = 1000,
    seed: int = 0,
    at: Sequence[float] = (),
    kappa: float = 6.0,
) -> Analysis:
    """All approaches on one table; `kind` of resampling is chosen by the residuals where it is empty.

    `at` are computes at which N*, D* and L* are given, ten times the largest where empty. Raises ValueError for
    unknown names and for fewer than two usable rows.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} row can be used; a law needs more")
    warnings = [runs.mixed] if runs.mixed else []
    largest = float(runs.flops.max())
    at = tuple(at) or (10 * largest,)
    found_profiles = profiles(runs, kappa=None)
    drawn_profiles = resample_profiles(runs, count=count, seed=seed)
    fit, drawn, why, bands, tested, mixed, shifted = None, None, "", {}, None, None, None
    columns = runs.params, runs.tokens, runs.loss
    try:
        if np.ptp(runs.loss) < 1e-6 * runs.loss.min():
            raise ValueError("all losses are the same")
        fit = fitting.fit_surface(*columns, objective=objective, form=form, weights=_weights(runs))
    except ValueError as e:
        if "not one of" in str(e):
            raise
        warnings.append(f"no surface was fitted: {e}")
    if fit is not None:
        run_id = runs.run_id if len(set(runs.run_id)) < len(runs) else None
        chosen, reason = resample.choose(fit, run_id, runs.params, runs.tokens)
        kind, reason = (kind, "as asked") if kind else (chosen, reason)
        why = f"{kind}: {reason}"
        drawn = resample.resample(
            fit, *columns, kind=kind, count=count, seed=seed, run_id=run_id, weights=_weights(runs)
        )
        if drawn.failed:
            warnings.append(f"{drawn.failed} of {count} resamples did not converge and are left out")
        if len(np.unique(runs.budget)) >= 4 and len(runs) >= 3 * FITTED:
            tested = resample.back_test(*columns, runs.budget, objective=objective, seed=seed)
        inflate = tested.inflate if tested is not None else 1.0
        span = np.geomspace(runs.flops.min(), max(*at, largest), 60)
        if len(drawn) > 1:
            bands = resample.bands(fit, drawn, span, kappa=kappa, inflate=inflate)
        shifted = corrected(runs, found_profiles, fit.surface)
        mixed = resample.mixture(*columns, objective=objective) if len(runs) >= 10 and form == "full" else None
        warnings += fit.warnings
        if tested is not None and tested.inflate > 1.5:
            warnings.append(
                f"predictions of larger budgets from smaller ones missed: bands are widened {tested.inflate:.1f} times"
            )
        p = resample.breusch_pagan(fit, runs.params, runs.tokens)
        if p < 0.01:
            warnings.append(f"the errors change in size along compute (p = {p:.1g})")
        warnings += [f"at {c:.3g} FLOPs: {w}" for c in at if (w := resample.extrapolation_warning(c, largest))]
        warnings += _outliers(fit, runs, objective, form)
    warnings += found_profiles.warnings
    if len(np.unique(runs.budget)) == 1:
        warnings.append("one budget alone: nothing can be said of how an optimum moves with compute")
    estimates = _estimates(fit, drawn, found_profiles, drawn_profiles, shifted, at, kappa)
    beyond = [name for name, (value, _, _) in estimates.items() if not math.isfinite(value)]
    if fit is not None and min(fit.surface.alpha, fit.surface.beta) <= 0:  # larger is worse: the optimum is a maximum
        beyond += [n for n in estimates if re.match(r"surface: ([ab]$|gamma$|[NDL]\*)", n) and n not in beyond]
    if beyond:
        warnings.append(f"not finite or of no optimum, so not given: {', '.join(beyond)}")
        estimates |= dict.fromkeys(beyond, (None, None, None))
    warnings += _conflict(fit, drawn, found_profiles, drawn_profiles)
    power = saturating = None
    least = [(v.budget, v.loss) for v in found_profiles.vertices if not v.problem]
    if len(least) >= 4:
        c, y = np.array(least).T
        power, saturating = laws.power(c, y), laws.saturating(c, y)
        if saturating.edge:
            warnings.append("the least losses do not tell a floor: the exponent of E + k C^p ended at a bound")
    return Analysis(
        runs=runs,
        fit=fit,
        resamples=drawn,
        resampling=why,
        profiles=found_profiles,
        profile_exponents=drawn_profiles,
        corrected=shifted,
        power=power,
        saturating=saturating,
        bands=bands,
        back_test=tested,
        mixture=mixed,
        estimates=estimates,
        warnings=tuple(dict.fromkeys(warnings)),
        kappa=kappa,
    )


def _weights(runs: Runs) -> np.ndarray | None:
    return None if runs.loss_sd is None else (runs.loss / runs.loss_sd) ** 2


def resample_profiles(runs: Runs, *, count: int = 1000, seed: int = 0) -> np.ndarray:
    """Exponents of N* [count]: rows drawn with replacement inside each budget, parabolas and line fitted again.

    NaN where fewer than two budgets keep a minimum in a resample.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 79]))
    vertices, budgets = [], []
    for budget, part in runs.budgets():
        n = len(part)
        sizes = np.unique(part.params)
        if len(sizes) < LEAST_SIZES:
            continue
        x = np.log(part.params)
        u = x - x.mean()
        design = np.stack([u**2, u, np.ones(n)], 1)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=count)
        gram = np.einsum("kn,ni,nj->kij", counts, design, design) + 1e-12 * np.eye(3)
        pull = np.einsum("kn,ni,n->ki", counts, design, part.loss)
        p, q, _ = np.linalg.solve(gram, pull[..., None])[..., 0].T
        drawn = [(counts[:, part.params == size] > 0).any(1) for size in sizes]
        enough = np.sum(drawn, 0) >= 3  # sizes, not rows: replicates of two sizes are no parabola
        with np.errstate(divide="ignore", invalid="ignore"):
            v = np.where(enough & (p > 0), -q / (2 * p), np.nan)
        vertices.append(np.where((v > u.min()) & (v < u.max()), v, np.nan) + x.mean())
        budgets.append(math.log(budget))
    if len(budgets) < 2:
        return np.full(count, np.nan)
    y, x = np.array(vertices).T, np.array(budgets)
    known = np.isfinite(y)
    size = known.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mx = (known * x).sum(1) / size
        my = np.where(known, y, 0.0).sum(1) / size
        dx = np.where(known, x - mx[:, None], 0.0)
        slope = (dx * np.where(known, y - my[:, None], 0.0)).sum(1) / (dx**2).sum(1)
    return np.where(size >= 2, slope, np.nan)


def _estimates(
    fit: SurfaceFit | None,
    drawn: Resamples | None,
    found: Profiles,
    exponents: np.ndarray,
    shifted: PowerLaw | None,
    at: Sequence[float],
    kappa: float,
) -> dict[str, tuple[float, float | None, float | None]]:
    estimates: dict[str, tuple[float, float | None, float | None]] = {}
    if fit is not None and drawn is not None and len(drawn):
        for name, (value, low, high) in resample.summary(fit, drawn, at, kappa).items():
            known = math.isfinite(low) and math.isfinite(high)
            estimates[f"surface: {name}"] = (value, low if known else None, high if known else None)
    if found.params is not None and found.tokens is not None:
        low, high = (float(v) for v in resample.percentile(exponents))
        known = math.isfinite(low) and math.isfinite(high)
        estimates["isoFLOP: a"] = (found.params.exponent, low if known else None, high if known else None)
        estimates["isoFLOP: b"] = (found.tokens.exponent, None, None)
        estimates |= {f"isoFLOP: N*({c:.3g})": (float(found.params(c)), None, None) for c in at}
    if shifted is not None:
        estimates["isoFLOP, vertices corrected: a"] = (shifted.exponent, None, None)
        estimates |= {f"isoFLOP, vertices corrected: N*({c:.3g})": (float(shifted(c)), None, None) for c in at}
    return estimates


def _conflict(fit: SurfaceFit | None, drawn: Resamples | None, found: Profiles, exponents: np.ndarray) -> list[str]:
    """Do approaches 2 and 3 disagree about the exponent of N* beyond their joint error?"""
    if fit is None or drawn is None or found.params is None or len(drawn) < 2:
        return []
    of_surface = drawn.derive(lambda s: s.a)[:, 0]
    known = exponents[np.isfinite(exponents)]
    gap = abs(found.params.exponent - fit.surface.a)
    error = math.hypot(float(of_surface.std()), float(known.std()) if len(known) > 20 else DISAGREE / 2)
    if gap > max(1.96 * error, 0.005):
        return [
            f"the approaches conflict: a = {found.params.exponent:.3f} by isoFLOP parabolas, "
            f"{fit.surface.a:.3f} by the surface; look at the off-centre budgets before believing either"
        ]
    return []


def _outliers(fit: SurfaceFit, runs: Runs, objective: str, form: str) -> list[str]:
    """Rows whose residual is beyond six robust standard deviations, named, and the surface that the others give."""
    if fit.sigma < 1e-9:
        return []
    z = (fit.residuals - np.median(fit.residuals)) / fit.sigma
    far = np.abs(z) > 6
    rows = runs.row[far]
    if not len(rows):
        return []
    named = ", ".join(map(str, rows[:12])) + (f" and {len(rows) - 12} more" if len(rows) > 12 else "")
    said = f"row{'s' if len(rows) > 1 else ''} {named}: more than six sigma from the surface; kept, and weighed down"
    rest = runs.take(~far)
    try:
        other = fitting.fit_surface(
            rest.params, rest.tokens, rest.loss, objective=objective, form=form, weights=_weights(rest), profile=False
        )
    except ValueError:
        return [said]
    s = other.surface
    return [f"{said}. Without, E = {s.E:.4g}, alpha = {s.alpha:.3g}, beta = {s.beta:.3g}, a = {s.a:.3f}"]


@dataclass(frozen=True)
class Proposal:
    """A training to make next, and why."""

    budget: float
    params: float
    tokens: float
    reason: str


def propose_grid(found: Analysis, *, factor: float = 3.0, reach: float = 4.0, sizes: int = 7) -> list[Proposal]:
    """The next budget, centred on the predicted optimum and `reach` to either side; and two sizes more on the short
    side of each budget whose minimum lies within 0.35 (in ln N) of an end of its sizes, or outside them.

    Raises ValueError where no law says where the optimum would be.
    """
    if found.fit is not None and found.fit.converged:
        law = line(*(np.array(v) for v in _surface_points(found)))
    elif found.profiles.params is not None:
        law = found.profiles.params
    else:
        raise ValueError("no law was found that says where the next optimum lies")
    proposals = []
    for (budget, part), vertex in zip(found.runs.budgets(), found.profiles.vertices, strict=True):
        x = np.log(part.params)
        at = math.log(float(law(budget))) if vertex.problem else math.log(vertex.params)
        step = (x.max() - x.min()) / max(len(x) - 1, 1) if len(x) > 1 else math.log(2.0)
        for end, sign in ((x.max(), 1), (x.min(), -1)):
            if sign * (end - at) < 0.35:
                for k in (1, 2):
                    n = math.exp(end + sign * k * step)
                    reason = "the minimum lies at the end of this budget's sizes"
                    proposals.append(Proposal(budget, n, budget / found.kappa / n, reason))
    budget = factor * float(found.runs.budget.max())
    for w in np.linspace(-math.log(reach), math.log(reach), sizes):
        n = float(law(budget)) * math.exp(w)
        proposals.append(Proposal(budget, n, budget / found.kappa / n, "the next budget, centred on the predicted N*"))
    return proposals


def _surface_points(found: Analysis) -> tuple[list[float], list[float]]:
    c = np.geomspace(found.runs.flops.min(), 10 * found.runs.flops.max(), 8)
    return list(c), list(found.fit.surface.optimum(c, found.kappa)[0])
