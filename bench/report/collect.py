"""What a board stands on: scores from the store and from CSV files, facts of each run, and what may be compared.

Beside its page a board keeps `scores.csv`, `pairs.csv` and `runs.json`, and their digests in `SHA256SUMS`. A clone
without a store draws the same page from them. Rows of any other CSV file are cited, whatever they say of themselves.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bench.identity import digest
from bench.report.board import Board
from bench.types import Error, Estimate, Score

SUMS = "SHA256SUMS"
LABEL = 80  # characters of a model's label that are shown
KEPT = ("scores.csv", "pairs.csv", "runs.json")  # what a page can be drawn from again


@dataclass(frozen=True)
class Facts:
    """What the page says of a run beyond its scores; one entry of runs.json."""

    run: str
    suite: str
    suite_version: int
    model: str
    seed: int
    fields: Mapping[str, Any]
    data: Any
    adapter: str
    adapter_args: Mapping[str, Any]
    manifests: Sequence[Mapping[str, Any]] = ()
    sensitive: bool = True
    redistribute: bool = False
    limit: Any = None
    command: str = ""
    git: Mapping[str, Any] = field(default_factory=dict)
    packages: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    started: str = ""
    failures: Sequence[Mapping[str, Any]] = ()  # kind, count, unit, message, trace

    @property
    def protocol(self) -> str:
        """Runs of one protocol may stand in one column: same suite version, fields and data."""
        manifests = sorted(str(m.get("digest", m.get("name"))) for m in self.manifests)
        return digest([self.suite, self.suite_version, self.fields, self.data, manifests])

    @property
    def entity(self) -> str:
        """The row of the table: the same model with the same weights and the same root seed."""
        return digest([self.model, self.seed, self.adapter, self.adapter_args])


@dataclass(frozen=True)
class Cell:
    """A score of a run whose facts are known."""

    score: Score
    facts: Facts
    ranked: bool = True  # measured, over all items, with a value


@dataclass
class Row:
    """One model: a cell per column, or None."""

    label: str
    cells: list[Cell | None]


@dataclass
class Apart:
    """Scores that no column takes, and why."""

    label: str
    reason: str
    cells: list[Cell | None]


@dataclass
class Collection:
    board: Board
    rows: list[Row] = field(default_factory=list)
    apart: list[Apart] = field(default_factory=list)
    cited: list[Score] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)  # all measured scores of the runs on the board
    facts: dict[str, Facts] = field(default_factory=dict)
    runs: dict[str, Any] = field(default_factory=dict)  # those that are in the store
    partial: list[str] = field(default_factory=list)  # runs left out
    limited: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # folders of the store that cannot be read
    kept: Mapping[str, Any] = field(default_factory=dict)  # runs.json of the earlier page, when it is whole
    pairs: dict[tuple[str, str, str], Estimate] = field(default_factory=dict)  # of the earlier page


# -- reading


def load(path: str | Path) -> list[Score]:
    """The scores of a scores.csv, of a run's folder or of a board's folder.

    Rows of a file are `cited` whatever they say, unless the file is a board's own and its digest still holds, or it is
    the scores.csv of a run. Raises Error for a file that cannot be read or contradicts itself.
    """
    path = Path(path)
    file = path / "scores.csv" if path.is_dir() else path
    own = file.name == "scores.csv" and (untouched(file) or (file.parent / "run.json").is_file())
    return read_scores(file, own)


def read_scores(file: Path, own: bool) -> list[Score]:
    """Rows of a CSV file, checked; `own` believes the column `source`."""
    from bench.scores import parse_scores

    hint = "it must be a scores.csv in UTF-8, with a row per score"
    try:
        data = file.read_bytes()
        head = next(csv.reader(io.StringIO(data.decode("utf-8-sig"))), [])
        missing = [name for name in ("suite", "model", "metric", "value") if name not in head]
        if missing:
            raise Error(f"{file} has no column {', '.join(missing)}", hint=hint)
        scores = parse_scores(data, file)
    except OSError as e:
        raise Error(
            f"{file} cannot be read: {e.strerror}", hint="sources are `store` or CSV files beside the board"
        ) from None
    except (UnicodeDecodeError, csv.Error) as e:
        raise Error(f"{file} is no table: {e}", hint=hint) from None
    return [_checked(s, f"{file} row {i}", own) for i, s in enumerate(scores, 1)]


def _checked(score: Score, where: str, own: bool) -> Score:
    if score.better not in ("higher", "lower", "none"):
        raise Error(f"{where}: better = {score.better[:60]!r}", hint="higher, lower or none")
    for name in ("value", "low", "high"):
        value = getattr(score, name)
        if value is not None and not math.isfinite(value):
            raise Error(f"{where}: {name} is {value}", hint="leave it empty where nothing was measured")
    interval = f"{where}: the interval of {score.metric[:60]}, {score.low!r} to {score.high!r},"
    hint = "what contradicts itself is not shown: mend the row or leave it out"
    if score.low is not None and score.high is not None and score.low > score.high:
        raise Error(f"{interval} is upside down", hint)
    if score.value is not None and (
        (score.low is not None and score.low > score.value) or (score.high is not None and score.high < score.value)
    ):
        raise Error(f"{interval} does not hold the value {score.value!r}", hint)
    if not 0 <= score.n <= score.expected:
        raise Error(f"{where}: n = {score.n} of expected = {score.expected}", hint)
    if score.n < score.expected and (not score.note or (score.value is not None and not own)):
        score = replace(score, complete=False)  # a note may explain why a value is withheld, not why rows are missing
    if score.source == "measured" and not own:
        score = replace(score, source=f"read from {Path(where.rsplit(' row ', 1)[0]).name}")
    return score


def untouched(file: Path) -> bool:
    """Is the file what the board wrote, by the digests beside it?"""
    import hashlib

    try:
        lines = (file.parent / SUMS).read_text(encoding="utf-8").splitlines()
        return f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" in lines
    except (OSError, ValueError):
        return False


def facts_of(run: Any, failures: bool = False) -> Facts:
    """What a run's folder says of it. Only a plain True or False counts for what may be shown."""
    meta, spec = run.meta, run.spec
    manifests = meta.get("manifests") or ()
    return Facts(
        run=run.id,
        suite=spec["suite"],
        suite_version=spec["suite_version"],
        model=str(meta["model"]),
        seed=spec.get("seed", 0),
        fields=spec.get("fields", {}),
        data=spec.get("data"),
        adapter=str(spec.get("adapter", "")),
        adapter_args=spec.get("adapter_args") or {},
        manifests=_masked([dict(m) for m in manifests]),
        sensitive=not (meta.get("sensitive") is False and all(m.get("sensitive", False) is False for m in manifests)),
        redistribute=meta.get("redistribute") is True and all(m.get("redistribute", True) is True for m in manifests),
        limit=spec.get("limit"),
        command=_masked(str(meta.get("command", ""))),
        git=_masked(meta.get("git") or {}),
        packages=_masked(meta.get("packages") or {}),
        machine=_masked(meta.get("machine") or {}),
        started=str(meta.get("started", "")),
        failures=list(_failures(run)) if failures else (),
    )


