import subprocess
import sys

import numpy as np
import pytest
from metric_pictures import golden
from scipy.linalg import sqrtm

from bench.metrics.frechet import (
    Frechet,
    Moments,
    frechet_distance,
    frechet_from_features,
    influence,
    paired_distance,
    raw_distance,
)
from bench.metrics.moments import digest_of
from bench.types import Error, Table


def rng(seed=0):
    return np.random.default_rng(seed)


def features(n, d, seed=0, power=1.0):
    """Correlated, skewed features with a falling spectrum."""
    g = rng(seed)
    z = g.normal(size=(n, d)) * np.arange(1, d + 1) ** (-power / 2)
    rotation = np.linalg.qr(rng(99).normal(size=(d, d)))[0]
    return np.maximum(z @ rotation, -0.5) + 0.3


def known_pair(d, condition, seed=0):
    """S2 = T S1 T for symmetric T > 0: the distance is tr (T - I) S1 (T - I), exactly."""
    g = rng(seed)
    q = np.linalg.qr(g.normal(size=(d, d)))[0]
    s1 = (q * np.geomspace(1, 1 / condition, d)) @ q.T
    r = np.linalg.qr(g.normal(size=(d, d)))[0]
    t = (r * g.uniform(0.5, 1.5, d)) @ r.T
    s1, t = (s1 + s1.T) / 2, (t + t.T) / 2
    s2 = t @ s1 @ t
    difference = t - np.eye(d)
    return s1, (s2 + s2.T) / 2, float(np.trace(difference @ s1 @ difference))


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


def test_rounding_below_zero_is_cut_and_kept():
    s1, _, _ = known_pair(64, 1e14)
    zero = np.zeros(64)
    raw = min(raw_distance(zero, c * s1, zero, c * s1, strict)[0] for c in (1.0, 3.0, 7.0) for strict in (0, 1))
    assert raw < 0  # else this test shows nothing
    assert all(frechet_distance(zero, c * s1, zero, c * s1) >= 0 for c in (1.0, 3.0, 7.0))


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


