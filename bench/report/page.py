"""Renders a board: one self-contained page and the files beside it. The same scores give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import door
from bench.report import figures, gallery, rank, tables, views
from bench.report.board import Board, read_board
from bench.report.collect import (
    SUMS,
    Collection,
    collect,
    dump_pairs,
    dump_runs,
    listed,
    sums,
)
from bench.report.html import data_url, environment, policy
from bench.report.numbers import count, digits_for, interval, number, rank_text
from bench.types import Error

MOST_TRACE = 8000  # characters of a trace or command


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
        parts = [count(self.models, "model"), count(self.metrics, "metric")]
        parts += [f"{count(self.partial, 'partial run')} left out"] if self.partial else []
        parts += [f"{count(self.limited, 'run')} with a limit left out"] if self.limited else []
        parts += [f"{count(self.cited, 'cited number')}"] if self.cited else []
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
            + (f", {count(left, 'partial or limited run')} left out" if left else ""),
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
    from bench.scores import dump_scores

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
    for text, (labels, titles) in views.said_of(found).items():
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
            chips=views.chips_of(found),
            columns=views.columns_of(found),
            rows=views.rows_of(found, places, bold),
            ranked=found.board.rank is not None,
            overall=views.overall_of(found),
            notes=[{"text": text, "labels": labels} for text, (labels, _) in views.said_of(found).items()],
            drawings=[{"name": d.name, "title": d.title, "note": d.note, "csv": data_url(d.csv)} for d in drawings],
            slices=views.slices_of(found),
            apart=views.apart_of(found),
            published=views.published_of(found.cited),
            gallery=views.gallery_of(found, tiles),
            failures=[(f, entry) for f in views.all_facts(found) for entry in f.failures],
            protocol=views.protocol_of(found),
            scores_url=data_url(scores_csv),
            lines=lambda text: mask(str(text)[:MOST_TRACE]).splitlines(),
            gain=gallery.GAIN,
        )
    )
