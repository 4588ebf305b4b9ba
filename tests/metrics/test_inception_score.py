import numpy as np
import pytest
from scipy.special import stdtrit

from bench.metrics import InceptionScore
from bench.metrics.inception_score import chunks, hash_splits, inception_score, shuffled_splits
from bench.types import Error, Table


def rng(*seed):
    return np.random.default_rng(seed)


def logits(g, n, classes=12):
    """A classifier more or less sure of classes drawn evenly."""
    found = g.normal(size=(n, classes))
    found[np.arange(n), g.integers(classes, size=n)] += g.exponential(3.0, size=n)
    return found


def test_torch_fidelitys_splits_give_its_numbers():
    import torch
    from torch_fidelity.metric_isc import isc_features_to_metric

    x = (3 * rng(1).normal(size=(997, 50))).astype(np.float32)  # ten splits do not divide it
    for shuffle, splits in ((True, shuffled_splits(997)), (False, np.arange(997) * 0)):
        theirs = isc_features_to_metric(torch.tensor(x), splits=10 if shuffle else 1, shuffle=shuffle)
        ours = inception_score(x, splits)
        assert ours.value == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
        assert ours.spread == pytest.approx(theirs["inception_score_std"], rel=1e-8, abs=1e-12)


def test_guided_diffusions_chunks():
    x = logits(rng(2), 260)
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    scores = []
    for start in range(0, 260, 100):
        part = p[start : start + 100]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    found = inception_score(x, chunks(260, 100))
    assert found.value == pytest.approx(np.mean(scores), rel=1e-12) and found.num_splits == 3
    assert chunks(5001).tolist() == [0] * 5000 + [1]
    assert inception_score(np.log(p), chunks(260, 100)).value == pytest.approx(found.value, rel=1e-12)


