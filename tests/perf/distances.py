"""Distances of feature sets against peers: Fréchet, moments, KID, CMMD, precision and recall, and what errors cost."""

import contextlib
import io
from functools import lru_cache

import numpy as np
from measure import Calls, Race, peer

DIM = 2048
K = 5


@lru_cache(maxsize=2)
def features(n: int, dim: int, seed: int) -> np.ndarray:
    """float32 [n, dim] with correlated, skewed columns and a spectrum that falls as a power, like pooled activations.

    Two seeds give two laws: the second is shifted and scaled by a little.
    """
    g = np.random.default_rng(seed)
    found = np.empty((n, dim), dtype=np.float32)
    mixing = np.random.default_rng(7).standard_normal((dim, dim), dtype=np.float32) / np.sqrt(dim)
    mixing *= (np.arange(1, dim + 1, dtype=np.float32)[:, None]) ** -0.4
    for start in range(0, n, 1000):
        drawn = g.standard_normal((min(1000, n - start), dim), dtype=np.float32)
        found[start : start + 1000] = np.log1p(np.exp((1 + 0.02 * seed) * drawn @ mixing + 0.01 * seed))
    return found


def both(n: int, dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    return features(n, dim, 0), features(n, dim, 1)


@lru_cache(maxsize=1)
def gaussians(dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Means and covariances, float64, of twice as many rows as dimensions."""
    found = []
    for rows in both(2 * dim, dim):
        found += [rows.mean(axis=0, dtype=np.float64), np.cov(rows, rowvar=False, dtype=np.float64)]
    return tuple(found)


def frechet_of(m1, c1, m2, c2) -> Calls:
    """The distance from means and covariances, by every peer."""
    import torch

    sides = [{"mu": m, "sigma": c} for m, c in ((m1, c1), (m2, c2))]
    name = "frechet_inception_distance"
    return {
        "torch-fidelity": lambda: peer("torch_fidelity.metric_fid.fid_statistics_to_metric")(*sides, False)[name],
        "torchmetrics": lambda: float(
            peer("torchmetrics.image.fid._compute_fid")(*(torch.from_numpy(v) for v in (m1, c1, m2, c2)))
        ),
        "clean-fid": lambda: peer("cleanfid.fid.frechet_distance")(m1, c1, m2, c2),
        "pytorch-fid": lambda: peer("pytorch_fid.fid_score.calculate_frechet_distance")(m1, c1, m2, c2),
    }


def frechet(dim: int) -> Calls:
    from bench.metrics.frechet import frechet_distance

    given = gaussians(dim)
    return {"": lambda: frechet_distance(*given), **frechet_of(*given)}


def frechet_strict(dim: int) -> Calls:
    from bench.metrics.frechet import frechet_distance

    given = gaussians(dim)
    return {"": lambda: frechet_distance(*given, strict=True), "clean-fid": frechet_of(*given)["clean-fid"]}


def frechet_few(n: int) -> Calls:
    """Fewer rows than dimensions, covariances included: clean-fid, which takes over a minute, is left out."""
    from bench.metrics.frechet import frechet_from_features

    a, b = both(n, min(DIM, 2 * n + 48))

    def by(name: str) -> float:
        stats = [v for rows in (a, b) for v in (rows.mean(axis=0), np.cov(rows, rowvar=False))]
        return frechet_of(*stats)[name]()

    return {
        "": lambda: frechet_from_features(a, b),
        "torch-fidelity": lambda: by("torch-fidelity"),
        "torchmetrics": lambda: by("torchmetrics"),
    }


def moments(n: int) -> Calls:
    """Mean and covariance of features that arrive 64 at a time."""
    import torch

    from bench.metrics.moments import Moments

    dim = DIM if n > DIM else 256
    rows = features(n, dim, 0)
    batches = [rows[i : i + 64] for i in range(0, n, 64)]

    def ours():
        found = Moments(dim)
        for batch in batches:
            found.update(batch)
        return found.mean(), found.covariance()

    def keep_all(dtype):  # clean-fid float32, pytorch-fid float64
        kept = np.empty((n, dim), dtype=dtype) if dtype == np.float64 else np.concatenate(batches)
        if dtype == np.float64:
            for i, batch in enumerate(batches):
                kept[64 * i : 64 * i + len(batch)] = batch
        return kept.mean(axis=0), np.cov(kept, rowvar=False)

    def torchmetrics():
        metric = peer("torchmetrics.image.fid.FrechetInceptionDistance")(feature=flat(dim))
        for batch in batches:
            metric.update(torch.from_numpy(batch), real=True)
        return metric.real_features_sum / n, metric.real_features_cov_sum

    return {
        "": ours,
        "clean-fid": lambda: keep_all(np.float32),
        "pytorch-fid": lambda: keep_all(np.float64),
        "torchmetrics": torchmetrics,
    }


def flat(dim: int):
    """A network for torchmetrics that gives back what it is given: the features."""
    import torch

    class Module(torch.nn.Module):
        num_features = dim

        def forward(self, x):
            return x if x.dim() == 2 else torch.zeros(len(x), dim)  # it is tried on a picture first

    return Module()


def kid(n: int) -> Calls:
    import torch

    from bench.metrics.kid import kid

    a, b = both(n)
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    size = min(1000, n)
    settings = {"kid_subsets": 100, "kid_subset_size": size, "rng_seed": 2020, "verbose": False, "kid_kernel": "poly"}
    settings |= {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}

    def torchmetrics() -> float:
        metric = peer("torchmetrics.image.kid.KernelInceptionDistance")(
            feature=flat(DIM), subsets=100, subset_size=size - 1
        )
        metric.real_features, metric.fake_features = [ta], [tb]
        return float(metric.compute()[0])

    mean = "kernel_inception_distance_mean"
    return {
        "": lambda: kid(a, b).value,
        "torch-fidelity": lambda: peer("torch_fidelity.metric_kid.kid_features_to_metric")(ta, tb, **settings)[mean],
        "clean-fid": lambda: peer("cleanfid.fid.kernel_distance")(a, b, max_subset_size=size),
        "torchmetrics": torchmetrics,
    }


def cmmd(n: int) -> Calls:
    import torch

    from bench.metrics.cmmd import cmmd

    a, b = both(n, 768)
    ta, tb = (torch.nn.functional.normalize(torch.from_numpy(v)) for v in (a, b))

    def grams() -> float:
        """The V-statistic as its authors compute it: squared lengths off the diagonals of two whole products."""
        squares = [torch.diagonal(v @ v.T) for v in (ta, tb)]

        def mean(x, y, of_x, of_y):
            return torch.exp(-(of_x[:, None] + of_y[None] - 2 * (x @ y.T)) / 200.0).mean()

        within = mean(ta, ta, squares[0], squares[0]) + mean(tb, tb, squares[1], squares[1])
        return 1000.0 * float(within - 2 * mean(ta, tb, *squares))

    return {"": lambda: cmmd(a, b).value, "published formula": grams}


def prdc(n: int) -> Calls:
    import torch

    from bench.metrics.prdc import prdc

    a, b = both(n)

    def package() -> list[float]:
        with contextlib.redirect_stdout(io.StringIO()):
            found = peer("prdc.compute_prdc")(b, a, K)
        return [float(found[name]) for name in ("precision", "recall", "density", "coverage")]

    def fidelity() -> list[float]:
        path = "torch_fidelity.metric_prc.calculate_precision_recall_full"
        return [float(v) for v in peer(path)(torch.from_numpy(a), torch.from_numpy(b), K)]

    return {"": lambda: list(prdc(a, b, K)[:4]), "prdc": package, "torch-fidelity": fidelity}


def errors(n: int) -> Calls:
    """Bias and error of one Fréchet distance. FID-infinity extrapolates from 15 sizes, one set's bias, no error."""
    from bench.metrics.frechet import corrected_distance, frechet_distance
    from bench.metrics.moments import mean_and_covariance

    a, b = both(n, 2048 if n > 8192 else 256)

    def infinity() -> float:
        g = np.random.default_rng(0)
        reference = mean_and_covariance(b)
        sizes = np.linspace(n // 10, n, 15).astype(int)
        found = [frechet_distance(*mean_and_covariance(a[g.permutation(n)[:size]]), *reference) for size in sizes]
        return float(np.polyfit(1 / sizes, found, 1)[1])

    return {"": lambda: corrected_distance(a, b).value, "FID-infinity": infinity}


def close(ours: float, theirs: float) -> str:
    return f"{ours:.6g} and {theirs:.6g}"


def close_all(ours: list[float], theirs: list[float]) -> str:
    return f"differs by {np.abs(np.subtract(ours[: len(theirs)], theirs)).max():.1g}"


RACES = [
    Race("Fréchet, d = 2,048", frechet, 2048, 64, 1, {"torch-fidelity": 2.3, "clean-fid": 7.5}, close),
    Race("Fréchet, d = 1,024", frechet, 1024, 64, 3, {"fastest": 3.3}, close),
    Race("Fréchet, d = 512", frechet, 512, 64, 5, {"fastest": 4.7}, close),
    Race("Fréchet strict, d = 2,048", frechet_strict, 2048, 64, 1, {}, close, "1e-14 at any conditioning"),
    Race("Fréchet, n = 1,000 < d = 2,048", frechet_few, 1000, 32, 1, {"fastest": 30}, close),
    Race("moments of 50,000 x 2,048", moments, 50_000, 600, 1, {"clean-fid": 2.5, "torchmetrics": 9}),
    Race("moments of 50,000 x 2,048, memory", moments, 50_000, 600, goals={"clean-fid": 10}, memory=True),
    Race(
        "KID, n = 10,000",
        kid,
        10_000,
        200,
        1,
        {"fastest": 1},
        close,
        "ours from all pairs with an error, peers 100 x 1,000",
    ),
    Race("CMMD, n = 3,000", cmmd, 3000, 200, 3, {"published formula": 25}, close),
    Race("CMMD, n = 5,000", cmmd, 5000, 200, 2, {"published formula": 45}, close),
    Race(
        "precision, recall, density, coverage, n = 10,000",
        prdc,
        10_000,
        200,
        1,
        {"fastest": 1.9},
        close_all,
        "torch-fidelity gives the first two",
    ),
    Race(
        "precision, recall, density, coverage, memory", prdc, 10_000, 200, goals={"prdc": 5, "fastest": 5}, memory=True
    ),
    Race(
        "bias and error of a Fréchet distance, n = 50,000",
        errors,
        50_000,
        1200,
        1,
        {"FID-infinity": 8},
        close,
        "the peer's published algorithm on our fast distance",
    ),
]