@pytest.mark.parametrize("shards", [1, 2, 7, 300])
def test_shards_merge_to_the_whole(shards):
    rows = features(3000, 24, 4).astype(np.float32) + 5
    ids = [f"image-{i}" for i in range(3000)]
    whole = Moments(24).update(rows, ids)
    merged = Moments(24)
    g = rng(shards)
    parts = np.array_split(g.permutation(3000), shards)
    for part in g.permutation(len(parts)):
        index = parts[part]
        shard = Moments(24)  # each with an origin of its own
        for chunk in np.array_split(index, 3):
            shard.update(rows[chunk], [ids[i] for i in chunk])
        merged.merge(Moments.from_bytes(shard.to_bytes()))
    scale = np.abs(whole.covariance()).max()
    np.testing.assert_allclose(merged.mean(), whole.mean(), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance(), whole.covariance(), rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose(whole.covariance(), np.cov(rows.astype(float), rowvar=False), atol=1e-11 * scale)
    np.testing.assert_allclose(
        whole.covariance(biased=True), np.cov(rows.astype(float), rowvar=False, bias=True), atol=1e-11
    )
    merged.expect(reversed(ids))


def test_fixed_origin_far_away():
    rows = features(500, 8, 4)
    origin = np.full(8, 3.0)
    moments = Moments(8, origin).update(rows[:200]).merge(Moments(8, origin).update(rows[200:]))
    np.testing.assert_allclose(moments.covariance(), np.cov(rows, rowvar=False), atol=1e-12)
    np.testing.assert_allclose(moments.mean(), rows.mean(0), rtol=1e-12)


def test_missing_and_repeated_samples_are_found():
    rows, ids = features(6, 4), list("abcdef")
    moments = Moments(4).update(rows, ids)
    moments.expect("fedcba")
    with pytest.raises(Error, match="6 samples where 7"):
        moments.expect("abcdefg")
    padded = Moments(4).update(rows, list("abcdea"))  # as a padding sampler would
    with pytest.raises(Error, match="some missing, some repeated"):
        padded.expect(ids)
    assert digest_of(["a", "a"]) != digest_of(["a"])


def test_moments_refuse_what_does_not_fit():
    moments = Moments(4)
    for fault, call in [
        (r"\[n, 4\]", lambda: moments.update(np.zeros((2, 5)))),
        ("NaN", lambda: moments.update(np.full((2, 4), np.nan))),
        ("3 ids for 2", lambda: moments.update(np.zeros((2, 4)), "abc")),
        ("differ in dimension", lambda: moments.merge(Moments(5))),
        ("needs 2", moments.covariance),
        ("not an archive", lambda: Moments.from_bytes(b"nothing")),
    ]:
        with pytest.raises(Error, match=fault):
            call()


def gaussian_pairs(n, seed, d=16, noise=0.35, per_cluster=1):
    """Pairs whose distance is known: x ~ N(0, S), y = x + noise; clustered rows share their x and noise in part."""
    g = rng(seed)
    scales = np.linspace(0.5, 1.5, d)
    groups = n // per_cluster
    share = 0.0 if per_cluster == 1 else 0.8

    def draw(scale):
        common, own = g.normal(size=(groups, d)).repeat(per_cluster, axis=0), g.normal(size=(n, d))
        return (np.sqrt(share) * common + np.sqrt(1 - share) * own) * scale

    x = draw(scales)
    y = x + draw(noise)
    truth = float(((np.sqrt(scales**2 + noise**2) - scales) ** 2).sum())
    return y, x, np.repeat(np.arange(groups), per_cluster).astype(str), truth


def test_influence_is_the_derivative():
    """Up-weighting a pair by a small step changes the distance by step * (IF_fake + IF_real), to first order."""
    fake, real, _, _ = gaussian_pairs(400, 0, d=6)
    effect = influence(fake, real)

    def weighted(weights):
        stats = []
        for rows in (fake, real):
            mean = weights @ rows
            centred = rows - mean
            stats.append((mean, (centred * weights[:, None]).T @ centred * 400 / 399))
        return frechet_distance(*stats[0], *stats[1], strict=True)

    even = np.full(400, 1 / 400)
    for i in (0, 7, 200):
        step = 1e-5
        point = even * (1 - step)
        point[i] += step
        back = even * (1 + step)
        back[i] -= step
        slope = (weighted(point) - weighted(back)) / (2 * step)
        assert slope == pytest.approx(effect.fake[i] + effect.real[i], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("n,per_cluster", [(240, 1), (480, 4)])
def test_correction_and_interval_of_pairs(n, per_cluster):
    """60 draws: bias below a third of the plug-in's, standard error within 30 % of the spread, coverage >= 0.85."""
    from scipy.special import stdtrit

    found, covered = [], 0
    for seed in range(60):
        fake, real, clusters, truth = gaussian_pairs(n, seed, per_cluster=per_cluster)
        result = paired_distance(fake, real, clusters, seed)
        found.append(result)
        covered += abs(result.value - truth) <= stdtrit(result.freedom, 0.975) * result.se
    values, plug_ins, errors = (np.array([getattr(f, k) for f in found]) for k in ("value", "plug_in", "se"))
    assert plug_ins.mean() - truth > 0
    assert abs(values.mean() - truth) < (plug_ins.mean() - truth) / 3
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.3)
    assert covered / 60 >= 0.85


def test_clusters_widen_the_error_of_dependent_pairs():
    fake, real, clusters, _ = gaussian_pairs(480, 0, per_cluster=8)
    assert paired_distance(fake, real, clusters).se > 1.5 * paired_distance(fake, real).se


def test_split_depends_on_the_seed_alone():
    fake, real, clusters, _ = gaussian_pairs(160, 0)
    assert paired_distance(fake, real, clusters, 3) == paired_distance(fake, real, clusters, 3)
    assert paired_distance(fake, real, clusters, 3).value != paired_distance(fake, real, clusters, 4).value


def table(fake, real, expected=None, clusters=None):
    rows = [{"item": str(i), "embedded-net": "net@1"} for i in range(len(fake))]
    if clusters is not None:
        rows = [{**row, "cluster": c} for row, c in zip(rows, clusters, strict=True)]
    kept = {"embedded/real": real.astype(np.float32), "embedded/fake": fake.astype(np.float32)}
    return Table(rows, expected, load_features=lambda name: kept[name])


def test_metric_gives_plug_in_and_corrected():
    fake, real, clusters, truth = gaussian_pairs(400, 1)
    found = Frechet().reduce(table(fake, real, clusters=clusters))
    assert found[""].low is None and found[""].value > found["corrected"].value
    assert found["corrected"].low < truth < found["corrected"].high
    assert found["corrected"].low < found["corrected"].value < found["corrected"].high
    assert (
        Frechet().signature(table(fake, real))
        == "frechet-embedded|cov:unbiased|n:400|ref:self|net:net@1|resize:own|round|v:2"
    )
    assert Frechet("inception-tf1").name == "fid"
    part = table(fake, real).where("item", "3")
    assert Frechet().reduce(part)[""].value is None


@pytest.mark.parametrize("n,reason", [(0, "0 rows"), (1, "1 row"), (2, "d = 16"), (16, "d = 16"), (20, "no interval")])
def test_metric_withholds_with_a_reason(n, reason):
    fake, real, _, _ = gaussian_pairs(64, 1)
    found = Frechet().reduce(table(fake[:n], real[:n]))["corrected"]
    assert reason in found.note and found.low is None
    assert (found.value is None) == (n <= 16)
    assert Frechet().reduce(table(fake[:n], real[:n], expected=n + 1))["corrected"].note == ""  # a row is missing


@pytest.mark.parametrize("clusters", [["one"] * 100, ["many"] * 99 + ["alone"]])
def test_clusters_that_cannot_be_halved_leave_the_plug_in(clusters):
    fake, real, _, _ = gaussian_pairs(100, 1)
    found = Frechet().reduce(table(fake, real, clusters=clusters))
    assert found["corrected"].value is None and "too few clusters" in found["corrected"].note
    kept = table(fake, real)
    expected = frechet_from_features(kept.features("embedded/fake"), kept.features("embedded/real"))
    assert found[""].value == pytest.approx(expected, rel=1e-12)


def test_metric_of_constant_features_is_null():
    flat = np.ones((50, 8))
    found = Frechet().reduce(table(flat, flat))
    assert found[""].value is None and "no variance" in found[""].note


def test_library_needs_no_torch():
    code = "import sys; from bench.metrics.frechet import frechet_distance; import bench.metrics; bench.metrics.Frechet"
    code += "; assert not {'torch', 'scipy', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
