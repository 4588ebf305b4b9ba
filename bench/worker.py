"""Worker: opens the model once and turns units into records. A call never raises for a unit's fault."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from bench import door, registry
from bench.ahead import ahead, owned
from bench.capabilities import PictureSet
from bench.config import How, bind, data_fields
from bench.identity import canonical, digest, seed_for, unit_key, without_copy
from bench.models import device_name, free_memory, identity_of, open_model, out_of_memory, parse_model, require
from bench.pictures import batch_of, encode, extremes
from bench.recipe import Recipe
from bench.replies import Replies
from bench.store import Store
from bench.suite import Suite
from bench.text import secrets
from bench.types import BadOutput, Item, Json, NonFinite, Record, Stop, Unit
from bench.versions import code_digest, float_versions, refuse_other, versions_of

TRACE_CHARACTERS = 8_000
OWN_COLUMNS = ("item", "unit", "flat")
GENERATED = "generated"  # `generated:name` is a picture of a PictureSet


@dataclass(frozen=True)
class Work:
    """All that a process needs to measure units of a run; small and picklable."""

    suite: str  # name, or path.py:Name
    fields: Mapping[str, Any]  # the suite's parameters
    model: str
    model_what: Mapping[str, Any] = field(default_factory=dict)  # decide what comes out
    model_how: Mapping[str, Any] = field(default_factory=dict)  # decide how fast
    data: str | None = None  # manifest
    limit: int | None = None
    seed: int = 0
    spec_digest: str = ""
    spec: Mapping[str, Json] = field(default_factory=dict)  # of the run, for workers on other machines
    versions: Mapping[str, str] = field(default_factory=dict)  # the driver's, see `versions_of`
    patience: float = 600.0  # seconds that a unit may take while none is done
    shared_digest: str = ""  # of the specification without the model; "": nothing is taken over from other runs
    run_id: str = ""
    kept: frozenset[str] | None = frozenset()  # items whose media are kept; None: all
    how: How = field(default_factory=How)


class Worker:
    """Measures units. `suite`, `model` and `manifest` may be given as live objects; else they are opened by name."""

    def __init__(
        self, work: Work, device: str = "cpu", *, suite: Suite | None = None, model: Any = None, manifest: Any = None
    ):
        self.work, self.device, self.batch = work, device, work.how.batch
        self.others: dict[str, Any] = {}  # the manifests of further fields of type Data
        self.suite = suite if suite is not None else registry.find("suites", work.suite)(**work.fields)
        refuse_other(work.versions, versions_of(type(self.suite)) if work.versions else {})
        self.store = Store(work.how.store)
        self.manifest = manifest
        others = data_fields(type(self.suite))[1:]
        if (manifest is None and work.data is not None) or others:
            from bench.manifest import load

            def opened(name: str) -> Any:
                found = load(name, digests=digests)
                return found if work.limit is None else found.subset(work.limit)

            with self.store.digests() as digests:
                if manifest is None and work.data is not None:
                    self.manifest = opened(work.data)
                self.others = {name: opened(getattr(self.suite, name)) for name in others}
        for name, value in work.model_how.items():
            secrets().add_named(name, str(value))  # a process of its own was not told what was typed
        self.replies = Replies(self.store.root / "replies", work.how.replies)
        if model is None:
            model = open_model(work.model, work.model_what, work.model_how, device)
            model = self.replies.around(model, lambda: identity_of(work.model, work.model_what, self.store))
        self.model = model
        require(self.suite, self.model, work.model)
        self.code = code_digest(type(self.suite))
        self.device_name = device_name(device)
        self.judges: dict[str, Any] = {}
        ctx = WorkerContext(self, self.batch)
        for metric in self.suite.metrics:
            if hasattr(metric, "prepare"):
                metric.prepare(ctx)
        self._networks = None
        if all(hasattr(m, "identity") or not hasattr(m, "prepare") for m in self.suite.metrics):
            self._networks = [[m.name, m.identity(ctx)] for m in self.suite.metrics if hasattr(m, "identity")]

    def __call__(self, unit: Unit, attempt: int = 1) -> Record:
        from bench.text import mask, plain

        begin, started = time.monotonic(), utc()
        batch, error = self.batch, None
        rows: tuple[Mapping[str, Json], ...] = ()
        blobs: dict[str, str] = {}
        while True:
            try:
                with contextlib.redirect_stdout(sys.stderr):  # stdout carries data only
                    rows, blobs = self._recalled(unit, batch) or self._measure(unit, batch)
                error = None
            except Stop:
                raise
            except (
                Exception,
                SystemExit,
            ) as e:  # the one place where a unit's fault, of whatever kind, becomes a record
                if out_of_memory(e) and batch > 1:
                    batch //= 2
                    free_memory()
                    continue
                trace = traceback.format_exc()[-TRACE_CHARACTERS:]
                error = {"kind": type(e).__name__, "message": plain(mask(str(e)))[:1000], "trace": mask(trace)}
                if getattr(e, "hint", ""):
                    error["hint"] = plain(mask(str(e.hint)))[:500]
            break
        return Record(
            key=unit_key(self.work.spec_digest, unit.id, unit.items, unit.params),
            unit=unit.id,
            status="failed" if error else "ok",
            rows=() if error else rows,
            blobs={} if error else blobs,
            error=error,
            attempt=attempt,
            batch=batch,
            seconds=round(time.monotonic() - begin, 3),
            device=self.device_name,
            code=self.code,
            started=started,
        )

    def _recalled(self, unit: Unit, batch: int) -> tuple[tuple[Mapping[str, Json], ...], dict[str, str]] | None:
        """What a shared unit gave in any run of this store; measured and kept where it is new, None for other units."""
        if not (unit.shared and self.work.shared_digest and self._networks is not None):
            return None
        kept = None if self.work.kept is None else sorted(self.work.kept & set(unit.items))
        decides = [self.work.shared_digest, unit_key("", unit.id, unit.items, unit.params), self.code, batch, kept]
        address = digest([*decides, self.device_name, self._networks, float_versions()])
        known = self.store.recall(address)
        if known is None:
            rows, blobs = self._measure(unit, batch)
            if not any(row[name] for row in rows for name in row if name.endswith("-failure")):  # of a judge
                self.store.remember(address, rows, blobs)
            return rows, blobs
        return tuple(known["rows"]), known["blobs"]

    def _measure(self, unit: Unit, batch: int) -> tuple[tuple[Mapping[str, Json], ...], dict[str, str]]:
        """Runs the model over the unit's batches, measures each, keeps what is to be kept."""
        import numpy as np

        ctx = WorkerContext(self, batch)
        metrics = self.suite.metrics
        rows: dict[str, dict[str, Json]] = {}
        features: dict[str, list[np.ndarray]] = {}
        blobs: dict[str, str] = {}
        with ahead(owned(self.suite.run(unit, self.model, ctx))) as batches:
            for ids, media in batches:
                ids = list(ids)
                if len(set(ids)) < len(ids):
                    raise BadOutput(f"run() returned an item twice in one batch of {len(ids)}")
                new = [self._row(id, unit, rows) for id in ids]
                pictures = {name: m for name, m in media.items() if hasattr(m, "shape") and len(m.shape) > 1}
                self._check(ids, pictures, new, alone=not unit.shared)
                own = [("", {k: v for k, v in media.items() if k not in pictures})]
                batch_features: dict[str, np.ndarray] = {}  # metrics of one network return the same ones
                for source, columns in chain(own, ((metric.name, metric.measure(media, ctx)) for metric in metrics)):
                    for name, values in columns.items():
                        if not hasattr(values, "__len__"):
                            raise BadOutput(
                                f"{source or 'run'}: {name} is {type(values).__name__}, not a list or an array"
                            )
                        if len(values) != len(ids):
                            raise BadOutput(f"{source or 'run'}: {name} has {len(values)} values for {len(ids)} items")
                        if hasattr(values, "ndim") and values.ndim > 1:
                            batch_features[name] = np.asarray(values, np.float32)
                        elif name in OWN_COLUMNS:
                            raise BadOutput(
                                f"{source or 'run'}: {name!r} is a column of the harness; choose another name"
                            )
                        else:
                            for row, value in zip(new, values, strict=True):
                                row[name] = as_json(value)
                for name, values in batch_features.items():
                    features.setdefault(name, []).append(values)
                for i, id in enumerate(ids):
                    rows[id] = new[i]
                    if self.work.kept is None or id in self.work.kept:
                        for name, batch_media in pictures.items():
                            blobs[f"media/{name}/{id}"] = self.store.put(
                                *encode(batch_media[i], self.suite.value_range)
                            )
        missing = [id for id in unit.items if id not in rows]
        if missing:
            raise BadOutput(f"run() left out {len(missing)} of {len(unit.items)} items, {missing[0]!r} first")
        place = {id: i for i, id in enumerate(rows)}
        order = [place[id] for id in unit.items]
        for name, parts in features.items():
            whole = np.concatenate(parts)
            if len(whole) != len(order):
                raise BadOutput(f"features {name!r} have {len(whole)} rows for {len(order)} items")
            out = io.BytesIO()
            np.save(out, whole[order], allow_pickle=False)
            blobs[f"features/{name}"] = self.store.put(out.getvalue(), ".npy")
        ctx.clear_scratch()
        found = tuple(rows[id] for id in unit.items)
        canonical(found)  # what cannot be stored fails here, with the unit
        return found, blobs

    def find(self, id: str) -> tuple[Any, str]:
        """The manifest that holds an item, and the item's name there; None for a picture of the model."""
        source, _, name = id.partition(":")
        if source in self.others:
            return self.others[source], name
        if source == GENERATED and PictureSet in self.suite.requires:
            return None, name
        if self.manifest is not None and without_copy(id) != id and id not in self.manifest:
            return self.manifest, without_copy(id)
        return self.manifest, id

    def read(self, id: str) -> Any:
        """uint8 [H, W, 3] of an item."""
        manifest, name = self.find(id)
        return self.model.pictures([name])[0] if manifest is None else manifest.read(name)

    def _row(self, id: str, unit: Unit, rows: Mapping[str, Any]) -> dict[str, Json]:
        if id in rows:
            raise BadOutput(f"run() returned item {id!r} twice")
        if id not in unit.items:
            raise BadOutput(f"run() returned item {id!r}, which is not in unit {unit.id!r}")
        row: dict[str, Json] = {"item": id}
        manifest, name = self.find(id)
        if manifest is not None:
            item = manifest.item(name)
            if item.cluster:
                row["cluster"] = item.cluster
            row.update({name: item.attributes[name] for name in self.suite.slices if name in item.attributes})
        return row

    def _check(
        self, ids: list[str], pictures: Mapping[str, Any], rows: list[dict[str, Json]], alone: bool = False
    ) -> None:
        """Shapes, types and finiteness, before anything is rounded; names of media that are one flat value go into the
        row. `alone`: a medium without another beside it is the model's, not an original that may be flat."""
        flat: dict[str, list[bool]] = {}
        for name, media in pictures.items():
            kind = str(media.dtype).removeprefix("torch.")
            if not kind.startswith(("float", "bfloat", "uint", "int", "bool")):
                raise BadOutput(f"{name} is of type {kind}, not of real numbers")
            if str(media.device) == "meta":
                raise BadOutput(f"{name} lies on the device meta, which holds no values")
            if len(media) != len(ids):
                raise BadOutput(f"{name} has {len(media)} pictures for {len(ids)} items")
            if 0 in media.shape:
                raise BadOutput(f"{name} is empty: {tuple(media.shape)}")
            low, high = extremes(media)
            bad = [
                id
                for id, a, b in zip(ids, low, high, strict=True)
                if not (abs(a) < float("inf") and abs(b) < float("inf"))
            ]
            if bad:
                raise NonFinite(
                    f"{name} holds NaN or infinity in {len(bad)} of {len(ids)} pictures, item {bad[0]!r} first"
                )
            flat[name] = [a == b for a, b in zip(low, high, strict=True)]
        for i, row in enumerate(rows):
            names = [name for name, values in flat.items() if values[i]]
            if names and (len(names) < len(flat) or (alone and len(flat) == 1)):
                row["flat"] = names


