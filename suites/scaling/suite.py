"""Scaling laws: the suite that trains one design at a grid of sizes and budgets, and the laws of `bench fit`."""

from __future__ import annotations

import io
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from bench.capabilities import Scalable
from bench.suite import Suite
from bench.types import Error, Estimate, Figure, Finding, Table, Unit, UsageError, Weights

SAMPLED = {  # headings of a table of sampled checkpoints, as in suites.scaling.columns.NAMES
    "run_id": ("runid", "run", "runname", "name", "checkpoint", "model"),
    "guidance": ("guidance", "cfg", "cfgscale", "guidancescale", "w"),
    "loss": ("loss", "valloss", "validationloss", "evalloss", "testloss"),
    "flops": ("flops", "c", "compute", "trainingflops", "trainflops"),
    "value": ("fid", "fd", "frechet", "kid", "cmmd", "fvd", "distance", "value"),
    "budget": ("budget",),
    "n_gen": ("ngen", "numgen", "numgenerated", "samples"),
    "extractor": ("extractor", "network", "features"),
}
COLUMNS = ("params", "tokens", "flops", "loss", "budget", "run_id", "lr", "loss_sd", "condition", "is_final")


@dataclass(frozen=True)
class Scaling(Suite):
    """An isoFLOP study: a design trained at several sizes for each of several budgets, and the law of their losses.

    A unit is one training, from nothing to the end of its schedule; a killed one goes on inside. Sizes lie around a
    guess of the optimum, `centre` parameters at the first budget, growing with compute to the power `exponent`.
    """

    budgets: tuple[float, ...] = (3e10, 1e11, 3e11, 1e12)  # training FLOPs of each run
    sizes: int = 7  # for each budget
    centre: float = 15_000  # parameters: about the best size at the first budget
    exponent: float = 0.5  # with which the best size is thought to grow
    reach: float = 6.0  # sizes lie between centre / reach and centre * reach
    condition: Literal["class", "text"] = "class"
    latents: Weights = ""  # a file of one's own, see `bench train dit`
    vae: Weights = "mini-sd"  # or the small world's pictures through this autoencoder
    pictures: int = 40_000  # to learn from
    validation: int = 2048  # to measure on

    name: ClassVar[str] = "scaling"
    version: ClassVar[int] = 1
    requires: ClassVar[tuple[type, ...]] = (Scalable,)
    patience: ClassVar[float] = 7 * 86_400.0  # a unit is a training

    def __post_init__(self):
        if not self.budgets or any(not b > 0 for b in self.budgets) or len(set(self.budgets)) < len(self.budgets):
            raise UsageError("scaling: budgets must be positive, none twice", hint="-p budgets=3e10,1e11,3e11,1e12")
        if self.sizes < 1 or self.centre <= 0 or self.reach <= 1:
            raise UsageError("scaling: sizes and centre must be positive, reach more than 1")

    @property
    def metrics(self) -> tuple[Law, ...]:
        return (Law(),)

    def units(self, _: None) -> Iterator[Unit]:
        for budget in self.budgets:
            for k in range(self.sizes):
                yield Unit(f"{budget:.3g}/{k}", (f"{budget:.3g}/{k}",), {"budget": budget, "size": k}, cost=budget)

    def run(self, unit: Unit, model: Any, ctx: Any) -> Iterator[tuple[list[str], Mapping[str, Any]]]:
        from suites.scaling.recipes import DATA, open_data

        fields = {name: getattr(self, name) for name in DATA}
        data = open_data(fields, str(ctx.device))
        budget, k = float(unit.params["budget"]), int(unit.params["size"])
        training = model.trainings(budget, self.targets(budget), data.cell, fields)[k]
        folder = ctx.train(unit, training)
        measured = json.loads((folder / "recipe.json").read_text())["figures"]
        facts = {**training.facts(data.cell), **measured}
        seen = facts["tokens"] * min(1.0, len(data.train) / (training.total * getattr(training, "batch", 1)))
        row = {"budget": budget, **facts, "unique_tokens": seen, "signature": data.signature}
        yield list(unit.items), {name: [value] for name, value in row.items()}

    def targets(self, budget: float) -> list[float]:
        """The sizes that a budget asks for, in parameters, rising."""
        centre = self.centre * (budget / min(self.budgets)) ** self.exponent
        if self.sizes == 1:
            return [centre]
        return [centre * self.reach ** (2 * k / (self.sizes - 1) - 1) for k in range(self.sizes)]

    def figures(self, table: Table) -> Iterator[Figure]:
        found, _ = _analysis(table)
        return iter(_figures(found) if found is not None else ())


