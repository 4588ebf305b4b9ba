"""Two sets of features under comparison, and what every metric of two sets shares.

A suite lays them out in one of two ways. *Pairs*: each row is a picture and its counterpart (a reconstruction), so a
batch of media holds both. *Independent sets*: a row is a generated or a reference picture, told apart by the column
`side`, and a batch of media holds one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from bench.types import Error, Estimate, Table

SIDE = "side"  # column of independent sets
GENERATED, REFERENCE = "generated", "reference"


@dataclass(frozen=True)
class Sets:
    """Features of the generated set [n, d] and of the reference [m, d], float32, finite and not constant.

    `paired`: row i of one belongs to row i of the other (n = m), so that the two are not independent.
    """

    generated: np.ndarray
    reference: np.ndarray
    paired: bool
    generated_clusters: Sequence[str]  # what a row shares with rows, of either set, that depend on it
    reference_clusters: Sequence[str]
    seed: int = 0  # of every random draw in an estimate


def check_features(features: Any, which: str = "feature") -> np.ndarray:
    """Float [n, d] of a feature array; raises Error unless it is 2-D, finite, n > 1, d > 1 and not all rows equal."""
    array = np.asarray(features)
    if array.ndim != 2:
        raise Error(f"the {which} set must be [n, d], not of shape {list(array.shape)}", hint="one row per sample")
    n, d = array.shape
    if d < 2:
        raise Error(f"the {which} set has d = {d}", hint="a flattened buffer? features are [n, d] with d > 1")
    if n < 2:
        raise Error(f"the {which} set has {n} row{'' if n == 1 else 's'}; a covariance needs two")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise Error(f"the {which} set holds NaN or infinity")
    if (array == array[0]).all():
        raise Error(f"the {which} set has no variance: all {n} rows are equal")
    return array


def check_pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both sets as `check_features` returns them; raises Error also where their dimensions differ."""
    a, b = check_features(a, "first"), check_features(b, "second")
    if a.shape[1] != b.shape[1]:
        raise Error(f"feature sets differ in dimension: {a.shape[1]} and {b.shape[1]}")
    return a, b


def sets_of(table: Table, extractor: str) -> Sets:
    """The two sets that a table holds of one extractor.

    Raises KeyError where no unit kept such features, Error where they cannot be compared.
    """
    for column in (net_column(extractor), resize_column(extractor)):
        found = sorted({str(v) for v in table.column(column) if v is not None})
        if len(found) > 1:
            raise Error(f"the features come from {' and '.join(found)}", hint="--fresh measures all of them again")
    if any(side is not None for side in table.column(SIDE)):
        generated, reference = table.where(SIDE, GENERATED), table.where(SIDE, REFERENCE)
        for part, which in ((generated, GENERATED), (reference, REFERENCE)):
            if not len(part):
                raise Error(f"the {which} set is empty")
        features = [part.features(extractor) for part in (generated, reference)]
        clusters = [part.clusters() for part in (generated, reference)]
        paired = False
    else:
        features = [table.features(f"{extractor}/fake"), table.features(f"{extractor}/real")]
        clusters, paired = [table.clusters()] * 2, True
    fake, real = check_features(features[0], GENERATED), check_features(features[1], REFERENCE)
    if fake.shape[1] != real.shape[1]:
        raise Error(f"the sets differ in dimension: {fake.shape[1]} and {real.shape[1]}")
    return Sets(fake, real, paired, clusters[0], clusters[1], table.seed)


def matched_sets(a: Table, b: Table, extractor: str) -> tuple[Sets, Sets]:
    """The sets of two runs on the items that both measured, in one order: what `SetMetric.difference` compares.

    Raises KeyError and Error as `sets_of`.
    """
    shared = set(a.column("item")) & set(b.column("item"))
    return tuple(_only(sets_of(t, extractor), t, shared) for t in (a, b))


def _only(sets: Sets, table: Table, items: set[str]) -> Sets:
    """The rows of a table's sets that belong to some items, in the order of those."""
    names = table.column("item")
    sides = table.column(SIDE)
    found = []
    for which, rows, clusters in (
        (GENERATED, sets.generated, sets.generated_clusters),
        (REFERENCE, sets.reference, sets.reference_clusters),
    ):
        own = names if sets.paired else [n for n, side in zip(names, sides, strict=True) if side == which]
        picked = sorted((i for i, name in enumerate(own) if name in items), key=own.__getitem__)
        found.append((check_features(rows[picked], which), [clusters[i] for i in picked]))
    return replace(
        sets,
        generated=found[0][0],
        reference=found[1][0],
        generated_clusters=found[0][1],
        reference_clusters=found[1][1],
    )


def influence_error(sets: Sets, of_generated: np.ndarray, of_reference: np.ndarray) -> tuple[float, float] | None:
    """Standard error and degrees of freedom of a statistic that varies as mean(of_generated) + mean(of_reference).

    The arguments are the influences of rows, float64 [n] and [m], each of mean 0. Rows of both sets that share a
    cluster (of pairs: all) vary together; where none do, the means are independent and the freedom is Welch's. None
    where a set is one cluster.
    """
    from bench.stats import mean_error

    values, clusters = (of_generated, of_reference), (sets.generated_clusters, sets.reference_clusters)
    alone = [mean_error(v, c) for v, c in zip(values, clusters, strict=True)]
    if None in alone:
        return None
    if set(clusters[0]) & set(clusters[1]):
        total = len(values[0]) + len(values[1])
        both = np.concatenate([v * (total / len(v)) for v in values])
        error, freedom = mean_error(both, [*clusters[0], *clusters[1]])
        return error, min(freedom, *(side[1] for side in alone))
    variances = [error * error for error, _ in alone]
    spread = sum(v * v / freedom for v, (_, freedom) in zip(variances, alone, strict=True))
    return sum(variances) ** 0.5, sum(variances) ** 2 / spread if spread else min(side[1] for side in alone)


