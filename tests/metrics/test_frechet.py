import inspect
import subprocess
import sys

import numpy as np
import pytest
from feature_laws import features, known_pair, rng
from metric_pictures import golden
from scipy.linalg import sqrtm

from bench.metrics.frechet import frechet_distance, frechet_from_features
from bench.metrics.transport import influence, raw_distance, transport
from bench.types import Error, UsageError


def test_closed_form_of_diagonal_gaussians():
    # the roots differ by 2, 8 and 0
    mean1, mean2 = np.zeros(3), np.array([0.0, 3.0, 4.0])
    s1, s2 = np.diag([1.0, 4.0, 9.0]), np.diag([9.0, 100.0, 9.0])
    expected = 25 + (1 - 3) ** 2 + (2 - 10) ** 2
    assert frechet_distance(mean1, s1, mean2, s2) == pytest.approx(expected, abs=1e-12)
    assert frechet_distance(mean1, s1, mean2, s2, strict=True) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("condition", [1e2, 1e8, 1e14])
@pytest.mark.parametrize("strict", [False, True])
def test_known_answers_at_any_conditioning(condition, strict):
    s1, s2, expected = known_pair(96, condition)
    zero = np.zeros(96)
    # 1e-11 strict, 1e-10 by eigenvalues (relative to traces of order 1)
    assert frechet_distance(zero, s1, zero, s2, strict) == pytest.approx(expected, abs=1e-11 if strict else 1e-10)


def test_full_rank_agrees_with_torch_fidelity_and_sqrtm():
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    a, b = features(900, 48, 1), features(700, 48, 2) * 1.1 + 0.05
    stats_a = {"mu": a.mean(0), "sigma": np.cov(a, rowvar=False)}
    stats_b = {"mu": b.mean(0), "sigma": np.cov(b, rowvar=False)}
    ours = frechet_distance(stats_a["mu"], stats_a["sigma"], stats_b["mu"], stats_b["sigma"])
    theirs = fid_statistics_to_metric(stats_a, stats_b, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(float(theirs), rel=1e-9)
    root = np.trace(sqrtm(stats_a["sigma"] @ stats_b["sigma"]).real)
    difference = stats_a["mu"] - stats_b["mu"]
    by_hand = difference @ difference + np.trace(stats_a["sigma"]) + np.trace(stats_b["sigma"]) - 2 * root
    assert ours == pytest.approx(by_hand, rel=1e-10)
    assert frechet_from_features(a, b) == pytest.approx(ours, rel=1e-11)
    assert frechet_from_features(a, b, strict=True) == pytest.approx(ours, rel=1e-11)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(
    "disp" not in inspect.signature(sqrtm).parameters, reason="clean-fid calls sqrtm(disp=…), which SciPy 1.18 dropped"
)
def test_clean_fid_on_the_same_float32_features():
    from cleanfid.fid import fid_from_feats
    from cleanfid.fid import frechet_distance as clean_frechet

    a, b = (features(800, 40, s).astype(np.float32) for s in (1, 2))
    assert frechet_from_features(a, b) == pytest.approx(float(fid_from_feats(a, b)), rel=1e-5)  # their float32 mean
    moments = [(f.astype(float).mean(0), np.cov(f.astype(float), rowvar=False)) for f in (a, b)]
    theirs = float(clean_frechet(*moments[0], *moments[1]))
    assert frechet_distance(*moments[0], *moments[1]) == pytest.approx(theirs, rel=1e-9)


def test_torchmetrics_with_a_module_of_our_own():
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.double().reshape(len(x), -1)[:, :12]

    metric = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2))
    metric.set_dtype(torch.float64)
    g = rng(3)
    a, b = (g.integers(0, 256, (200, 3, 2, 2)).astype(np.uint8) for _ in range(2))
    b = b // 2
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    ours = frechet_from_features(a.reshape(200, -1), b.reshape(200, -1))
    assert ours == pytest.approx(float(metric.compute()), rel=2e-7)  # they cast the result to float32


