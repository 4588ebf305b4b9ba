"""Tables of others: read from CSV, JSON or JSONL, their columns recognised, their cells as numbers."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES: dict[str, tuple[str, ...]] = {  # recognised headings, lower case, separators dropped; the first is the best
    "params": (
        "params",
        "parameters",
        "n",
        "nparams",
        "numparams",
        "parametercount",
        "paramcount",
        "paramsactiveprecise",
        "activeparams",
        "modelparams",
        "modelsize",
        "modelparameters",
    ),
    "tokens": (
        "tokens",
        "d",
        "ntokens",
        "numtokens",
        "totaltokens",
        "traintokens",
        "trainingtokens",
        "tokensseen",
        "datatokens",
    ),
    "flops": (
        "flops",
        "c",
        "compute",
        "computebudget",
        "trainingflops",
        "trainflops",
        "trainingflop",
        "flop",
        "totalflops",
        "totalgflops",
        "computeflops",
    ),
    "loss": (
        "loss",
        "valloss",
        "validationloss",
        "evalloss",
        "finalloss",
        "testloss",
        "macroloss",
        "l",
        "crossentropy",
        "trainloss",
    ),
    "budget": ("budget", "nominalbudget", "flopbudget", "isoflop", "flopsbudget"),
    "run_id": ("runid", "run", "runname", "name"),
    "lr": ("lr", "learningrate", "maxlr", "peaklr"),
    "loss_sd": ("losssd", "lossstd", "losssterr", "lossse"),
    "unique_tokens": ("uniquetokens",),
    "condition": ("condition",),
    "is_final": ("isfinal",),
    "warmup_tokens": ("warmuptokens",),
    "seed": ("seed", "randomseed"),
}
UNITS = {
    "k": 1e3,
    "thousand": 1e3,
    "m": 1e6,
    "million": 1e6,
    "millions": 1e6,
    "b": 1e9,
    "billion": 1e9,
    "billions": 1e9,
    "g": 1e9,
    "t": 1e12,
    "trillion": 1e12,
    "trillions": 1e12,
}
NUMBER = re.compile(r"([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*([kKmMbBgGtT]?)")
LONGEST_CELL = 100_000  # characters
MOST_CELLS = 20_000_000  # what a file may hold


class TableError(ValueError):
    """A table that cannot be used as it is; the message names column, rows and the mend."""


def read_rows(source: str | Path) -> list[dict[str, Any]]:
    """The rows of a CSV, JSON or JSONL file as dictionaries; text is left as it is.

    Delimiters are found (comma, semicolon, tab); a byte-order mark is dropped. JSON is a list of objects or an object
    of columns. Raises TableError naming the file and the line that cannot be read.
    """
    path = Path(source)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise TableError(f"{path}: byte {e.start} is no UTF-8; save it as UTF-8") from None
    except OSError as e:
        raise TableError(f"{path}: {e.strerror or e}") from None
    if not text.strip():
        raise TableError(f"{path} is empty")
    head = text.lstrip()[0]
    if head == "[" or (head == "{" and path.suffix.lower() == ".json"):
        return _from_json(text, path)
    if head == "{":
        return _from_lines(text, path)
    return _from_csv(text, path)


def _from_json(text: str, path: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise TableError(f"{path} is no JSON: {str(e)[:100]}") from None
    if isinstance(value, dict):
        columns = {k: list(v.values()) if isinstance(v, dict) else v for k, v in value.items()}
        lists = {k: v for k, v in columns.items() if isinstance(v, list)}
        if not lists or len({len(v) for v in lists.values()}) > 1:
            raise TableError(f"{path} holds an object whose columns have different lengths; a list of rows is expected")
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise TableError(f"{path} is not a list of objects, one for each training")
    return value


def _from_lines(text: str, path: Path) -> list[dict[str, Any]]:
    rows = []
    for i, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise TableError(f"{path}: line {i} is no JSON object")
        rows.append(row)
    return rows


def _from_csv(text: str, path: Path) -> list[dict[str, Any]]:
    first = text.lstrip("\n").splitlines()[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        lines = [line for line in reader if any(cell.strip() for cell in line)]
    except csv.Error as e:
        raise TableError(f"{path}: {e}") from None
    if not lines:
        raise TableError(f"{path} is empty")
    longest = max(len(cell) for line in lines for cell in line)
    if longest > LONGEST_CELL:  # the limit of the csv module is the process's, whoever set it
        raise TableError(f"{path}: a cell is larger than {LONGEST_CELL:,} characters")
    header = [name.strip() for name in lines[0]]
    if len(header) * len(lines) > MOST_CELLS:
        raise TableError(f"{path} holds more than {MOST_CELLS:,} cells")
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise TableError(f"{path}: the column {brief(sorted(twice)[0])!r} stands twice; rename one")
    if len(lines) < 2:
        raise TableError(f"{path} has a heading and no row")
    for i, line in enumerate(lines[1:], 1):
        if len(line) != len(header):
            raise TableError(f"{path}: row {i} has {len(line)} cells under {len(header)} headings")
    return [dict(zip(header, line, strict=True)) for line in lines[1:]]


def brief(text: str, limit: int = 100) -> str:
    """What a table holds, for a message: its beginning."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listed(names: Sequence[str]) -> str:
    """Names for a message, cut where they are many or long."""
    return brief(", ".join(names), 300)