@dataclass(frozen=True)
class SetMetric:
    """Base of metrics that compare two sets of features; a subclass names itself and writes `estimates`.

    `parts` are the suffixes of what `estimates` returns: "" is the score `name`, "corrected" is `name.corrected`.
    """

    extractor: str = "embedded"  # a name of bench.metrics.extractors
    real: str = "image"  # media of the reference
    fake: str = "recon"  # media under test
    quantise: str = "round"
    value_range: tuple[float, float] = (-1.0, 1.0)

    version: ClassVar[int] = 1
    unit: ClassVar[str] = ""
    better: ClassVar[str] = "lower"
    parts: ClassVar[tuple[str, ...]] = ("",)
    family: ClassVar[str]  # "kid": the score is `kid-<extractor>`, or what `name` says

    @property
    def name(self) -> str:
        return f"{self.family}-{self.extractor}"

    def estimates(self, sets: Sets) -> Mapping[str, Estimate]:
        """One estimate for each of `parts`. An Error it raises withholds all of them, with its message as the note."""
        raise NotImplementedError

    def difference(self, a: Sets, b: Sets) -> Mapping[str, Estimate]:
        """The metric of b less that of a, for `parts` it can tell; empty where a metric has no such estimate.

        Row i of `a.generated` and of `b.generated` come from one seed or item, and the references are the same rows:
        `matched_sets` sees to it. Raises Error where they are not, or where nothing can be told.
        """
        return {}

    def settings(self) -> str:
        """What else decides the value, for the signature: "k:5|radius:<|"; ends in a bar unless empty."""
        return ""

    def prepare(self, ctx):
        from bench.metrics.extractors import opened

        opened(self.extractor, ctx)

    def identity(self, ctx) -> str:
        from bench.metrics.extractors import opened

        return opened(self.extractor, ctx).fingerprint

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights manifests that measuring will ask for."""
        from bench.metrics.extractors import manifests

        return manifests(self.extractor)

    def measure(self, media, ctx):
        from bench.metrics.extractors import opened

        present = [(name, media[key]) for name, key in (("real", self.real), ("fake", self.fake)) if key in media]
        found = {name if len(present) == 2 else "": self.features_of(images, ctx) for name, images in present}
        columns = {f"{self.extractor}/{name}" if name else self.extractor: rows for name, rows in found.items()}
        n = len(present[0][1]) if present else 0
        network = opened(self.extractor, ctx)
        columns[net_column(self.extractor)] = [network.fingerprint] * n
        return {**columns, resize_column(self.extractor): [_resize_of(network)] * n}

    def features_of(self, images: Any, ctx: Any) -> np.ndarray:
        """float32 [B, d] of one batch of media."""
        from bench.metrics.extractors import features

        return features(self.extractor, images, ctx, self.quantise, self.value_range)

    def reduce(self, table):
        try:
            found = self.estimates(sets_of(table, self.extractor))
        except KeyError:  # no unit kept them: missing, not withheld
            return dict.fromkeys(self.parts, Estimate(None))
        except Error as e:
            return self.withheld(table, str(e))
        whole = len(table) == table.expected
        return {
            part: replace(estimate, n=len(table), note=estimate.note if whole else "")
            for part, estimate in found.items()
        }

    def withheld(self, table: Table, reason: str) -> dict[str, Estimate]:
        """No value, and why; the reason is left out while rows are missing, as a note calls a score complete."""
        note = reason if len(table) == table.expected else ""
        return dict.fromkeys(self.parts, Estimate(None, n=len(table), note=note))

    def signature(self, table):
        return f"{self.name}|{self.settings()}{describe_sets(table, self.extractor)}|{self.quantise}|v:{self.version}"


def net_column(extractor: str) -> str:
    """The column that holds the fingerprint of the network behind a row's features."""
    return f"{extractor}-net"


def resize_column(extractor: str) -> str:
    """The column that says how a row's picture reached the size of that network: "clean-299"."""
    return f"{extractor}-resize"


def _resize_of(network: Any) -> str:
    how = getattr(network, "preparation", None)
    if how is None or how.resize == "none":
        return "own"  # the network takes pictures as they are
    return f"{how.resize}-{how.size}" + (f"-{how.crop}" if how.crop != "none" else "")


def describe_sets(table: Table, extractor: str) -> str:
    """Sizes, network and resize for a signature: "n:500|m:30000|net:inception@3f2a90c1|resize:clean-299"."""
    sides = table.column(SIDE)
    independent = any(side is not None for side in sides)
    sizes = f"n:{sides.count(GENERATED)}|m:{sides.count(REFERENCE)}" if independent else f"n:{len(table)}|ref:self"
    return f"{sizes}|{describe_network(table, extractor)}"


def describe_network(table: Table, extractor: str) -> str:
    """Network and resize for a signature: "net:inception@3f2a90c1|resize:clean-299"."""
    nets, resizes = (
        "+".join(sorted({str(v) for v in table.column(column) if v is not None})) or "none"
        for column in (net_column(extractor), resize_column(extractor))
    )
    return f"net:{nets}|resize:{resizes}"
