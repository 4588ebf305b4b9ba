"""scores.csv: written so that it reads back exactly, read with every fault named."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.text import csv_cell, csv_line, csv_value
from bench.types import Error, Score

COLUMNS = tuple(f.name for f in fields(Score))
LONGEST_CELL = 1 << 24  # characters; csv's own limit is less than a prompt may have that names a slice


def dump_scores(scores: Iterable[Score]) -> bytes:
    """scores.csv: one score a line, floats that read back exactly, text that no spreadsheet computes."""
    rows: list[Sequence[str]] = [COLUMNS]
    for score in scores:
        values = [getattr(score, name) for name in COLUMNS]
        rows.append([csv_cell(v) if isinstance(v, str) else _cell(v) for v in values])
    return "".join(map(csv_line, rows)).encode("utf-8", "surrogatepass")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def parse_scores(data: bytes, where: Path | str = "scores.csv") -> list[Score]:
    """What dump_scores wrote; raises Error naming file and line. Columns that are missing take their default."""
    convert = {
        "int": int,
        "bool": lambda t: {"true": True, "false": False}[t],
        "float | None": lambda t: float(t) if t else None,
        "str": csv_value,
    }
    kinds = {f.name: convert[str(f.type)] for f in fields(Score)}
    scores: list[Score] = []
    reader = csv.DictReader(())
    csv.field_size_limit(LONGEST_CELL)
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogatepass")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            scores.append(Score(**{k: kinds[k](v) for k, v in row.items() if k in kinds}))
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as e:
        hint = "it must have the columns " + ", ".join(COLUMNS)
        raise Error(f"{where} line {reader.line_num}: {type(e).__name__}: {str(e)[:200]}", hint=hint) from None
    return scores
