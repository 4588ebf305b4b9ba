"""Two runs on the items they share: paired differences with intervals, and the items that moved most."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.stats import num_clusters, paired_difference
from bench.store import Run
from bench.types import Error

MOVERS = 5


@dataclass(frozen=True)
class Difference:
    """b - a in one metric; without an interval where the metric is no mean over items."""

    metric: str
    a: float | None
    b: float | None
    value: float | None
    low: float | None
    high: float | None
    n: int
    verdict: str


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
    """Paired differences b - a over the items that both measured.

    Raises Error when the runs cannot be compared: other suite, version, parameters or data, or no shared item.
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
    rows_a = {row["item"]: row for row in a.table().rows}
    rows_b = {row["item"]: row for row in b.table().rows}
    items = sorted(rows_a.keys() & rows_b.keys())
    if not items:
        raise Error("the runs share no item", hint="bench show RUN tells what each measured")
    clusters = [str(rows_a[i].get("cluster") or i) for i in items]
    other = {s.metric: s for s in b.scores() if s.slice == "all"}
    differences, movers = [], {}
    for score in a.scores():
        twin = other.get(score.metric)
        if score.slice != "all" or twin is None:
            continue
        x, y = ([rows[i].get(score.metric) for i in items] for rows in (rows_a, rows_b))
        same = score.signature == twin.signature
        if same and any(isinstance(v, (int, float)) for v in x):
            both = [k for k in range(len(items)) if x[k] is not None and y[k] is not None]
            pairs = [(items[k], float(x[k]), float(y[k])) for k in both]
            d = paired_difference(
                [p[2] for p in pairs], [p[1] for p in pairs], [clusters[k] for k in both], seed=a.spec["seed"]
            )
            mean_a, mean_b = (sum(p[side] for p in pairs) / len(pairs) if pairs else None for side in (1, 2))
            verdict = _verdict(d.low, d.high, score.better, a.meta["model"], b.meta["model"])
            differences.append(Difference(score.metric, mean_a, mean_b, d.value, d.low, d.high, d.n, verdict))
            if score.better == "higher":
                movers[score.metric] = sorted(pairs, key=lambda p: (-abs(p[2] - p[1]), p[0]))[:MOVERS]
        else:
            value = twin.value - score.value if same and None not in (score.value, twin.value) else None
            verdict = "signatures equal" if same else f"signatures differ: {score.signature} and {twin.signature}"
            differences.append(
                Difference(score.metric, score.value, twin.value, value, None, None, min(score.n, twin.n), verdict)
            )
    return Comparison(
        a.meta["model"],
        b.meta["model"],
        len(items),
        num_clusters(clusters),
        a.spec["seed"] == b.spec["seed"],
        tuple(differences),
        dict(list(movers.items())[:1]),
    )


def _verdict(low: float | None, high: float | None, better: str, a: str, b: str) -> str:
    if low is None or high is None:
        return "no interval"
    if low <= 0 <= high:
        return "not distinguishable"
    if better == "none":
        return f"{b} {'higher' if low > 0 else 'lower'}"
    return f"{b if (low > 0) == (better == 'higher') else a} better"


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
