"""Fréchet distance between feature sets: exact forms, mergeable moments, and for pairs a bias correction with an error.

d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^{1/2} (Dowson and Landau 1982; FID: Heusel et al., arXiv 1706.08500).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bench.types import Error, Estimate

BLOCK = 1024  # rows per rank-k update: enough for the matrix product to be the cost
FLOOR = 1e-6  # share of the traces below which a negative distance is rounding
MODULUS = 1 << 128
EPSILON = float(np.finfo(np.float64).eps)


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray, strict: bool = False
) -> float:
    """Squared Fréchet distance of two Gaussians; means [d], covariances [d, d], computed in float64.

    The trace of the square root is sum sqrt eig(L' S1 L) with L L' = S2. `strict` takes singular values of L' K with
    K K' = S1 instead: no small eigenvalue is ever rooted, so that 1e-14 holds at any conditioning, for 3 x the time.
    A singular covariance goes through its eigenvectors and the strict form. Raises Error for input that is no pair of
    Gaussians of one dimension; a negative result within rounding is 0 (`raw_distance` keeps it).
    """
    mean1, cov1 = _gaussian(mean1, cov1, "first")
    mean2, cov2 = _gaussian(mean2, cov2, "second")
    if len(mean1) != len(mean2):
        raise Error(f"feature sets differ in dimension: {len(mean1)} and {len(mean2)}")
    return _floored(*raw_distance(mean1, cov1, mean2, cov2, strict))


def raw_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray, strict: bool = False
) -> tuple[float, float]:
    """The distance as computed, rounding below 0 included, and the sum of its positive terms to judge that by."""
    difference = mean1 - mean2
    scale = float(difference @ difference + np.trace(cov1) + np.trace(cov2))
    lower = _cholesky(cov2)
    if lower is not None and not strict:
        inner = lower.T @ cov1 @ lower
        eigenvalues = np.linalg.eigvalsh(inner)
        if eigenvalues[0] > eigenvalues[-1] * len(eigenvalues) * EPSILON:  # below, a root would magnify rounding
            return scale - 2.0 * float(np.sqrt(eigenvalues).sum()), scale
    other = _cholesky(cov1)
    left = _root(cov2) if lower is None else lower
    right = _root(cov1) if other is None else other
    return scale - 2.0 * float(np.linalg.svd(left.T @ right, compute_uv=False).sum()), scale


def frechet_from_features(a: np.ndarray, b: np.ndarray, strict: bool = False) -> float:
    """Squared Fréchet distance of two feature sets [n, d] and [m, d], any n, m >= 2; covariances unbiased.

    A set of at most d rows is its own factor (S = A'A), so the trace is the nuclear norm of A B': exact where S is
    singular, and without a d x d decomposition. Raises Error naming the fault of the features.
    """
    a, b = check_features(a, "first"), check_features(b, "second")
    if a.shape[1] != b.shape[1]:
        raise Error(f"feature sets differ in dimension: {a.shape[1]} and {b.shape[1]}")
    return _floored(*_raw_from_features(a, b, strict))


def check_features(features: Any, which: str = "feature") -> np.ndarray:
    """Float [n, d] of a feature array; raises Error unless it is 2-D, finite, n > 1, d > 1 and not all rows equal."""
    array = np.asarray(features)
    if array.ndim != 2:
        raise Error(f"the {which} set must be [n, d], not of shape {list(array.shape)}", hint="one row per sample")
    n, d = array.shape
    if d < 2:
        raise Error(f"the {which} set has d = {d}", hint="a flattened buffer? features are [n, d] with d > 1")
    if n < 2:
        raise Error(f"the {which} set has {n} row{'' if n == 1 else 's'}; a covariance needs two")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise Error(f"the {which} set holds NaN or infinity")
    if (array == array[0]).all():
        raise Error(f"the {which} set has no variance: all {n} rows are equal")
    return array


def mean_and_covariance(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 [d] and unbiased [d, d] of features [n, d], n > 1, in blocks: no float64 copy of the whole."""
    mean = features.mean(axis=0, dtype=np.float64)
    second = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), BLOCK):
        x = features[start : start + BLOCK] - mean
        second += x.T @ x  # NumPy sees A'A and calls syrk
    return mean, second / (len(features) - 1)


