"""Renders a board: one self-contained page and the files beside it. The same scores give the same bytes."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import door
from bench.identity import without_copy
from bench.report import figures, gallery, rank, tables
from bench.report.board import Board, Column, read_board
from bench.report.collect import (
    SUMS,
    Apart,
    Cell,
    Collection,
    Facts,
    collect,
    dump_pairs,
    dump_runs,
    listed,
    most_common,
    sums,
)
from bench.types import Error, Score

STRIP = 72  # px, width of the little interval in a cell
STRIPS = 200  # rows; longer tables go without them
MOST_TRACE = 8000  # characters of a trace or command
LONGEST = 4000  # characters of one text on the page
INLINE_CSV = 1 << 19  # bytes; larger files are named, not linked


@dataclass(frozen=True)
class Summary:
    """What `bench leaderboard` says on its one line."""

    page: Path
    models: int
    metrics: int
    partial: int  # runs left out
    limited: int
    cited: int  # numbers from elsewhere

    def __str__(self) -> str:
        parts = [_count(self.models, "model"), _count(self.metrics, "metric")]
        parts += [f"{_count(self.partial, 'partial run')} left out"] if self.partial else []
        parts += [f"{_count(self.limited, 'run')} with a limit left out"] if self.limited else []
        parts += [f"{_count(self.cited, 'cited number')}"] if self.cited else []
        return f"{self.page}   " + ", ".join(parts)


def render(board: str | Path | Board, store: Any = None, out: Path | None = None) -> Summary:
    """Writes index.html, scores.csv, pairs.csv, runs.json, SHA256SUMS, tables/ and figures/ into `out`.

    `board` is a board file; `store` a Store, or None in a clone; `out` is `reports/<board name>` unless given.
    Raises Error where the board or a source cannot be read, and where nothing at all is selected.
    """
    board = board if isinstance(board, Board) else read_board(Path(board))
    out = Path(out) if out is not None else Path("reports") / board.name
    found = collect(board, store, out)
    if not found.rows and not found.apart and not found.cited:
        left = len(found.partial) + len(found.limited)
        raise Error(
            f"board {board.name}: nothing to show"
            + (f", {_count(left, 'partial or limited run')} left out" if left else ""),
            hint=f"score a model first: bench score {board.column[0].suite} --model MODEL",
        )
    files = draw(found)
    door.make_folder(out)
    for old in listed(out):  # what an earlier page drew and this one does not; nothing else
        if old not in files and old.startswith(("figures/", "tables/")):
            (out / old).unlink(missing_ok=True)
    for name, data in files.items():
        door.make_folder((out / name).parent)
        door.replace(out / name, data)
    shown = [c for row in found.rows for c in row.cells if c]
    return Summary(
        out / "index.html",
        len(found.rows),
        len({(c.score.suite, c.score.metric) for c in shown}),
        len(found.partial) if board.select.complete else 0,
        len(found.limited),
        len(found.cited),
    )


def draw(found: Collection) -> dict[str, bytes]:
    """Every file of the board by its relative name; nothing is written."""
    from bench.store import dump_scores

    board = found.board
    differences = rank.Differences(found)
    places = _ranks(found, differences)
    order = sorted(
        range(len(found.rows)), key=lambda i: (places[i] is None, places[i] or (0, 0), _value_order(found, i), i)
    )
    found.rows = [found.rows[i] for i in order]
    places = [places[i] for i in order]
    bold = _bold(found, differences)
    drawings = figures.draw_all(found, [r.label for r in found.rows], differences)
    runs = list(dict.fromkeys(c.score.run for row in found.rows for c in row.cells if c))
    tiles = gallery.tiles(found, runs, board.gallery.items, found.kept.get("tiles", {}))
    scores = sorted(found.scores, key=lambda s: s.run)  # stable: within a run as the suite gave them
    files = {
        "scores.csv": dump_scores([*scores, *found.cited]),
        "pairs.csv": dump_pairs(differences.pairs),
        "runs.json": dump_runs(found, tiles),
    }
    for d in drawings:
        files[f"figures/{d.name}.svg"], files[f"figures/{d.name}.csv"] = d.svg, d.csv
    head, body = _plain_table(found, places)
    note = (
        f"{board.title}. 95 % intervals. Models share a rank where the paired interval of their difference covers zero."
    )
    for text, (labels, titles) in _said(found).items():
        of = "" if len(labels) == len(found.rows) else f" of {', '.join(labels)}"
        note += f" {', '.join(titles)}{of}: {text}."
    marked = {(r, c + 2) for r, c in bold}
    files[f"tables/{board.name}.md"] = tables.markdown(head, body, marked, note).encode()
    files[f"tables/{board.name}.tex"] = tables.latex(head, body, marked, note).encode()
    files[SUMS] = sums(files)
    files["index.html"] = _html(found, places, bold, drawings, tiles, files["scores.csv"]).encode("utf-8", "replace")
    return files


# -- order and marks


def _rank_column(board: Board) -> int | None:
    return [c.key for c in board.column].index(board.rank.by) if board.rank else None


def _ranks(found: Collection, differences: rank.Differences) -> list[tuple[int, int] | None]:
    i = _rank_column(found.board)
    if i is None:
        return [None] * len(found.rows)
    return rank.ranks(differences, found.board.column[i].key, [r.cells[i] for r in found.rows])


def _value_order(found: Collection, row: int) -> float:
    i = _rank_column(found.board)
    cell = None if i is None else found.rows[row].cells[i]
    if cell is None or cell.score.value is None:
        return math.inf if i is not None else 0.0
    return -cell.score.value if cell.score.better == "higher" else cell.score.value


def _bold(found: Collection, differences: rank.Differences) -> set[tuple[int, int]]:
    """(row, column) of the values that are distinguishably the best of their column."""
    marked = set()
    for i, column in enumerate(found.board.column):
        place = rank.best(differences, column.key, [r.cells[i] for r in found.rows])
        if place is not None:
            marked.add((place, i))
    return marked


# -- numbers as text


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}" + ("" if n == 1 else "s")


def number(value: float, digits: int) -> str:
    """Fixed digits with a real minus sign; what is too large or small for them in scientific form."""
    if value and (abs(value) >= 1e7 or (abs(value) < 0.5 * 10.0**-digits and abs(value) < 1e-4)):
        return f"{value:.{max(digits, 1)}e}".replace("-", "−")
    text = f"{value:,.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else f"{0:.{digits}f}"


def digits_for(column: Column, cells: Sequence[Cell | None]) -> int:
    """As the board says, else two significant digits of the median half-width, else three of the values."""
    if column.digits is not None:
        return column.digits
    scores = [c.score for c in cells if c is not None and c.score.value is not None]
    widths = sorted((s.high - s.low) / 2 for s in scores if s.low is not None and s.high is not None and s.high > s.low)
    values = sorted(abs(s.value) for s in scores if s.value)
    if widths:
        return min(6, max(0, 1 - math.floor(math.log10(widths[len(widths) // 2]))))
    return min(6, max(0, 2 - math.floor(math.log10(values[len(values) // 2])))) if values else 2


def interval(score: Score, digits: int) -> str:
    """`±0.72` where both sides are equal to the digits shown, else `30.96–32.41`; empty without an interval."""
    if score.value is None or score.low is None or score.high is None:
        return ""
    below, above = score.value - score.low, score.high - score.value
    width = max(below, above)
    if abs(below - above) < 0.5 * 10.0**-digits and min(below, above) >= 0:
        hidden = 0 < width < 0.5 * 10.0**-digits  # then one significant digit says more than a row of zeros
        more = min(9, -int(f"{width:.0e}".partition("e")[2])) if hidden else digits
        return "±" + number(width, more)
    return f"{number(score.low, digits)}–{number(score.high, digits)}"


def rank_text(place: tuple[int, int] | None) -> str:
    if place is None:
        return ""
    return str(place[0]) if place[0] == place[1] else f"{place[0]}–{place[1]}"


def _plain_table(found: Collection, places: Sequence[tuple[int, int] | None]) -> tuple[list[str], list[list[str]]]:
    head, body = ["rank", "model"], [[rank_text(p), r.label] for p, r in zip(places, found.rows, strict=True)]
    for i, column in enumerate(found.board.column):
        cells = [r.cells[i] for r in found.rows]
        digits = digits_for(column, cells)
        first = next((c for c in cells if c), None)
        unit = f" ({first.score.unit})" if first and first.score.unit not in ("", "1") else ""
        head.append(
            column.title + unit + ({"higher": " ↑", "lower": " ↓"}.get(first.score.better, "") if first else "")
        )
        for row, cell in zip(body, cells, strict=True):
            if cell is None or cell.score.value is None:
                row.append("")
                continue
            spread = interval(cell.score, digits)
            row.append(number(cell.score.value, digits) + (f" {spread}" if spread else ""))
    return head, body


# -- the page


def _html(
    found: Collection,
    places: Sequence[tuple[int, int] | None],
    bold: set[tuple[int, int]],
    drawings: Sequence[figures.Drawing],
    tiles: Mapping[str, Any],
    scores_csv: bytes,
) -> str:
    from markupsafe import Markup

    from bench.text import mask

    here = Path(__file__).parent
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # All that reaches the page unescaped: our own style and script, and drawings whose text was escaped on writing.
    trusted = {"style": Markup(style), "script": Markup(script), "svg": {d.name: Markup(d.inline) for d in drawings}}
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            **trusted,
            policy=policy(style, script),
            board=found.board,
            chips=_chips(found),
            columns=_columns(found),
            rows=_rows(found, places, bold),
            ranked=found.board.rank is not None,
            overall=_overall(found),
            notes=[{"text": text, "labels": labels} for text, (labels, _) in _said(found).items()],
            drawings=[{"name": d.name, "title": d.title, "note": d.note, "csv": data_url(d.csv)} for d in drawings],
            slices=_slices(found),
            apart=_apart(found),
            published=_published(found.cited),
            gallery=_gallery(found, tiles),
            failures=[(f, entry) for f in _all_facts(found) for entry in f.failures],
            protocol=_protocol(found),
            scores_url=data_url(scores_csv),
            lines=lambda text: mask(str(text)[:MOST_TRACE]).splitlines(),
            gain=gallery.GAIN,
        )
    )


def environment() -> Any:
    """The templates beside this file; whatever they print is escaped, unknown names are errors."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from bench.text import plain

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize(plain),
    )


