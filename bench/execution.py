"""From a suite and a model to records and scores: identity, preflight, resume, limits, reduction."""

from __future__ import annotations

import inspect
import itertools
import math
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from bench import door, registry
from bench.capabilities import PictureSet
from bench.config import Arguments, How, bind, data_field, data_fields, markers
from bench.engine import Engine, LocalEngine, Measure
from bench.identity import digest, fingerprint, without_copy
from bench.store import Run, Store, dump_scores, run_id
from bench.suite import Suite
from bench.text import mask
from bench.types import Error, Json, Model, Record, Score, Unit, UsageError, Weights
from bench.worker import GENERATED, Work, code_digest, open_model, parse_model, require, utc, versions_of

SAMPLE = 64  # items whose media a sample keeps, of the model and of what all models share
KEEP_ALL_BELOW = 2_000  # items
PREFLIGHT_ABOVE = 50  # units
FREE_BYTES = 100_000_000
LEAST_FAILURES = 3
MOST_WORKERS = 10_000


class Observer:
    """Told what happens during a run; the command line draws a bar with it."""

    def begin(self, run: Run, units: Sequence[Unit], pending: Sequence[Unit]) -> None: ...

    def done(self, unit: Unit, record: Record) -> None: ...

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)


@dataclass(frozen=True)
class Plan:
    """One suite on one model, every name resolved and every fingerprint taken; nothing opened yet."""

    suite: Suite
    suite_ref: str  # how a worker finds the suite: name or path.py:Name
    model: Any  # name or path.py:Name, or a live object
    arguments: Arguments
    label: str  # what the model is called on boards
    manifest: Any  # of the first field of type Data
    others: Mapping[str, Any]  # those of further fields
    units: tuple[Unit, ...]
    spec: Mapping[str, Json]
    meta: Mapping[str, Json]


def prepare(
    suite: Suite,
    model: Any,
    arguments: Arguments | None = None,
    *,
    store: Store,
    identity: Mapping[str, Json] | None = None,
    suite_ref: str = "",
    seed: int = 0,
    limit: int | None = None,
    strict: bool = False,
) -> Plan:
    """Resolves names, takes fingerprints, lists units. Loads neither torch nor the model, but for the names of a
    PictureSet.

    Raises Error for a missing capability, manifest or weights file.
    """
    named = isinstance(model, str)
    if named:
        factory = registry.find("adapters", model)
        arguments = arguments or bind(factory, model, {}, {})
        if inspect.isclass(factory):
            require(suite, factory, model)
    elif identity is None:
        raise Error("a live model has no file to fingerprint", hint='pass identity={"step": …, "sha": …}')
    else:
        require(suite, model, type(model).__name__)
    arguments = arguments or Arguments()
    made = ()
    if PictureSet in suite.requires:
        opened = open_model(model, arguments.what, arguments.how, "cpu") if named else model
        made = (_first_by_hash(opened.names(), limit),)
    manifests: dict[str, Any] = {}
    with store.digests() as digests:
        if strict:
            digests.entries.clear()
        for name in data_fields(type(suite)):
            from bench.manifest import load

            manifests[name] = load(getattr(suite, name), digests=digests)
            if limit is not None:
                manifests[name] = manifests[name].subset(limit)
        model_args = {k: _identified(v, k in arguments.weights, digests) for k, v in arguments.what.items()}
        suite_fields = _suite_fields(suite, manifests, digests)
    manifest, others = next(iter(manifests.values()), None), dict(list(manifests.items())[1:])
    _check_prefixes(manifest, (*others, GENERATED) if made else tuple(others))
    units = tuple(suite.units(manifest, *others.values(), *made))
    if manifest is None and not made and limit is not None:
        units = _first(units, limit)
    _check_units(units, suite.name)
    label = model_label(model, arguments) if named else str(identity.get("name", type(model).__name__))
    spec: dict[str, Json] = {
        "suite": suite.name,
        "suite_version": suite.version,
        "fields": suite_fields,
        "data": None if manifest is None else manifest.digest,
        "adapter": registry.identity(model) if named else "live",
        "adapter_args": model_args if named else dict(identity),
        "seed": seed,
        "limit": limit,
    }
    return Plan(
        suite,
        suite_ref or suite.name,
        model,
        arguments,
        label,
        manifest,
        others,
        units,
        spec,
        _meta(suite, label, list(manifests.values()), units),
    )


