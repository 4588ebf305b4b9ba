"""What the terminal shows: scores, runs, units, lists, comparisons. Readable without colour."""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import registry
from bench.capabilities import CAPABILITIES, has, held
from bench.identity import slug
from bench.store import Run, Store
from bench.text import mask, plain
from bench.types import Error, Score

FIGURE_INCHES = (6.4, 4.0)


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of left-aligned columns, two spaces apart; no control characters, secrets masked."""
    cells = [[plain(mask(str(c))) for c in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def counted(number: int, noun: str) -> str:
    """`1 unit`, `1,200 units`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def number(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """As many digits as the interval supports: its half-width shows two of them; four figures without one."""
    if value is None:
        return "–"
    if low is not None and high is not None and high > low:
        digits = 1 - math.floor(math.log10((high - low) / 2))
    else:
        digits = 3 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:,.{min(max(digits, 0), 8)}f}"


def interval(low: float | None, high: float | None) -> str:
    """`24.42 to 24.60`, or `none`."""
    if low is None or high is None:
        return "none"
    return f"{number(low, low, high)} to {number(high, low, high)}"


def coverage(score: Score) -> str:
    """n, or n/N where some are missing."""
    return f"{score.n:,}" if score.n == score.expected else f"{score.n:,}/{score.expected:,}"


def shortened(text: str, limit: int = 60) -> str:
    """The beginning of a long text."""
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."


def print_scores(run: Run, slices: bool = False) -> None:
    """The scores of a run, to stdout, and below them what is said of several."""
    shown = [s for s in run.scores() if slices or s.slice == "all"]
    parts = [text for s in shown for text in s.note.split("; ") if text]
    footnotes = {text: i for i, text in enumerate(dict.fromkeys(t for t in parts if parts.count(t) > 1), 1)}
    rows = [
        [s.metric, *([s.slice] if slices else []), number(s.value, s.low, s.high), interval(s.low, s.high), coverage(s),
         s.signature + _remarks(s.note, footnotes)]
        for s in shown
    ]  # fmt: skip
    print(columns(["metric", *(["slice"] if slices else []), "value", "95 %", "n", "signature"], rows))
    for text, i in footnotes.items():
        print(plain(f"  [{i}] {text}"))


