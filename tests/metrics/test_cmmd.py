import numpy as np
import pytest
from scipy.special import stdtrit

from bench.metrics import CMMD
from bench.metrics.cmmd import _exponential, _normalised, cmmd, unbiased_cmmd
from bench.metrics.kid import as_sets, mmd
from bench.metrics.sets import matched_sets
from bench.types import Error, Table


def rng(*seed):
    return np.random.default_rng(seed)


def cloud(g, n, d, offset=1.0, scale=1.0):
    """Skewed and correlated, far from the origin, as embeddings are."""
    mix = rng(0).normal(size=(d, d)) / np.sqrt(np.arange(1, d + 1))
    return offset + scale * np.maximum(g.normal(size=(n, d)) @ mix, -0.5)


def kernel(x, y):
    """The definition in float64: exp(-|x - y|^2 / 200) of rows of length 1."""
    x, y = (a.astype(np.float64) / np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True) for a in (x, y))
    return np.exp(-np.square(x[:, None] - y).sum(-1) / 200)


def by_definition(x, y, paired=False):
    """V-statistic and unbiased value, times 1,000."""
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    n, m = len(x), len(y)
    within = (xx.sum() - np.trace(xx)) / n / (n - 1) + (yy.sum() - np.trace(yy)) / m / (m - 1)
    between = (xy.sum() - np.trace(xy)) / n / (n - 1) if paired else xy.mean()
    return 1000 * (xx.mean() + yy.mean() - 2 * xy.mean()), 1000 * (within - 2 * between)


def port(x, y):
    """cmmd-pytorch's formula in its precision: float32 Grams of unit rows, distances from norms, 2 sigma^2 = 200."""
    import torch

    x, y = (torch.nn.functional.normalize(torch.tensor(a, dtype=torch.float32)) for a in (x, y))

    def mean(a, b):
        squares = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
        return torch.exp(-squares / 200).mean()

    return float(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n, m, d", [(60, 45, 16), (200, 200, 96)])
def test_moments_give_what_the_gram_gives(dtype, n, m, d):
    x, y = cloud(rng(1), n, d).astype(dtype), cloud(rng(2), m, d, 1.2).astype(dtype)
    found = cmmd(x, y)
    value, unbiased = by_definition(x, y)
    assert found.value == pytest.approx(value, abs=1e-5)
    assert found.unbiased == pytest.approx(unbiased, abs=1e-5)
    assert found.value == pytest.approx(port(x, y), abs=3e-4)  # the port's float32 kernels near 1 are that rough
    if n == m:
        found, (_, unbiased) = cmmd(x, y, paired=True), by_definition(x, y, paired=True)
        assert found.unbiased == pytest.approx(unbiased, abs=1e-5)
    assert cmmd(3e4 * x, 1e-4 * y).value == pytest.approx(found.value, rel=1e-4)  # length means nothing


def test_the_remainder_is_bounded_at_its_worst():
    """Opposite points: the powers 3, 5, ... all count, and nothing can be worse."""
    x = np.array([[1.0, 0.0], [1.0, 1e-6]])
    value, _ = by_definition(x, -x)
    assert 6e-4 < value - cmmd(x, -x).value < 6.61e-4


def test_tiles_and_moments_agree_on_value_influence_and_error():
    x, y = cloud(rng(3), 150, 24), cloud(rng(4), 120, 24, 1.1)
    fast = unbiased_cmmd(x, y)
    slow = mmd(_exponential, _normalised(as_sets(x, y)))
    factor = 1000 * np.exp(-0.01)
    assert fast.value == pytest.approx(factor * slow.value, abs=1e-5)
    for a, b in zip(fast.influences, slow.influences, strict=True):
        # the tiles leave each row itself out, which is an n-th of it
        assert np.abs(a - factor * b).max() < 0.05 * np.abs(a).max()
    assert fast.se == pytest.approx(factor * slow.se, rel=0.02)
    assert fast.value == pytest.approx(by_definition(x, y)[1], abs=1e-5)


def test_clusters_go_through_the_tiles():
    x, y = cloud(rng(5), 80, 12), cloud(rng(6), 60, 12)
    names = [f"c{i // 2}" for i in range(80)]
    apart = np.array(names)[:, None] != np.array(names)
    yy = kernel(y, y)
    expected = kernel(x, x)[apart].mean() + (yy.sum() - np.trace(yy)) / 60 / 59 - 2 * kernel(x, y).mean()
    assert unbiased_cmmd(x, y, names).value == pytest.approx(1000 * expected, abs=1e-5)
    paired = unbiased_cmmd(x[:60], y, names[:60], paired=True)
    apart = apart[:60, :60]
    expected = kernel(x[:60], x[:60])[apart].mean() + yy[apart].mean() - 2 * kernel(x[:60], y)[apart].mean()
    assert paired.value == pytest.approx(1000 * expected, abs=1e-5)


POOL = 400  # rows of finite populations, whose distance is known exactly


def draws(case, n, m):
    """(draw, exact distance): samples with replacement from pools of rows."""
    far = 0.15 if "apart" in case else 0.0
    pool_x = cloud(rng(7), POOL, 10)
    if case.startswith("pairs"):
        pool_y = pool_x + 0.2 * rng(8).normal(size=pool_x.shape) + far
        truth = by_definition(pool_x, pool_y)[0]

        def pairs(g):
            picked = g.integers(POOL, size=n)
            return unbiased_cmmd(pool_x[picked], pool_y[picked], paired=True)

        return pairs, truth
    pool_y = pool_x + far * np.arange(10)

    def independent(g):
        return unbiased_cmmd(pool_x[g.integers(POOL, size=n)], pool_y[g.integers(POOL, size=m)])

    return independent, by_definition(pool_x, pool_y)[0]


def check_intervals(case, n, m, repeats, lowest):
    draw, truth = draws(case, n, m)
    found = [draw(rng(repeat, 9)) for repeat in range(repeats)]
    values, errors = np.array([f.value for f in found]), np.array([f.se for f in found])
    spread = values.std(ddof=1)
    assert abs(values.mean() - truth) < 4 * spread / np.sqrt(repeats) + 1e-5  # unbiased
    assert 0.7 < errors.mean() / spread < 1.3
    half = np.array([stdtrit(f.freedom, 0.975) * f.se for f in found])
    assert np.mean(abs(values - truth) <= half) >= lowest


CASES = ["equal", "apart", "pairs", "pairs apart"]


@pytest.mark.parametrize("case", CASES)
def test_standard_error_and_coverage(case):
    """150 samples: the spread is known to 6 %, coverage to 2.5 %."""
    check_intervals(case, 120, 90, 150, 0.88)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [50, 500])
