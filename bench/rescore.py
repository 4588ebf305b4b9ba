"""Measure later, over kept media and without the model: a new metric, or values that a judge left null."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import door, registry
from bench.config import How, convert, field_types
from bench.identity import slug
from bench.store import Run, line
from bench.types import Error, Record, Unit, UsageError


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
    given = dict(part.partition("=")[::2] for part in query.split("&") if part)
    kinds = field_types(cls)
    unknown = [k for k in given if k not in kinds]
    if unknown:
        raise UsageError(f"{name} has no parameter {unknown[0]!r}", hint=f"it has {', '.join(kinds)}")
    return cls(**{k: convert(v, kinds[k], f"{name}: {k}") for k, v in given.items()})


def remeasure(run: Run, metric: str | None, how: How | None = None) -> int:
    """Appends what was measured to `extra/`; returns the number of units measured.

    With `metric`, that metric on every unit; without, the suite's own metrics on units that hold nulls.
    Raises Error when media were not kept, with the command that would keep them.
    """
    from bench.execution import suite_of
    from bench.worker import WorkerContext

    suite = suite_of(run)
    metrics = [open_metric(metric)] if metric else list(suite.metrics)
    records = sorted((r for r in run.records().values() if r.status == "ok"), key=lambda r: r.unit)
    if not metric:
        records = [r for r in records if any(v is None for row in r.rows for v in row.values())]
    ctx = WorkerContext(_Judging(run, suite), (how or How()).batch)
    name = slug(metric or "nulls", 80)
    if not records:
        return 0
    door.make_folder(run.path / "extra")
    with (
        door.lock(run.path / "extra.lock", f"run {run.id}"),
        contextlib.closing(door.Appender(run.path / "extra" / f"{name}.jsonl")) as log,
    ):
        for record in records:
            columns, blobs = _measure(run, record, metrics, ctx)
            value = {"key": record.key, "columns": columns, "blobs": blobs, "metric": metric or ""}
            log.append(line(value))
    return len(records)


class _Judging:
    """What a context needs of a worker when there is no model."""

    def __init__(self, run: Run, suite: Any):
        from bench.worker import Work

        self.suite, self.store, self.device = suite, run.store, "cpu"
        self.work = Work(run.meta["suite_ref"], {}, "", seed=run.spec["seed"], run_id=run.id)
        self.manifest: Any = None
        self.judges: dict[str, Any] = {}


def _measure(run: Run, record: Record, metrics: Sequence[Any], ctx: Any) -> tuple[dict[str, list], dict[str, str]]:
    import numpy as np

    items = [str(row["item"]) for row in record.rows]
    columns: dict[str, list] = {}
    features: dict[str, list[np.ndarray]] = {}
    for ids in ctx.batches(Unit(record.unit, tuple(items))):
        media = _media(run, record, ids)
        for metric in metrics:
            for name, values in metric.measure(media, ctx).items():
                if hasattr(values, "ndim") and values.ndim > 1:
                    features.setdefault(name, []).append(np.asarray(values, np.float32))
                else:
                    columns.setdefault(name, []).extend(v.item() if hasattr(v, "item") else v for v in values)
    blobs = {}
    for name, parts in features.items():
        out = io.BytesIO()
        np.save(out, np.concatenate(parts), allow_pickle=False)
        blobs[f"features/{name}"] = run.store.put(out.getvalue(), ".npy")
    return columns, blobs


def _media(run: Run, record: Record, ids: Sequence[str]) -> dict[str, Any]:
    """The kept pictures of a batch as uint8 [B, 3, H, W], and its columns as lists."""
    import numpy as np
    import torch
    from PIL import Image

    names = sorted({key.split("/", 2)[1] for key in record.blobs if key.startswith("media/")})
    media: dict[str, Any] = {}
    for name in names or ["media"]:
        pictures = []
        for id in ids:
            address = record.blobs.get(f"media/{name}/{id}")
            if address is None:
                raise Error(
                    f"{run.id} kept no media of item {id!r}",
                    hint=f"{run.meta.get('again', 'score again')} --keep all --fresh keeps them",
                )
            data = run.store.get(address)
            if Path(address).suffix == ".npy":
                pictures.append(np.load(io.BytesIO(data), allow_pickle=False))
            else:
                array = np.asarray(Image.open(io.BytesIO(data)))
                pictures.append(array.transpose(2, 0, 1) if array.ndim == 3 else array[None])
        media[name] = torch.from_numpy(np.stack(pictures))
    rows = {row["item"]: row for row in record.rows}
    for column in rows[ids[0]]:
        media.setdefault(column, [rows[i].get(column) for i in ids])
    return media