def test_golden_bias_of_small_samples():
    """The study's table at d = 400 (its own draws): the plug-in of 250 and 500 pairs, within 5 %."""
    known = golden("frechet.json")
    assert known["closed_diag"] == 142.0
    g = rng(0)
    for n in (250, 500):
        x, other = g.normal(size=(n, 400)), g.normal(size=(n, 400))
        noisy = x + 0.1 * g.normal(size=x.shape)
        assert frechet_from_features(x, other) == pytest.approx(known[f"N{n}"]["same-dist independent"], rel=0.05)
        assert frechet_from_features(x, noisy) == pytest.approx(known[f"N{n}"]["paired noise .1"], rel=0.05)


def test_golden_closed_form():
    known = golden("frechet.json")["closed_diag"]
    d = 4
    mean = np.array([1.0, 2.0, 3.0, 4.0])  # 30, and the roots differ by 4, 4, 4, 8: 112
    first = np.diag([1.0, 1.0, 1.0, 1.0])
    second = np.diag([25.0, 25.0, 25.0, 81.0])
    assert frechet_distance(mean, first, np.zeros(d), second) == pytest.approx(known, abs=1e-10)


@pytest.mark.parametrize("n,m", [(10, 12), (10, 300), (300, 10), (33, 300)])
def test_fewer_rows_than_dimensions(n, m):
    """Against a reference that never roots a small eigenvalue: singular values of factors from QR."""
    a, b = features(n, 32, 1), features(m, 32, 2) + 0.1
    factors = [np.linalg.qr((f - f.mean(0)) / np.sqrt(len(f) - 1), mode="r") for f in (a, b)]
    root = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    shift = a.mean(0) - b.mean(0)
    expected = shift @ shift + sum(float((f**2).sum()) for f in factors) - 2 * root
    assert frechet_from_features(a, b) == pytest.approx(expected, abs=1e-10)
    stats = [(f.mean(0), np.cov(f, rowvar=False)) for f in (a, b)]
    assert frechet_distance(*stats[0], *stats[1]) == pytest.approx(expected, abs=1e-6)  # covariances forget the rows


def test_properties():
    a, b = features(300, 20, 1), features(250, 20, 2) * 1.2
    distance = frechet_from_features(a, b)
    rotation = np.linalg.qr(rng(5).normal(size=(20, 20)))[0]
    assert frechet_from_features(a, a) < 1e-12
    assert frechet_from_features(a + 7, a) == pytest.approx(20 * 49, rel=1e-10)
    assert frechet_from_features(a @ rotation + 3, b @ rotation + 3) == pytest.approx(distance, rel=1e-10)
    assert frechet_from_features(2 * a, 2 * b) == pytest.approx(4 * distance, rel=1e-10)
    assert frechet_from_features(b, a) == pytest.approx(distance, rel=1e-10)
    assert frechet_from_features(a[::-1], b) == pytest.approx(distance, rel=1e-12)


def test_dead_dimensions_add_nothing():
    a, b = features(300, 12, 1), features(300, 12, 2)
    zeros = np.zeros((300, 3))
    expected = frechet_from_features(a, b)
    assert frechet_from_features(np.hstack([a, zeros]), np.hstack([b, zeros])) == pytest.approx(expected, rel=1e-9)
    whole, padded = influence(a, b), influence(np.hstack([a, zeros]), np.hstack([b, zeros]))
    np.testing.assert_allclose(padded.fake, whole.fake, atol=1e-9)
    np.testing.assert_allclose(padded.real, whole.real, atol=1e-9)


@pytest.mark.parametrize("n,m", [(60, 50), (10, 50), (50, 10)])
def test_biased_covariances_divide_by_n(n, m):
    """Of full rank and not, against the eigenvalues of the product of NumPy's own covariances."""
    a, b = features(n, 12, 1), features(m, 12, 2) * 1.2
    (s1, s2), shift = (np.cov(f, rowvar=False, bias=True) for f in (a, b)), a.mean(0) - b.mean(0)
    root = np.sqrt(np.maximum(np.linalg.eigvals(s1 @ s2).real, 0)).sum()
    expected = shift @ shift + np.trace(s1) + np.trace(s2) - 2 * root
    # a product of rank 9 has rounding in its eigenvalues, and the roots of that are 1e-8
    assert frechet_from_features(a, b, covariance="biased") == pytest.approx(
        expected, abs=1e-10 if n + m > 100 else 1e-6
    )
    assert frechet_from_features(a, b) != pytest.approx(expected, rel=1e-4)
    with pytest.raises(UsageError, match="covariance 'population'"):
        frechet_from_features(a, b, covariance="population")


