"""The solver behind every surface fit: variable projection to start, a batched Newton method to finish.

The surface is L(N, D) = E + A N^-alpha + B D^-beta. Its parameters are theta = (ln A, ln B, ln E, alpha, beta), with
x = ln N and z = ln D centred, so that the logarithms of A and B hardly depend on the exponents. A fit that was never
certified is worth nothing: every row of a batch says whether it converged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np

GRID = np.concatenate([np.geomspace(0.02, 0.1, 8, endpoint=False), np.linspace(0.1, 1.5, 24)])  # of alpha, of beta
CHUNK = 500  # rows of a batch that are worked on together
LIMIT = 200  # iterations
LONGEST = 3.0  # step of a parameter in one iteration
SETTLED = 1e-11  # relative decrease below which a step counts as the last
WIDE = (np.inf, 0.03)  # Huber thresholds on the way to the asked one
WIDE_STEPS = 4  # iterations at each of them
EXPONENT = (-1.0, 6.0)  # alpha and beta are kept inside
GONE = -60.0  # a logarithm of a term that has vanished: E = 0


class Data(NamedTuple):
    """Centred logarithms x, z of sizes and tokens, and losses y; float64 [n] each, y may be [K, n]."""

    x: np.ndarray
    z: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Loss:
    """What is minimised: sum of m_i rho(r_i), r = ln(model) - ln(loss), or model - loss where `raw`.

    rho is Huber's with threshold `delta` (inf: least squares). `over` multiplies rows where the model is above the
    loss (1: symmetric).
    """

    delta: float = np.inf
    raw: bool = False
    over: float = 1.0


class Form(NamedTuple):
    """Which parameters are free: theta = fixed + free @ phi; [5] and [5, p]."""

    fixed: np.ndarray
    free: np.ndarray


FULL = Form(np.zeros(5), np.eye(5))
TIED = Form(np.zeros(5), np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]], np.float64))


def fixed_floor(floor: float) -> Form:
    """E held at a value, 0 included."""
    fixed = np.zeros(5)
    fixed[2] = np.log(floor) if floor > 0 else GONE
    return Form(fixed, np.eye(5)[:, [0, 1, 3, 4]])


class Solved(NamedTuple):
    """Of each row of a batch: theta [K, 5], the objective, iterations, and whether the certificate holds [K]."""

    theta: np.ndarray
    objective: np.ndarray
    iterations: np.ndarray
    converged: np.ndarray


def surface(theta: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """The model's loss S [K, n] and its shares w [K, n, 3] of the size, token and floor terms; theta [K, 5]."""
    terms = np.empty((len(theta), len(data.x), 3))
    np.exp(theta[:, 0:1] - theta[:, 3:4] * data.x, out=terms[:, :, 0])
    np.exp(theta[:, 1:2] - theta[:, 4:5] * data.z, out=terms[:, :, 1])
    terms[:, :, 2] = np.exp(theta[:, 2:3])
    total = terms.sum(2)
    terms /= total[:, :, None]
    return total, terms


def residuals(theta: np.ndarray, data: Data, loss: Loss) -> np.ndarray:
    """[K, n] of parameters [K, 5]."""
    total = surface(theta, data)[0]
    return total - data.y if loss.raw else np.log(total) - np.log(data.y)


def jacobian(theta: np.ndarray, data: Data, loss: Loss) -> np.ndarray:
    """Derivatives [K, n, 5] of the residuals by theta."""
    total, shares = surface(theta, data)
    return _jacobian(total, shares, data, loss)


def _jacobian(total: np.ndarray, shares: np.ndarray, data: Data, loss: Loss) -> np.ndarray:
    found = np.empty((*total.shape, 5))
    found[:, :, :3] = shares
    found[:, :, 3] = -shares[:, :, 0] * data.x
    found[:, :, 4] = -shares[:, :, 1] * data.z
    return found * total[:, :, None] if loss.raw else found


def objective(residual: np.ndarray, weights: np.ndarray, loss: Loss) -> np.ndarray:
    """[K] of residuals [K, n] and row weights [K, n] or [n]."""
    size = np.abs(residual)
    value = np.where(size <= loss.delta, 0.5 * residual**2, _linear(size, loss.delta))
    return (value * sided(residual, weights, loss)).sum(1)


def _linear(size: np.ndarray, delta: float) -> np.ndarray:
    return delta * (size - 0.5 * delta) if np.isfinite(delta) else 0.0 * size


