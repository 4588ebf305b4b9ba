"""Steps: the runs that a command line or a plan asks for, carried out one after another, or one on each device."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import shlex
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from bench import config, registry
from bench.config import How, Value
from bench.store import Run, Store
from bench.text import brief, say, secrets
from bench.types import Error, UsageError

MOST_RUNS = 10_000  # that lists in one step of a plan may ask for

SENT = re.compile(r"(?:^|[?&])(url|credential)=")  # arguments of a model on another machine


@dataclass(frozen=True)
class Step:
    """One run that was asked for: a suite on a model with its values, where they were written."""

    suite: str
    model: str
    fields: Mapping[str, Any] = field(default_factory=dict)  # from a plan
    params: Mapping[str, str] = field(default_factory=dict)  # from flags
    plan_args: Mapping[str, Any] = field(default_factory=dict)
    model_args: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    limit: int | None = None
    where: str = "plan"


def run_step(
    step: Step,
    store: Store,
    how: How,
    *,
    shard: str = "",
    fresh: bool = False,
    origins: Mapping[str, Value] | None = None,
    typed: Sequence[str] = (),
) -> tuple[Run, bool]:
    """Carries one step out, with a bar. Returns the run and whether all that was asked for is there."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout carries data only, whatever suites and models print
        return _run_step(step, store, how, shard, fresh, origins, typed)


def _run_step(step, store, how, shard, fresh, origins, typed) -> tuple[Run, bool]:
    from bench.execution import carry_out, parse_shard
    from bench.progress import Bar
    from bench.show import counted, judge_failures
    from bench.text import mask

    plan, suite_origins = prepare_step(step, store, how)
    typed = shlex.join(["bench", *typed])
    meta = {
        "command": mask(typed),
        "suite_ref": step.suite,
        "config": _origins(
            {
                **{f"-p {k}": v for k, v in suite_origins.items()},
                **{f"-m {k}": v for k, v in plan.arguments.origins.items()},
                **(origins or {}),
            }
        ),
        "again": mask(command_of(step, store)),
    }
    with Bar(shlex.join(p for p in shlex.split(typed) if p != "--fresh")) as bar:
        run = carry_out(
            plan, store, how, seed=step.seed, limit=step.limit, shard=shard, fresh=fresh, extra_meta=meta, observer=bar
        )
    mine = {run.key(u) for u in (plan.units[slice(*parse_shard(shard))] if shard else plan.units)}
    failures = [r for r in run.failures() if r.key in mine]
    left = len(run.pending(plan.units)) - len(run.failures())
    if failures:
        which = f"bench show {run.id} names them; the same command tries again"
        say(f"{len(failures)} of {counted(len(mine), 'unit')} failed: {which}")
    if left and shard:
        say(f"{left} of {counted(len(plan.units), 'unit')} left to other shards")
    rows = run.table().rows
    for text in judge_failures(run, rows):
        say(text)
    flat = sum("flat" in row for row in rows)
    if flat:
        say(f"the model gave one flat colour for {flat} of {run.meta['items']:,} items; they are scored")
    partial = [s.metric for s in run.scores() if not s.complete]
    whole = not failures and (bool(shard) or not (left or partial))
    if whole and not left:
        say(f"complete. {run.path}")
    elif partial and not failures and not left:
        say(f"partial: {', '.join(dict.fromkeys(partial))} is not measured for every item. {run.path}")
    return run, whole


def run_steps(steps: Sequence[Step], store: Store, how: How, **options: Any) -> Iterator[tuple[Run, bool]]:
    """Carries steps out; yields each run and whether it is whole, as it ends.

    With several devices and several runs, each device takes a run at a time: a model is opened once and no run waits
    for another. A single run is spread over all devices.
    """
    from bench.execution import resolve_devices

    steps = list({command_of(step, store): step for step in steps}.values())  # the same run twice is one run
    devices = () if how.devices == "auto" or how.engine == "ray" else resolve_devices(how.devices)
    if len(devices) < 2 or len(steps) < 2:
        for step in steps:
            yield run_step(step, store, how, **options)
        return
    waiting = list(reversed(steps))
    spawn = get_context("spawn")
    helpers: dict[Any, Any] = {}
    try:
        for device in devices[: len(steps)]:
            ours, theirs = spawn.Pipe()
            one = replace(how, devices=device)
            helpers[ours] = spawn.Process(target=_help, args=(theirs, str(store.root), one, options))
            helpers[ours].start()
            theirs.close()
            _tell(ours, waiting.pop())
        while helpers:
            for pipe in connection.wait(list(helpers)):
                try:
                    answer = pipe.recv()
                except (EOFError, OSError):
                    raise _died() from None
                if isinstance(answer, Error):
                    raise answer
                if waiting:
                    _tell(pipe, waiting.pop())
                else:
                    pipe.close()
                    helpers.pop(pipe).join()
                name, whole = answer
                yield store.run(name), whole
    finally:
        for helper in helpers.values():
            helper.terminate()
            helper.join(5)


def _tell(pipe: Any, step: Step) -> None:
    """Sends a step; a process that is gone is an Error, not a reader who closed our output."""
    try:
        pipe.send(step)
    except OSError:
        raise _died() from None


def _died() -> Error:
    return Error("a process that carries out a plan died", hint="the same command continues")


