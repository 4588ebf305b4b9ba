"""From the records of a run to its scores."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from bench import door, registry
from bench.prepare import set_digest
from bench.scores import dump_scores
from bench.store import Run
from bench.suite import Suite
from bench.types import Error, Score


def derive(run: Run, suite: Suite) -> list[Score]:
    """Reduces the records to scores.csv; again when another shard appended meanwhile."""
    while True:
        seen = run.sizes()
        table = run.table()
        _check_items(run, table)
        found = suite.score(table)
        for metric in later_metrics(run):
            found += [s for name, part in suite._parts(table) for s in suite._reduce(metric, name, part)]
        found = [replace(s, run=run.id, model=run.meta["model"]) for s in _flagged(map(_finite, found), table)]
        path = run.path / "scores.csv"
        if not path.is_file() or path.read_bytes() != dump_scores(found):
            run.save_scores(found)
        for name, data in suite.artifacts(table):
            door.make_folder(run.path / "artifacts")
            door.replace(run.path / "artifacts" / name, data)
        if run.sizes() == seen:
            return found


def _check_items(run: Run, table: Any) -> None:
    """Raises Error where the shards together hold an item twice, or one that was never planned."""
    expected = run.meta.get("items_digest")
    if expected is None or len(table) < table.expected:
        return  # begun by an earlier version, or not finished
    if set_digest(row["item"] for row in table.rows) != expected:
        raise Error(
            f"{run.id} holds {len(table):,} rows that are not the {table.expected:,} items planned",
            hint="some stand twice or come from elsewhere: --fresh measures again",
        )


def _finite(score: Score) -> Score:
    """No NaN and no infinity is stored: they become null, and the note says so."""
    bad = [n for n in ("value", "low", "high") if (v := getattr(score, n)) is not None and not math.isfinite(v)]
    if not bad:
        return score
    gone = {n: None for n in bad} if "value" not in bad else {"value": None, "low": None, "high": None}
    return replace(score, **gone, complete=False, note=score.note or f"{' and '.join(bad)} not finite")


def _flagged(scores: Iterable[Score], table: Any) -> list[Score]:
    """Scores over pictures some of which are one flat colour say so: a broken model may give such, and score well."""
    flat = sum("flat" in row for row in table.rows)
    if not flat or len(table) < table.expected:  # a note would say that nothing is missing
        return list(scores)
    note = f"{flat:,} picture{' is' if flat == 1 else 's are'} one flat colour"
    return [replace(s, note="; ".join(n for n in (s.note, note) if n)) if s.complete else s for s in scores]


def later_metrics(run: Run) -> list[Any]:
    """The metrics that `rescore --metric` added to a run."""
    from bench.records import read_lines
    from bench.rescore import open_metric

    names = []
    for path in sorted((run.path / "extra").glob("*.jsonl")):
        names += [v["metric"] for v in read_lines(path)[0] if v.get("metric")]
    return [open_metric(name) for name in dict.fromkeys(names)]


def suite_of(run: Run) -> Suite:
    """The suite that a run was measured with, from what run.json says of it."""
    cls = registry.find("suites", run.meta["suite_ref"])
    if cls.version != run.spec["suite_version"]:
        raise Error(
            f"{run.id} is of {cls.name} version {run.spec['suite_version']}; this is version {cls.version}",
            hint="score again: old records are not reused",
        )
    from bench.config import convert, field_types

    kinds, given = field_types(cls), run.meta["suite_fields"]
    unknown = sorted(given.keys() - kinds.keys())
    if unknown:
        raise Error(f"{run.id} was measured with {unknown[0]}, which {cls.name} no longer has", hint="score again")
    return cls(**{k: convert(v, kinds[k], k) if v is not None else None for k, v in given.items()})