def judge_failures(run: Run, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What judges failed at, by kind, and how they are asked again."""
    for name in sorted({name for row in rows for name in row if name.endswith("-failure")}):
        kinds = Counter(str(row[name]) for row in rows if row.get(name))
        if kinds:
            told = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
            what = f"{name.removesuffix('-failure')}: no answer for {kinds.total():,} of {counted(len(rows), 'item')}"
            yield f"{what} ({told}); bench rescore {run.id} asks again"


def _remarks(note: str, footnotes: Mapping[str, int]) -> str:
    """`   (of this score alone) [1] [2]`."""
    parts = [text for text in note.split("; ") if text]
    own = "; ".join(text for text in parts if text not in footnotes)
    return (f"   ({own})" if own else "") + "".join(f" [{footnotes[text]}]" for text in parts if text in footnotes)


def print_run(run: Run, slices: bool) -> None:
    """A run: what it was, its scores, its failures."""
    meta = run.meta
    print(run.id)
    rows = [["suite", f"{run.spec['suite']} version {run.spec['suite_version']}"], ["model", meta["model"]]]
    for m in meta["manifests"]:
        size = f"{counted(m['items'], 'item')} in {counted(m['clusters'], 'cluster')}"
        rows.append(["data", f"{m['name']}, {size}, {shortened(m['license'])}"])
    rows += [["seed", str(run.spec["seed"])], ["started", str(meta.get("started", ""))], ["folder", str(run.path)]]
    rows += [["again", meta["again"]]] if meta.get("again") else []
    print(columns(["", ""], rows).lstrip("\n"))
    print()
    print_scores(run, slices)
    codes = run.codes()
    if len(codes) > 1:
        names = plain(", ".join(sorted(codes)))
        print(f"\nits records were made by {len(codes)} versions of the suite's code: {names}")
    for text in judge_failures(run, run.table().rows):
        print("\n" + plain(text))
    failures = run.failures()
    if failures:
        print(f"\n{counted(len(failures), 'unit')} failed:")
        shown = [
            [r.unit, (r.error or {}).get("kind", ""), (r.error or {}).get("message", "")[:100]] for r in failures[:20]
        ]
        print(columns(["unit", "kind", "message"], shown))
        print(plain(f"bench show {run.id} --unit {failures[0].unit} shows the trace"))


def print_unit(run: Run, unit: str, as_json: bool) -> int:
    """One unit: its record, the trace of its failure, where its media lie."""
    found = [r for r in run.records().values() if r.unit == unit]
    if not found:
        from bench.text import closest

        raise Error(
            f"{run.id} has no record of unit {unit!r}", hint=closest(unit, [r.unit for r in run.records().values()])
        )
    record = found[0]
    if as_json:
        print(json.dumps({"schema": 1, "kind": "record", "rows": [asdict(record)]}, indent=1))
        return 0
    facts = ("status", "attempt", "batch", "seconds", "device", "code", "started")
    print(columns(["", ""], [[f, str(getattr(record, f))] for f in facts]).lstrip("\n"))
    if record.error:
        print(f"\n{plain(record.error['kind'])}: {plain(record.error['message'])}")
        print(f"hint: {plain(record.error['hint'])}\n" if record.error.get("hint") else "")
        print("\n".join(f"  {plain(text)}" for text in record.error["trace"].splitlines()))
    if record.rows:
        names = list(dict.fromkeys(k for row in record.rows for k, v in row.items() if not isinstance(v, (list, dict))))
        print()
        print(columns(names, [[_cell(row.get(n)) for n in names] for row in record.rows]))
    media = [[name, str(run.store.path(address))] for name, address in record.blobs.items()]
    if media:
        print()
        print(columns(["kept", "path"], media))
    return 0


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def draw_figures(run: Run, folder: Path) -> list[Path]:
    """The suite's figures of one run as SVG, each with a CSV beside it."""
    from bench import door
    from bench.reduction import suite_of
    from bench.report.figures import render

    door.make_folder(folder)
    written = []
    for figure in suite_of(run).figures(run.table()):
        drawing = render(slug(figure.name), figure.title, "", figure.rows, FIGURE_INCHES, figure.draw)
        for suffix, data in ((".svg", drawing.svg), (".csv", drawing.csv)):
            written.append(folder / (drawing.name + suffix))
            door.replace(written[-1], data)
    return written


# -- list


def print_list(store: Store, kind: str | None, as_json: bool) -> int:
    """What is installed, and the runs in the store. Imports no torch; foreign adapters are not imported at all."""
    rows = [row for k, make in _LISTS.items() if kind in (None, k) for row in make(store)]
    broken = [r for r in rows if r["broken"]]
    if as_json:
        print(json.dumps({"schema": 1, "kind": "list", "rows": rows}, indent=1))
        return 0
    for k, head in _HEADS.items():
        of_kind = [r for r in rows if r["kind"] == k and not r["broken"]]
        if of_kind:
            print(columns([k, *head], [["  " + r["name"], *(r[h] for h in head)] for r in of_kind]))
            print()
    if broken:
        print(columns(["broken", "", ""], [["  " + r["name"], r["kind"], r["broken"]] for r in broken]))
    return 0


def _row(kind: str, name: str, broken: str = "", **more: str) -> dict[str, str]:
    return {"kind": kind, "name": name, "broken": broken, **more}


def _suites(_: Store) -> list[dict[str, str]]:
    adapters = list(registry.describe("adapters"))
    rows = []
    for entry, cls, broken in registry.describe("suites"):
        if broken:
            rows.append(_row("suites", entry.name, broken))
            continue
        fitting = [
            a.name + ("" if a.builtin else " ?")
            for a, obj, wrong in adapters
            if not wrong and (not a.builtin or (inspect.isclass(obj) and all(has(obj, c) for c in cls.requires)))
        ]
        needs = ", ".join(c.__name__ for c in cls.requires) or "a recipe"
        rows.append(_row("suites", entry.name, needs=needs, **{"runs on": ", ".join(fitting)}))
    return rows


def _recipes(_: Store) -> list[dict[str, str]]:
    return [
        _row("recipes", e.name, broken, **{"starts from": _starts(cls), "about": _first_line(cls)})
        for e, cls, broken in registry.describe("recipes")
    ]


def _adapters(_: Store) -> list[dict[str, str]]:
    return [
        _row("adapters", e.name, broken, can=", ".join(held(obj)) if obj is not None else "?", takes=_takes(obj))
        for e, obj, broken in registry.describe("adapters")
    ]


def _manifests(_: Store) -> list[dict[str, str]]:
    from bench import manifest_verbs

    return [_row("manifests", name, **facts) for name, facts in manifest_verbs.names()]


def _runs(store: Store) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for run in store.runs(broken=lambda name, e: rows.append(_row("runs", name, str(e)))):
        state = "complete" if run.complete() else "partial"
        rows.append(_row("runs", run.id, state=state, units=str(run.meta["units"]), items=str(run.meta["items"])))
    return rows


_LISTS = {"suites": _suites, "recipes": _recipes, "adapters": _adapters, "manifests": _manifests, "runs": _runs}
_HEADS = {
    "suites": ("needs", "runs on"),
    "recipes": ("starts from", "about"),
    "adapters": ("can", "takes"),
    "manifests": ("items", "state", "license"),
    "runs": ("state", "units", "items"),
}


def _starts(cls: Any) -> str:
    return ", ".join(c.__name__ for c in getattr(cls, "starts_from", ()) if c in CAPABILITIES) or "scratch"


def _first_line(obj: Any) -> str:
    return (inspect.getdoc(obj) or "").partition("\n")[0]


def _takes(obj: Any) -> str:
    if obj is None:
        return "?"
    found = inspect.signature(obj).parameters.values()
    return ", ".join(p.name + ("" if p.default is p.empty else f"={p.default}") for p in found)


# -- compare


def print_comparison(comparison: Any) -> None:
    """Two runs on the items they share."""
    a, b = comparison.a, comparison.b
    clusters = f" in {counted(comparison.clusters, 'cluster')}" if comparison.clusters < comparison.shared else ""
    seeds = "same seeds" if comparison.same_seed else "different seeds"
    print(f"{counted(comparison.shared, 'shared item')}{clusters}, {seeds}")
    rows = []
    for d in comparison.differences:
        sign = "+" if d.value is not None and d.value > 0 else ""
        rows.append([d.metric, number(d.a, d.low, d.high), number(d.b, d.low, d.high),
                     sign + number(d.value, d.low, d.high), interval(d.low, d.high),
                     "" if d.gain is None else f"{d.gain:.3g}x", d.verdict])  # fmt: skip
    print(columns(["metric", a, b, "difference", "95 %", "paired gain", ""], rows))
    for metric, movers in comparison.movers.items():
        print(f"\nlargest differences in {plain(metric)}")
        print(columns(["item", a, b, "difference"], [[i, _cell(x), _cell(y), _cell(y - x)] for i, x, y in movers]))
