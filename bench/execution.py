"""From a suite and a model to records and scores: preflight, resume, limits."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from bench import door, registry
from bench.config import Arguments, How, data_field
from bench.engine import Engine, LocalEngine, Measure
from bench.identity import digest, without_copy
from bench.prepare import Plan, prepare
from bench.reduction import derive
from bench.store import Run, Store, run_id
from bench.suite import Suite
from bench.text import say
from bench.types import Error, Json, Record, Unit, UsageError
from bench.versions import code_digest, versions_of
from bench.worker import Work, utc

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
        say(text)


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

    seen = _written(run) if run else {}
    records = run.records() if run else {}
    pending = run.pending(mine, records) if run else list(mine)
    attempts = {r.key: r.attempt for r in records.values()}
    del records  # as large as the run
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
            _record(run, measure, pending, seen, attempts, shard, how, observer, code_digest(type(plan.suite)))
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


def _written(run: Run) -> dict[str, int]:
    return {path: size for path, size in run.sizes().items() if size}


def _record(
    run: Run,
    measure: Measure,
    pending: Sequence[Unit],
    seen: Mapping[str, int],
    attempts: Mapping[str, int],
    shard: str,
    how: How,
    observer: Observer,
    code: str,
) -> None:
    """Appends a record for each unit that was pending when the logs were as `seen`; stops early when too many fail.

    Records that are ready together are made durable together, before any of their workers is given another unit.
    What comes twice is ignored; what other code measured stops the run.
    """
    from bench.records import record_line

    with run.writer(shard, observer.say) as log:
        if _written(run) != seen:  # another process was at it before the lock was ours
            pending = run.pending(pending)
        allowed = max(LEAST_FAILURES, how.max_failures * len(pending))
        awaited = {run.key(u): u for u in pending}
        ordered = sorted(pending, key=lambda u: -u.cost)  # longest first; equal ones keep their order
        done = failed = 0
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


def _provenance() -> dict[str, Json]:
    from bench.provenance import collect

    return collect()


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
