"""The optimal transport between two Gaussians: their Fréchet distance, how rows move it, and how far it is biased."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bench.metrics.moments import BLOCK, WIDE, mean_and_covariance
from bench.metrics.sets import check_pair
from bench.types import Error

EPSILON = float(np.finfo(np.float64).eps)
INDEFINITE = 1e-4  # share of the largest eigenvalue below which a negative one is rounding, that of float32 sums too


def raw_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray, strict: bool = False
) -> tuple[float, float]:
    """The distance as computed, rounding below 0 included, and the sum of its positive terms to judge that by."""
    difference = mean1 - mean2
    scale = float(difference @ difference + np.trace(cov1) + np.trace(cov2))
    lower = _cholesky(cov2)
    if lower is not None and not strict:
        eigenvalues = np.linalg.eigvalsh(_congruent(lower, cov1))
        if _rootable(eigenvalues):
            return scale - 2.0 * float(np.sqrt(eigenvalues).sum()), scale
    other = _cholesky(cov1)
    left = _root(cov2) if lower is None else lower
    right = _root(cov1) if other is None else other
    return scale - 2.0 * float(np.linalg.svd(left.T @ right, compute_uv=False).sum()), scale


class Transport(NamedTuple):
    """A distance and what its derivatives need, from one eigen-decomposition of (S_r)^{1/2} S (S_r)^{1/2}.

    With the symmetric maps T and its inverse, T S T = S_r: P P' = T and Q Q' = T^{-1} (on the support of S_r).
    """

    value: float  # rounding below 0 included
    scale: float  # the sum of its positive terms
    slope: np.ndarray  # m - m_r, [d]
    roots: np.ndarray  # square roots of the eigenvalues, [k]
    forth: np.ndarray  # P, [d, k]
    back: np.ndarray  # Q, [d, k]


def transport(mean: np.ndarray, cov: np.ndarray, mean_r: np.ndarray, cov_r: np.ndarray) -> Transport:
    """The optimal transport between N(mean, cov) and a reference; float64 [d] and [d, d]."""
    difference = mean - mean_r
    scale = float(difference @ difference + np.trace(cov) + np.trace(cov_r))
    lower = _cholesky(cov_r)
    factor = _root(cov_r, cut=True) if lower is None else lower
    inner = factor.T @ cov @ factor if lower is None else _congruent(lower, cov)
    eigenvalues, vectors = np.linalg.eigh(inner)
    if lower is not None and _rootable(eigenvalues):
        value = scale - 2.0 * float(np.sqrt(eigenvalues).sum())
    else:
        value = raw_distance(mean, cov, mean_r, cov_r)[0]
    kept = eigenvalues > eigenvalues[-1] * len(eigenvalues) * EPSILON
    roots, vectors = np.sqrt(eigenvalues[kept]), vectors[:, kept]
    forth = factor @ vectors / np.sqrt(roots)
    if lower is None:
        back = factor / (factor * factor).sum(0) @ vectors * np.sqrt(roots)  # columns of a root are orthogonal
    else:
        from scipy.linalg import solve_triangular

        back = solve_triangular(lower, vectors, lower=True, trans="T") * np.sqrt(roots)
    return Transport(value, scale, difference, roots, forth, back)


class Influence(NamedTuple):
    """First-order effect of each sample on the distance, float64 [n] and [m], both of mean 0."""

    fake: np.ndarray
    real: np.ndarray


def influence(fake: np.ndarray, real: np.ndarray, between: Transport | None = None) -> Influence:
    """Influence functions of the squared Fréchet distance at two feature sets [n, d] and [m, d], n, m > d.

    IF(x) = 2 (m - m_r)'(x - m) + (x - m)'(I - T)(x - m) - mean, where T = R (R S R)^{-1/2} R with R = S_r^{1/2} is the
    optimal transport map between the Gaussians; for the reference the same with T's inverse, on its support.
    `between` saves finding it again. From 1,024 dimensions on the products are float32: 1e-5 of an error.
    """
    fake, real = check_pair(fake, real)
    if between is None:
        between = transport(*mean_and_covariance(fake), *mean_and_covariance(real))
    of_fake = _quadratic(fake, 2.0 * between.slope, between.forth)
    of_real = _quadratic(real, -2.0 * between.slope, between.back)
    return Influence(of_fake - of_fake.mean(), of_real - of_real.mean())


def _quadratic(rows: np.ndarray, slope: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """slope'x + |x|^2 - |x projection|^2 of each centred row x, float64 [n]."""
    mean = rows.mean(axis=0, dtype=np.float64)
    dtype = np.float32 if rows.shape[1] >= WIDE else np.float64
    slope, projection = slope.astype(dtype), projection.astype(dtype)
    found = np.empty(len(rows))
    for start in range(0, len(rows), BLOCK):
        x = (rows[start : start + BLOCK] - mean).astype(dtype)
        projected = x @ projection
        found[start : start + BLOCK] = x @ slope + np.vecdot(x, x) - np.vecdot(projected, projected)
    return found