@dataclass(frozen=True)
class Law:
    """Exponents and the floor of L(N, D) = E + A N^-alpha + B D^-beta, the exponent of N* by isoFLOP parabolas, and
    what to expect of ten times the largest budget, each with its interval. Sizes are parameters of the backbone."""

    name = "law"
    version = 1
    unit = ""
    better = "none"

    def measure(self, media: Any, ctx: Any) -> Mapping[str, Any]:
        return {}  # the suite's columns are enough

    def reduce(self, table: Table) -> Mapping[str, Estimate]:
        found, why = _analysis(table)
        if found is None or found.fit is None:
            return {"a": Estimate(None, n=len(table), note=why or "; ".join(found.warnings))}
        largest = 10 * float(found.runs.flops.max())
        names = {f"surface: {q}": q.replace(" ", "-") for q in ("E", "alpha", "beta", "a", "b", "gamma")}
        names |= {f"surface: {q}({largest:.3g})": f"{q[0]}-at-10x" for q in ("N*", "D*", "L*")}
        names["isoFLOP: a"] = "a-isoflop"
        note = "; ".join(found.warnings)
        return {
            name: Estimate(*found.estimates[key], method=found.resampling.partition(":")[0], n=len(table), note=note)
            for key, name in names.items()
            if key in found.estimates
        }

    def signature(self, table: Table) -> str:
        cells = sorted({str(s) for s in table.column("signature")})
        return f"law|huber_log_auto|{' and '.join(cells)}|v:{self.version}"


def _analysis(table: Table) -> tuple[Any, str]:
    """The analysis of a suite's rows with FLOPs as counted, or None and why there is none."""
    from suites.scaling import analysis, measure
    from suites.scaling.table import ingest

    named = {name: name for name in ("params", "tokens", "flops", "loss", "budget", "lr")} | {"run_id": "item"}
    try:
        measure.one_cell([str(s) for s in table.column("signature")])
        runs = ingest(table.rows, named)
        kappa = runs.kappa
        return analysis.analyse(runs, kappa=kappa, seed=table.seed), ""
    except ValueError as e:
        return None, str(e)