def _finalize(plain: Any) -> Any:
    """Strings that the template prints lose control characters and excess length; markup of our own passes."""

    def show(value: Any) -> Any:
        if type(value) is not str:
            return value
        whole = len(value) <= LONGEST or value.startswith("data:")
        return plain(value if whole else value[:LONGEST] + "…")

    return show


def policy(style: str, script: str) -> str:
    """The content security policy: nothing from anywhere but this file; an empty script allows none."""
    hashes = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def data_url(data: bytes) -> str:
    return "data:text/csv;base64," + base64.b64encode(data).decode() if len(data) <= INLINE_CSV else ""


def _all_facts(found: Collection) -> list[Facts]:
    return [found.facts[k] for k in sorted(found.facts)]


def _chips(found: Collection) -> list[str]:
    chips = [_count(len(found.rows), "model")]
    cells = [c for row in found.rows for c in row.cells if c]
    partial = {c.score.run for c in cells if not c.score.complete}
    if cells:
        chips.append(f"{_count(len(partial), 'partial run')} shown, unranked" if partial else "all complete")
    if found.board.select.complete and found.partial:
        chips.append(f"{_count(len(found.partial), 'partial run')} left out")
    if found.limited:
        chips.append(f"{_count(len(found.limited), 'run')} with a limit left out")
    if found.cited:
        chips.append(f"{_count(len({(s.model, s.source, s.slice) for s in found.cited}), 'published result')}, apart")
    return chips