def _help(pipe: Any, root: str, how: How, options: Mapping[str, Any]) -> None:
    """A process that carries out the steps it is sent on one device; it does not outlive the one that sends them."""
    parent = parent_process()

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            step = pipe.recv()
            try:
                run, whole = run_step(step, Store(root), how, **options)
                pipe.send((run.id, whole))
            except Error as e:
                pipe.send(e)


def prepare_step(step: Step, store: Store, how: How):
    from bench.prepare import prepare

    for name, value in {**step.fields, **step.params, **step.plan_args, **step.model_args}.items():
        secrets().add_named(name, str(value))  # what is given as a key is masked wherever it is written
    cls = registry.find("suites", step.suite)
    suite, origins = config.build(cls, step.fields, step.params, step.where)
    factory = registry.find("adapters", step.model)
    arguments = config.bind(factory, step.model, step.plan_args, step.model_args, step.where)
    plan = prepare(
        suite,
        step.model,
        arguments,
        store=store,
        suite_ref=step.suite,
        seed=step.seed,
        limit=step.limit,
        strict=how.strict,
    )
    return plan, origins


def command_of(step: Step, store: Store) -> str:
    """The command that does a step: what continues it, what a board prints."""
    parts = ["bench", "score", step.suite, "--model", step.model]
    for flag, values in (("-m", {**step.plan_args, **step.model_args}), ("-p", {**step.fields, **step.params})):
        for name, value in values.items():
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            parts += [flag, f"{name}={text}"]
    if step.seed:
        parts += ["--seed", str(step.seed)]
    if step.limit is not None:
        parts += ["--limit", str(step.limit)]
    if str(store.root) != How().store:
        parts += ["--store", str(store.root)]
    return shlex.join(parts)


def _origins(values: Mapping[str, Value]) -> dict[str, Any]:
    from bench.text import mask

    return {name: [mask(str(v.value)) if v.value is not None else None, v.origin] for name, v in values.items()}


def flag_steps(args: Namespace) -> Iterator[Step]:
    if not args.model:
        raise UsageError("which model?", hint="--model NAME; bench list shows the adapters")
    params, model_args = config.assignments(args.p, "-p"), config.assignments(args.m, "-m")
    for suite in args.what:
        yield Step(suite, args.model, params=params, model_args=model_args, seed=args.seed or 0, limit=args.limit)


def plan_steps(plan: Mapping[str, Any], where: str, args: Namespace) -> Iterator[Step]:
    for run in plan.get("run", ()):
        with told(where):
            cls = registry.find("suites", run["suite"])
            registry.find("adapters", run["model"])
        for params in product(run.get("params", {}), list_fields(cls)):
            for model_args in product(run.get("model_args", {}), set()):
                for seed in [args.seed] if args.seed is not None else run.get("seeds", [0]):
                    yield Step(
                        run["suite"],
                        run["model"],
                        fields=params,
                        plan_args=model_args,
                        seed=config.convert(seed, int, f"{where}: seeds"),
                        limit=args.limit if args.limit is not None else run.get("limit"),
                        where=where,
                    )


def list_fields(cls: type) -> set[str]:
    """The fields that are lists themselves."""
    return {n for n, t in config.field_types(cls).items() if "tuple" in str(t) or "list" in str(t)}


def product(values: Mapping[str, Any], whole: set[str]) -> Iterator[dict[str, Any]]:
    """Lists are products, but for parameters that are lists themselves."""
    choices = [v if isinstance(v, list) and k not in whole else [v] for k, v in values.items()]
    if (count := math.prod(map(len, choices))) > MOST_RUNS:
        names = ", ".join(brief(k, 30) for k, v in zip(values, choices, strict=True) if len(v) > 1)
        raise Error(
            f"the lists {brief(names)} are {count:,} combinations, more than {MOST_RUNS:,}", hint="fewer of them"
        )
    for chosen in itertools.product(*choices):
        yield dict(zip(values, chosen, strict=True))


@contextlib.contextmanager
def told(where: str) -> Iterator[None]:
    """Puts the plan's name before what is wrong in it."""
    try:
        yield
    except Error as e:
        raise type(e)(f"{where}: {e}", hint=e.hint) from None


def refuse_code(plan: Mapping[str, Any], path: Path, allowed: bool) -> None:
    """A plan from elsewhere is data: it names Python files, and servers that pictures and keys would go to, only where
    the user says so; it writes only below here."""
    if allowed or path.resolve().is_relative_to(Path.cwd()):
        return
    written = [step["out"] for step in plan.get("train", ())] + [plan.get("how", {}).get("store", "")]
    for place in map(str, written):
        if Path(os.path.expanduser(place)).is_absolute() or ".." in Path(place).parts:
            raise Error(
                f"{path} lies outside the working folder and writes to {brief(place)}",
                hint="copy the plan here if that is meant",
            )
    for step in [*plan.get("run", ()), *plan.get("train", ())]:
        for name in _texts(step):
            if registry.is_path(name):
                raise Error(
                    f"{path} lies outside the working folder and names the Python file {name}",
                    hint="read that file, then add --allow-code",
                )
            sent = SENT.search(name)
            if sent:
                raise Error(
                    f"{path} lies outside the working folder and names a {sent[1]}, to which pictures or keys would go",
                    hint="read the plan, then add --allow-code",
                )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a plan's step, its parameters too, alone and as name=value: a field may name a judge."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner)
            yield from [f"{name}={inner}"] if isinstance(inner, str) else []
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