def sided(residual: np.ndarray, weights: np.ndarray, loss: Loss) -> np.ndarray:
    """Row weights, multiplied by `loss.over` where the model is above the loss."""
    return weights if loss.over == 1.0 else weights * np.where(residual > 0, loss.over, 1.0)


def start(data: Data, weights: np.ndarray, form: Form = FULL, best: int = 5) -> np.ndarray:
    """Starting points [best, 5] by variable projection over a 32 x 32 grid of exponents.

    For given exponents the model is linear in E, A, B >= 0: all 1,024 weighted least-squares problems are solved at
    once, non-negativity by trying each set of active terms. Weights are m / L^2, which mimics logarithmic residuals.
    The best cells that are no neighbours of a better one are returned; `form` restricts the terms and the exponents.
    """
    share = weights / data.y**2
    u, v = np.exp(-np.outer(GRID, data.x)), np.exp(-np.outer(GRID, data.z))  # [g, n]
    g = len(GRID)
    gram = np.empty((g, g, 3, 3))  # terms: A, B, E
    gram[:, :, 0, 0] = ((u**2) @ share)[:, None]
    gram[:, :, 1, 1] = ((v**2) @ share)[None, :]
    gram[:, :, 2, 2] = share.sum()
    gram[:, :, 0, 1] = gram[:, :, 1, 0] = (u * share) @ v.T
    gram[:, :, 0, 2] = gram[:, :, 2, 0] = (u @ share)[:, None]
    gram[:, :, 1, 2] = gram[:, :, 2, 1] = (v @ share)[None, :]
    pull = np.empty((g, g, 3))
    pull[:, :, 0], pull[:, :, 1] = (u @ (share * data.y))[:, None], (v @ (share * data.y))[None, :]
    pull[:, :, 2] = share @ data.y
    floor_held = not form.free[2].any()
    floor = np.exp(form.fixed[2]) if floor_held else 0.0
    if floor_held:  # what the floor explains is taken away first
        pull -= gram[:, :, :, 2] * floor
    choices = [c for size in (3, 2, 1) for c in combinations((0, 1) if floor_held else (0, 1, 2), size)]
    gain = np.full((g, g), -np.inf)
    terms = np.zeros((g, g, 3))
    for active in choices:
        index = np.array(active)
        part = gram[:, :, index[:, None], index]
        scale = np.sqrt(np.einsum("...ii->...i", part))
        scaled = part / (scale[..., :, None] * scale[..., None, :]) + 1e-14 * np.eye(len(index))
        solved = np.linalg.solve(scaled, (pull[:, :, index] / scale)[..., None])[..., 0] / scale
        value = (solved * pull[:, :, index]).sum(-1)
        better = (solved >= 0).all(-1) & (value > gain)
        gain[better] = value[better]
        terms[better] = 0.0
        for k, term in enumerate(active):
            terms[:, :, term][better] = solved[:, :, k][better]
    if floor_held:
        terms[:, :, 2] = floor
    if form.free.shape[1] == 4 and not floor_held:  # tied exponents
        gain[~np.eye(g, dtype=bool)] = -np.inf
    theta = []
    ranked = np.dstack(np.unravel_index(np.argsort(-gain, axis=None, kind="stable"), gain.shape))[0]
    taken: list[np.ndarray] = []
    for cell in ranked:
        if not np.isfinite(gain[tuple(cell)]) or len(theta) == best:
            break
        if any(np.abs(cell - other).max() <= 1 for other in taken):
            continue
        taken.append(cell)
        i, j = cell
        tiny = 1e-4 * data.y.min()  # a term that was cut away may come back
        logs = np.log(np.maximum(terms[i, j], tiny))
        if floor_held:
            logs[2] = form.fixed[2]
        theta.append([*logs, GRID[i], GRID[j]])
    return np.array(theta)


def polish(theta: np.ndarray, data: Data, weights: np.ndarray, loss: Loss, form: Form = FULL) -> Solved:
    """The nearest minimum of each row of theta [K, 5]; weights [n] or [K, n], data.y [n] or [K, n].

    Newton steps on a curvature that blends Huber's second derivative (fast) with its majoriser (safe), damped; the
    threshold comes down from least squares in two steps. Rows that are done leave the batch. A step that raises the
    objective is never taken.
    """
    rows = len(theta)
    found = Solved(np.array(theta, np.float64), np.empty(rows), np.zeros(rows, int), np.zeros(rows, bool))
    for first in range(0, rows, CHUNK):
        part = slice(first, min(first + CHUNK, rows))
        y = data.y[part] if data.y.ndim == 2 else data.y
        m = weights[part] if weights.ndim == 2 else weights
        done = _polish(found.theta[part], Data(data.x, data.z, y), m, loss, form)
        for target, values in zip(found, done, strict=True):
            target[part] = values
    return found