def execute(
    suite: Suite,
    model: Any,
    *,
    store: Store | None = None,
    arguments: Arguments | None = None,
    identity: Mapping[str, Json] | None = None,
    suite_ref: str = "",
    seed: int = 0,
    limit: int | None = None,
    shard: str = "",
    how: How | None = None,
    fresh: bool = False,
    extra_meta: Mapping[str, Json] | None = None,
    observer: Observer | None = None,
    engine: Engine | None = None,
) -> Run:
    """Measures what is pending and derives the scores. Doing it again continues, or does nothing.

    `model` is an adapter's name with its `arguments`, or a live object with an `identity` that tells it from others.
    `engine` stands in for the one that `how` names.
    Raises Error when the run cannot start or had to stop; what was measured stays.
    """
    how = how or How(store=str(store.root) if store else ".bench")
    store = store or Store(how.store)
    how = replace(how, store=str(store.root))
    observer = observer or Observer()
    plan = prepare(
        suite,
        model,
        arguments,
        store=store,
        identity=identity,
        suite_ref=suite_ref,
        seed=seed,
        limit=limit,
        strict=how.strict,
    )
    options = {"shard": shard, "fresh": fresh, "extra_meta": extra_meta, "observer": observer, "engine": engine}
    return carry_out(plan, store, how, seed=seed, limit=limit, **options)


def carry_out(
    plan: Plan,
    store: Store,
    how: How,
    *,
    seed: int = 0,
    limit: int | None = None,
    shard: str = "",
    fresh: bool = False,
    extra_meta: Mapping[str, Json] | None = None,
    observer: Observer | None = None,
    engine: Engine | None = None,
) -> Run:
    """The measuring half of `execute`, for a plan at hand."""
    observer = observer or Observer()
    if shard and fresh:
        raise UsageError("--fresh would move the other shards' records aside", hint="--fresh once, without --shard")
    mine = plan.units[slice(*parse_shard(shard))] if shard else plan.units
    run = find_run(plan, store) if not fresh else None

    def begun() -> Run:
        meta = {**plan.meta, **(extra_meta or {}), **_provenance(), "started": utc()}
        return store.open(plan.spec, meta, fresh=fresh)

    pending = run.pending(mine) if run else list(mine)
    if pending:
        engine = engine or choose_engine(plan, how)
        work = Work(
            suite=plan.suite_ref,
            fields={f.name: getattr(plan.suite, f.name) for f in fields(plan.suite)},
            model=plan.model if isinstance(plan.model, str) else plan.label,
            model_what=plan.arguments.what,
            model_how=plan.arguments.how,
            data=plan.manifest and getattr(plan.suite, data_field(type(plan.suite)) or ""),
            limit=limit,
            seed=seed,
            spec_digest=digest(plan.spec),
            spec=plan.spec,
            versions={} if isinstance(engine, LocalEngine) else versions_of(type(plan.suite)),
            patience=plan.suite.patience,
            shared_digest="" if fresh else digest({k: v for k, v in plan.spec.items() if not k.startswith("adapter")}),
            run_id=run_id(plan.spec, plan.label),
            kept=_kept(how.keep, plan),
            how=how,
        )
        live = {} if _elsewhere(engine) else {"suite": plan.suite, "manifest": plan.manifest}
        if not isinstance(plan.model, str):
            live["model"] = plan.model
        check_ready(plan, store)
        if run:
            run.check_free(shard)
        with engine.open(work, **live) as measure:
            if len(pending) > PREFLIGHT_ABOVE and len(pending[0].items) > 2:
                _try_two_items(pending[0], measure, work.model)
            run = begun()
            observer.begin(run, mine, pending)
            _record(run, measure, pending, shard, how, observer, code_digest(type(plan.suite)))
    else:
        run = run or begun()  # a shard that holds no unit may be the first to come
        observer.begin(run, mine, pending)
    derive(run, plan.suite)
    return run


