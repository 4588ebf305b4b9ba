"""Scores of samples against scikit-learn and closed forms, class weights against their updates by hand."""

import math

import numpy as np
import pytest

from suites.scaling import laws, selection


def cloud(n=120, d=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


# -- scores


def test_gaussian_scores_are_scipys_log_density():
    from scipy.stats import multivariate_normal

    x = cloud()
    cov = np.cov(x, rowvar=False, bias=True) + 1e-5 * np.eye(6)
    expected = multivariate_normal(x.mean(0), cov).logpdf(x)
    np.testing.assert_allclose(selection.scores(x), expected, rtol=1e-9)


def test_ppca_scores_are_scikit_learns():
    from sklearn.decomposition import PCA

    x = cloud()
    share = np.cumsum(np.sort(np.linalg.eigvalsh(np.cov(x, rowvar=False)))[::-1])
    components = int(np.searchsorted(share / share[-1], 0.95)) + 1
    assert components < 6
    expected = PCA(components, svd_solver="full").fit(x).score_samples(x)
    np.testing.assert_allclose(selection.scores(x, method="ppca"), expected, rtol=1e-8)


def test_knn_scores_are_scikit_learns_fifth_neighbour():
    from sklearn.neighbors import NearestNeighbors

    x = cloud()
    expected = -NearestNeighbors(n_neighbors=6).fit(x).kneighbors(x)[0][:, 5]
    np.testing.assert_allclose(selection.scores(x, method="knn"), expected, rtol=1e-9)
    assert selection.scores(x[:1], method="knn").tolist() == [0.0]


def test_moderate_scores_by_hand():
    """Points on a line at -3, -1, 1, 3: distances to the mean 3, 1, 1, 3, median 2: all alike; at 0 one is off by 2."""
    assert selection.scores([[-3], [-1], [1], [3]], method="moderate").tolist() == [-1, -1, -1, -1]
    assert selection.scores([[-3], [-1], [0], [1], [3]], method="moderate").tolist() == [-2, 0, -1, 0, -2]


def test_cluster_keeps_the_same_share_of_each_cell():
    rng = np.random.default_rng(0)
    centres = 50 * rng.standard_normal((4, 3))
    cell = np.repeat(np.arange(4), [10, 20, 40, 30])
    x = centres[cell] + rng.standard_normal((100, 3))
    found = selection.scores(x, method="cluster")
    for share in (0.25, 0.5):
        kept = selection.keep(found, share)
        assert kept.sum() == pytest.approx(100 * share, abs=1)
        assert (np.bincount(cell[kept]) / np.bincount(cell)) == pytest.approx(share, abs=0.21)
    np.testing.assert_array_equal(found, selection.scores(x, method="cluster"))


@pytest.mark.parametrize("method", selection.METHODS)
def test_classes_do_not_see_each_other(method):
    """Moving one class far away changes no score of the other."""
    x, y = cloud(80), np.repeat([3, 7], 40)
    losses = np.arange(80.0)
    before = selection.scores(x, y, method, losses=losses)
    far = selection.scores(x + 1000.0 * (y == 7)[:, None], y, method, losses=losses)
    np.testing.assert_allclose(far[y == 3], before[y == 3])
    assert np.isfinite(before).all()
    kept = selection.keep(before, 0.25, y)
    assert [int(kept[y == k].sum()) for k in (3, 7)] == [10, 10]


def test_kept_are_the_highest_of_each_class():
    score, labels = [5, 1, 4, 9, 8, 7, 2], ["a", "a", "a", "b", "b", "b", "b"]
    assert np.flatnonzero(selection.keep(score, 0.5, labels)).tolist() == [0, 2, 3, 4]
    assert np.flatnonzero(selection.keep([1, 1, 1], 0.1)).tolist() == [0]  # one at least, ties by position
    assert selection.keep(score, 1.0, labels).all()
    x = np.ones((3, 1))
    assert selection.scores(x, method="loss", losses=[3, 1, 2]).tolist() == [-3, -1, -2]
    assert len(set(selection.scores(x, method="random").tolist())) == 3


def test_typical_samples_are_kept_and_outliers_are_not():
    x = np.concatenate([cloud(200), cloud(5, seed=1) + 60.0])
    for method in ("gaussian", "ppca", "knn", "moderate"):
        assert not selection.keep(selection.scores(x, method=method), 0.5)[200:].any(), method


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "best"}, "method 'best' is not one of gaussian"),
        ({"method": "loss"}, "needs 4 finite losses"),
        ({"labels": [0, 1]}, "labels must be 4"),
        ({"features": [1.0, 2.0]}, "features must be finite"),
        ({"features": [[np.nan]]}, "features must be finite"),
    ],
)
def test_what_cannot_be_scored_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        selection.scores(**({"features": np.ones((4, 2))} | arguments))
    with pytest.raises(ValueError, match=r"fraction = 0 must lie in \(0, 1\]"):
        selection.keep([1, 2], 0.0)