def _masked(value: Any) -> Any:
    """JSON with the secrets of this process as `***`."""
    from bench.text import mask

    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {mask(str(k)): _masked(v) for k, v in value.items()}
    return [_masked(v) for v in value] if isinstance(value, list) else value


def _failures(run: Any) -> Iterator[dict[str, Any]]:
    """Failed units by kind, the commonest first, each with the trace of its first unit."""
    kinds: dict[str, list[Any]] = {}
    for record in run.failures():
        kinds.setdefault(str((record.error or {}).get("kind", "unknown")), []).append(record)
    for kind, records in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0])):
        error = records[0].error or {}
        message, trace = _masked(str(error.get("message", ""))), _masked(str(error.get("trace", "")))
        found = {"kind": kind, "count": len(records), "unit": records[0].unit}
        yield _masked(found) | {"message": message[:2000], "trace": trace[-8000:]}


# -- gathering


def collect(board: Board, store: Any, out: Path) -> Collection:
    """Every score that the board selects, sorted into columns, what stands apart, and what is cited."""
    found = Collection(board)
    wanted = "store" in board.sources
    if wanted and store is not None:
        for run in store.runs(broken=lambda name, e: found.broken.append(name)):
            if not _selected(board, str(run.spec["suite"]), str(run.meta["model"])):
                continue
            if run.spec.get("limit") is not None:
                found.limited.append(run.id)
                continue
            _take(found, run.id, facts_of(run), run.scores(), run)
    for source in board.sources:
        if source != "store":
            _read_source(found, source, out)
    _arrange(found)
    return found


