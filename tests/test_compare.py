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


def test_another_signature_gives_no_difference(tmp_path):
    a, b = go(tmp_path, "plain", 0.0), go(tmp_path, "bright", 0.1)
    b.save_scores([replace(s, signature=s.signature + "|v:2") for s in b.scores()])
    (d,) = compare(a, b).differences
    assert d.value is None and d.low is None and d.verdict.startswith("signatures differ")


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
    assert d.verdict == "bright better" and abs(d.a - np.mean(x)) < 1e-12
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


def test_a_metric_that_is_no_mean_has_no_interval_and_needs_equal_signatures(tmp_path):
    a, b = go(tmp_path, "a", 0.0, Spreading()), go(tmp_path, "b", 0.1, Spreading())
    d = compare(a, b).differences[1]
    assert (d.metric, d.low, d.high, d.verdict) == ("spread", None, None, "signatures equal")
    assert abs(d.value - (b.scores()[1].value - a.scores()[1].value)) < 1e-12
    b.save_scores([replace(s, signature="spread|b") if s.metric == "spread" else s for s in b.scores()])
    d = compare(a, b).differences[1]
    assert d.value is None and d.verdict == "signatures differ: spread|a and spread|b"


def test_the_verb(tmp_path):
    import json

    go(tmp_path / ".bench", "a", 0.0), go(tmp_path / ".bench", "b", 0.1)
    done = command(tmp_path, "compare", "drawing-a", "drawing-b", "--json")
    body = json.loads(done.out)
    assert done.code == 0 and body["kind"] == "comparison" and body["rows"][0]["verdict"] == "b better"
