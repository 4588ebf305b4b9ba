"""What each verb of the command line does. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bench import config, registry
from bench.config import How, Value
from bench.identity import slug
from bench.steps import Step, flag_steps, list_fields, plan_steps, prepare_step, product, refuse_code, run_steps, told
from bench.store import Store
from bench.text import brief, say, secrets
from bench.types import Error, UsageError, Weights

HOW = tuple(f.name for f in fields(How))


def emit(kind: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object to stdout, in ASCII: any terminal and any pipe takes it."""
    print(json.dumps({"schema": 1, "kind": kind, "rows": list(rows)}, indent=1, allow_nan=False))


# -- score


def score(args: Namespace) -> int:
    """Scores what was named; 0 when complete, 3 when units failed or scores are partial."""
    from bench.show import print_scores

    registry.check_names()
    plan, where = {}, "plan"
    if any(w.endswith(".toml") for w in args.what):
        if len(args.what) > 1:
            raise UsageError("a plan file stands alone", hint="bench score plan.toml")
        plan, where = config.read_plan(Path(args.what[0])), Path(args.what[0]).name
        if args.model or args.m or args.p:
            raise UsageError("a plan names its own models and parameters", hint="edit the plan, or leave it out")
        refuse_code(plan, Path(args.what[0]), args.allow_code)
    flags = {name: getattr(args, name, None) for name in HOW}
    how, how_origins = config.resolve_how(plan.get("how", {}), flags, where)
    store = Store(how.store)
    steps = list(plan_steps(plan, where, args)) if plan else list(flag_steps(args))
    if not args.explain:
        for step in plan.get("train", ()):
            for one in _train_steps(step, where):
                _train(**one, device=how.devices)
    runs, complete = [], True
    if args.explain:
        for step in steps:
            _explain(step, store, how, how_origins, args.shard)
        return 0
    options = {"shard": args.shard, "fresh": args.fresh, "origins": how_origins, "typed": args.typed}
    for run, whole in run_steps(steps, store, how, **options):
        runs.append(run)
        complete &= whole
        if not args.json:
            print_scores(run)
    if args.json:
        emit("scores", [asdict(s) for run in runs for s in run.scores()])
    for board in plan.get("board", ()):
        _render(board["name"], store, None)
    return 0 if complete else 3


def _explain(step: Step, store: Store, how: How, how_origins: Mapping[str, Value], shard: str) -> None:
    from bench.execution import find_run, parse_shard
    from bench.show import columns
    from bench.store import run_id

    plan, origins = prepare_step(step, store, how)
    mine = plan.units[slice(*parse_shard(shard))] if shard else plan.units
    run = find_run(plan, store)
    rows = [["suite", f"{plan.suite.name} version {plan.suite.version}", step.suite], ["model", plan.label, step.model]]
    for prefix, values in (("-p ", origins), ("-m ", plan.arguments.origins), ("", how_origins)):
        rows += [[prefix + name, str(v.value), v.origin] for name, v in values.items()]
    rows += [
        [f"fingerprint {k}", str(v), ""] for k, v in plan.spec["adapter_args"].items() if k in plan.arguments.weights
    ]
    for manifest in (plan.manifest, *plan.others.values()):
        if manifest is not None:
            rows.append(["data", f"{manifest.name} {manifest.digest}", f"{len(manifest.ids())} items"])
    rows.append(["run", run_id(plan.spec, plan.label), "exists" if run else "new"])
    rows.append(["units", str(len(mine)), f"{len(run.pending(mine)) if run else len(mine)} pending"])
    print(columns(["what", "value", "origin"], rows))
    print()


# -- leaderboard, demo


def leaderboard(args: Namespace) -> int:
    how, _ = config.resolve_how({}, {"store": args.store})
    summary = _render(args.board, Store(how.store), Path(args.out) if args.out else None)
    if args.json:
        from bench.report import load

        emit("scores", [asdict(s) for s in load(summary.page.parent)])
    else:
        print(summary.page)
    return 0


def _render(board: str | None, store: Store, out: Path | None):
    from bench.report import find_board, render

    path = find_board(board)
    summary = render(path, store, out or Path("reports") / path.stem)
    say(str(summary))
    return summary


def demo(args: Namespace) -> int:
    """The plan that ships with the harness, on embedded models and data."""
    path = Path(__file__).with_name("demo.toml")
    plan = config.read_plan(path)
    how, origins = config.resolve_how(plan["how"], {"store": args.store}, path.name)
    store = Store(how.store)
    steps = list(plan_steps(plan, path.name, Namespace(seed=None, limit=None)))
    complete = all([whole for _, whole in run_steps(steps, store, how, origins=origins, typed=args.typed)])
    for board in plan["board"]:
        out = Path(args.out or "reports") / board["name"]
        print(_render(board["name"], store, out).page)
    return 0 if complete else 3