def _selected(board: Board, suite: str, model: str) -> bool:
    return any(fnmatchcase(suite, p) for p in board.select.suite) and any(
        fnmatchcase(model, p) for p in board.select.model
    )


def _take(found: Collection, run_id: str, facts: Facts, scores: list[Score], run: Any = None) -> None:
    partial = not scores or any(not s.complete for s in scores)
    if partial:
        if run is not None:
            facts = replace(facts, failures=list(_failures(run)))
        found.partial.append(run_id)
    found.facts[run_id] = facts
    if partial and (found.board.select.complete or not scores):
        return
    found.scores += scores
    if run is not None:
        found.runs[run_id] = run


def _read_source(found: Collection, source: str, out: Path) -> None:
    board = found.board
    own_file = source == f"{board.name}/scores.csv"
    file = out / "scores.csv" if own_file else board.folder / source
    if own_file and not file.exists():
        return
    own = own_file and all(untouched(out / name) for name in KEPT)
    scores = [s for s in read_scores(file, own) if any(fnmatchcase(s.suite, p) for p in board.select.suite)]
    if own:
        found.kept = json.loads((out / "runs.json").read_text(encoding="utf-8"))
        found.limited = sorted({*found.limited, *found.kept["limited"]})
        found.pairs = dict(read_pairs((out / "pairs.csv").read_bytes().decode("utf-8", "surrogatepass")))
        known = {f.name for f in fields(Facts)}
        by_run: dict[str, list[Score]] = {}
        for s in scores:
            by_run.setdefault(s.run if s.source == "measured" else "", []).append(s)
        for run_id, entry in found.kept["runs"].items():
            if run_id not in found.facts and _selected(board, entry["suite"], entry["model"]):
                facts = Facts(**{k: v for k, v in entry.items() if k in known})
                _take(found, run_id, facts, by_run.get(run_id, []))
        scores = [s for s in scores if s.source != "measured"]
    measured = set(found.facts)
    seen = {(s.model, s.metric, s.slice, s.source) for s in found.cited}
    found.cited += [s for s in scores if s.run not in measured and (s.model, s.metric, s.slice, s.source) not in seen]


def _arrange(found: Collection) -> None:
    """Sorts scores into the rows of the table; what differs in protocol or signature stands apart with the reason."""
    board = found.board
    scores: dict[tuple[str, str, str], list[Score]] = {}
    for score in found.scores:
        scores.setdefault((score.suite, score.metric, score.slice), []).append(score)
    main = {suite: _main_protocol(found, suite) for suite in {c.suite for c in board.column}}
    rows: dict[str, Row] = {}
    apart: dict[tuple[str, str], Apart] = {}
    for i, column in enumerate(board.column):
        here = scores.get((column.suite, column.metric, column.slice), [])
        standing = [s for s in here if found.facts[s.run].protocol == main[column.suite]]
        signature = most_common(s.signature for s in standing)
        for score in here:
            facts = found.facts[score.run]
            ranked = score.complete and score.value is not None
            cell = Cell(score, facts, ranked)
            reason = why_apart(found, facts, main[column.suite]) or (
                "" if score.signature == signature else f"signature {score.signature}, the column has {signature}"
            )
            if reason:
                entry = apart.setdefault((score.run, reason), Apart(facts.model, reason, [None] * len(board.column)))
                entry.cells[i] = cell
                continue
            row = rows.setdefault(facts.entity, Row(facts.model, [None] * len(board.column)))
            if row.cells[i] is None:
                row.cells[i] = cell
            else:  # the same model, weights, seed and protocol twice: other code or another adapter version
                entry = apart.setdefault(
                    (score.run, "twice"), Apart(facts.model, "the same model stands above", [None] * len(board.column))
                )
                entry.cells[i] = cell
    found.rows = _labelled(rows)
    _drop_empty(found, [*found.rows, *apart.values()])
    found.apart = sorted(apart.values(), key=lambda a: (a.reason, a.label))


def _drop_empty(found: Collection, lines: Sequence[Row | Apart]) -> None:
    """Columns that no run has a score for (a metric of another protocol) leave the board."""
    board = found.board
    ranked = board.rank and board.rank.by
    used = [i for i, c in enumerate(board.column) if c.key == ranked or any(line.cells[i] for line in lines)]
    found.board = replace(board, column=tuple(board.column[i] for i in used))
    for line in lines:
        line.cells = [line.cells[i] for i in used]


