"""Two runs on the items they share: paired differences with intervals, and the items that moved most."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bench.stats import num_clusters, paired_difference
from bench.store import Run
from bench.types import Error, Estimate, Score, Table

MOVERS = 5
SIZES = re.compile(r"\|[nm]:\d+")  # of a signature: how many rows, which need not be equal
REFERENCE = "reference"  # what the column `side` says of rows that no model made


@dataclass(frozen=True)
class Difference:
    """b - a in one metric; without an interval where nothing tells its error."""

    metric: str
    a: float | None
    b: float | None
    value: float | None
    low: float | None
    high: float | None
    n: int
    verdict: str
    method: str = ""
    gain: float | None = None  # variance of the difference of independent runs over that of this one


@dataclass(frozen=True)
class Comparison:
    a: str
    b: str
    shared: int
    clusters: int
    same_seed: bool
    differences: tuple[Difference, ...]
    movers: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)  # metric -> (item, a, b)


def compare(a: Run, b: Run) -> Comparison:
    """Differences b - a: paired over the items that both measured, else of two independent estimates.

    Raises Error when the runs cannot be compared: other suite, version, parameters, data or signatures, or no shared
    item.
    """
    for what in ("suite", "suite_version", "fields", "data"):
        x, y = a.spec.get(what), b.spec.get(what)
        if isinstance(x, dict) and isinstance(y, dict) and x != y:
            what = next(k for k in sorted({*x, *y}) if x.get(k) != y.get(k))
            x, y = x.get(what), y.get(what)
        if x != y:
            raise Error(
                f"the runs differ in {what.replace('_', ' ')}: {_brief(x)} and {_brief(y)}",
                hint="score both models with the same suite, parameters and data",
            )
    table_a, table_b = a.table(), b.table()
    rows_a, rows_b = ({row["item"]: row for row in table.rows} for table in (table_a, table_b))
    items = sorted(rows_a.keys() & rows_b.keys())
    if not items:
        raise Error("the runs share no item", hint="bench show RUN tells what each measured")
    other = {s.metric: s for s in b.scores() if s.slice == "all"}
    scores = [(s, other[s.metric]) for s in a.scores() if s.slice == "all" and s.metric in other]
    for x, y in scores:
        if protocol_of(x.signature) != protocol_of(y.signature):
            raise Error(
                f"the runs differ in how {x.metric} was measured: {x.signature} and {y.signature}",
                hint="score both models again with the same versions and weights",
            )
    whole = len(items) == len(rows_a) == len(rows_b)
    clusters = [str(rows_a[i].get("cluster") or i) for i in items]
    names = a.meta["model"], b.meta["model"]
    of_sets = set_differences(a, table_a, table_b) if len(scores) else {}
    differences, movers = [], {}
    for score, twin in scores:
        x, y = ([rows[i].get(score.metric) for i in items] for rows in (rows_a, rows_b))
        if any(isinstance(v, (int, float)) for v in x):
            both = [k for k in range(len(items)) if x[k] is not None and y[k] is not None]
            pairs = [(items[k], float(x[k]), float(y[k])) for k in both]
            sides = [p[2] for p in pairs], [p[1] for p in pairs]
            found = paired_difference(*sides, [clusters[k] for k in both], seed=a.spec["seed"])
            values = [sum(p[side] for p in pairs) / len(pairs) if pairs else None for side in (1, 2)]
            if score.better == "higher":
                movers[score.metric] = sorted(pairs, key=lambda p: (-abs(p[2] - p[1]), p[0]))[:MOVERS]
        else:
            found = of_sets.get(score.metric)
            values = [score.value, twin.value] if found is None or whole else [None, None]  # of other rows
            found = found or independent(score, twin)
        gain = _gain(score, twin, found) if whole and found.method != INDEPENDENT else None
        verdict = _verdict(found, score.better, *names)
        differences.append(
            Difference(score.metric, *values, found.value, found.low, found.high, found.n, verdict, found.method, gain)
        )
    own = [i for i in items if rows_a[i].get("side") != REFERENCE]
    return Comparison(
        *names,
        len(own),
        num_clusters([str(rows_a[i].get("cluster") or i) for i in own]),
        a.spec["seed"] == b.spec["seed"],
        tuple(differences),
        dict(list(movers.items())[:1]),
    )


INDEPENDENT = "independent"


def set_differences(run: Run, a: Table, b: Table) -> dict[str, Estimate]:
    """b - a of the scores that compare sets of features, on the rows that both tables have; `run` knows its suite.

    A score is absent where its metric has no paired difference, and where the suite is not at hand.
    """
    from bench.metrics.sets import matched_sets
    from bench.reduction import suite_of

    try:
        metrics: tuple[Any, ...] = suite_of(run).metrics
    except (KeyError, Error):  # of a package or a file that is not here
        return {}
    found: dict[str, Estimate] = {}
    for metric in metrics:
        if not hasattr(metric, "difference"):
            continue
        try:
            x, y = _clustered_alike(*matched_sets(a, b, metric.extractor))
            parts: Mapping[str, Estimate] = metric.difference(x, y)
        except (KeyError, Error):  # a run without these features, or too few rows shared
            continue
        n = len(x.generated)
        found |= {f"{metric.name}.{part}" if part else metric.name: replace(e, n=n) for part, e in parts.items()}
    return found


def _clustered_alike(a: Any, b: Any) -> tuple[Any, Any]:
    """Two `bench.metrics.sets.Sets` of matched rows, where rows that depend on each other in either do so in both.

    Clusters are numbered by their first row, so that both are split alike wherever a metric halves them.
    """
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if (len(a.generated), len(a.reference)) != (len(b.generated), len(b.reference)):
        return a, b  # refused by the metric
    x, y = (np.unique([*s.generated_clusters, *s.reference_clusters], return_inverse=True)[1] for s in (a, b))
    size = int(x.max() + y.max()) + 2
    joins = coo_array((np.ones(len(x)), (x, y + x.max() + 1)), shape=(size, size))
    _, first, which = np.unique(connected_components(joins)[1][x], return_index=True, return_inverse=True)
    names = [str(row) for row in first[which]]
    n = len(a.generated)
    return tuple(replace(s, generated_clusters=names[:n], reference_clusters=names[n:]) for s in (a, b))


def independent(a: Score, b: Score) -> Estimate:
    """b - a of two estimates whose errors are taken to be independent; no value where the sizes of sets would decide.

    Their half-widths add in squares. What both share, a reference, makes this wider than need be.
    """
    if a.value is None or b.value is None:
        return Estimate(None)
    n = min(a.n, b.n)
    if None in (a.low, a.high, b.low, b.high):
        same = a.signature == b.signature
        return Estimate(b.value - a.value if same else None, n=n, note="" if same else "the sets differ in size")
    half = math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2)
    value = b.value - a.value
    return Estimate(value, value - half, value + half, INDEPENDENT, n)


def protocol_of(signature: str) -> str:
    """A signature without the sizes of its sets."""
    return SIZES.sub("", signature)


def _gain(a: Score, b: Score, found: Estimate) -> float | None:
    """How many times fewer samples the paired difference needs than independent runs would."""
    apart = independent(a, b)
    if None in (apart.low, found.low) or found.high <= found.low:
        return None
    return ((apart.high - apart.low) / (found.high - found.low)) ** 2


def _verdict(found: Estimate, better: str, a: str, b: str) -> str:
    if found.low is None or found.high is None:
        return found.note or "no interval"
    how = ", unpaired" if found.method == INDEPENDENT else ""
    if found.low <= 0 <= found.high:
        return f"not distinguishable{how}"
    if better == "none":
        return f"{b} {'higher' if found.low > 0 else 'lower'}{how}"
    return f"{b if (found.low > 0) == (better == 'higher') else a} better{how}"


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