def find_run(plan: Plan, store: Store) -> Run | None:
    """The run of a plan, when it was begun before."""
    path = store.root / "runs" / run_id(plan.spec, plan.label)
    if not (path / "run.json").is_file():
        return None
    run = Run(store, path)
    if run.spec_digest != digest(plan.spec):
        raise Error(
            f"{path} holds another run", hint="move that folder aside; its run.json names another specification"
        )
    return run


def choose_engine(plan: Plan, how: How) -> Engine:
    """The engine that `how` names. Foreign code and what has a time limit get a process of their own."""
    if how.engine == "ray":
        from bench.ray_engine import RayEngine

        return RayEngine(() if how.devices == "auto" else resolve_devices(how.devices), how.ray)
    devices = resolve_devices(how.devices)
    if not isinstance(plan.model, str) and how.devices == "auto":
        devices = devices[:1]  # a live model lives in this process
    return LocalEngine(devices, how.isolate or len(devices) > 1 or how.unit_timeout > 0 or _foreign(plan))


def _elsewhere(engine: Engine) -> bool:
    """Do its workers live in other processes?"""
    return not isinstance(engine, LocalEngine) or engine.processes or len(engine.devices) > 1


def _record(
    run: Run, measure: Measure, pending: Sequence[Unit], shard: str, how: How, observer: Observer, code: str
) -> None:
    """Appends a record for each pending unit; stops early when too many fail.

    Records that are ready together are made durable together, before any of their workers is given another unit.
    What comes twice is ignored; what other code measured stops the run.
    """
    from bench.store import record_line

    attempts = {r.key: r.attempt for r in run.records().values()}
    allowed = max(LEAST_FAILURES, how.max_failures * len(pending))
    awaited = {run.key(u): u for u in pending}
    ordered = sorted(pending, key=lambda u: -u.cost)  # longest first; equal ones keep their order
    done = failed = 0
    with run.writer(shard, observer.say) as log:
        for group in measure(ordered):
            new = {r.key: r for r in reversed(group) if r.key in awaited}  # of two the first
            records = [replace(r, attempt=r.attempt + attempts.get(r.key, 0)) for r in reversed(new.values())]
            for record in records:
                if record.code not in ("", code):
                    raise Error(
                        f"unit {record.unit} was measured with code {record.code}, not {code}",
                        hint="install the same version everywhere, then run the same command again",
                    )
            with door.signals_held() as came:
                log.append(b"".join(map(record_line, records)))
                for record in records:
                    observer.done(awaited.pop(record.key), record)
            if came:
                signal.raise_signal(came[0])
            done += len(records)
            failures = [r for r in records if r.status == "failed"]
            failed += len(failures)
            if failures and failed > allowed and done < len(pending):
                record = failures[-1]
                raise Error(
                    f"stopped: {failed} of {done} units failed, more than --max-failures allows; the last: "
                    f"{record.unit}: {record.error['kind']}: {record.error['message']}",
                    hint=f"bench show {run.id} --unit {record.unit}; {done - failed} units are on disk",
                )


def derive(run: Run, suite: Suite) -> list[Score]:
    """Reduces the records to scores.csv; again when another shard appended meanwhile."""
    while True:
        seen = run.sizes()
        table = run.table()
        _check_items(run, table)
        found = suite.score(table)
        for metric in later_metrics(run):
            found += [s for name, part in suite._parts(table) for s in suite._reduce(metric, name, part)]
        found = [replace(s, run=run.id, model=run.meta["model"]) for s in _flagged(map(_finite, found), table)]
        path = run.path / "scores.csv"
        if not path.is_file() or path.read_bytes() != dump_scores(found):
            run.save_scores(found)
        for name, data in suite.artifacts(table):
            door.make_folder(run.path / "artifacts")
            door.replace(run.path / "artifacts" / name, data)
        if run.sizes() == seen:
            return found


