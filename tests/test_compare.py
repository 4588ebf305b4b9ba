"""Two runs on the items they share: the paired difference, its verdict, and what is refused."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from toys import Drawing, Painter, command

from bench import Error, Estimate, Store, execute
from bench.compare import compare
from bench.config import How
from bench.show import print_comparison

HOW = How(devices="cpu", threads=1, keep="none")


def go(folder, name, bright, suite=None, **more):
    suite = suite or Drawing(num=12)
    return execute(
        suite, Painter(bright), store=Store(folder), identity={"name": name, "bright": bright}, how=HOW, **more
    )


def test_another_signature_is_refused_but_for_the_size_of_the_sets(tmp_path):
    a, b = go(tmp_path, "plain", 0.0), go(tmp_path, "bright", 0.1)
    plain = b.scores()
    b.save_scores([replace(s, signature=s.signature + "|v:2") for s in plain])
    with pytest.raises(Error, match=r"differ in how mean was measured: mean.* and mean.*v:2") as caught:
        compare(a, b)
    assert "same versions" in caught.value.hint
    b.save_scores([replace(s, signature=s.signature + "|n:9|m:3") for s in plain])
    assert compare(a, b).differences[0].value is not None


def test_the_difference_is_paired_and_judged(tmp_path, capsys):
    from scipy.stats import ttest_rel

    a, b = go(tmp_path, "plain", 0.0), go(tmp_path, "bright", 0.1)
    found = compare(a, b)
    assert (found.a, found.b, found.shared, found.same_seed) == ("plain", "bright", 12, True)
    (d,) = found.differences
    x, y = ([r["mean"] for r in run.table().rows] for run in (a, b))
    expected = ttest_rel(y, x)
    interval = expected.confidence_interval()
    assert d.metric == "mean" and d.n == 12 and abs(d.value - np.mean(np.subtract(y, x))) < 1e-12
    assert abs(d.low - interval.low) < 1e-9 and abs(d.high - interval.high) < 1e-9
    assert d.verdict == "bright better" and abs(d.a - np.mean(x)) < 1e-12 and d.method == "t"
    assert d.gain is None  # the scores of this toy have no intervals
    movers = found.movers["mean"]
    gaps = [abs(q - p) for _, p, q in movers]
    assert len(movers) == 5 and gaps == sorted(gaps, reverse=True) and gaps[0] == max(abs(np.subtract(y, x)))
    assert compare(b, a).differences[0].verdict == "bright better"
    print_comparison(found)
    out = capsys.readouterr().out
    assert (
        out.startswith("12 shared items, same seeds\n")
        and "bright better" in out
        and "largest differences in mean" in out
    )


def test_a_model_is_not_distinguishable_from_itself_under_other_seeds(tmp_path):
    a, b = go(tmp_path, "m", 0.0), go(tmp_path, "m", 0.0, seed=1)
    found = compare(a, b)
    assert not found.same_seed and found.differences[0].verdict == "not distinguishable"


def test_items_that_one_run_lacks_are_left_out(tmp_path):
    a, b = go(tmp_path, "a", 0.0), go(tmp_path, "b", 0.1, shard="0/2")
    found = compare(a, b)
    assert found.shared == 6 and found.differences[0].n == 6


@pytest.mark.parametrize(
    "suite, says",
    [
        (Drawing(num=12, colour="red"), "the runs differ in colour: grey and red"),
        (Drawing(num=10), "the runs differ in num: 12 and 10"),
    ],
)
def test_other_parameters_are_refused_by_name(tmp_path, suite, says):
    with pytest.raises(Error) as caught:
        compare(go(tmp_path, "a", 0.0), go(tmp_path, "b", 0.0, suite))
    assert str(caught.value) == says and "same suite" in caught.value.hint


@dataclass(frozen=True)
class Other(Drawing):
    name = "other"


@dataclass(frozen=True)
class Newer(Drawing):
    version = 2


def test_another_suite_version_or_data_is_refused(tmp_path):
    a = go(tmp_path, "a", 0.0)
    with pytest.raises(Error, match="differ in suite: drawing and other"):
        compare(a, go(tmp_path, "b", 0.0, Other(num=12)))
    with pytest.raises(Error, match="differ in suite version: 1 and 2"):
        compare(a, go(tmp_path, "b", 0.0, Newer(num=12)))
    b = go(tmp_path, "b", 0.0)
    b.spec["data"] = "sha256:other"
    with pytest.raises(Error, match="differ in data"):
        compare(a, b)


def test_no_shared_item_is_said(tmp_path):
    with pytest.raises(Error, match="share no item"):
        compare(go(tmp_path, "a", 0.0, shard="0/2"), go(tmp_path, "b", 0.0, shard="1/2"))


class Spread:
    """A metric that is no mean over items."""

    name, version, unit, better = "spread", 1, "", "lower"

    def __init__(self, flavour="a"):
        self.flavour = flavour

    def measure(self, media, ctx):
        return {}

    def reduce(self, table):
        return Estimate(float(np.std(table.values("mean"))), n=len(table))

    def signature(self, table):
        return f"spread|{self.flavour}"


@dataclass(frozen=True)
class Spreading(Drawing):
    @property
    def metrics(self):
        return (*Drawing.metrics, Spread())


def test_a_metric_that_is_no_mean_has_no_interval_of_its_own(tmp_path):
    a, b = go(tmp_path, "a", 0.0, Spreading()), go(tmp_path, "b", 0.1, Spreading())
    d = compare(a, b).differences[1]
    assert (d.metric, d.low, d.high, d.verdict, d.gain) == ("spread", None, None, "no interval", None)
    assert abs(d.value - (b.scores()[1].value - a.scores()[1].value)) < 1e-12


def scores_with(run, **changed):
    run.save_scores([replace(s, **changed) if s.metric == "spread" else s for s in run.scores()])


def test_independent_errors_add_in_squares_and_the_verdict_says_so(tmp_path):
    """Half-widths 3 and 4 make 5."""
    a, b = go(tmp_path, "a", 0.0, Spreading()), go(tmp_path, "b", 0.1, Spreading())
    scores_with(a, value=10.0, low=7.0, high=13.0), scores_with(b, value=16.0, low=12.0, high=20.0)
    d = compare(a, b).differences[1]
    assert (d.value, d.low, d.high, d.method, d.gain) == (6.0, 1.0, 11.0, "independent", None)
    assert d.verdict == "a better, unpaired"
    scores_with(b, value=12.0, low=8.0, high=16.0)
    assert compare(a, b).differences[1].verdict == "not distinguishable, unpaired"


def test_values_of_sets_of_other_size_are_not_subtracted(tmp_path):
    a, b = go(tmp_path, "a", 0.0, Spreading()), go(tmp_path, "b", 0.1, Spreading())
    scores_with(a, signature="spread|n:10|a"), scores_with(b, signature="spread|n:11|a")
    d = compare(a, b).differences[1]
    assert (d.value, d.verdict) == (None, "the sets differ in size")


def test_the_verb(tmp_path):
    import json

    go(tmp_path / ".bench", "a", 0.0), go(tmp_path / ".bench", "b", 0.1)
    done = command(tmp_path, "compare", "drawing-a", "drawing-b", "--json")
    body = json.loads(done.out)
    assert done.code == 0 and body["kind"] == "comparison" and body["rows"][0]["verdict"] == "b better"