# -- class weights


def test_doremi_by_hand():
    """Two steps of three classes; the second lacks class 0, which keeps its excess."""
    state = selection.DoReMi(3)
    q = state.update([2.0, 1.0, 4.0, 1.0], [1.0, 1.0, 1.0, 2.0], [0, 1, 2, 2])  # excess 1, 0, (3 + 0) / 2
    first = np.exp([1.0, 0.0, 1.5])
    first = (1 - 1e-4) * first / first.sum() + 1e-4 / 3
    np.testing.assert_allclose(q, first, rtol=1e-12)
    second = first * np.exp([1.0, 2.0, 0.0])
    second = (1 - 1e-4) * second / second.sum() + 1e-4 / 3
    np.testing.assert_allclose(state.update([3.0, 0.5], [1.0, 1.0], [1, 2]), second, rtol=1e-12)
    np.testing.assert_allclose(state.weights, (first + second) / 2, rtol=1e-12)
    with pytest.raises(ValueError, match="not finite"):
        state.update([math.nan], [0.0], [0])
    with pytest.raises(ValueError, match="numbers below 3"):
        state.update([1.0], [0.0], [3])


def test_doremi_prefers_the_class_that_can_still_be_learned_and_keeps_all_alive():
    state = selection.DoReMi(4)
    for _ in range(200):
        state.update([1.0, 1.0, 1.0, 1.3], np.ones(4), [0, 1, 2, 3])
    assert state.weights.argmax() == 3 and state.current.min() >= 1e-4 / 4 and state.weights.sum() == pytest.approx(1)


def test_group_dro_by_hand():
    state = selection.GroupDRO([100, 25], eta=0.1, adjustment=2.0)
    q = state.update([1.0, 3.0, 0.5], [0, 0, 1])  # class losses 2, 0.5; adjusted 2.2, 0.9
    expected = np.exp([0.22, 0.09])
    np.testing.assert_allclose(q, expected / expected.sum(), rtol=1e-12)
    still = state.update([1.0], [1])  # class 0 does not move
    assert still[0] / still[1] == pytest.approx(q[0] / q[1] / math.exp(0.1 * 1.4))


def test_weights_become_sampling_probabilities():
    p = selection.sample_weights([0.7, 0.3], [0, 0, 0, 1])
    assert p == pytest.approx([0.7 / 3] * 3 + [0.3])


def test_time_bins_have_mean_one():
    rng = np.random.default_rng(0)
    t = rng.random(5000)
    y = (1 + 50 * t**3) * rng.gamma(4, 0.25, 5000)
    level, means = selection.by_time(y, t)
    for k in range(10):
        assert level[(t * 10).astype(int) == k].mean() == pytest.approx(1)
    again, _ = selection.by_time(2 * y, t, means)
    np.testing.assert_allclose(again, 2 * level)
    assert selection.by_time([1.0], [1.0])[0] == 1 and np.isnan(selection.by_time([1.0], [1.0])[1][:9]).all()
    with pytest.raises(ValueError, match="times must lie"):
        selection.by_time([1.0], [1.5])


# -- curves


def test_cost_to_a_target_and_speed_up():
    cost = np.geomspace(1, 1024, 11)
    assert selection.cost_to(5.0, cost, 10 - np.arange(11)) == pytest.approx(32)
    assert selection.cost_to(4.5, cost, 10 - np.arange(11)) == pytest.approx(32 * math.sqrt(2))
    assert selection.cost_to(20, cost, 10 - np.arange(11)) == 1 and math.isinf(
        selection.cost_to(-1, cost, 10 - np.arange(11))
    )
    rng = np.random.default_rng(0)
    slow = 10 - np.arange(11) + 0.1 * rng.standard_normal((4, 1))
    fast = slow - 2 + 0.1 * rng.standard_normal((4, 1))  # two steps of a factor of 2: four times cheaper
    found = selection.speed_up(5.0, cost, fast, cost, slow)
    assert found.low < 4 < found.high and found.high / found.low < 2
    single = selection.speed_up(5.0, cost, fast[:1], cost, slow[:1])
    assert math.isnan(single.low) and single.value > 1
    assert math.isnan(selection.speed_up(-9, cost, fast, cost, slow).value)


def test_curves_feed_laws():
    """A metric that is a law of the samples kept comes back as that law."""
    rows = selection.curve(
        np.arange(1000.0), [0.05, 0.1, 0.25, 0.5, 0.75, 1.0], lambda kept: 3 + 40 * len(kept) ** -0.5
    )
    assert [n for _, n, _ in rows] == [50, 100, 250, 500, 750, 1000]
    _, n, y = np.array(rows).T
    law = laws.saturating(n, y)
    assert (law.floor, law.exponent) == pytest.approx((3, -0.5), rel=1e-4)