def _check_items(run: Run, table: Any) -> None:
    """Raises Error where the shards together hold an item twice, or one that was never planned."""
    expected = run.meta.get("items_digest")
    if expected is None or len(table) < table.expected:
        return  # begun by an earlier version, or not finished
    if _set_digest(row["item"] for row in table.rows) != expected:
        raise Error(
            f"{run.id} holds {len(table):,} rows that are not the {table.expected:,} items planned",
            hint="some stand twice or come from elsewhere: --fresh measures again",
        )


def _set_digest(ids: Iterable[str]) -> str:
    """Of a set of items in any order, repeats counted."""
    from bench.metrics.moments import digest_of

    return f"{digest_of(ids):032x}"


def _finite(score: Score) -> Score:
    """No NaN and no infinity is stored: they become null, and the note says so."""
    bad = [n for n in ("value", "low", "high") if (v := getattr(score, n)) is not None and not math.isfinite(v)]
    if not bad:
        return score
    gone = {n: None for n in bad} if "value" not in bad else {"value": None, "low": None, "high": None}
    return replace(score, **gone, complete=False, note=score.note or f"{' and '.join(bad)} not finite")


def _flagged(scores: Iterable[Score], table: Any) -> list[Score]:
    """Scores over pictures some of which are one flat colour say so: a broken model may give such, and score well."""
    flat = sum("flat" in row for row in table.rows)
    if not flat or len(table) < table.expected:  # a note would say that nothing is missing
        return list(scores)
    note = f"{flat:,} picture{' is' if flat == 1 else 's are'} one flat colour"
    return [replace(s, note="; ".join(n for n in (s.note, note) if n)) if s.complete else s for s in scores]


def later_metrics(run: Run) -> list[Any]:
    """The metrics that `rescore --metric` added to a run."""
    from bench.rescore import open_metric
    from bench.store import read_lines

    names = []
    for path in sorted((run.path / "extra").glob("*.jsonl")):
        names += [v["metric"] for v in read_lines(path)[0] if v.get("metric")]
    return [open_metric(name) for name in dict.fromkeys(names)]


def suite_of(run: Run) -> Suite:
    """The suite that a run was measured with, from what run.json says of it."""
    cls = registry.find("suites", run.meta["suite_ref"])
    if cls.version != run.spec["suite_version"]:
        raise Error(
            f"{run.id} is of {cls.name} version {run.spec['suite_version']}; this is version {cls.version}",
            hint="score again: old records are not reused",
        )
    from bench.config import convert, field_types

    kinds, given = field_types(cls), run.meta["suite_fields"]
    unknown = sorted(given.keys() - kinds.keys())
    if unknown:
        raise Error(f"{run.id} was measured with {unknown[0]}, which {cls.name} no longer has", hint="score again")
    return cls(**{k: convert(v, kinds[k], k) if v is not None else None for k, v in given.items()})


# -- identity


def model_label(model: str, arguments: Arguments) -> str:
    """What a model is called: the weights' own name, else the adapter's, with the arguments that were given.

    It becomes part of folders, tables and pages: secrets are masked.
    """
    parts = []
    for name, value in arguments.what.items():
        if name in arguments.weights and value:
            text = str(value)
            if text.startswith("hf:"):
                text = text.partition("@")[0]
            parts.insert(0, Path(text.rstrip("/")).name.removesuffix(".safetensors"))
        elif arguments.origins.get(name) and arguments.origins[name].origin != "default":
            parts.append(str(value))
    if not any(n in arguments.weights and value for n, value in arguments.what.items()):
        parts.insert(0, model.partition(":")[2] if registry.is_path(model) else model)
    return "-".join(map(mask, parts))


