"""Bias, error and coverage of the Fréchet distance where the truth is known, and the metric that reports them."""

import numpy as np
import pytest
from feature_laws import Skewed, features, gaussian_pairs, rng, skewed_noise
from scipy.special import stdtrit

from bench.metrics.frechet import (
    Frechet,
    PairwiseFeatureDistance,
    block_distance,
    corrected_distance,
    frechet_difference,
    frechet_distance,
    frechet_estimates,
    frechet_from_features,
    paired_distance,
)
from bench.metrics.moments import BlockMoments, digest_of
from bench.metrics.sets import Sets, matched_sets
from bench.metrics.transport import gaussian_bias, general_bias, influence, transport
from bench.types import Error, Table, UsageError


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


def test_influence_in_float32_is_close(monkeypatch):
    """What is done from 1,024 dimensions on, done at 48: the error of the distance moves by 1e-5 of itself at most."""
    from bench.metrics import transport as module

    g = rng(0)
    a, b = (Skewed(48, change).draw(300, g).astype(np.float32) + 2 for change in (0.2, 0.0))
    double = influence(a, b)
    monkeypatch.setattr(module, "WIDE", 1)
    single = influence(a, b)
    for one, other in zip(single, double, strict=True):
        assert 0 < np.abs(one - other).max() < 1e-4 * other.std()
        assert one.std() == pytest.approx(other.std(), rel=1e-5)


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


def known_distance(d, change):
    return frechet_distance(*Skewed(d, change).moments(), *Skewed(d).moments(), strict=True)


class Tally:
    """Estimates of one truth over many draws."""

    def __init__(self, truth):
        self.truth, self.found, self.covered = truth, [], 0

    def add(self, found):
        self.found.append(found)
        if found.se is not None:
            self.covered += abs(found.value - self.truth) <= stdtrit(found.freedom, 0.975) * found.se

    def column(self, name):
        return np.array([getattr(found, name) for found in self.found])

    def check(self, bias=0.1, error=0.3, coverage=(0.9, 1.0), freely=2.0):
        """Bias as a share of the plug-in's, beyond `freely` standard errors of this simulation; error of the error."""
        values, plug_ins = self.column("value"), self.column("plug_in")
        noise = freely * values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - self.truth) <= bias * abs(plug_ins.mean() - self.truth) + noise
        assert self.column("se").mean() == pytest.approx(values.std(ddof=1), rel=error)
        assert coverage[0] <= self.covered / len(values) <= coverage[1]


def independent(d, n, m, change, draws):
    tally = Tally(known_distance(d, change))
    for seed in range(draws):
        g = rng(seed)
        tally.add(corrected_distance(Skewed(d, change).draw(n, g), Skewed(d).draw(m, g), seed=seed))
    return tally


# 100 draws cover 95 % +- 2.2 %: 0.90 is 2.3 of those below, so that the fixed draws do not sit at an edge
@pytest.mark.parametrize("n,m,change", [(512, 512, 0.3), (512, 512, 0.0), (256, 1024, 0.1)])
def test_independent_sets(n, m, change):
    """d = 64, 100 draws: bias within 10 % of the plug-in's and noise, error within 30 %, coverage 0.90 to 1.00."""
    tally = independent(64, n, m, change, 100)
    assert tally.column("plug_in").mean() - tally.truth > 5 * tally.column("plug_in").std()
    tally.check()


@pytest.mark.full
@pytest.mark.parametrize("change", [0.3, 0.1, 0.0])
def test_blocks_of_moments_at_full_size(change):
    """d = 64, n = 1024, 300 draws, 20 and 40 blocks: error within 30 %, coverage 0.90 to 1.00."""
    for num_blocks in (20, 40):
        tally = Tally(known_distance(64, change))
        for seed in range(300):
            g = rng(seed)
            generated, reference = Skewed(64, change).draw(1024, g), Skewed(64).draw(1024, g)
            tally.add(block_distance(blocks_of(generated, "g", num_blocks), blocks_of(reference, "r", num_blocks)))
        tally.check()


@pytest.mark.full
@pytest.mark.parametrize(
    "d,n,m", [(64, 512, 512), (64, 1024, 1024), (64, 1024, 4096), (256, 1024, 1024), (256, 2048, 2048)]
)
@pytest.mark.parametrize("change", [0.3, 0.1, 0.0])
def test_independent_sets_at_full_size(d, n, m, change):
    """300 draws at d = 64, 60 at 256: bias within 10 % of the plug-in's, error within 30 %, coverage 0.90 to 1.00."""
    independent(d, n, m, change, 300 if d == 64 else 60).check()


