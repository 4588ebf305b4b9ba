import numpy as np
import pytest
import torch
from feature_laws import features
from scipy.linalg import sqrtm

from bench.metrics import FVD
from bench.metrics.video import first_frames, fvd
from bench.types import Error, Table, UsageError


@pytest.mark.parametrize("n,m", [(300, 250), (120, 400)])
def test_biased_fvd_is_the_formula_of_stylegan_v(n, m):
    """Raw float64 sums divided by n, and the square root of the product of covariances: 1e-9 relative."""
    stats = []
    sets = features(n, 24, 1) * 3 + 1, features(m, 24, 2) * 2
    for rows in sets:
        mean = rows.sum(0) / len(rows)
        stats.append((mean, rows.T @ rows / len(rows) - np.outer(mean, mean)))
    (m1, s1), (m2, s2) = stats
    expected = np.square(m1 - m2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert fvd(*sets, covariance="biased") == pytest.approx(expected, rel=1e-9)
    unbiased = [(mean, cov * k / (k - 1)) for (mean, cov), k in zip(stats, (n, m), strict=True)]
    (m1, s1), (m2, s2) = unbiased
    expected = np.square(m1 - m2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert fvd(*sets) == pytest.approx(expected, rel=1e-9)


def test_first_frames():
    clips = torch.arange(2 * 3 * 9 * 2 * 2).reshape(2, 3, 9, 2, 2)
    assert torch.equal(first_frames(clips, 3, 4), clips[:, :, [0, 4, 8]])
    assert torch.equal(first_frames(clips, 9), clips)
    with pytest.raises(Error, match="9 frames are shorter than 4 frames at stride 3") as caught:
        first_frames(clips, 4, 3)
    assert caught.value.hint == "give 10 frames, or ask for fewer"
    with pytest.raises(Error, match=r"must be \[B, 3, T, H, W\]"):
        first_frames(clips[0], 1)
    with pytest.raises(UsageError, match="stride = 0"):
        FVD(stride=0)


class Motion:
    """A stand-in for a network of clips: mean and mean change of quarters of a frame."""

    fingerprint = "motion@0"

    def __call__(self, clips):
        assert clips.dtype == torch.uint8 and clips.dim() == 5
        quarters = torch.nn.functional.adaptive_avg_pool3d(clips.float(), (clips.shape[2], 2, 2))
        change = quarters.diff(dim=2).abs().mean(2)
        return torch.cat([quarters.mean(2).flatten(1), change.flatten(1)], 1).numpy()


class Context:
    device = torch.device("cpu")


@pytest.fixture(autouse=True)
def motion(monkeypatch):
    from bench.metrics import extractors

    monkeypatch.setattr(extractors, "opened", lambda name, ctx: Motion())


def clips(n, frames, seed):
    return torch.rand(n, 3, frames, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_metric_of_clips_of_independent_sets():
    metric = FVD(frames=4, stride=2, fake="video")
    kept, rows = [], []
    for side, key, seed in (("generated", "video", 1), ("reference", "clip", 2)):
        media = {key: clips(120, 8, seed) * (1 if side == "reference" else 0.7)}
        columns = metric.measure(media, Context())
        kept.append(columns.pop("i3d-kinetics-400"))
        rows += [{"item": f"{side}{i}", "side": side, **{k: v[i] for k, v in columns.items()}} for i in range(120)]
    table = Table(rows, load_features={"i3d-kinetics-400": np.concatenate(kept)}.__getitem__)
    found = metric.reduce(table)
    assert found[""].value == pytest.approx(fvd(*kept), rel=1e-6)
    assert found["corrected"].low < found["corrected"].value < found["corrected"].high
    expected = "cov:unbiased|frames:4|stride:2|n:120|m:120|net:motion@0|resize:own|round|v:1"
    assert metric.signature(table) == f"fvd-i3d-kinetics-400|{expected}"
    picked = (clips(120, 8, 1) * 0.7)[:, :, :7:2]
    levels = ((picked + 1) * 127.5 + 0.5).to(torch.uint8)
    np.testing.assert_array_equal(kept[0], Motion()(levels))


def test_metric_of_clips_and_their_reconstructions():
    metric = FVD(frames=8)
    x = clips(120, 8, 3)
    y = (x + 0.2 * clips(120, 8, 4)).clamp(-1, 1)
    columns = metric.measure({"clip": x, "recon": y}, Context())
    table = Table([{"item": str(i)} for i in range(120)], load_features=columns.__getitem__)
    found = metric.reduce(table)
    assert 0 < found["corrected"].value < found[""].value and found["corrected"].low is not None
    with pytest.raises(Error, match="shorter"):
        metric.measure({"clip": x[:, :, :7], "recon": y}, Context())
