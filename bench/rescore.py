"""Measure later, over kept media and without the model: a new metric, or values that a judge left null."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import door, registry
from bench.config import How, convert, field_types
from bench.identity import digest, slug
from bench.records import heal, line
from bench.replies import Replies
from bench.store import Run
from bench.types import Error, Record, Unit, UsageError

BESIDE = ("-withheld", "-failure", "-reply", "-tries")  # columns that tell of a value: why it is null, what it took
GIVEN = ("item", "unit", "flat", "cluster")  # columns that no metric measures


def open_metric(text: str) -> Any:
    """`module:Name?key=value&key=value`, or `path.py:Name?…`, as a metric; raises UsageError for a name unknown."""
    name, _, query = text.partition("?")
    if registry.is_path(name):
        cls = registry.find("metrics", name)
    else:
        module, _, attribute = name.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError):
            raise UsageError(f"no metric {name!r}", hint="bench.metrics:PSNR, or path.py:Name") from None
    if not isinstance(cls, type) or not is_dataclass(cls) or not hasattr(cls, "measure"):
        raise UsageError(
            f"{name} is no metric", hint="a metric is a frozen dataclass with measure, reduce and signature"
        )
    given = dict(part.partition("=")[::2] for part in query.split("&") if part)
    kinds = field_types(cls)
    unknown = [k for k in given if k not in kinds]
    if unknown:
        raise UsageError(f"{name} has no parameter {unknown[0]!r}", hint=f"it has {', '.join(kinds)}")
    return cls(**{k: convert(v, kinds[k], f"{name}: {k}") for k, v in given.items()})


def remeasure(run: Run, metric: str | None, how: How | None = None) -> int:
    """Appends what was measured to `extra/`; returns the number of units measured.

    With `metric`, that metric on every unit that lacks it; without, the suite's own metrics where they left nulls.
    Raises Error when media were not kept, with the command that would keep them.
    """
    from bench.reduction import suite_of
    from bench.worker import WorkerContext

    suite = suite_of(run)
    metrics = [open_metric(metric)] if metric else list(suite.metrics)
    if metric:
        _check_new(metrics[0], suite)
        if getattr(metrics[0], "quantise", "round") == "none":
            raise Error(
                f"{metric} needs pictures that were not rounded; what is kept is 8 bits",
                hint="leave quantise out, or score a protocol that measures it",
            )
    earlier = run.extra()
    records = sorted((r for r in run.records().values() if r.status == "ok"), key=lambda r: r.unit)
    if metric:
        records = [r for r in records if metric not in earlier.get(r.key, {}).get("metrics", ())]
    else:
        records = [r for r in records if _lacking(_columns(r, earlier))]
    if not records:
        return 0
    how = how or How()
    ctx = WorkerContext(_Judging(run, suite, how), how.batch)
    path = run.path / "extra" / f"{slug(metric or 'nulls', 60)}-{digest(metric or '')[:8]}.jsonl"
    measured = 0
    with door.lock(door.make_folder(path.parent).parent / "extra.lock", f"run {run.id}"):
        heal(path)
        with contextlib.closing(door.Appender(path)) as log:
            for record in records:
                known = _columns(record, earlier)
                rows = range(len(record.rows)) if metric else _lacking(known)
                columns, blobs = _measure(run, record, [str(record.rows[i]["item"]) for i in rows], metrics, ctx)
                if metric:
                    clash = sorted(columns.keys() & known.keys())
                    if clash:
                        raise Error(
                            f"{metric} writes {clash[0]!r}, which the run has already", hint="rename the metric"
                        )
                else:
                    columns, blobs = _filled(known, rows, columns), {}
                if columns or blobs:
                    log.append(line({"key": record.key, "columns": columns, "blobs": blobs, "metric": metric or ""}))
                    measured += 1
    return measured


def _check_new(metric: Any, suite: Any) -> None:
    if metric.name in {m.name for m in suite.metrics}:
        raise UsageError(
            f"suite {suite.name} measures {metric.name} already", hint="without --metric, nulls are measured again"
        )


def _columns(record: Record, earlier: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Every column of a unit's rows, with what was measured later."""
    names = {name for row in record.rows for name in row}
    found = {name: [row.get(name) for row in record.rows] for name in names}
    return {**found, **earlier.get(record.key, {}).get("columns", {})}