def test_known_answers():
    sure = 1000.0 * np.eye(4)[np.arange(40) % 4]  # one class each, all four alike: IS = 4
    found = inception_score(sure, np.arange(40) // 4 % 5)
    assert found.value == pytest.approx(4.0, rel=1e-12) and found.corrected == pytest.approx(4.0, rel=1e-12)
    assert found.spread == pytest.approx(0.0, abs=1e-12)
    same = np.tile([0.3, 1.0, -2.0], (40, 1))
    same[0, 0] += 1e-9
    assert inception_score(same, np.arange(40) % 5).value == pytest.approx(1.0, abs=1e-12)
    assert inception_score(sure + 1e4, np.arange(40) // 4 % 5).value == pytest.approx(4.0, rel=1e-9)


def test_jackknife_by_leaving_out():
    x, splits = logits(rng(3), 203), np.arange(203) % 7
    whole = inception_score(x, np.zeros(203, int)).value
    without = [inception_score(x[splits != s], np.zeros((splits != s).sum(), int)).value for s in range(7)]
    found = inception_score(x, splits)
    assert found.corrected == pytest.approx(7 * whole - 6 * np.mean(without), rel=1e-11)
    assert found.corrected_error == pytest.approx(np.sqrt(6 / 7 * np.sum((without - np.mean(without)) ** 2)), rel=1e-9)
    scores = [inception_score(x[splits == s], np.zeros((splits == s).sum(), int)).value for s in range(7)]
    assert found.value == pytest.approx(np.mean(scores), rel=1e-12)
    assert found.error == pytest.approx(np.std(scores, ddof=1) / np.sqrt(7), rel=1e-9)


def check_intervals(n, repeats, lowest):
    """Corrected against the score of 200,000 rows; the mean of splits against what so many rows give on average."""
    many = inception_score(logits(rng(4), 200_000), np.arange(200_000) % 10)
    truth = many.corrected
    found = [inception_score(logits(rng(repeat, 5), n), np.arange(n) % 10) for repeat in range(repeats)]
    value, error, corrected, corrected_error = np.array([f[0:1] + f[2:5] for f in found]).T
    t = stdtrit(9, 0.975)
    assert np.mean(abs(corrected - truth) <= t * corrected_error) >= lowest
    assert np.mean(abs(value - value.mean()) <= t * error) >= lowest
    assert 0.7 < corrected_error.mean() / corrected.std() < 1.3
    noise = np.hypot(many.corrected_error, corrected.std() / np.sqrt(repeats))
    assert abs(corrected.mean() - truth) < 0.15 * abs(value.mean() - truth) + 3 * noise
    if n < 1000:  # where the bias is large enough to be seen
        assert value.mean() < truth - 6 * noise


def test_intervals_cover_and_the_bias_goes():
    """200 samples of 400: coverage is known to 2 %."""
    check_intervals(400, 200, 0.90)


@pytest.mark.full
@pytest.mark.parametrize("n", [200, 5000])
def test_intervals_cover_at_length(n):
    check_intervals(n, 1000, 0.91)


def test_hash_splits_are_even_and_know_only_names():
    names = [f"prompt-{i}" for i in range(5000)]
    splits = hash_splits(names)
    assert (abs(np.bincount(splits, minlength=10) - 500) < 5 * np.sqrt(450)).all()
    assert (hash_splits(names[::-1])[::-1] == splits).all() and hash_splits(["prompt-7"])[0] == splits[7]


def test_refusals_name_the_fault():
    x = logits(rng(6), 30)
    with pytest.raises(Error, match="leave a split of the inception score with 1"):
        inception_score(x, np.array([0] * 29 + [1]))
    with pytest.raises(Error, match="30 rows of logits have 29 splits"):
        inception_score(x, np.zeros(29, int))
    with pytest.raises(Error, match="NaN"):
        inception_score(np.full((30, 4), np.nan), np.zeros(30, int))
    with pytest.raises(Error, match="d = 1"):
        inception_score(x[:, :1], np.zeros(30, int))


def sets_table(x, clusters=None):
    rows = [{"item": str(i), "side": "generated" if i < len(x) else "reference"} for i in range(len(x) + 20)]
    for row, cluster in zip(rows, clusters or [], strict=False):
        row["cluster"] = cluster
    rows = [{**row, "inception-tf1/logits-net": "abc"} for row in rows]
    features = np.concatenate([x, logits(rng(7), 20, x.shape[1])]).astype(np.float32)
    return Table(rows, load_features={"inception-tf1/logits": features}.__getitem__)


def test_metric():
    x = logits(rng(8), 300).astype(np.float32)
    table = sets_table(x)
    found = InceptionScore().reduce(table)
    expected = inception_score(x, hash_splits([str(i) for i in range(300)]))
    assert found[""].value == expected.value and found["corrected"].value == expected.corrected
    assert found[""].low < found[""].value < found[""].high < found["corrected"].high
    assert found["corrected"].n == 320 and "spread" in found[""].note
    assert InceptionScore().name == "inception-score-inception-tf1"
    assert InceptionScore().signature(table).startswith("inception-score-inception-tf1|hash|n:300|m:20|net:abc|")

    printed = InceptionScore(protocol="torch-fidelity").reduce(table)
    assert printed[""].value == inception_score(x, shuffled_splits(300)).value and printed[""].low is None
    one = InceptionScore(protocol="guided-diffusion").reduce(table)
    assert one["corrected"].value is None and one["corrected"].note == "one split" and "1 splits" in one[""].note


def test_metric_keeps_clusters_in_one_split_and_withholds_when_few():
    x = logits(rng(9), 300)
    few = InceptionScore().reduce(sets_table(x[:12]))
    assert all(e.value is None and "needs two" in e.note for e in few.values())
    names = [f"p{i // 4}" for i in range(300)]
    found = InceptionScore().reduce(sets_table(x, names))
    assert found[""].value == pytest.approx(inception_score(x.astype(np.float32), hash_splits(names)).value, rel=1e-12)


def test_an_empty_split_is_not_left_out_in_silence():
    names = [name for name in map(str, range(300)) if hash_splits([name])[0] < 9]
    x = logits(rng(11), len(names) + 50).astype(np.float32)
    rows = [{"item": name, "side": "generated"} for name in names]
    rows += [{"item": f"r{i}", "side": "reference"} for i in range(50)]
    found = InceptionScore().reduce(Table(rows, load_features={"inception-tf1/logits": x}.__getitem__))[""]
    assert found.value is None and "empty" in found.note