def test_clusters_of_independent_sets():
    """Rows in eights that share 60 % of their variance: named, the interval covers; unnamed, it does not."""
    d, n, change = 16, 1024, 0.3
    named, unnamed = Tally(known_distance(d, change)), Tally(known_distance(d, change))
    clusters = [f"c{i // 8}" for i in range(n)]
    for seed in range(100):
        g = rng(seed)
        generated, reference = Skewed(d, change).draw(n, g, per_cluster=8), Skewed(d).draw(n, g)
        named.add(corrected_distance(generated, reference, clusters, seed=seed))
        unnamed.add(corrected_distance(generated, reference, seed=seed))
    named.check(bias=0.2)
    assert unnamed.covered < 85
    assert named.found[0].gaussian is None and unnamed.found[0].gaussian is not None


def test_pairs_taken_as_independent_would_have_too_wide_an_error():
    fake, real, names, _ = gaussian_pairs(400, 0)
    together, apart = corrected_distance(fake, real, names, names), corrected_distance(fake, real)
    assert together == paired_distance(fake, real, names)
    assert apart.se > 2 * together.se and apart.gaussian is not None and together.gaussian is None


def test_order_of_rows_does_not_matter():
    g = rng(3)
    a, b = Skewed(8, 0.2).draw(300, g), Skewed(8).draw(250, g)
    names_a, names_b = [f"a{i}" for i in range(300)], [f"b{i}" for i in range(250)]
    first = corrected_distance(a, b, names_a, names_b, 5)
    p, q = g.permutation(300), g.permutation(250)
    again = corrected_distance(a[p], b[q], [names_a[i] for i in p], [names_b[i] for i in q], 5)
    assert again.value == pytest.approx(first.value, rel=1e-10) and again.se == pytest.approx(first.se, rel=1e-9)


def test_first_order_bias_of_gaussian_rows():
    """Both closed forms against the mean excess of the plug-in over 200 draws, within 10 %; n / d = 40."""
    d, n, m = 8, 320, 480
    law = [(np.zeros(d), np.diag(np.linspace(0.5, 2, d))), (np.ones(d), np.diag(np.linspace(1, 1.5, d)))]
    truth = frechet_distance(*law[0], *law[1])
    excess, general = [], []
    for seed in range(200):
        g = rng(seed)
        a, b = (
            mean + g.normal(size=(k, d)) * np.sqrt(np.diag(cov)) for (mean, cov), k in zip(law, (n, m), strict=True)
        )
        excess.append(frechet_from_features(a, b) - truth)
        general.append(general_bias(a, b))
    exact = gaussian_bias(transport(*law[0], *law[1]), np.trace(law[0][1]), np.trace(law[1][1]), n, m)
    assert np.mean(general) == pytest.approx(exact, rel=0.05)
    # the linear terms of a draw, of mean 0, are most of its noise: 200 draws leave 0.004 of 0.05
    assert np.mean(excess) == pytest.approx(exact, abs=3 * np.std(excess) / np.sqrt(200))
    assert 3 * np.std(excess) / np.sqrt(200) < 0.7 * exact


def test_heavy_tails_are_where_the_two_corrections_part():
    """Against half-split over 60 draws: fourth moments see the tails, the Gaussian form does not."""
    d, n = 16, 512
    g = rng(1)
    halves, gaussians, generals = [], [], []
    for _ in range(60):
        a, b = (g.standard_t(5, size=(n, d)) / np.sqrt(5 / 3) for _ in range(2))
        found = corrected_distance(a, b)
        halves.append(found.plug_in - found.value)
        gaussians.append(found.plug_in - found.gaussian)
        generals.append(general_bias(a, b))
    assert np.mean(gaussians) < 0.9 * np.mean(generals)
    assert abs(np.mean(generals) - np.mean(halves)) < abs(np.mean(gaussians) - np.mean(halves))


def blocks_of(rows, prefix, num_blocks=20):
    return BlockMoments(rows.shape[1], num_blocks).update(rows, [f"{prefix}{i}" for i in range(len(rows))])