def _said(found: Collection) -> dict[str, tuple[list[str], list[str]]]:
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


def _columns(found: Collection) -> list[dict[str, Any]]:
    overall = _overall(found)
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


def _overall(found: Collection) -> dict[str, Any] | None:
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


def _rows(
    found: Collection, places: Sequence[tuple[int, int] | None], bold: set[tuple[int, int]]
) -> list[dict[str, Any]]:
    digits, spans = [], []
    for i, column in enumerate(found.board.column):
        cells = [r.cells[i] for r in found.rows]
        digits.append(digits_for(column, cells))
        spans.append(_extent(cells) if len(found.rows) <= STRIPS else None)
    palette = figures.palette([r.label for r in found.rows])
    numbers = {text: i for i, text in enumerate(_said(found), 1)}
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


def _slices(found: Collection) -> list[dict[str, Any]]:
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


def _apart(found: Collection) -> list[dict[str, Any]]:
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


def _published(cited: Sequence[Score]) -> list[dict[str, Any]]:
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
            (source, m): _decimals([s for s in scores if s.source == source and s.metric == m])
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


def _decimals(scores: Sequence[Score]) -> int:
    """Digits after the point as a source printed them: those of its longest number, as 1.00 is read as 1.0."""
    return max((len(f"{s.value:.10f}".rstrip("0").partition(".")[2]) for s in scores if s.value is not None), default=0)


def _gallery(found: Collection, tiles: Mapping[str, Any]) -> dict[str, Any]:
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


def _protocol(found: Collection) -> dict[str, Any]:
    shown = {c.score.run for row in found.rows for c in row.cells if c} | {
        c.score.run for e in found.apart for c in e.cells if c
    }
    facts = [f for f in _all_facts(found) if f.run in shown]
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
        environments.setdefault(_environment(f), []).append(f)
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
    from bench.identity import canonical

    return value if isinstance(value, str) else canonical(value)


def _commit(f: Facts) -> str:
    commit = str(f.git.get("commit", "") or "")[:10]
    return commit + ("+" if commit and f.git.get("dirty") else "")


def _environment(f: Facts) -> str:
    """Machine and versions in one line; runs that share it are listed together."""
    machine = [f"{k} {_short(v)}" for k, v in sorted(f.machine.items()) if v not in (None, "", [], {})]
    packages = [f"{k} {_short(v)}" for k, v in sorted(f.packages.items()) if v not in (None, "", [], {})]
    return " · ".join([*machine, *packages]) or "not recorded"