class Moments:
    """Count, sum and second moment of features about a fixed origin, in float64; shards merge by addition.

    `digest` sums 128-bit hashes of the sample ids mod 2^128: with the count it tells whether a merged set has every
    sample once. d = 2048 takes 34 MB. Not safe for several threads.
    """

    def __init__(self, dim: int, origin: np.ndarray | None = None):
        self.dim = dim
        self.n = 0
        self.origin = None if origin is None else np.asarray(origin, dtype=np.float64)  # None: the first rows' mean
        self.digest = 0
        self._sum = np.zeros(dim)
        self._second = np.zeros((dim, dim))
        self._waiting: list[np.ndarray] = []

    def update(self, features: np.ndarray, ids: Iterable[str] | None = None) -> Moments:
        """Adds rows [n, d]; `ids` name them for the digest. Raises Error where shape or finiteness is wrong."""
        rows = np.asarray(features)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise Error(f"features must be [n, {self.dim}], not of shape {list(rows.shape)}")
        if not np.isfinite(rows).all():
            raise Error("features hold NaN or infinity")
        if ids is not None:
            ids = list(ids)
            if len(ids) != len(rows):
                raise Error(f"{len(ids)} ids for {len(rows)} rows of features")
            self.digest = (self.digest + digest_of(ids)) % MODULUS
        if len(rows) == 0:
            return self
        if self.origin is None:
            self.origin = rows.mean(axis=0, dtype=np.float64).astype(np.float32).astype(np.float64)
        self.n += len(rows)
        self._waiting.append(rows.astype(np.float64) - self.origin)
        if sum(map(len, self._waiting)) >= BLOCK:
            self._settle()
        return self

    def merge(self, other: Moments) -> Moments:
        """Adds another set's moments; a different origin is shifted exactly."""
        if other.dim != self.dim:
            raise Error(f"moments differ in dimension: {self.dim} and {other.dim}")
        self._settle()
        other._settle()
        self.digest = (self.digest + other.digest) % MODULUS
        if other.n == 0:
            return self
        if self.origin is None:
            self.origin = other.origin.copy()
        shift = other.origin - self.origin
        cross = np.outer(shift, other._sum)
        self._second += other._second + cross + cross.T + other.n * np.outer(shift, shift)
        self._sum += other._sum + other.n * shift
        self.n += other.n
        return self

    def mean(self) -> np.ndarray:
        """float64 [d]."""
        self._need(1)
        return self.origin + self._sum / self.n

    def covariance(self, biased: bool = False) -> np.ndarray:
        """float64 [d, d], over n - 1; `biased` divides by n, as StyleGAN-V's and cd-fvd's FVD do."""
        self._need(2)
        return (self._second - np.outer(self._sum, self._sum) / self.n) / (self.n if biased else self.n - 1)

    def expect(self, ids: Iterable[str]) -> None:
        """Raises Error unless exactly these samples were added, each once."""
        ids = list(ids)
        if self.n != len(ids):
            raise Error(f"moments hold {self.n} samples where {len(ids)} were expected")
        if self.digest != digest_of(ids):
            raise Error(f"moments hold other samples than the {len(ids)} expected: some missing, some repeated")

    def to_bytes(self) -> bytes:
        """An npz archive that holds plain arrays."""
        self._settle()
        origin = np.zeros(self.dim) if self.origin is None else self.origin
        digest = np.frombuffer(self.digest.to_bytes(16, "big"), dtype=np.uint8)
        file = io.BytesIO()
        np.savez(file, n=np.int64(self.n), origin=origin, sum=self._sum, second=self._second, digest=digest)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Moments:
        """Reads `to_bytes`; raises Error where the archive is damaged or is something else."""
        import zipfile

        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                n, origin, total, second, digest = (file[k] for k in ("n", "origin", "sum", "second", "digest"))
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as e:
            raise Error(f"not an archive of moments: {e}") from None
        dim = origin.size
        if second.shape != (dim, dim) or total.shape != (dim,) or digest.size != 16:
            raise Error("not an archive of moments: its arrays do not fit together")
        moments = cls(dim, origin if n else None)
        moments.n, moments._sum, moments._second = int(n), total, second
        moments.digest = int.from_bytes(digest.tobytes(), "big")
        return moments

    def _settle(self) -> None:
        if self._waiting:
            rows = np.concatenate(self._waiting)
            self._waiting = []
            self._sum += rows.sum(axis=0)
            self._second += rows.T @ rows

    def _need(self, n: int) -> None:
        self._settle()
        if self.n < n:
            raise Error(f"this statistic needs {n} sample{'' if n == 1 else 's'}; the moments hold {self.n}")