def gaussian_bias(between: Transport, trace: float, trace_r: float, n: int, m: int) -> float:
    """First-order bias of the plug-in of independent Gaussian rows, n generated and m of the reference.

    tr S / n + tr S_r / m + (1/n + 1/m) (1/2 sum_ij r_i r_j / (r_i + r_j) + 1/4 sum_i r_i), r the roots.
    """
    r = between.roots
    spread = 0.5 * float((np.outer(r, r) / np.add.outer(r, r)).sum()) + 0.25 * float(r.sum())
    return trace / n + trace_r / m + (1 / n + 1 / m) * spread


def general_bias(fake: np.ndarray, real: np.ndarray, between: Transport | None = None) -> float:
    """First-order bias of the plug-in of independent rows of any law, from fourth moments; [n, d] and [m, d].

    tr S / n + 1/(2n) sum_ij Var(y_i y_j) / (r_i r_j (r_i + r_j)) with y the rows projected so that their covariance is
    diag(r^2), and the same for the reference. Takes a product of n d^2 for each side more than the Gaussian form.
    """
    if between is None:
        between = transport(*mean_and_covariance(fake), *mean_and_covariance(real))
    r = between.roots
    weights = 1.0 / (np.outer(r, r) * np.add.outer(r, r))
    bias = 0.0
    for rows, projection in ((fake, between.forth), (real, between.back)):
        mean = rows.mean(axis=0, dtype=np.float64)
        fourth, second, trace = np.zeros((len(r), len(r))), np.zeros((len(r), len(r))), 0.0
        for start in range(0, len(rows), BLOCK):
            x = rows[start : start + BLOCK] - mean
            y = x @ projection * np.sqrt(r)
            second += y.T @ y
            np.square(y, out=y)
            fourth += y.T @ y
            trace += float(np.square(x).sum())
        n = len(rows)
        variances = fourth / n - (second / n) ** 2
        bias += trace / n / n + 0.5 * float((variances * weights).sum()) / n
    return bias


def factor_of(rows: np.ndarray) -> np.ndarray:
    """[k, d] with factor' factor = the unbiased covariance, k = min(n, d)."""
    n, d = rows.shape
    if n <= d:
        return (rows - rows.mean(axis=0, dtype=np.float64)) / np.sqrt(n - 1)
    cov = mean_and_covariance(rows)[1]
    lower = _cholesky(cov)
    return (_root(cov) if lower is None else lower).T


def _rootable(eigenvalues: np.ndarray) -> bool:
    """Is none so small that its root would magnify rounding?"""
    return eigenvalues[0] > eigenvalues[-1] * len(eigenvalues) * EPSILON


def _cholesky(cov: np.ndarray) -> np.ndarray | None:
    """The lower factor, or None where the covariance is singular to rounding."""
    from scipy.linalg import lapack

    lower, info = lapack.dpotrf(cov, lower=1, clean=1)
    diagonal = np.diagonal(lower)
    return lower if info == 0 and diagonal.min() > diagonal.max() * EPSILON**0.5 else None


def _congruent(lower: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """lower' cov lower, of which the lower triangle counts: half the time of two products."""
    from scipy.linalg import lapack

    return lapack.dsygst(cov, lower, itype=2, lower=1)[0]


def _root(cov: np.ndarray, cut: bool = False) -> np.ndarray:
    """A factor of a singular covariance, negative rounding in its spectrum cut; `cut`: its support alone, [d, k]."""
    eigenvalues, vectors = np.linalg.eigh(cov)
    if eigenvalues[0] < -INDEFINITE * eigenvalues[-1]:
        raise Error(f"a covariance is not positive semidefinite: it has the eigenvalue {eigenvalues[0]:.3g}")
    if cut:
        kept = eigenvalues > eigenvalues[-1] * len(eigenvalues) * EPSILON
        eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    return vectors * np.sqrt(np.maximum(eigenvalues, 0.0))