def _lacking(columns: Mapping[str, list[Any]]) -> list[int]:
    """The rows with a null that no rule explains."""
    names = [name for name in columns if name not in GIVEN and not name.endswith(BESIDE)]
    return [i for i in range(len(columns["item"])) if any(_open(columns, name, i) for name in names)]


def _open(columns: Mapping[str, list[Any]], name: str, i: int) -> bool:
    return columns[name][i] is None and not columns.get(f"{name}-withheld", [None] * (i + 1))[i]


def _filled(
    known: Mapping[str, list[Any]], rows: Sequence[int], found: Mapping[str, list[Any]]
) -> dict[str, list[Any]]:
    """The columns in which a null of `rows` became a value, and what tells of it; the rest stays as it was."""
    filled = {}
    for name, values in found.items():
        base = next((b for end in BESIDE if (b := name.removesuffix(end)) != name and b in found), name)
        old = known.get(name, [None] * len(known["item"]))
        new = list(old)
        for place, i in enumerate(rows):
            mended = (base not in known or _open(known, base, i)) and not _open(found, base, place)
            if mended or old[i] is None:
                new[i] = values[place]
        if new != old:
            filled[name] = new
    return filled


class _Judging:
    """What a context needs of a worker when there is no model."""

    def __init__(self, run: Run, suite: Any, how: How):
        from bench.worker import Work

        self.suite, self.store, self.device = suite, run.store, "cpu"
        self.work = Work(run.meta["suite_ref"], {}, "", seed=run.spec["seed"], run_id=run.id)
        self.manifest: Any = None
        self.judges: dict[str, Any] = {}
        self.replies = Replies(run.store.root / "replies", how.replies)


def _measure(
    run: Run, record: Record, items: Sequence[str], metrics: Sequence[Any], ctx: Any
) -> tuple[dict[str, list], dict[str, str]]:
    """Columns and blobs of some items of a unit, in their order."""
    import numpy as np

    from bench.worker import as_json

    columns: dict[str, list] = {}
    features: dict[str, list[np.ndarray]] = {}
    for batch in ctx.batches(Unit(record.unit, tuple(items))):
        for ids, media in _media(run, record, batch):
            for metric in metrics:
                for name, values in metric.measure(media, ctx).items():
                    if len(values) != len(ids):
                        raise Error(f"{metric.name}: {name} has {len(values)} values for {len(ids)} items")
                    if hasattr(values, "ndim") and values.ndim > 1:
                        features.setdefault(name, []).append(np.asarray(values, np.float32))
                    else:
                        columns.setdefault(name, []).extend(as_json(v) for v in values)
    blobs = {}
    for name, parts in features.items():
        out = io.BytesIO()
        np.save(out, np.concatenate(parts), allow_pickle=False)
        blobs[f"features/{name}"] = run.store.put(out.getvalue(), ".npy")
    return columns, blobs


def _media(run: Run, record: Record, ids: Sequence[str]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """(ids, media) of a batch, parted where the size changes: kept pictures as uint8 [B, 3, H, W], columns as lists."""
    import numpy as np
    import torch
    from PIL import Image

    names = sorted({key.split("/", 2)[1] for key in record.blobs if key.startswith("media/")}) or ["media"]
    rows = {row["item"]: row for row in record.rows}
    kept: dict[str, dict[str, np.ndarray]] = {}
    for id in ids:
        for name in names:
            address = record.blobs.get(f"media/{name}/{id}")
            if address is None:
                raise Error(
                    f"{run.id} kept no media of item {id!r}",
                    hint=f"{run.meta.get('again', 'score again')} --keep all --fresh keeps them",
                )
            data = run.store.get(address)
            if Path(address).suffix == ".npy":
                array = np.load(io.BytesIO(data), allow_pickle=False)
            else:
                array = np.asarray(Image.open(io.BytesIO(data)))
                array = array.transpose(2, 0, 1) if array.ndim == 3 else array[None]
            kept.setdefault(id, {})[name] = array
    for _, group in groupby(ids, key=lambda id: [kept[id][name].shape for name in names]):
        part = list(group)
        media: dict[str, Any] = {n: torch.from_numpy(np.stack([kept[id][n] for id in part])) for n in names}
        for column in rows[part[0]]:
            media.setdefault(column, [rows[i].get(column) for i in part])
        yield part, media