def _identified(value: Any, is_weights: bool, digests: Any) -> Json:
    if is_weights and value is not None:
        from bench.weights import resolve

        return fingerprint(resolve(str(value)), digests)
    if isinstance(value, str) and mask(value) != value:  # an address with a key in it: told from others by its digest
        return [mask(value), digest(value)[:16]]
    return value


def _first_by_hash(names: Sequence[str], limit: int | None) -> list[str]:
    """The names of a PictureSet; with a limit those that come first by their hashes, as `Manifest.subset` chooses."""
    names = list(names)
    if limit is None or limit >= len(names):
        return names
    if limit < 1:
        raise UsageError(f"limit is {limit}; it must be 1 or more")
    chosen = set(sorted(names, key=lambda name: digest(["subset", name]))[:limit])
    return [name for name in names if name in chosen]


def _check_prefixes(manifest: Any, prefixes: Sequence[str]) -> None:
    """Raises Error for an item that reads as one of another source."""
    for id in manifest.ids() if manifest is not None and prefixes else ():
        source, colon, _ = id.partition(":")
        if colon and source in prefixes:
            raise Error(f"data {manifest.name}: item {id!r} reads as one of {source}", hint="rename it")


def _suite_fields(suite: Suite, manifests: Mapping[str, Any], digests: Any) -> dict[str, Json]:
    """The suite's parameters as they enter the specification: files and models by fingerprint, data by digest."""
    cls = type(suite)
    files = {*markers(cls, Weights), *markers(cls, Path)}
    found: dict[str, Json] = {}
    for f in fields(suite):
        value = getattr(suite, f.name)
        if f.name in manifests:
            manifest, first = manifests[f.name], next(iter(manifests))
            found[f.name] = manifest.name if f.name == first else [manifest.name, manifest.digest]
        elif f.name in files and value:
            found[f.name] = _identified(str(value), True, digests)
        elif f.name in markers(cls, Model) and value:
            name, given = parse_model(str(value))
            bound = bind(registry.find("adapters", name), name, {}, given)
            found[f.name] = [name, {k: _identified(v, k in bound.weights, digests) for k, v in bound.what.items()}]
        else:
            found[f.name] = list(value) if isinstance(value, tuple) else value
    return found


def _meta(suite: Suite, label: str, manifests: Sequence[Any], units: Sequence[Unit]) -> dict[str, Json]:
    return {
        "model": label,
        "suite_ref": suite.name,
        "suite_fields": {
            f.name: list(v)
            if isinstance(v := getattr(suite, f.name), tuple)
            else (v if not isinstance(v, Path) else str(v))
            for f in fields(suite)
        },
        "units": len(units),
        "items": sum(len(u.items) for u in units),
        "items_digest": _set_digest(i for u in units for i in u.items),
        "sensitive": suite.sensitive or any(bool(m.sensitive) for m in manifests),
        "redistribute": all(bool(m.redistribute) for m in manifests),
        "manifests": [
            {
                "name": manifest.name,
                "digest": manifest.digest,
                "license": manifest.license,
                "redistribute": manifest.redistribute,
                "sensitive": manifest.sensitive,
                "items": len(manifest.ids()),
                "clusters": manifest.num_clusters(),
            }
            for manifest in manifests
        ],
    }


def _provenance() -> dict[str, Json]:
    from bench.provenance import collect

    return collect()


def _first(units: Sequence[Unit], limit: int) -> tuple[Unit, ...]:
    """The first units that hold `limit` items together, at least one: the limit where there is no manifest."""
    if limit < 1:
        raise UsageError(f"limit is {limit}; it must be 1 or more")
    counts = itertools.accumulate((len(u.items) for u in units), initial=0)
    return tuple(u for u, before in zip(units, counts, strict=False) if before < limit)