class WorkerContext:
    """`bench.suite.Context` as the worker gives it."""

    def __init__(self, worker: Worker, batch: int):
        self._worker, self._batch = worker, batch
        self._scratch: list[Path] = []

    @property
    def device(self):
        import torch

        return torch.device(self._worker.device)

    def batches(self, unit: Unit) -> Iterator[list[str]]:
        for i in range(0, len(unit.items), self._batch):
            yield list(unit.items[i : i + self._batch])

    def item(self, id: str) -> Item:
        manifest, name = self._worker.find(id)
        return Item(id) if manifest is None else manifest.item(name)

    def picture(self, id: str):
        return self._worker.read(id)

    def images(self, ids: Sequence[str], size: int, resize: str = "adm"):
        return batch_of(self._worker, ids, size, resize, self.device)

    def seed(self, item: str, stream: str = "latent") -> int:
        suite = self._worker.suite
        return seed_for(self._worker.work.seed, suite.name, suite.version, item, stream)

    def generator(self, item: str, stream: str):
        import torch

        return torch.Generator("cpu").manual_seed(self.seed(item, stream))

    def judge(self, name: str) -> Any:
        judges = self._worker.judges
        if name not in judges:
            model, arguments = parse_model(getattr(self._worker.suite, name))
            bound = bind(registry.find("adapters", model), model, {}, arguments)
            judge = open_model(model, bound.what, bound.how, self._worker.device)
            store = self._worker.store
            judges[name] = self._worker.replies.around(judge, lambda: identity_of(model, bound.what, store))
        return judges[name]

    def weights(self, name: str) -> Path:
        from bench.manifest_weights import weights_path

        return weights_path(name)

    def extractor(self, name: str) -> Mapping[str, Json]:
        from bench.manifest_weights import extractor_table

        return extractor_table(name)

    def train(self, unit: Unit, recipe: Recipe) -> Path:
        from bench.train import train

        root, device = self._worker.work.seed, self._worker.device
        return train(recipe, self.scratch(unit) / recipe.name, spec=asdict(recipe), seed=root, device=device)

    def scratch(self, unit: Unit) -> Path:
        path = self._worker.store.root / "scratch" / self._worker.work.run_id / digest(unit.id)[:16]
        self._scratch.append(path)
        return door.make_folder(path)

    def clear_scratch(self) -> None:
        for path in self._scratch:
            shutil.rmtree(path, ignore_errors=True)


def as_json(value: Any) -> Json:
    """A measured value as JSON: numbers lose their NumPy or torch type; what is not finite is null."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