def digest_of(ids: Iterable[str]) -> int:
    """Sum of the 128-bit hashes of sample ids mod 2^128: any order, any sharding, repeats counted."""
    return sum(int.from_bytes(hashlib.sha256(str(i).encode()).digest()[:16], "big") for i in ids) % MODULUS


class Influence(NamedTuple):
    """First-order effect of each sample on the distance, float64 [n] and [m], both of mean 0."""

    fake: np.ndarray
    real: np.ndarray


def influence(fake: np.ndarray, real: np.ndarray) -> Influence:
    """Influence functions of the squared Fréchet distance at two feature sets [n, d] and [m, d], n, m > d.

    IF(x) = 2 (m - m_r)'(x - m) + (x - m)'(I - T)(x - m) - mean, where T = R (R S R)^{-1/2} R with R = S_r^{1/2} is the
    optimal transport map between the Gaussians; for the reference the same with T's inverse, on its support.
    """
    fake, real = check_features(fake, "first"), check_features(real, "second")
    mean_fake, cov_fake = mean_and_covariance(fake)
    mean_real, cov_real = mean_and_covariance(real)
    factor, inverse = _support(cov_real)  # [d, k], [k, d]: factor factor' = S_r
    eigenvalues, vectors = np.linalg.eigh(factor.T @ cov_fake @ factor)
    kept = eigenvalues > eigenvalues[-1] * len(eigenvalues) * EPSILON
    quarter, vectors = eigenvalues[kept] ** 0.25, vectors[:, kept]
    difference = mean_fake - mean_real
    of_fake = _quadratic(fake, mean_fake, 2.0 * difference, factor @ vectors / quarter)  # |x P|^2 = x'Tx
    of_real = _quadratic(real, mean_real, -2.0 * difference, inverse.T @ vectors * quarter)  # |y Q|^2 = y'T^-1 y
    return Influence(of_fake - of_fake.mean(), of_real - of_real.mean())


def _quadratic(rows: np.ndarray, mean: np.ndarray, slope: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """slope'x + |x|^2 - |x projection|^2 of each centred row x, float64 [n]."""
    found = np.empty(len(rows))
    for start in range(0, len(rows), BLOCK):
        x = rows[start : start + BLOCK] - mean
        projected = x @ projection
        found[start : start + BLOCK] = x @ slope + (x * x).sum(1) - (projected * projected).sum(1)
    return found


class Corrected(NamedTuple):
    """A bias-corrected distance of pairs with its standard error; `se` is None where n / d < 4."""

    value: float
    plug_in: float
    se: float | None
    freedom: int  # clusters - 1


def paired_distance(
    fake: np.ndarray, real: np.ndarray, clusters: Sequence[str] | None = None, seed: int = 0
) -> Corrected:
    """Fréchet distance between pictures and their own reconstructions, [n, d] each, row i with row i; needs n > d.

    The bias c/n is removed by splitting the *pairs* into halves (whole clusters together): 2 F(n) - mean F(n/2). The
    standard error is that of the summed influence IF_fake(x_i) + IF_real(y_i) of a pair, by cluster. Treating the two
    sets as independent would inflate both. `seed` draws the split.
    """
    fake, real = check_features(fake, "first"), check_features(real, "second")
    if fake.shape != real.shape:
        raise Error(f"pairs need sets of one shape, not {list(fake.shape)} and {list(real.shape)}")
    n, d = fake.shape
    if n <= d:
        raise Error(f"{n} pairs in {d} dimensions have singular covariances: the bias cannot be removed")
    names = np.arange(n) if clusters is None else np.unique(np.asarray(clusters, dtype=str), return_inverse=True)[1]
    plug_in = _floored(*_raw_from_features(fake, real, False))
    halves = _halves(names, np.random.Generator(np.random.Philox(seed)))
    inverse_sizes = np.mean([1.0 / len(h) for h in halves])
    of_halves = np.mean([_raw_from_features(fake[h], real[h], False)[0] for h in halves])
    value = plug_in - (of_halves - plug_in) * (1.0 / n) / (inverse_sizes - 1.0 / n)
    num_clusters = int(names.max()) + 1
    se = None
    if n >= 4 * d and num_clusters > 1:
        effect = influence(fake, real)
        sums = np.bincount(names, weights=effect.fake + effect.real)
        se = float(np.sqrt(num_clusters / (num_clusters - 1) * (sums**2).sum())) / n
    return Corrected(float(value), plug_in, se, num_clusters - 1)


def smallest_half(clusters: Sequence[str], seed: int) -> int:
    """Rows in the smaller of the halves that `paired_distance` would draw; it needs two."""
    names = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)[1]
    return min(len(half) for half in _halves(names, np.random.Generator(np.random.Philox(seed))))