@pytest.mark.parametrize("change", [0.3, 0.0])
def test_blocks_of_moments_give_an_error_without_features(change):
    """d = 16, n = 256, 20 blocks, 80 draws: as good as with features, coverage 0.90 to 1.00."""
    tally = Tally(known_distance(16, change))
    for seed in range(80):
        g = rng(seed)
        tally.add(
            block_distance(blocks_of(Skewed(16, change).draw(256, g), "g"), blocks_of(Skewed(16).draw(256, g), "r"))
        )
    tally.check()
    assert all(19 <= found.freedom <= 38 for found in tally.found)


@pytest.mark.parametrize("paired", [True, False])
def test_the_value_of_a_block_is_that_of_its_rows(paired):
    """The influence of rows, summed by block, gives the same error to 1e-9; some blocks have one row or none."""
    fake, real, _, _ = gaussian_pairs(60, 0, d=6)
    ids = [str(i) for i in range(60)]
    found = block_distance(*(BlockMoments(6, 40).update(rows, ids) for rows in (fake, real)), paired=paired)
    home = [digest_of([i]) % 40 for i in ids]
    assert min(np.bincount(home, minlength=40)) == 0 and 1 in np.bincount(home)
    effect = influence(fake, real)
    sums = [np.bincount(home, weights, minlength=40) / 60 for weights in effect]
    variance = (sum(sums) ** 2).sum() if paired else (sums[0] ** 2).sum() + (sums[1] ** 2).sum()
    assert found.se == pytest.approx(np.sqrt(40 / 39 * variance), rel=1e-9)
    assert found.plug_in == pytest.approx(frechet_from_features(fake, real), rel=1e-10)


@pytest.mark.parametrize("coupling,least", [(0.05, 20), (1.0, 1.5)])
def test_difference_of_two_checkpoints_on_the_same_seeds(coupling, least):
    """b is a with its matrix changed by `coupling`, same z. 80 draws: coverage, and a gain that unpaired runs show."""
    d, n = 16, 256
    law_a, law_b = Skewed(d, 0.3), Skewed(d, 0.3)
    law_b.matrix = law_b.matrix + coupling * (Skewed(d, 0.1).matrix - law_b.matrix)
    truth = frechet_distance(*law_b.moments(), *Skewed(d).moments()) - known_distance(d, 0.3)
    tally, unpaired = Tally(truth), []
    for seed in range(80):
        g = rng(seed)
        z, other = (skewed_noise(g, n, d) for _ in range(2))
        reference, fresh = (Skewed(d).draw(n, g) for _ in range(2))
        tally.add(frechet_difference(law_a.rows(z), law_b.rows(z), reference, seed=seed))
        apart = [corrected_distance(law.rows(x), r) for law, x, r in ((law_a, z, reference), (law_b, other, fresh))]
        unpaired.append(apart[1].value - apart[0].value)
    tally.check(bias=1.0)
    gain = np.var(unpaired) / np.var(tally.column("value"))
    assert gain > least and np.median(tally.column("gain")) == pytest.approx(gain, rel=0.5)


def test_difference_of_two_autoencoders_on_the_same_originals():
    """y = x + noise against y = x + 1.2 noise, of which the distances are known; 100 draws."""
    d, n = 16, 320
    scales = np.linspace(0.5, 1.5, d)
    truth = sum(
        sign * ((np.sqrt(scales**2 + (0.35 * k) ** 2) - scales) ** 2).sum() for k, sign in ((1.2, 1), (1.0, -1))
    )
    tally = Tally(float(truth))
    names = [str(i) for i in range(n)]
    for seed in range(100):
        a, x, _, _ = gaussian_pairs(n, seed, d)
        b = x + 1.2 * (a - x)
        tally.add(frechet_difference(a, b, x, names, names, seed))
    tally.check(bias=0.3)
    assert min(tally.column("gain")) > 1


def test_no_difference_has_no_width():
    g = rng(0)
    a, reference = Skewed(8, 0.3).draw(200, g), Skewed(8).draw(200, g)
    found = frechet_difference(a, a.copy(), reference)
    assert found.value == 0 and found.se == 0 and found.gain is None


# -- the metric


def table(fake, real, expected=None, clusters=None):
    rows = [{"item": str(i), "embedded-net": "net@1"} for i in range(len(fake))]
    if clusters is not None:
        rows = [{**row, "cluster": c} for row, c in zip(rows, clusters, strict=True)]
    kept = {"embedded/real": real.astype(np.float32), "embedded/fake": fake.astype(np.float32)}
    return Table(rows, expected, load_features=lambda name: kept[name])


