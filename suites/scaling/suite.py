"""What `bench fit` offers of scaling laws: options in, a Finding out."""

from __future__ import annotations

import io
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.types import Error, Figure, Finding, UsageError

COLUMNS = ("params", "tokens", "flops", "loss", "budget", "run_id", "lr", "loss_sd", "condition", "is_final")


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
        law.add_argument("--kappa", type=float, default=6.0, metavar="X", help="FLOPs per parameter and token (6)")
        law.add_argument("--resampling", default="", metavar="KIND", help="pairs, cluster, residual, wild, parametric")
        law.add_argument("--resamples", type=int, default=1000, metavar="N", help="how many (1,000)")
        law.add_argument("--seed", type=int, default=0, metavar="N", help="of the resamples (0)")
        where = "predict at this compute (10 times the largest)"
        law.add_argument("--at", type=float, action="append", default=[], metavar="FLOPS", help=where)
        law.add_argument("--keep-twins", action="store_true", help="keep rows of the same size and budget")
        law.add_argument("--propose-grid", action="store_true", help="print the trainings to make next")

    def __call__(self, rows: Path | Sequence[Mapping[str, Any]], source: str, args: Namespace) -> Finding:
        """Fits a file or rows. Raises Error for a table that cannot be used, UsageError for an unknown name."""
        from suites.scaling import analysis, fit
        from suites.scaling.table import TableError, dropped_lines, ingest, read_rows

        if args.resamples < 2:
            raise UsageError(f"--resamples {args.resamples} must be 2 or more")
        if not args.kappa > 0:
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
            runs = ingest(table, named, where=where, kappa=args.kappa, best_of_twins=not args.keep_twins)
            found = analysis.analyse(
                runs,
                objective=args.objective,
                form=args.form,
                kind=args.resampling,
                count=args.resamples,
                seed=args.seed,
                at=args.at,
                kappa=args.kappa,
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
    import numpy as np

    out = io.BytesIO()
    names = np.array(["E", "A", "B", "alpha", "beta"])
    np.savez(out, surfaces=found.resamples.surfaces, columns=names, profile_exponents=found.profile_exponents)
    return out.getvalue()