# -- fit


def fit(args: Namespace) -> int:
    """Fits a law to a table or a run, prints the estimates and writes a page, figures and files."""
    from bench.report.fitted import print_finding, write_finding

    rows, name = _table(args.source, args.store)
    finding = args.fits(rows, name, args)
    out = Path(args.out) if args.out else Path("reports") / "fits" / slug(Path(name).stem)
    page = write_finding(finding, out)
    if args.json:
        emit("fit", [{**finding.record, "title": finding.title, "page": str(page)}])
    else:
        print_finding(finding)
        say(str(page))
    return 0


def _table(source: str, store: str | None) -> tuple[Path | list[Mapping[str, Any]], str]:
    """A file, or the rows of a run of the store; and what to call it."""
    path = Path(source)
    if path.is_file() or path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl"):
        return path, path.name
    how, _ = config.resolve_how({}, {"store": store}, "")
    run = Store(how.store).run(source)
    return list(run.table().rows), run.id


# -- train


def train(args: Namespace) -> int:
    _train(
        args.recipe,
        args.out,
        model=args.model,
        params=config.assignments(args.p, "-p"),
        model_args=config.assignments(args.m, "-m"),
        seed=args.seed,
        device=args.devices,
    )
    return 0


def _train_steps(step: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    with told(where):
        cls = registry.find("recipes", step["recipe"])
    for params in product(step.get("params", {}), list_fields(cls)):
        for seed in step.get("seeds", [0]):
            yield {
                "recipe": step["recipe"],
                "out": _filled(step["out"], {**params, "seed": seed}, where),
                "model": step.get("model"),
                "plan": params,
                "plan_args": step.get("model_args", {}),
                "seed": seed,
                "where": where,
            }


def _filled(out: str, values: Mapping[str, Any], where: str) -> str:
    """The folder of a training: {name} stands for a parameter or the seed, and nothing else stands for anything."""
    names = re.findall(r"\{(.*?)\}", out)
    unknown = [name for name in names if name not in values]
    if unknown or re.search(r"[{}\0]", re.sub(r"\{.*?\}", "", out)):
        wrong = f": it has no parameter {brief(unknown[0])!r}" if unknown else ""
        hint = f"known: {brief(', '.join(values))}"
        raise Error(f"{where}: train: out {brief(out)!r} cannot be filled in{wrong}", hint=hint)
    return re.sub(r"\{(.*?)\}", lambda m: str(values[m[1]]), out)


def _train(
    recipe: str,
    out: str,
    *,
    model: str | None = None,
    params: Mapping[str, str] | None = None,
    model_args: Mapping[str, str] | None = None,
    plan: Mapping[str, Any] | None = None,
    plan_args: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    where: str = "plan",
) -> None:
    from bench.capabilities import has, held
    from bench.execution import resolve_devices
    from bench.identity import fingerprint
    from bench.progress import TrainingBar
    from bench.train import train as run_training
    from bench.weights import resolve

    for name, value in {**(plan or {}), **(params or {}), **(plan_args or {}), **(model_args or {})}.items():
        secrets().add_named(name, str(value))
    cls = registry.find("recipes", recipe)
    built, _ = config.build(cls, plan or {}, params or {}, where)
    spec: dict[str, Any] = {
        "recipe": built.name,
        "version": built.version,
        "fields": {f.name: getattr(built, f.name) for f in fields(built)},
        "seed": seed,
    }
    for name in {*config.markers(cls, Weights), *config.markers(cls, Path)}:
        if getattr(built, name):
            spec["fields"][name] = fingerprint(resolve(str(getattr(built, name))))
    device = resolve_devices(device)[0]
    opened = None
    if built.starts_from:
        if not model:
            needs = " and ".join(c.__name__ for c in built.starts_from)
            raise UsageError(f"recipe {recipe!r} edits a model with {needs}", hint="--model NAME")
        from bench.models import open_model

        bound = config.bind(registry.find("adapters", model), model, plan_args or {}, model_args or {}, where)
        spec["model"] = [
            registry.identity(model),
            {k: fingerprint(resolve(str(v))) if k in bound.weights and v else v for k, v in bound.what.items()},
        ]
        opened = open_model(model, bound.what, bound.how, device)
        lacking = [c.__name__ for c in built.starts_from if not has(opened, c)]
        if lacking:
            raise Error(f"recipe {recipe!r} needs {', '.join(lacking)}; {model!r} has {', '.join(held(opened))}")
    elif model:
        raise UsageError(f"recipe {recipe!r} starts from scratch", hint="leave --model out")
    manifest = None
    if name := config.data_field(cls):
        from bench.manifest import load

        manifest = load(getattr(built, name))
        manifest.check()
        spec["data"] = manifest.digest
    with TrainingBar(built, out) as bar:
        path = run_training(
            built, Path(out), seed=seed, model=opened, spec=spec, device=device, manifest=manifest, progress=bar.step
        )
    say(f"complete. {path}")


# -- list, show, compare, rescore


def listing(args: Namespace) -> int:
    from bench.show import print_list

    how, _ = config.resolve_how({}, {"store": args.store})
    return print_list(Store(how.store), args.kind, as_json=args.json)


def show(args: Namespace) -> int:
    from bench import show as view

    how, _ = config.resolve_how({}, {"store": args.store})
    run = Store(how.store).run(args.run)
    if args.figures:
        for path in view.draw_figures(run, Path(args.figures)):
            print(path)
        return 0
    if args.unit:
        return view.print_unit(run, args.unit, as_json=args.json)
    if args.json:
        emit("scores", [asdict(s) for s in run.scores()])
    else:
        view.print_run(run, slices=args.slices)
    return 0


def compare(args: Namespace) -> int:
    from bench.compare import compare as paired
    from bench.show import print_comparison

    how, _ = config.resolve_how({}, {"store": args.store})
    store = Store(how.store)
    comparison = paired(store.run(args.a), store.run(args.b))
    if args.json:
        emit("comparison", [asdict(d) for d in comparison.differences])
    else:
        print_comparison(comparison)
    return 0


def rescore(args: Namespace) -> int:
    from bench.reduction import derive, suite_of
    from bench.rescore import remeasure
    from bench.show import counted, judge_failures, print_scores

    how, _ = config.resolve_how({}, {"store": args.store})
    store = Store(how.store)
    runs = [store.run(name) for name in args.runs]
    for run in runs:
        say(f"{run.id}: {counted(remeasure(run, args.metric, how), 'unit')} measured")
        derive(run, suite_of(run))
        for text in judge_failures(run, run.table().rows):
            say(text)
        if not args.json:
            print_scores(run)
    if args.json:
        emit("scores", [asdict(s) for run in runs for s in run.scores()])
    return 0 if all(run.complete() for run in runs) else 3


# -- data, check


def data(args: Namespace) -> int:
    from bench import manifest_verbs
    from bench.progress import transfer

    for name in args.names:
        if args.action == "fetch":
            with transfer(name) as progress:
                print(manifest_verbs.fetch(name, progress=progress))
        elif args.action == "lock":
            print(manifest_verbs.lock(name))
        else:
            print(manifest_verbs.verify(name))
    return 0


def check(args: Namespace) -> int:
    from bench.check import check as conformance
    from bench.check import second_worker
    from bench.execution import resolve_devices
    from bench.models import open_model
    from bench.show import columns

    factory = registry.find("adapters", args.model)
    bound = config.bind(factory, args.model, {}, config.assignments(args.m, "-m"))
    device = resolve_devices(args.devices)[0]
    model = open_model(args.model, bound.what, bound.how, device)
    with second_worker(args.model, bound.what, bound.how, device) as elsewhere:
        found = conformance(model, size=args.size, device=device, elsewhere=elsewhere)
    findings = [asdict(f) for f in found]
    if args.suite:
        findings.append(_try_suite(args, bound, device))
    if args.json:
        emit("findings", findings)
    else:
        print(columns(["", "check", "found"], [[f["status"], f["name"], f["detail"]] for f in findings]))
    return 1 if any(f["status"] == "fail" for f in findings) else 0


def _try_suite(args: Namespace, bound: config.Arguments, device: str) -> dict[str, str]:
    """Two items of a suite, in a store that is thrown away."""
    import tempfile

    from bench.execution import execute

    cls = registry.find("suites", args.suite)
    suite, _ = config.build(cls, {}, config.assignments(args.p, "-p"))
    with tempfile.TemporaryDirectory() as folder:
        how = How(store=folder, devices=device, keep="none")
        try:
            run = execute(
                suite, args.model, arguments=bound, suite_ref=args.suite, limit=2, how=how, observer=_Silent()
            )
        except Error as e:
            return {"name": f"suite {suite.name}", "status": "fail", "detail": str(e)}
        failures = run.failures()
        if failures:
            error = failures[0].error or {}
            return {"name": f"suite {suite.name}", "status": "fail", "detail": f"{error['kind']}: {error['message']}"}
        return {"name": f"suite {suite.name}", "status": "ok", "detail": f"{len(run.table())} items scored"}


def _Silent():
    from bench.execution import Observer

    class Silent(Observer):
        def say(self, text: str) -> None: ...

    return Silent()