def two_sides(generated, reference, expected=None):
    """A table of independent sets, the rows of both sides mixed."""
    kept = np.concatenate([generated, reference]).astype(np.float32)
    sides = ["generated"] * len(generated) + ["reference"] * len(reference)
    rows = [{"item": f"{s}/{i}", "side": s, "embedded-net": "net@1"} for i, s in enumerate(sides)]
    order = rng(0).permutation(len(rows))
    return Table([rows[i] for i in order], expected, load_features={"embedded": kept[order]}.__getitem__)


def test_metric_of_pairs():
    fake, real, clusters, truth = gaussian_pairs(400, 1)
    found = Frechet().reduce(table(fake, real, clusters=clusters))
    assert found[""].low is None and found[""].value > found["corrected"].value
    assert found["corrected"].low < truth < found["corrected"].high
    assert found["corrected"].low < found["corrected"].value < found["corrected"].high
    assert found["corrected"].method == "half-split, influence-t" and found["corrected"].n == 400
    expected = "frechet-embedded|cov:unbiased|n:400|ref:self|net:net@1|resize:none|round|v:2"
    assert Frechet().signature(table(fake, real)) == expected
    assert (Frechet("inception-tf1").name, Frechet("inception-tf1/spatial").name) == ("fid", "sfid")
    with pytest.raises(UsageError, match="covariance 'sample' is not one of unbiased, biased"):
        Frechet(covariance="sample")
    part = table(fake, real).where("item", "3")
    assert Frechet().reduce(part)[""].value is None


def test_metric_of_independent_sets():
    g = rng(2)
    a, b = Skewed(16, 0.3).draw(200, g), Skewed(16).draw(300, g)
    found = Frechet().reduce(two_sides(a, b))
    expected = frechet_from_features(a.astype(np.float32), b.astype(np.float32))
    assert found[""].value == pytest.approx(expected, rel=1e-10) and found[""].n == 500
    assert found["corrected"].low < known_distance(16, 0.3) < found["corrected"].high
    assert Frechet().signature(two_sides(a, b)).startswith("frechet-embedded|cov:unbiased|n:200|m:300|net:net@1|")
    biased = Frechet(covariance="biased").reduce(two_sides(a, b))
    assert biased["corrected"] == found["corrected"] and biased[""].value != found[""].value
    assert biased[""].value == pytest.approx(frechet_from_features(a, b, covariance="biased"), rel=1e-6)


@pytest.mark.parametrize("n,reason", [(0, "0 rows"), (1, "1 row"), (2, "d = 16"), (16, "d = 16"), (20, "no interval")])
def test_metric_withholds_with_a_reason(n, reason):
    fake, real, _, _ = gaussian_pairs(64, 1)
    found = Frechet().reduce(table(fake[:n], real[:n]))["corrected"]
    assert reason in found.note and found.low is None
    assert (found.value is None) == (n <= 16)
    assert Frechet().reduce(table(fake[:n], real[:n], expected=n + 1))["corrected"].note == ""  # a row is missing


@pytest.mark.parametrize("n,m", [(64, 20), (20, 64), (16, 64), (64, 16)])
def test_the_smaller_set_decides_about_the_interval(n, m):
    g = rng(1)
    found = Frechet().reduce(two_sides(Skewed(16, 0.3).draw(n, g), Skewed(16).draw(m, g)))
    assert found["corrected"].low is None and f"{min(n, m)} rows, d = 16" in found["corrected"].note
    if min(n, m) == 16:
        assert found["corrected"].value is None and "rank-deficient" in found[""].note and found[""].value > 0
    else:
        assert found["corrected"].value < found[""].value and not found[""].note


@pytest.mark.parametrize("clusters", [["one"] * 100, ["many"] * 99 + ["alone"]])
def test_clusters_that_cannot_be_halved_leave_the_plug_in(clusters):
    fake, real, _, _ = gaussian_pairs(100, 1)
    found = Frechet().reduce(table(fake, real, clusters=clusters))
    assert found["corrected"].value is None and "too few clusters" in found["corrected"].note
    kept = table(fake, real)
    expected = frechet_from_features(kept.features("embedded/fake"), kept.features("embedded/real"))
    assert found[""].value == pytest.approx(expected, rel=1e-12)


