"""Inception score: exp of the mean KL(p(y|x) || p(y)) that a classifier finds in a set (Salimans et al., 2016).

arXiv 1606.03498, section 4. It depends on the number of rows that p(y) is estimated from, and knows no reference:
papers split 50,000 pictures in ten and print the mean of ten scores and their spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from bench.identity import digest
from bench.metrics.sets import SetMetric, check_features
from bench.types import Error, Estimate

SPLITS = 10
CHUNK = 5000  # guided-diffusion's
SEED = 2020  # torch-fidelity's
BLOCK = 1024


class InceptionScores(NamedTuple):
    value: float  # mean of the scores of the splits
    spread: float  # their population standard deviation, as papers print it
    error: float | None  # standard error of the value; None for one split
    corrected: float | None  # score of all rows together, its bias taken off by the jackknife over splits
    corrected_error: float | None
    num_splits: int


def inception_score(logits: np.ndarray, split_of: np.ndarray) -> InceptionScores:
    """Inception score of a classifier's logits [n, classes], n rows in splits 0 ... S - 1 as `split_of` [n] says.

    Probabilities are given as their logarithms, finite ones. Sums are float64. The score of a split of n / S rows is
    expected to lie below that of infinitely many; `corrected` is S IS - (S - 1) mean IS_(-s), IS_(-s) all but split s.
    Raises Error where a split has fewer than two rows or the logits are at fault.
    """
    logits = check_features(logits, "generated")
    sizes = np.bincount(split_of)
    if len(split_of) != len(logits):
        raise Error(f"{len(logits)} rows of logits have {len(split_of)} splits")
    if sizes.min() < 2:
        raise Error(f"{len(logits)} rows leave a split of the inception score with {sizes.min()}; it needs two")
    count = len(sizes)
    likely, gain = np.zeros((count, logits.shape[1])), np.zeros(count)  # sums of p and of sum p log p
    for start in range(0, len(logits), BLOCK):
        part = split_of[start : start + BLOCK]
        x = logits[start : start + BLOCK].astype(np.float64)
        x -= x.max(1, keepdims=True)
        p = np.exp(x)
        total = p.sum(1, keepdims=True)
        p /= total
        np.add.at(gain, part, (p * x).sum(1) - np.log(total[:, 0]))
        for split in np.unique(part):
            likely[split] += p[part == split].sum(0)
    scores = _score(sizes, likely, gain)
    value, spread = float(scores.mean()), float(scores.std())
    if count == 1:
        return InceptionScores(value, spread, None, None, None, 1)
    whole = float(_score(sizes.sum(), likely.sum(0), gain.sum()))
    without = _score(sizes.sum() - sizes, likely.sum(0) - likely, gain.sum() - gain)
    return InceptionScores(
        value,
        spread,
        spread / float(np.sqrt(count - 1)),
        count * whole - (count - 1) * float(without.mean()),
        float(np.sqrt((count - 1) / count * np.square(without - without.mean()).sum())),
        count,
    )


def _score(n: np.ndarray, likely: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """exp of mean sum p log p less sum q log q, q = mean p; over the last axis of `likely`."""
    q = likely / np.asarray(n)[..., None]
    logarithm = np.log(q, out=np.zeros_like(q), where=q > 0)
    return np.exp(gain / n - (q * logarithm).sum(-1))


def hash_splits(names: Sequence[str], splits: int = SPLITS) -> np.ndarray:
    """int64 [n]: each row's split by the hash of its name; neither order nor other rows matter."""
    return np.array([int(digest(["inception-score", name])[:15], 16) % splits for name in names], np.int64)


def shuffled_splits(n: int, splits: int = SPLITS, seed: int = SEED) -> np.ndarray:
    """int64 [n]: torch-fidelity 0.4's splits: contiguous after a seeded shuffle."""
    order = np.random.RandomState(seed).permutation(n)  # the legacy stream, its own object
    found = np.empty(n, np.int64)
    for split in range(splits):
        found[order[split * n // splits : (split + 1) * n // splits]] = split
    return found


def chunks(n: int, size: int = CHUNK) -> np.ndarray:
    """int64 [n]: guided-diffusion's splits: runs of 5,000 in the order given, the last one shorter."""
    return np.arange(n) // size


@dataclass(frozen=True)
class InceptionScore(SetMetric):
    """Inception score of the generated set: the mean over splits, and as `corrected` that of infinitely many rows.

    The classifier is the extractor's; the signature names its weights. Without Inception's it is another score.
    "hash" keeps rows of one cluster in one of ten splits, and only there is an interval given: t over splits, of
    the score that so many rows get on average. The other two repeat printed numbers.
    """

    extractor: str = "inception-tf1/logits"
    protocol: Literal["hash", "torch-fidelity", "guided-diffusion"] = "hash"

    better = "higher"
    parts = ("", "corrected")

    @property
    def name(self):
        return f"inception-score-{self.extractor.partition('/')[0]}"

    def estimates(self, sets):
        n = len(sets.generated)
        splits = {
            "hash": lambda: hash_splits(sets.generated_clusters),
            "torch-fidelity": lambda: shuffled_splits(n),
            "guided-diffusion": lambda: chunks(n),
        }
        split_of = splits[self.protocol]()
        if self.protocol != "guided-diffusion" and split_of.max() + 1 < SPLITS:
            raise Error(f"{n} rows leave splits of the inception score empty; it needs two in each of {SPLITS}")
        found = inception_score(sets.generated, split_of)
        printed = f"{found.num_splits} splits, spread {found.spread:.3g}"
        if self.protocol == "hash":
            from scipy.special import stdtrit

            t = float(stdtrit(found.num_splits - 1, 0.975))
            bounds = [
                (value - t * error, value + t * error)
                for value, error in ((found.value, found.error), (found.corrected, found.corrected_error))
            ]
            return {
                "": Estimate(found.value, *bounds[0], "t over splits", n, printed),
                "corrected": Estimate(found.corrected, *bounds[1], "jackknife over splits", n),
            }
        corrected = Estimate(found.corrected, n=n, note="one split" if found.corrected is None else "no interval")
        return {"": Estimate(found.value, n=n, note=printed), "corrected": corrected}

    def settings(self):
        return f"{self.protocol}|"