def _main_protocol(found: Collection, suite: str) -> str:
    """The protocol that most runs of a suite share; among equals the newest version, then by digest."""
    groups: dict[str, list[Facts]] = {}
    for run_id in dict.fromkeys(s.run for s in found.scores if s.suite == suite):
        groups.setdefault(found.facts[run_id].protocol, []).append(found.facts[run_id])
    return max(groups, key=lambda k: (len(groups[k]), groups[k][0].suite_version, k)) if groups else ""


def most_common(values: Iterable[str]) -> str:
    """The commonest string; among equals the first in order."""
    values = list(values)
    return min(set(values), key=lambda v: (-values.count(v), v)) if values else ""


def why_apart(found: Collection, facts: Facts, protocol: str) -> str:
    """What differs from the protocol of the column, in words; empty when nothing does."""
    if facts.protocol == protocol:
        return ""
    other = next(f for f in found.facts.values() if f.protocol == protocol)
    parts = []
    if facts.suite_version != other.suite_version:
        parts.append(f"version {facts.suite_version} of the suite, the column has {other.suite_version}")
    for name in sorted({*facts.fields, *other.fields}):
        mine, theirs = facts.fields.get(name, "nothing"), other.fields.get(name, "nothing")
        if mine != theirs:
            parts.append(f"{name} = {mine}, the column has {theirs}")
    if not parts or facts.data != other.data:
        names = [", ".join(str(m.get("name", "?")) for m in f.manifests) or str(f.data) for f in (facts, other)]
        same = names[0] == names[1]
        parts.append(f"other content of {names[0]}" if same else f"data {names[0]}, the column has {names[1]}")
    return "; ".join(parts)


def _labelled(rows: Mapping[str, Row]) -> list[Row]:
    """Rows by label; models of one label are told apart by seed, or else by run."""
    from bench.text import plain

    by_label: dict[str, list[tuple[str, Row]]] = {}
    for key, row in rows.items():
        text = plain(row.label)
        row.label = text if len(text) <= LABEL else text[: LABEL - 1] + "…"
        by_label.setdefault(row.label, []).append((key, row))
    for label, group in by_label.items():
        if len(group) == 1:
            continue
        seeds = [next(c for c in row.cells if c).facts.seed for _, row in group]
        for (key, row), seed in zip(group, seeds, strict=True):
            row.label = f"{label} · seed {seed}" if len(set(seeds)) == len(seeds) else f"{label} · {key[:8]}"
    return sorted(rows.values(), key=lambda r: r.label)


# -- writing


def dump_runs(found: Collection, tiles: Mapping[str, Any]) -> bytes:
    """runs.json: the facts and the pictures of the page, so that it can be drawn without the store."""
    runs = {run_id: vars(facts) for run_id, facts in sorted(found.facts.items())}
    value = {"format": 1, "runs": runs, "limited": sorted(found.limited), "tiles": tiles}
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


PAIR_COLUMNS = ("column", "run_a", "run_b", "difference", "low", "high", "method", "n")


def dump_pairs(pairs: Mapping[tuple[str, str, str], Estimate]) -> bytes:
    """pairs.csv: the paired differences a - b behind shared and unshared ranks, with 95 % intervals."""
    from bench.text import csv_cell

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # a bare carriage return ends a row
    writer.writerow(PAIR_COLUMNS)
    for (column, a, b), e in sorted(pairs.items()):
        writer.writerow([*map(csv_cell, (column, a, b)), e.value, e.low, e.high, csv_cell(e.method), e.n])
    return out.getvalue().encode("utf-8", "surrogatepass")


def read_pairs(text: str) -> Iterator[tuple[tuple[str, str, str], Estimate]]:
    from bench.text import csv_value

    for row in csv.DictReader(io.StringIO(text, newline="")):
        value, low, high = (float(row[k]) if row[k] else None for k in ("difference", "low", "high"))
        key = (csv_value(row["column"]), csv_value(row["run_a"]), csv_value(row["run_b"]))
        yield key, Estimate(value, low, high, csv_value(row["method"]), int(row["n"]))


def sums(files: Mapping[str, bytes]) -> bytes:
    """`sha256sum -c` reads it."""
    return "".join(f"{digest(files[name])}  {name}\n" for name in sorted(files)).encode()


def listed(folder: Path) -> list[str]:
    """The files beside an earlier page that were written with it; none where there is no page."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    names = [name for line in lines for _, space, name in [line.partition("  ")] if space]
    return [n for n in names if ".." not in Path(n).parts and not Path(n).is_absolute()]