def _halves(clusters: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of two random halves that keep clusters whole and differ in size as little as a greedy deal gives."""
    sizes = np.bincount(clusters)
    order = generator.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    side = np.zeros(len(sizes), dtype=bool)
    filled = [0, 0]
    for cluster in order:
        right = filled[1] < filled[0] or (filled[1] == filled[0] and bool(generator.integers(2)))
        side[cluster] = right
        filled[right] += int(sizes[cluster])
    return np.flatnonzero(~side[clusters]), np.flatnonzero(side[clusters])


def _raw_from_features(a: np.ndarray, b: np.ndarray, strict: bool) -> tuple[float, float]:
    d = a.shape[1]
    if min(len(a), len(b)) > d:
        return raw_distance(*mean_and_covariance(a), *mean_and_covariance(b), strict)
    difference = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    factor_a, factor_b = _factor(a), _factor(b)
    scale = float(difference @ difference + (factor_a**2).sum() + (factor_b**2).sum())
    return scale - 2.0 * float(np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()), scale


def _factor(rows: np.ndarray) -> np.ndarray:
    """[k, d] with factor' factor = the unbiased covariance, k = min(n, d)."""
    n, d = rows.shape
    if n <= d:
        return (rows - rows.mean(axis=0, dtype=np.float64)) / np.sqrt(n - 1)
    cov = mean_and_covariance(rows)[1]
    lower = _cholesky(cov)
    return (_root(cov) if lower is None else lower).T


def _gaussian(mean: Any, cov: Any, which: str) -> tuple[np.ndarray, np.ndarray]:
    mean, cov = np.asarray(mean, dtype=np.float64), np.asarray(cov, dtype=np.float64)
    if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
        raise Error(f"the {which} Gaussian needs mean [d] and covariance [d, d], not {mean.shape} and {cov.shape}")
    if mean.size < 2:
        raise Error(f"the {which} Gaussian has d = {mean.size}; features have more than one dimension")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise Error(f"the {which} mean or covariance holds NaN or infinity")
    if not (np.diagonal(cov) > 0).any():
        raise Error(f"the {which} covariance has no variance")
    return mean, cov


def _floored(raw: float, scale: float) -> float:
    if raw < -FLOOR * scale:
        raise Error(f"the Fréchet distance came out as {raw:g}: a covariance is not positive semidefinite")
    return max(raw, 0.0)


def _cholesky(cov: np.ndarray) -> np.ndarray | None:
    """The lower factor, or None where the covariance is singular to rounding."""
    try:
        lower = np.linalg.cholesky(cov)
    except np.linalg.LinAlgError:
        return None
    diagonal = np.diagonal(lower)
    return lower if diagonal.min() > diagonal.max() * EPSILON**0.5 else None


def _root(cov: np.ndarray) -> np.ndarray:
    """A factor of a singular covariance, negative rounding in its spectrum cut."""
    eigenvalues, vectors = np.linalg.eigh(cov)
    return vectors * np.sqrt(np.maximum(eigenvalues, 0.0))


def _support(cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """factor [d, k] and its left inverse [k, d] on the support of a covariance."""
    eigenvalues, vectors = np.linalg.eigh(cov)
    kept = eigenvalues > eigenvalues[-1] * len(eigenvalues) * EPSILON
    root, vectors = np.sqrt(eigenvalues[kept]), vectors[:, kept]
    return vectors * root, (vectors / root).T


@dataclass(frozen=True)
class Frechet:
    """Fréchet distance between pictures and their own reconstructions: plug-in and, as `corrected`, without its bias.

    `fid` is the name for Inception alone. Withheld where the pairs are not more than the dimensions.
    """

    extractor: str = "embedded"  # a name of bench.metrics.extractors
    real: str = "image"
    fake: str = "recon"
    quantise: str = "round"
    value_range: tuple[float, float] = (-1.0, 1.0)

    version = 1
    unit = ""
    better = "lower"

    @property
    def name(self) -> str:
        return "fid" if self.extractor.startswith("inception") else f"frechet-{self.extractor}"

    def prepare(self, ctx):
        from bench.metrics.extractors import opened

        opened(self.extractor, ctx)

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights manifests that measuring will ask for."""
        from bench.metrics.extractors import INCEPTION

        return (INCEPTION,) if self.extractor.startswith("inception") else ()

    def measure(self, media, ctx):
        from bench.metrics.extractors import features, opened

        real = features(self.extractor, media[self.real], ctx, self.quantise, self.value_range)
        fake = features(self.extractor, media[self.fake], ctx, self.quantise, self.value_range)
        net = opened(self.extractor, ctx).fingerprint
        return {f"{self.extractor}/real": real, f"{self.extractor}/fake": fake, f"{self.name}-net": [net] * len(real)}

    def reduce(self, table):
        n = len(table)
        if n < 2:
            return self._withheld(table, f"n = {n}: a covariance needs two pairs")
        try:
            real, fake = table.features(f"{self.extractor}/real"), table.features(f"{self.extractor}/fake")
        except KeyError:  # no unit kept them: missing, not withheld
            return {"": Estimate(None), "corrected": Estimate(None)}
        d = real.shape[1]
        try:
            check_features(real, "reference")
            check_features(fake, "reconstructed")
        except Error as e:
            return self._withheld(table, str(e))
        if n <= d:
            return self._withheld(table, f"n = {n} pairs are not more than d = {d} dimensions")
        if smallest_half(table.clusters(), table.seed) < 2:
            plug_in = Estimate(frechet_from_features(fake, real), n=n)
            return {"": plug_in, "corrected": Estimate(None, n=n, note=self._note(table, "too few clusters to halve"))}
        found = paired_distance(fake, real, table.clusters(), table.seed)
        plug_in = Estimate(found.plug_in, n=n)
        if found.se is None:
            note = self._note(table, f"no interval: n = {n} pairs, d = {d} dimensions, n/d < 4 or one cluster")
            return {"": plug_in, "corrected": Estimate(found.value, method="half-split", n=n, note=note)}
        from scipy.special import stdtrit

        half = float(stdtrit(found.freedom, 0.975)) * found.se
        low, high = found.value - half, found.value + half
        return {"": plug_in, "corrected": Estimate(found.value, low, high, "half-split, influence-t", n)}

    def signature(self, table):
        nets = sorted({str(v) for v in table.column(f"{self.name}-net") if v is not None})
        resize = self.extractor.partition("-")[2] or "none"
        parts = f"n:{len(table)}|net:{'+'.join(nets) or 'none'}|resize:{resize}|{self.quantise}|ref:self"
        return f"{self.name}|{parts}|v:{self.version}"

    def _withheld(self, table, reason):
        estimate = Estimate(None, n=len(table), note=self._note(table, reason))
        return {"": estimate, "corrected": estimate}

    def _note(self, table, reason):
        return reason if len(table) == table.expected else ""  # a note would say that nothing is missing


@dataclass(frozen=True)
class PairwiseFeatureDistance:
    """Mean |phi(x) - phi(y)|^2 of pictures and their reconstructions: per picture, with an interval and no bias in n.

    FlowMo reports it beside rFID as PAIRWISE_INCEPTION.
    """

    extractor: str = "embedded"
    real: str = "image"
    fake: str = "recon"
    quantise: str = "round"
    value_range: tuple[float, float] = (-1.0, 1.0)

    version = 1
    unit = ""
    better = "lower"

    @property
    def name(self) -> str:
        return f"pairwise-{self.extractor}"

    def prepare(self, ctx):
        from bench.metrics.extractors import opened

        opened(self.extractor, ctx)

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights manifests that measuring will ask for."""
        from bench.metrics.extractors import INCEPTION

        return (INCEPTION,) if self.extractor.startswith("inception") else ()

    def measure(self, media, ctx):
        from bench.metrics.extractors import features, opened

        real = features(self.extractor, media[self.real], ctx, self.quantise, self.value_range)
        fake = features(self.extractor, media[self.fake], ctx, self.quantise, self.value_range)
        squares = np.square(real.astype(np.float64) - fake).sum(1)
        return {self.name: squares.tolist(), f"{self.name}-net": [opened(self.extractor, ctx).fingerprint] * len(real)}

    def reduce(self, table):
        from bench.metrics.pixel import mean_of_rows

        return mean_of_rows(table, self.name)

    def signature(self, table):
        nets = sorted({str(v) for v in table.column(f"{self.name}-net") if v is not None})
        resize = self.extractor.partition("-")[2] or "none"
        return f"{self.name}|net:{'+'.join(nets) or 'none'}|resize:{resize}|{self.quantise}|v:{self.version}"
