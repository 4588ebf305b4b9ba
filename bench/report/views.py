"""The parts of a board's page as its template wants them: text, numbers and lists, nothing left to decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.identity import canonical, without_copy
from bench.report import figures, gallery
from bench.report.collect import Apart, Cell, Collection, Facts, most_common
from bench.report.numbers import count, decimals, digits_for, interval, number, rank_text
from bench.types import Score

STRIP = 72  # px, width of the little interval in a cell
STRIPS = 200  # rows; longer tables go without them


def all_facts(found: Collection) -> list[Facts]:
    return [found.facts[k] for k in sorted(found.facts)]


def chips_of(found: Collection) -> list[str]:
    chips = [count(len(found.rows), "model")]
    cells = [c for row in found.rows for c in row.cells if c]
    partial = {c.score.run for c in cells if not c.score.complete}
    if cells:
        chips.append(f"{count(len(partial), 'partial run')} shown, unranked" if partial else "all complete")
    if found.board.select.complete and found.partial:
        chips.append(f"{count(len(found.partial), 'partial run')} left out")
    if found.limited:
        chips.append(f"{count(len(found.limited), 'run')} with a limit left out")
    if found.cited:
        chips.append(f"{count(len({(s.model, s.source, s.slice) for s in found.cited}), 'published result')}, apart")
    return chips


def said_of(found: Collection) -> dict[str, tuple[list[str], list[str]]]:
    """What is said of values of the table, of which models and columns; in the order in which it first stands there."""
    said: dict[str, tuple[list[str], list[str]]] = {}
    for row in found.rows:
        for column, cell in zip(found.board.column, row.cells, strict=True):
            for text in _remarks(cell):
                for names, name in zip(said.setdefault(text, ([], [])), (row.label, column.title), strict=True):
                    if name not in names:
                        names.append(name)
    return said


def _remarks(cell: Cell | None) -> list[str]:
    """The parts of the note of a value; that of a value withheld stands in its cell."""
    return [t for t in cell.score.note.split("; ") if t] if cell and cell.score.value is not None else []


def columns_of(found: Collection) -> list[dict[str, Any]]:
    overall = overall_of(found)
    columns = []
    for i, column in enumerate(found.board.column):
        scores = [r.cells[i].score for r in found.rows if r.cells[i]]
        first = scores[0] if scores else None
        ns = sorted({s.n for s in scores})
        n = (
            ""
            if not ns or (overall and ns == [overall["n"]])
            else f"n {ns[0]:,}"
            if len(ns) == 1
            else f"n {ns[0]:,} to {ns[-1]:,}"
        )
        columns.append(
            {
                "title": column.title,
                "key": column.key,
                "unit": first.unit if first and first.unit != "1" else "",
                "arrow": {"higher": "↑", "lower": "↓"}.get(first.better, "") if first else "",
                "better": {"higher": "higher is better", "lower": "lower is better"}.get(first.better, "")
                if first
                else "",
                "n": n,
                "by": bool(found.board.rank and found.board.rank.by == column.key),
            }
        )
    return columns


def overall_of(found: Collection) -> dict[str, Any] | None:
    """The number of items and clusters when it is one for most of the page."""
    scores = [
        c.score for row in found.rows for c in row.cells if c and c.score.value is not None and c.score.slice == "all"
    ]
    if not scores:
        return None
    n = int(most_common(str(s.n) for s in scores))
    facts = [found.facts[s.run] for s in scores if s.n == n]
    clusters = {_clusters(f, n) for f in facts}
    return {"n": n, "clusters": clusters.pop() if len(clusters) == 1 else None}


def _clusters(facts: Facts, n: int) -> int | None:
    """Those of the one manifest whose items the scores are of."""
    counts = [m.get("clusters") for m in facts.manifests if m.get("items", n) == n]
    return counts[0] if len(counts) == len(facts.manifests) == 1 and isinstance(counts[0], int) else None


def rows_of(
    found: Collection, places: Sequence[tuple[int, int] | None], bold: set[tuple[int, int]]
) -> list[dict[str, Any]]:
    digits, spans = [], []
    for i, column in enumerate(found.board.column):
        cells = [r.cells[i] for r in found.rows]
        digits.append(digits_for(column, cells))
        spans.append(_extent(cells) if len(found.rows) <= STRIPS else None)
    palette = figures.palette([r.label for r in found.rows])
    numbers = {text: i for i, text in enumerate(said_of(found), 1)}
    return [
        {
            "label": row.label,
            "rank": rank_text(place),
            "order": place[0] + place[1] / 1e6 if place else "",
            "colour": figures.ROLES[palette[figures.family(row.label)][0]],
            "cells": [
                _view(cell, digits[i], (r, i) in bold, spans[i], [numbers[t] for t in _remarks(cell)]) if cell else None
                for i, cell in enumerate(row.cells)
            ],
        }
        for r, (row, place) in enumerate(zip(found.rows, places, strict=True))
    ]


def _extent(cells: Sequence[Cell | None]) -> tuple[float, float] | None:
    values = [v for c in cells if c for v in (c.score.value, c.score.low, c.score.high) if v is not None]
    return (min(values), max(values)) if values and min(values) < max(values) else None


def _view(
    cell: Cell,
    digits: int,
    bold: bool = False,
    extent: tuple[float, float] | None = None,
    marks: Sequence[int] = (),
) -> dict[str, Any]:
    s = cell.score
    view = {
        "value": None if s.value is None else number(s.value, digits),
        "sort": "" if s.value is None else repr(s.value),
        "interval": interval(s, digits),
        "bold": bold,
        "note": s.note,
        "marks": ", ".join(map(str, marks)),
        "partial": "" if s.complete else f"{s.n:,} of {s.expected:,}",
        "strip": None,
    }
    if extent and s.value is not None:
        scale = (STRIP - 6) / (extent[1] - extent[0])
        low, high = (s.value if v is None else v for v in (s.low, s.high))
        x0, x, x1 = (f"{3 + (v - extent[0]) * scale:.1f}" for v in (low, s.value, high))
        view["strip"] = {"x0": x0, "x": x, "x1": x1}
    return view


def slices_of(found: Collection) -> list[dict[str, Any]]:
    """For each column over all items, the same metric over the slices that its suite knows."""
    entity = {c.score.run: row.label for row in found.rows for c in row.cells if c}
    order = {row.label: i for i, row in enumerate(found.rows)}
    by: dict[tuple[str, str], list[Score]] = {}
    for s in found.scores:
        if s.slice != "all" and s.run in entity:
            by.setdefault((s.suite, s.metric), []).append(s)
    tables_ = []
    for column in found.board.column:
        scores = by.get((column.suite, column.metric), []) if column.slice == "all" else []
        names = sorted({s.slice for s in scores})
        if not names:
            continue
        cells = {(entity[s.run], s.slice): Cell(s, found.facts[s.run]) for s in scores}
        digits = digits_for(column, list(cells.values()))
        labels = sorted({label for label, _ in cells}, key=lambda k: order[k])
        tables_.append(
            {
                "title": column.title,
                "open": column.key == found.board.rank.by if found.board.rank else not tables_,
                "unit": scores[0].unit if scores[0].unit != "1" else "",
                "arrow": {"higher": "↑", "lower": "↓"}.get(scores[0].better, ""),
                "names": names,
                "counts": [sorted({s.n for s in scores if s.slice == n}) for n in names],
                "rows": [
                    {"label": k, "cells": [_view(cells[k, n], digits) if (k, n) in cells else None for n in names]}
                    for k in labels
                ],
            }
        )
    return tables_


def apart_of(found: Collection) -> list[dict[str, Any]]:
    """Blocks by reason, each with the columns that its rows fill."""
    groups: dict[str, list[Apart]] = {}
    for entry in found.apart:
        groups.setdefault(entry.reason, []).append(entry)
    blocks = []
    for reason, entries in sorted(groups.items()):
        used = [i for i in range(len(found.board.column)) if any(e.cells[i] for e in entries)]
        digits = {i: digits_for(found.board.column[i], [e.cells[i] for e in entries]) for i in used}
        blocks.append(
            {
                "reason": reason,
                "titles": [found.board.column[i].title for i in used],
                "rows": [
                    {"label": e.label, "cells": [_view(c, digits[i]) if (c := e.cells[i]) else None for i in used]}
                    for e in entries
                ],
            }
        )
    return blocks


def published_of(cited: Sequence[Score]) -> list[dict[str, Any]]:
    """One table per data and protocol (the slice), a row per model and source, a footnote per source."""
    groups: dict[str, list[Score]] = {}
    for s in cited:
        groups.setdefault(s.slice, []).append(s)
    blocks = []
    for slice_, scores in groups.items():
        metrics = sorted({s.metric for s in scores}, key=lambda m: (-sum(s.metric == m for s in scores), m))
        sources = list(dict.fromkeys(s.source for s in scores))
        rows: dict[tuple[str, str], dict[str, Score]] = {}
        for s in scores:
            rows.setdefault((s.model, s.source), {})[s.metric] = s
        example = {s.metric: s for s in scores}
        digits = {
            (source, m): decimals([s for s in scores if s.source == source and s.metric == m])
            for source in sources
            for m in metrics
        }
        blocks.append(
            {
                "slice": slice_,
                "metrics": [
                    {"name": m, "arrow": {"higher": "↑", "lower": "↓"}.get(example[m].better, "")} for m in metrics
                ],
                "rows": [
                    {
                        "label": model,
                        "note": next(iter(values.values())).note,
                        "source": sources.index(source) + 1,
                        "cells": [_cited(values.get(m), digits[source, m]) for m in metrics],
                    }
                    for (model, source), values in rows.items()
                ],
                "sources": [
                    {
                        "text": source,
                        "signatures": list(
                            dict.fromkeys(s.signature for s in scores if s.source == source and s.signature)
                        ),
                    }
                    for source in sources
                ],
            }
        )
    return blocks


def _cited(score: Score | None, digits: int) -> dict[str, str]:
    if score is None or score.value is None:
        return {"value": "", "sort": ""}
    return {"value": number(score.value, digits), "sort": repr(score.value)}


def gallery_of(found: Collection, tiles: Mapping[str, Any]) -> dict[str, Any]:
    runs = list(tiles)
    items = list(dict.fromkeys(i for r in runs for i in tiles[r]))
    label = {c.score.run: row.label for row in found.rows for c in row.cells if c}
    withheld = sorted({label[r] for r in label if not gallery.may_show(found.facts[r])})
    prompts = {without_copy(i): t["text"] for r in runs for i, t in tiles[r].items() if "text" in t}
    return {
        "prompts": _prompts_by_seed(prompts, tiles),
        "names": [label.get(r, r) for r in runs],
        "items": [
            {
                "id": item,
                "original": next(
                    (tiles[r][item]["original"] for r in runs if "original" in tiles[r].get(item, {})), ""
                ),
                "outputs": [
                    {"label": label.get(r, r), "output": t.get("output", ""), "difference": t.get("difference", "")}
                    for r in runs
                    if (t := tiles[r].get(item))
                ],
            }
            for item in items
            if without_copy(item) not in prompts
        ],
        "models": len(runs),
        "of": len(found.rows),
        "blurred": any(found.facts[r].sensitive for r in runs),
        "withheld": withheld,
    }


def _prompts_by_seed(prompts: Mapping[str, str], tiles: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each prompt: for each model its pictures, one of each seed, "" where one is missing."""
    rows = []
    for name, text in prompts.items():
        copies = sorted({i for shown in tiles.values() for i in shown if without_copy(i) == name})
        drawn = [[shown.get(i, {}).get("output", "") for i in copies] for shown in tiles.values()]
        rows.append({"text": text, "drawn": drawn})
    return rows


