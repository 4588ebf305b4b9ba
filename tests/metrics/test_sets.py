import numpy as np
import pytest
from feature_laws import rng

from bench.metrics.sets import SetMetric, Sets, check_features, influence_error, matched_sets, sets_of
from bench.types import Error, Estimate, Table


class Gap(SetMetric):
    """Distance of the means, to see what the base class does with an estimate."""

    family = "gap"

    def estimates(self, sets):
        if len(sets.generated) == 3:
            raise Error("three is too few")
        value = float(np.abs(sets.generated.mean(0) - sets.reference.mean(0)).sum())
        return {"": Estimate(value, n=1, note="said")}


def independent(n, m, expected=None, d=4):
    g = rng(n + m)
    kept = g.normal(size=(n + m, d)).astype(np.float32)
    rows = [
        {"item": f"{side}{i}", "side": side, "embedded-net": "net@1", "embedded-resize": "clean-64"}
        for side, count in (("generated", n), ("reference", m))
        for i in range(count)
    ]
    return Table(rows, expected, 5, {"embedded": kept}.__getitem__)


def pairs(n, expected=None, d=4):
    g = rng(n)
    kept = {f"embedded/{side}": g.normal(size=(n, d)).astype(np.float32) for side in ("real", "fake")}
    return Table([{"item": str(i), "cluster": f"c{i // 2}"} for i in range(n)], expected, 5, kept.__getitem__)


def test_layouts():
    found = sets_of(independent(20, 30), "embedded")
    assert (len(found.generated), len(found.reference), found.paired, found.seed) == (20, 30, False, 5)
    assert found.generated_clusters[3] == "generated3" and found.reference_clusters[-1] == "reference29"
    found = sets_of(pairs(20), "embedded")
    assert found.paired and found.generated_clusters == found.reference_clusters and found.generated_clusters[3] == "c1"
    with pytest.raises(KeyError):
        sets_of(pairs(20), "other")
    with pytest.raises(Error, match="the reference set is empty"):
        sets_of(independent(20, 0), "embedded")


def test_features_of_two_networks_are_no_set():
    for column, other in (("embedded-net", "net@2"), ("embedded-resize", "tf1-64")):
        table = independent(20, 30)
        table.rows[7] = {**table.rows[7], column: other}
        found = Gap().reduce(table)[""]
        assert found.value is None and found.note.startswith("the features come from ") and other in found.note


@pytest.mark.parametrize("table,n", [(independent(20, 30), 50), (pairs(20), 20)])
def test_a_complete_score_counts_all_rows_and_keeps_its_note(table, n):
    assert Gap().reduce(table)[""].n == n and Gap().reduce(table)[""].note == "said"
    short = Table(table.rows, n + 1, load_features=table.features)
    assert Gap().reduce(short)[""].n == n and Gap().reduce(short)[""].note == ""


def test_an_error_withholds_with_its_message():
    found = Gap().reduce(pairs(3))
    assert found[""].value is None and found[""].note == "three is too few"
    assert Gap().reduce(pairs(3, expected=4))[""].note == ""
    assert Gap("other").reduce(pairs(10)) == {"": Estimate(None)}  # nothing kept: missing
    assert Gap().difference(*[sets_of(pairs(10), "embedded")] * 2) == {}


def test_signature():
    assert Gap().signature(independent(20, 30)) == "gap-embedded|n:20|m:30|net:net@1|resize:clean-64|round|v:1"
    assert Gap().signature(pairs(20)) == "gap-embedded|n:20|ref:self|net:none|resize:none|round|v:1"


@pytest.mark.parametrize(
    "features,fault",
    [
        (np.zeros(8), r"must be \[n, d\], not of shape \[8\]"),
        (np.zeros((2, 2, 2)), "must be"),
        (np.zeros((8, 1)), "d = 1"),
        (np.zeros((1, 8)), "1 row;"),
        (np.ones((8, 3)), "no variance"),
        (np.full((8, 3), np.inf), "infinity"),
    ],
)
def test_faulty_features_are_named(features, fault):
    with pytest.raises(Error, match=f"the made set.*{fault}"):
        check_features(features, "made")


def test_matched_sets_are_the_shared_items_in_one_order():
    table = independent(20, 10)
    order = rng(0).permutation(30)[:26]
    rows = [table.rows[i] for i in order]
    other = Table(rows, load_features={"embedded": table.features("embedded")[order]}.__getitem__)
    first, second = matched_sets(table, other, "embedded")
    np.testing.assert_array_equal(first.generated, second.generated)
    np.testing.assert_array_equal(first.reference, second.reference)
    assert first.generated_clusters == second.generated_clusters == sorted(first.generated_clusters)
    assert len(first.generated) + len(first.reference) == 26
    with pytest.raises(Error, match="generated set has 0 rows"):
        renamed = [{**row, "item": "x" + row["item"]} for row in table.rows]
        matched_sets(table, Table(renamed, load_features=table.features), "embedded")


def sets(n, m, generated=None, reference=None):
    names = generated or [f"g{i}" for i in range(n)], reference or [f"r{i}" for i in range(m)]
    return Sets(np.zeros((n, 2)), np.zeros((m, 2)), False, *names)


def test_error_of_independent_means_is_welchs():
    from scipy.stats import ttest_ind

    g = rng(1)
    x, y = g.normal(size=30), 3 * g.normal(size=8)
    x, y = x - x.mean(), y - y.mean()
    se, freedom = influence_error(sets(30, 8), x, y)
    known = ttest_ind(x + 1, y, equal_var=False)
    assert freedom == pytest.approx(known.df, rel=1e-12) and 1 / se == pytest.approx(known.statistic, rel=1e-12)


def test_error_of_rows_that_share_clusters():
    """Pairs: the mean of x + y; clusters on both sides: cluster sums; the smaller side bounds the freedom."""
    g = rng(2)
    x, y = g.normal(size=40), g.normal(size=40)
    x, y = x - x.mean(), y - y.mean()
    names = [str(i) for i in range(40)]
    se, freedom = influence_error(sets(40, 40, names, names), x, y)
    assert se == pytest.approx(np.std(x + y, ddof=1) / np.sqrt(40), rel=1e-12) and freedom == pytest.approx(39)
    assert influence_error(sets(40, 40, names, names), x, -x)[0] == pytest.approx(0, abs=1e-15)
    fours = [str(i // 4) for i in range(40)]
    se, freedom = influence_error(sets(40, 40, fours, fours), x, y)
    sums = (x + y).reshape(10, 4).sum(1)
    assert se == pytest.approx(np.sqrt(10 / 9 * (sums**2).sum()) / 40, rel=1e-12) and freedom <= 9.0001
    assert influence_error(sets(40, 40, ["one"] * 40), x, y) is None
