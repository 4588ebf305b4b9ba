import numpy as np
import pytest

import bench.metrics.prdc as prdc_module
from bench.metrics import PRDC
from bench.metrics.prdc import prdc
from bench.types import Error, Table, UsageError


def rng(*seed):
    return np.random.default_rng(seed)


def squared(a, b):
    return np.square(a[:, None].astype(np.float64) - b).sum(-1)


def in_float64(fake, real, k, radius):
    """Hits, recalled, covered from whole float64 matrices."""
    inside = np.less if radius == "<" else np.less_equal
    between = squared(real, fake)
    of_real = inside(between, np.sort(squared(real, real), 1)[:, [k]])  # column 0 is the row itself
    of_fake = inside(between, np.sort(squared(fake, fake), 1)[:, k])
    return of_real.sum(0), of_fake.any(1), of_real.any(1)


def cloud(g, kind, n, d):
    x = g.normal(size=(n, d))
    if kind == "grid":  # many equal distances
        return np.round(x)
    if kind == "copies":
        x[n // 2 :] = x[: n - n // 2]
    if kind == "collapsed":
        x[2:] = x[0]
    if kind == "far":  # float32 loses the differences
        x = 100 + 1e-3 * x
    if kind == "outliers":
        x[::7] *= 1e3
    return x


@pytest.mark.parametrize("kind", ["plain", "grid", "copies", "collapsed", "far", "outliers"])
@pytest.mark.parametrize("radius", ["<", "<="])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_counts_equal_those_of_float64(kind, radius, dtype, monkeypatch):
    for trial, (tile, d, k) in enumerate([(7, 2, 1), (50, 3, 5), (4096, 40, 3), (16, 16, 5)]):
        monkeypatch.setattr(prdc_module, "TILE", tile)
        g = rng(trial, 1)
        fake, real = cloud(g, kind, 70 + trial, d).astype(dtype), cloud(g, kind, 90, d).astype(dtype)
        real[:9] = fake[:9]  # a generator that knows its data by heart
        hits, recalled, covered = in_float64(fake, real, k, radius)
        found = prdc(fake, real, k, radius)
        assert (found.hits == hits).all() and (found.recalled == recalled).all() and (found.covered == covered).all()
        assert found.precision == (hits > 0).mean() and found.recall == recalled.mean()
        assert found.density == pytest.approx(hits.mean() / k, rel=1e-12) and found.coverage == covered.mean()


def test_plain_float32_would_count_wrong():
    """The band matters: on these features float32 distances alone give other counts."""
    g = rng(2)
    fake, real = ((30 + g.normal(size=(250, 256))).astype(np.float32) for _ in range(2))

    def narrow(a, b):
        return (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T

    own = np.sort(narrow(real, real), 1)[:, 5]
    plain = (narrow(real, fake) < own[:, None]).sum(0)
    hits, _, covered = in_float64(fake, real, 5, "<")
    found = prdc(fake, real)
    assert (plain != hits).any()
    assert (found.hits == hits).all() and (found.covered == covered).all()


def test_the_prdc_package_agrees():
    compute_prdc = pytest.importorskip("prdc", reason="the package prdc is absent").compute_prdc
    g = rng(3)
    fake, real = 0.2 + 0.9 * g.normal(size=(300, 24)), g.normal(size=(260, 24))
    theirs, ours = compute_prdc(real, fake, 5), prdc(fake, real, 5, "<")
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(ours, name) == pytest.approx(theirs[name], abs=1e-12)


def test_torch_fidelity_agrees():
    import torch
    from torch_fidelity.metric_prc import prc_features_to_metric

    g = rng(4)
    fake, real = 0.2 + 0.9 * g.normal(size=(300, 24)), g.normal(size=(260, 24))
    ours = prdc(fake, real, 3, "<=")
    for save in (False, True):
        theirs = prc_features_to_metric(
            torch.tensor(fake),
            torch.tensor(real),
            prc_neighborhood=3,
            prc_batch_size=100,
            save_cpu_ram=save,
            verbose=False,
        )
        assert ours.precision == pytest.approx(theirs["precision"], abs=1e-7)  # their mean is float32
        assert ours.recall == pytest.approx(theirs["recall"], abs=1e-7)


def test_known_answers():
    real = np.array([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0], [7.0, 0.0]])  # k = 1: radii 1, 1, 2, 4
    fake = np.array([[0.5, 0.0], [5.0, 0.0], [100.0, 0.0], [102.0, 0.0]])  # radii 4.5, 4.5, 2, 2
    found = prdc(fake, real, 1)
    assert found.hits.tolist() == [2, 1, 0, 0] and found.alone.tolist() == [2, 1, 0, 0]
    assert (found.precision, found.density) == (0.5, 0.75)  # 5 lies on the surface about 3
    assert found.covered.tolist() == [True, True, False, True] and found.coverage == 0.75
    assert found.recall == 1.0
    closed = prdc(fake, real, 1, "<=")
    assert closed.hits.tolist() == [2, 2, 0, 0] and closed.alone.tolist() == [2, 2, 0, 0] and closed.coverage == 1.0


def test_scale_offset_and_order_change_nothing():
    g = rng(5)
    fake, real = 0.2 + g.normal(size=(80, 6)), g.normal(size=(90, 6))
    first = prdc(fake, real)
    for change in (lambda x: x * 2.0**-40, lambda x: x * 2.0**60, lambda x: 8 + x, lambda x: x[:, ::-1]):
        assert prdc(change(fake), change(real))[:4] == first[:4]
    assert (prdc(fake[::-1], real).hits[::-1] == first.hits).all()


def test_copies_are_counted():
    real = np.repeat(rng(6).normal(size=(20, 4)), 6, axis=0)
    found = prdc(real, real, 5, "<")
    assert found[:4] == (0.0, 0.0, 0.0, 0.0) and found.copies == 120
    assert prdc(real, real, 5, "<=").precision == 1.0
    assert prdc(real[:50] + 1.0, np.unique(real, axis=0), 5).copies == 0


def test_refusals_name_the_fault():
    x, y = rng(7).normal(size=(30, 4)), rng(8).normal(size=(5, 4))
    with pytest.raises(Error, match="the reference set has 5 rows; 5 neighbours of each need 6"):
        prdc(x, y)
    with pytest.raises(Error, match="the generated set has 5 rows"):
        prdc(y, x)
    with pytest.raises(UsageError, match="radius must be"):
        prdc(x, x, radius="=<")
    with pytest.raises(UsageError, match="k = 0"):
        prdc(x, x, k=0)
    with pytest.raises(Error, match="NaN"):
        prdc(x, np.full_like(x, np.nan))
    with np.errstate(over="ignore"), pytest.raises(Error, match="leave float32"):
        prdc(np.float32(2e38) + 1e37 * x.astype(np.float32), 1e37 * x.astype(np.float32) - np.float32(2e38))
    with pytest.raises(Error, match="no variance"):
        prdc(np.ones_like(x), x)
    with pytest.raises(Error, match="differ in dimension"):
        prdc(x, x[:, 1:])


def sets_table(fake, real, clusters=None):
    sides = ["generated"] * len(fake) + ["reference"] * len(real)
    rows = [{"item": str(i), "side": side, "embedded-net": "abc"} for i, side in enumerate(sides)]
    for row, cluster in zip(rows, clusters or [], strict=False):
        row["cluster"] = cluster
    features = np.concatenate([fake, real]).astype(np.float32)
    return Table(rows, load_features={"embedded": features}.__getitem__)


def test_metric():
    g = rng(9)
    fake, real = 0.5 + 0.6 * g.normal(size=(200, 8)), g.normal(size=(150, 8))
    table = sets_table(fake, real)
    found = PRDC().reduce(table)
    expected = prdc(fake.astype(np.float32), real.astype(np.float32))
    assert {part: e.value for part, e in found.items()} == {
        "precision": expected.precision,
        "recall": expected.recall,
        "density": pytest.approx(expected.density),
        "coverage": expected.coverage,
    }
    assert [found[p].method for p in PRDC.parts] == ["wilson", "none", "t", "jackknife"]
    assert all("reference as fixed" in found[p].note for p in ("precision", "density", "coverage"))
    assert (
        found["recall"].low is None
        and "no interval" in found["recall"].note
        and all(e.n == 350 for e in found.values())
    )
    assert "|k:5|radius:<|n:200|m:150|" in PRDC().signature(table)
    assert PRDC(k=3, radius="<=").reduce(table)["precision"].value >= PRDC(k=3).reduce(table)["precision"].value
    # rows that share clusters: wider for precision and density, none for coverage
    clustered = PRDC().reduce(sets_table(fake, real, [f"c{i // 10}" for i in range(200)]))
    assert [clustered[p].method for p in PRDC.parts] == ["cluster-t", "none", "cluster-t", "none"]


def test_metric_of_pairs_has_values_without_intervals():
    g = rng(10)
    features = {"embedded/real": g.normal(size=(60, 4)), "embedded/fake": g.normal(size=(60, 4))}
    features = {name: rows.astype(np.float32) for name, rows in features.items()}
    table = Table([{"item": str(i)} for i in range(60)], load_features=features.__getitem__)
    found = PRDC().reduce(table)
    assert all(e.value is not None and e.low is None for e in found.values())
    withheld = PRDC(k=60).reduce(table)
    assert all(e.value is None and "60 neighbours of each need 61" in e.note for e in withheld.values())


def coverage_of_intervals(n, m, d, shift, scale, repeats):
    """Of generated sets drawn anew against one reference: share of intervals that hold the mean, width over spread."""
    real = rng(0, 2).normal(size=(m, d))
    found = []
    for repeat in range(repeats):
        reduced = PRDC().reduce(sets_table(shift + scale * rng(repeat, 3).normal(size=(n, d)), real))
        found.append([(e.value, e.low, e.high) for e in (reduced[p] for p in ("precision", "density", "coverage"))])
    value, low, high = np.array(found).transpose(2, 1, 0)  # [3, parts, repeats]
    truth = value.mean(1, keepdims=True)
    return ((low <= truth) & (truth <= high)).mean(1), ((high - low) / 2 / 1.96).mean(1) / value.std(1)


def test_intervals_hold_the_mean_over_generated_sets():
    """100 sets: coverage is known to 3 %, the spread to 8 %."""
    covered, ratio = coverage_of_intervals(120, 300, 12, 0.0, 1.1, 100)
    assert (covered >= 0.87).all()
    assert (ratio[:2] > 0.75).all() and (ratio[:2] < 1.3).all()
    assert 0.9 < ratio[2] < 1.7  # the jackknife is wide


@pytest.mark.full
@pytest.mark.parametrize(
    "n, m, d, shift, scale",
    [(200, 300, 2, 0.5, 0.5), (300, 300, 16, 0.2, 1.2), (100, 500, 16, 0, 1), (300, 300, 32, 0.6, 0.8)],
)
def test_intervals_hold_the_mean_over_generated_sets_at_length(n, m, d, shift, scale):
    covered, ratio = coverage_of_intervals(n, m, d, shift, scale, 600)
    assert (covered >= 0.90).all()
    assert (ratio > 0.7).all() and ratio[1] < 1.3 and ratio[2] < 1.7  # near a precision of 1 Wilson's is wide