def protocol_of(found: Collection) -> dict[str, Any]:
    shown = {c.score.run for row in found.rows for c in row.cells if c} | {
        c.score.run for e in found.apart for c in e.cells if c
    }
    facts = [f for f in all_facts(found) if f.run in shown]
    columns = []
    for i, column in enumerate(found.board.column):
        scores = [r.cells[i].score for r in found.rows if r.cells[i]]
        if scores:
            columns.append(
                {
                    "title": column.title,
                    "signature": scores[0].signature,
                    "method": most_common(s.method for s in scores),
                }
            )
    groups: dict[str, list[Facts]] = {}
    for f in facts:
        groups.setdefault(f.protocol, []).append(f)
    environments: dict[str, list[Facts]] = {}
    for f in facts:
        environments.setdefault(_machine(f), []).append(f)
    return {
        "columns": columns,
        "suites": [
            {
                "name": g[0].suite,
                "version": g[0].suite_version,
                "fields": [(k, _short(v)) for k, v in sorted(g[0].fields.items())],
                "manifests": [_manifest(m) for m in g[0].manifests],
                "runs": len(g),
                "seeds": sorted({f.seed for f in g}),
            }
            for g in groups.values()
        ],
        "runs": [
            {
                "id": f.run,
                "model": f.model,
                "seed": f.seed,
                "started": f.started,
                "commit": _commit(f),
                "command": f.command,
            }
            for f in facts
        ],
        "environments": [{"text": text, "runs": [f.run for f in group]} for text, group in environments.items()],
    }


def _manifest(m: Mapping[str, Any]) -> dict[str, str]:
    return {
        "name": str(m.get("name", "")),
        "digest": str(m.get("digest", ""))[:16],
        "license": str(m.get("license", "") or "not stated"),
        "items": f"{m['items']:,}" if isinstance(m.get("items"), int) else "",
        "clusters": f"{m['clusters']:,}" if isinstance(m.get("clusters"), int) else "",
        "shown": "yes" if m.get("redistribute") is True else "no",
    }


def _short(value: Any) -> str:
    return value if isinstance(value, str) else canonical(value)


def _commit(f: Facts) -> str:
    commit = str(f.git.get("commit", "") or "")[:10]
    return commit + ("+" if commit and f.git.get("dirty") else "")


def _machine(f: Facts) -> str:
    """Machine and versions in one line; runs that share it are listed together."""
    machine = [f"{k} {_short(v)}" for k, v in sorted(f.machine.items()) if v not in (None, "", [], {})]
    packages = [f"{k} {_short(v)}" for k, v in sorted(f.packages.items()) if v not in (None, "", [], {})]
    return " · ".join([*machine, *packages]) or "not recorded"