def _polish(theta: np.ndarray, data: Data, weights: np.ndarray, loss: Loss, form: Form) -> Solved:
    rows, p = len(theta), form.free.shape[1]
    out = Solved(theta.copy(), np.full(rows, np.inf), np.zeros(rows, int), np.zeros(rows, bool))
    alive = np.arange(rows)
    theta, y, m = theta.copy(), data.y, weights
    blend, damp, quiet = np.ones(rows), np.full(rows, 1e-6), np.zeros(rows, int)
    stages = [replace(loss, delta=max(wide, loss.delta)) for wide in WIDE if wide > loss.delta and not loss.raw]
    plan = [stage for stage in stages for _ in range(WIDE_STEPS)]
    now = None
    for step in range(LIMIT):
        wanted = plan[step] if step < len(plan) else loss
        d = Data(data.x, data.z, y)
        if wanted is not now or step == 0:
            now = wanted
            total, shares = surface(theta, d)
            r = total - y if now.raw else np.log(total) - np.log(y)
            value = objective(r, m, now)
            quiet[:] = 0
        j = _jacobian(total, shares, d, now) @ form.free
        size = np.abs(r)
        weighed = sided(r, m, now)
        psi = np.clip(r, -now.delta, now.delta) * weighed
        gradient = np.einsum("kn,knp->kp", psi, j)
        with np.errstate(divide="ignore", invalid="ignore"):
            soft = np.where(size > 0, np.minimum(1.0, now.delta / size), 1.0)
        curve = np.where(size <= now.delta, 1.0, blend[:, None] * soft) * weighed
        hessian = np.matmul((j * curve[:, :, None]).transpose(0, 2, 1), j)
        scale = np.sqrt(np.einsum("kii->ki", hessian))
        scale = np.maximum(scale, 1e-12 * scale.max(1, keepdims=True) + 1e-150)  # a term that has vanished stays
        scaled = hessian / (scale[:, :, None] * scale[:, None, :]) + (damp[:, None, None] + 1e-15) * np.eye(p)
        with np.errstate(over="ignore", invalid="ignore"):  # no curvature at all: the trial fails, the blend recovers
            move = np.nan_to_num(-np.linalg.solve(scaled, (gradient / scale)[..., None])[..., 0] / scale)
        move = np.clip(move, -LONGEST, LONGEST)  # each alone: a floor on its way to zero does not hold up the others
        trial = theta + move @ form.free.T
        trial[:, 3:] = np.clip(trial[:, 3:], *EXPONENT)
        trial[:, :3] = np.maximum(trial[:, :3], GONE)
        new_total, new_shares = surface(trial, d)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            new_r = new_total - y if now.raw else np.log(new_total) - np.log(y)
            new_value = objective(new_r, m, now)
        good = new_value <= value
        small = value - new_value <= SETTLED * np.abs(value) + 1e-30
        theta[good], r[good], total[good], shares[good] = trial[good], new_r[good], new_total[good], new_shares[good]
        value = np.where(good, new_value, value)
        quiet = np.where(good & small, quiet + 1, np.where(good, 0, quiet))
        blend = np.where(good, np.where(0.3 * blend < 1e-4, 0.0, 0.3 * blend), blend)
        damp = np.where(good, 0.1 * damp, damp)
        worst = ~good & (blend >= 1.0)
        damp = np.where(worst, np.maximum(10.0 * damp, 1e-8), damp)
        blend = np.where(good, blend, np.minimum(1.0, np.maximum(1e-3, 6.0 * blend)))
        if step < len(plan):
            continue
        stuck = damp > 1e10  # nothing lowers it: a minimum to rounding if the gradient says so
        done = (quiet >= 2) | stuck
        if done.any() and (done.mean() >= 0.15 or done.all()):
            finished = alive[done]
            out.theta[finished], out.objective[finished] = theta[done], value[done]
            out.iterations[finished], out.converged[finished] = step + 1, True
            keep = ~done
            alive, theta, r, total, shares = alive[keep], theta[keep], r[keep], total[keep], shares[keep]
            value, blend, damp, quiet = value[keep], blend[keep], damp[keep], quiet[keep]
            y = y[keep] if y.ndim == 2 else y
            m = m[keep] if m.ndim == 2 else m
        if not len(alive):
            break
    if len(alive):
        out.theta[alive], out.objective[alive], out.iterations[alive] = theta, value, LIMIT
        out.converged[alive] = quiet >= 2
    return out