@pytest.mark.parametrize("condition,tolerance", [(1e2, 1e-12), (1e6, 1e-10), (1e12, 1e-7)])
def test_transport_maps_one_covariance_to_the_other(condition, tolerance):
    """T S T = S_r and its inverse back, and the distance is the closed form tr (T - I) S (T - I)."""
    s1, s2, expected = known_pair(40, condition)
    zero = np.zeros(40)
    found = transport(zero, s1, zero, s2)
    forth, back = found.forth @ found.forth.T, found.back @ found.back.T
    # relative to the largest eigenvalue, 1; directions of less variance than rounding are left out of the map
    np.testing.assert_allclose(forth @ s1 @ forth, s2, atol=tolerance, rtol=0)
    np.testing.assert_allclose(back @ s2 @ back, s1, atol=tolerance, rtol=0)
    assert found.value == pytest.approx(expected, abs=1e-10)


def test_rounding_below_zero_is_cut_and_kept():
    s1, _, _ = known_pair(64, 1e14)
    zero = np.zeros(64)
    scales = [1 + i / 7 for i in range(40)]  # where rounding falls depends on the library of linear algebra
    raw = min(raw_distance(zero, c * s1, zero, c * s1, strict)[0] for c in scales for strict in (0, 1))
    assert raw < 0  # else this test shows nothing
    assert all(frechet_distance(zero, c * s1, zero, c * s1) >= 0 for c in scales)


@pytest.mark.parametrize(
    "features,fault",
    [
        (np.zeros(8), "must be"),
        (np.zeros((8, 1)), "d = 1"),
        (np.zeros((1, 8)), "1 row;"),
        (np.ones((8, 3)), "no variance"),
        (np.full((8, 3), np.nan), "NaN"),
        (np.arange(24.0).reshape(8, 3)[:, :2], "dimension"),
    ],
)
def test_faulty_features_are_named(features, fault):
    with pytest.raises(Error, match=fault):
        frechet_from_features(np.arange(24.0).reshape(8, 3) ** 1.5, features)


def test_faulty_moments_are_named():
    eye = np.eye(3)
    for mean, cov, fault in [
        (np.zeros(2), eye, "needs mean"),
        (np.zeros(3), np.full((3, 3), np.inf), "NaN or infinity"),
        (np.zeros(3), eye * 0, "no variance"),
        (np.zeros(4), np.eye(4), "dimension"),
    ]:
        with pytest.raises(Error, match=fault):
            frechet_distance(np.zeros(3), eye, mean, cov)


def test_library_loads_none_of_the_harness_but_contracts():
    code = (
        "import sys; from bench.metrics.frechet import frechet_distance; import bench.metrics; bench.metrics.Frechet\n"
        "assert not {'torch', 'scipy', 'pandas'} & set(sys.modules)\n"
        "print(*(m for m in sys.modules if m.split('.')[0] in ('bench', 'suites')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    bare = subprocess.run(
        [sys.executable, "-c", "import sys, bench.types; print(*(m for m in sys.modules if m.startswith('bench')))"],
        check=True,
        capture_output=True,
        text=True,
    )
    metrics = {f"bench.metrics{name}" for name in ("", ".frechet", ".moments", ".sets", ".transport")}
    assert set(done.stdout.split()) - set(bare.stdout.split()) == metrics


def test_what_is_no_covariance_is_refused():
    mean, cov = np.zeros(3), np.diag([2.0, 1.0, 0.5])
    for bad, fault in ((np.diag([2.0, 1.0, -0.5]), "positive semidefinite"), (cov + np.eye(3, k=1), "not symmetric")):
        for pair in ((bad, cov), (cov, bad)):
            with pytest.raises(Error, match=fault):
                frechet_distance(mean, pair[0], mean, pair[1])
    rounded = np.diag([2.0, 1.0, -1e-7])  # of float32 sums
    assert frechet_distance(mean, rounded, mean, np.diag([2.0, 1.0, 0.0])) == pytest.approx(0.0, abs=1e-6)