def test_identical_sets_are_zero_and_rounding_is_said():
    rows = features(200, 12, 1).astype(np.float32)
    found = Frechet().reduce(table(rows, rows))
    assert found[""].value == pytest.approx(0, abs=1e-12) and found[""].value >= 0
    assert abs(found["corrected"].value) < 1e-12 and found["corrected"].high - found["corrected"].low < 1e-12
    sets = Sets(rows, rows, True, *[[str(i) for i in range(200)]] * 2)
    raw = paired_distance(rows, rows).plug_in
    assert ("computed as" in frechet_estimates(sets)[""].note) == (raw < 0)


def test_corrections_that_disagree_are_noted():
    """Three rows of a hundred fifteen times as far out put more than two errors between the corrections."""
    g = rng(0)
    far = [np.where(g.random((600, 1)) < 0.03, 15, 1) for _ in range(2)]
    a, b = (g.normal(size=(600, 12)) for _ in range(2))
    assert (
        "heavy tails: the Gaussian correction gives"
        in Frechet().reduce(two_sides(a * far[0], b * far[1]))["corrected"].note
    )
    assert Frechet().reduce(two_sides(a, b))["corrected"].note == ""


def test_metric_of_constant_features_is_null():
    flat = np.ones((50, 8))
    found = Frechet().reduce(table(flat, flat))
    assert found[""].value is None and "no variance" in found[""].note


@pytest.mark.parametrize("paired", [True, False])
def test_metric_differences_match_rows(paired):
    """Two tables in other orders, one with a row the other lacks: as the function on the matched rows."""
    g = rng(4)
    reference = Skewed(8).draw(150, g).astype(np.float32)
    z = skewed_noise(g, 150, 8)
    a, b = (Skewed(8, change).rows(z).astype(np.float32) for change in (0.3, 0.35))
    make = table if paired else two_sides
    first, second = make(a, reference), make(b, reference)
    if paired:
        order = g.permutation(149)
        kept = {name: second.features(name)[order] for name in ("embedded/fake", "embedded/real")}
        second = Table([second.rows[i] for i in order], load_features=kept.__getitem__)
        a, b, reference = a[:149], b[:149], reference[:149]
    sets = matched_sets(first, second, "embedded")
    assert len(sets[0].generated) == len(sets[1].generated) == len(a)
    found = Frechet().difference(*sets)
    names = sets[0].generated_clusters, sets[0].reference_clusters
    expected = frechet_difference(sets[0].generated, sets[1].generated, sets[0].reference, *names)
    assert found["corrected"].value == expected.value and found["corrected"].low < expected.value
    assert found[""].value == pytest.approx(
        frechet_from_features(b, reference) - frechet_from_features(a, reference), rel=1e-4
    )
    assert "of unpaired" in found["corrected"].note


def test_differences_need_one_reference_and_rows_enough():
    g = rng(4)
    a, reference = Skewed(8, 0.3).draw(150, g), Skewed(8).draw(150, g)
    names = [f"g{i}" for i in range(150)], [f"r{i}" for i in range(150)]
    sets = Sets(a, reference, False, *names)
    with pytest.raises(Error, match="one reference"):
        Frechet().difference(sets, Sets(a, reference + 1, False, *names))
    with pytest.raises(Error, match="matched rows"):
        Frechet().difference(sets, Sets(a[:100], reference, False, names[0][:100], names[1]))
    with pytest.raises(Error, match="same clusters"):
        Frechet().difference(sets, Sets(a, reference, False, names[1], names[1]))
    few = Sets(a[:8], reference, False, names[0][:8], names[1])
    with pytest.raises(Error, match="rank-deficient"):
        Frechet().difference(few, few)


def test_pairwise_distance_is_of_pairs_alone():
    fake, real, _, _ = gaussian_pairs(60, 1)
    expected = ((fake.astype(np.float32) - real.astype(np.float32).astype(float)) ** 2).sum(1).mean()
    found = PairwiseFeatureDistance().reduce(table(fake, real))[""]
    assert found.value == pytest.approx(expected, rel=1e-6) and found.low < expected < found.high
    assert "independent sets" in PairwiseFeatureDistance().reduce(two_sides(fake, real))[""].note
    assert PairwiseFeatureDistance().signature(table(fake, real)) == "pairwise-embedded|net:net@1|resize:none|round|v:2"
    sets = Sets(fake, real, False, *[[str(i) for i in range(60)]] * 2)
    with pytest.raises(Error, match="independent sets"):
        PairwiseFeatureDistance().estimates(sets)
