"""What `bench fit` shows: the estimates on the terminal, one self-contained page, figures and files beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import door
from bench.types import Finding

SIZE = (6.4, 4.0)  # inches


def write_finding(finding: Finding, out: Path) -> Path:
    """Writes index.html, fit.json, estimates.csv, figures/ and the finding's own files into `out`; gives the page.

    The same finding gives the same bytes. Raises Error where `out` cannot be written.
    """
    from bench.identity import slug
    from bench.report.figures import render

    drawings = [render(slug(f.name), f.title, f.note, f.rows, SIZE, f.draw) for f in finding.figures]
    estimates = _csv(finding.estimates)
    files = {
        "fit.json": (json.dumps(finding.record, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode(
            "utf-8", "replace"
        ),
        "estimates.csv": estimates,
        **({"table.csv": _csv(finding.table)} if finding.table else {}),
        **finding.files,
        "index.html": _page(finding, drawings, estimates).encode("utf-8", "replace"),
    }
    door.make_folder(out / "figures")
    for drawing in drawings:
        door.replace(out / "figures" / f"{drawing.name}.svg", drawing.svg)
        door.replace(out / "figures" / f"{drawing.name}.csv", drawing.csv)
    for name, data in files.items():
        door.replace(out / name, data)
    return out / "index.html"


def print_finding(finding: Finding) -> None:
    """Warnings to stderr, then estimates, the table and notes to stdout."""
    from bench.text import mask, plain, say

    for warning in finding.warnings:
        say(f"warning: {warning}")
    lines = [finding.about, ""]
    rows = [(str(e["quantity"]), number(e["value"]), _interval(e)) for e in finding.estimates]
    head = ("", "estimate", "95 %")
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(2)]
    for row in [head, *rows] if rows else []:
        lines.append(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]}".rstrip())
    if finding.table:
        lines += ["", *_text_table(finding.table)]
    lines += ["", *finding.notes] if finding.notes else []
    for line in lines:
        print(plain(mask(line)))


def number(value: Any) -> str:
    """Five figures, or a dash."""
    return "–" if value is None else f"{value:.5g}"


def _interval(row: Mapping[str, Any]) -> str:
    return "" if row.get("low") is None else f"{number(row['low'])} to {number(row['high'])}"


def _text_table(rows: Any) -> list[str]:
    names = list(rows[0])
    cells = [[v if isinstance(v, str) else number(v) for v in row.values()] for row in rows]
    widths = [max(len(r[k]) for r in [names, *cells]) for k in range(len(names))]
    return ["  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)).rstrip() for r in [names, *cells]]


def _csv(rows: Any) -> bytes:
    import csv
    import io

    from bench.text import csv_cell

    out = io.StringIO()
    names = list(dict.fromkeys(k for row in rows for k in row))
    writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # a bare carriage return ends a row
    writer.writerow(map(csv_cell, names))
    for row in rows:
        writer.writerow([csv_cell(v) if isinstance(v, str) else v for v in (row.get(k) for k in names)])
    return out.getvalue().encode("utf-8", "surrogatepass")


def _page(finding: Finding, drawings: list[Any], estimates: bytes) -> str:
    from markupsafe import Markup

    from bench.report.html import data_url, environment, policy
    from bench.text import mask

    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return (
        environment()
        .get_template("fitted.html.jinja")
        .render(
            style=Markup(style),
            policy=policy(style, ""),
            title=mask(finding.title),
            about=mask(finding.about),
            warnings=[mask(warning) for warning in finding.warnings],
            notes=[mask(note) for note in finding.notes],
            rows=[
                {"quantity": e["quantity"], "value": number(e["value"]), "interval": _interval(e)}
                for e in finding.estimates
            ],
            names=list(finding.table[0]) if finding.table else [],
            table=[[v if isinstance(v, str) else number(v) for v in row.values()] for row in finding.table],
            drawings=[{"name": d.name, "title": d.title, "note": d.note, "csv": data_url(d.csv)} for d in drawings],
            svg={d.name: Markup(d.inline) for d in drawings},
            estimates=data_url(estimates),
            files=sorted([*finding.files, "fit.json"]),
        )
    )
