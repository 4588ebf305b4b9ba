"""PSNR, SSIM and the Fréchet distance against torchmetrics, scikit-image, clean-fid and torch-fidelity; one thread."""

import warnings
from collections.abc import Callable

import numpy as np
from measure import Row, side_by_side, write


def main() -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # peers warn of what their own versions deprecate
    write("metrics", "Metrics against peers", [*pixels(), *frechet()])


def pixels() -> list[Row]:
    """uint8 pictures, 16 x 3 x 256 x 256; who wants another form converts by the clock, but for the order of axes."""
    import torch
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio as tm_psnr,
    )
    from torchmetrics.functional.image import (
        structural_similarity_index_measure as tm_ssim,
    )

    from bench.metrics.pixel import psnr
    from bench.metrics.ssim import ssim

    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(16, 3, 256, 256)).cumsum(2).cumsum(3)
    x = np.clip((smooth - smooth.min()) / np.ptp(smooth) * 255, 0, 255).astype(np.uint8)
    y = np.clip(x + rng.normal(0, 8, x.shape), 0, 255).astype(np.uint8)
    tx, ty = torch.from_numpy(x), torch.from_numpy(y)
    last = [(a.transpose(1, 2, 0).copy(), b.transpose(1, 2, 0).copy()) for a, b in zip(x, y, strict=True)]
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    found = []
    for what, calls, goal in (
        (
            "PSNR, 16 pictures of 256 px",
            {
                "": lambda: psnr(tx, ty),
                "torchmetrics": lambda: tm_psnr(tx.float(), ty.float(), 255.0, reduction="none", dim=(1, 2, 3)),
                "scikit-image": lambda: [peak_signal_noise_ratio(a, b, data_range=255) for a, b in last],
            },
            "",
        ),
        (
            "SSIM gauss11, 16 pictures of 256 px",
            {
                "": lambda: ssim(tx, ty),
                "torchmetrics": lambda: tm_ssim(tx.float(), ty.float(), data_range=255.0, reduction="none"),
                "scikit-image": lambda: [structural_similarity(a, b, channel_axis=2, **wang) for a, b in last],
            },
            "2.7x the fastest",
        ),
        (
            "SSIM uniform7, 16 pictures of 256 px",
            {
                "": lambda: ssim(tx, ty, "uniform7"),
                "scikit-image": lambda: [structural_similarity(a, b, channel_axis=2, data_range=255) for a, b in last],
            },
            "2.2x",
        ),
    ):
        found += rows(what, calls, 7, goal)
    return found


def frechet() -> list[Row]:
    """Two Gaussians in 2,048 dimensions, and 500 rows against 500 (fewer rows than dimensions)."""
    import torch
    from cleanfid.fid import frechet_distance as clean
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    from bench.metrics.frechet import Moments, frechet_distance, frechet_from_features

    rng = np.random.default_rng(0)
    dim = 2048
    scale = np.linspace(0.1, 2, dim)
    a, b = (rng.normal(shift, scale, size=(3 * dim, dim)) for shift in (0, 0.1))
    stats = [(features.mean(0), np.cov(features, rowvar=False)) for features in (a, b)]
    (m1, c1), (m2, c2) = stats
    tensors = [torch.from_numpy(v) for v in (m1, c1, m2, c2)]
    sides = [{"mu": m, "sigma": c} for m, c in stats]
    found = rows(
        "Fréchet, d = 2,048",
        {
            "": lambda: frechet_distance(m1, c1, m2, c2),
            "torchmetrics": lambda: _compute_fid(*tensors),
            "torch-fidelity": lambda: fid_statistics_to_metric(*sides, False),
            "clean-fid": lambda: clean(m1, c1, m2, c2),
        },
        1,
        "2.3x torch-fidelity, 7.5x clean-fid",
    )
    few, other = a[:500], b[:500]
    found += rows(
        "Fréchet from features, n = 500, d = 2,048",
        {
            "": lambda: frechet_from_features(few, other),
            "torchmetrics": lambda: _compute_fid(
                torch.from_numpy(few.mean(0)),
                torch.from_numpy(np.cov(few, rowvar=False)),
                torch.from_numpy(other.mean(0)),
                torch.from_numpy(np.cov(other, rowvar=False)),
            ),
        },
        1,
        "30x",
    )
    batches = np.array_split(a.astype(np.float32), len(a) // 64)

    def ours() -> None:
        moments = Moments(dim)
        for batch in batches:
            moments.update(batch)
        moments.covariance()

    return found + rows(
        "moments of 6,144 x 2,048 in batches of 64",
        {"": ours, "clean-fid": lambda: np.cov(np.concatenate(batches), rowvar=False)},
        1,
        note="clean-fid keeps all features, then numpy.cov",
    )


def rows(what: str, calls: dict[str, Callable[[], object]], repeats: int, goal: str = "", note: str = "") -> list[Row]:
    """One row per peer; `""` is ours. A peer that fails with this environment is named as failed."""
    working = {}
    failed = {}
    for name, call in calls.items():
        try:
            call()
            working[name] = call
        except (TypeError, ValueError, AttributeError, RuntimeError) as e:
            failed[name] = f"{type(e).__name__}: {e}".splitlines()[0][:80]
    spent = side_by_side(working, repeats)
    return [
        Row(what, name, spent[""], spent.get(name), "CPU s", goal, failed.get(name, note)) for name in calls if name
    ]


if __name__ == "__main__":
    main()