def _check_units(units: Sequence[Unit], name: str) -> None:
    if not units:
        raise Error(f"suite `{name}` has no units for this data", hint="is the manifest empty, or the limit 0?")
    seen: set[str] = set()
    for unit in units:
        if unit.id in seen:
            raise Error(f"suite `{name}` has two units {unit.id!r}", hint="unit ids must differ")
        seen.add(unit.id)


def _kept(keep: str, plan: Plan) -> frozenset[str] | None:
    """The items whose media are kept; None for all."""
    if keep == "all" or (keep == "auto" and sum(len(u.items) for u in plan.units) < KEEP_ALL_BELOW):
        return None
    if keep == "none":
        return frozenset()
    kept: set[str] = set()
    for shared in (False, True):  # so that what the model made is among it, however large a reference is
        items = [i for u in plan.units if u.shared == shared for i in u.items]
        kept.update(sorted(items, key=lambda i: digest(["sample", without_copy(i)]))[:SAMPLE])  # copies stay together
    return frozenset(kept)


def _foreign(plan: Plan) -> bool:
    """Does code run that does not come with the harness? Then the worker gets a process of its own."""
    if not isinstance(plan.model, str):
        return False
    return any(
        registry.is_path(name) or not all(e.builtin for e in registry.entries(kind) if e.name == name)
        for kind, name in (("adapters", plan.model), ("suites", plan.suite_ref))
    )


# -- before the first unit


def check_ready(plan: Plan, store: Store) -> None:
    """What can fail is tried first: files of the manifest, room and access in the store."""
    for manifest in (plan.manifest, *plan.others.values()):
        if manifest is not None:
            with store.digests() as manifest.digests:
                manifest.check()
    door.make_folder(store.root / "runs")
    free = shutil.disk_usage(store.root).free
    if free < FREE_BYTES:
        raise Error(
            f"{store.root} has {free // 1_000_000} MB free", hint="make room, or name another store with --store"
        )


def _try_two_items(unit: Unit, measure: Measure, model: str) -> None:
    """A long run begins with a unit of two items that is not recorded."""
    ((record,),) = measure([replace(unit, items=unit.items[:2])])
    if record.status == "failed":
        assert record.error
        raise Error(
            f"a trial of two items failed: {record.error['kind']}: {record.error['message']}",
            hint=f"bench check --model {model} tries the model alone; nothing was recorded",
        )


def resolve_devices(text: str) -> tuple[str, ...]:
    """`auto` is every GPU, else the CPU; otherwise a list by commas, in which `cpu*4` stands four times."""
    if text != "auto":
        parts = [part.partition("*") for part in text.split(",") if part.strip()]
        for name, star, count in parts:
            if star and not (count.isascii() and count.isdigit() and 1 <= int(count) <= MOST_WORKERS):
                raise UsageError(f"{name}*{count} is not a device and a number", hint=f"cpu*4; at most {MOST_WORKERS}")
        names = tuple(name.strip() for name, _, count in parts for _ in range(int(count or 1)))
        for name in names:
            if name.partition(":")[0] not in ("cpu", "cuda", "mps") and not name.isdigit():
                raise UsageError(f"unknown device {name!r}", hint="cpu, cuda:0, mps; several by commas")
        if not names:
            raise UsageError("no device is named", hint="cpu, cuda:0, mps; several by commas; auto for every GPU")
        return tuple(f"cuda:{n}" if n.isdigit() else n for n in names)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return tuple(f"cuda:{i}" for i in range(count)) or ("cpu",)


def parse_shard(text: str) -> tuple[int, None, int]:
    """`3/16` as the slice that takes every 16th unit from the fourth; parts are numbered from 0."""
    part, slash, count = text.partition("/")
    plain = part.isascii() and count.isascii() and part.isdigit() and count.isdigit()
    if not (slash and plain and text == f"{int(part)}/{int(count)}" and int(part) < int(count)):
        raise UsageError(f"--shard {text!r} is not k/n with 0 <= k < n", hint="--shard 0/16 is the first of sixteen")
    return int(part), None, int(count)