class ScalingFit:
    """The law `scaling`: L(N, D) = E + A N^-alpha + B D^-beta beside isoFLOP profiles, on any table of trainings."""

    about = "power laws of loss in parameters, tokens and compute, by all approaches"

    def options(self, verb: ArgumentParser) -> None:
        """Adds what this law can be told. Nothing heavy is imported for it."""
        columns = verb.add_argument_group("columns, where their headings are not recognised")
        for name in COLUMNS:
            columns.add_argument(f"--{name.replace('_', '-')}", metavar="COLUMN", dest=f"column_{name}")
        columns.add_argument(
            "--where", action="append", default=[], metavar="COLUMN=TEXT", help="use rows with this text only"
        )
        law = verb.add_argument_group("the law")
        objectives = "huber_log_auto, huber_log, ls_log, ls_raw, lad_log or asym"
        law.add_argument("--objective", default="huber_log_auto", metavar="NAME", help=objectives)
        law.add_argument("--form", default="full", metavar="NAME", help="full, tied (alpha = beta) or no_floor (E = 0)")
        law.add_argument("--kappa", type=float, metavar="X", help="FLOPs per parameter and token (as counted, else 6)")
        law.add_argument("--resampling", default="", metavar="KIND", help="pairs, cluster, residual, wild, parametric")
        law.add_argument("--resamples", type=int, default=1000, metavar="N", help="how many (1,000)")
        law.add_argument("--seed", type=int, default=0, metavar="N", help="of the resamples (0)")
        where = "predict at this compute (10 times the largest)"
        law.add_argument("--at", type=float, action="append", default=[], metavar="FLOPS", help=where)
        law.add_argument("--keep-twins", action="store_true", help="keep rows of the same size and budget")
        law.add_argument("--drop-highest", type=int, default=0, metavar="K", help="leave out the K highest losses (0)")
        law.add_argument("--propose-grid", action="store_true", help="print the trainings to make next")

    def __call__(self, rows: Path | Sequence[Mapping[str, Any]], source: str, args: Namespace) -> Finding:
        """Fits a file or rows. Raises Error for a table that cannot be used, UsageError for an unknown name."""
        from suites.scaling import analysis, fit
        from suites.scaling.columns import TableError, read_rows
        from suites.scaling.table import KAPPA, dropped_lines, ingest

        if args.resamples < 2:
            raise UsageError(f"--resamples {args.resamples} must be 2 or more")
        if args.drop_highest < 0:
            raise UsageError(f"--drop-highest {args.drop_highest} must be 0 or more")
        if args.kappa is not None and not args.kappa > 0:
            raise UsageError(f"--kappa {args.kappa:g} must be more than 0")
        if any(not c > 0 for c in args.at):
            raise UsageError("--at must be more than 0 FLOPs")
        if args.objective not in fit.OBJECTIVES:
            raise UsageError(f"objective {args.objective!r} is unknown", hint=f"one of {', '.join(fit.OBJECTIVES)}")
        if args.form not in fit.FORMS:
            raise UsageError(f"form {args.form!r} is unknown", hint=f"one of {', '.join(fit.FORMS)}")
        named = {name: v for name in COLUMNS if (v := getattr(args, f"column_{name}")) is not None}
        where = {}
        for text in args.where:
            heading, equals, value = text.partition("=")
            if not equals:
                raise UsageError(f"--where {text!r} is not COLUMN=TEXT")
            where[heading] = value
        try:
            table = read_rows(rows) if isinstance(rows, Path) else rows
            runs = ingest(
                table,
                named,
                where=where,
                kappa=args.kappa or KAPPA,
                best_of_twins=not args.keep_twins,
                drop_highest=args.drop_highest,
            )
            kappa = args.kappa or (KAPPA if runs.derived else runs.kappa)
            found = analysis.analyse(
                runs,
                objective=args.objective,
                form=args.form,
                kind=args.resampling,
                count=args.resamples,
                seed=args.seed,
                at=args.at,
                kappa=kappa,
            )
            proposals = analysis.propose_grid(found) if args.propose_grid else []
        except TableError as e:
            raise Error(f"{source}: {e}", hint="name a column with --params, --tokens, --flops or --loss") from None
        except ValueError as e:
            raise Error(f"{source}: {e}") from None
        return Finding(
            title=f"Scaling law of {source}",
            about=_about(found),
            estimates=[
                {"quantity": name, "value": v[0], "low": v[1], "high": v[2]} for name, v in found.estimates.items()
            ],
            warnings=found.warnings,
            notes=(
                *(f"{name} read from {heading!r}" for name, heading in runs.columns.items()),
                *runs.notes,
                f"N* and D* lie on C = {kappa:.3g} N D",
                *(f"not used, {line}" for line in dropped_lines(runs)),
                *([f"resampling: {found.resampling}"] if found.resampling else []),
            ),
            figures=_figures(found),
            table=[{"budget": p.budget, "params": p.params, "tokens": p.tokens, "reason": p.reason} for p in proposals],
            record=found.to_json(),
            files={"resamples.npz": _resamples(found)} if found.resamples is not None else {},
        )


def _about(found: Any) -> str:
    runs = found.runs
    budgets = len(set(runs.budget.tolist()))
    text = f"{len(runs)} trainings at {budgets} budget{'' if budgets == 1 else 's'}, {runs.flops.min():.2g} to "
    text += f"{runs.flops.max():.2g} FLOPs"
    if found.fit is not None:
        fit = found.fit
        text += f". Objective {fit.objective}, delta {fit.delta:.2g}, residual scale {fit.sigma:.2g}; "
        text += f"{fit.agreeing} of {fit.starts} starts agree"
    return text + "."


def _figures(found: Any) -> list[Figure]:
    from suites.scaling.figures import figures

    return [Figure(one.name, one.title, one.rows, one.draw, one.note) for one in figures(found)]


def _resamples(found: Any) -> bytes:
    out = io.BytesIO()
    names = np.array(["E", "A", "B", "alpha", "beta"])
    np.savez(out, surfaces=found.resamples.surfaces, columns=names, profile_exponents=found.profile_exponents)
    return out.getvalue()