def _key(heading: str) -> str:
    return re.sub(r"[^a-z0-9]", "", heading.lower())


def _split_unit(heading: str) -> tuple[str, float]:
    """A heading without its unit, and the unit: "tokens (B)" -> ("tokens", 1e9), "params_M" -> ("params", 1e6)."""
    match = re.fullmatch(r"(.*?)\s*[\(\[]\s*([A-Za-z]+)\s*[\)\]]\s*", heading) or re.fullmatch(
        r"(.+)_([A-Za-z]+)", heading
    )
    if match and match.group(2).lower() in UNITS:
        return match.group(1), UNITS[match.group(2).lower()]
    if _key(heading).endswith("gflops"):
        return heading, 1e9
    return heading, 1.0


def recognise(
    headings: Iterable[str], named: Mapping[str, str] | None = None, names: Mapping[str, tuple[str, ...]] = NAMES
) -> dict[str, tuple[str, float]]:
    """Which heading holds what, and in which unit: {"params": ("params_M", 1e6)}.

    `named` maps a name of `names` to a heading and wins. Otherwise the heading whose last path component is the best
    name that `names` lists. Raises TableError where a named heading is absent or two headings fit equally well.
    """
    headings = list(headings)
    found: dict[str, tuple[str, float]] = {}
    for name, heading in (named or {}).items():
        if name not in names:
            raise TableError(f"{name!r} is no column of such a table: {', '.join(names)}")
        if heading not in headings:
            raise TableError(f"there is no column {heading!r}; the columns are {listed(headings)}")
        found[name] = (heading, _split_unit(heading)[1])
    taken = {heading for heading, _ in found.values()}
    for name, accepted in names.items():
        if name in found:
            continue
        ranked = []
        for heading in headings:
            bare, unit = _split_unit(heading)
            key = _key(bare.rsplit("/", 1)[-1])
            if heading not in taken and key in accepted:
                ranked.append((accepted.index(key), heading, unit))
        ranked.sort()
        if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
            raise TableError(
                f"{ranked[0][1]!r} and {ranked[1][1]!r} could both be {name}; say which with {name}=COLUMN"
            )
        if ranked:
            found[name] = (ranked[0][1], ranked[0][2])
            taken.add(ranked[0][1])
    return found


def number(cell: Any) -> float:
    """A cell as a number: 1.5e9, "125M", "1,000,000"; NaN for what is empty; ValueError for what is no number."""
    if cell is None:
        return math.nan
    if isinstance(cell, bool):
        raise ValueError(cell)
    if isinstance(cell, (int, float)):
        try:
            return float(cell)
        except OverflowError:  # JSON has whole numbers of any length
            return math.inf
    text = str(cell).strip()
    if not text or text.lower() in ("nan", "na", "n/a", "null", "none", "-"):
        return math.nan
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    match = NUMBER.fullmatch(text)
    if not match:
        raise ValueError(text)
    return float(match.group(1)) * UNITS.get(match.group(2).lower(), 1.0)