def test_standard_error_and_coverage_at_length(case, n):
    check_intervals(case, n, n, 800, 0.90)


def test_refusals_name_the_fault():
    x = cloud(rng(10), 30, 6)
    spoilt = x.copy()
    spoilt[4] = 0
    with pytest.raises(Error, match="row 4 of the reference set is zero"):
        cmmd(x, spoilt)
    spoilt[4] = np.inf
    with pytest.raises(Error, match="NaN or infinity"):
        cmmd(x, spoilt)
    spoilt[4] = 1e200
    with np.errstate(over="ignore"), pytest.raises(Error, match="row 4 of the reference set is too long"):
        cmmd(x, spoilt)
    with pytest.raises(Error, match="no variance"):
        cmmd(np.ones((30, 6)), x)
    with pytest.raises(Error, match="differ in dimension"):
        cmmd(x, x[:, 1:])
    with pytest.raises(Error, match="no pairs"):
        cmmd(x, x[:20], paired=True)


def table(seed, shift, pairs=False):
    real, fake = cloud(rng(11), 50, 6).astype(np.float32), cloud(rng(seed), 50, 6, 1 + shift).astype(np.float32)
    if pairs:
        return Table([{"item": str(i)} for i in range(50)], load_features={"e/real": real, "e/fake": fake}.__getitem__)
    rows = [{"item": str(i), "side": "generated" if i < 50 else "reference"} for i in range(100)]
    return Table(rows, load_features={"e": np.concatenate([fake, real])}.__getitem__)


@pytest.mark.parametrize("pairs", [False, True])
def test_metric(pairs):
    metric = CMMD(extractor="e")
    found = metric.reduce(data := table(12, 0.2, pairs))
    a, b = ("e/fake", "e/real") if pairs else ("e", "e")
    fake, real = data.features(a)[:50], data.features(b)[-50:]
    assert found[""].value == pytest.approx(by_definition(fake, real)[0], abs=1e-5)
    assert found["unbiased"].value == pytest.approx(by_definition(fake, real, pairs)[1], abs=1e-5)
    assert found["unbiased"].low < found["unbiased"].value < found["unbiased"].high and found[""].low is None
    assert metric.signature(data).startswith("cmmd-e|sigma:10|scale:1000|n:50|")

    other = table(12, 0.5, pairs)  # the same draws, moved
    difference = metric.difference(*matched_sets(data, other, "e"))["unbiased"]
    moved = metric.reduce(other)["unbiased"]
    assert difference.value == pytest.approx(moved.value - found["unbiased"].value, abs=1e-9)
    # what the two share cancels: narrower than for models that share nothing
    assert difference.high - difference.low < np.hypot(*(e.high - e.low for e in (moved, found["unbiased"])))
    same = metric.difference(*matched_sets(data, data, "e"))["unbiased"]
    assert same.value == same.low == same.high == 0.0