class LossFid:
    """The law `loss-fid`: does a training loss tell how good pictures are, at each guidance scale?"""

    about = "rank agreement of loss and FID at each guidance scale, and the best scale along compute"

    def options(self, verb: ArgumentParser) -> None:
        columns = verb.add_argument_group("columns, where their headings are not recognised")
        for name in SAMPLED:
            columns.add_argument(f"--{name.replace('_', '-')}", metavar="COLUMN", dest=f"column_{name}")
        verb.add_argument("--resamples", type=int, default=4000, metavar="N", help="draws of whole runs (4,000)")
        verb.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")

    def __call__(self, rows: Path | Sequence[Mapping[str, Any]], source: str, args: Namespace) -> Finding:
        """Rows are checkpoints sampled at one guidance scale each. Raises Error for a table that cannot be used."""
        from suites.scaling import figures
        from suites.scaling.columns import TableError, number, read_rows, recognise
        from suites.shared import correlation

        if args.resamples < 100:
            raise UsageError(f"--resamples {args.resamples} must be 100 or more")
        named = {name: v for name in SAMPLED if (v := getattr(args, f"column_{name}")) is not None}
        try:
            table = read_rows(rows) if isinstance(rows, Path) else rows
            known = recognise(dict.fromkeys(h for row in table for h in row), named, SAMPLED)
            if missing := [n for n in ("run_id", "guidance", "loss", "flops", "value") if n not in known]:
                raise TableError(f"no column is {missing[0]}; name it with --{missing[0].replace('_', '-')} COLUMN")
            text = {n: [str(row.get(h, "")) for row in table] for n, (h, _) in known.items()}
            numbers = {
                n: [number(row.get(known[n][0])) * known[n][1] for row in table]
                for n in ("guidance", "loss", "flops", "value", "budget")
                if n in known
            }
            found = correlation.scores(
                text["run_id"],
                **numbers,
                n_gen=text.get("n_gen", "not said"),
                extractor=text.get("extractor", "not said"),
            )
            agreed = correlation.correlations(found, count=args.resamples, seed=args.seed)
        except ValueError as e:
            raise Error(f"{source}: {e}") from None
        best = correlation.best_guidance(found)
        warnings = [
            f"no column says {what}: it must be the same for all rows"
            for what in ("n_gen", "extractor")
            if what not in known
        ]
        if min(agreed.runs) < correlation.LEAST_RUNS:
            warnings.append(f"{min(agreed.runs)} runs at a scale: below {correlation.LEAST_RUNS} there is no interval")
        if agreed.trusted < max(agreed.guidance):
            warnings.append(
                f"above guidance {agreed.trusted:g} the loss orders pictures worse than at {agreed.guidance[0]:g}, "
                f"by more than {correlation.MARGIN:g} of Spearman's rho"
            )
        estimates = [
            {"quantity": f"guidance {w:g}: {name}", **_bounded(statistics[name])}
            for w, statistics in zip(agreed.guidance, agreed.statistics, strict=True)
            for name in statistics
        ]
        estimates.append({"quantity": "largest guidance at which the loss is a guide", **_bounded((agreed.trusted,))})
        if sum(not b.problem for b in best) >= 3:
            law = correlation.guidance_law(best, count=args.resamples, seed=args.seed)
            estimates.append({"quantity": "best guidance ~ C^p: p", **_bounded(law.exponent)})
        drawn = [figures.agreement(agreed), figures.loss_against_value(found, known["value"][0])]
        return Finding(
            title=f"Loss and {known['value'][0]} of {source}",
            about=f"{len(table)} values of {len(found.names)} runs at {len(agreed.guidance)} guidance scales; "
            f"correlations of the loss with ln {known['value'][0]}, runs drawn whole.",
            estimates=estimates,
            warnings=warnings,
            notes=(
                *(f"{name} read from {heading!r}" for name, (heading, _) in known.items()),
                "partial: Spearman's given ln C; within budget: Kendall's over pairs of one budget",
                *(f"no best guidance for {b.run} at {b.flops:.3g} FLOPs: {b.problem}" for b in best if b.problem),
            ),
            figures=[Figure(one.name, one.title, one.rows, one.draw, one.note) for one in drawn],
            record={
                "guidance": list(agreed.guidance),
                "runs": list(agreed.runs),
                "rows": list(agreed.rows),
                "estimates": {e["quantity"]: {k: e[k] for k in ("value", "low", "high")} for e in estimates},
                "differences": [vars(c) for c in agreed.comparisons],
                "best_guidance": [
                    {"run": b.run, "flops": b.flops, **_bounded(b.guidance), "fid": b.value, "problem": b.problem}
                    for b in best
                    if not b.problem
                ],
                "warnings": warnings,
            },
        )


def _bounded(interval: Sequence[float]) -> dict[str, float | None]:
    """Value, low and high; what is not finite is null."""
    value, low, high = (*interval, float("nan"), float("nan"))[:3]
    return {k: float(v) if np.isfinite(v) else None for k, v in (("value", value), ("low", low), ("high", high))}
